"""Score a network on a test set that it never saw, train it on some labels first, or let it draw
masks for a folder of images.

    python finetune_eval.py --run runs/demo/resnet50/medsass+-e16/seed0         # below: RUN
    python finetune_eval.py --run RUN --protocol finetune --labels 0.1
    python finetune_eval.py --dataset demo --backbone resnet50 --protocol supervised
    python finetune_eval.py --dataset demo --backbone resnet50 --protocol reference
    python finetune_eval.py --encoder encoder.pth --dataset isic --backbone vit_small
    python finetune_eval.py --run RUN --predict my_images --out masks
    python finetune_eval.py --run RUN --export network.pt2
    python finetune_eval.py --report

transfer: the pre-trained network as it is; an encoder alone gets a fresh, seeded decoder that
nobody trained (section 4.1). frozen: the decoder is trained, the encoder stays. finetune: all is
trained. semi: all is trained, on the labelled images and, where these are too few, on the others
with the pre-trained network's masks (self-training). supervised: all is trained, from scratch.
classify: a linear probe on the encoder's pooled features (appendix D). reference: what needs no
training, on the same test images. One JSON per evaluation, under results/, with a CSV of its test
images; --report writes results/README.md from them.
"""

import argparse
import collections
import copy
import csv
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2
from tqdm import tqdm

import prepare_data
import pretrain
from models import BACKBONES, build_unet, load_encoder, read_encoder
from prepare_data import only_one, open_part, read_names
from pretrain import Images, MedSASS, is_finished, load_checkpoint, normalise, seed_from, write_png

BATCH = 16                                  # test images at a time; no score depends on it
LABEL_PROTOCOLS = ("frozen", "finetune", "semi", "supervised", "classify")     # that train
REFERENCE = ("all_foreground", "all_background", "raw_threshold", "raw_threshold_inverted",
             "refined_threshold", "random_init", "best_constant")
PRINTED = ("macro_recall", "iou_global", "iou_image", "hd95_image", "accuracy")
COUNTS = ("tp", "fp", "fn", "tn")
WEIGHTS = dict(pretrained="best.pt", fresh="encoder.pth")       # what a decoder's start needs

# -------------------------------------------------------------------------- metrics (appendix G)


def count_pixels(pred, target):
    """bool (..., H, W) twice -> int64 (..., 4): true positives, false positives, false negatives,
    true negatives."""
    kinds = [pred & target, pred & ~target, ~pred & target, ~pred & ~target]
    return np.stack(kinds, axis=-3).sum(axis=(-2, -1))


def scores_from_counts(counts):
    """(..., 4) of count_pixels -> dict of float (...), each in [0, 1]: iou, dice, precision,
    recall, accuracy. 0 / 0 is 1 where neither mask has any foreground (nothing to find, nothing
    found), and 0 elsewhere."""
    tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
    drawn, true, either = tp + fp, tp + fn, tp + fp + fn
    if_empty = np.where(either == 0, 1.0, 0.0)

    def ratio(part, whole):
        return np.where(whole > 0, part / np.maximum(whole, 1), if_empty)

    return dict(iou=ratio(tp, either), dice=ratio(2 * tp, drawn + true),
                precision=ratio(tp, drawn), recall=ratio(tp, true),
                accuracy=ratio(tp + tn, either + tn))


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
    if not pred.dtype == target.dtype == bool or pred.shape != target.shape:
        raise ValueError("two bool arrays (N, H, W) of one shape are needed, not "
                         f"{pred.dtype} {pred.shape} and {target.dtype} {target.shape}")
    scores = resampled_scores(count_pixels(pred, target), np.ones((1, len(pred))))
    return {name: float(value[0]) for name, value in scores.items()}


def boundary(mask):
    """bool (H, W) -> bool (H, W): foreground with background, or the picture's edge, on one of its
    four sides."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    inner = cv2.erode(mask.astype(np.uint8), cross, borderValue=0)
    return mask & (inner == 0)


def distance_to(pixels):
    """bool (H, W) -> float (H, W): how far each place is from the nearest of these pixels."""
    far = cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.sqrt(np.rint(far.astype(np.float64) ** 2))        # squares are whole: no rounding


def hausdorff95(pred, target):
    """bool (H, W) twice -> float: the 95 % Hausdorff distance, in pixels. From every boundary pixel
    of one mask to the nearest boundary pixel of the other: the 95th percentile, and of the two
    directions the larger. Two empty masks are 0 apart; an empty one and another as far as the
    picture's diagonal."""
    if not pred.any() or not target.any():
        return math.hypot(*pred.shape) if pred.any() or target.any() else 0.0
    edge = boundary(pred)
    true_edge = boundary(target)
    there = np.percentile(distance_to(true_edge)[edge], 95)
    back = np.percentile(distance_to(edge)[true_edge], 95)
    return max(there, back)


def score_masks(drawn, masks):
    """Masks, bool (S, S), one after the other, and the true ones, uint8 (N, S, S), may be mapped ->
    float (N, 5), COUNTS and hd95 of each."""
    table = []
    for pred, mask in zip(tqdm(drawn, "score", len(masks), leave=False), masks, strict=True):
        target = mask > 0
        table.append([*count_pixels(pred, target), hausdorff95(pred, target)])
    return np.array(table)


def groups_of(names):
    """The group of each row of a part's CSV, a tuple; a row without one is a group of its own."""
    return tuple(row["group"] or row["name"] for row in names)


@functools.lru_cache(maxsize=2)             # the report draws the same ones for every cell
def bootstrap_weights(groups):
    """The group of each image, a tuple (N,) -> float (2000, N), whole: bootstrap over groups, how
    often each image is drawn in each round (Efron 1979)."""
    _, index = np.unique(groups, return_inverse=True)
    n = index.max() + 1
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2000)
    return drawn[:, index].astype(np.float64)


def interval(samples):
    """float (R,) -> [low, high], the middle 95 %."""
    return np.percentile(samples, (2.5, 97.5)).tolist()


def summarise(table, groups):
    """float (N, 5), COUNTS and hd95 -> dict: all scores and hd95_image (pixels), each also with
    "_ci", its 95 % bootstrap interval over groups."""
    def scores(weights):
        hd95 = weights @ table[:, 4] / weights.sum(axis=1)
        return resampled_scores(table[:, :4], weights) | dict(hd95_image=hd95)

    samples = scores(bootstrap_weights(groups))
    block = {}
    for name, value in scores(np.ones((1, len(table)))).items():
        block[name] = float(value[0])
        block[f"{name}_ci"] = interval(samples[name])
    return block


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
    """(settings, command) of a run folder; ends the program where it is not a finished run."""
    config = pretrain.read_json(run / "config.json")
    if not {"settings", "command"} <= config.keys():
        sys.exit(f"{run} is not a run folder: it has no readable config.json (see python "
                 "pretrain.py --help)")
    if not is_finished(run):
        sys.exit(f"{run} is not finished: its command, run again, goes on where it stopped")
    return config["settings"], config["command"]


def load_weights(unet, path, decoder):
    """Load weights: of the whole U-Net where `decoder` is "pretrained", else of its encoder."""
    if decoder == "pretrained":
        unet.load_state_dict(load_checkpoint(path, "cpu")["model"])
        return
    with pretrain.exit_on_value_error():
        load_encoder(unet, path)


