"""Score a network on a test set it never saw, train it on some labels first, or let it draw masks for a folder of images.

    python finetune_eval.py --run runs/demo/resnet50/medsass/seed0
    python finetune_eval.py --run runs/demo/resnet50/medsass/seed0 --protocol finetune --labels 0.1
    python finetune_eval.py --dataset demo --backbone resnet50 --protocol supervised
    python finetune_eval.py --dataset demo --backbone resnet50 --protocol reference
    python finetune_eval.py --encoder encoder.pth --dataset isic --backbone vit_small --protocol frozen
    python finetune_eval.py --run runs/demo/resnet50/medsass/seed0 --predict my_images --out my_masks
    python finetune_eval.py --report

transfer: the pre-trained network as it is; an encoder alone gets a fresh, seeded decoder that nobody trained (section
4.1). frozen: the decoder is trained, the encoder stays. finetune: all is trained. semi: all is trained, on the labelled
images, and where they are too few also on the others, with the masks that the pre-trained network draws. supervised: all is trained, from scratch. classify: a linear probe on the encoder's pooled features (appendix D). reference: what costs nothing, on the
same test images. One JSON an evaluation, under results/, with a CSV of its test images; --report writes
results/README.md from them.
"""

import argparse
import collections
import csv
import functools
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
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
from losses import LOSSES
from models import BACKBONES, build_unet, load_encoder, read_encoder
from pretrain import (REFINEMENTS, THRESHOLDS, Batches, Images, MedSASS, Options, check_numbers, clear_run, decide_refinement,
                      end_on_sigterm, explain_memory, is_finished, load_checkpoint, normalise, open_run, paper_augmentation, pick_device,
                      pick_precision, pseudo_mask, read_log, refined_name, seed_from, train, write_atomically, write_csv, write_json, write_masks)

BATCH = 16                                                      # test images at a time; no score depends on it
TRAINED = ("frozen", "finetune", "semi", "supervised", "classify")      # protocols that train
REFERENCE = ("all_foreground", "all_background", "raw_threshold", "raw_threshold_inverted", "random_init", "best_constant")
# Who draws masks without a label: (threshold, parts of --refine).
TEACHERS = {threshold: (threshold, ()) for threshold in THRESHOLDS}
for last in (1, 2, 3):                                          # otsu+channel, otsu+channel-frame, otsu+
    TEACHERS["otsu" + refined_name(REFINEMENTS[:last])] = ("otsu", REFINEMENTS[:last])
ROWS = (*REFERENCE, *(f"teacher-{name}" for name in TEACHERS))
COLUMNS = ("tp", "fp", "fn", "tn", "hd95")                     # of a table: what one test image scored
SCORES = [f"{name}_{kind}" for name in ("iou", "dice", "precision", "recall", "accuracy") for kind in ("global", "image")]


# ------------------------------------------------------------------------------------------------ metrics (appendix G)

def count_pixels(pred, target):
    """bool (N, H, W) twice -> int64 (N, 4): true positives, false positives, false negatives, true negatives."""
    pred, target = pred.reshape(len(pred), -1), target.reshape(len(target), -1)
    return np.stack([(a & b).sum(axis=1) for a, b in ((pred, target), (pred, ~target), (~pred, target),
                                                      (~pred, ~target))], axis=1).astype(np.int64)


def scores_from_counts(counts):
    """int (..., 4) from count_pixels -> dict of float (...): iou, dice, precision, recall, accuracy, each in [0, 1].

    0 / 0 is 1 where neither mask has any foreground (nothing to find, nothing found), and 0 elsewhere.
    """
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)

    def ratio(part, whole):
        return np.where(whole > 0, part / np.maximum(whole, 1), np.where(tp + fp + fn == 0, 1.0, 0.0))

    return dict(iou=ratio(tp, tp + fp + fn), dice=ratio(2 * tp, 2 * tp + fp + fn), precision=ratio(tp, tp + fp),
                recall=ratio(tp, tp + fn), accuracy=ratio(tp + tn, tp + fp + fn + tn))


def resampled_scores(counts, weights):
    """counts (N, 4) and how often each image counts, (R, N) -> dict of float (R,): iou_global, iou_image, ...: counts
    summed over the set, and the mean over its images."""
    overall, single = scores_from_counts(weights @ counts), scores_from_counts(counts)
    means = {name: weights @ value / weights.sum(axis=1) for name, value in single.items()}
    return {f"{name}_{kind}": value[name] for name in overall for kind, value in (("global", overall), ("image", means))}


def segmentation_scores(pred, target):
    """bool (N, H, W) twice -> dict iou, dice, precision, recall, accuracy, each "_global" (counts summed over the set)
    and "_image" (mean over images). Raises ValueError for another dtype or unequal shapes."""
    if pred.dtype != bool or target.dtype != bool or pred.shape != target.shape or pred.ndim != 3 or not len(pred):
        raise ValueError(f"two bool arrays (N, H, W) of one shape are needed, not {pred.dtype} {pred.shape} and "
                         f"{target.dtype} {target.shape}")
    scores = resampled_scores(count_pixels(pred, target), np.ones((1, len(pred)), np.int64))
    return {name: float(value[0]) for name, value in scores.items()}


def hausdorff95(pred, target):
    """bool (N, H, W) twice -> float (N,): the 95 % Hausdorff distance of each pair, in pixels.

    From every boundary pixel of one mask to the nearest boundary pixel of the other: the 95th percentile, and of the two
    directions the larger. A boundary pixel is foreground with a background pixel, or the picture's edge, on one of its
    four sides. Two empty masks are 0 apart; an empty one and another as far as the picture's diagonal.
    """
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    distances = []
    for pair in zip(pred, target):
        if not all(mask.any() for mask in pair):
            distances.append(math.hypot(*pair[0].shape) if any(mask.any() for mask in pair) else 0.0)
            continue
        a, b = (mask & ~cv2.erode(mask.astype(np.uint8), cross, borderType=cv2.BORDER_CONSTANT, borderValue=0).astype(bool)
                for mask in pair)
        to_a, to_b = (np.sqrt(np.rint(cv2.distanceTransform((~edge).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
                                      .astype(np.float64) ** 2)) for edge in (a, b))     # squares are whole: no rounding
        distances.append(float(max(np.percentile(to_b[a], 95), np.percentile(to_a[b], 95))))
    return np.array(distances)


def bootstrap_weights(groups, rounds=2000, seed=0):
    """The group of each image (N,) -> float (rounds, N), whole: how often it is drawn when as many groups as there are are
    drawn with replacement (Efron 1979). Images without a group of their own are groups of one."""
    return draw_groups(tuple(groups), rounds, seed)


@functools.lru_cache(maxsize=2)
def draw_groups(groups, rounds, seed):
    """bootstrap_weights of a tuple; kept, because the report needs the same ones for every cell."""
    _, index = np.unique(groups, return_inverse=True)
    n = index.max() + 1
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=rounds)[:, index].astype(np.float64)


def interval(samples):
    """float (R,) -> [low, high]: the middle 95 %."""
    return [float(bound) for bound in np.percentile(samples, (2.5, 97.5))]


def summarise(table, groups):
    """float (N, 5), the COLUMNS -> dict: all SCORES and hd95_image (pixels), each also with "_ci", its
    95 % bootstrap interval over groups."""
    once, weights = np.ones((1, len(table))), bootstrap_weights(groups)
    values, samples = (resampled_scores(table[:, :4], w) | dict(hd95_image=w @ table[:, 4] / w.sum(axis=1))
                       for w in (once, weights))
    return {name: float(value[0]) for name, value in values.items()} | {f"{n}_ci": interval(v) for n, v in samples.items()}


def resampled_iou(tables, groups):
    """A list of tables (N, 5) over the same images, one a seed -> their mean global IoU, and that of each resampling (R,)."""
    counts = np.stack(tables)[..., :4]
    value, samples = (scores_from_counts(weights @ counts)["iou"].mean(axis=0)
                      for weights in (np.ones((1, len(groups))), bootstrap_weights(groups)))
    return float(value[0]), samples


def paired_difference(first, second, groups):
    """Two lists of tables (N, 5) over the same images -> (difference of their mean global IoU, [low, high]).

    The same resampled images are scored for both: what is hard for all cancels (Efron & Tibshirani 1993)."""
    (one, ones), (other, others) = resampled_iou(first, groups), resampled_iou(second, groups)
    return one - other, interval(ones - others)


# ------------------------------------------------------------------------------------------------ networks and batches

def read_run(run):
    """The settings of a run folder (its config.json), a dict; ends the program where it is not a finished run."""
    try:
        settings = json.loads((run / "config.json").read_text())["settings"]
    except (OSError, ValueError, KeyError):
        sys.exit(f"{run} is not a run folder: it has no readable config.json (see python pretrain.py --help)")
    gone = [key for key in ("channel", "fov", "round") if key in settings]
    if gone or settings.get("threshold") == "enclosed":
        sys.exit(f"{run} was made with flags that are gone ({' '.join(gone) or 'enclosed'}): train again, with --refine")
    if not is_finished(run):
        sys.exit(f"{run} is not finished: run its command again, it goes on where it stopped")
    return settings


def load_network(args, settings, decoder):
    """A U-Net drawn from --seed, and the file its weights are then loaded from: the whole network of an end-to-end run
    where `decoder` is "pretrained", else the encoder alone (of a run or of --encoder)."""
    torch.manual_seed(seed_from(args.seed, 1))                  # not the draw that pre-training started from
    path = Path(args.encoder or Path(args.run) / ("best.pt" if decoder == "pretrained" else "encoder.pth"))
    try:
        unet = build_unet(settings["backbone"], settings["img_size"])
        if decoder == "pretrained":
            unet.load_state_dict(load_checkpoint(path, "cpu")["model"])
        else:
            load_encoder(unet, path)
    except ValueError as error:
        sys.exit(str(error))
    return unet, path


