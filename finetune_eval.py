"""Score a network on a test set that it never saw, train it on some labels first, or let it draw
masks for a folder of images.

    python finetune_eval.py --run runs/demo/resnet50/medsass/seed0
    python finetune_eval.py --run runs/demo/resnet50/medsass/seed0 --protocol finetune --labels 0.1
    python finetune_eval.py --dataset demo --backbone resnet50 --protocol supervised
    python finetune_eval.py --dataset demo --backbone resnet50 --protocol reference
    python finetune_eval.py --encoder encoder.pth --dataset isic --backbone vit_small
    python finetune_eval.py --run runs/demo/resnet50/medsass/seed0 --predict my_images --out masks
    python finetune_eval.py --run runs/demo/resnet50/medsass/seed0 --export network.pt2
    python finetune_eval.py --report

transfer: the pre-trained network as it is; an encoder alone gets a fresh, seeded decoder that
nobody trained (section 4.1). frozen: the decoder is trained, the encoder stays. finetune: all is
trained. semi: all is trained, on the labelled images, and where they are too few also on the
others, with the masks that the pre-trained network draws. supervised: all is trained, from scratch.
classify: a linear probe on the encoder's pooled features (appendix D). reference: what needs no
training, on the same test images. One JSON per evaluation, under results/, with a CSV of its test
images; --report writes results/README.md from them.
"""

import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import shlex
import signal
import sys
import urllib.parse
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

import prepare_data
from models import BACKBONES, build_unet, load_encoder, read_encoder
from pretrain import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    REFINEMENTS,
    Batches,
    Images,
    MedSASS,
    Options,
    check_numbers,
    clear_run,
    decide_refinement,
    end_on_sigterm,
    explain_memory,
    is_finished,
    load_checkpoint,
    normalise,
    open_run,
    paper_augmentation,
    pick_device,
    pick_precision,
    pseudo_mask,
    read_log,
    seed_from,
    train,
    write_atomically,
    write_csv,
    write_json,
    write_masks,
)

BATCH = 16                                  # test images at a time; no score depends on it
LABEL_PROTOCOLS = ("frozen", "finetune", "semi", "supervised", "classify")     # that train
REFERENCE = ("all_foreground", "all_background", "raw_threshold", "raw_threshold_inverted",
             "refined_threshold", "random_init", "best_constant")
METRICS = ("iou", "dice", "precision", "recall", "accuracy")
COUNTS = ("tp", "fp", "fn", "tn")
WEIGHTS = dict(pretrained="best.pt", fresh="encoder.pth")       # what a decoder's start needs

# -------------------------------------------------------------------------- metrics (appendix G)


def count_pixels(pred, target):
    """bool (N, H, W) twice -> int64 (N, 4): true positives, false positives, false negatives, true
    negatives."""
    pred = pred.reshape(len(pred), -1)
    target = target.reshape(len(target), -1)
    counts = [pred & target, pred & ~target, ~pred & target, ~pred & ~target]
    return np.stack([pixels.sum(axis=1) for pixels in counts], axis=1).astype(np.int64)


def scores_from_counts(counts):
    """int (..., 4) of count_pixels -> dict of float (...), each in [0, 1], one for each of METRICS.

    0 / 0 is 1 where neither mask has any foreground (nothing to find, nothing found), and 0
    elsewhere.
    """
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    if_empty = np.where(tp + fp + fn == 0, 1.0, 0.0)

    def ratio(part, whole):
        return np.where(whole > 0, part / np.maximum(whole, 1), if_empty)

    return dict(
        iou=ratio(tp, tp + fp + fn),
        dice=ratio(2 * tp, 2 * tp + fp + fn),
        precision=ratio(tp, tp + fp),
        recall=ratio(tp, tp + fn),
        accuracy=ratio(tp + tn, tp + fp + fn + tn))


def resampled_scores(counts, weights):
    """counts (N, 4), and how often each image counts, (R, N) -> dict of float (R,): iou_global,
    iou_image, ...: counts summed over the set, and the mean over its images."""
    scores = {}
    overall = scores_from_counts(weights @ counts)
    for name, of_image in scores_from_counts(counts).items():
        scores[f"{name}_global"] = overall[name]
        scores[f"{name}_image"] = weights @ of_image / weights.sum(axis=1)
    return scores


def segmentation_scores(pred, target):
    """bool (N, H, W) twice -> dict iou, dice, precision, recall, accuracy, each "_global" (counts
    summed over the set) and "_image" (mean over images). Raises ValueError for another dtype or
    unequal shapes."""
    is_bool = pred.dtype == target.dtype == bool
    if not is_bool or pred.shape != target.shape or pred.ndim != 3 or not len(pred):
        raise ValueError("two bool arrays (N, H, W) of one shape are needed, not "
                         f"{pred.dtype} {pred.shape} and {target.dtype} {target.shape}")
    scores = resampled_scores(count_pixels(pred, target), np.ones((1, len(pred)), np.int64))
    return {name: float(value[0]) for name, value in scores.items()}


def boundary(mask):
    """bool (H, W) -> bool (H, W): foreground with background, or the picture's edge, on one of its
    four sides."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = cv2.erode(mask.astype(np.uint8), cross, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask & (inner == 0)


def distance_to(pixels):
    """bool (H, W) -> float (H, W): how far each place is from the nearest of these pixels."""
    far = cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.sqrt(np.rint(far.astype(np.float64) ** 2))        # squares are whole: no rounding


def hausdorff95(pred, target):
    """bool (N, H, W) twice -> float (N,): the 95 % Hausdorff distance of each pair, in pixels.

    From every boundary pixel of one mask to the nearest boundary pixel of the other: the 95th
    percentile, and of the two directions the larger. Two empty masks are 0 apart; an empty one and
    another as far as the picture's diagonal.
    """
    distances = []
    for a, b in zip(pred, target, strict=True):
        if a.any() and b.any():
            edge_a = boundary(a)
            edge_b = boundary(b)
            there = np.percentile(distance_to(edge_b)[edge_a], 95)
            back = np.percentile(distance_to(edge_a)[edge_b], 95)
            distances.append(float(max(there, back)))
        else:
            distances.append(math.hypot(*a.shape) if a.any() or b.any() else 0.0)
    return np.array(distances)


@functools.lru_cache(maxsize=2)             # the report draws the same ones for every cell
def bootstrap_weights(groups, rounds=2000, seed=0):
    """The group of each image, a tuple (N,) -> float (rounds, N), whole: bootstrap over groups, how
    often each image is drawn in each round (Efron 1979)."""
    _, index = np.unique(groups, return_inverse=True)
    n = index.max() + 1
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=rounds)
    return drawn[:, index].astype(np.float64)


def interval(samples):
    """float (R,) -> [low, high]: the middle 95 %."""
    return [float(bound) for bound in np.percentile(samples, (2.5, 97.5))]


def summarise(table, groups):
    """float (N, 5), COUNTS and hd95 -> dict: all scores and hd95_image (pixels), each also with
    "_ci", its 95 % bootstrap interval over groups."""
    def scores(weights):
        hd95 = weights @ table[:, 4] / weights.sum(axis=1)
        return resampled_scores(table[:, :4], weights) | dict(hd95_image=hd95)

    values = scores(np.ones((1, len(table))))
    block = {name: float(value[0]) for name, value in values.items()}
    for name, samples in scores(bootstrap_weights(groups)).items():
        block[f"{name}_ci"] = interval(samples)
    return block


def mean_iou(tables, weights):
    """A list of tables (N, 5) over the same images, one per seed, and weights (R, N) -> float (R,):
    the mean over seeds of the global IoU."""
    counts = np.stack(tables)[..., :4]
    return scores_from_counts(weights @ counts)["iou"].mean(axis=0)


def paired_difference(first, second, groups):
    """Two lists of tables (N, 5) over the same images -> (difference of their mean global IoU,
    [low, high]).

    The same resampled images are scored for both: what is hard for all cancels (Efron & Tibshirani
    1993).
    """
    once = np.ones((1, len(groups)))
    weights = bootstrap_weights(groups)
    difference = mean_iou(first, once) - mean_iou(second, once)
    samples = mean_iou(first, weights) - mean_iou(second, weights)
    return float(difference[0]), interval(samples)


# ------------------------------------------------------------------------- networks and batches

@dataclass
class Job:
    """One evaluation, as it was decided from the flags, the run and the data set."""
    args: argparse.Namespace                # the flags, as they were given
    data: Path                              # the prepared data set
    settings: dict                          # of the network's run, or made up where it has none
    seed: int
    decoder: str                            # what it starts from: "pretrained" or "fresh"
    weights: Path | None                    # of the network, or of its encoder
    name: str                               # of the folder of its training
    device: torch.device
    commands: list                          # that prepared the data, made the run, and this one


def read_run(run):
    """(settings, command) of a run folder, from its config.json; ends the program where it is not a
    finished run."""
    try:
        config = json.loads((run / "config.json").read_text())
        settings, command = config["settings"], config["command"]
    except (OSError, ValueError, KeyError):
        sys.exit(f"{run} is not a run folder: it has no readable config.json (see python "
                 "pretrain.py --help)")
    if not is_finished(run):
        sys.exit(f"{run} is not finished: run its command again, it goes on where it stopped")
    return settings, command


@contextlib.contextmanager
def exit_on_value_error():
    """A ValueError inside, as models.py raises for files that do not fit, ends the program with its
    message."""
    try:
        yield
    except ValueError as error:
        sys.exit(str(error))


def load_weights(unet, path, decoder):
    """Load the weights in `path`: of the whole U-Net where `decoder` is "pretrained", else of its
    encoder. Ends the program where they do not fit."""
    with exit_on_value_error():
        if decoder == "pretrained":
            unet.load_state_dict(load_checkpoint(path, "cpu")["model"])
        else:
            load_encoder(unet, path)


@torch.inference_mode()
def predict_logits(unet, images, device, flips=False):
    """uint8 ndarray (B, S, S, 3) -> float32 ndarray (B, S, S): logits, foreground where > 0; with
    flips their mean over the picture as it is, flipped up and down, left and right, and both."""
    batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # channels_last
    batch = normalise(batch.to(device))
    logits = unet(batch)[:, 0].float()      # (B, S, S)
    if flips:
        for axes in ((2,), (3,), (2, 3)):
            logits += unet(batch.flip(axes)).flip(axes)[:, 0].float()
        logits /= 4
    return logits.cpu().numpy()


def score_images(predict, images, masks, batch=BATCH):
    """float (N, 5), COUNTS and hd95 of each image of a mapped test set. predict: uint8
    (B, S, S, 3) -> bool (B, S, S). Memory: one batch."""
    table = []
    for start in tqdm(range(0, len(images), batch), "score", unit=" batches", leave=False):
        target = masks[start:start + batch].astype(bool)
        pred = predict(np.array(images[start:start + batch]))
        table.append(np.column_stack([count_pixels(pred, target), hausdorff95(pred, target)]))
    return np.concatenate(table)


def groups_of(names):
    """The group of each row of a part's CSV, a tuple; a row without one is a group of its own."""
    return tuple(row["group"] or row["name"] for row in names)