@torch.inference_mode()
def predict_logits(unet, images, device, flips=False):
    """uint8 ndarray (B, S, S, 3) -> float32 ndarray (B, S, S): logits, foreground where > 0; with
    flips their mean over the picture as it is, flipped up and down, left and right, and both."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)        # channels_last
    batch = normalise(batch.to(device))
    logits = unet(batch)[:, 0].float()      # (B, S, S)
    if flips:
        for axes in ((2,), (3,), (2, 3)):
            logits += unet(batch.flip(axes)).flip(axes)[:, 0].float()
        logits /= 4
    return logits.cpu().numpy()


def draw_logits(unet, images, device, flips=False):
    """predict_logits of an iterable of uint8 (S, S, 3), one after the other. Holds one batch."""
    images = iter(images)
    while batch := list(itertools.islice(images, BATCH)):
        yield from predict_logits(unet, np.stack(batch), device, flips)


def draw_masks(unet, images, device, flips=False):
    """The masks, bool (S, S), that a network in eval mode draws for an iterable of uint8 (S, S, 3),
    one after the other."""
    for logits in draw_logits(unet, images, device, flips):
        yield logits > 0


def open_test(data):
    """(images, masks, rows of test.csv); ends the program where nothing can be scored."""
    images, masks = open_part(data, "test")
    if masks is None:
        sys.exit(f"{data} has no test masks: nothing can be scored; --predict draws masks without "
                 "any")
    if not masks.any():
        print(f"{data}: no test mask has any foreground; IoU is 1 where nothing is predicted, "
              "else 0")
    return images, masks, read_names(data, "test")


# ----------------------------------------------------------------------------- training on labels

def labelled_rows(names, rows, share, seed):
    """Which `rows` of a part are taken as labelled: a list, nested in `share`, the same for every
    method, at least one. Groups come in an order of (seed) alone, their images one after the
    other."""
    groups = collections.defaultdict(list)
    all_groups = groups_of(names)
    for k in rows:
        groups[all_groups[k]].append(k)
    chosen = []
    for group in np.random.default_rng(seed_from(seed, 2)).permutation(sorted(groups)).tolist():
        chosen += groups[group]
    return chosen[:max(1, round(share * len(rows)))]


class PartlyLabelled(Images):
    """All training images with the masks of one file. Even draws are of the labelled `rows`, odd
    ones of all, each in stored order, over and over."""

    def __init__(self, folder, transform, seed, rows, masks):
        super().__init__(folder, "train", transform, seed, masks=masks)
        self.labelled = rows

    def __getitem__(self, key):
        epoch, k = key
        draw = epoch * len(self) + k        # from the beginning of the run
        row = draw // 2 % len(self)
        if draw % 2 == 0:
            row = self.labelled[draw // 2 % len(self.labelled)]
        return super().__getitem__((draw, row))


class FineTuning(MedSASS):
    """MedSASS's U-Net, loss and optimiser, with true masks. The paper gives no schedule: the rate
    rises over the first tenth of the steps and falls to 0 by a cosine, and the last weights are
    kept, because one or two validation labels cannot choose."""

    keep_best = False
    mask_kind = "true"

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        warm_up = max(1, total_steps // 10)
        done = max(0, step - warm_up) / max(1, total_steps - warm_up)
        factor = min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = self.lr * factor


def focal_cross_entropy(logits, target, gamma=2.0):
    """Focal loss over classes (Lin et al. 2017, eq. 4): the mean of -(1 - p) ** gamma log p.
    logits (B, C), target int64 (B,) -> scalar."""
    log_p = F.log_softmax(logits, dim=1).gather(1, target[:, None])[:, 0]
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


class Probe(nn.Module):
    """Linear layers on the pooled features of an encoder that stays as it is (appendix D).

    One on the mean over a ViT's patch tokens, or over a ResNet's layer2, all that MedSASS trains;
    and another on layer4, where the encoder has it, as BYOL, DINO and SimSiam train it. They share
    nothing and learn side by side. The members are those of every method in pretrain.py.
    """

    keep_best = True
    lr, weight_decay = 3.6e-4, 1e-5
    optimizer = MedSASS.optimizer
    before_step = MedSASS.before_step       # the rate is constant
    after_backward = MedSASS.after_backward
    after_step = MedSASS.after_step

    def __init__(self, backbone, img_size, classes, has_layer4=False):
        super().__init__()
        if backbone == "vit_small":
            self.stages = {"tokens": 384}
            self.encoder = build_unet(backbone, img_size).encoder
        else:
            self.stages = {"layer2": 512}
            if has_layer4:
                self.stages["layer4"] = 2048
            depths = [int(stage[-1]) for stage in self.stages]
            self.encoder = timm.create_model("resnet50", features_only=True, out_indices=depths)
        self.encoder.requires_grad_(False)
        self.linear = nn.ModuleList(nn.Linear(width, classes) for width in self.stages.values())

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
        return sum(focal_cross_entropy(logits, target) for logits in self.logits(images))

    def collapsed(self, health):
        """Never a warning."""

    def health(self):
        return {}

    def samples(self, views):
        return {"image": views[0]}


def labelled_sets(job, classes=None):
    """Data to train with on the images of --labels, with their masks, or with the number of their
    label among `classes`: (training, the same un-augmented, validation) Images, and how many
    training images an epoch has. A count of labels is a share of the training images that have a
    mask or class, and the validation images are as large a share. Ends the program where these are
    fewer than labels asked for."""
    share = job.args.labels
    sets = []
    for part, transform in dict(train=pretrain.paper_augmentation(), val=v2.Identity()).items():
        names = read_names(job.data, part)
        if classes:
            rows = [k for k, row in enumerate(names) if row["label"]]
            targets = [["", *classes].index(row["label"]) - 1 for row in names]
        else:
            masks = open_part(job.data, part)[1]
            if masks is None:
                sys.exit(f"{job.data} has no {part} masks: {job.args.protocol} needs them")
            rows = range(len(masks))
            targets = job.data / f"{part}_masks.npy"
        if part == "train":
            n_train = len(rows) if classes else len(names)
            if share > len(rows):
                sys.exit(f"--labels {share}: {job.data} has {len(rows)} training images of "
                         f"which the {'class' if classes else 'mask'} is known")
            if isinstance(share, int):
                share /= len(rows)
        rows = labelled_rows(names, rows, share, job.seed)
        print(f"{len(rows)} {part} images are labelled")
        sets.append(Images(job.data, part, transform, job.seed, rows, targets))
    train_set, val_set = sets
    plain = Images(job.data, "train", v2.Identity(), job.seed, train_set.rows)
    return (train_set, plain, val_set), n_train


def training_folder(job):
    """The run folder of training on labels: in that of --run, or below --runs."""
    where = job.args.run
    if not where:
        where = Path(job.args.runs, job.data.name, job.settings["backbone"],
                     job.settings["variant"], f"seed{job.seed}")
    name = job.name
    if job.settings.get("seed", job.seed) != job.seed:
        name += f"-seed{job.seed}"          # another draw of labels
    return Path(where) / name


def fit(method, sets, epoch_size, job, epochs, subfolder=""):
    """Train `method`, on the device where it is, on labelled_sets by pretrain.py's loop in a run
    folder of its own, or go on with what is there; then it has the weights that are kept.
    epoch_size: images an epoch, as many for few labels as for all, so that every method has the
    same steps. Returns a dict: n_labels_train, n_labels_val, budget_steps."""
    args = job.args
    folder = training_folder(job) / subfolder
    amp = pretrain.pick_precision(args.amp, job.device, method)
    patience = 5 if method.keep_best else 0
    labelled, plain, val = sets
    options = pretrain.Options(epochs, args.batch_size, patience, labelled.seed, amp, args.workers)
    is_probe = args.protocol == "classify"
    settings = job.settings | dict(
        dataset=job.data.name, protocol=args.protocol, labels=args.labels, decoder=job.decoder,
        loss="focal" if is_probe else "focal_tversky", batch_size=args.batch_size, seed=job.seed,
        epochs=epochs, patience=patience, lr=method.lr, weight_decay=method.weight_decay, amp=amp,
        n_train=len(plain), n_val=len(val), train="encoder" if is_probe else "end2end")
    with only_one(folder / ".lock"):
        pretrain.open_run(settings, folder, job.commands[-1], args.overwrite)
        if not is_finished(folder):
            pretrain.train(method, sets, options, folder, job.device, epoch_size)
    kept = load_checkpoint(folder / "best.pt", "cpu")
    getattr(method, "unet", method).load_state_dict(kept["model"])
    steps = len(pretrain.Batches(epoch_size, args.batch_size))
    return dict(n_labels_train=len(plain), n_labels_val=len(val), budget_steps=epochs * steps)


def compare_tuned(unet, pretrained, tuned, sets, job, folder):
    """Whether the network tuned on the labels is better than the pre-trained one: a dict, `trusted`
    and the IoUs that decide, kept in decision.json of the run `folder` of tuning. Writes the
    pre-trained one's masks, with the true ones where there are labels, into train_masks.npy.

    Two differences of IoUs are added up, and the tuned network is trusted where the sum is not
    negative. On the labelled validation images: its IoU minus the pre-trained one's. On training
    images: IoU(tuned, pre-trained) on the unlabelled minus IoU(pre-trained, truth) on the labelled.
    This assumes that the pre-trained one errs alike on both: then a tuned one that is right agrees
    with it as well as the truth does, and one that overfits a few images less. Where all are
    labelled, there is only the first.
    """
    path = folder / "decision.json"
    if path.exists():
        return json.loads(path.read_text())
    train_set, _, val_set = sets
    images, truth = open_part(job.data, "train")
    labelled = train_set.rows
    others = sorted({*range(len(images))} - {*labelled})
    unet.eval()

    def iou(weights, images, masks, rows):
        unet.load_state_dict(weights)
        drawn = draw_masks(unet, (images[k] for k in rows), job.device)
        counts = [count_pixels(pred, masks[k] > 0) for pred, k in zip(drawn, rows, strict=True)]
        return float(scores_from_counts(sum(counts))["iou"])

    val = *open_part(job.data, "val"), val_set.rows
    result = dict(tuned_val_iou=iou(tuned, *val), pretrained_val_iou=iou(pretrained, *val))
    gain = result["tuned_val_iou"] - result["pretrained_val_iou"]
    # The weights are those of the last call, pretrained.
    pretrain.write_masks(draw_masks(unet, images, job.device), images.shape[:3],
                         folder / "train_masks.npy")
    drawn = np.load(folder / "train_masks.npy", mmap_mode="r+")
    for k in labelled:                      # one at a time: they may be all
        drawn[k] = truth[k]
    if others:
        pretrained_iou = iou(pretrained, images, truth, labelled)
        agreement = iou(tuned, images, drawn, others)
        result |= dict(pretrained_iou=pretrained_iou, agreement=agreement)
        gain += agreement - pretrained_iou
    result["trusted"] = gain >= 0
    pretrain.write_json(path, result)
    return result


def fit_semi(method, sets, epoch_size, job, epochs):
    """As fit, on the labelled images and, where these are too few, also on the others, with the
    pre-trained network's masks (self-training: Lee 2013).

    For half of the epochs the pre-trained network is tuned on the labels alone. If that can be
    trusted (compare_tuned), it goes on so. Else the pre-trained one starts again: half of what it
    sees are labelled images, half are all images, with its own masks where there is no label.
    Order and augmentation of the second half are of another seed, not those of the first again.
    """
    folder = training_folder(job) / "labels"
    if job.args.overwrite:                  # else the old second half would outlive the first
        with only_one(folder.with_name(".lock")):
            pretrain.clear_run(folder.parent)
    pretrained = copy.deepcopy(method.unet.state_dict())
    first_half = fit(method, sets, epoch_size, job, epochs // 2, folder.name)
    tuned = copy.deepcopy(method.unet.state_dict())
    decision = compare_tuned(method.unet, pretrained, tuned, sets, job, folder)
    use = "is trained further" if decision["trusted"] else "is dropped: too few labels"
    scores = ", ".join(f"{name} {value:.3g}" for name, value in decision.items())
    print(f"the network tuned on the labels {use} ({scores})")
    method.unet.load_state_dict(tuned)
    labelled, plain, val = sets
    labelled.seed = seed_from(job.seed, 4)
    if not decision["trusted"]:
        method.unet.load_state_dict(pretrained)
        labelled = PartlyLabelled(job.data, labelled.transform, labelled.seed, labelled.rows,
                                  folder / "train_masks.npy")
    method.lr /= 3                          # lower: the network is trained
    result = fit(method, (labelled, plain, val), epoch_size, job, epochs - epochs // 2)
    result["budget_steps"] += first_half["budget_steps"]
    return result | decision


# --------------------------------------------------------------------------------------- protocols

def masks_of_refinement(job, parts, images):
    """The masks of --refine, bool (S, S), for uint8 (N, S, S, 3), may be mapped, one after the
    other, and what it decided on the training images, a dict."""
    training = open_part(job.data, "train")[0]
    foreground = job.settings["foreground"]
    refinement, evidence = pretrain.decide_refinement(training, foreground, parts)
    return refinement.draw_all(images), evidence


def best_median_worst(unet, images, masks, names, iou, job):
    """As the paper's Table 6: image, pseudo-mask, prediction, truth, of the test images of best,
    median and worst IoU."""
    settings = job.settings
    order = np.argsort(-iou, kind="stable")
    three = order[[0, len(order) // 2, -1]]
    shown = np.array(images[three])
    threshold = settings["threshold"]
    raw = pretrain.pseudo_mask(shown, threshold, settings["foreground"])
    columns = {"image": shown, threshold: raw}
    if settings.get("refine"):
        columns["refined mask"], _ = masks_of_refinement(job, settings["refine"], shown)
    columns["prediction"] = draw_masks(unet, shown, job.device, job.args.flips)
    columns["truth"] = masks[three]
    captions = []
    for title, k in zip(("best", "median", "worst"), three, strict=True):
        captions.append(f"{title}: IoU {iou[k]:.4f}   {names[k]['name']}")
    rows = list(zip(*columns.values(), strict=True))
    return prepare_data.contact_sheet(rows, list(columns), captions)


def segment(job):
    """transfer, frozen, finetune, semi, supervised: train if the protocol does, and score the
    network on the test part. Returns the result, the rows of its CSV, and the qualitative sheet."""
    args = job.args
    backbone, size = job.settings["backbone"], job.settings["img_size"]
    images, masks, names = open_test(job.data)
    torch.manual_seed(seed_from(job.seed, 1))       # not the decoder that pre-training had
    part = "decoder" if args.protocol == "frozen" else "end2end"
    with pretrain.exit_on_value_error():
        method = FineTuning(backbone, size, train_part=part)
    if job.weights:
        load_weights(method.unet, job.weights, job.decoder)
    else:           # the encoder that pre-training starts from: all else is as in fine-tuning one
        torch.manual_seed(seed_from(job.seed))
        method.unet.encoder.load_state_dict(build_unet(backbone, size).encoder.state_dict())
    if job.decoder == "fresh" or args.protocol == "semi":
        method.lr = 1e-3
    if args.lr is not None:
        method.lr = args.lr
    method.to(job.device, memory_format=torch.channels_last)
    result = {}
    if args.protocol in LABEL_PROTOCOLS:
        train_method = fit_semi if args.protocol == "semi" else fit
        result = train_method(method, *labelled_sets(job), job, args.epochs)
    unet = method.unet.eval()
    table = score_masks(draw_masks(unet, images, job.device, args.flips), masks)
    iou = scores_from_counts(table[:, :4])["iou"]
    sheet = best_median_worst(unet, images, masks, names, iou, job)
    result |= dict(n_test=len(names)) | summarise(table, groups_of(names))
    return result, per_image("", table, names), sheet


def best_constant(masks):
    """The cut of the mean training mask with the best IoU over the training part, uint8
    (N, S, S), when it is predicted for every image: bool (S, S)."""
    counts = sum(mask.astype(np.int64) for mask in masks)       # (S, S): images with foreground
    ranked = np.sort(counts, axis=None)[::-1]
    pixels = np.arange(1, ranked.size + 1)  # that the mask has, from the most frequent on
    hits = np.cumsum(ranked)
    iou = hits / (len(masks) * pixels + ranked.sum() - hits)
    return counts >= max(ranked[iou.argmax()], 1)


def reference(job):
    """Score what needs no training on the same test images: REFERENCE. Only best_constant uses
    labels. Returns the result, the rows of its CSV, and no sheet."""
    settings = job.settings
    images, masks, names = open_test(job.data)
    torch.manual_seed(seed_from(job.seed))  # the very weights that pre-training starts from
    with pretrain.exit_on_value_error():
        unet = build_unet(settings["backbone"], settings["img_size"])
    unet = unet.to(job.device, memory_format=torch.channels_last).eval()
    refined, evidence = masks_of_refinement(job, pretrain.REFINEMENTS, images)
    other = "dark" if settings["foreground"] == "bright" else "bright"

    def everywhere(mask):
        return np.broadcast_to(mask, masks.shape)

    def thresholded(foreground):            # an image of one gray value: no foreground either way
        for image in images:
            yield pretrain.pseudo_mask(image[None], settings["threshold"], foreground)[0] > 0

    training_masks = open_part(job.data, "train")[1]
    drawn = dict(
        all_foreground=everywhere(True),
        all_background=everywhere(False),
        raw_threshold=thresholded(settings["foreground"]),
        raw_threshold_inverted=thresholded(other),
        refined_threshold=refined,
        random_init=draw_masks(unet, images, job.device))
    if training_masks is not None:
        drawn["best_constant"] = everywhere(best_constant(training_masks))
    result = dict(n_test=len(names))
    rows = []
    for name, pred in drawn.items():
        table = score_masks(pred, masks)
        result[name] = summarise(table, groups_of(names))
        rows += per_image(name, table, names)
    result["refined_threshold"] |= evidence
    if "best_constant" in result:
        result["best_constant"]["uses_labels"] = True
    return result, rows, None


def classes_of(data):
    """The labels in the CSVs of a data set, sorted; ends the program where a probe cannot be
    trained."""
    train, val, test = [{row["label"] for row in read_names(data, part)} - {""}
                        for part in prepare_data.PARTS]
    if len(train) < 2 or not val or not test or not train >= val | test:
        sys.exit(f"{data}: classify needs at least two labels in train.csv, and the same ones in "
                 "val.csv and test.csv")
    return sorted(train)


def classify(job):
    """A linear probe on the encoder; recall of each class, their mean, and the confusion matrix, of
    each stage. Returns the result, rows of (label, prediction) of the test images, and no sheet."""
    size, backbone = job.settings["img_size"], job.settings["backbone"]
    classes = classes_of(job.data)
    torch.manual_seed(seed_from(job.seed, 3))
    with pretrain.exit_on_value_error():
        has_layer4 = "layer4.0.conv1.weight" in read_encoder(job.weights, backbone)
        probe = Probe(backbone, size, len(classes), has_layer4)
        load_encoder(probe, job.weights)
    if job.args.lr is not None:
        probe.lr = job.args.lr
    probe.to(job.device, memory_format=torch.channels_last)
    result = fit(probe, *labelled_sets(job, classes), job, job.args.epochs)
    probe.eval()
    images, _ = open_part(job.data, "test")
    names = read_names(job.data, "test")
    test = [k for k, row in enumerate(names) if row["label"]]
    names = [names[k] for k in test]
    predicted = []
    with torch.inference_mode():
        for start in range(0, len(test), BATCH):
            batch = torch.from_numpy(images[test[start:start + BATCH]]).permute(0, 3, 1, 2)
            logits = torch.stack(probe.logits(batch.to(job.device)))
            predicted.append(logits.argmax(dim=2).cpu())
    truth = np.array([classes.index(row["label"]) for row in names])
    for stage, pred in zip(probe.stages, np.concatenate(predicted, axis=1), strict=True):
        result[stage] = class_scores(truth, pred, classes)
    majority = float(np.bincount(truth).max() / len(truth))
    result |= dict(n_test=len(test), classes=classes, stage=stage, majority_accuracy=majority)
    result |= result.pop(stage)             # of the deepest, the last
    rows = [row | dict(prediction=classes[k]) for row, k in zip(names, pred, strict=True)]
    return result, rows, None


def class_scores(truth, pred, classes):
    """int (N,) twice, the names of the classes -> dict: macro_recall, the mean over the classes
    that the test part has; accuracy; confusion, truth by rows; recall of each class."""
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (truth, pred), 1)
    recall = {}
    for name, row, right in zip(classes, confusion, confusion.diagonal(), strict=True):
        if row.any():
            recall[name] = float(right / row.sum())
    return dict(
        macro_recall=float(np.mean(list(recall.values()))),
        accuracy=float((truth == pred).mean()),
        confusion=confusion.tolist(),
        class_recall=recall)


def per_image(row, table, names):
    """The lines of a CSV, dicts: what each picture scored by itself, table (N, 5), in a `row`."""
    counts = table[:, :4].astype(int)
    scores = dict(hd95=table[:, 4]) | scores_from_counts(counts)
    lines = []
    for k, image in enumerate(names):
        line = dict(row=row, name=image["name"], group=image["group"])
        line |= dict(zip(COUNTS, counts[k], strict=True))
        line |= {name: f"{value[k]:.6g}" for name, value in scores.items()}
        lines.append(line)
    return lines


def result_header(job):
    """What a result says of the network and of how it was made, a dict."""
    settings = job.settings
    protocol = job.args.protocol
    head = dict(dataset=job.data.name, protocol=protocol, seed=job.seed,
                labels=settings.get("labels", 0.0), name=job.name + "-flips" * job.args.flips)
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
    return head


def evaluate(job):
    """Run one protocol, print its scores, write its JSON, the CSV of its test images, and its
    picture. Ends the program where the JSON of another evaluation would be replaced."""
    head = result_header(job)
    path = Path(job.args.out or "results", head["dataset"], head["backbone"], head["variant"],
                f"seed{job.seed}", f"{head['name']}.json")
    with only_one(path.with_name(f".{path.stem}.lock")):
        there = {} if job.args.overwrite else pretrain.read_json(path)

        def refuse_other(result):
            for name, value in result.items():
                if there and there.get(name) != value:
                    sys.exit(f"{path} holds another evaluation (other {name}): --overwrite "
                             "replaces it")

        refuse_other(head)                  # before it trains
        protocol = dict(reference=reference, classify=classify).get(job.args.protocol, segment)
        result, rows, sheet = protocol(job)
        result = head | result
        refuse_other(result)
        if sheet is not None:
            write_png(path.with_suffix(".png"), sheet)
        pretrain.write_csv(path.with_suffix(".csv"), rows)
        *earlier, command = job.commands
        command = there.get("command", command)         # its first: equal results, equal files
        pretrain.write_json(path, result | dict(command=command, earlier_commands=earlier))
    for name, block in score_blocks(result).items():
        shown = [f"{score} {block[score]:.4f}" for score in PRINTED if score in block]
        print(name or result["variant"], *shown)
    print(path)


# ---------------------------------------------------------------------------------------- predict

def predict_tiled(unet, image, tile, size, device, flips=False):
    """uint8 (H, W, 3), however large -> bool (H, W). Windows of tile x tile pixels, each resized to
    the `size` that the network was trained at, overlap by half; their logits are weighted by
    sin ** 2 towards the middle and summed: the mask is where the sum is positive. Memory beyond
    picture and mask: one row of windows."""
    height, width = image.shape[:2]
    if min(height, width) < tile:
        below = max(0, tile - height)
        right = max(0, tile - width)
        image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REFLECT_101)
    rows, columns = [[*range(0, side - tile, tile // 2), side - tile] for side in image.shape[:2]]
    ramp = np.sin(np.pi * (np.arange(tile) + 0.5) / tile).astype(np.float32) ** 2
    weight = np.outer(ramp, ramp)
    mask = np.zeros(image.shape[:2], bool)
    band = np.zeros((tile, image.shape[1]), np.float32)     # summed logits of the rows from y on
    for y, following in itertools.pairwise([*rows, len(image)]):
        windows = (prepare_data.resize(image[y:y + tile, x:x + tile], size) for x in columns)
        for x, logits in zip(columns, draw_logits(unet, windows, device, flips), strict=True):
            logits = cv2.resize(logits, (tile, tile), interpolation=cv2.INTER_LINEAR)
            band[:, x:x + tile] += logits * weight
        done = following - y
        mask[y:following] = band[:done] > 0
        band = np.roll(band, -done, axis=0)
        band[tile - done:] = 0
    return mask[:height, :width]


def whole_network(args):
    """The U-Net of --run in eval mode, and the run's settings; ends the program where only an
    encoder was trained."""
    settings, _ = read_run(Path(args.run))
    if settings["train"] != "end2end":
        sys.exit(f"{args.run} has an encoder only, and nobody trained its decoder")
    unet = build_unet(settings["backbone"], settings["img_size"])
    load_weights(unet, Path(args.run) / "best.pt", "pretrained")
    return unet.eval().requires_grad_(False), settings


def predict_folder(args, device):
    """Draw a mask, PNG 0 / 255, for every image below a folder, upright and at its own size, under
    its name (see prepare_data.find_files); a CSV with each foreground share; with --overlay also
    pictures. A bad file is named, the others are done, the exit code is 1."""
    source = Path(args.predict)
    out = Path(args.out)
    if out.resolve().is_relative_to(source.resolve()):
        sys.exit(f"{out}: lies in {source}, where its masks could overwrite images or pass for "
                 "some: give another --out")
    if out.exists() and any(out.iterdir()) and not args.overwrite:
        sys.exit(f"{out} is not empty: give another --out, or --overwrite")
    files = prepare_data.find_files(source)
    if args.overlay and any(name.startswith("overlay/") for name in files.images):
        sys.exit(f"{source}: has a folder overlay, whose masks --overlay would overwrite")
    unet, settings = whole_network(args)
    unet = unet.to(device, memory_format=torch.channels_last)
    size = settings["img_size"]
    shares = []
    bad = files.bad
    for name, path in tqdm(files.images.items(), "predict", unit=" images"):
        try:
            picture = prepare_data.read_picture(path, args.page)
            image = prepare_data.to_rgb(picture)
        except ValueError as error:
            bad.append(str(error))
            continue
        if picture.pages > 1:
            tqdm.write(f"{path} has {picture.pages} pages or frames: page {args.page} is taken, "
                       "counted from 0")
        if args.tile is not None:
            mask = predict_tiled(unet, image, args.tile or size, size, device, args.flips)
        else:
            small = prepare_data.resize(image, size)[None]
            logits = predict_logits(unet, small, device, args.flips)[0]
            mask = cv2.resize(logits, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) > 0
        write_png(out / f"{name}.png", mask.astype(np.uint8) * 255)
        if args.overlay:
            red = cv2.addWeighted(image, 0.6, np.full_like(image, (255, 0, 0)), 0.4, 0)
            write_png(out / "overlay" / f"{name}.png", np.where(mask[..., None], red, image))
        share = f"{mask.mean():.6f}"
        shares.append(dict(name=path.relative_to(source).as_posix(), foreground_share=share))
    if shares:
        pretrain.write_csv(out / "foreground.csv", shares)
    print(f"{out}: {len(shares)} masks, and foreground.csv")
    if bad:
        sys.exit("\n".join(bad) + f"\n{len(bad)} bad file(s), listed above, have no mask")


class Exported(nn.Module):
    """uint8 RGB (B, 3, S, S) -> float32 (B, 1, S, S), the probability of foreground: a U-Net with
    its normalisation inside."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        self.register_buffer("mean", pretrain.MEAN)
        self.register_buffer("std", pretrain.STD)

    def forward(self, images):
        return torch.sigmoid(self.unet((images / 255 - self.mean) / self.std))