@torch.inference_mode()
def predict_logits(unet, images, device, flips=False):
    """uint8 ndarray (B, S, S, 3) -> float32 ndarray (B, S, S): logits, foreground where > 0; with flips their mean over the
    picture as it is, flipped up and down, left and right, and both."""
    batch = normalise(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(device))    # channels_last
    logits = unet(batch)[:, 0].float()                          # (B, S, S)
    if flips:
        for axes in ((2,), (3,), (2, 3)):
            logits += unet(batch.flip(axes)).flip(axes)[:, 0].float()
        logits /= 4
    return logits.cpu().numpy()


def score_images(predict, images, masks, batch=BATCH):
    """float (N, 5), the COLUMNS, over a mapped test set. predict: uint8 (B, S, S, 3) -> bool (B, S, S). Memory:
    one batch."""
    table = []
    for start in tqdm(range(0, len(images), batch), "score", unit=" batches", leave=False):
        target = masks[start:start + batch].astype(bool)
        pred = predict(np.array(images[start:start + batch]))
        table.append(np.column_stack([count_pixels(pred, target), hausdorff95(pred, target)]))
    return np.concatenate(table)


def groups_of(names):
    """The group of each row of a part's CSV; a row without one is a group of its own."""
    return [row["group"] or row["name"] for row in names]


def open_test(args):
    """(images, masks, rows of test.csv) of the test part; ends the program where nothing can be scored."""
    folder = Path(args.data) / args.dataset
    images, masks = prepare_data.open_part(folder, "test")
    if masks is None:
        sys.exit(f"{folder} has no test masks: nothing can be scored; --predict draws masks without any")
    if not masks.any():
        print(f"{folder}: no test mask has any foreground; IoU is 1 where nothing is predicted, else 0")
    return images, masks, prepare_data.read_names(folder, "test")


# ---------------------------------------------------------------------------------------------------- training on labels

def labelled_rows(names, labels, seed, of):
    """Which rows of a part are taken as labelled: a list of indices, nested in `labels`, the same for every method.

    Groups come in an order of (seed) alone, their images one after the other. labels: a share of them (float), or a
    count (int) out of `of` training images, of which any other part gives its like share; never fewer than one.
    """
    groups = collections.defaultdict(list)
    for k, group in enumerate(groups_of(names)):
        groups[group].append(k)
    order = np.random.default_rng(seed_from(seed, 2)).permutation(sorted(groups)).tolist()
    n = max(1, round((labels if isinstance(labels, float) else labels / of) * len(names)))
    return [k for group in order for k in groups[group]][:n]


class WithClass(Images):
    """Images, and to each view its class: `classes`, an int a row of the part. Key (pass, k) -> (row, [view, int64 ()])."""

    def __init__(self, *args, classes, **kwargs):
        super().__init__(*args, **kwargs)
        self.classes = classes

    def __getitem__(self, key):
        row, view = super().__getitem__(key)
        return row, [view, torch.tensor(self.classes[row])]


class FineTuning(MedSASS):
    """MedSASS's U-Net, loss and optimiser, with true masks. The paper gives no schedule: the rate rises over the first tenth
    of the steps and falls to 0 by a cosine, and the last weights are kept, because one or two validation labels cannot
    choose; with a patience the best ones (keep_best)."""

    keep_best = False

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        warm_up = max(1, total_steps // 10)
        if step < warm_up:
            factor = (step + 1) / warm_up
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (total_steps - warm_up)))
        for group in optimizer.param_groups:
            group["lr"] = self.lr * factor

    def health(self):
        true, predicted = self.shares
        return dict(true_foreground=true.item(), predicted_foreground=predicted.item())

    def samples(self, views):
        return {"image": views[0], "truth": views[1], "prediction": self.unet(normalise(views[0])) > 0}


class PartlyLabelled(Images):
    """All training images with the masks of one file. Even draws are of the labelled `rows`, odd ones of all, each in
    stored order, over and over. Key (epoch, k) -> (row, [view, mask (1, S, S)])."""

    def __init__(self, folder, transform, seed, rows, masks):
        super().__init__(folder, "train", transform, seed, masks=masks)
        self.labelled = rows

    def __getitem__(self, key):
        draw = key[0] * len(self) + key[1]                      # from the beginning of the run
        pair = draw // 2
        row = pair % len(self) if draw % 2 else self.labelled[pair % len(self.labelled)]
        return super().__getitem__((draw, row))


def focal_cross_entropy(logits, target, gamma=2.0):
    """Focal loss over classes (Lin et al. 2017, eq. 4): mean of -(1 - p) ** gamma log p. (B, C), int64 (B,) -> scalar."""
    log_p = F.log_softmax(logits, dim=1).gather(1, target[:, None])[:, 0]
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


class Probe(nn.Module):
    """Linear layers on the pooled features of an encoder that stays as it is (appendix D): one on the mean over a ViT's patch
    tokens (384), or over a ResNet's layer2 (512 channels, all that MedSASS trains); and another on layer4 (2048), where the
    encoder has it, as BYOL's, DINO's and SimSiam's losses train it. They share nothing and learn side by side. The members
    are those of every method in pretrain.py."""

    keep_best = True

    def __init__(self, backbone, img_size, classes, has_layer4=False):
        super().__init__()
        if backbone == "vit_small":
            self.stages = {"tokens": 384}
            self.encoder = build_unet(backbone, img_size).encoder
        elif has_layer4:
            self.stages = {"layer2": 512, "layer4": 2048}
            self.encoder = timm.create_model("resnet50", features_only=True, out_indices=(2, 4))
        else:
            self.stages = {"layer2": 512}
            self.encoder = timm.create_model("resnet50", features_only=True, out_indices=(2,))
        self.encoder.requires_grad_(False)
        self.linear = nn.ModuleList([nn.Linear(width, classes) for width in self.stages.values()])
        self.lr, self.weight_decay = 3.6e-4, 1e-5

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    def logits(self, images):
        """uint8 (B, 3, S, S) -> float (B, C), a list, one a stage."""
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
        return torch.optim.Adam(self.linear.parameters(), self.lr, weight_decay=self.weight_decay, fused=True)

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


# ----------------------------------------------------------------------------------------------------------- protocols

def training_folder(args, settings):
    """The run folder of training on labels: in that of --run, or below --runs."""
    folder = Path(args.runs) / args.dataset / settings["backbone"] / settings["variant"] / f"seed{args.seed}"
    if args.run:
        folder = Path(args.run)
    name = args.name.replace("-flips", "")                      # which change prediction alone
    if settings.get("seed", args.seed) != args.seed:            # another draw of labels than the run's
        name += f"-seed{args.seed}"
    return folder / name


@dataclass
class LabelledSets:
    """Data to train on labels with, each with keys and items as of Images. n_train: images an epoch, as many for few labels
    as for all, so that every method has the same steps."""
    train: Images
    plain: Images                                               # the same un-augmented, for BatchNorm
    val: Images
    n_train: int


def fit(method, sets, args, settings, epochs, subfolder=""):
    """Train `method`, on the device where it is, on LabelledSets by pretrain.py's loop in a run folder of its own, or go on
    with what is there. Returns the folder and a dict: n_labels_train, n_labels_val, budget_steps, steps, epochs_run,
    kept_epoch."""
    device = next(method.parameters()).device
    folder = training_folder(args, settings) / subfolder
    method.weight_decay = args.weight_decay
    amp = pick_precision(args.amp, device, method)
    patience = args.patience
    if patience is None:
        patience = 5 if method.keep_best else 0
    method.keep_best = patience > 0
    options = Options(epochs, args.batch_size, patience, args.seed, amp, args.workers)
    n_labels = len(getattr(sets.train, "labelled", sets.train))
    own = {name: getattr(args, name) for name in ("dataset", "protocol", "labels", "decoder", "loss", "batch_size", "seed")}
    own |= dict(epochs=epochs, patience=patience, lr=method.lr, weight_decay=method.weight_decay, amp=amp,
                train="encoder" if isinstance(method, Probe) else "end2end", n_train=n_labels, n_val=len(sets.val))
    with prepare_data.only_one(folder / ".lock"):
        open_run(settings | own, folder, args.command, args.overwrite)
        if not is_finished(folder):
            train(method, (sets.train, sets.plain, sets.val), options, folder, device, sets.n_train)
    epochs_run, steps = len(read_log(folder)), len(Batches(sets.n_train, args.batch_size))
    return folder, dict(n_labels_train=n_labels, n_labels_val=len(sets.val), budget_steps=epochs * steps,
                        steps=epochs_run * steps, epochs_run=epochs_run,
                        kept_epoch=load_checkpoint(folder / "best.pt", "cpu")["epoch"])


def draw_rows(unet, weights, images, rows):
    """The masks, bool (S, S), that a network with `weights` draws for some `rows` of uint8 (N, S, S, 3), may be mapped, one
    after the other. Leaves it with these weights, in eval mode."""
    unet.load_state_dict(weights)
    unet.eval()
    device = next(unet.parameters()).device
    for start in range(0, len(rows), BATCH):
        yield from predict_logits(unet, images[rows[start:start + BATCH]], device) > 0