def open_test(data):
    """(images, masks, rows of test.csv) of the test part; ends the program where nothing can be
    scored."""
    images, masks = prepare_data.open_part(data, "test")
    if masks is None:
        sys.exit(f"{data} has no test masks: nothing can be scored; --predict draws masks without "
                 "any")
    if not masks.any():
        print(f"{data}: no test mask has any foreground; IoU is 1 where nothing is predicted, "
              "else 0")
    return images, masks, prepare_data.read_names(data, "test")


# ----------------------------------------------------------------------------- training on labels

def labelled_rows(names, labels, seed, of):
    """Which rows of a part are taken as labelled: a list of indices, nested in `labels`, the same
    for every method.

    Groups come in an order of (seed) alone, their images one after the other. labels: a share of
    them (float), or a count (int) out of `of` training images, of which any other part gives its
    like share; never fewer than one.
    """
    groups = collections.defaultdict(list)
    for k, group in enumerate(groups_of(names)):
        groups[group].append(k)
    rows = []
    for group in np.random.default_rng(seed_from(seed, 2)).permutation(sorted(groups)).tolist():
        rows += groups[group]
    share = labels if isinstance(labels, float) else labels / of
    return rows[:max(1, round(share * len(names)))]


class WithClass(Images):
    """Images, and to each view its class: `classes`, the class number of each row of the part. Key
    (epoch, k) -> (row, [view, int64 ()])."""

    def __init__(self, folder, part, transform, seed, rows, classes):
        super().__init__(folder, part, transform, seed, rows)
        self.classes = classes

    def __getitem__(self, key):
        row, view = super().__getitem__(key)
        return row, [view, torch.tensor(self.classes[row])]


class PartlyLabelled(Images):
    """All training images with the masks of one file. Even draws are of the labelled `rows`, odd
    ones of all, each in stored order, over and over. Key (epoch, k) -> (row, [view, mask
    (1, S, S)])."""

    def __init__(self, folder, transform, seed, rows, masks):
        super().__init__(folder, "train", transform, seed, masks=masks)
        self.labelled = rows

    def __getitem__(self, key):
        epoch, k = key
        draw = epoch * len(self) + k        # from the beginning of the run
        pair = draw // 2
        if draw % 2:
            row = pair % len(self)
        else:
            row = self.labelled[pair % len(self.labelled)]
        return super().__getitem__((draw, row))