def export_network(args):
    """--export: a run's network as one file that needs none of this code (torch.export, .pt2), for
    any number of images of the run's size; that and the polarity are in its network.json."""
    path = Path(args.export)
    if path.exists() and not args.overwrite:
        sys.exit(f"{path} would be overwritten: give another --export, or --overwrite")
    unet, settings = whole_network(args)
    size = settings["img_size"]
    about = dict(size=size, foreground=settings["foreground"], dataset=settings["dataset"],
                 input="uint8 RGB (B, 3, size, size)",
                 output="float32 (B, 1, size, size), probability of foreground")
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    any_number = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(Exported(unet), (images,), dynamic_shapes=any_number)
    buffer = io.BytesIO()                   # torch warns of a path that does not end in .pt2
    torch.export.save(program, buffer, extra_files={"network.json": json.dumps(about)})
    pretrain.write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    print(f"{path}: {about}")


# ----------------------------------------------------------------------------------------- report

def score_blocks(result):
    """The blocks of scores of a result: {reference row: block}, or {"": the result itself}."""
    if result["protocol"] != "reference":
        return {"": result}
    return {name: result[name] for name in REFERENCE if name in result}


# What the report reads of every row.
NEEDED = {"dataset", "backbone", "variant", "name", "data", "seed", "labels", "img_size", "command"}