def iou_of(pred, masks, rows):
    """Global IoU, 0 to 1, of masks, bool (S, S) each, and the `rows` of uint8 (N, S, S), may be mapped."""
    counts = np.zeros(4, np.int64)
    for mask, row in zip(pred, rows):
        counts += count_pixels(mask[None], masks[row][None] > 0)[0]
    return float(scores_from_counts(counts)["iou"])


def compare_tuned(unet, pretrained, tuned, sets, folder):
    """Whether the network tuned on the labels is better than the pre-trained one: a dict, `trusted` and the IoUs that decide,
    kept in decision.json. Writes the pre-trained one's masks, with the true ones where there are labels, into
    train_masks.npy. pretrained, tuned: weights for `unet`. folder: the run folder of tuning.

    The pre-trained network errs alike on labelled and unlabelled images, so that a tuned one that is right agrees with it on
    the unlabelled as well as the truth does on the labelled; one that has learnt a few images by heart agrees less. So with
        ratio = IoU(tuned, pre-trained) on the unlabelled images / IoU(pre-trained, truth) on the labelled ones
    it is trusted where ratio >= 1, and not where ratio < .8; in between, and where all are labelled, the validation images
    decide.
    """
    path = folder / "decision.json"
    if path.exists():
        return json.loads(path.read_text())
    rows, data = sets.train.rows, sets.train.path.parent
    others = sorted(set(range(sets.n_train)) - set(rows))
    images, truth = prepare_data.open_part(data, "train")
    drawn = draw_rows(unet, pretrained, images, others)
    labelled = set(rows)
    write_masks((truth[k] if k in labelled else next(drawn) for k in range(len(truth))), truth.shape, folder / "train_masks.npy")
    val_images, val_truth = prepare_data.open_part(data, "val")
    result = {}
    for name, weights in dict(pretrained=pretrained, tuned=tuned).items():
        drawn = draw_rows(unet, weights, val_images, sets.val.rows)
        result[f"{name}_val_iou"] = iou_of(drawn, val_truth, sets.val.rows)
    trusted = result["tuned_val_iou"] >= result["pretrained_val_iou"]
    if others:
        result["pretrained_iou"] = iou_of(draw_rows(unet, pretrained, images, rows), truth, rows)
        masks = np.load(folder / "train_masks.npy", mmap_mode="r")
        result["agreement"] = iou_of(draw_rows(unet, tuned, images, others), masks, others)
        if result["agreement"] >= result["pretrained_iou"]:
            trusted = True
        elif result["agreement"] < 0.8 * result["pretrained_iou"]:
            trusted = False
    result["trusted"] = trusted
    write_json(path, result)
    return result


