"""Score a network on a test set that it never saw, train it on some labels first, or let it predict
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
trained. semi: an average of the weights before and after finetune, as much of each as two folds of
the labelled images say. supervised: all is trained, from scratch. classify: a linear probe on the
encoder's pooled features (appendix D). reference: what needs no training, on the same test images.
One JSON per evaluation, under results/, with a CSV of its test images; --report writes
results/README.md from them.
"""

import signal
import sys

if __name__ == "__main__":                  # Ctrl-C while torch is imported
    signal.signal(signal.SIGINT, lambda *ignored: sys.exit("interrupted"))

import argparse
import collections
import csv
import functools
import importlib.util
import io
import itertools
import json
import math
import shlex
import shutil
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
from prepare_data import new_file, open_part, read_json, read_names, write_json
from pretrain import Images, MedSASS, exit_on_value_error, load_checkpoint, normalise, seed_from

BATCH = 16                                  # test images at a time; no score depends on it
LABEL_PROTOCOLS = ("frozen", "finetune", "semi", "supervised", "classify")     # that train
REFERENCE = ("all_foreground", "all_background", "raw_threshold", "raw_threshold_inverted",
             "refined_threshold", "refined_trusted", "random_init", "best_constant")
COUNTS = ("tp", "fp", "fn", "tn")
# What random numbers of one seed are for: pre-training's own weights have 0.
DECODER_SEED, LABELS_SEED, PROBE_SEED, FOLDS_SEED = 1, 2, 3, 4
WEIGHTS = (0, 0.25, 0.5, 0.75, 1)           # of the tuned network in the average of semi

# -------------------------------------------------------------------------- metrics (appendix G)


def count_pixels(pred, target):
    """Return true positives, false positives, false negatives and true negatives of bool (..., H,
    W) twice, int64 (..., 4)."""
    kinds = [pred & target, pred & ~target, ~pred & target, ~pred & ~target]
    return np.stack(kinds, axis=-3).sum(axis=(-2, -1))


def scores_from_counts(counts):
    """Return iou, dice, precision, recall and accuracy of (..., 4) of count_pixels, a dict of float
    (...) in [0, 1]. 0 / 0 is 1 if neither mask has any foreground (nothing to find, nothing found),
    and 0 elsewhere."""
    tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
    if_empty = np.where(tp + fp + fn == 0, 1.0, 0.0)

    def ratio(part, whole):
        return np.where(whole > 0, part / np.maximum(whole, 1), if_empty)

    return dict(
        iou=ratio(tp, tp + fp + fn),
        dice=ratio(2 * tp, 2 * tp + fp + fn),
        precision=ratio(tp, tp + fp),
        recall=ratio(tp, tp + fn),
        accuracy=ratio(tp + tn, tp + fp + fn + tn))


def weighted_scores(counts, weights):
    """Return the scores of counts (N, 4) if images count as often as `weights`, (R, N), says: a
    dict of float (R,). "_global": counts summed over the set; "_image": mean over its images."""
    scores = {}
    overall = scores_from_counts(weights @ counts)
    for name, of_image in scores_from_counts(counts).items():
        scores[f"{name}_global"] = overall[name]
        scores[f"{name}_image"] = weights @ of_image / weights.sum(axis=1)
    return scores


def segmentation_scores(pred, target):
    """Return iou, dice, precision, recall and accuracy of bool (N, H, W) twice, a dict, each
    "_global" (counts summed over the set) and "_image" (mean over images). Raises ValueError for
    another dtype or unequal shapes."""
    if not pred.dtype == target.dtype == bool or pred.shape != target.shape:
        raise ValueError("two bool arrays (N, H, W) of one shape are needed, not "
                         f"{pred.dtype} {pred.shape} and {target.dtype} {target.shape}")
    scores = weighted_scores(count_pixels(pred, target), np.ones((1, len(pred))))
    return {name: float(value[0]) for name, value in scores.items()}


def count_masks(predicted, masks):
    """Return count_pixels of an iterable of masks, bool (S, S), and the true ones, uint8 (N, S, S),
    which may be mapped: int64 (N, 4)."""
    counts = []
    for pred, mask in zip(tqdm(predicted, "score", len(masks), leave=False), masks, strict=True):
        counts.append(count_pixels(pred, mask > 0))
    return np.array(counts)


def groups_of(names):
    """Return the group of each row of a part's CSV, a tuple; a row without one is its own group."""
    return tuple(row["group"] or row["name"] for row in names)


@functools.lru_cache(maxsize=2)             # the report needs the same ones for every cell
def bootstrap_weights(groups):
    """Return how often each image counts in each of 2000 rounds of the bootstrap over groups (Efron
    1979), float (2000, N), whole. groups: that of each image, a tuple (N,)."""
    _, index = np.unique(groups, return_inverse=True)
    n = index.max() + 1
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2000)
    return times[:, index].astype(np.float64)


def interval(samples):
    """Return [low, high], the middle 95 % of float (R,)."""
    return np.percentile(samples, (2.5, 97.5)).tolist()


def summarise(counts, groups):
    """Return all scores of (N, 4), a dict; IoU and Dice also with "_ci", their 95 % bootstrap
    interval over groups."""
    block = {}
    samples = weighted_scores(counts, bootstrap_weights(groups))
    for name, value in weighted_scores(counts, np.ones((1, len(counts)))).items():
        block[name] = float(value[0])
        if name.startswith(("iou", "dice")):
            block[f"{name}_ci"] = interval(samples[name])
    return block


# ---------------------------------------------------------------------------------- what to do

@dataclass
class Job:
    """One evaluation, as the flags, the run's config.json and the data set decide it."""
    args: argparse.Namespace                # the flags
    data: Path                              # the prepared data set
    head: dict                              # what its result says of the network and the protocol
    run: dict                               # the settings of the network's run; {} if it has none
    weights: Path | None                    # of the network, or of its encoder
    decoder: str                            # what it starts from: "pretrained" or "fresh"
    folder: Path                            # of training on labels
    device: torch.device
    command: str