def read_result(path):
    """A JSON of evaluate, and the CSV beside it -> a list of rows: what one network, or one
    reference row, scored with one seed, a dict. It has the JSON and its scores side by side, and
    title, used (labels, in words), groups of the test images, and, unless it is of a probe, their
    counts, float (N, 4). Raises KeyError, ValueError and the like where the file is no result."""
    defaults = dict(n_labels_train=0, n_labels_val=0, earlier_commands=[])
    result = defaults | json.loads(path.read_text(encoding="utf-8"))
    with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    is_probe = result["protocol"] == "classify"
    needed = NEEDED | ({"macro_recall"} if is_probe else {"iou_global", "hd95_image"})
    n_labels = result["n_labels_train"]
    used = f"{n_labels} + {result['n_labels_val']}" if n_labels else "0"
    rows = []
    for name, block in score_blocks(result).items():
        row = result | block
        if not needed <= row.keys():
            raise KeyError(*needed - row.keys())
        images = [line for line in lines if line.get("row", "") == name]
        if len(images) != result["n_test"]:
            raise ValueError(f"{len(images)} images in its CSV")
        row["groups"] = groups_of(images)
        row["used"] = "all" if "uses_labels" in block else used
        row["title"] = name or f"{result['variant']}: {result['name']}"
        if name in ("", "random_init") and result["backbone"] != "resnet50":
            row["title"] += f" ({result['backbone']})"
        if not is_probe:
            counts = [[float(line[key]) for key in COUNTS] for line in images]
            row["counts"] = np.array(counts)
        rows.append(row)
    return rows