def fit_semi(method, sets, args, settings, epochs):
    """As fit, on the labelled images, and where they are too few on the others, too, with the masks that the pre-trained
    network draws for them (self-training: Lee 2013).

    The first half of the epochs tunes the pre-trained network on the labels alone. If the tuned one is trusted
    (compare_tuned), it goes on so for the second half. Else the pre-trained one starts again: half of what it sees are
    labelled images, half are all images, with its own masks where there is no label. The dict has that of compare_tuned.
    """
    pretrained = {name: value.clone() for name, value in method.unet.state_dict().items()}
    method.lr = 1e-3 if args.lr is None else args.lr
    whole_folder = training_folder(args, settings)
    if args.overwrite:                                          # or the second half would be the old one's until it begins
        with prepare_data.only_one(whole_folder / ".lock"):
            clear_run(whole_folder)
    folder, first_half = fit(method, sets, args, settings, epochs // 2, "labels")
    tuned = load_checkpoint(folder / "best.pt", "cpu")["model"]
    decision = compare_tuned(method.unet, pretrained, tuned, sets, folder)
    print(", ".join(f"{name} {value:.3f}" for name, value in decision.items() if name != "trusted"))
    if decision["trusted"]:
        print("the tuned network is trusted: on with the labels alone")
        method.unet.load_state_dict(tuned)
    else:
        print("the tuned network is not trusted: from the pre-trained one again, with its masks where there is no label")
        method.unet.load_state_dict(pretrained)
        train_set = PartlyLabelled(sets.train.path.parent, paper_augmentation(), args.seed, sets.train.rows,
                                   folder / "train_masks.npy")
        sets = replace(sets, train=train_set)
    method.lr /= 3                                              # lower: the network is trained
    folder, result = fit(method, sets, args, settings, epochs - epochs // 2)
    result["kept_epoch"] += first_half["epochs_run"]
    for name in ("budget_steps", "steps", "epochs_run"):
        result[name] += first_half[name]
    return folder, result | decision


def labelled_sets(args, keep=None, classes=None):
    """The LabelledSets of --labels. keep: rows that can be taken, a list a part (unset: all). classes: a number a row of each
    part, instead of the masks. Ends the program where there are fewer images than labels asked for."""
    data, seed = Path(args.data) / args.dataset, args.seed
    names = {part: prepare_data.read_names(data, part) for part in ("train", "val")}
    keep = keep or {part: list(range(len(rows))) for part, rows in names.items()}
    of = len(keep["train"])
    if not isinstance(args.labels, float) and args.labels > of:
        sys.exit(f"--labels {args.labels}: {data} has {of} training images")
    rows = {part: [kept[k] for k in labelled_rows([names[part][i] for i in kept], args.labels, seed, of)]
            for part, kept in keep.items()}
    print(f"labels: {len(rows['train'])} of {of} training images, and {len(rows['val'])} of {len(keep['val'])} validation "
          "images")

    def true(part, transform):
        return (Images(data, part, transform, seed, rows[part], masks=data / f"{part}_masks.npy") if classes is None else
                WithClass(data, part, transform, seed, rows[part], classes=classes[part]))

    plain = Images(data, "train", v2.Identity(), seed, rows["train"])
    return LabelledSets(true("train", paper_augmentation()), plain, true("val", v2.Identity()), of)


def teacher_of(data, threshold, foreground, refine=()):
    """Who draws masks for a data set without a label: (draw: uint8 (B, S, S, 3) -> bool (B, S, S); evidence of --refine)."""
    if not refine:
        return lambda batch: pseudo_mask(batch, threshold, foreground) > 0, {}
    refinement, evidence = decide_refinement(prepare_data.open_part(data, "train")[0], foreground, refine)
    return lambda batch: np.stack([refinement.draw(image) for image in batch]), evidence


def sheet_of_three(unet, images, masks, table, teacher, names, device):
    """As the paper's Table 6: image, pseudo-mask, truth, prediction; the images of best, median and worst IoU."""
    iou = scores_from_counts(table[:, :4])["iou"]
    order = np.argsort(-iou, kind="stable")
    rows, captions = [], []
    for title, k in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        image = np.array(images[k])
        rows.append([image, teacher(image[None])[0], masks[k], predict_logits(unet, image[None], device)[0] > 0])
        captions.append(f"{title}: IoU {iou[k]:.4f}   {names[k]['name']}"[:64])
    return prepare_data.contact_sheet(rows, ["image", "pseudo-mask", "truth", "prediction"], captions)


def segment(args, settings, meta, device):
    """transfer, frozen, finetune, semi, supervised: train if the protocol does, and score the network on the test part.
    Returns the result, a table (N, 5) a row of the CSV, and the qualitative sheet. Ends the program where masks that it
    needs are missing."""
    images, masks, names = open_test(args)
    torch.manual_seed(seed_from(args.seed))
    result = {}
    try:
        method = FineTuning(settings["backbone"], meta["size"], args.batch_size, loss=args.loss,
                            train_part="decoder" if args.protocol == "frozen" else "end2end")
    except ValueError as error:
        sys.exit(str(error))
    if args.protocol != "supervised":
        unet, weights = load_network(args, settings, args.decoder)
        method.unet.load_state_dict(unet.state_dict())
        result["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    if args.lr is not None:
        method.lr = args.lr
    elif args.decoder == "fresh":
        method.lr = 1e-3
    if args.protocol in TRAINED:
        for part in ("train", "val"):
            if prepare_data.open_part(Path(args.data) / args.dataset, part)[1] is None:
                sys.exit(f"{Path(args.data) / args.dataset} has no {part} masks: {args.protocol} needs them")
        train_method = fit_semi if args.protocol == "semi" else fit
        method.to(device, memory_format=torch.channels_last)
        folder, took = train_method(method, labelled_sets(args), args, settings | result, args.epochs)
        method.unet.load_state_dict(load_checkpoint(folder / "best.pt", "cpu")["model"])
        result |= took
    unet = method.unet.to(device, memory_format=torch.channels_last).eval()
    draw, _ = teacher_of(Path(args.data) / args.dataset, settings["threshold"], settings["foreground"],
                         settings.get("refine", ()))
    agreed = np.zeros(4, np.int64)                              # with the teacher, on images that neither has seen

    def predict(batch):
        pred = predict_logits(unet, batch, device, args.flips) > 0
        agreed[:] += count_pixels(pred, draw(batch)).sum(axis=0)
        return pred

    table = score_images(predict, images, masks)
    if args.protocol == "transfer" and settings["method"] == "medsass" and "protocol" not in settings:
        result["teacher_agreement"] = float(scores_from_counts(agreed)["iou"])
    sheet = sheet_of_three(unet, images, masks, table, draw, names, device)
    return dict(n_test=len(images), **result, **summarise(table, groups_of(names))), {"": table}, sheet


def best_constant(data):
    """The cut of the mean training mask with the best IoU over the training part, when it is predicted for every image:
    bool (S, S). None where there are no masks."""
    _, masks = prepare_data.open_part(data, "train")
    if masks is None:
        return None
    counts = sum(mask.astype(np.int64) for mask in masks)       # (S, S): images with foreground there
    ranked = np.sort(counts, axis=None)[::-1]
    pixels = np.arange(1, ranked.size + 1)                      # that the mask has, from the most frequent on
    hits = np.cumsum(ranked)
    iou = hits / np.maximum(len(masks) * pixels + ranked.sum() - hits, 1)
    return counts >= max(ranked[iou.argmax()], 1)


def reference(args, settings, meta, device):
    """Score what costs nothing on the same test images: trivial masks, the threshold, an untrained network, and each of
    TEACHERS, with a picture of all on training images. Only best_constant uses labels. Without test masks the tables are
    empty."""
    data, foreground = Path(args.data) / args.dataset, settings["foreground"]
    teachers = {name: teacher_of(data, how[0], foreground, how[1]) for name, how in TEACHERS.items()}
    train_images = prepare_data.open_part(data, "train")[0]
    shown = [np.array(train_images[k]) for k in range(min(6, len(train_images)))]
    drawn = [[image, *(draw(image[None])[0] for draw, _ in teachers.values())] for image in shown]
    sheet = prepare_data.contact_sheet(drawn, ["image", *teachers], cell=144)
    if prepare_data.open_part(data, "test")[1] is None:
        return {}, {}, sheet
    images, masks, names = open_test(args)
    torch.manual_seed(seed_from(args.seed))                     # the very weights that pre-training starts from
    try:
        unet = build_unet(args.backbone, meta["size"]).to(device, memory_format=torch.channels_last).eval()
    except ValueError as error:
        sys.exit(str(error))
    other = "dark" if foreground == "bright" else "bright"
    rows = dict(all_foreground=lambda batch: np.ones(batch.shape[:3], bool),
                all_background=lambda batch: np.zeros(batch.shape[:3], bool),
                raw_threshold=lambda batch: pseudo_mask(batch, settings["threshold"], foreground) > 0,
                raw_threshold_inverted=lambda batch: pseudo_mask(batch, settings["threshold"], other) > 0,
                random_init=lambda batch: predict_logits(unet, batch, device) > 0)
    constant = best_constant(data)
    if constant is None:
        print(f"{args.dataset} has no training masks: no row best_constant")
    else:
        rows["best_constant"] = lambda batch: np.repeat(constant[None], len(batch), axis=0)
    rows |= {f"teacher-{name}": draw for name, (draw, _) in teachers.items()}
    tables = {name: score_images(predict, images, masks) for name, predict in rows.items()}
    result = {name: summarise(table, groups_of(names)) for name, table in tables.items()}
    for name, (_, evidence) in teachers.items():
        result[f"teacher-{name}"] |= evidence
    if constant is not None:
        result["best_constant"]["uses_labels"] = True
    return dict(n_test=len(images), **result), tables, sheet


def classify(args, settings, meta, device):
    """A linear probe on the run's encoder; recall of each class, their mean, and the confusion matrix. Returns the result,
    and (label, prediction) of each test image that has a label."""
    data = Path(args.data) / args.dataset
    names = {part: prepare_data.read_names(data, part) for part in prepare_data.PARTS}
    keep = {part: [k for k, row in enumerate(rows) if row["label"]] for part, rows in names.items()}
    labels = sorted({names["train"][k]["label"] for k in keep["train"]})
    new = {names[part][k]["label"] for part in ("val", "test") for k in keep[part]} - set(labels)
    if len(labels) < 2 or new or not all(keep.values()):
        sys.exit(f"{data}: classify needs at least two labels in train.csv, and the same ones in val.csv and test.csv; found "
                 f"{labels or 'none'}" + (f", elsewhere {sorted(new)}" if new else ""))
    number = {part: [labels.index(row["label"]) if row["label"] else -1 for row in rows] for part, rows in names.items()}
    weights = Path(args.encoder or Path(args.run) / "encoder.pth")
    torch.manual_seed(seed_from(args.seed, 3))
    try:
        has_layer4 = "layer4.0.conv1.weight" in read_encoder(weights, settings["backbone"])
        probe = Probe(settings["backbone"], meta["size"], len(labels), has_layer4)
        load_encoder(probe, weights)
    except ValueError as error:
        sys.exit(str(error))
    result = dict(weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    sets = labelled_sets(args, {part: keep[part] for part in ("train", "val")}, number)
    probe.lr = probe.lr if args.lr is None else args.lr
    probe.to(device, memory_format=torch.channels_last)
    folder, took = fit(probe, sets, args, settings | result, args.epochs)
    probe.load_state_dict(load_checkpoint(folder / "best.pt", "cpu")["model"])
    probe.to(device).eval()
    images = np.load(data / "test_images.npy", mmap_mode="r")
    truth = np.array(number["test"])[keep["test"]]
    drawn = {stage: [] for stage in probe.stages}               # the class that each stage's layer gives an image
    with torch.inference_mode():
        for start in range(0, len(truth), BATCH):
            batch = torch.from_numpy(images[keep["test"][start:start + BATCH]]).permute(0, 3, 1, 2).to(device)
            for pred, logits in zip(drawn.values(), probe.logits(batch), strict=True):
                pred += logits.argmax(dim=1).tolist()
    groups = np.array(groups_of(names["test"]))[keep["test"]]
    scores = {}
    for stage, pred in drawn.items():
        confusion, recall, ci = class_scores(truth, np.array(pred), len(labels), groups)
        scores[stage] = dict(macro_recall=float(np.nanmean(recall)), macro_recall_ci=ci, accuracy=float((truth == pred).mean()),
                             confusion=confusion.tolist(),
                             class_recall={name: float(r) for name, r in zip(labels, recall) if not np.isnan(r)})
    deepest = list(scores)[-1]
    result |= dict(n_test=len(truth), **took, classes=labels, stage=deepest, **scores.pop(deepest), **scores,
                   majority_accuracy=float(np.bincount(truth).max() / len(truth)))
    rows = [dict(name=names["test"][k]["name"], group=names["test"][k]["group"], label=labels[t], prediction=labels[p])
            for k, t, p in zip(keep["test"], truth, drawn[deepest])]
    return result, rows, None


def class_scores(truth, pred, classes, groups):
    """int (N,) twice -> confusion (C, C), truth by rows; recall of each class (C,), nan where the test part has none; and
    the 95 % bootstrap interval of their mean."""
    def recalls(weights):
        hits = np.stack([weights @ ((truth == c) & (pred == c)) for c in range(classes)])
        return hits / np.maximum(np.stack([weights @ (truth == c) for c in range(classes)]), 1e-9)

    present = np.bincount(truth, minlength=classes) > 0
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (truth, pred), 1)
    recall = np.where(present, recalls(np.ones((1, len(truth))))[:, 0], np.nan)
    return confusion, recall, interval(recalls(bootstrap_weights(groups))[present].mean(axis=0))


def per_image(tables, names):
    """{row: table (N, 5)} -> a list of dicts, one an image and row: what the pictures scored, each by itself."""
    rows = []
    for row, table in tables.items():
        single = scores_from_counts(table[:, :4])
        for k, (image, values) in enumerate(zip(names, table)):
            counts = dict(zip(COLUMNS, values[:4].astype(int).tolist()))
            rows.append(dict(row=row, name=image["name"], group=image["group"], **counts, hd95=f"{values[4]:.6g}",
                             **{name: f"{value[k]:.6g}" for name, value in single.items()}))
    return rows


def evaluate(args, settings, meta, device):
    """Run one protocol, print its scores, write its JSON, the CSV of its test images, and its picture."""
    folder = Path(args.out) / args.dataset / settings["backbone"] / settings["variant"] / f"seed{args.seed}"
    path = folder / f"{args.name}.json"
    with prepare_data.only_one(folder / f".{args.name}.lock"):
        head = dict(dataset=args.dataset, backbone=settings["backbone"], method=settings["method"],
                    variant=settings["variant"], train=settings["train"], protocol=args.protocol,
                    labels=args.labels if args.protocol in TRAINED else settings.get("labels", 0.0), seed=args.seed)
        about = ("threshold", "foreground", "refine", "loss", "epochs", "batch_size")
        head |= {key: settings[key] for key in about if key in settings}
        if "refine" in settings:
            head["refine"] = " ".join(settings["refine"])
        head |= dict(img_size=meta["size"], data=meta["fingerprint"])
        if "n_train" in settings:                               # a run of this script, that has seen labels
            head |= dict(n_labels_train=settings["n_train"], n_labels_val=settings["n_val"])
        if args.protocol in TRAINED:
            head |= dict(name=args.name, decoder=args.decoder)
        protocol = dict(reference=reference, classify=classify).get(args.protocol, segment)
        result, tables, sheet = protocol(args, settings, meta, device)
        result, picture = head | result, folder / "teachers.png" if args.protocol == "reference" else path.with_suffix(".png")
        if path.exists() and not args.overwrite:
            refuse_to_replace(path, result)
        if sheet is not None:
            write_atomically(picture, functools.partial(Image.fromarray(sheet).save, format="PNG"))
        if not tables:
            print(f"{Path(args.data) / args.dataset} has no test masks: no scores; {picture} shows what each teacher draws")
            return
        if isinstance(tables, dict):
            tables = per_image(tables, prepare_data.read_names(Path(args.data) / args.dataset, "test"))
        write_csv(path.with_suffix(".csv"), tables)
        text = json.dumps(result | dict(command=args.command), indent=2) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text))
    print_scores(result)
    print(path)


def refuse_to_replace(path, result):
    """End the program if the JSON at `path` holds another evaluation than this one."""
    try:
        there = json.loads(path.read_text())
    except ValueError:
        there = {}
    differ = [key for key, value in result.items() if there.get(key) != value]
    if differ:
        sys.exit(f"{path} holds another evaluation (other {', '.join(differ)}): --overwrite replaces it")


def print_scores(r):
    """The scores of one result on the screen, a line a reference row or network."""
    if r["protocol"] == "classify":
        low, high = r["macro_recall_ci"]
        print(f"macro recall {r['macro_recall']:.4f} [{low:.4f}, {high:.4f}], accuracy {r['accuracy']:.4f}; always the "
              f"commonest class: {1 / len(r['class_recall']):.4f}, {r['majority_accuracy']:.4f}")
        return
    for name, row in rows_of(r).items():
        low, high = row["iou_global_ci"]
        print(f"{name or r['variant']:24} IoU {row['iou_global']:.4f} [{low:.4f}, {high:.4f}], an image {row['iou_image']:.4f}; "
              f"precision {row['precision_global']:.4f}, recall {row['recall_global']:.4f}, hd95 {row['hd95_image']:.1f} px"
              + ("  (uses labels)" if row.get("uses_labels") else ""))


# -------------------------------------------------------------------------------------------------------------- report

METHODS = dict(medsass="MedSASS", byol="BYOL", dino="DINO", simsiam="SimSiam", mae="MAE", simmim="SimMIM",
               supervised="supervised")
PAPER_SETS = ("dm", "tissuenet", "isic", "xray")


def four(*values):
    """The paper's numbers on its four data sets, in the order of its tables."""
    return {name: value for name, value in zip(PAPER_SETS, values) if value is not None}


def by_method(train, backbone, numbers):
    """Rows of a table that compares methods: (title, what a result must have, the paper's numbers)."""
    return [(METHODS[m] + (" (encoder)" if m == "medsass" and train == "encoder" else ""),
             dict(method=m, train="end2end" if m == "supervised" else train, backbone=backbone), four(*v))
            for m, v in numbers.items()]


def by_setting(key, train, rows):
    """Rows of an ablation of MedSASS: the same, for (title, value of `key`, backbone, the paper's numbers)."""
    return [(title, {"method": "medsass", "train": train, "backbone": backbone, key: value}, numbers)
            for title, value, backbone, numbers in rows]


RN_E = dict(dino=(.1399, .2972, .2426, .2052), byol=(.1278, .3455, .2412, .2185), simsiam=(.1415, .3021, .2395, .1939),
            medsass=(.1742, .3824, .2445, .2568))
VIT_E = dict(dino=(.1668, .2483, .1891, .2106), mae=(.1668, .3455, .191, .2106), simmim=(.167, .3335, .1913, .2077),
             medsass=(.136, .3633, .1914, .2466))
# (title, protocol, score, rows). Tables 3, 4 and B.1 are end to end, 1, 2, 5, 7 to 10 encoder only.
TABLES = [
    ("Table 1: encoder only, ResNet-50", "transfer", "iou_global", by_method("encoder", "resnet50", RN_E)),
    ("Table 2: encoder only, ViT-small", "transfer", "iou_global", by_method("encoder", "vit_small", VIT_E)),
    ("Figure 3: encoder only and end to end, ResNet-50", "transfer", "iou_global",
     by_method("encoder", "resnet50", RN_E) + by_method("end2end", "resnet50", dict(medsass=(.181, .5077, .4847, .3522)))),
    ("Figure 4: encoder only and end to end, ViT-small", "transfer", "iou_global",
     by_method("encoder", "vit_small", VIT_E) + by_method("end2end", "vit_small", dict(medsass=()))),
    ("Table 3: threshold", "transfer", "iou_global", by_setting("threshold", "end2end", [
        ("adaptive mean", "adaptive_mean", "resnet50", four(.1724, .3949, .2393, .1839)),
        ("adaptive Gaussian", "adaptive_gaussian", "resnet50", four(.1725, .391, .2393, .2079)),
        ("GHT", "ght", "resnet50", four(.1809, .4927, .1236, .1689)),
        ("Otsu", "otsu", "resnet50", four(.181, .5077, .4847, .3522))])),
    ("Table 4: loss", "transfer", "iou_global", by_setting("loss", "end2end", [
        ("Tversky", "tversky", "resnet50", four(.1726, .3604, .2444, .1963)),
        ("focal", "focal", "resnet50", four(.02, .11, .05291, .02)),
        ("focal-Tversky", "focal_tversky", "resnet50", four(.181, .5077, .4847, .3522))])),
    ("Appendix B.1: cross-entropy, IoU", "transfer", "iou_global",
     by_setting("loss", "end2end", [("cross-entropy", "bce", "resnet50", dict(isic=0.0))])),
    ("Appendix B.1: cross-entropy, accuracy", "transfer", "accuracy_global",
     by_setting("loss", "end2end", [("cross-entropy", "bce", "resnet50", dict(isic=.7608))])),
    ("Table 5: epochs", "transfer", "iou_global", by_setting("epochs", "encoder", [
        (f"{name}, {n} epochs", n, backbone, dict(tissuenet=value))
        for name, backbone, values in (("ResNet-50", "resnet50", (.3785, .3778, .3824, .3876)),
                                       ("ViT-small", "vit_small", (.3575, .3564, .3633, .4091)))
        for n, value in zip((10, 20, 50, 70), values)])),
    ("Tables 7, 8: batch size", "transfer", "iou_global", by_setting("batch_size", "encoder", [
        (f"{name}, batch {n}", n, backbone, numbers)
        for name, backbone, values in (
            ("ResNet-50", "resnet50", (dict(), dict(isic=.2445, tissuenet=.3824), dict(isic=.2449, tissuenet=.3852))),
            ("ViT-small", "vit_small", (dict(), dict(isic=.1914, tissuenet=.3633), dict(isic=.2014, tissuenet=.3822))))
        for n, numbers in zip((8, 16, 32), values)])),
    ("Table 9: linear probe", "classify", "macro_recall", [
        row for backbone, numbers in (
            ("resnet50", dict(byol=(.65, .7073), dino=(.6546, .5241), simsiam=(.6475, .6541), medsass=(.655, .5785))),
            ("vit_small", dict(mae=(.6492, .673), simmim=(.6438, .66), dino=(.65, .40), medsass=(.6554, .183))))
        for row in by_method("encoder", backbone, {m: (None, None, *v) for m, v in numbers.items()})]),
    ("Table 10: natural images from a drone", "transfer", "iou_global", [
        (METHODS[m], dict(method=m, train="encoder", backbone="resnet50"), dict(drone=v))
        for m, v in dict(simsiam=.9932, byol=.9910, medsass=.9744, dino=.9459).items()]),
    *[(f"Figure 10: every label and none, {backbone}", None, "iou_global",
       by_method("end2end", backbone, dict(supervised=(), medsass=()))) for backbone in BACKBONES]]
USUAL = dict(threshold="otsu", loss="focal_tversky", epochs=50, batch_size=16, refine=None)


def read_results(out):
    """Every result below `out` with the tables of its test images, and a line for each JSON that is none."""
    results, bad = [], []
    for path in sorted(Path(out).rglob("*.json")):
        try:
            r = json.loads(path.read_text())
            {r[key] for key in ("dataset", "backbone", "method", "variant", "train", "protocol", "labels", "seed")}
            {r[key] for key in ("n_labels_train", "n_labels_val", "budget_steps") if r["protocol"] in TRAINED}
            probe, rows = r["protocol"] == "classify", collections.defaultdict(list)
            needed = ["macro_recall", "accuracy", "majority_accuracy"] if probe else [*SCORES, "hd95_image"]
            with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
                for line in csv.DictReader(file):
                    rows[line.get("row", "")].append(line)
            assert rows.keys() == rows_of(r).keys() and {len(lines) for lines in rows.values()} == {r["n_test"]}
            assert all(math.isfinite(block[score]) for block in rows_of(r).values() for score in needed)
            first = next(iter(rows.values()))
            r["names"], r["groups"] = [line["name"] for line in first], groups_of(first)
            r["tables"] = {} if probe else {name: np.array([[float(line[c]) for c in COLUMNS] for line in lines])
                                            for name, lines in rows.items()}
            results.append(r)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, StopIteration) as error:
            bad.append(f"{path} is not a result of finetune_eval.py, or its CSV is missing or damaged: left out "
                       f"({type(error).__name__})")
    return results, bad