def read_run(run):
    """Return the settings of a run folder, a dict; exit if it is not a finished run."""
    settings = read_json(run / "config.json").get("settings", {})
    if "variant" not in settings:
        sys.exit(f"{run} is not a run folder: it has no config.json of a run (see python "
                 "pretrain.py --help)")
    last = run / "last.pt"                  # a copy may have config.json and best.pt alone
    has_weights = (run / "best.pt").exists() or (run / "encoder.pth").exists()
    if not has_weights or last.exists() and not load_checkpoint(last, "cpu")["finished"]:
        sys.exit(f"{run} is not finished: its command, run again, goes on where it stopped")
    return settings


def make_job(args, name, command):
    """Return the Job that the flags ask for; exit if it cannot be done. name: that of its result,
    without data set and seed."""
    # ===== the run and the data set =====
    run = read_run(Path(args.run)) if args.run else {}
    data = Path(args.data) / (args.dataset or run["dataset"])
    meta = prepare_data.read_meta(data)
    saw_labels = "protocol" in run
    if saw_labels and args.protocol in LABEL_PROTOCOLS:
        sys.exit(f"{args.run} has seen labels: train on labels from a run of pretrain.py")
    if run.get("dataset") == data.name and run["data"] != meta["fingerprint"]:
        if saw_labels:
            sys.exit(f"{args.run} was trained on another preparation of {data.name}, perhaps on "
                     "images that are test images now: prepare it as it was, or train again")
        print(f"{args.run} saw another preparation of {data.name}: perhaps test images, too")

    # ===== the weights =====
    decoder, weights = "fresh", args.encoder
    if run.get("train") == "end2end" and args.protocol in ("transfer", "finetune", "semi"):
        decoder = "pretrained"
        if run["backbone"] == "vit_small" and run["img_size"] != meta["size"]:
            sys.exit(f"{args.run}: a ViT U-Net needs one size: prepare {data.name} with --size "
                     f"{run['img_size']}")
    elif args.protocol == "semi":
        sys.exit("semi averages whole networks: it needs a --run of pretrain.py that trained a "
                 f"whole U-Net, and {args.run or args.encoder} is none")
    if args.run:
        weights = Path(args.run, "best.pt" if decoder == "pretrained" else "encoder.pth")

    # ===== the names =====
    if args.encoder:                        # of a run: all are called encoder.pth
        origin = read_json(Path(args.encoder).with_name("config.json")).get("settings")
        variant = f"file-{Path(args.encoder).stem}"
        if origin:
            variant = "{dataset}-{backbone}-{variant}-seed{seed}".format(**origin)
        network = dict(method=variant, variant=variant, train="encoder")
    else:
        network = dict(method=args.protocol, variant=args.protocol, train=None)
    network |= dict(backbone=args.backbone, labels=0.0, threshold="otsu", refine=None,
                    foreground=meta["foreground"], n_labels_train=0, n_labels_val=0, seed=0)
    head = {key: run.get(key, value) for key, value in network.items()}
    head |= dict(dataset=data.name, protocol=args.protocol, img_size=meta["size"],
                 data=meta["fingerprint"])
    if run.get("dataset", data.name) != data.name:
        head["variant"] += f"-from-{run['dataset']}"
        name += f"-on-{data.name}"
    if args.seed is not None and (args.protocol != "transfer" or decoder == "fresh"):
        head["seed"] = args.seed            # else nothing is random
    if args.protocol in LABEL_PROTOCOLS:
        head |= dict(labels=args.labels, decoder=decoder)
    folder = Path(args.runs, data.name, head["backbone"], head["variant"], f"seed{head['seed']}")
    if args.run:
        folder = Path(args.run)
    other_labels = f"-seed{head['seed']}" * (head["seed"] != run.get("seed", head["seed"]))
    head["name"] = name + "-flips" * args.flips
    return Job(args, data, head, run, weights, decoder, folder / (name + other_labels),
               pretrain.pick_device(args.device), command)


# ------------------------------------------------------------------------- networks and batches

def load_weights(unet, path, decoder):
    """Load weights: of the whole U-Net if `decoder` is "pretrained", else of its encoder."""
    if decoder == "pretrained":
        unet.load_state_dict(load_checkpoint(path, "cpu")["model"])
        return
    with exit_on_value_error():
        load_encoder(unet, path)