def group_by_seed(rows):
    """Rows grouped by all but their seed: a list of dicts, references first, then by labels and
    title. A cell is the row of its first seed and has all its `rows`; unless it is of a probe also
    samples, float (2000,), the bootstrap of the mean over seeds of the global IoU."""
    def place(row):
        is_network = row["protocol"] != "reference"
        return is_network, row["n_labels_train"], row["title"], row["seed"]

    groups = collections.defaultdict(dict)
    for row in sorted(rows, key=place):
        groups[row["dataset"], row["data"], row["title"]].setdefault(row["seed"], row)
    cells = []
    for group in groups.values():
        rows = list(group.values())
        cell = rows[0] | dict(rows=rows)
        if "counts" in cell:
            counts = bootstrap_weights(cell["groups"]) @ [row["counts"] for row in rows]
            cell["samples"] = scores_from_counts(counts)["iou"].mean(axis=0)
        cells.append(cell)
    return cells


def mean_of(cell, score="iou_global"):
    """The mean over seeds of a cell's score."""
    return float(np.mean([row[score] for row in cell["rows"]]))


def mean_std(cell, score="iou_global"):
    """A cell's "mean ± std (seeds)" of a score; std (n - 1) only where there are several seeds."""
    values = [row[score] for row in cell["rows"]]
    text = f"{np.mean(values):.4f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.4f}"
    return f"{text} ({len(values)})"