def rows_of(r):
    """The blocks of scores of a result: {reference row: block}, or {"": the result itself}."""
    return {name: r[name] for name in ROWS if name in r} if r["protocol"] == "reference" else {"": r}


def cells_of(results):
    """Results that differ only in their seed are a cell: {key: list of (result, row), by seed}."""
    cells = collections.defaultdict(list)
    for r in sorted(results, key=lambda r: r["seed"]):
        for row in rows_of(r):
            where = r["dataset"], r["backbone"], r["protocol"], r["variant"], r.get("name", r["protocol"]), row
            cells[where].append((r, row))
    return cells


def mean_std(cell, score="iou_global"):
    """A cell's "mean +- std (seeds)" of a score; std (n - 1) only where there are several seeds."""
    values = [rows_of(r)[row][score] for r, row in cell]
    return f"{np.mean(values):.4f}" + (f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "") + f" ({len(values)})"


def tables_of(cell):
    """The tables (N, 5) of a cell, one a seed, if all are over the same images; else None."""
    return [r["tables"][row] for r, row in cell] if len({tuple(r["names"]) for r, _ in cell}) == 1 else None


def cell_interval(cell):
    """95 % bootstrap interval of a cell's mean IoU over its seeds, [low, high]; None where test images differ."""
    tables = tables_of(cell)
    return tables and interval(resampled_iou(tables, cell[0][0]["groups"])[1])