@torch.inference_mode()
def predict_logits(unet, images, device, flips=False):
    """Return the logits of uint8 ndarray (B, S, S, 3), float32 ndarray (B, S, S), foreground if
    > 0. flips: their mean over the picture as it is, flipped up and down, left and right, both."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)        # channels_last
    batch = normalise(batch.to(device))
    logits = unet(batch)[:, 0].float()      # (B, S, S)
    if flips:
        for axes in ((2,), (3,), (2, 3)):
            logits += unet(batch.flip(axes)).flip(axes)[:, 0].float()
        logits /= 4
    return logits.cpu().numpy()


def predict_each(unet, images, device, flips=False):
    """Yield predict_logits of an iterable of uint8 (S, S, 3), one after the other; one batch is
    held."""
    images = iter(images)
    while batch := list(itertools.islice(images, BATCH)):
        yield from predict_logits(unet, np.stack(batch), device, flips)


def predict_masks(unet, images, device, flips=False):
    """Yield the masks, bool (S, S), that a network in eval mode predicts for an iterable of uint8
    (S, S, 3)."""
    for logits in predict_each(unet, images, device, flips):
        yield logits > 0


def open_test(data):
    """Return (images, masks, rows of test.csv); exit if nothing can be scored."""
    images, masks = open_part(data, "test")
    if masks is None:
        sys.exit(f"{data} has no test masks: nothing can be scored; --predict needs none")
    if not masks.any():
        print(f"{data}: no test mask has any foreground; IoU is 1 if nothing is predicted, else 0")
    return images, masks, read_names(data, "test")


# ----------------------------------------------------------------------------- training on labels

def labelled_rows(names, rows, fraction, seed):
    """Return which `rows` of a part are taken as labelled: a list, nested in `fraction`, the same
    for every method, at least one. Groups come in an order of (seed) alone, their images one after
    the other."""
    groups = collections.defaultdict(list)
    all_groups = groups_of(names)
    for k in rows:
        groups[all_groups[k]].append(k)
    generator = np.random.default_rng(seed_from(seed, LABELS_SEED))
    chosen = []
    for group in generator.permutation(sorted(groups)).tolist():
        chosen += groups[group]
    return chosen[:max(1, round(fraction * len(rows)))]


class FineTuning(MedSASS):
    """MedSASS's U-Net, loss and optimiser, with true masks. The paper gives no schedule: the rate
    rises over the first tenth of the steps and falls to 0 by a cosine, and the last weights are
    kept, because all labels are trained on."""

    keep_best = False

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        warm_up = max(1, total_steps // 10)
        done = max(0, step - warm_up) / max(1, total_steps - warm_up)
        factor = min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = self.lr * factor


def focal_cross_entropy(logits, target, gamma=2.0):
    """Return the focal loss over classes (Lin et al. 2017, eq. 4), the mean of -(1 - p) ** gamma
    log p. logits (B, C), target int64 (B,) -> scalar."""
    log_p = F.log_softmax(logits, dim=1).gather(1, target[:, None])[:, 0]
    return -((1 - log_p.exp()) ** gamma * log_p).mean()


class Probe(nn.Module):
    """A linear layer on the pooled features of an encoder that stays as it is (appendix D): the
    mean over a ViT's patch tokens, or over the deepest stage of a ResNet that its file holds,
    layer2 for MedSASS, layer4 for BYOL, DINO and SimSiam. Members: as in every class of
    pretrain.METHODS."""

    keep_best = True
    lr, weight_decay = 3.6e-4, 1e-5
    optimizer = MedSASS.optimizer
    before_step = MedSASS.before_step       # the rate is constant
    after_backward = MedSASS.after_backward
    after_step = MedSASS.after_step

    def __init__(self, backbone, img_size, classes, has_layer4=False):
        super().__init__()
        self.is_vit = backbone == "vit_small"
        self.stage = "tokens" if self.is_vit else "layer4" if has_layer4 else "layer2"
        if self.is_vit:
            self.encoder = build_unet(backbone, img_size).encoder
        else:
            self.encoder = timm.create_model("resnet50", features_only=True,
                                             out_indices=[int(self.stage[-1])])
        self.encoder.requires_grad_(False)
        width = dict(tokens=384, layer2=512, layer4=2048)[self.stage]
        self.linear = nn.Linear(width, classes)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    def logits(self, images):
        """Return float (B, C) of uint8 (B, 3, S, S)."""
        x = normalise(images)
        if self.is_vit:
            return self.linear(self.encoder.forward_features(x)[:, 1:].mean(dim=1))
        return self.linear(self.encoder(x)[0].mean(dim=(2, 3)))

    def forward(self, views):
        images, target = views
        return focal_cross_entropy(self.logits(images), target)

    def health(self):
        return {}

    def samples(self, views):
        return {"image": views[0]}


def choose_labels(job, classes=()):
    """Return the labelled images of --labels, a list of (part, row) of train and val, and how many
    images an epoch has: as many as there are, so that every method has the same steps.

    A count is a fraction of the training images that have a mask, or a label among `classes`; as
    large a fraction of the validation images goes with them. Exits if there are too few.
    """
    fraction = job.args.labels
    labels = []
    epoch_size = 0
    for part in ("train", "val"):
        names = read_names(job.data, part)
        masks = open_part(job.data, part)[1]
        if classes:
            rows = [k for k, row in enumerate(names) if row["label"]]
        elif masks is None:
            sys.exit(f"{job.data} has no {part} masks: {job.args.protocol} needs them")
        else:
            rows = range(len(masks))
        epoch_size += len(rows) if classes else len(names)
        if fraction > len(rows) and part == "train":
            sys.exit(f"--labels {fraction}: {job.data} has {len(rows)} training images of which "
                     f"the {'class' if classes else 'mask'} is known")
        if isinstance(fraction, int):
            fraction /= len(rows)
        rows = labelled_rows(names, rows, fraction, job.head["seed"])
        labels += [(part, row) for row in rows]
        job.head[f"n_labels_{part}"] = len(rows)
        empty = 0 if classes else sum(not masks[row].any() for row in rows)
        print(f"{len(rows)} {part} images are labelled, {empty} of them without foreground")
    return labels, epoch_size


def mask_sets(job, labels, epoch_size):
    """Return the ImageSets of labelled images, (part, row), with their masks. Training and
    validation part are both trained on: nothing is chosen or stopped by them. The same images,
    un-augmented, are logged as validation."""
    seed = job.head["seed"]
    return pretrain.ImageSets(
        train=Images(job.data, labels, pretrain.paper_augmentation(), seed, job.data),
        plain=Images(job.data, labels, v2.Identity(), seed),
        val=Images(job.data, labels, v2.Identity(), seed, job.data),
        epoch_size=epoch_size)


def fit(method, sets, job, epochs, subfolder=""):
    """Train `method` on ImageSets by pretrain.py's loop in a run folder of its own, or go on with
    what is there; then it has the weights that are kept. Returns the number of steps."""
    args, folder = job.args, job.folder / subfolder
    patience = 5 if method.keep_best else 0
    begun = read_json(folder / "config.json")
    amp = pretrain.pick_precision(args.amp, job.device, method, begun)
    options = pretrain.Options(epochs, args.batch_size, patience, job.head["seed"], amp,
                               args.workers)
    settings = training_settings(job, method) | dict(epochs=epochs, amp=amp)
    pretrain.open_run(settings, folder, job.command, overwrite=False)
    if not pretrain.is_complete(folder):
        pretrain.train(method, sets, options, folder, job.device)
        pretrain.finish_run(method, sets, options.seed, folder, job.device)
    kept = load_checkpoint(folder / "best.pt", "cpu")
    getattr(method, "unet", method).load_state_dict(kept["model"])
    return epochs * len(pretrain.Batches(len(sets.train), args.batch_size,
                                         epoch_size=sets.epoch_size))


def training_settings(job, method):
    """Return what the config.json of a training on labels says, a dict."""
    train_part = "encoder" if job.head["protocol"] == "classify" else "end2end"
    return job.head | dict(
        variant=f"{job.head['variant']}-{job.folder.name}", train=train_part, lr=method.lr,
        batch_size=job.args.batch_size, weight_decay=method.weight_decay,
        weights=str(job.weights), run=job.run)


def halve(job, labels):
    """Return labelled images, (part, row), as two lists of half of their groups in a seeded order;
    the first is empty if they are of one group."""
    groups = collections.defaultdict(list)
    group_of = {part: groups_of(read_names(job.data, part)) for part in ("train", "val")}
    for part, row in labels:
        groups[group_of[part][row]].append((part, row))
    generator = np.random.default_rng(seed_from(job.head["seed"], FOLDS_SEED))
    order = generator.permutation(sorted(groups)).tolist()
    middle = len(order) // 2
    folds = []
    for half in (order[:middle], order[middle:]):
        folds.append([label for group in half for label in groups[group]])
    return folds


def fit_semi(method, labels, epoch_size, job, epochs):
    """Average the weights of the network before and after it is tuned on all labels (Wortsman et
    al. 2022). How much of each is said by two folds of the labels: tuned on one for half of the
    epochs, scored on the other. Returns the result, a dict; the run folder has the network."""
    pretrained = load_checkpoint(job.weights, "cpu")["model"]
    plain = Images(job.data, pretrain.rows_of(job.data, "train"), v2.Identity(), 0)
    loader = pretrain.make_loader(plain, pretrain.Batches(len(plain), BATCH, job.head["seed"]), 0)
    arrays = {part: open_part(job.data, part) for part in ("train", "val")}

    def tune(labels, epochs, subfolder):
        method.unet.load_state_dict(pretrained)
        steps = fit(method, mask_sets(job, labels, epoch_size), job, epochs, subfolder)
        return steps, load_checkpoint(job.folder / subfolder / "best.pt", "cpu")["model"]

    def load_average(tuned, weight):        # BatchNorm settles on all training images
        average = pretrained.copy()
        for name, value in pretrained.items():
            if value.is_floating_point():
                average[name] = value.lerp(tuned[name], weight)
        method.unet.load_state_dict(average)
        pretrain.update_batchnorm(method, loader, job.device)
        method.eval()

    result, weight = {}, 0.5                # of one group: nothing can be said
    folds = halve(job, labels)
    if folds[0]:
        counts = np.zeros((len(WEIGHTS), 4), np.int64)
        for k, (fold, other) in enumerate((folds, folds[::-1]), 1):
            steps, tuned = tune(fold, max(1, epochs // 2), f"fold{k}")
            for w, total in zip(WEIGHTS, counts, strict=True):
                load_average(tuned, w)
                shown = (arrays[part][0][row] for part, row in other)
                predicted = predict_masks(method.unet, shown, job.device)
                for pred, (part, row) in zip(predicted, other, strict=True):
                    total += count_pixels(pred, arrays[part][1][row] > 0)
        scores = scores_from_counts(counts)["iou"]
        weight = WEIGHTS[scores.argmax()]   # of equals the smallest
        result = dict(fold_scores=dict(zip(map(str, WEIGHTS), scores.tolist(), strict=True)),
                      fold_labels=[len(fold) for fold in folds], fold_steps=steps)
    steps, tuned = tune(labels, epochs, "tuned")
    load_average(tuned, weight)
    shown = [f"{w}: {score:.3f}" for w, score in result.get("fold_scores", {}).items()]
    print(f"semi: the average has {weight} of the tuned network. IoU on labelled images that were "
          f"not trained on, by that weight: {', '.join(shown) or 'one image or group only'}")
    settings = training_settings(job, method)
    pretrain.open_run(settings, job.folder, job.command, overwrite=False)
    with new_file(job.folder / "best.pt") as file:
        torch.save(dict(epoch=epochs, weight=weight, model=method.unet.state_dict()), file)
    sheet = (job.folder / "tuned" / "samples.png").read_bytes()
    with new_file(job.folder / "samples.png") as file:      # the last file of a run
        file.write(sheet)
    return result | dict(weight=weight, budget_steps=steps)


# --------------------------------------------------------------------------------------- protocols

def refinement_of(job, parts):
    """Return the Refinement of a job's data set, and the evidence for it."""
    training, _ = open_part(job.data, "train")
    return pretrain.decide_refinement(training, job.head["foreground"], parts)