def difference(cell, other):
    """The paired difference of two cells in words: "+0.0123 [-0.0045, +0.0291] ≈"; ≈ where the
    interval holds 0. Nothing where there is no other, or it is the same. The same resampled images
    are scored for both: what is hard for all cancels (Efron & Tibshirani 1993)."""
    if other is None or other is cell:
        return ""
    low, high = interval(cell["samples"] - other["samples"])
    sign = " ≈" if low <= 0 <= high else ""
    return f"{mean_of(cell) - mean_of(other):+.4f} [{low:+.4f}, {high:+.4f}]{sign}"


def markdown(header, rows):
    """The lines of a table, a blank one before it."""
    lines = [""]
    for cells in (header, ["---"] * len(header), *rows):
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def best_of(cells, key, **wanted):
    """Of the cells that have what is wanted that of the largest key, or None."""
    found = [cell for cell in cells if wanted.items() <= cell.items()]
    return max(found, key=key, default=None)


def dataset_table(cells):
    """The lines of a data set's table: every cell but the probes."""
    def labels_and_steps(cell):
        return cell["n_labels_train"], cell["budget_steps"]

    best = best_of(cells, mean_of, protocol="reference", used="0")      # it costs nothing
    rows = []
    for cell in cells:
        low, high = interval(cell["samples"])
        supervised = best_of(cells, labels_and_steps, protocol="supervised",
                             backbone=cell["backbone"])
        rows.append([
            cell["title"], cell["used"], mean_std(cell), f"{low:.4f} - {high:.4f}",
            difference(cell, best), difference(cell, supervised),
            f"{mean_of(cell, 'hd95_image'):.1f}"])
    header = ["network", "labels", "IoU, mean ± std (seeds)", "95 % interval",
              f"vs {best['title']}" if best else "vs best reference",
              "vs supervised, most labels", "hd95, px"]
    return markdown(header, rows)


def probe_table(cells):
    """The lines of the table of linear probes, one row per stage of the encoder."""
    rows = []
    for cell in cells:
        stages = {cell["stage"]: cell}
        if "layer2" in cell:
            stages["layer2"] = dict(rows=[row["layer2"] for row in cell["rows"]])
        for stage, scores in stages.items():
            rows.append([cell["title"], cell["used"], stage, mean_std(scores, "macro_recall"),
                         mean_std(scores, "accuracy"), f"{cell['majority_accuracy']:.4f}"])
    header = ["network", "labels", "stage", "mean recall over classes", "accuracy",
              "accuracy of the majority class"]
    return markdown(header, rows)


def draw_chart(cells, path):
    """One PNG, in gray: IoU against the labels used, with 95 % intervals; networks that saw none at
    0, the best reference rows without and with labels as lines."""
    from matplotlib.figure import Figure
    curves = collections.defaultdict(list)
    for cell in cells:
        if cell["protocol"] != "reference":
            curves[cell["title"].replace(f"-l{cell['labels']}", "")].append(cell)
    figure = Figure(figsize=(10, max(5, 2 + 0.2 * len(curves))), layout="constrained")
    axes = figure.subplots()
    for k, (name, curve) in enumerate(curves.items()):
        labels = [cell["n_labels_train"] for cell in curve]
        means = np.array([mean_of(cell) for cell in curve])
        bounds = np.array([interval(cell["samples"]) for cell in curve])
        reach = np.abs(bounds.T - means)    # of the error bars, down and up
        axes.errorbar(labels, means, yerr=reach, label=name, capsize=2, color=str(0.3 * (k % 3)),
                      clip_on=False,              # the last point lies on the edge
                      marker="osv^Dx*P"[k % 8], linestyle=("-", "--", ":", "-.")[k % 4])
    for used, style in (("0", "--"), ("all", ":")):      # what is free, and the best constant
        best = best_of(cells, mean_of, protocol="reference", used=used)
        if best:
            axes.axhline(mean_of(best), color="black", linestyle=style, label=best["title"])
    counts = sorted({cell["n_labels_train"] for curve in curves.values() for cell in curve})
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(counts, counts)
    axes.minorticks_off()
    axes.set(ylim=(0, 1), xlabel="labelled training images", ylabel="test IoU (global)",
             title=f"{cells[0]['dataset']}; 95 % intervals over test images")
    figure.legend(fontsize=7, loc="outside right upper")
    pretrain.write_atomically(path, functools.partial(figure.savefig, format="png", dpi=100))


# The paper's tables: title | score; below it, for each network, its title in our report | the
# paper's numbers on PAPER_SETS. Tables 3, 4 and B.1 are end to end, 1, 2, 5, 7 to 10 encoder only.
PAPER_SETS = ("dm", "tissuenet", "isic", "xray", "drone")
PAPER = """
Table 1: encoder only, ResNet-50 | iou_global
    dino: transfer | 0.1399 0.2972 0.2426 0.2052
    byol: transfer | 0.1278 0.3455 0.2412 0.2185
    simsiam: transfer | 0.1415 0.3021 0.2395 0.1939
    medsass-encoder: transfer | 0.1742 0.3824 0.2445 0.2568
Table 2: encoder only, ViT-small | iou_global
    dino: transfer (vit_small) | 0.1668 0.2483 0.1891 0.2106
    mae: transfer (vit_small) | 0.1668 0.3455 0.1910 0.2106
    simmim: transfer (vit_small) | 0.1670 0.3335 0.1913 0.2077
    medsass-encoder: transfer (vit_small) | 0.1360 0.3633 0.1914 0.2466
Figures 3, 4, Table 3: end to end, threshold | iou_global
    medsass-adaptive_mean: transfer | 0.1724 0.3949 0.2393 0.1839
    medsass-adaptive_gaussian: transfer | 0.1725 0.3910 0.2393 0.2079
    medsass-ght: transfer | 0.1809 0.4927 0.1236 0.1689
    medsass: transfer | 0.1810 0.5077 0.4847 0.3522
Table 4: loss | iou_global
    medsass-tversky: transfer | 0.1726 0.3604 0.2444 0.1963
    medsass-focal: transfer | 0.0200 0.1100 0.0529 0.0200
    medsass: transfer | 0.1810 0.5077 0.4847 0.3522
Appendix B.1: cross-entropy, IoU | iou_global
    medsass-bce: transfer | - - 0.0000
Appendix B.1: cross-entropy, accuracy | accuracy_global
    medsass-bce: transfer | - - 0.7608
Table 5: epochs | iou_global
    medsass-encoder-e10: transfer | - 0.3785
    medsass-encoder-e20: transfer | - 0.3778
    medsass-encoder: transfer | - 0.3824
    medsass-encoder-e70: transfer | - 0.3876
    medsass-encoder-e10: transfer (vit_small) | - 0.3575
    medsass-encoder-e20: transfer (vit_small) | - 0.3564
    medsass-encoder: transfer (vit_small) | - 0.3633
    medsass-encoder-e70: transfer (vit_small) | - 0.4091
Tables 7, 8: batch size | iou_global
    medsass-encoder: transfer | - 0.3824 0.2445
    medsass-encoder-b32: transfer | - 0.3852 0.2449
    medsass-encoder: transfer (vit_small) | - 0.3633 0.1914
    medsass-encoder-b32: transfer (vit_small) | - 0.3822 0.2014
Table 9: linear probe | macro_recall
    byol: classify | - - 0.6500 0.7073
    dino: classify | - - 0.6546 0.5241
    simsiam: classify | - - 0.6475 0.6541
    medsass-encoder: classify | - - 0.6550 0.5785
    mae: classify (vit_small) | - - 0.6492 0.6730
    simmim: classify (vit_small) | - - 0.6438 0.6600
    dino: classify (vit_small) | - - 0.6500 0.4000
    medsass-encoder: classify (vit_small) | - - 0.6554 0.1830
Table 10: natural images from a drone | iou_global
    simsiam: transfer | - - - - 0.9932
    byol: transfer | - - - - 0.9910
    medsass-encoder: transfer | - - - - 0.9744
    dino: transfer | - - - - 0.9459
"""