def said_interval(cell):
    """cell_interval in words: "0.7111 - 0.7912"."""
    bounds = cell_interval(cell)
    return f"{bounds[0]:.4f} - {bounds[1]:.4f}" if bounds else "test images differ"


def compare(cell, other):
    """paired_difference of two cells, or None where their test images are not the same."""
    first, second = tables_of(cell), tables_of(other)
    if first is None or second is None or cell[0][0]["names"] != other[0][0]["names"]:
        return None
    return paired_difference(first, second, cell[0][0]["groups"])


def said(gap):
    """A paired difference in words: "+0.0123 [-0.0045, +0.0291] ≈"; ≈ where the interval holds 0."""
    return f"{gap[0]:+.4f} [{gap[1][0]:+.4f}, {gap[1][1]:+.4f}]" + (" ≈" if gap[1][0] <= 0 <= gap[1][1] else "")


def best_trivial(cells, dataset, backbone):
    """The row of REFERENCE of the largest mean IoU on this data set: (name, cell), or None where there is no reference."""
    rows = {key[5]: cell for key, cell in cells.items()
            if key[:4] == (dataset, backbone, "reference", "reference") and key[5] in REFERENCE}
    return max(rows.items(), key=lambda item: np.mean([rows_of(r)[row]["iou_global"] for r, row in item[1]]), default=None)