class FineTuning(MedSASS):
    """MedSASS's U-Net, loss and optimiser, with true masks. The paper gives no schedule: the rate
    rises over the first tenth of the steps and falls to 0 by a cosine, and the last weights are
    kept, because one or two validation labels cannot choose."""

    keep_best = False

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        warm_up = max(1, total_steps // 10)
        if step < warm_up:
            factor = (step + 1) / warm_up
        else:
            done = (step - warm_up) / (total_steps - warm_up)
            factor = 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = self.lr * factor

    def health(self):
        """Shares of foreground in the last batch: of the true masks, and of what was drawn."""
        true, predicted = self.shares
        return dict(true_foreground=true.item(), predicted_foreground=predicted.item())

    def samples(self, views):
        """{title: pictures (B, 1 or 3, H, W)}: what it saw and drew."""
        images, masks = views
        return {"image": images, "truth": masks, "prediction": self.unet(normalise(images)) > 0}


def focal_cross_entropy(logits, target, gamma=2.0):
    """Focal loss over classes (Lin et al. 2017, eq. 4): the mean of -(1 - p) ** gamma log p.
    logits (B, C), target int64 (B,) -> scalar."""
    log_p = F.log_softmax(logits, dim=1).gather(1, target[:, None])[:, 0]
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


class Probe(nn.Module):
    """Linear layers on the pooled features of an encoder that stays as it is (appendix D).

    One on the mean over a ViT's patch tokens (384), or over a ResNet's layer2 (512 channels, all
    that MedSASS trains); and another on layer4 (2048), where the encoder has it, as the losses of
    BYOL, DINO and SimSiam train it. They share nothing and learn side by side. The members are
    those of every method in pretrain.py.
    """

    keep_best = True

    def __init__(self, backbone, img_size, classes, has_layer4=False):
        super().__init__()
        if backbone == "vit_small":
            self.stages = {"tokens": 384}
            self.encoder = build_unet(backbone, img_size).encoder
        else:
            self.stages = {"layer2": 512}
            depths = (2,)
            if has_layer4:
                self.stages["layer4"] = 2048
                depths = (2, 4)
            self.encoder = timm.create_model("resnet50", features_only=True, out_indices=depths)
        self.encoder.requires_grad_(False)
        self.linear = nn.ModuleList(nn.Linear(width, classes) for width in self.stages.values())
        self.lr, self.weight_decay = 3.6e-4, 1e-5

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    def logits(self, images):
        """uint8 (B, 3, S, S) -> float (B, C), a list, one per stage."""
        x = normalise(images)
        if "tokens" in self.stages:
            features = [self.encoder.forward_features(x)[:, 1:].mean(dim=1)]
        else:
            features = [stage.mean(dim=(2, 3)) for stage in self.encoder(x)]
        return [linear(pooled) for linear, pooled in zip(self.linear, features, strict=True)]

    def forward(self, views):
        images, target = views
        logits = self.logits(images)
        self.right = (logits[-1].argmax(dim=1) == target).float().mean()
        return sum(focal_cross_entropy(each, target) for each in logits)

    def optimizer(self):
        return torch.optim.Adam(self.linear.parameters(), self.lr, fused=True,
                                weight_decay=self.weight_decay)

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        """The rate is constant."""

    def after_backward(self):
        """No clipping."""

    def after_step(self, step, total_steps):
        """No moving average."""

    def collapsed(self, health):
        """Never a warning."""

    def health(self):
        """Share of the last batch that the deepest stage's layer classifies right."""
        return {"accuracy": self.right.item()}

    def samples(self, views):
        return {"image": views[0]}


@dataclass
class LabelledSets:
    """Data to train on labels with. n_train: images an epoch, as many for few labels as for all, so
    that every method has the same steps."""
    train: Images
    plain: Images                           # the same un-augmented, for BatchNorm
    val: Images
    n_train: int


def labelled_sets(job, keep=None, classes=None):
    """The LabelledSets of --labels. keep: for each part, the rows to choose from (unset:
    all). classes: for each part, the class number of each row, instead of masks. Ends the
    program where there are fewer images than labels asked for, or no masks."""
    labels = job.args.labels
    rows = {}
    of = {}
    for part in ("train", "val"):
        names = prepare_data.read_names(job.data, part)
        kept = range(len(names)) if keep is None else keep[part]
        of[part] = len(kept)
        chosen = labelled_rows([names[k] for k in kept], labels, job.seed, of["train"])
        rows[part] = [kept[k] for k in chosen]
    if not isinstance(labels, float) and labels > of["train"]:
        sys.exit(f"--labels {labels}: {job.data} has {of['train']} training images")
    print(f"labels: {len(rows['train'])} of {of['train']} training images, and {len(rows['val'])} "
          f"of {of['val']} validation images")

    def labelled(part, transform):
        if classes is not None:
            return WithClass(job.data, part, transform, job.seed, rows[part], classes[part])
        masks = job.data / f"{part}_masks.npy"
        if not masks.exists():
            sys.exit(f"{job.data} has no {part} masks: {job.args.protocol} needs them")
        return Images(job.data, part, transform, job.seed, rows[part], masks=masks)

    return LabelledSets(
        train=labelled("train", paper_augmentation()),
        plain=Images(job.data, "train", v2.Identity(), job.seed, rows["train"]),
        val=labelled("val", v2.Identity()),
        n_train=of["train"])


def training_folder(job):
    """The run folder of training on labels: in that of --run, or below --runs."""
    if not job.args.run:
        where = Path(job.args.runs) / job.data.name / job.settings["backbone"]
        return where / job.settings["variant"] / f"seed{job.seed}" / job.name
    if job.settings["seed"] == job.seed:
        return Path(job.args.run) / job.name
    return Path(job.args.run) / f"{job.name}-seed{job.seed}"        # another draw of labels


def fit(method, sets, job, epochs, subfolder=""):
    """Train `method`, on the device where it is, on LabelledSets by pretrain.py's loop in a run
    folder of its own, or go on with what is there. Returns the folder and a dict: n_labels_train,
    n_labels_val, budget_steps, steps, epochs_run, kept_epoch."""
    args = job.args
    folder = training_folder(job) / subfolder
    amp = pick_precision(args.amp, job.device, method)
    patience = 5 if method.keep_best else 0
    options = Options(epochs, args.batch_size, patience, job.seed, amp, args.workers)
    n_labels = len(getattr(sets.train, "labelled", sets.train))
    settings = job.settings | dict(
        dataset=job.data.name, protocol=args.protocol, labels=args.labels, decoder=job.decoder,
        loss="focal_tversky", batch_size=args.batch_size, seed=job.seed, epochs=epochs,
        patience=patience, lr=method.lr, weight_decay=method.weight_decay, amp=amp,
        n_train=n_labels, n_val=len(sets.val),
        train="encoder" if isinstance(method, Probe) else "end2end")
    with prepare_data.only_one(folder / ".lock"):
        open_run(settings, folder, job.commands[-1], args.overwrite)
        if not is_finished(folder):
            three = (sets.train, sets.plain, sets.val)
            train(method, three, options, folder, job.device, sets.n_train)
    epochs_run = len(read_log(folder))
    steps = len(Batches(sets.n_train, args.batch_size))
    return folder, dict(
        n_labels_train=n_labels, n_labels_val=len(sets.val), budget_steps=epochs * steps,
        steps=epochs_run * steps, epochs_run=epochs_run,
        kept_epoch=load_checkpoint(folder / "best.pt", "cpu")["epoch"])


def draw_rows(unet, weights, images, rows):
    """The masks, bool (S, S), that a network with `weights` draws for some `rows` of uint8
    (N, S, S, 3), may be mapped, one after the other. Leaves it with these weights, in eval mode."""
    unet.load_state_dict(weights)
    unet.eval()
    device = next(unet.parameters()).device
    for start in range(0, len(rows), BATCH):
        yield from predict_logits(unet, images[rows[start:start + BATCH]], device) > 0


def iou_of(pred, masks, rows):
    """Global IoU, 0 to 1, of masks, bool (S, S) each, and the `rows` of uint8 (N, S, S), may be
    mapped."""
    counts = np.zeros(4, np.int64)
    for mask, row in zip(pred, rows, strict=True):
        counts += count_pixels(mask[None], masks[row][None] > 0)[0]
    return float(scores_from_counts(counts)["iou"])


def compare_tuned(unet, pretrained, tuned, sets, folder):
    """Whether the network tuned on the labels is better than the pre-trained one: a dict, `trusted`
    and the IoUs that decide, kept in decision.json. Writes the pre-trained one's masks, with the
    true ones where there are labels, into train_masks.npy. pretrained, tuned: weights for `unet`.
    folder: the run folder of tuning.

    The pre-trained network errs alike on labelled and unlabelled images, so that a tuned one that
    is right agrees with it on the unlabelled as well as the truth does on the labelled; one that
    has learnt a few images by heart agrees less. So with
        ratio = IoU(tuned, pre-trained) on the unlabelled images
                / IoU(pre-trained, truth) on the labelled ones
    it is trusted where ratio >= 1, and not where ratio < .8; in between, and where all are
    labelled, the validation images decide.
    """
    path = folder / "decision.json"
    if path.exists():
        return json.loads(path.read_text())
    labelled = set(sets.train.rows)
    others = sorted(set(range(sets.n_train)) - labelled)
    images, truth = prepare_data.open_part(sets.train.path.parent, "train")

    def all_masks():
        drawn = draw_rows(unet, pretrained, images, others)
        for k, mask in enumerate(truth):
            yield mask if k in labelled else next(drawn)

    write_masks(all_masks(), truth.shape, folder / "train_masks.npy")
    val_images, val_truth = prepare_data.open_part(sets.train.path.parent, "val")
    result = {}
    for name, weights in dict(pretrained=pretrained, tuned=tuned).items():
        drawn = draw_rows(unet, weights, val_images, sets.val.rows)
        result[f"{name}_val_iou"] = iou_of(drawn, val_truth, sets.val.rows)
    trusted = result["tuned_val_iou"] >= result["pretrained_val_iou"]
    if others:
        drawn = draw_rows(unet, pretrained, images, sets.train.rows)
        result["pretrained_iou"] = iou_of(drawn, truth, sets.train.rows)
        masks = np.load(folder / "train_masks.npy", mmap_mode="r")
        result["agreement"] = iou_of(draw_rows(unet, tuned, images, others), masks, others)
        if result["agreement"] >= result["pretrained_iou"]:
            trusted = True
        elif result["agreement"] < 0.8 * result["pretrained_iou"]:
            trusted = False
    result["trusted"] = trusted
    write_json(path, result)
    return result


def fit_semi(method, sets, job, epochs):
    """As fit, on the labelled images, and where they are too few on the others, too, with the masks
    that the pre-trained network draws for them (self-training: Lee 2013).

    The first half of the epochs tunes the pre-trained network on the labels alone. If the tuned one
    is trusted (compare_tuned), it goes on so for the second half. Else the pre-trained one starts
    again: half of what it sees are labelled images, half are all images, with its own masks where
    there is no label. The dict has that of compare_tuned.
    """
    pretrained = {name: value.clone() for name, value in method.unet.state_dict().items()}
    method.lr = 1e-3 if job.args.lr is None else job.args.lr
    whole = training_folder(job)
    if job.args.overwrite:      # or the second half would be the old one's until it begins
        with prepare_data.only_one(whole / ".lock"):
            clear_run(whole)
    folder, first_half = fit(method, sets, job, epochs // 2, "labels")
    tuned = load_checkpoint(folder / "best.pt", "cpu")["model"]
    decision = compare_tuned(method.unet, pretrained, tuned, sets, folder)
    for name, value in decision.items():
        if name != "trusted":
            print(f"{name} {value:.3f}")
    if decision["trusted"]:
        print("the tuned network is trusted: on with the labels alone")
        method.unet.load_state_dict(tuned)
    else:
        print("the tuned network is not trusted: from the pre-trained one again, with its masks "
              "where there is no label")
        method.unet.load_state_dict(pretrained)
        train_set = PartlyLabelled(job.data, paper_augmentation(), job.seed, sets.train.rows,
                                   folder / "train_masks.npy")
        sets = replace(sets, train=train_set)
    method.lr /= 3                          # lower: the network is trained
    folder, result = fit(method, sets, job, epochs - epochs // 2)
    result["kept_epoch"] += first_half["epochs_run"]
    for name in ("budget_steps", "steps", "epochs_run"):
        result[name] += first_half[name]
    return folder, result | decision


# --------------------------------------------------------------------------------------- protocols

def mask_drawer(job, refine):
    """A function that draws masks without a network, uint8 (B, S, S, 3) -> bool (B, S, S), and what
    --refine has decided for it."""
    settings = job.settings
    if not refine:
        def draw(images):
            return pseudo_mask(images, settings["threshold"], settings["foreground"]) > 0

        return draw, {}
    images = prepare_data.open_part(job.data, "train")[0]
    refinement, evidence = decide_refinement(images, settings["foreground"], refine)
    return lambda batch: np.stack([refinement.draw(image) for image in batch]), evidence


def sheet_of_three(unet, images, masks, iou, job):
    """As the paper's Table 6: image, pseudo-mask, prediction, truth, of the test images of best,
    median and worst IoU."""
    refine = job.settings.get("refine", ())
    draw_mask = {"Otsu" if refine else "pseudo-mask": mask_drawer(job, ())[0]}
    if refine:
        draw_mask["refined mask"] = mask_drawer(job, refine)[0]
    names = prepare_data.read_names(job.data, "test")
    order = np.argsort(-iou, kind="stable")
    rows = []
    captions = []
    for title, k in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        image = np.array(images[k])
        pred = predict_logits(unet, image[None], job.device)[0] > 0
        drawn = [draw(image[None])[0] for draw in draw_mask.values()]
        rows.append([image, *drawn, pred, masks[k]])
        captions.append(f"{title}: IoU {iou[k]:.4f}   {names[k]['name']}"[:64])
    titles = ["image", *draw_mask, "prediction", "truth"]
    return prepare_data.contact_sheet(rows, titles, captions)


def segment(job):
    """transfer, frozen, finetune, semi, supervised: train if the protocol does, and score the
    network on the test part. Returns the result, {"": table (N, 5)}, and the qualitative sheet.
    Ends the program where masks that it needs are missing."""
    args = job.args
    backbone, size = job.settings["backbone"], job.settings["img_size"]
    images, masks, names = open_test(job.data)
    torch.manual_seed(seed_from(job.seed, 1))       # not the decoder that pre-training had
    part = "decoder" if args.protocol == "frozen" else "end2end"
    with exit_on_value_error():
        method = FineTuning(backbone, size, args.batch_size, train_part=part)
    if job.weights:
        load_weights(method.unet, job.weights, job.decoder)
    else:           # the encoder that pre-training starts from: all else is as in fine-tuning one
        torch.manual_seed(seed_from(job.seed))
        method.unet.encoder.load_state_dict(build_unet(backbone, size).encoder.state_dict())
    if job.decoder == "fresh":
        method.lr = 1e-3
    if args.lr is not None:
        method.lr = args.lr
    method.to(job.device, memory_format=torch.channels_last)
    result = {}
    if args.protocol in LABEL_PROTOCOLS:
        train_method = fit_semi if args.protocol == "semi" else fit
        folder, result = train_method(method, labelled_sets(job), job, args.epochs)
        method.unet.load_state_dict(load_checkpoint(folder / "best.pt", "cpu")["model"])
    unet = method.unet.eval()

    def predict(batch):
        return predict_logits(unet, batch, job.device, args.flips) > 0

    table = score_images(predict, images, masks)
    iou = scores_from_counts(table[:, :4])["iou"]
    sheet = sheet_of_three(unet, images, masks, iou, job)
    return result | summarise(table, groups_of(names)), {"": table}, sheet


def best_constant(data):
    """The cut of the mean training mask with the best IoU over the training part, when it is
    predicted for every image: bool (S, S). None where there are no masks."""
    masks = prepare_data.open_part(data, "train")[1]
    if masks is None:
        return None
    counts = sum(mask.astype(np.int64) for mask in masks)       # (S, S): images with foreground
    ranked = np.sort(counts, axis=None)[::-1]
    pixels = np.arange(1, ranked.size + 1)  # that the mask has, from the most frequent on
    hits = np.cumsum(ranked)
    iou = hits / np.maximum(len(masks) * pixels + ranked.sum() - hits, 1)
    return counts >= max(ranked[iou.argmax()], 1)


def reference(job):
    """Score what needs no training on the same test images: REFERENCE. Only best_constant uses
    labels. Returns the result and a table (N, 5) per row; no sheet."""
    settings = job.settings
    images, masks, names = open_test(job.data)
    draw, _ = mask_drawer(job, ())
    draw_refined, evidence = mask_drawer(job, REFINEMENTS)
    torch.manual_seed(seed_from(job.seed))  # the very weights that pre-training starts from
    with exit_on_value_error():
        unet = build_unet(settings["backbone"], settings["img_size"])
    unet = unet.to(job.device, memory_format=torch.channels_last).eval()

    def inverted(batch):                    # an image of one gray value: no foreground either way
        other = "dark" if settings["foreground"] == "bright" else "bright"
        return pseudo_mask(batch, settings["threshold"], other) > 0

    rows = dict(
        all_foreground=lambda batch: np.ones(batch.shape[:3], bool),
        all_background=lambda batch: np.zeros(batch.shape[:3], bool),
        raw_threshold=draw,
        raw_threshold_inverted=inverted,
        refined_threshold=draw_refined,
        random_init=lambda batch: predict_logits(unet, batch, job.device) > 0)
    constant = best_constant(job.data)
    if constant is None:
        print(f"{job.data} has no training masks: no row best_constant")
    else:
        rows["best_constant"] = lambda batch: np.repeat(constant[None], len(batch), axis=0)
    tables = {name: score_images(predict, images, masks) for name, predict in rows.items()}
    result = {name: summarise(table, groups_of(names)) for name, table in tables.items()}
    result["refined_threshold"] |= evidence
    if constant is not None:
        result["best_constant"]["uses_labels"] = True
    return result, tables, None


def classes_of(data):
    """The labels in the CSVs of a data set: their names, sorted; for each part, the class number of
    each row, -1 without a label; the rows that have one. Ends the program where a probe cannot be
    trained."""
    names = {part: prepare_data.read_names(data, part) for part in prepare_data.PARTS}
    found = {part: {row["label"] for row in rows} - {""} for part, rows in names.items()}
    classes = sorted(found["train"])
    new = sorted((found["val"] | found["test"]) - found["train"])
    if len(classes) < 2 or new or not all(found.values()):
        elsewhere = f", elsewhere {new}" if new else ""
        sys.exit(f"{data}: classify needs at least two labels in train.csv, and the same ones in "
                 f"val.csv and test.csv; found {classes or 'none'}{elsewhere}")
    number = {"": -1} | {name: k for k, name in enumerate(classes)}
    numbers = {part: [number[row["label"]] for row in rows] for part, rows in names.items()}
    keep = {part: np.flatnonzero(np.array(n) >= 0).tolist() for part, n in numbers.items()}
    return classes, numbers, keep


def classify(job):
    """A linear probe on the encoder; recall of each class, their mean, and the confusion matrix, of
    each stage. Returns the result, rows of (label, prediction) of the test images, and no sheet."""
    size, backbone = job.settings["img_size"], job.settings["backbone"]
    classes, numbers, keep = classes_of(job.data)
    torch.manual_seed(seed_from(job.seed, 3))
    with exit_on_value_error():
        has_layer4 = "layer4.0.conv1.weight" in read_encoder(job.weights, backbone)
        probe = Probe(backbone, size, len(classes), has_layer4)
        load_encoder(probe, job.weights)
    if job.args.lr is not None:
        probe.lr = job.args.lr
    probe.to(job.device, memory_format=torch.channels_last)
    folder, training = fit(probe, labelled_sets(job, keep, numbers), job, job.args.epochs)
    probe.load_state_dict(load_checkpoint(folder / "best.pt", "cpu")["model"])
    probe.eval()
    images = np.load(job.data / "test_images.npy", mmap_mode="r")
    test = keep["test"]
    predicted = {stage: [] for stage in probe.stages}
    with torch.inference_mode():
        for start in range(0, len(test), BATCH):
            batch = torch.from_numpy(images[test[start:start + BATCH]]).permute(0, 3, 1, 2)
            logits = probe.logits(batch.to(job.device))
            for pred, each in zip(predicted.values(), logits, strict=True):
                pred += each.argmax(dim=1).tolist()
    truth = np.array(numbers["test"])[test]
    names = [prepare_data.read_names(job.data, "test")[k] for k in test]
    scores = {}
    for stage, pred in predicted.items():
        scores[stage] = class_scores(truth, np.array(pred), classes, groups_of(names))
    deepest = list(scores)[-1]
    majority = float(np.bincount(truth).max() / len(truth))
    result = training | dict(n_test=len(test), classes=classes, stage=deepest,
                             majority_accuracy=majority)
    result |= scores.pop(deepest) | scores
    rows = []
    for row, t, p in zip(names, truth, predicted[deepest], strict=True):
        rows.append(dict(name=row["name"], group=row["group"], label=classes[t],
                         prediction=classes[p]))
    return result, rows, None


def class_scores(truth, pred, classes, groups):
    """int (N,) twice, the names of the classes -> dict: macro_recall, the mean over the classes
    that the test part has, with its 95 % bootstrap interval; accuracy; confusion, truth by rows;
    recall of each class."""
    present = np.bincount(truth, minlength=len(classes)) > 0

    def recalls(weights):
        values = []
        for c in np.flatnonzero(present):
            n = weights @ (truth == c)
            right = weights @ ((truth == c) & (pred == c))
            values.append(np.where(n > 0, right / np.maximum(n, 1), np.nan))
        return np.stack(values)             # (classes that are there, R); nan: not drawn

    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (truth, pred), 1)
    recall = recalls(np.ones((1, len(truth))))[:, 0]
    names = [name for name, there in zip(classes, present, strict=True) if there]
    return dict(
        macro_recall=float(recall.mean()),
        macro_recall_ci=interval(np.nanmean(recalls(bootstrap_weights(groups)), axis=0)),
        accuracy=float((truth == pred).mean()),
        confusion=confusion.tolist(),
        class_recall=dict(zip(names, recall.tolist(), strict=True)))


def per_image(tables, names):
    """{row: table (N, 5)} -> a list of dicts, one per image and row: what the pictures scored, each
    by itself."""
    rows = []
    for row, table in tables.items():
        scores = scores_from_counts(table[:, :4])
        for k, image in enumerate(names):
            line = dict(row=row, name=image["name"], group=image["group"])
            line |= dict(zip(COUNTS, table[k, :4].astype(int).tolist(), strict=True))
            line["hd95"] = f"{table[k, 4]:.6g}"
            line |= {name: f"{value[k]:.6g}" for name, value in scores.items()}
            rows.append(line)
    return rows


def head_of(job):
    """What a result says of the network and of how it was made, a dict."""
    settings = job.settings
    protocol = job.args.protocol
    head = dict(dataset=job.data.name, protocol=protocol, seed=job.seed,
                labels=settings.get("labels", 0.0), name=job.name)
    for key in ("backbone", "method", "variant", "train", "threshold", "foreground", "loss",
                "epochs", "batch_size", "img_size", "data", "weights_sha256"):
        if key in settings:
            head[key] = settings[key]
    if "refine" in settings:
        head["refine"] = " ".join(settings["refine"])
    if "n_train" in settings:               # a run of this script, that has seen labels
        head |= dict(n_labels_train=settings["n_train"], n_labels_val=settings["n_val"])
    if protocol in LABEL_PROTOCOLS:
        head |= dict(decoder=job.decoder, labels=job.args.labels)
    if job.args.flips:
        head["name"] += "-flips"
    return head


def evaluate(job):
    """Run one protocol, print its scores, write its JSON, the CSV of its test images, and its
    picture."""
    head = head_of(job)
    folder = Path(job.args.out or "results") / head["dataset"] / head["backbone"]
    path = folder / head["variant"] / f"seed{job.seed}" / f"{head['name']}.json"
    with prepare_data.only_one(path.with_name(f".{path.stem}.lock")):
        protocol = dict(reference=reference, classify=classify).get(job.args.protocol, segment)
        result, tables, sheet = protocol(job)
        if isinstance(tables, dict):
            names = prepare_data.read_names(job.data, "test")
            tables = per_image(tables, names)
            head["n_test"] = len(names)
        result = head | result
        if path.exists() and not job.args.overwrite:
            refuse_to_replace(path, result)
        if sheet is not None:
            save_png(path.with_suffix(".png"), sheet)
        write_csv(path.with_suffix(".csv"), tables)
        *earlier, command = job.commands
        write_json(path, result | dict(command=command, earlier_commands=earlier))
    print_scores(result)
    print(path)


def refuse_to_replace(path, result):
    """End the program if the JSON at `path` holds another evaluation than this one."""
    try:
        there = json.loads(path.read_text())
    except ValueError:                      # half a file: not worth keeping
        return
    differ = [key for key, value in result.items() if there.get(key, value) != value]
    if differ:
        other = "data" if "data" in differ else ", ".join(differ)
        sys.exit(f"{path} holds another evaluation (other {other}): --overwrite replaces it")


def print_scores(result):
    """The scores of one result on the screen, one line per reference row or network."""
    for name, block in blocks_of(result).items():
        texts = []
        for score in ("macro_recall", "iou_global", "iou_image", "precision_global",
                      "recall_global", "hd95_image", "accuracy", "majority_accuracy"):
            if score in block:
                text = f"{score} {block[score]:.4f}"
                if score in ("macro_recall", "iou_global"):
                    low, high = block[f"{score}_ci"]
                    text += f" [{low:.4f}, {high:.4f}]"
                texts.append(text)
        if "uses_labels" in block:
            texts.append("uses labels")
        print(f"{name or result['variant']:22} {', '.join(texts)}")


# ---------------------------------------------------------------------------------------- predict

def predict_tiled(unet, image, tile, size, device, flips=False):
    """uint8 (H, W, 3), however large -> bool (H, W). Windows of tile x tile pixels, each resized to
    the `size` that the network was trained at, overlap by half; their logits are weighted by
    sin ** 2 towards the middle and summed: the mask is where the sum is positive. Memory beyond
    picture and mask: one row of windows."""
    def starts(length):
        last = max(length - tile, 0)
        return [*range(0, last, tile // 2), last]

    height, width = image.shape[:2]
    ramp = np.sin(np.pi * (np.arange(tile) + 0.5) / tile).astype(np.float32) ** 2
    weight = np.outer(ramp, ramp)
    mask = np.zeros((height, width), bool)
    band = np.zeros((tile, width), np.float32)      # summed logits of the rows from y on
    rows = starts(height)
    columns = starts(width)
    for y, following in zip(rows, [*rows[1:], height], strict=True):
        for first in range(0, len(columns), BATCH):
            batch = []
            for x in columns[first:first + BATCH]:
                window = image[y:y + tile, x:x + tile]
                below, right = tile - window.shape[0], tile - window.shape[1]
                window = cv2.copyMakeBorder(window, 0, below, 0, right, cv2.BORDER_REFLECT_101)
                batch.append(prepare_data.resize(window, size))
            drawn = predict_logits(unet, np.stack(batch), device, flips)
            for x, logits in zip(columns[first:], drawn):       # noqa: B905, the last are fewer
                logits = cv2.resize(logits, (tile, tile), interpolation=cv2.INTER_LINEAR)
                band[:, x:x + tile] += (logits * weight)[:, :width - x]
        done = following - y
        mask[y:following] = band[:done] > 0
        empty = np.zeros((min(done, tile), width), np.float32)
        band = np.concatenate([band[done:], empty])
    return mask


def whole_network(args, settings):
    """(the U-Net of a run in eval mode, its side in pixels): trained as a whole, or an encoder in a
    decoder that nobody trained."""
    decoder = "pretrained" if settings["train"] == "end2end" else "fresh"
    torch.manual_seed(seed_from(settings["seed"], 1))       # as segment does
    unet = build_unet(settings["backbone"], settings["img_size"])
    load_weights(unet, Path(args.run) / WEIGHTS[decoder], decoder)
    return unet.eval(), settings["img_size"]


def predict_folder(args, settings, device):
    """Draw a mask, PNG 0 / 255, for every image below a folder, upright and at its own size, under
    its name (see prepare_data.find_files) in the same sub-folders; a CSV with each foreground
    share; with --overlay also pictures. A bad file is named, the others are done, the exit code
    is 1."""
    source = Path(args.predict)
    out = Path(args.out)
    if not source.is_dir():
        sys.exit(f"{source}: no such folder")
    if out.resolve().is_relative_to(source.resolve()):
        sys.exit(f"{out}: lies in {source}, where its masks could overwrite images or pass for "
                 "some: give another --out")
    files = prepare_data.find_files(source)
    if files.masks:
        count = sum(len(masks) for masks in files.masks.values())
        print(f"{count} files are taken as masks, and not predicted")
    targets = [out / "foreground.csv"]
    for name in files.images:
        targets.append(out / f"{name}.png")
        if args.overlay:
            targets.append(out / "overlay" / f"{name}.png")
    if len(set(targets)) < len(targets):
        sys.exit(f"{source}: has a folder overlay, whose masks would overwrite the pictures of "
                 "--overlay")
    there = [target for target in targets if target.exists()]
    if there and not args.overwrite:
        sys.exit(f"{there[0]} would be overwritten: give another --out, or --overwrite")
    unet, size = whole_network(args, settings)
    unet = unet.to(device, memory_format=torch.channels_last)
    shares = []
    stacks = []
    bad = files.bad
    for name, path in tqdm(files.images.items(), "predict", unit=" images"):
        try:
            picture = prepare_data.read_picture(path, args.page)
            image = prepare_data.to_rgb(picture)
        except ValueError as error:
            bad.append(str(error))
            continue
        if picture.pages > 1:
            stacks.append(f"{path} has {picture.pages}")
        if args.tile is not None:
            mask = predict_tiled(unet, image, args.tile or size, size, device, args.flips)
        else:
            small = prepare_data.resize(image, size)[None]
            logits = predict_logits(unet, small, device, args.flips)[0]
            mask = cv2.resize(logits, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) > 0
        save_png(out / f"{name}.png", mask.astype(np.uint8) * 255)
        if args.overlay:
            red = np.array([255, 0, 0])
            image[mask] = (image[mask] * 0.6 + red * 0.4).astype(np.uint8)
            save_png(out / "overlay" / f"{name}.png", image)
        share = f"{mask.mean():.6f}"
        shares.append(dict(name=path.relative_to(source).as_posix(), foreground_share=share))
    if shares:
        write_csv(out / "foreground.csv", shares)
    if stacks:
        print(f"{len(stacks)} files have several pages or frames ({stacks[0]}): page {args.page} "
              "is taken, counted from 0")
    print(f"{out}: {len(shares)} masks, and foreground.csv")
    if bad:
        sys.exit("\n".join(bad) + f"\n{len(bad)} bad file(s), listed above, have no mask")


def save_png(path, pixels):
    """Write uint8 pixels as PNG, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, functools.partial(Image.fromarray(pixels).save, format="PNG"))


class Exported(nn.Module):
    """uint8 RGB (B, 3, S, S) -> float32 (B, 1, S, S), the probability of foreground: a U-Net with
    its normalisation inside."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images):
        return torch.sigmoid(self.unet((images / 255 - self.mean) / self.std))


def export_network(args, settings):
    """--export: a run's network as one file that needs none of this code (torch.export, .pt2), for
    any number of images; size and foreground are in the file's metadata, network.json."""
    path = Path(args.export)
    if path.is_dir() or path.exists() and not args.overwrite:
        sys.exit(f"{path} would be overwritten: give another --export, or --overwrite")
    if settings["train"] != "end2end":
        sys.exit(f"--export: {args.run} has an encoder only, and nobody trained its decoder")
    unet, size = whole_network(args, settings)
    unet.requires_grad_(False)
    about = dict(size=size, foreground=settings["foreground"], backbone=settings["backbone"],
                 dataset=settings["dataset"], input="uint8 RGB (B, 3, size, size)",
                 output="float32 (B, 1, size, size), probability of foreground")
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    any_number = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(Exported(unet), (images,), dynamic_shapes=any_number)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"network.json": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    print(f"{path}: {', '.join(f'{name} {value}' for name, value in about.items())}")


# ----------------------------------------------------------------------------------------- report

@dataclass
class Row:
    """What one network, or one reference row, scored on a test part with one seed."""
    result: dict                            # its JSON
    name: str                               # of the reference row; else of the protocol
    scores: dict                            # the block of scores
    table: np.ndarray | None                # (N, 5), COUNTS and hd95; None of a probe
    groups: tuple                           # of the test images

    def __post_init__(self):
        self.dataset = self.result["dataset"]
        self.backbone = self.result["backbone"]
        self.protocol = self.result["protocol"]
        self.variant = self.result["variant"]
        self.seed = self.result["seed"]
        self.data = self.result["data"]     # the fingerprint: equal ones have equal test images
        self.n_labels = self.result.get("n_labels_train", 0)

    @property
    def title(self):
        """How the report calls it."""
        title = self.name if self.protocol == "reference" else f"{self.variant}: {self.name}"
        return title if self.backbone == "resnet50" else f"{title} ({self.backbone})"

    @property
    def labels(self):
        """Training + validation images whose masks or classes were used."""
        if self.scores.get("uses_labels"):
            return "all"
        return f"{self.n_labels} + {self.result['n_labels_val']}" if self.n_labels else "0"


def blocks_of(result):
    """The blocks of scores of a result: {reference row: block}, or {"": the result itself}."""
    if result["protocol"] != "reference":
        return {"": result}
    return {name: result[name] for name in REFERENCE if name in result}


def read_result(path):
    """A JSON of evaluate, and the CSV beside it -> a list of Rows. Raises KeyError, ValueError and
    the like where it is none."""
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = collections.defaultdict(list)
    with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            lines[line.get("row", "")].append(line)
    rows = []
    for name, block in blocks_of(result).items():
        images = lines[name]
        if len(images) != result["n_test"]:
            raise ValueError(f"{len(images)} images in its CSV")
        table = None
        if result["protocol"] != "classify":
            table = [[float(line[key]) for key in (*COUNTS, "hd95")] for line in images]
            table = np.array(table)
        rows.append(Row(result, name or result["name"], block, table, groups_of(images)))
    return rows


def read_results(out):
    """The Rows of every result below `out`, and a line for each JSON that is none."""
    rows = []
    bad = []
    for path in sorted(Path(out).rglob("*.json")):
        if path.name == "bench.json":       # of run_all.sh bench
            continue
        try:
            rows += read_result(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            bad.append(f"{path} is not a result of finetune_eval.py, or its CSV is missing or "
                       f"damaged: left out ({type(error).__name__}); delete it and run its command")
    return rows, bad


def cells_of(rows):
    """Rows grouped by all but their seed: a list of lists, each by seed; references first, then by
    labels and name."""
    cells = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: row.seed):
        cells[row.data, row.title].append(row)

    def place(cell):
        first = cell[0]
        if first.protocol == "reference":
            return 0, REFERENCE.index(first.name), first.title
        return 1, first.n_labels, first.title

    return sorted(cells.values(), key=place)


def mean_of(cell, score="iou_global"):
    """The mean over seeds of a cell's score."""
    return float(np.mean([row.scores[score] for row in cell]))


def mean_std(cell, score="iou_global"):
    """A cell's "mean ± std (seeds)" of a score; std (n - 1) only where there are several seeds."""
    text = f"{mean_of(cell, score):.4f}"
    if len(cell) > 1:
        text += f" ± {np.std([row.scores[score] for row in cell], ddof=1):.4f}"
    return f"{text} ({len(cell)})"


def cell_interval(cell):
    """95 % bootstrap interval of a cell's mean IoU over its seeds, [low, high]."""
    return interval(mean_iou([row.table for row in cell], bootstrap_weights(cell[0].groups)))


def difference(cell, other):
    """The paired difference of two cells in words: "+0.0123 [-0.0045, +0.0291] ≈"; ≈ where the
    interval holds 0. Nothing where there is no other, or it is the same."""
    if other in (None, cell):
        return ""
    first = [row.table for row in cell]
    second = [row.table for row in other]
    gap, (low, high) = paired_difference(first, second, cell[0].groups)
    sign = " ≈" if low <= 0 <= high else ""
    return f"{gap:+.4f} [{low:+.4f}, {high:+.4f}]{sign}"


def markdown(header, rows):
    """The lines of a table, a blank one before it."""
    lines = [""]
    for cells in (header, ["---"] * len(header), *rows):
        texts = [str(cell).replace("|", "\\|") for cell in cells]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def best_reference(cells):
    """The cell of the reference row of the largest mean IoU, or None where there is none."""
    references = [cell for cell in cells if cell[0].protocol == "reference"]
    return max(references, key=mean_of, default=None)


def most_supervised(cells, backbone):
    """The supervised cell of a backbone with the most labels, and of these the most steps; None
    where there is none."""
    found = []
    for cell in cells:
        if cell[0].protocol == "supervised" and cell[0].backbone == backbone:
            found.append(cell)
    return max(found, default=None,
               key=lambda cell: (cell[0].n_labels, cell[0].result["budget_steps"]))


def dataset_table(cells):
    """The lines of a data set's table: every cell but the probes, and the reference rows once,
    whatever the backbone, but the untrained network."""
    shown = {}
    for cell in cells:
        first = cell[0]
        is_same = first.protocol == "reference" and first.name != "random_init"
        shown.setdefault(first.name if is_same else first.title, cell)
    best = best_reference(shown.values())
    rows = []
    for cell in shown.values():
        first = cell[0]
        low, high = cell_interval(cell)
        rows.append([
            first.title, first.labels, mean_std(cell), f"{low:.4f} - {high:.4f}",
            difference(cell, best), difference(cell, most_supervised(cells, first.backbone)),
            f"{mean_of(cell, 'hd95_image'):.1f}"])
    header = ["network", "labels", "IoU, mean ± std (seeds)", "95 % interval",
              f"vs {best[0].name}" if best else "vs best reference", "vs supervised, most labels",
              "hd95, px"]
    return markdown(header, rows)


def probe_table(cells):
    """The lines of the table of linear probes, one row per stage of the encoder."""
    rows = []
    for cell in cells:
        first = cell[0]
        majority = f"{first.result['majority_accuracy']:.4f}"
        rows.append([first.title, first.labels, first.result["stage"],
                     mean_std(cell, "macro_recall"), mean_std(cell, "accuracy"), majority])
        if "layer2" in first.result:
            layer2 = [replace(row, scores=row.result["layer2"]) for row in cell]
            rows.append([first.title, first.labels, "layer2",
                         mean_std(layer2, "macro_recall"), mean_std(layer2, "accuracy"), majority])
    header = ["network", "labels", "stage", "mean recall over classes", "accuracy",
              "accuracy of the majority class"]
    return markdown(header, rows)


def draw_chart(cells, path):
    """One PNG: IoU against the labels used, with 95 % intervals, in gray; networks that saw none at
    0, the best reference row as a line. Raises ImportError where matplotlib is not installed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves = collections.defaultdict(list)
    unlabelled = {}                         # networks before they saw a label
    for cell in cells:
        first = cell[0]
        if first.protocol in LABEL_PROTOCOLS:
            curves[first.title.replace(f"-l{first.result['labels']}", "")].append(cell)
        elif first.protocol == "transfer":
            unlabelled.setdefault((first.backbone, first.variant), cell)
            curves[first.title].append(cell)
    for curve in curves.values():
        first = curve[0][0]
        if first.protocol in ("finetune", "semi"):      # a frozen encoder's decoder is new
            curve[:0] = filter(None, [unlabelled.get((first.backbone, first.variant))])
    figure, axes = plt.subplots(figsize=(10, max(5, 2 + 0.2 * len(curves))), layout="constrained")
    for k, (name, curve) in enumerate(curves.items()):
        means = np.array([mean_of(cell) for cell in curve])
        bounds = np.array([cell_interval(cell) for cell in curve])
        reach = np.abs(bounds.T - means)    # of the error bars, down and up
        axes.errorbar([cell[0].n_labels for cell in curve], means, yerr=reach, label=name,
                      capsize=2, color=str(0.3 * (k % 3)), marker="osv^Dx*P"[k % 8],
                      linestyle=("-", "--", ":", "-.")[k % 4])
    best = best_reference(cells)
    if best:
        axes.axhline(mean_of(best), color="black", linestyle="--", label=best[0].name)
    counts = sorted({cell[0].n_labels for curve in curves.values() for cell in curve})
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(counts, counts)
    axes.minorticks_off()
    axes.set(ylim=(0, 1), xlabel="labelled training images", ylabel="test IoU (global)",
             title=f"{cells[0][0].dataset}; 95 % intervals over test images")
    figure.legend(fontsize=7, loc="outside right upper")
    write_atomically(path, functools.partial(figure.savefig, format="png", dpi=100))
    plt.close(figure)


# The paper's tables: a title and what results must have; below it rows: title | what else | the
# numbers on PAPER_SETS. Tables 3, 4 and B.1 are end to end, 1, 2, 5, 7 to 10 encoder only.
PAPER_SETS = ("dm", "tissuenet", "isic", "xray", "drone")
PAPER = """
Table 1: encoder only, ResNet-50 | backbone=resnet50 train=encoder
    DINO | method=dino | .1399 .2972 .2426 .2052
    BYOL | method=byol | .1278 .3455 .2412 .2185
    SimSiam | method=simsiam | .1415 .3021 .2395 .1939
    MedSASS | method=medsass | .1742 .3824 .2445 .2568
Table 2: encoder only, ViT-small | backbone=vit_small train=encoder
    DINO | method=dino | .1668 .2483 .1891 .2106
    MAE | method=mae | .1668 .3455 .1910 .2106
    SimMIM | method=simmim | .1670 .3335 .1913 .2077
    MedSASS | method=medsass | .1360 .3633 .1914 .2466
Figures 3, 4: end to end | method=medsass train=end2end
    ResNet-50 | backbone=resnet50 | .1810 .5077 .4847 .3522
    ViT-small | backbone=vit_small |
Figure 10: supervised, every label | protocol=supervised labels=1.0
    ResNet-50 | backbone=resnet50 |
    ViT-small | backbone=vit_small |
Table 3: threshold | method=medsass train=end2end backbone=resnet50
    adaptive mean | threshold=adaptive_mean | .1724 .3949 .2393 .1839
    adaptive Gaussian | threshold=adaptive_gaussian | .1725 .3910 .2393 .2079
    GHT | threshold=ght | .1809 .4927 .1236 .1689
    Otsu | threshold=otsu | .1810 .5077 .4847 .3522
Table 4: loss | method=medsass train=end2end backbone=resnet50
    Tversky | loss=tversky | .1726 .3604 .2444 .1963
    focal | loss=focal | .0200 .1100 .0529 .0200
    focal-Tversky | loss=focal_tversky | .1810 .5077 .4847 .3522
Appendix B.1, IoU | method=medsass train=end2end backbone=resnet50
    cross-entropy | loss=bce | - - 0
Appendix B.1, accuracy | method=medsass train=end2end backbone=resnet50 score=accuracy_global
    cross-entropy | loss=bce | - - .7608
Table 5: epochs | method=medsass train=encoder
    ResNet-50, 10 | backbone=resnet50 epochs=10 | - .3785
    ResNet-50, 20 | backbone=resnet50 epochs=20 | - .3778
    ResNet-50, 50 | backbone=resnet50 epochs=50 | - .3824
    ResNet-50, 70 | backbone=resnet50 epochs=70 | - .3876
    ViT-small, 10 | backbone=vit_small epochs=10 | - .3575
    ViT-small, 20 | backbone=vit_small epochs=20 | - .3564
    ViT-small, 50 | backbone=vit_small epochs=50 | - .3633
    ViT-small, 70 | backbone=vit_small epochs=70 | - .4091
Tables 7, 8: batch size | method=medsass train=encoder
    ResNet-50, 8 | backbone=resnet50 batch_size=8 |
    ResNet-50, 16 | backbone=resnet50 batch_size=16 | - .3824 .2445
    ResNet-50, 32 | backbone=resnet50 batch_size=32 | - .3852 .2449
    ViT-small, 8 | backbone=vit_small batch_size=8 |
    ViT-small, 16 | backbone=vit_small batch_size=16 | - .3633 .1914
    ViT-small, 32 | backbone=vit_small batch_size=32 | - .3822 .2014
Table 9: linear probe | protocol=classify score=macro_recall train=encoder
    ResNet-50, BYOL | backbone=resnet50 method=byol | - - .6500 .7073
    ResNet-50, DINO | backbone=resnet50 method=dino | - - .6546 .5241
    ResNet-50, SimSiam | backbone=resnet50 method=simsiam | - - .6475 .6541
    ResNet-50, MedSASS | backbone=resnet50 method=medsass | - - .6550 .5785
    ViT-small, MAE | backbone=vit_small method=mae | - - .6492 .6730
    ViT-small, SimMIM | backbone=vit_small method=simmim | - - .6438 .6600
    ViT-small, DINO | backbone=vit_small method=dino | - - .6500 .4000
    ViT-small, MedSASS | backbone=vit_small method=medsass | - - .6554 .1830
Table 10: natural images from a drone | backbone=resnet50 train=encoder
    SimSiam | method=simsiam | - - - - .9932
    BYOL | method=byol | - - - - .9910
    MedSASS | method=medsass | - - - - .9744
    DINO | method=dino | - - - - .9459
"""
PAPER_DEFAULTS = dict(protocol="transfer", score="iou_global", threshold="otsu",
                      loss="focal_tversky")


def paper_tables():
    """PAPER, a list of (title, rows); a row is (title, a dict of what a result must have and the
    score that is shown, {data set: number})."""
    tables = []
    for line in PAPER.strip().splitlines():
        title, words, *numbers = [text.strip() for text in line.split("|")]
        wanted = dict(word.split("=") for word in words.split())
        if not numbers:
            common = PAPER_DEFAULTS | wanted
            tables.append((title, []))
            continue
        shown = zip(PAPER_SETS, numbers[0].split(), strict=False)
        shown = {dataset: float(number) for dataset, number in shown if number != "-"}
        tables[-1][1].append((title, common | wanted, shown))
    return tables


def cell_of_paper(cells, dataset, wanted):
    """Our cell for a row of a paper's table, or None: without --refine and --encoder; of several
    the one whose other flags are the most usual, that is, of the shortest name."""
    found = []
    for cell in cells:
        result = cell[0].result
        saw_labels = wanted["protocol"] == "transfer" and cell[0].n_labels
        words = cell[0].name.split("-")
        is_other = ("refine" in result or "-from-" in result["variant"] or saw_labels
                    or "flips" in words or "fresh" in words)
        if result["dataset"] == dataset and not is_other and all(
                str(result.get(key)) == value for key, value in wanted.items() if key != "score"):
            found.append(cell)
    return min(found, key=lambda cell: (len(cell[0].title), cell[0].title), default=None)


def unusual(result, wanted):
    """", 20 epochs, 96 px": where a result is not as the paper's, in words."""
    text = ""
    for key, usual, unit in (("epochs", 50, "epochs"), ("batch_size", 16, "a batch"),
                             ("img_size", 224, "px")):
        if key not in wanted and result.get(key, usual) != usual:
            text += f", {result[key]} {unit}"
    return text


def paper_sections(cells):
    """The lines of the paper's tables of which something was run here: ours, with what is not as in
    the paper, and the paper's number where the data set is the paper's."""
    lines = []
    missing = []
    datasets = dict.fromkeys(cell[0].dataset for cell in cells)
    for title, rows in paper_tables():
        columns = []
        for dataset in datasets:
            column = []
            run_here = in_the_paper = 0
            for _, wanted, numbers in rows:
                cell = cell_of_paper(cells, dataset, wanted)
                text = "-"
                if cell:
                    run_here += 1
                    in_the_paper += dataset in numbers
                    text = mean_std(cell, wanted["score"]) + unusual(cell[0].result, wanted)
                if dataset in numbers:
                    text += f" / {numbers[dataset]:.4f}"
                column.append(text)
            if in_the_paper or run_here > 1:        # one value alone compares nothing
                columns.append([dataset, *column])
        if columns:
            first = ["ours, mean ± std (seeds) / the paper's", *(row[0] for row in rows)]
            header, *table = zip(first, *columns, strict=True)
            lines += ["", f"### {title}", *markdown(header, table)]
        else:
            missing.append(title)
    if missing:
        lines += ["", f"Not run here: {'; '.join(missing)}."]
    return lines


def dataset_section(title, cells, out):
    """The lines of a data set: its tables, and its chart, which is drawn into the folder `out`."""
    scored = [cell for cell in cells if cell[0].protocol != "classify"]
    probes = [cell for cell in cells if cell[0].protocol == "classify"]
    lines = ["", f"## {title}"]
    if scored:
        first = scored[0][0]
        groups = len(set(first.groups))
        few = " Intervals over so few groups say little." if groups < 5 else ""
        lines += ["", f"{first.result['n_test']} test images of {first.result['img_size']} px in "
                  f"{groups} groups.{few}", *dataset_table(scored)]
        with contextlib.suppress(ImportError):
            draw_chart(scored, Path(out) / f"{title}.png")
            lines += ["", f"![{title}]({urllib.parse.quote(title)}.png)"]
    if probes:
        lines += ["", "Linear probes:", *probe_table(probes)]
    return lines


def report(out):
    """Write README.md and one chart per data set under `out` from every result there; a JSON that
    is no result is named and left out. Ends the program where there is none."""
    rows, bad = read_results(out)
    for line in bad:
        print(line)
    if not rows:
        sys.exit(f"{out}: no results here; score a run first, see python finetune_eval.py --help")
    lines = [
        "# Results", "",
        "Written by `python finetune_eval.py --report`. IoU is over the whole test part (counts "
        "summed), intervals are 95 % bootstrap over test images or their groups. Labels: training "
        "+ validation images whose masks or classes were used. hd95: 95 % Hausdorff distance. ≈: "
        "the interval of the paired difference holds 0: the data do not show a difference."]
    for line in bad:
        lines += ["", f"- {line}"]
    prepared = sorted({(row.dataset, row.data) for row in rows})
    names = [dataset for dataset, _ in prepared]
    for dataset, data in prepared:
        title = dataset
        if names.count(dataset) > 1:        # prepared more than once: not to be compared
            title = f"{dataset} ({data[:8]})"
        lines += dataset_section(title, cells_of([row for row in rows if row.data == data]), out)
    print("\n".join(lines))
    cells = cells_of(rows)
    lines += ["", "## The paper's tables", *paper_sections(cells), "", "## Commands", "",
              f"Of the first seed of each row; Python {platform.python_version()}, torch "
              f"{torch.__version__}, timm {timm.__version__}.", "", "```"]
    commands = {}                           # each once, in the order in which they were run
    for cell in cells:
        for command in (*cell[0].result["earlier_commands"], cell[0].result["command"]):
            commands[command] = True
    lines += [*commands, "```"]
    text = "\n".join(lines) + "\n"
    path = Path(out) / "README.md"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    if not importlib.util.find_spec("matplotlib"):
        print("no charts: matplotlib is not installed (pip install matplotlib)")
    print(f"{path}: {len({id(row.result) for row in rows})} results, {len(bad)} warnings")


# ------------------------------------------------------------------------------------------ flags

def labels_of(text):
    """--labels: a number with a point is a share in (0, 1], one without a count from 1 up."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = -1
    if value <= 0 or isinstance(value, float) and not value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is neither a share above 0.0 and up to 1.0 (with "
                                         "a point) nor a count from 1 (without)")
    return value


def make_parser():
    """The argparse parser of all flags."""
    parser = argparse.ArgumentParser("finetune_eval.py", description=__doc__, allow_abbrev=False,
                                     usage=argparse.SUPPRESS, formatter_class=prepare_data.Help)
    add = parser.add_argument
    add("--run", metavar="DIR",
        help="a finished run folder of pretrain.py, or of this script (then to score, predict or "
        "export)")
    add("--encoder", metavar="FILE",
        help="any encoder (ours, timm's, torchvision's), without a run")
    add("--dataset", type=prepare_data.dataset_name,
        help="a prepared data set; with --run unset: the one it was trained on")
    add("--backbone", choices=list(BACKBONES), help="without --run: the network")
    add("--protocol", default="transfer", choices=["transfer", *LABEL_PROTOCOLS, "reference"],
        help="what to do before scoring")
    add("--labels", type=labels_of, default=1.0,
        help="labelled training images: 0.1 is a share, 10 a count; as large a share of the "
        "validation images is the validation set")
    add("--epochs", type=int, default=50,
        help="of training on labels (appendices C, D); an epoch has the steps of all training "
        "images, however few are labelled")
    add("--batch-size", type=int, default=16, help="images a step (appendices C, D)")
    add("--lr", type=float,
        help="of Adam, the highest. Unset: 1e-3 where the decoder starts afresh and for semi, "
        "whose second half has a third of it; else 3.6e-4")
    add("--seed", type=int, help="of fresh weights, labels, order; unset: the run's, or 0")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"],
        help="precision of training on labels, as in pretrain.py")
    add("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 1)),
        help="processes that load and augment")
    add("--flips", action="store_true",
        help="predict with the mean over the four flips of a picture")
    add("--predict", metavar="DIR",
        help="draw masks for the images of this folder; needs --run, --out")
    add("--tile", type=int, nargs="?", const=0, metavar="PX",
        help="with --predict, for large pictures: in overlapping windows of so many pixels a side "
        "(no number: the training size) instead of resized as a whole")
    add("--page", type=int, default=0,
        help="with --predict: the page or frame of files that have several; 0 is the first")
    add("--overlay", action="store_true",
        help="with --predict: pictures with the mask in red, too")
    add("--export", metavar="FILE",
        help="write the network of --run as one file (.pt2) that needs none of this code")
    add("--report", action="store_true",
        help="write README.md and charts from all results under --out")
    add("--data", default="data", metavar="DIR", help="where prepared data sets are")
    add("--runs", default="runs", metavar="DIR",
        help="where training on labels is kept when there is no --run to keep it in")
    add("--out", metavar="DIR",
        help="where results are kept (unset: results); with --predict the folder for the masks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--overwrite", action="store_true",
        help="replace results, masks or files that are already there")
    return parser


# Flags that change what is computed, and what stands before their value in a result's name.
NAMED = dict(labels="l", epochs="e", batch_size="b", lr="lr", amp="")
OF_TRAINING = [*NAMED, "workers"]
OF_PREDICT = ["overlay", "tile", "page"]


def parse_args(argv):
    """The flags; those that the job does not use have their default, and are named in one line.
    Ends the program where they contradict each other or numbers make no sense."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.report:
        return args
    check_numbers(parser, args, epochs=1, batch_size=1, lr=0, seed=0, workers=0, page=0)
    loads_nothing = args.protocol in ("supervised", "reference")
    if args.predict and args.export:
        parser.error("--predict and --export exclude each other")
    if args.run and args.encoder:
        parser.error("--run and --encoder exclude each other")
    if args.predict and not (args.run and args.out):
        parser.error("--predict needs --run RUN_DIR and --out DIR")
    if args.export and not args.run:
        parser.error("--export needs --run RUN_DIR")
    if not args.run and not (args.dataset and args.backbone):
        parser.error("give --run RUN_DIR, or --dataset NAME and --backbone B")
    if not (args.predict or args.export) and loads_nothing == bool(args.run or args.encoder):
        parser.error(f"{args.protocol} " + (
            "loads nothing: leave out --run and --encoder" if loads_nothing else
            "needs --run RUN_DIR or --encoder FILE"))
    if args.protocol == "semi" and args.epochs < 2:
        parser.error("semi trains in two halves: --epochs 2 or more")
    if args.tile and args.tile < 16:
        parser.error("--tile is at least 16 pixels")
    unused = set()
    if args.run:
        unused.add("backbone")
    if not args.predict:
        unused.update(OF_PREDICT)
    if args.predict or args.export:
        unused.update(OF_TRAINING, ["dataset", "protocol", "seed"])
    elif args.protocol not in LABEL_PROTOCOLS:
        unused.update(OF_TRAINING)
    if args.export or args.protocol in ("classify", "reference"):
        unused.add("flips")
    given = []
    for name in sorted(unused):
        if getattr(args, name) != parser.get_default(name):
            given.append("--" + name.replace("_", "-"))
            setattr(args, name, parser.get_default(name))
    if given:
        print(f"not used here and ignored: {', '.join(given)}")
    return args


def training_name(args, source):
    """Of a result and of the folder of its training: the protocol, and what is not as usual.
    source: the data set that the network was trained on."""
    parser = make_parser()
    words = [args.protocol]
    for name, prefix in NAMED.items():
        value = getattr(args, name)
        if str(value) != str(parser.get_default(name)):     # 1 label is not all, 1.0
            words.append(f"{prefix}{value}")
    if args.dataset not in (None, source):
        words.append(f"on-{args.dataset}")
    return "-".join(words)


def describe(args, run, meta):
    """What is evaluated: backbone, method, train, variant, ...: of the settings of its `run`, or
    made up for what has none. A dict."""
    common = dict(backbone=args.backbone, threshold="otsu", foreground=meta["foreground"])
    if args.protocol == "reference":
        return common | dict(method="reference", train=None, variant="reference")
    if args.protocol == "supervised":
        return common | dict(method="supervised", train="end2end", variant="supervised",
                             loss="focal_tversky", epochs=args.epochs, batch_size=args.batch_size)
    if args.encoder:
        path = Path(args.encoder).resolve()
        name = path.stem
        if (path.parent / "config.json").exists():      # of a run: all are called encoder.pth
            name = "-".join(path.parts[-5:-1])
        return common | dict(method=name, train="encoder", variant=name)
    folder = Path(args.run).resolve()
    variant = folder.parent.name
    if "protocol" in run:                   # a run of this script, in the folder of another
        variant = f"{folder.parents[1].name}-{folder.name}"
    if args.dataset not in (None, run["dataset"]):
        variant += f"-from-{run['dataset']}"
    return run | dict(variant=variant)


def make_job(args, device, command):
    """The Job that the flags ask for. Ends the program where it cannot be done."""
    run, *run_command = read_run(Path(args.run)) if args.run else [{}]
    data = Path(args.data) / (args.dataset or run["dataset"])
    meta = prepare_data.read_meta(data)
    if "protocol" in run:
        if args.protocol in LABEL_PROTOCOLS:
            sys.exit(f"{args.run} has seen labels: train on labels from a run of pretrain.py")
        if run["dataset"] == data.name and run["data"] != meta["fingerprint"]:
            sys.exit(f"{args.run} was trained on another preparation of {data.name}, perhaps on "
                     "images that are test images now: prepare it as it was, or train again")
    has_decoder = run.get("train") == "end2end"
    if args.protocol == "semi" and not has_decoder:
        sys.exit("semi draws masks without labels: it needs a --run of pretrain.py that trained a "
                 f"whole U-Net, and {args.run or args.encoder} is none")
    decoder = "fresh"
    if has_decoder and args.protocol in ("transfer", "finetune", "semi"):
        decoder = "pretrained"
    size = meta["size"]
    if run.get("backbone") == "vit_small" and decoder == "pretrained" and run["img_size"] != size:
        sys.exit(f"{args.run} was trained at {run['img_size']} px and {data.name} is prepared at "
                 f"{size}: a ViT U-Net needs one size, prepare the data with --size "
                 f"{run['img_size']}")
    settings = describe(args, run, meta) | dict(img_size=size, data=meta["fingerprint"])
    weights = None
    if args.run or args.encoder:
        weights = Path(args.encoder or Path(args.run) / WEIGHTS[decoder])
        if weights.is_file():               # else models.py says what is wrong
            settings["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    seed = run.get("seed", 0) if args.seed is None else args.seed
    if args.protocol == "transfer" and decoder == "pretrained" and seed != run["seed"]:
        print("not used here and ignored: --seed")
        seed = run["seed"]
    name = training_name(args, run.get("dataset", args.dataset))
    commands = [meta["command"], *run_command, command]
    return Job(args, data, settings, seed, decoder, weights, name, device, commands)


def main(argv=None):
    args = parse_args(argv)
    if args.report:
        return report(args.out or "results")
    if args.export:
        return export_network(args, read_run(Path(args.run))[0])
    device = pick_device(args.device)
    if args.predict:
        return predict_folder(args, read_run(Path(args.run))[0], device)
    flags = sys.argv[1:] if argv is None else argv
    evaluate(make_job(args, device, shlex.join(["python", "finetune_eval.py", *flags])))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_on_sigterm)
    sys.stdout.reconfigure(errors="replace")        # names that the terminal cannot show
    try:
        main()
    except RuntimeError as error:
        explain_memory(error)
        raise
    except OSError as error:                        # a full disk, a forbidden folder
        sys.exit(f"finetune_eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("finetune_eval.py: interrupted; the same command goes on (--predict needs "
                 "--overwrite, or another --out)")