def paper_sections(cells):
    """The lines of those paper tables of which something was run here. A row without an exact match
    takes a run with other epochs or precision, whose epochs and size are given."""
    ours = {}
    for cell in sorted(cells, key=lambda cell: len(cell["title"])):
        usual = re.sub(r"-(e\d+|bf16|fp16|off)(?![a-z\d])", "", cell["title"])
        ours.setdefault((cell["dataset"], usual), cell)
    for cell in cells:
        ours[cell["dataset"], cell["title"]] = cell
    tables = collections.defaultdict(list)
    for line in PAPER.strip().splitlines():
        name, words = [text.strip() for text in line.split("|")]
        if not line.startswith(" "):
            title, score = name, words
            continue
        for dataset, number in zip(PAPER_SETS, words.split(), strict=False):
            cell = ours.get((dataset, name))
            if number == "-":
                continue
            found = "-"
            if cell:
                how = f"{cell.get('epochs')} epochs, {cell['img_size']} px"
                found = f"{mean_std(cell, score)}, {how}"
            tables[title].append([dataset, name, found, number])
    lines = []
    for title, table in tables.items():
        run = {dataset for dataset, _, found, _ in table if found != "-"}
        rows = sorted(row for row in table if row[0] in run)
        if rows:
            header = ["data set", "network", "ours, mean ± std (seeds)", "the paper's"]
            lines += ["", f"### {title}", *markdown(header, rows)]
    return ["", "## The paper's tables", *lines] if lines else []


def dataset_section(title, cells, out):
    """The lines of a data set: its tables, and its chart, which is drawn into the folder `out`."""
    scored = [cell for cell in cells if cell["protocol"] != "classify"]
    probes = [cell for cell in cells if cell["protocol"] == "classify"]
    lines = ["", f"## {title}"]
    if scored:
        first = scored[0]
        lines += ["", f"{first['n_test']} test images of {first['img_size']} px in "
                  f"{len(set(first['groups']))} groups.", *dataset_table(scored)]
        if importlib.util.find_spec("matplotlib"):
            draw_chart(scored, out / f"{title}.png")
            lines += ["", f"![{title}]({urllib.parse.quote(title)}.png)"]
        else:
            print(f"{title}: no chart: matplotlib is not installed (pip install matplotlib)")
    if probes:
        lines += ["", "Linear probes:", *probe_table(probes)]
    return lines


def report(out):
    """Write README.md and one chart per data set under `out` from every result there; a JSON that
    is no result is named and left out. Ends the program where there is none."""
    rows = []
    bad = []
    paths = [path for path in sorted(out.rglob("*.json")) if path.name != "bench.json"]
    for path in paths:                      # bench.json is of run_all.sh bench
        try:
            rows += read_result(path)
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            bad.append(f"- {path} is not a result of finetune_eval.py, or its CSV is missing or "
                       f"damaged: left out ({error!r}); delete it and run its command")
    print(*bad, sep="\n")
    if not rows:
        sys.exit(f"{out}: no results here; score a run first, see python finetune_eval.py --help")
    lines = [
        "# Results", "",
        "Written by `python finetune_eval.py --report`. IoU is over the whole test part (counts "
        "summed), intervals are 95 % bootstrap over test images or their groups. Labels: training "
        "+ validation images whose masks or classes were used. hd95: 95 % Hausdorff distance. ≈: "
        "the interval of the paired difference contains 0: no difference is shown.", "",
        "raw_threshold: Otsu's masks; refined_threshold: those of --refine; random_init: the "
        "untrained network; best_constant: one mask for all images, from the training truth.",
        "", *bad]
    cells = group_by_seed(rows)
    prepared = sorted({(row["dataset"], row["data"]) for row in rows})
    names = [dataset for dataset, _ in prepared]
    for dataset, data in prepared:
        title = dataset
        if names.count(dataset) > 1:        # prepared more than once: not to be compared
            title = f"{dataset} ({data[:8]})"
        here = [cell for cell in cells if (cell["dataset"], cell["data"]) == (dataset, data)]
        lines += dataset_section(title, here, out)
    print("\n".join(lines))
    lines += [*paper_sections(cells), "", "## Commands", "",
              f"Of the first seed of each row; torch {torch.__version__}, timm "
              f"{timm.__version__}.", "", "```"]
    commands = {}                           # each once, in the order in which they were run
    for cell in cells:
        for command in (*cell["earlier_commands"], cell["command"]):
            commands[command] = True
    lines += [*commands, "```", ""]
    path = out / "README.md"
    pretrain.write_atomically(path, lambda temporary: temporary.write_text(
        "\n".join(lines), encoding="utf-8"))
    print(f"{path}: {len(paths) - len(bad)} results, {len(bad)} warnings")


# ------------------------------------------------------------------------------------------ flags

def share_or_count(text):
    """--labels: a number with a point is a share in (0, 1], one without a count from 1 up."""
    value = float(text) if "." in text else int(text)
    if value <= 0 or "." in text and value > 1:
        raise argparse.ArgumentTypeError(f"{text} is neither a share up to 1.0 (with a point) nor "
                                         "a count from 1 (without)")
    return value


# Flags that change what is computed, and what stands before their value in a result's name.
NAME_FLAGS = dict(labels="l", epochs="e", batch_size="b", lr="lr", amp="")