def markdown(header, rows):
    """The lines of a table, a blank one before it."""
    return ["", *("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))]


def dataset_section(cells, dataset):
    """All cells of a data set, a table a backbone; the reference rows first; "≈" where a cell is not separated from the
    best of the paper's."""
    lines = []
    for backbone in BACKBONES:
        mine = {key: cell for key, cell in cells.items() if key[:2] == (dataset, backbone) and key[2] != "classify"}
        if not mine:
            continue
        best = best_trivial(cells, dataset, backbone)
        n_test = next(iter(mine.values()))[0][0]["n_test"]
        lines += ["", f"**{backbone}**, {n_test} test images. " + (f"Best of what costs nothing: `{best[0]}`." if best else
                  "No reference rows here: run `--protocol reference`.")]
        rows = []
        for key in sorted(mine, key=lambda k: (k[2] != "reference", k[2], k[4], k[3], ROWS.index(k[5]) if k[5] else 0)):
            cell = mine[key]
            r, gap = cell[0][0], compare(cell, best[1]) if best and cell is not best[1] else None
            labels = (f"{r['n_labels_train']} + {r['n_labels_val']}" if "n_labels_train" in r else
                      "all" if r.get(key[5], {}).get("uses_labels") else "0")
            others = [np.mean([rows_of(r)[row][score] for r, row in cell]) for score in
                      ("iou_image", "dice_global", "precision_global", "recall_global", "hd95_image")]
            rows.append([key[4], key[5] or key[3], labels, mean_std(cell), said_interval(cell), said(gap) if gap else "",
                         *(f"{v:.4f}" for v in others[:4]), f"{others[4]:.1f}"])
        lines += markdown(["protocol", "network", "labels", "IoU, mean ± std (seeds)", "95 % interval", "vs best trivial row",
                           "IoU an image", "Dice", "precision", "recall", "hd95, px"], rows)
    return lines


def pick(results, dataset, protocol, want):
    """The results for one cell of a paper's table, one a seed: those that have what the table wants and are else as the
    paper's, or, where none is (a run in miniature), as most of them are."""
    pool = [r for r in results if r["dataset"] == dataset and r["protocol"] == protocol and "-from-" not in r["variant"]
            and all(r.get(key) == value for key, value in want.items())]
    for key, usual in (USUAL | dict(labels=1.0 if protocol in TRAINED else 0.0)).items():
        values = collections.Counter(str(r.get(key)) for r in pool if key not in want)      # 1 label is not all, 1.0
        if values:
            pool = [r for r in pool if str(r.get(key)) == (str(usual) if str(usual) in values else values.most_common(1)[0][0])]
    plainest = min(((len(r["variant"]), r["variant"], r.get("name")) for r in pool), default=None)
    return [(r, "") for r in sorted(pool, key=lambda r: r["seed"])
            if (len(r["variant"]), r["variant"], r.get("name")) == plainest]


def verdict(dataset, ours, paper, cells, score):
    """A sentence on one data set of one table. ours: {row: cell}; paper: {row: number}."""
    if not ours:
        return None
    mean = {row: np.mean([r[score] for r, _ in cell]) for row, cell in ours.items()}
    best = max(mean, key=mean.get)
    text = f"{dataset}: best here {best} ({mean[best]:.4f})" if len(mean) > 1 else f"{dataset}: {best} {mean[best]:.4f} here"
    shared = {row: value for row, value in paper.items() if row in mean}
    if len(shared) > 1:
        theirs = max(shared, key=shared.get)
        text += f", in the paper {theirs} ({shared[theirs]:.4f}) among these: {'agrees' if theirs == best else 'does not agree'}"
    elif shared:
        text += f", {shared[best] if best in shared else next(iter(shared.values())):.4f} in the paper"
    trivial = best_trivial(cells, dataset, ours[best][0][0]["backbone"])
    gap = compare(ours[best], trivial[1]) if trivial and score == "iou_global" else None
    if gap:
        text += f"; {said(gap)} against `{trivial[0]}`, which costs nothing"
    return text


def paper_sections(results, cells):
    """One section a table or figure of the paper: ours, and the paper's number where the data set is the paper's."""
    lines, sets = [], sorted({r["dataset"] for r in results})
    for title, protocol, score, rows in TABLES:
        columns = [*dict.fromkeys([*(d for _, _, numbers in rows for d in numbers), *sets])]
        ours = {(label, d): pick(results, d, protocol or ("supervised" if want["method"] == "supervised" else "transfer"), want)
                for label, want, _ in rows for d in columns}
        columns = [d for d in columns if d in PAPER_SETS + ("drone",) or any(ours[label, d] for label, _, _ in rows)]
        lines += ["", f"### {title}", "", f"{score.replace('_', ' ')}: ours, mean ± std (seeds) / the paper's; - is missing."]
        lines += markdown(["", *columns], [[label, *((mean_std(ours[label, d], score) if ours[label, d] else "-") + (
            f" / {numbers[d]:.4f}" if d in numbers else "") for d in columns)] for label, want, numbers in rows])
        verdicts = [verdict(d, {label: ours[label, d] for label, _, _ in rows if ours[label, d]},
                        {label: numbers[d] for label, _, numbers in rows if d in numbers}, cells, score) for d in columns]
        lines += ["", *[f"- {text}" for text in verdicts if text]] if any(verdicts) else ["", "Nothing of this was run here."]
    return lines


def curves_of(cells, dataset, backbone):
    """{network and how it was trained: {number of training labels: cell}}, transfer at 0, then finetune or supervised."""
    curves, start = collections.defaultdict(dict), {}
    for (*where, protocol, variant, name, _), cell in sorted(cells.items()):
        if where == [dataset, backbone] and protocol in ("finetune", "semi", "supervised"):
            curves[variant, re.sub(r"-l\d[^-]*", "", name)][cell[0][0]["n_labels_train"]] = cell
        elif where == [dataset, backbone] and protocol == "transfer" and "n_labels_train" not in cell[0][0]:
            start[variant] = {0: cell}
    return {f"{variant}, {name}": start.get(variant, {}) | curve for (variant, name), curve in curves.items()}


def curve_section(cells, dataset, backbone):
    """Score against labels, and each network's paired difference to supervised training of the same budget, with as many
    labels and with the most."""
    curves = curves_of(cells, dataset, backbone)
    if not curves:
        return []
    counts = sorted({n for curve in curves.values() for n in curve})
    lines = ["", f"**{backbone}**: IoU against labelled training images (0: `transfer`)."]
    lines += markdown(["network", *counts], [[name, *(mean_std(curve[n]) if n in curve else "-" for n in counts)]
                                             for name, curve in curves.items()]) + [""]
    scratch = {(n, cell[0][0]["budget_steps"]): cell for curve in curves.values() for n, cell in curve.items()
               if cell[0][0]["protocol"] == "supervised"}
    for name, curve in curves.items():
        for n, cell in ((n, cell) for n, cell in curve.items() if cell[0][0]["protocol"] in ("finetune", "semi")):
            budget = cell[0][0]["budget_steps"]
            most = max((m for m, b in scratch if b == budget), default=n)
            for m in sorted({n, most}):
                gap = compare(cell, scratch[m, budget]) if (m, budget) in scratch else None
                if gap:
                    lines.append(f"- {name}, {n} labels, against supervised with {m}: {said(gap)}")
    return lines


def draw_charts(cells, dataset, backbone, out):
    """PNG charts: a bar a cell, and score against labels, with 95 % intervals. Returns their file names."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    bars = {key: cell for key, cell in sorted(cells.items(), reverse=True)
            if key[:2] == (dataset, backbone) and key[2] not in ("classify", "reference")}
    best, curves, names = best_trivial(cells, dataset, backbone), curves_of(cells, dataset, backbone), []

    def value_and_bar(cell):                                    # the mean, and how far the interval reaches down and up
        value = np.mean([rows_of(r)[row]["iou_global"] for r, row in cell])
        return value, np.maximum(0, np.array([[-1], [1]]) * (np.array([cell_interval(cell) or [value] * 2]).T - value))

    def save(kind, height, draw):
        figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
        draw(axes)
        if best:
            (axes.axvline if kind == "bars" else axes.axhline)(value_and_bar(best[1])[0], color="black", linestyle="--",
                                                               label=f"{best[0]}, costs nothing")
        axes.set_title(f"{dataset}, {backbone}; 95 % intervals over test images")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
        names.append(f"{dataset}-{backbone}-{kind}.png")
        write_atomically(Path(out) / names[-1], functools.partial(figure.savefig, format="png", dpi=110))
        plt.close(figure)

    def draw_bars(axes):
        for y, cell in enumerate(bars.values()):
            value, reach = value_and_bar(cell)
            axes.barh(y, value, color="0.75", edgecolor="black", xerr=reach, capsize=2)
        axes.set_yticks(range(len(bars)), [f"{key[3]}: {key[4]}" for key in bars], fontsize=7)
        axes.set_xlabel("test IoU (global, 0 to 1)")

    def draw_curves(axes):
        for k, (name, curve) in enumerate(curves.items()):
            points = [value_and_bar(curve[n]) for n in sorted(curve)]
            axes.errorbar(sorted(curve), [p[0] for p in points], yerr=np.hstack([p[1] for p in points]), label=name, capsize=2,
                          color=str(0.3 * (k % 3)), marker="osv^Dx*P"[k % 8], linestyle=("-", "--", ":", "-.")[k % 4])
        axes.set_xscale("symlog", linthresh=1)
        axes.set(xlabel="labelled training images", ylabel="test IoU (global, 0 to 1)")

    if bars:
        save("bars", 1.5 + 0.28 * len(bars), draw_bars)
    if curves:
        save("labels", 4.5, draw_curves)
    return names


def report(out):
    """Write README.md and charts under `out` from every result there; a JSON that is no result is named and left out."""
    results, bad = read_results(out)
    print(*bad, sep="\n", end="\n" if bad else "")
    if not results:
        sys.exit(f"{out}: no results here; score a run first, see python finetune_eval.py --help")
    cells = cells_of(results)
    lines = ["# Results", "", f"Written by `python finetune_eval.py --report` from {len(results)} results. IoU is over the whole "
             "test part (counts summed), intervals are 95 % bootstrap over test images or their groups. Labels: training + "
             "validation images whose masks or classes were used. hd95: 95 % Hausdorff distance. ≈: the interval of the paired "
             "difference holds 0, so the two are not separated.", *[f"\n- {line}" for line in bad]]
    charts = True
    for dataset in sorted({r["dataset"] for r in results}):
        lines += ["", f"## {dataset}", *dataset_section(cells, dataset)]
        for backbone in BACKBONES:
            lines += curve_section(cells, dataset, backbone)
            try:
                lines += [line for name in draw_charts(cells, dataset, backbone, out) for line in ("", f"![{name}]({name})")]
            except ImportError:
                charts = False
        probes = {key: cell for key, cell in cells.items() if key[0] == dataset and key[2] == "classify"}
        if probes:
            lines += ["", "Linear probe: mean recall of the classes; always the commonest class scores 1 / classes."]
            rows = []
            for key, cell in sorted(probes.items()):
                first = cell[0][0]
                about = [key[1], key[3], f"{first['n_labels_train']} + {first['n_labels_val']}"]
                commonest = f"{first['majority_accuracy']:.4f}"
                rows.append([*about, first.get("stage", ""), mean_std(cell, "macro_recall"), mean_std(cell, "accuracy"), commonest])
                if "layer2" in first:
                    shallow = [f"{np.mean([r['layer2'][score] for r, _ in cell]):.4f} ({len(cell)})" for score in
                               ("macro_recall", "accuracy")]
                    rows.append([*about, "layer2", *shallow, commonest])
            lines += markdown(["backbone", "network", "labels", "stage", "macro recall", "accuracy", "commonest class, accuracy"], rows)
    lines += ["", "## The paper's tables", *paper_sections(results, cells)]
    text = "\n".join(lines) + "\n"
    write_atomically(Path(out) / "README.md", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print("\n".join(lines[:lines.index("## The paper's tables")]))
    print(f"{Path(out) / 'README.md'}: {len(results)} results, {len(bad)} warnings"
          + ("" if charts else "; no charts: matplotlib is not installed (pip install matplotlib)"))


# ------------------------------------------------------------------------------------------------------------- predict

def predict_tiled(unet, image, tile, size, device, flips=False):
    """uint8 (H, W, 3), however large -> bool (H, W). Windows of tile x tile pixels, each resized to the `size` that the network
    was trained at, overlap by half; their logits are weighted by sin ** 2 towards the middle and summed: the mask is where
    the sum is positive. Memory beyond picture and mask: one row of windows."""
    def starts(length):
        return [*range(0, max(length - tile, 0), tile // 2), max(length - tile, 0)]

    height, width = image.shape[:2]
    ramp = np.sin(np.pi * (np.arange(tile) + 0.5) / tile).astype(np.float32) ** 2
    weight, mask = np.outer(ramp, ramp), np.zeros((height, width), bool)
    band, rows, columns = np.zeros((tile, width), np.float32), starts(height), starts(width)
    for y, following in zip(rows, [*rows[1:], height]):
        for k in range(0, len(columns), BATCH):
            windows = [image[y:y + tile, x:x + tile] for x in columns[k:k + BATCH]]
            windows = [cv2.copyMakeBorder(w, 0, tile - w.shape[0], 0, tile - w.shape[1], cv2.BORDER_REFLECT_101) for w in windows]
            batch = np.stack([prepare_data.resize(window, size) for window in windows])
            for x, logits in zip(columns[k:], predict_logits(unet, batch, device, flips)):
                logits = cv2.resize(logits, (tile, tile), interpolation=cv2.INTER_LINEAR) * weight
                band[:, x:x + tile] += logits[:, :width - x]
        done = following - y
        mask[y:following] = band[:done] > 0
        band = np.concatenate([band[done:], np.zeros((min(done, tile), width), np.float32)])
    return mask


def predict_folder(args, settings, device):
    """Draw a mask, PNG 0 / 255, for every image below a folder, upright and at its own size, under its name (see
    prepare_data.find_files) in the same sub-folders; a CSV with each foreground share; with --overlay also pictures. A
    bad file is named, the others are done, the exit code is 1."""
    source, out = Path(args.predict), Path(args.out)
    if not source.is_dir():
        sys.exit(f"{source}: no such folder")
    if out.resolve().is_relative_to(source.resolve()):
        sys.exit(f"{out}: lies in {source}, where its masks could overwrite images or pass for some: give another --out")
    files = prepare_data.find_files(source)
    if files.masks:
        print(f"{sum(map(len, files.masks.values()))} files are taken as masks, and not predicted")
    targets = [out / "foreground.csv", *(out / f"{name}.png" for name in files.images)]
    targets += [out / "overlay" / f"{name}.png" for name in files.images] if args.overlay else []
    if len(set(targets)) < len(targets):
        sys.exit(f"{source}: has a folder overlay, whose masks would overwrite the pictures of --overlay")
    there = [target for target in targets if target.exists()]
    if there and not args.overwrite:
        sys.exit(f"{there[0]} would be overwritten: give another --out, or --overwrite")
    unet, _ = load_network(args, settings, "pretrained" if settings["train"] == "end2end" else "fresh")
    unet = unet.to(device, memory_format=torch.channels_last).eval()
    shares, stacks, bad = [], [], files.bad
    for name, path in tqdm(files.images.items(), "predict", unit=" images"):
        try:
            picture = prepare_data.read_picture(path, args.page)
            image = prepare_data.to_rgb(picture)
        except (ValueError, OSError) as error:
            bad.append(f"{path}: {error}")
            continue
        if picture.pages > 1:
            stacks.append(f"{path} has {picture.pages}")
        if args.tile is not None:
            size = settings["img_size"]
            mask = predict_tiled(unet, image, args.tile or size, size, device, args.flips)
        else:
            small = prepare_data.resize(image, settings["img_size"])[None]
            logits = predict_logits(unet, small, device, args.flips)[0]
            mask = cv2.resize(logits, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) > 0
        save_png(out / f"{name}.png", mask.astype(np.uint8) * 255)
        if args.overlay:
            image[mask] = (image[mask] * 0.6 + np.array([255, 0, 0]) * 0.4).astype(np.uint8)
            save_png(out / "overlay" / f"{name}.png", image)
        shares.append(dict(name=path.relative_to(source).as_posix(), foreground_share=f"{mask.mean():.6f}"))

    if shares:
        write_csv(out / "foreground.csv", shares)
    if stacks:
        print(f"{len(stacks)} files have several pages or frames ({stacks[0]}): page {args.page} is taken, counted from 0")
    print(f"{out}: {len(shares)} masks, and foreground.csv")
    if bad:
        sys.exit("\n".join(bad) + f"\n{len(bad)} bad file(s), listed above, have no mask")


def save_png(path, pixels):
    """Write uint8 pixels as PNG, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, functools.partial(Image.fromarray(pixels).save, format="PNG"))


# ---------------------------------------------------------------------------------------------------------------- main

def labels_of(text):
    """--labels: a number with a point is a share in (0, 1], one without a count from 1 up."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = -1
    if not (0 < value <= 1 if isinstance(value, float) else value >= 1):
        raise argparse.ArgumentTypeError(f"{text} is neither a share above 0.0 and up to 1.0 (with a point) nor a count from 1 (without)")
    return value


def parse_args(argv):
    parser = argparse.ArgumentParser("finetune_eval.py", description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=prepare_data.Help)
    add = parser.add_argument
    add("--run", metavar="DIR", help="a finished run folder of pretrain.py, or of this script (then to score or predict)")
    add("--encoder", metavar="FILE", help="any encoder (ours, timm's, torchvision's) instead of a run")
    add("--dataset", help="a prepared data set; with --run unset: the one it was trained on")
    add("--backbone", choices=list(BACKBONES), help="without --run: the network")
    add("--protocol", default="transfer", choices=["transfer", *TRAINED, "reference"], help="what to do before scoring")
    add("--labels", type=labels_of, default=1.0, help="labelled training images: 0.1 is a share, 10 a count; as large a share "
        "of the validation images is the validation set")
    add("--decoder", default="auto", choices=["auto", "pretrained", "fresh"], help="what the decoder starts from; auto: "
        "pretrained for finetune, semi and transfer of an end-to-end run, else fresh")
    add("--loss", default="focal_tversky", choices=list(LOSSES), help="of frozen, finetune, semi, supervised (appendix C)")
    add("--epochs", type=int, default=50, help="of training on labels, at most (appendices C, D); an epoch has the steps of "
        "all training images, however few are labelled")
    add("--batch-size", type=int, default=16, help="images a step (appendices C, D)")
    add("--patience", type=int, help="stop after so many epochs without a better validation loss, and keep the best; 0: never, "
        "and keep the last weights. Unset: 0, as the rate falls to 0 over all epochs; for classify 5")
    add("--lr", type=float, help="of Adam, the highest. Unset: 1e-3 where the decoder starts afresh and for semi, whose "
        "second half has a third of it; else 3.6e-4")
    add("--weight-decay", type=float, default=1e-5, help="of Adam, as in pretraining")
    add("--threshold", default="otsu", choices=THRESHOLDS, help="reference: who draws raw_threshold")
    add("--foreground", choices=["bright", "dark"], help="reference; unset: what prepare_data.py decided")
    add("--seed", type=int, help="of fresh weights, labels, order; unset: the run's, or 0")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help="precision of training on labels, as in pretrain.py")
    add("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 1)), help="processes that load and augment")
    add("--flips", action="store_true", help="predict with the mean over the four flips of a picture")
    add("--predict", metavar="DIR", help="draw masks for the images of this folder; needs --run, --out")
    add("--tile", type=int, nargs="?", const=0, metavar="PX", help="with --predict, for large pictures: in overlapping windows of so "
        "many pixels a side (no number: the training size) instead of resized as a whole")
    add("--page", type=int, default=0, help="with --predict: the page or frame of files that have several; 0 is the first")
    add("--overlay", action="store_true", help="with --predict: pictures with the mask in red, too")
    add("--report", action="store_true", help="write README.md and charts from all results under --out")
    add("--data", default="data", metavar="DIR", help="where prepared data sets are")
    add("--runs", default="runs", metavar="DIR", help="where training on labels is kept when there is no --run to keep it in")
    add("--out", metavar="DIR", help="where results are kept (unset: results); with --predict the folder for the masks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--overwrite", action="store_true", help="replace results or masks that are already there")
    args = parser.parse_args(argv)
    if args.protocol == "semi" and args.epochs < 2:
        parser.error("semi trains in two halves: --epochs 2 or more")
    if args.report:
        return args, parser
    check_numbers(parser, args, epochs=1, batch_size=1, patience=0, lr=0, weight_decay=0, seed=0, workers=0)
    if args.tile is not None and args.tile < 16 and args.tile != 0 or args.page < 0:
        parser.error("--tile is at least 16 pixels, and --page counts from 0")
    if args.predict and not (args.run and args.out):
        parser.error("--predict needs --run RUN_DIR and --out DIR")
    if args.run and args.encoder:
        parser.error("--run and --encoder exclude each other")
    if not args.run and not (args.dataset and args.backbone):
        parser.error("give --run RUN_DIR, or --dataset NAME and --backbone B")
    if args.protocol in ("supervised", "reference") and (args.run or args.encoder) and not args.predict:
        parser.error(f"{args.protocol} loads nothing: give --dataset and --backbone, leave out --run and --encoder")
    if args.protocol not in ("supervised", "reference") and not (args.run or args.encoder):
        parser.error(f"{args.protocol} needs --run RUN_DIR or --encoder FILE")
    return args, parser


def name_unused(args, parser):
    """Say in one line which flags were given that this job does not use."""
    training = {"labels", "loss", "epochs", "batch_size", "patience", "lr", "weight_decay", "workers", "amp"}
    network = {"transfer": {"decoder"}, "frozen": {"decoder"}, "finetune": {"decoder"}, "classify": set(), "supervised": set(), "semi": set(),
               "reference": {"threshold", "foreground"}}
    used = network[args.protocol] | (training if args.protocol in TRAINED else set())
    used |= {"flips"} if args.protocol not in ("reference", "classify") else set()
    used -= {"loss"} if args.protocol == "classify" else set()
    used = {"overlay", "tile", "page", "flips"} if args.predict else used | {"dataset", "protocol"}
    used |= set() if args.run else {"backbone"}
    every = training | {"flips", "decoder", "threshold", "foreground", "overlay", "tile", "page", "dataset", "protocol", "backbone"}
    given = ["--" + name.replace("_", "-") for name in sorted(every - used) if getattr(args, name) != parser.get_default(name)]
    if given:
        print(f"not used here and ignored: {', '.join(given)}")
    for name in (every - used) - {"dataset", "protocol", "backbone"}:       # so that no name and no setting shows it
        setattr(args, name, parser.get_default(name))


def describe(args, settings, meta):
    """What is evaluated: a dict backbone, method, train, variant, ...; from the run, or made up for what has none."""
    common = dict(backbone=args.backbone, threshold="otsu", foreground=meta["foreground"])
    if args.protocol == "reference":
        foreground = args.foreground or meta["foreground"]
        variant = "-".join(["reference", *[args.threshold] * (args.threshold != "otsu"),
                            *[foreground] * (foreground != meta["foreground"])])
        return common | dict(method="reference", train=None, threshold=args.threshold, foreground=foreground, variant=variant)
    if args.protocol == "supervised":
        return common | dict(method="supervised", train="end2end", variant="supervised", loss=args.loss, epochs=args.epochs,
                             batch_size=args.batch_size)
    if args.encoder:
        return common | dict(method=Path(args.encoder).stem, train="encoder", variant=Path(args.encoder).stem)
    folder = Path(args.run).resolve()
    variant = folder.parent.name if "protocol" not in settings else f"{folder.parents[1].name}-{folder.name}"
    if args.dataset != settings["dataset"]:
        variant += f"-from-{settings['dataset']}"
    if args.backbone == "vit_small" and args.decoder == "pretrained" and settings["img_size"] != meta["size"]:
        sys.exit(f"{args.run} was trained at {settings['img_size']} px and {args.dataset} is prepared at "
                 f"{meta['size']}: a ViT U-Net needs one size, prepare the data with --size {settings['img_size']}")
    return settings | dict(variant=variant)


def main(argv=None):
    args, parser = parse_args(argv)
    args.command = shlex.join(["python", "finetune_eval.py", *(sys.argv[1:] if argv is None else argv)])
    if args.report:
        return report(args.out or "results")
    name_unused(args, parser)
    device = pick_device(args.device)
    args.device = device.type
    settings = read_run(Path(args.run)) if args.run else {}
    args.seed = settings.get("seed", 0) if args.seed is None else args.seed
    args.backbone = settings.get("backbone", args.backbone)
    if args.predict:
        return predict_folder(args, settings, device)
    args.dataset, args.out = args.dataset or settings["dataset"], args.out or "results"
    meta = prepare_data.read_meta(Path(args.data) / args.dataset)
    whole = settings.get("train") == "end2end"                  # the run has a decoder of its own
    if args.decoder == "pretrained" and not whole:
        sys.exit(f"--decoder pretrained: {args.run or args.encoder or args.protocol} has an encoder only")
    if args.protocol == "semi" and (not whole or "protocol" in settings):
        sys.exit("semi draws masks without labels: it needs a --run of pretrain.py that trained a whole U-Net, and "
                 f"{args.run or args.encoder} is none")
    asked = args.decoder
    if asked == "auto":
        args.decoder = "pretrained" if whole and args.protocol in ("transfer", "finetune", "semi") else "fresh"
    short = dict(labels="l", loss="", epochs="e", batch_size="b", patience="p", lr="lr", weight_decay="wd", amp="")
    words = [f"{short[n]}{getattr(args, n)}" for n in short if str(getattr(args, n)) != str(parser.get_default(n))]   # 1, 1.0
    words += [args.decoder] * (asked != "auto") + ["flips"] * args.flips
    words += [f"on-{args.dataset}"] * (args.dataset != settings.get("dataset", args.dataset))
    args.name = "-".join([args.protocol, *words])               # of the result and of the folder that training is kept in
    evaluate(args, describe(args, settings, meta) | dict(img_size=meta["size"], data=meta["fingerprint"]), meta, device)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_on_sigterm)
    sys.stdout.reconfigure(errors="replace")                    # names that the terminal cannot show
    try:
        main()
    except RuntimeError as error:
        explain_memory(error)
        raise
    except (OSError, KeyboardInterrupt) as error:               # a full disk, a forbidden folder, Ctrl-C
        sys.exit(f"finetune_eval.py: {str(error) or 'interrupted'}; the same command, without --overwrite, goes on from what is whole")