def best_median_worst(unet, images, masks, names, iou, job):
    """Return a sheet as the paper's Table 6: image, pseudo-mask, prediction, truth, of the test
    images of best, median and worst IoU."""
    head = job.head
    order = np.argsort(-iou, kind="stable")
    three = order[[0, len(order) // 2, -1]]
    shown = np.array(images[three])
    raw = pretrain.pseudo_mask(shown, head["threshold"], head["foreground"])
    columns = {"image": shown, head["threshold"]: raw}
    if head["refine"]:
        refinement, _ = refinement_of(job, head["refine"])
        columns["refined mask"] = refinement.refine_masks(shown)
    columns["prediction"] = predict_masks(unet, shown, job.device, job.args.flips)
    columns["truth"] = masks[three]
    captions = []
    for title, k in zip(("best", "median", "worst"), three, strict=True):
        captions.append(f"{title}: IoU {iou[k]:.4f}   {names[k]['name']}")
    rows = list(zip(*columns.values(), strict=True))
    return prepare_data.contact_sheet(rows, list(columns), captions)


def segment(job):
    """Train, if the protocol is frozen, finetune, semi or supervised, and score the network on the
    test part. Returns the result, the rows of its CSV, and the qualitative sheet."""
    args, seed = job.args, job.head["seed"]
    backbone, size = job.head["backbone"], job.head["img_size"]
    images, masks, names = open_test(job.data)
    torch.manual_seed(seed_from(seed, DECODER_SEED))        # not the one that pre-training had
    part = "decoder" if args.protocol == "frozen" else "end2end"
    with exit_on_value_error():
        method = FineTuning(backbone, size, train_part=part)
    if job.weights:
        load_weights(method.unet, job.weights, job.decoder)
    else:           # the encoder that pre-training starts from: all else is as in fine-tuning one
        torch.manual_seed(seed_from(seed))
        method.unet.encoder.load_state_dict(build_unet(backbone, size).encoder.state_dict())
    if job.decoder == "fresh":
        method.lr = 1e-3
    if args.lr is not None:
        method.lr = args.lr
    method.to(job.device, memory_format=torch.channels_last)
    result = {}
    if args.protocol in LABEL_PROTOCOLS:
        labels, epoch_size = choose_labels(job)
        if args.protocol == "semi":
            result = fit_semi(method, labels, epoch_size, job, args.epochs)
        else:
            sets = mask_sets(job, labels, epoch_size)
            result = dict(budget_steps=fit(method, sets, job, args.epochs))
    unet = method.unet.eval()
    counts = count_masks(predict_masks(unet, images, job.device, args.flips), masks)
    iou = scores_from_counts(counts)["iou"]
    sheet = best_median_worst(unet, images, masks, names, iou, job)
    result |= dict(n_test=len(names)) | summarise(counts, groups_of(names))
    return result, image_rows("", counts, names), sheet


def best_constant(masks):
    """Return the part of the mean training mask with the best IoU over the training part, uint8
    (N, S, S), when it is predicted for every image: bool (S, S)."""
    counts = sum(mask.astype(np.int64) for mask in masks)       # (S, S): images with foreground
    ranked = np.sort(counts, axis=None)[::-1]
    pixels = np.arange(1, ranked.size + 1)  # that the mask has, from the most frequent on
    hits = np.cumsum(ranked)
    iou = hits / (len(masks) * pixels + ranked.sum() - hits)
    return counts >= max(ranked[iou.argmax()], 1)


def reference(job):
    """Score what needs no training on the same test images: REFERENCE. Only best_constant uses
    labels; refined_trusted is of the better ones of the test images' refined masks alone. Returns
    the result, the rows of its CSV, and no sheet."""
    head = job.head
    images, masks, names = open_test(job.data)
    torch.manual_seed(seed_from(head["seed"]))      # the very weights that pre-training starts from
    with exit_on_value_error():
        unet = build_unet(head["backbone"], head["img_size"])
    unet = unet.to(job.device, memory_format=torch.channels_last).eval()
    refinement, evidence = refinement_of(job, pretrain.REFINEMENTS)
    is_trusted, _ = refinement.choose_trusted(images)
    other = "dark" if head["foreground"] == "bright" else "bright"
    training_masks = open_part(job.data, "train")[1]

    def everywhere(mask):
        return np.broadcast_to(mask, masks.shape)

    def thresholded(foreground):            # an image of one gray value: no foreground either way
        for image in images:
            yield pretrain.pseudo_mask(image[None], "otsu", foreground)[0] > 0

    predicted = dict(
        all_foreground=everywhere(True),
        all_background=everywhere(False),
        raw_threshold=thresholded(head["foreground"]),
        raw_threshold_inverted=thresholded(other),
        refined_threshold=refinement.refine_masks(images),
        random_init=predict_masks(unet, images, job.device))
    if training_masks is not None:
        predicted["best_constant"] = everywhere(best_constant(training_masks))
    counts = {name: count_masks(pred, masks) for name, pred in predicted.items()}
    counts["refined_trusted"] = counts["refined_threshold"][is_trusted]
    result = dict(n_test=len(names))
    rows = []
    for name, table in counts.items():
        shown = names
        if name == "refined_trusted":
            shown = [names[k] for k in np.flatnonzero(is_trusted)]
        result[name] = dict(n_test=len(shown)) | summarise(table, groups_of(shown))
        rows += image_rows(name, table, shown)
    result["refined_threshold"] |= evidence
    if "best_constant" in result:
        result["best_constant"]["uses_labels"] = True
    return result, rows, None


def classes_of(data):
    """Return the labels in the CSVs of a data set, sorted; exit if a probe cannot be trained."""
    train, val, test = [{row["label"] for row in read_names(data, part)} - {""}
                        for part in prepare_data.PARTS]
    if len(train) < 2 or not val or not test or not train >= val | test:
        sys.exit(f"{data}: classify needs at least two labels in train.csv, and the same ones in "
                 "val.csv and test.csv")
    return sorted(train)


def classify(job):
    """Train a linear probe on the encoder and score it: recall of each class, their mean, and the
    confusion matrix. Returns the result, rows of (label, prediction) of the test images, and no
    sheet."""
    size, backbone = job.head["img_size"], job.head["backbone"]
    classes = classes_of(job.data)
    torch.manual_seed(seed_from(job.head["seed"], PROBE_SEED))
    with exit_on_value_error():
        has_layer4 = "layer4.0.conv1.weight" in read_encoder(job.weights, backbone)
        probe = Probe(backbone, size, len(classes), has_layer4)
        load_encoder(probe, job.weights)
    if job.args.lr is not None:
        probe.lr = job.args.lr
    probe.to(job.device, memory_format=torch.channels_last)
    labels, epoch_size = choose_labels(job, classes)
    numbers = {}
    for part in prepare_data.PARTS:
        for row, name in enumerate(read_names(job.data, part)):
            if name["label"]:
                numbers[part, row] = classes.index(name["label"])
    seed = job.head["seed"]
    train = [(part, row) for part, row in labels if part == "train"]
    val = [(part, row) for part, row in labels if part == "val"]
    sets = pretrain.ImageSets(
        train=Images(job.data, train, pretrain.paper_augmentation(), seed, numbers),
        plain=Images(job.data, train, v2.Identity(), seed),
        val=Images(job.data, val, v2.Identity(), seed, numbers),
        epoch_size=epoch_size)
    result = dict(budget_steps=fit(probe, sets, job, job.args.epochs))
    probe.eval()
    images, _ = open_part(job.data, "test")
    names = read_names(job.data, "test")
    labelled = [row for part, row in numbers if part == "test"]
    pred = []
    with torch.inference_mode():
        for start in range(0, len(labelled), BATCH):
            batch = torch.from_numpy(images[labelled[start:start + BATCH]]).permute(0, 3, 1, 2)
            pred += probe.logits(batch.to(job.device)).argmax(dim=1).tolist()
    names = [names[row] for row in labelled]
    truth = [numbers["test", row] for row in labelled]
    result |= dict(n_test=len(names), classes=classes, stage=probe.stage)
    result |= class_scores(np.array(truth), np.array(pred), len(classes))
    rows = [row | dict(prediction=classes[k]) for row, k in zip(names, pred, strict=True)]
    return result, rows, None


def class_scores(truth, pred, n_classes):
    """Return scores of int (N,) twice, a dict: macro_recall, the mean over the classes that the
    test part has; accuracy, and that of always saying the commonest class; confusion, truth by
    rows."""
    confusion = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(confusion, (truth, pred), 1)
    images = confusion.sum(axis=1)          # of each class
    recall = confusion.diagonal()[images > 0] / images[images > 0]
    return dict(macro_recall=float(recall.mean()), accuracy=float((truth == pred).mean()),
                majority_accuracy=float(images.max() / len(truth)), confusion=confusion.tolist())


def image_rows(row, counts, names):
    """Return the lines of a CSV, dicts: what each picture scored by itself, (N, 4), in a `row`."""
    scores = scores_from_counts(counts)
    lines = []
    for k, image in enumerate(names):
        line = dict(row=row, name=image["name"], group=image["group"])
        line |= dict(zip(COUNTS, counts[k], strict=True))
        line |= {name: f"{value[k]:.6g}" for name, value in scores.items()}
        lines.append(line)
    return lines


def evaluate(job):
    """Run one protocol, print its scores, write its JSON, the CSV of its test images, and its
    picture, in the place of those of the same name."""
    head = job.head
    path = Path(job.args.out or "results", head["dataset"], head["backbone"], head["variant"],
                f"seed{head['seed']}", f"{head['name']}.json")
    if job.args.overwrite and head["protocol"] in LABEL_PROTOCOLS and job.folder.exists():
        shutil.rmtree(job.folder)
    protocol = dict(reference=reference, classify=classify).get(head["protocol"], segment)
    result, rows, sheet = protocol(job)
    result = head | result | dict(run=job.run, command=job.command)
    if sheet is not None:
        prepare_data.write_png(path.with_suffix(".png"), sheet)
    prepare_data.write_csv(path.with_suffix(".csv"), rows)
    write_json(path, result)
    for name, block in score_blocks(result).items():
        shown = [f"{score} {block[score]:.4f}" for score in PRINTED if score in block]
        print(name or result["variant"], *shown)
    print(path)


# ---------------------------------------------------------------------------------------- predict

def predict_tiled(unet, image, tile, size, device, flips=False):
    """Return the mask of uint8 (H, W, 3), however large, a bool (H, W). Windows of tile x tile
    pixels, each resized to the `size` that the network was trained at, overlap by half; their
    logits are weighted by sin ** 2 towards the middle and summed: the mask is where the sum is
    positive. Memory beyond picture and mask: one row of windows."""
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
        for x, logits in zip(columns, predict_each(unet, windows, device, flips), strict=True):
            logits = cv2.resize(logits, (tile, tile), interpolation=cv2.INTER_LINEAR)
            band[:, x:x + tile] += logits * weight
        done = following - y
        mask[y:following] = band[:done] > 0
        band = np.roll(band, -done, axis=0)
        band[tile - done:] = 0
    return mask[:height, :width]


def whole_network(run):
    """Return the U-Net of a run folder, in eval mode, and the run's settings; exit if only an
    encoder was trained."""
    settings = read_run(run)
    if settings["train"] != "end2end":
        sys.exit(f"{run} has an encoder only, and nobody trained its decoder")
    unet = build_unet(settings["backbone"], settings["img_size"])
    load_weights(unet, run / "best.pt", "pretrained")
    return unet.eval().requires_grad_(False), settings


def predict_folder(args):
    """Write a mask, PNG 0 / 255, for every image below a folder, upright and at its own size, under
    its name (see prepare_data.find_files); a CSV with each foreground fraction; with --overlay also
    pictures. A bad file is named, the others are done, the exit code is 1."""
    source = Path(args.predict)
    out = Path(args.out)
    device = pretrain.pick_device(args.device)
    if out.resolve().is_relative_to(source.resolve()):
        sys.exit(f"{out}: lies in {source}, where its masks could overwrite images or pass for "
                 "some: give another --out")
    if out.exists() and any(out.iterdir()) and not args.overwrite:
        sys.exit(f"{out} is not empty: give another --out, or --overwrite")
    files = prepare_data.find_files(source, match=False)
    if args.overlay and any(name.startswith("overlay/") for name in files.images):
        sys.exit(f"{source}: has a folder overlay, whose masks --overlay would overwrite")
    unet, settings = whole_network(Path(args.run))
    unet = unet.to(device, memory_format=torch.channels_last)
    size = settings["img_size"]
    rows, several_pages = [], []
    bad = files.bad
    for name, path in tqdm(files.images.items(), "predict", unit=" images"):
        try:
            picture = prepare_data.read_picture(path, args.page)
            image = prepare_data.to_rgb(picture)
        except ValueError as error:
            bad.append(str(error))
            continue
        if picture.pages > 1:
            several_pages.append(path)
        if args.tile is not None:
            mask = predict_tiled(unet, image, args.tile or size, size, device, args.flips)
        else:
            small = prepare_data.resize(image, size)[None]
            logits = predict_logits(unet, small, device, args.flips)[0]
            mask = cv2.resize(logits, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) > 0
        prepare_data.write_png(out / f"{name}.png", mask.astype(np.uint8) * 255)
        if args.overlay:
            red = cv2.addWeighted(image, 0.6, np.full_like(image, (255, 0, 0)), 0.4, 0)
            overlay = np.where(mask[..., None], red, image)
            prepare_data.write_png(out / "overlay" / f"{name}.png", overlay)
        relative = path.relative_to(source).as_posix()
        rows.append(dict(name=relative, foreground_fraction=f"{mask.mean():.6f}"))
    prepare_data.print_count(several_pages, "files have several pages or frames: page "
                             f"{args.page} is taken, counted from 0")
    if rows:
        prepare_data.write_csv(out / "foreground.csv", rows)
    print(f"{out}: {len(rows)} masks, and foreground.csv")
    if bad:
        sys.exit("\n".join(bad) + f"\n{len(bad)} bad file(s), listed above, have no mask")


class Exported(nn.Module):
    """A U-Net with its normalisation inside: uint8 RGB (B, 3, S, S) -> float32 (B, 1, S, S), the
    probability of foreground."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        self.register_buffer("mean", pretrain.MEAN)
        self.register_buffer("std", pretrain.STD)

    def forward(self, images):
        return torch.sigmoid(self.unet((images / 255 - self.mean) / self.std))


def export_network(args):
    """Write a run's network as one file that needs none of this code (torch.export, .pt2), for any
    number of images of the run's size; that and the polarity are in its network.json."""
    path = Path(args.export)
    if path.exists() and not args.overwrite:
        sys.exit(f"{path} would be overwritten: give another --export, or --overwrite")
    unet, settings = whole_network(Path(args.run))
    size = settings["img_size"]
    about = dict(size=size, foreground=settings["foreground"], dataset=settings["dataset"],
                 input="uint8 RGB (B, 3, size, size)",
                 output="float32 (B, 1, size, size), probability of foreground")
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    any_number = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(Exported(unet), (images,), dynamic_shapes=any_number)
    content = io.BytesIO()                  # torch aborts on a full disk
    torch.export.save(program, content, extra_files={"network.json": json.dumps(about)})
    with new_file(path) as file:
        file.write(content.getbuffer())
    print(f"{path}: {about}")


# ----------------------------------------------------------------------------------------- report

PRINTED = ("macro_recall", "iou_global", "iou_image", "accuracy")
PAPER_SETS = ("dm", "tissuenet", "isic", "xray")
# Test IoU in the paper: Tables 1 and 2, encoder only, and Figures 3 and 4, end to end.
PAPER = {
    "byol: transfer": (0.1278, 0.3455, 0.2412, 0.2185),
    "dino: transfer": (0.1399, 0.2972, 0.2426, 0.2052),
    "simsiam: transfer": (0.1415, 0.3021, 0.2395, 0.1939),
    "medsass-encoder: transfer": (0.1742, 0.3824, 0.2445, 0.2568),
    "dino: transfer (vit_small)": (0.1668, 0.2483, 0.1891, 0.2106),
    "mae: transfer (vit_small)": (0.1668, 0.3455, 0.1910, 0.2106),
    "simmim: transfer (vit_small)": (0.1670, 0.3335, 0.1913, 0.2077),
    "medsass-encoder: transfer (vit_small)": (0.1360, 0.3633, 0.1914, 0.2466),
    "medsass: transfer": (0.1810, 0.5077, 0.4847, 0.3522),
}


def score_blocks(result):
    """Return the blocks of scores of a result: {reference row: block}, or {"": the result}."""
    if result["protocol"] != "reference":
        return {"": result}
    return {name: result[name] for name in REFERENCE if name in result}


def read_result(path):
    """Return the rows of a JSON of evaluate and the CSV beside it: what one network, or one
    reference row, scored with one seed, a dict. It has the JSON and its scores side by side, and
    title, used (labels, in words), groups of the test images, and, unless it is of a probe, their
    counts, float (N, 4). Raises KeyError, ValueError and the like if the file is no result."""
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = prepare_data.read_csv(path.with_suffix(".csv"))
    rows = []
    for name, block in score_blocks(result).items():
        row = result | block
        images = [line for line in lines if line.get("row", "") == name]
        if len(images) != row["n_test"]:
            raise ValueError(f"{len(images)} images in its CSV")
        row["groups"] = groups_of(images)
        row["used"] = "0"
        if row["n_test"] < result["n_test"]:            # refined_trusted: of some images only
            row["used"] = f"0, {row['n_test']} images"
        if row["n_labels_train"]:
            row["used"] = f"{row['n_labels_train']} + {row['n_labels_val']}"
        if "uses_labels" in block:
            row["used"] = "all"
        row["title"] = name or f"{row['variant']}: {row['name']}"
        if name in ("", "random_init") and row["backbone"] != "resnet50":
            row["title"] += f" ({row['backbone']})"
        if row["protocol"] != "classify":
            counts = [[float(line[key]) for key in COUNTS] for line in images]
            row["counts"] = np.array(counts)
        rows.append(row)
    return rows


def group_by_seed(rows):
    """Return rows grouped by all but their seed: a list of dicts, references first, then by labels
    and title. A cell is the row of its first seed and has all its `rows`; unless it is of a probe
    also samples, float (2000,), the bootstrap of the mean over seeds of the global IoU."""
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


def mean_of(cell):
    """Return the mean over seeds of a cell's global IoU."""
    return float(np.mean([row["iou_global"] for row in cell["rows"]]))


def mean_std(cell, score="iou_global"):
    """Return a cell's "mean ± std (seeds)" of a score; std (n - 1) only if there are several."""
    values = [row[score] for row in cell["rows"]]
    text = f"{np.mean(values):.4f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.4f}"
    return f"{text} ({len(values)})"


def difference(cell, other):
    """Return the paired difference of two cells in words: "+0.0123 [-0.0045, +0.0291] ≈"; ≈ if the
    interval holds 0. Empty if there is no other, or it is the same. The same resampled images are
    scored for both: what is hard for all cancels (Efron & Tibshirani 1993)."""
    if other is None or other is cell or other["groups"] != cell["groups"]:
        return ""
    low, high = interval(cell["samples"] - other["samples"])
    sign = " ≈" if low <= 0 <= high else ""
    return f"{mean_of(cell) - mean_of(other):+.4f} [{low:+.4f}, {high:+.4f}]{sign}"


def markdown(header, rows):
    """Return the lines of a table, a blank one before it."""
    lines = [""]
    for cells in (header, ["---"] * len(header), *rows):
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def best_of(cells, key, **wanted):
    """Return, of the cells that have what is wanted, that of the largest key, or None."""
    found = [cell for cell in cells if wanted.items() <= cell.items()]
    return max(found, key=key, default=None)


def dataset_table(cells):
    """Return the lines of a data set's table: every cell but the probes."""
    def labels_and_steps(cell):
        return cell["n_labels_train"], cell["budget_steps"]

    best = best_of(cells, mean_of, protocol="reference", used="0")      # it costs nothing
    rows = []
    for cell in cells:
        low, high = interval(cell["samples"])
        supervised = best_of(cells, labels_and_steps, protocol="supervised",
                             backbone=cell["backbone"])
        paper = dict(zip(PAPER_SETS, PAPER.get(cell["title"], ()), strict=False))
        rows.append([
            cell["title"], cell["used"], mean_std(cell), f"{low:.4f} - {high:.4f}",
            difference(cell, best), difference(cell, supervised),
            str(paper.get(cell["dataset"], ""))])
    header = ["network", "labels", "IoU, mean ± std (seeds)", "95 % interval",
              f"vs {best['title']}" if best else "vs best reference",
              "vs supervised, most labels", "paper"]
    return markdown(header, rows)


def probe_table(cells):
    """Return the lines of the table of linear probes."""
    rows = []
    for cell in cells:
        rows.append([cell["title"], cell["used"], cell["stage"], mean_std(cell, "macro_recall"),
                     mean_std(cell, "accuracy"), f"{cell['majority_accuracy']:.4f}"])
    header = ["network", "labels", "stage", "mean recall over classes", "accuracy",
              "accuracy of the majority class"]
    return markdown(header, rows)


def write_chart(cells, path):
    """Write a PNG, in gray: IoU against the labels used, with 95 % intervals; networks that saw
    none at 0, the best reference rows without and with labels as lines."""
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
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=100)


def dataset_section(title, cells, out):
    """Return the lines of a data set: its tables, and its chart, which is written into `out`."""
    scored = [cell for cell in cells if cell["protocol"] != "classify"]
    probes = [cell for cell in cells if cell["protocol"] == "classify"]
    lines = ["", f"## {title}"]
    if scored:
        first = scored[0]
        lines += ["", f"{first['n_test']} test images of {first['img_size']} px in "
                  f"{len(set(first['groups']))} groups.", *dataset_table(scored)]
        if importlib.util.find_spec("matplotlib"):
            write_chart(scored, out / f"{title}.png")
            lines += ["", f"![{title}]({urllib.parse.quote(title)}.png)"]
        else:
            print(f"{title}: no chart: matplotlib is not installed (pip install matplotlib)")
    if probes:
        lines += ["", "Linear probes:", *probe_table(probes)]
    return lines


def report(out):
    """Write README.md and one chart per data set under `out` from every result there; a JSON that
    is no result is named and left out. Exits if there is none."""
    rows = []
    bad = []
    for path in sorted(out.rglob("*.json")):
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
        "+ validation images whose masks or classes were used. ≈: the interval of the paired "
        "difference contains 0: no difference is shown. paper: its Tables 1 and 2, Figures 3, 4.",
        "",
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
        same = [cell for cell in cells if (cell["dataset"], cell["data"]) == (dataset, data)]
        lines += dataset_section(title, same, out)
    printed = "\n".join(lines)
    lines += ["", "## Commands", "", "Of the first seed of each row.", "", "```"]
    lines += dict.fromkeys(cell["command"] for cell in cells)       # each once
    lines += ["```", ""]
    path = out / "README.md"
    with new_file(path) as file:
        file.write("\n".join(lines).encode())
    print(f"{printed}\n{path}: {len(rows)} rows, {len(bad)} warnings")


# ------------------------------------------------------------------------------------------ flags

def share_or_count(text):
    """Return --labels: with a point a share in (0, 1], without a count from 1 up."""
    value = float(text) if "." in text else int(text)
    if value <= 0 or "." in text and value > 1:
        raise argparse.ArgumentTypeError(f"{text} is neither a share up to 1.0 (with a point) nor "
                                         "a count from 1 (without)")
    return value


# Flags that change what is computed, and what stands before their value in a result's name.
NAME_FLAGS = dict(labels="l", epochs="e", batch_size="b", lr="lr", amp="")


def parse_args(argv):
    """Return the flags, and the name that protocol and flags give to a result. Exits if they
    contradict each other or numbers make no sense."""
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
        help="a prepared data set. Default: the one that --run was trained on")
    add("--backbone", choices=BACKBONES, help="without --run: the network")
    add("--protocol", default="transfer", choices=["transfer", *LABEL_PROTOCOLS, "reference"],
        help="what to do before scoring")
    add("--labels", type=share_or_count, default=1.0,
        help="labelled training images: 0.1 is a share of those that have a mask or class, 10 a "
        "count; the same share of the validation images goes with them, and is trained on, too")
    add("--epochs", type=int, default=50,
        help="of training on labels (appendices C, D); an epoch has the steps of all training "
        "images, however few are labelled")
    add("--lr", type=float,
        help="peak rate of Adam. Default: 1e-3 with a fresh decoder, else 3.6e-4")
    add("--seed", type=int, help="of fresh weights, labels, order. Default: the run's, or 0")
    pretrain.add_training_flags(add)
    add("--flips", action="store_true", help="predict with the mean over a picture's four flips")
    instead.add_argument("--predict",
        help="write masks for the images of this folder; needs --run, --out")
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
    add("--runs", default="runs", help="where training on labels without --run is kept")
    add("--out", help="folder for results (default: results), or with --predict for masks")
    add("--overwrite", action="store_true", help="replace trainings or masks that are there")
    args = parser.parse_args(argv)
    if args.report:
        return args, ""
    prepare_data.check_numbers(parser, args, epochs=1, batch_size=1, lr=0, seed=0, workers=0,
                               page=0)
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
    unused = []
    if not scores or args.protocol not in LABEL_PROTOCOLS:
        unused += [*NAME_FLAGS, "workers"]
    if not scores:
        unused += ["dataset", "protocol", "seed"]
    if not args.predict:
        unused += ["overlay", "tile", "page"]
    if args.run:
        unused += ["backbone"]
    if args.export or args.protocol in ("classify", "reference"):
        unused += ["flips"]
    args = prepare_data.drop_unused(parser, args, unused)
    return args, args.protocol + prepare_data.name_suffix(parser, args, NAME_FLAGS)


def main(argv=None):
    args, name = parse_args(argv)
    flags = sys.argv[1:] if argv is None else argv
    if args.report:
        report(Path(args.out or "results"))
    elif args.export:
        export_network(args)
    elif args.predict:
        predict_folder(args)
    else:
        evaluate(make_job(args, name, shlex.join(["python", "finetune_eval.py", *flags])))


if __name__ == "__main__":
    prepare_data.run_script(
        main, "the same command goes on (--predict needs --overwrite, or another --out)")