def parse_args(argv):
    """The flags; those that the job does not use have their default, and are named in one line.
    Ends the program where they contradict each other or numbers make no sense."""
    parser = argparse.ArgumentParser("finetune_eval.py", description=__doc__, allow_abbrev=False,
                                     usage=argparse.SUPPRESS, formatter_class=prepare_data.Help)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    instead = parser.add_mutually_exclusive_group()
    source.add_argument("--run",
        help="a finished run folder of pretrain.py, or of this script (then to score, predict or "
        "export)")
    source.add_argument("--encoder", help="any encoder (ours, timm's, torchvision's), a file")
    add("--dataset", type=prepare_data.dataset_name,
        help="a prepared data set; unset: the one that --run was trained on")
    add("--backbone", choices=BACKBONES, help="without --run: the network")
    add("--protocol", default="transfer", choices=["transfer", *LABEL_PROTOCOLS, "reference"],
        help="what to do before scoring")
    add("--labels", type=share_or_count, default=1.0,
        help="labelled training images: 0.1 is a share of those that have a mask or class, 10 a "
        "count; the same share of the validation images goes with them")
    add("--epochs", type=int, default=50,
        help="of training on labels (appendices C, D); an epoch has the steps of all training "
        "images, however few are labelled")
    add("--batch-size", type=int, default=16, help="images a step (appendices C, D)")
    add("--lr", type=float,
        help="peak rate of Adam. Unset: 1e-3 with a fresh decoder and for semi (a third of it in "
        "its second half), else 3.6e-4")
    add("--seed", type=int, help="of fresh weights, labels, order; unset: the run's, or 0")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"],
        help="precision of training on labels, as in pretrain.py")
    add("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 1)),
        help="processes that load and augment")
    add("--flips", action="store_true", help="predict with the mean over a picture's four flips")
    instead.add_argument("--predict",
        help="draw masks for the images of this folder; needs --run, --out")
    add("--tile", type=int, nargs="?", const=0,
        help="with --predict, for large pictures: in overlapping windows of so many pixels a side "
        "(no number: the training size) instead of resized as a whole")
    add("--page", type=int, default=0,
        help="with --predict: the page or frame of files that have several; 0 is the first")
    add("--overlay", action="store_true", help="with --predict: pictures with the mask in red, too")
    instead.add_argument("--export",
        help="write the network of --run as one file (.pt2) that needs none of this code")
    instead.add_argument("--report", action="store_true",
        help="write README.md and charts from all results under --out")
    add("--data", default="data", help="where prepared data sets are")
    add("--runs", default="runs", help="where training on labels without --run is kept")
    add("--out", help="folder for results (unset: results), or with --predict for masks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--overwrite", action="store_true", help="replace results or masks that are already there")
    args = parser.parse_args(argv)
    if args.report:
        return args
    pretrain.check_numbers(parser, args, epochs=1 + (args.protocol == "semi"), batch_size=1, lr=0,
                           seed=0, workers=0, page=0)
    if args.tile and args.tile < 16:
        parser.error("--tile is at least 16 pixels")
    scores = not (args.predict or args.export)
    loads_nothing = args.protocol in ("supervised", "reference")
    if not scores and not args.run or args.predict and not args.out:
        parser.error("--predict needs --run RUN_DIR and --out DIR, --export needs --run RUN_DIR")
    if not args.run and not (args.dataset and args.backbone):
        parser.error("give --run RUN_DIR, or --dataset NAME and --backbone B")
    if scores and loads_nothing == bool(args.run or args.encoder):
        parser.error("give --run RUN_DIR or --encoder FILE, but neither for supervised, reference")
    trains = scores and args.protocol in LABEL_PROTOCOLS
    unused = dict.fromkeys([*NAME_FLAGS, "workers"], not trains)
    unused |= dict.fromkeys(("overlay", "tile", "page"), not args.predict)
    unused |= dict.fromkeys(("dataset", "protocol", "seed"), not scores)
    unused["backbone"] = args.run
    unused["flips"] = args.export or args.protocol in ("classify", "reference")
    given = []
    for name, is_unused in sorted(unused.items()):
        default = parser.get_default(name)
        if is_unused and getattr(args, name) != default:
            given.append("--" + name.replace("_", "-"))
            setattr(args, name, default)
    if given:
        print(f"not used here and ignored: {', '.join(given)}")
    return args


def training_name(args):
    """The name of a result and of its training folder: protocol and non-default flags."""
    defaults = parse_args(["--report"])
    name = args.protocol
    for flag, prefix in NAME_FLAGS.items():
        value = getattr(args, flag)
        if str(value) != str(getattr(defaults, flag)):  # 1 label is not all, 1.0
            name += f"-{prefix}{value}"
    return name


def describe(args, run, meta):
    """What is evaluated, a dict: the settings of its `run`, or made up for what has none."""
    if args.run:
        *_, above, parent, folder = Path(args.run).resolve().parts
        variant = parent
        if "protocol" in run:               # a run of this script, in the folder of another
            variant = f"{above}-{folder}"
        return run | dict(variant=variant)
    name = args.protocol
    settings = dict(backbone=args.backbone, threshold="otsu", foreground=meta["foreground"],
                    train=None)
    if args.encoder:
        path = Path(args.encoder).resolve()
        name = f"file-{path.stem}"          # not the name of a method
        settings["train"] = "encoder"
        if (path.parent / "config.json").exists():      # of a run: all are called encoder.pth
            name = "-".join(path.parts[-5:-1])
    elif name == "supervised":
        settings |= dict(train="end2end", loss="focal_tversky", epochs=args.epochs,
                         batch_size=args.batch_size)
    return settings | dict(method=name, variant=name)


def make_job(args, device, command):
    """The Job that the flags ask for. Ends the program where it cannot be done."""
    run, *run_command = read_run(Path(args.run)) if args.run else [{}]
    data = Path(args.data) / (args.dataset or run["dataset"])
    meta = prepare_data.read_meta(data)
    size = meta["size"]
    if "protocol" in run:
        if args.protocol in LABEL_PROTOCOLS:
            sys.exit(f"{args.run} has seen labels: train on labels from a run of pretrain.py")
        if run["dataset"] == data.name and run["data"] != meta["fingerprint"]:
            sys.exit(f"{args.run} was trained on another preparation of {data.name}, perhaps on "
                     "images that are test images now: prepare it as it was, or train again")
    elif run.get("dataset") == data.name and run["data"] != meta["fingerprint"]:
        print(f"{args.run} saw another preparation of {data.name}: if its split was another, then "
              "test images, too, though no labels")
    decoder = "fresh"
    if run.get("train") == "end2end" and args.protocol in ("transfer", "finetune", "semi"):
        decoder = "pretrained"
        if run["backbone"] == "vit_small" and run["img_size"] != size:
            sys.exit(f"{args.run}: a ViT U-Net needs one size: prepare {data.name} with --size "
                     f"{run['img_size']}")
    elif args.protocol == "semi":
        sys.exit("semi draws masks without labels: it needs a --run of pretrain.py that trained a "
                 f"whole U-Net, and {args.run or args.encoder} is none")
    settings = describe(args, run, meta) | dict(img_size=size, data=meta["fingerprint"])
    name = training_name(args)
    if run.get("dataset", data.name) != data.name:
        settings["variant"] += f"-from-{run['dataset']}"
        name += f"-on-{data.name}"
    weights = None
    if args.run or args.encoder:
        weights = Path(args.encoder or Path(args.run) / WEIGHTS[decoder])
        if weights.is_file():               # else models.py says what is wrong
            settings["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    seed = run.get("seed", 0) if args.seed is None else args.seed
    if args.protocol == "transfer" and decoder == "pretrained" and seed != run["seed"]:
        print("not used here and ignored: --seed")
        seed = run["seed"]
    commands = [meta["command"], *run_command, command]
    return Job(args, data, settings, seed, decoder, weights, name, device, commands)


def main(argv=None):
    args = parse_args(argv)
    if args.report:
        return report(Path(args.out or "results"))
    if args.export:
        return export_network(args)
    device = pretrain.pick_device(args.device)
    if args.predict:
        return predict_folder(args, device)
    flags = sys.argv[1:] if argv is None else argv
    evaluate(make_job(args, device, shlex.join(["python", "finetune_eval.py", *flags])))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, pretrain.end_on_sigterm)
    sys.stdout.reconfigure(errors="replace")        # names that the terminal cannot show
    try:
        main()
    except RuntimeError as error:
        pretrain.explain_memory(error)
        raise
    except OSError as error:                        # a full disk, a forbidden folder
        sys.exit(f"finetune_eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("finetune_eval.py: interrupted; the same command goes on (--predict needs "
                 "--overwrite, or another --out)")
