"""Score a network on held-out images, optionally after training on labels, or write its masks for
a folder of images.

    python finetune_eval.py --run runs/demo/resnet50/medsass+-e16/seed0         # below: RUN
    python finetune_eval.py --run RUN --protocol finetune --labels 0.1
    python finetune_eval.py --dataset demo --backbone resnet50 --protocol supervised
    python finetune_eval.py --dataset demo --backbone resnet50 --protocol reference
    python finetune_eval.py --encoder encoder.pth --dataset isic --backbone vit_small
    python finetune_eval.py --run RUN --predict my_images --out masks
    python finetune_eval.py --run RUN --export network.pt2
    python finetune_eval.py --report

transfer: the network as it is, or an encoder with a fresh, seeded decoder (section 4.1). frozen:
the decoder is trained, the encoder stays. finetune: all is trained. semi: an average of the weights
before and after finetune. supervised: all is trained, from scratch. classify: a linear probe on the
encoder's features (appendix D). reference: what needs no training, on the same test images. One
JSON per evaluation, under results/, with a CSV of its test images; --report makes a table of them.
"""

import argparse
import collections
import csv
import hashlib
import io
import itertools
import json
import math
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.nn as nn
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

import prepare_data
import pretrain
from losses import focal_cross_entropy
from models import BACKBONES, build_unet, load_encoder, read_encoder
from prepare_data import new_file, open_part, read_csv, read_json, resize, write_csv, write_json
from pretrain import Batches, Images, MedSASS, exit_on_value_error, load_checkpoint, seed_from

BATCH = 16                                  # test images at a time; no score depends on it
LABEL_PROTOCOLS = ("frozen", "finetune", "semi", "supervised", "classify")     # that train
COUNTS = ("tp", "fp", "fn", "tn")
MIDDLE = (2.5, 97.5)                        # the middle 95 %, in percentiles
# What random numbers of one seed are for: pre-training's own weights have 0.
DECODER_SEED, LABELS_SEED, PROBE_SEED, FOLDS_SEED = 1, 2, 3, 4
WEIGHTS = (0, 0.25, 0.5, 0.75, 1)           # of the tuned network in the average of semi

# -------------------------------------------------------------------------- metrics (appendix G)
def count_pixels(pred, target):
    """Return the pixels that are tp, fp, fn, tn, of bool (..., H, W) twice: int64 (..., 4)."""
    kinds = [
        pred & target,
        pred & ~target,
        ~pred & target,
        ~pred & ~target]
    return np.stack(kinds, axis=-3).sum(axis=(-2, -1))


def scores_from_counts(counts):
    """Return iou, dice, precision, recall and accuracy of (..., 4) of count_pixels, a dict of float
    (...) in [0, 1]. 0 / 0 is 1 if neither mask has any foreground, and 0 elsewhere."""
    tp, fp, fn, tn = np.moveaxis(counts, -1, 0)
    wrong = fp + fn
    if_empty = np.where(tp + wrong == 0, 1.0, 0.0)
    def ratio(part, whole):
        return np.where(whole > 0, part / np.maximum(whole, 1), if_empty)
    return dict(
        iou=ratio(tp, tp + wrong),
        dice=ratio(2 * tp, 2 * tp + wrong),
        precision=ratio(tp, tp + fp),
        recall=ratio(tp, tp + fn),
        accuracy=ratio(tp + tn, tp + tn + wrong))


def weighted_scores(counts, weights):
    """Return the scores of counts (N, 4) if images count as often as `weights`, (R, N), says: a
    dict of float (R,). "_global": counts summed over the set; "_image": mean over its images."""
    scores = {}
    overall = scores_from_counts(weights @ counts)
    for name, of_image in scores_from_counts(counts).items():
        scores[f"{name}_global"] = overall[name]
        scores[f"{name}_image"] = weights @ of_image / weights.sum(axis=1)
    return scores


def scores_of(counts):
    """Return the scores of counts (N, 4), each image once: a dict of Python's floats."""
    scores = weighted_scores(counts, np.ones((1, len(counts))))
    return {name: value.item() for name, value in scores.items()}


def segmentation_scores(pred, target):
    """Return iou, dice, precision, recall and accuracy of bool ndarrays (N, H, W), a dict; each
    "_global" and "_image" as in weighted_scores. Raises ValueError if shapes or dtypes differ."""
    if pred.shape != target.shape or pred.ndim != 3 or not pred.dtype == target.dtype == bool:
        raise ValueError(f"pred {pred.shape} and target {target.shape} must be bool (N, H, W)")
    return scores_of(count_pixels(pred, target))


def count_masks(predicted, masks):
    """Return count_pixels of an iterable of masks or logits (S, S), foreground if > 0, and the true
    masks, uint8 (N, S, S), which may be mapped: int64 (N, 4)."""
    counts = []
    for pred, mask in zip(tqdm(predicted, "score", len(masks), leave=False), masks, strict=True):
        counts.append(count_pixels(pred > 0, mask > 0))
    return np.array(counts)


def groups_of(names):
    """Return the group of each row of a part's CSV, a list; a row without one is its own group."""
    return [row["group"] or row["name"] for row in names]


def bootstrap_weights(groups):
    """Return how often each image counts in each of 2000 rounds of the bootstrap over groups (Efron
    1979), float (2000, N), whole. groups: that of each image, a list (N,)."""
    _, index = np.unique(groups, return_inverse=True)
    n = index.max() + 1
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=2000)
    return times[:, index].astype(np.float64)


def summarise(counts, names):
    """Return n_test and all scores of (N, 4), a dict; IoU and Dice also with "_ci", their 95 %
    bootstrap interval over groups. names: the images' rows of a CSV."""
    block = dict(n_test=len(names), **scores_of(counts))
    samples = weighted_scores(counts, bootstrap_weights(groups_of(names)))
    for score in ("iou_global", "iou_image", "dice_global", "dice_image"):
        block[f"{score}_ci"] = np.percentile(samples[score], MIDDLE).tolist()
    return block


# ---------------------------------------------------------------------------------- what to do
@dataclass
class Job:
    """One evaluation, as the flags, the run's config.json and the data set decide it."""
    args: argparse.Namespace                # the flags
    protocol: str
    data: Path                              # the prepared data set
    backbone: str
    size: int                               # of its images
    seed: int
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
    """Return the Job that the flags ask for, of this name; exit if it cannot be done."""
    run = read_run(Path(args.run)) if args.run else {}
    data = Path(args.data) / (args.dataset or run["dataset"])
    meta = prepare_data.read_meta(data)
    dataset, size, protocol = data.name, meta["size"], args.protocol
    if protocol != "classify":
        _, masks = open_part(data, "test")
        if masks is None:
            sys.exit(f"{data} has no test masks: nothing can be scored; --predict needs none")
        if not masks.any():
            print(f"{data}: no test mask has any foreground; IoU is 1 if nothing is found, else 0")
    saw_labels = "protocol" in run
    if saw_labels and protocol in LABEL_PROTOCOLS:
        sys.exit(f"{args.run} has seen labels already: give a run of pretrain.py")
    if run.get("dataset") == dataset and run["data"] != meta["fingerprint"]:
        if saw_labels:
            sys.exit(f"{args.run} was trained on another preparation of {dataset}, perhaps on "
                     "images that are test images now: prepare it as it was, or train again")
        print(f"{args.run} saw another preparation of {dataset}: perhaps test images, too")
    # Where the weights are, and whether the decoder has some.
    decoder, weights = "fresh", args.encoder
    if run:
        weights = Path(args.run, "encoder.pth")
    if run.get("train") == "end2end" and protocol in ("transfer", "finetune", "semi"):
        decoder = "pretrained"
        weights = Path(args.run, "best.pt")
        if run["backbone"] == "vit_small" and run["img_size"] != size:
            sys.exit(f"{args.run}: a ViT U-Net needs one size: prepare {dataset} with --size "
                     f"{run['img_size']}")
    elif protocol == "semi":
        sys.exit("semi averages whole networks: it needs a --run of pretrain.py that trained a "
                 f"whole U-Net, and {args.run or args.encoder} is none")
    # What the result says of itself.
    variant = protocol
    if args.encoder:                        # many files are called encoder.pth
        variant = "file-" + args.encoder.strip("/").replace("/", "-")
    head = dict(
        method=variant,
        variant=variant,
        train="encoder" if args.encoder else None,
        backbone=args.backbone,
        labels=0.0,
        foreground=meta["foreground"],
        n_labels_train=0,
        n_labels_val=0,
        seed=0)
    for key in head:
        head[key] = run.get(key, head[key])
    head.update(
        dataset=dataset, protocol=protocol,
        img_size=size, data=meta["fingerprint"])
    if run.get("dataset", dataset) != dataset:
        head["variant"] += f"-from-{run['dataset']}"
        name += f"-on-{dataset}"
    if args.seed is not None and (protocol != "transfer" or decoder == "fresh"):
        head["seed"] = args.seed            # else nothing is random
    if protocol in LABEL_PROTOCOLS:
        head.update(labels=args.labels, decoder=decoder)
    seed = head["seed"]
    backbone = head["backbone"]
    if run and seed != run["seed"]:         # other labels
        name += f"-seed{seed}"
    head["name"] = name + "-flips" * args.flips
    folder = Path("runs", dataset, backbone, head["variant"], f"seed{seed}", name)
    if run:
        folder = Path(args.run, name)
    device = pretrain.pick_device(args.device)
    return Job(args, protocol, data, backbone, size, seed, head, run, weights, decoder, folder,
               device, command)


# ------------------------------------------------------------------------- networks and batches
@torch.inference_mode()
def predict_logits(unet, images, device, flips=False):
    """Return the logits of uint8 ndarray (B, S, S, 3), float32 ndarray (B, S, S), foreground if
    > 0. flips: their mean over the picture as it is, flipped up and down, left and right, both."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)        # channels_last
    batch = pretrain.normalise(batch.to(device))
    logits = unet(batch).float()            # (B, 1, S, S)
    if flips:
        for axes in ((2,), (3,), (2, 3)):
            logits += unet(batch.flip(axes)).float().flip(axes)
        logits /= 4
    return logits[:, 0].cpu().numpy()


def predict_each(unet, images, device, flips=False):
    """Yield the logits, float32 (S, S), of an iterable of uint8 (S, S, 3); one batch is held."""
    images = iter(images)
    while batch := list(itertools.islice(images, BATCH)):
        yield from predict_logits(unet, np.stack(batch), device, flips)


# ----------------------------------------------------------------------------- training on labels
def shuffled_groups(items, job, purpose):
    """Return items, (part, row), as lists, one of each group, in an order of the job's seed."""
    groups_in = {}
    for part in ("train", "val"):
        groups_in[part] = groups_of(read_csv(job.data / f"{part}.csv"))
    groups = collections.defaultdict(list)
    for part, row in items:
        groups[groups_in[part][row]].append((part, row))
    order = np.random.default_rng(seed_from(job.seed, purpose)).permutation(sorted(groups))
    return [groups[group] for group in order.tolist()]


class FineTuning(MedSASS):
    """MedSASS's U-Net, loss and optimiser, with true masks. The paper gives no schedule: the rate
    rises over the first tenth of the steps and falls to 0 by a cosine, and the last weights are
    kept, because all labels are trained on."""

    keep_best = False

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        warm_up = max(1, total_steps // 10)
        factor = (step + 1) / warm_up
        if step >= warm_up:
            done = (step - warm_up) / max(1, total_steps - warm_up)
            factor = 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = self.lr * factor


class Probe(nn.Module):
    """A linear layer on the pooled features of an encoder that stays as it is (appendix D): a ViT's
    patch tokens, or the deepest stage of a ResNet that its file holds, layer2 for MedSASS, else
    layer4. Members: as in every class of pretrain.METHODS."""

    keep_best = True
    lr, weight_decay = 3.6e-4, 1e-5
    optimizer = MedSASS.optimizer
    before_step = MedSASS.before_step       # the rate is constant
    after_backward = MedSASS.after_backward

    def __init__(self, backbone, img_size, classes, has_layer4=False):
        super().__init__()
        self.stage, width = ("layer4", 2048) if has_layer4 else ("layer2", 512)
        if backbone == "vit_small":
            self.stage, width = "tokens", 384
            self.encoder = build_unet(backbone, img_size).encoder
        else:
            self.encoder = timm.create_model("resnet50", features_only=True,
                                             out_indices=[int(self.stage[-1])])
        self.encoder.requires_grad_(False)
        self.linear = nn.Linear(width, classes)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.eval()
        return self

    def logits(self, images):
        """Return float (B, C) of uint8 (B, 3, S, S)."""
        x = pretrain.normalise(images)
        if self.stage == "tokens":
            features = self.encoder.forward_features(x)[:, 1:].mean(dim=1)
        else:
            features = self.encoder(x)[0].mean(dim=(2, 3))
        return self.linear(features)

    def forward(self, views):
        images, target = views
        return focal_cross_entropy(self.logits(images), target)

    def after_step(self, step, total_steps):
        """Keep no moving average."""

    def health(self):
        return {}

    def samples(self, views):
        return {"image": views[0]}


def choose_labels(job, classes=()):
    """Return the labelled images of --labels, a list of (part, row), and how many images an epoch
    has: all, so that every method has the same steps. A count is a fraction of the training images
    that have a mask, or a label among `classes`; the same one of the validation images goes with
    them, at least one. They are the same for every method, nested in the fraction, and of whole
    groups but the last. Exits if there are too few."""
    fraction = job.args.labels
    labels = []
    epoch_size = 0
    for part in ("train", "val"):
        names = read_csv(job.data / f"{part}.csv")
        _, masks = open_part(job.data, part)
        if classes:
            rows = [k for k, row in enumerate(names) if row["label"]]
            epoch_size += len(rows)
        elif masks is None:
            sys.exit(f"{job.data} has no {part} masks: {job.protocol} needs them")
        else:                               # images without a mask stand behind the others
            rows = range(len(masks))
            epoch_size += len(names)
        n = len(rows)
        if fraction > n:
            sys.exit(f"--labels {fraction}: {job.data} has {n} labelled training images")
        if isinstance(fraction, int):
            fraction /= n
        groups = shuffled_groups([(part, row) for row in rows], job, LABELS_SEED)
        chosen = list(itertools.chain(*groups))[:max(1, round(fraction * n))]
        labels += chosen
        job.head[f"n_labels_{part}"] = len(chosen)
        empty = 0
        if not classes:
            empty = sum(not masks[row].any() for _, row in chosen)
        print(f"{len(chosen)} {part} images are labelled, {empty} of them without foreground")
    return labels, epoch_size


def label_sets(job, train, val, epoch_size, targets):
    """Return the ImageSets of labelled images, lists of (part, row), with `targets` as in Images.
    Masks: training and validation part are both trained on, and logged, un-augmented, as `val`."""
    return pretrain.ImageSets(
        train=Images(job.data, train, pretrain.paper_augmentation(), job.seed, targets),
        plain=Images(job.data, train, v2.Identity(), job.seed),
        val=Images(job.data, val, v2.Identity(), job.seed, targets),
        epoch_size=epoch_size)


def fit(method, sets, job, epochs, subfolder=""):
    """Train `method` on ImageSets by pretrain.py's loop in a run folder of its own, or go on with
    what is there; then it has the weights that are kept. Returns the number of steps."""
    args, folder = job.args, job.folder / subfolder
    if args.lr is not None:
        method.lr = args.lr
    patience = 5 if method.keep_best else 0
    begun = read_json(folder / "config.json")
    amp = pretrain.pick_precision(args.amp, job.device, method, begun)
    options = pretrain.Options(epochs, args.batch_size, patience, job.seed, amp, args.workers)
    settings = training_settings(job, method) | dict(epochs=epochs, amp=amp)
    pretrain.open_run(settings, folder, job.command, overwrite=False)
    steps = pretrain.train(method, sets, options, folder, job.device)
    pretrain.finish_run(method, sets, job.seed, folder, job.device)
    return steps


def training_settings(job, method):
    """Return the settings of a training on labels, a dict."""
    return job.head | dict(
        name=job.folder.name,               # without flips, which change no training
        variant=f"{job.head['variant']}-{job.folder.name}",
        train="encoder" if job.protocol == "classify" else "end2end",
        batch_size=job.args.batch_size,
        lr=method.lr,
        weight_decay=method.weight_decay,
        encoder=job.args.encoder,
        run=job.run)


def fit_semi(method, labels, epoch_size, job):
    """Average the weights of the network before and after tuning (Wortsman et al. 2022), as much of
    each as two folds of the labels say: tuned on one for half of the epochs, scored on the other.
    Returns the result, a dict; the run folder has the network."""
    unet, epochs = method.unet, job.args.epochs
    pretrained = load_checkpoint(job.weights, "cpu")["model"]
    def tune(labels, epochs, subfolder):
        unet.load_state_dict(pretrained)
        sets = label_sets(job, labels, labels, epoch_size, job.data)
        steps = fit(method, sets, job, epochs, subfolder)
        return steps, load_checkpoint(job.folder / subfolder / "best.pt", "cpu")["model"]
    def load_average(tuned, weight, labels):        # BatchNorm settles on the images tuned on
        average = pretrained.copy()
        for name, value in pretrained.items():
            if value.is_floating_point():
                average[name] = value.lerp(tuned[name], weight)
        unet.load_state_dict(average)
        plain = label_sets(job, labels, labels, 0, None).plain
        batches = Batches(len(plain), job.args.batch_size, job.seed)
        pretrain.update_batchnorm(method, pretrain.make_loader(plain, batches, 0), job.device)
        method.eval()
    groups = shuffled_groups(labels, job, FOLDS_SEED)
    middle = len(groups) // 2
    chain = itertools.chain.from_iterable
    folds = [*chain(groups[:middle])], [*chain(groups[middle:])]
    result = {}
    weight = 0.5                            # of one group: nothing can be said
    if middle:
        counts = np.zeros((len(WEIGHTS), 4), np.int64)
        for k, fold in enumerate(folds):
            steps, tuned = tune(fold, max(1, epochs // 2), f"fold{k + 1}")
            images, masks = [], []          # of the other fold
            for part, row in folds[1 - k]:
                part_images, part_masks = open_part(job.data, part)
                images.append(part_images[row])
                masks.append(part_masks[row])
            for w, total in zip(WEIGHTS, counts, strict=True):
                load_average(tuned, w, fold)
                total += count_masks(predict_each(unet, images, job.device), masks).sum(axis=0)
        iou = scores_from_counts(counts)["iou"]
        weight = WEIGHTS[iou.argmax()]
        scores = dict(zip(map(str, WEIGHTS), iou.round(4).tolist(), strict=True))
        result = dict(fold_scores=scores, fold_labels=[*map(len, folds)], fold_steps=steps)
        print("semi: IoU on the half of the labels that was not trained on, by the weight of the "
              "tuned network:", scores)
    steps, tuned = tune(labels, epochs, "tuned")
    load_average(tuned, weight, labels)
    print(f"semi: {weight} of the network tuned on all labels, the rest of the one before")
    pretrain.open_run(training_settings(job, method), job.folder, job.command, overwrite=False)
    with new_file(job.folder / "best.pt") as file:
        torch.save(dict(epoch=epochs, weight=weight, model=unet.state_dict()), file)
    return result | dict(weight=weight, budget_steps=steps)


# --------------------------------------------------------------------------------------- protocols
def segment(job):
    """Train, if the protocol is frozen, finetune, semi or supervised, and score the network on the
    test part. Returns the result, the rows of its CSV, and a sheet as the paper's Table 6: image,
    pseudo-mask, prediction, truth, of the test images of best, median and worst IoU."""
    # ===== the network =====
    torch.manual_seed(seed_from(job.seed, DECODER_SEED))    # not the one that pre-training had
    part = "decoder" if job.protocol == "frozen" else "end2end"
    with exit_on_value_error():
        method = FineTuning(job.backbone, job.size, train_part=part)
    unet = method.unet
    if job.decoder == "pretrained":
        unet.load_state_dict(load_checkpoint(job.weights, "cpu")["model"])
    elif job.weights:
        with exit_on_value_error():
            load_encoder(unet, job.weights)
    else:           # the encoder that MedSASS starts from: all else is as in fine-tuning one
        torch.manual_seed(seed_from(job.seed))
        unet.encoder.load_state_dict(build_unet(job.backbone, job.size).encoder.state_dict())
    if job.decoder == "fresh":
        method.lr = 1e-3
    method.to(job.device, memory_format=torch.channels_last)
    # ===== training =====
    result = {}
    if job.protocol in LABEL_PROTOCOLS:
        labels, epoch_size = choose_labels(job)
    if job.protocol == "semi":
        result = fit_semi(method, labels, epoch_size, job)
    elif job.protocol in LABEL_PROTOCOLS:
        sets = label_sets(job, labels, labels, epoch_size, job.data)
        result["budget_steps"] = fit(method, sets, job, job.args.epochs)
    unet.eval()
    # ===== scores =====
    images, masks = open_part(job.data, "test")
    names = read_csv(job.data / "test.csv")
    counts = count_masks(predict_each(unet, images, job.device, job.args.flips), masks)
    iou = scores_from_counts(counts)["iou"]
    # ===== the sheet =====
    threshold = job.run.get("threshold", "otsu")
    order = np.argsort(-iou, kind="stable")
    three = order[[0, len(order) // 2, -1]]
    shown = images[three]
    pseudo_masks = pretrain.pseudo_mask(shown, threshold, job.head["foreground"])
    predicted = predict_each(unet, shown, job.device, job.args.flips)
    rows = list(zip(shown, pseudo_masks, predicted, masks[three], strict=True))
    captions = []
    for title, k in zip(("best", "median", "worst"), three, strict=True):
        captions.append(f"{title}: IoU {iou[k]:.4f}   {names[k]['name']}")
    sheet = prepare_data.contact_sheet(rows, ["image", threshold, "prediction", "truth"], captions)
    return result | summarise(counts, names), image_rows("", counts, names), sheet


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
    """Score what needs no training on the same test images. Only best_constant uses labels;
    refined_trusted is of the better ones of the test images' refined masks alone. Returns the
    result, a block of scores each, the rows of its CSV, and no sheet."""
    images, masks = open_part(job.data, "test")
    names = read_csv(job.data / "test.csv")
    torch.manual_seed(seed_from(job.seed))          # the very weights that pre-training starts from
    with exit_on_value_error():
        unet = build_unet(job.backbone, job.size)
    unet = unet.to(job.device, memory_format=torch.channels_last).eval()
    training, training_masks = open_part(job.data, "train")
    foreground = job.head["foreground"]
    refinement, evidence = pretrain.decide_refinement(training, foreground)
    is_trusted, _ = refinement.choose_trusted(images)
    everything = np.ones(masks.shape[1:], bool)
    def thresholded(foreground):            # an image of one gray value: no foreground either way
        for image in images:
            yield pretrain.pseudo_mask(image[None], "otsu", foreground)[0]
    predicted = dict(
        all_foreground=[everything] * len(masks),
        all_background=[~everything] * len(masks),
        raw_threshold=thresholded(foreground),
        raw_threshold_inverted=thresholded(dict(bright="dark", dark="bright")[foreground]),
        refined_threshold=refinement.refine_masks(images),
        random_init=predict_each(unet, images, job.device))
    if training_masks is not None:
        predicted["best_constant"] = [best_constant(training_masks)] * len(masks)
    counts = {name: count_masks(pred, masks) for name, pred in predicted.items()}
    counts["refined_trusted"] = counts["refined_threshold"][is_trusted]
    result = dict(n_test=len(names))
    rows = []
    for name, table in counts.items():
        shown = names
        if name == "refined_trusted":
            shown = list(itertools.compress(names, is_trusted))
        result[name] = summarise(table, shown)
        rows += image_rows(name, table, shown)
    result["refined_threshold"].update(evidence)
    return result, rows, None


def classify(job):
    """Train a linear probe on the encoder and score it: mean recall of the classes (of a guess, one
    over their number), and the confusion matrix. Returns the result, the rows of its CSV, and no
    sheet; exits if a probe cannot be trained."""
    names = {part: read_csv(job.data / f"{part}.csv") for part in prepare_data.PARTS}
    classes = sorted({row["label"] for row in names["train"]} - {""})
    if len(classes) < 2:
        sys.exit(f"{job.data}: classify needs at least two labels in train.csv")
    numbers = {}                            # {(part, row): class}
    for part in names:
        if not any(row["label"] for row in names[part]):
            sys.exit(f"{job.data}: {part}.csv has no label: classify needs some in each part")
        for k, row in enumerate(names[part]):
            if row["label"] in classes:
                numbers[part, k] = classes.index(row["label"])
            elif row["label"]:
                sys.exit(f"{job.data}: {part}.csv has a label that train.csv lacks: {row['label']}")
    torch.manual_seed(seed_from(job.seed, PROBE_SEED))
    with exit_on_value_error():
        has_layer4 = "layer4.0.conv1.weight" in read_encoder(job.weights, job.backbone)
        probe = Probe(job.backbone, job.size, len(classes), has_layer4)
        load_encoder(probe, job.weights)
    probe.to(job.device, memory_format=torch.channels_last)
    labels, epoch_size = choose_labels(job, classes)
    n_train = job.head["n_labels_train"]
    # A training on other labels of the same images is refused.
    job.head["labels_digest"] = hashlib.sha256(repr(numbers).encode()).hexdigest()
    sets = label_sets(job, labels[:n_train], labels[n_train:], epoch_size, numbers)
    steps = fit(probe, sets, job, job.args.epochs)
    probe.eval()
    images, _ = open_part(job.data, "test")
    rows = []
    confusion = np.zeros((len(classes), len(classes)), np.int64)        # truth by rows
    for k, row in enumerate(names["test"]):
        if row["label"]:
            image = torch.from_numpy(images[[k]]).permute(0, 3, 1, 2).to(job.device)
            with torch.inference_mode():
                found = probe.logits(image).argmax().item()
            confusion[numbers["test", k], found] += 1
            rows.append(row | dict(prediction=classes[found]))
    of_class = confusion.sum(axis=1)        # of which the test part may have none
    right = confusion.diagonal()
    result = dict(
        n_test=len(rows),
        classes=classes,
        stage=probe.stage,
        budget_steps=steps,
        macro_recall=(right / of_class)[of_class > 0].mean().item(),
        confusion=confusion.tolist())
    return result, rows, None


def image_rows(row, counts, names):
    """Return the lines of a CSV, dicts: what each picture scored by itself, (N, 4), in a `row`."""
    lines = []
    for image, of_image in zip(names, counts, strict=True):
        line = dict(row=row, name=image["name"], group=image["group"])
        line.update(zip(COUNTS, of_image, strict=True))
        for score, value in scores_from_counts(of_image).items():
            line[score] = f"{value:.6g}"
        lines.append(line)
    return lines


def evaluate(job):
    """Run one protocol, print its scores, write its JSON, the CSV of its test images, and its
    picture, in the place of those of the same name."""
    head = job.head
    path = Path(job.args.out or "results", head["dataset"], job.backbone, head["variant"],
                f"seed{job.seed}", f"{head['name']}.json")
    if job.args.overwrite and job.protocol in LABEL_PROTOCOLS and job.folder.exists():
        shutil.rmtree(job.folder)
    protocol = dict(reference=reference, classify=classify).get(job.protocol, segment)
    result, rows, sheet = protocol(job)
    result = head | result | dict(run=job.run, command=job.command)
    if sheet is not None:
        prepare_data.write_png(path.with_suffix(".png"), sheet)
    write_csv(path.with_suffix(".csv"), rows)
    write_json(path, result)
    for name, block in score_blocks(result).items():
        shown = [f"{score} {block[score]:.4f}" for score in PRINTED if score in block]
        print(name or result["variant"], *shown)
    print(path)


# ---------------------------------------------------------------------------------------- predict
def predict_tiled(unet, image, tile, size, device, flips=False):
    """Return the mask, bool (H, W), of uint8 (H, W, 3). Windows of tile x tile pixels, resized to
    the `size` of the network, overlap by half; their logits are weighted by sin ** 2 towards the
    middle and summed, in float32 (H, W)."""
    height, width = image.shape[:2]
    last_y = max(0, height - tile)
    last_x = max(0, width - tile)
    below = max(0, tile - height)
    right = max(0, tile - width)
    if below or right:
        image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REFLECT_101)
    places = []
    for y in (*range(0, last_y, tile // 2), last_y):
        for x in (*range(0, last_x, tile // 2), last_x):
            places.append(np.s_[y:y + tile, x:x + tile])
    middles = (np.arange(tile) + 0.5) / tile
    ramp = np.sin(np.pi * middles) ** 2
    weight = np.outer(ramp, ramp).astype(np.float32)
    total = np.zeros(image.shape[:2], np.float32)
    windows = (resize(image[place], size) for place in places)
    for place, logits in zip(places, predict_each(unet, windows, device, flips), strict=True):
        logits = cv2.resize(logits, (tile, tile), interpolation=cv2.INTER_LINEAR)
        total[place] += logits * weight
    return total[:height, :width] > 0


def whole_network(run, device="cpu"):
    """Return the U-Net of a run folder, in eval mode, the size of its images, and the run's
    settings; exit if only an encoder was trained."""
    settings = read_run(Path(run))
    if settings["train"] != "end2end":
        sys.exit(f"{run} has an encoder only, and nobody trained its decoder")
    size = settings["img_size"]
    unet = build_unet(settings["backbone"], size)
    unet.load_state_dict(load_checkpoint(Path(run, "best.pt"), "cpu")["model"])
    unet.to(device, memory_format=torch.channels_last)
    return unet.eval().requires_grad_(False), size, settings


def predict_folder(args):
    """Write a mask, PNG 0 / 255, for every image below a folder, at its own size, and a CSV with
    each foreground fraction. A bad file is named, the others are done, the exit code is 1."""
    source = Path(args.predict)
    out = Path(args.out)
    device = pretrain.pick_device(args.device)
    if out.resolve().is_relative_to(source.resolve()):
        sys.exit(f"{out}: lies in {source}, where its masks could overwrite images or pass for "
                 "some: give another --out")
    if out.exists() and any(out.iterdir()) and not args.overwrite:
        sys.exit(f"{out} is not empty: give another --out, or --overwrite")
    images, _, bad = prepare_data.find_files(source, match=False)
    unet, size, _ = whole_network(args.run, device)
    rows = []
    several_pages = []
    for name, path in tqdm(images.items(), "predict"):
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
            logits = predict_logits(unet, resize(image, size)[None], device, args.flips)[0]
            mask = cv2.resize(logits, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) > 0
        prepare_data.write_png(out / f"{name}.png", mask.astype(np.uint8) * 255)
        if args.overlay:
            image = image.copy()
            image[mask] = 0.6 * image[mask] + (102, 0, 0)       # 40 % red
            with new_file(out / "overlay" / f"{name}.jpg") as file:     # no mask is called so
                Image.fromarray(image).save(file, "JPEG")
        relative = path.relative_to(source).as_posix()
        rows.append(dict(name=relative, foreground_fraction=f"{mask.mean():.6f}"))
    prepare_data.print_count(several_pages, f"have several pages: page {args.page} is taken")
    if rows:
        write_csv(out / "foreground.csv", rows)
        print(f"{out}: {len(rows)} masks, and foreground.csv")
    if bad:
        sys.exit("\n".join(bad) + f"\n{len(bad)} bad file(s), listed above, have no mask")


class Exported(nn.Module):
    """uint8 RGB (B, 3, S, S) -> float32 (B, 1, S, S), the probability of foreground."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        self.register_buffer("mean", pretrain.MEAN)
        self.register_buffer("std", pretrain.STD)

    def forward(self, images):
        return torch.sigmoid(self.unet((images / 255 - self.mean) / self.std))


def export_network(args):
    """Write a run's network as one file that needs none of this code (torch.export, .pt2), for any
    number of images of the size in its network.json, which has the polarity, too."""
    path = Path(args.export)
    if path.exists() and not args.overwrite:
        sys.exit(f"{path} would be overwritten: give another --export, or --overwrite")
    unet, size, settings = whole_network(args.run)
    about = dict(size=size, foreground=settings["foreground"])
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(Exported(unet), (images,),
                                      dynamic_shapes=({0: torch.export.Dim("batch")},))
    content = io.BytesIO()                  # torch aborts on a full disk
    torch.export.save(program, content, extra_files={"network.json": json.dumps(about)})
    with new_file(path) as file:
        file.write(content.getbuffer())
    print(f"{path}: {about}")


# ----------------------------------------------------------------------------------------- report
PRINTED = ("macro_recall", "iou_global", "iou_image")
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
    return {name: block for name, block in result.items()
            if isinstance(block, dict) and "iou_global" in block}


def read_result(path):
    """Return a row for each network or reference in a JSON of evaluate, a list of dicts: the JSON,
    its scores, title, used (labels, in words), groups of the test images and, unless it is of a
    probe, their counts, float (N, 4). Raises KeyError, ValueError and such if it is no result."""
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = read_csv(path.with_suffix(".csv"))
    rows = []
    for name, block in score_blocks(result).items():
        row = result | block
        images = [line for line in lines if line.get("row", "") == name]
        if len(images) != row["n_test"]:
            raise ValueError(f"{len(images)} images in its CSV")
        row["groups"] = groups_of(images)
        row["used"] = "all" if name == "best_constant" else "0"
        if row["n_test"] < result["n_test"]:            # refined_trusted: of some images only
            row["used"] = f"0, {row['n_test']} images"
        if row["n_labels_train"]:
            row["used"] = f"{row['n_labels_train']} + {row['n_labels_val']}"
        row["title"] = name or f"{row['variant']}: {row['name']}"
        if name in ("", "random_init") and row["backbone"] != "resnet50":
            row["title"] += f" ({row['backbone']})"
        if row["protocol"] != "classify":
            row["counts"] = np.array([[line[key] for key in COUNTS] for line in images], float)
        rows.append(row)
    return rows


def group_by_seed(rows):
    """Return {(data set, fingerprint): cells}, rows grouped by all but their seed, references
    first, then by labels and title. A cell, a dict, is the row of its first seed and has all its
    `rows`; unless it is of a probe also the mean over seeds of the global IoU, iou, its bootstrap,
    samples, float (2000,), and its interval, ci."""
    def place(row):
        is_network = row["protocol"] != "reference"
        return is_network, row["n_labels_train"], row["title"], row["seed"]
    cells = collections.defaultdict(dict)
    for row in sorted(rows, key=place):
        of_title = cells[row["dataset"], row["data"]].setdefault(row["title"], row | dict(rows=[]))
        if row["seed"] not in [other["seed"] for other in of_title["rows"]]:
            of_title["rows"].append(row)
    prepared = {}
    for key in sorted(cells):
        prepared[key] = list(cells[key].values())
        for cell in prepared[key]:
            samples = []
            for row in cell["rows"]:
                if "counts" in row:
                    resampled = bootstrap_weights(row["groups"]) @ row["counts"]
                    samples.append(scores_from_counts(resampled)["iou"])
            if samples:
                cell["samples"] = np.mean(samples, axis=0)
                cell["ci"] = np.percentile(cell["samples"], MIDDLE)
                cell["iou"] = np.mean([row["iou_global"] for row in cell["rows"]])
    return prepared


def mean_std(cell, score):
    """Return a cell's "mean ± std (seeds)" of a score; std (n - 1) only if there are several."""
    values = [row[score] for row in cell["rows"]]
    std = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{std} ({len(values)})"


def difference(cell, other):
    """Return the difference of two cells, "+0.0123 [-0.0045, +0.0291]", or "": paired, by the same
    resampled images, so that what is hard for all cancels (Efron & Tibshirani 1993)."""
    if other is None or other is cell or other["groups"] != cell["groups"]:
        return ""
    low, high = np.percentile(cell["samples"] - other["samples"], MIDDLE)
    return f"{cell['iou'] - other['iou']:+.4f} [{low:+.4f}, {high:+.4f}]"


def best_of(cells, *keys, **wanted):
    """Return, of the cells that have what is wanted, the one that is largest in `keys`, or None."""
    found = [cell for cell in cells if wanted.items() <= cell.items()]
    return max(found, key=lambda cell: [cell[key] for key in keys], default=None)


def markdown(rows):
    """Return the lines of a table, a blank one before it; the first of the rows is its header."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return ["", *lines]


def write_chart(cells, path):
    """Write a PNG: IoU against the labels used, with 95 % intervals, a line per network; dashed the
    best row of reference without labels."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    best = best_of(cells, "iou", protocol="reference", used="0")
    if best:
        axes.axhline(best["iou"], linestyle="--", color="gray", label=best["title"])
    curves = collections.defaultdict(list)
    for cell in cells:
        if cell["protocol"] != "reference":
            curves[cell["title"].replace(f"-l{cell['labels']}", "")].append(cell)
    for name, curve in curves.items():
        labels = [cell["n_labels_train"] for cell in curve]
        iou = np.array([cell["iou"] for cell in curve])
        reach = np.abs(np.transpose([cell["ci"] for cell in curve]) - iou)      # down and up
        axes.errorbar(labels, iou, reach, label=name, marker="o")
    counts = sorted({cell["n_labels_train"] for cell in cells})
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(counts, counts)
    axes.set(ylim=(0, 1), xlabel="labelled training images", ylabel="test IoU (global)")
    figure.legend(fontsize=7, loc="outside right upper")
    with new_file(path) as file:
        figure.savefig(file, format="png")


def report(out):
    """Write README.md and one chart per data set under `out` from every result there. A JSON that
    is no result is named and left out; exits if there is none."""
    rows, bad = [], []
    for path in sorted(out.rglob("*.json")):
        try:
            rows += read_result(path)
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            bad.append(f"- {path} is not a result of finetune_eval.py, or its CSV is missing or "
                       f"damaged: left out ({error!r}); delete it and run its command")
    if not rows:
        sys.exit("\n".join([*bad, f"{out}: no results here; score a run first, see python "
                            "finetune_eval.py --help"]))
    lines = [
        "# Results", "",
        "Written by `python finetune_eval.py --report`. IoU is over the whole test part (counts "
        "summed), intervals are 95 % bootstrap over test images or their groups. Labels: training "
        "+ validation images whose masks or classes were used. Differences are paired; one whose "
        "interval contains 0 shows nothing. paper: its Tables 1 and 2, Figures 3, 4. "
        "raw_threshold: Otsu's masks; refined_threshold: those of --refine; random_init: the "
        "untrained network; best_constant: one mask for all images, from the training truth.",
        "", *bad]
    prepared = group_by_seed(rows)
    for (title, data), cells in prepared.items():
        if f"## {title}" in lines:          # of another preparation: not to be compared
            title += f" ({data[:8]})"
        first = cells[0]
        lines += ["", f"## {title}", "", f"{first['n_test']} test images of {first['img_size']} px "
                  f"in {len(set(first['groups']))} groups."]
        # ===== the linear probes =====
        table = [["network", "labels", "stage", "mean recall over classes"]]
        scored = []
        for cell in cells:
            if cell["protocol"] != "classify":
                scored.append(cell)
                continue
            table.append([
                cell["title"], cell["used"], cell["stage"], mean_std(cell, "macro_recall")])
        if len(table) > 1:
            lines += ["", "Linear probes:", *markdown(table)]
        # ===== all others =====
        best = best_of(scored, "iou", protocol="reference", used="0")       # it costs nothing
        table = [["network", "labels", "IoU, mean ± std (seeds)", "95 % interval",
                  "vs best reference without labels", "vs supervised, most labels", "paper"]]
        for cell in scored:
            supervised = best_of(scored, "n_labels_train", "budget_steps", protocol="supervised",
                                 backbone=cell["backbone"])
            paper = dict(zip(PAPER_SETS, PAPER.get(cell["title"], ()), strict=False))
            table.append([
                cell["title"],
                cell["used"],
                mean_std(cell, "iou_global"),
                "{:.4f} - {:.4f}".format(*cell["ci"]),
                difference(cell, best),
                difference(cell, supervised),
                str(paper.get(cell["dataset"], ""))])
        if scored:
            lines += markdown(table)
            try:
                write_chart(scored, out / f"{title}.png")
                lines += ["", f"![{title}](<{title}.png>)"]
            except ImportError:
                print(f"{title}: no chart: matplotlib is not installed (pip install matplotlib)")
    commands = dict.fromkeys(row["command"] for row in rows)            # each once
    lines += ["", "## Commands", "", "```", *commands, "```", ""]
    path = out / "README.md"
    with new_file(path) as file:
        file.write("\n".join(lines).encode())
    print(*lines, f"{path}: {len(rows)} rows, {len(bad)} warnings", sep="\n")


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
    """Return the flags, and the name that they give to a result; exit if they contradict."""
    parser = argparse.ArgumentParser("finetune_eval.py", description=__doc__, allow_abbrev=False,
                                     usage=argparse.SUPPRESS, formatter_class=prepare_data.Help)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    instead = parser.add_mutually_exclusive_group()
    source.add_argument("--run", help="a finished run folder of pretrain.py, or of this script")
    source.add_argument("--encoder", help="any encoder (ours, timm's, torchvision's), a file")
    add("--dataset", type=prepare_data.dataset_name, help="prepared; default: that of --run")
    add("--backbone", choices=BACKBONES, help="without --run: the network")
    add("--protocol", default="transfer", choices=["transfer", *LABEL_PROTOCOLS, "reference"],
        help="what to do before scoring")
    add("--labels", type=share_or_count, default=1.0,
        help="labelled training images: 0.1 is a share, 10 a count of those that have a mask or "
        "class; the same share of the validation images is trained on, too")
    add("--epochs", type=int, default=50,
        help="of training on labels; each is as long as if all images were labelled")
    add("--lr", type=float,
        help="peak rate of Adam. Default: 1e-3 with a fresh decoder, else 3.6e-4")
    add("--seed", type=int, help="of fresh weights, labels, order. Default: the run's, or 0")
    pretrain.add_training_flags(add)
    add("--flips", action="store_true", help="predict with the mean over a picture's four flips")
    instead.add_argument("--predict", help="write masks for this folder; needs --run, --out")
    add("--tile", type=int, nargs="?", const=0,
        help="with --predict: in windows of so many pixels a side (no number: the training size)")
    add("--page", type=int, default=0, help="with --predict: of files that have several; from 0")
    add("--overlay", action="store_true", help="with --predict: pictures with the mask in red, too")
    instead.add_argument("--export", help="write the network of --run as one file (.pt2)")
    instead.add_argument("--report", action="store_true", help="write README.md of all results")
    add("--out", help="folder for results (default: results), or with --predict for masks")
    add("--overwrite", action="store_true", help="replace trainings or masks that are there")
    args = parser.parse_args(argv)
    if args.report:
        return args, ""
    prepare_data.check_numbers(parser, args, epochs=1, batch_size=1, lr=0, seed=0, workers=0,
                               page=0)
    scores = not (args.predict or args.export)
    if args.tile and args.tile < 16:
        parser.error("--tile is at least 16 pixels")
    if args.predict and not (args.run and args.out) or args.export and not args.run:
        parser.error("--predict needs --run RUN_DIR and --out DIR, --export needs --run RUN_DIR")
    if scores and not args.run and not (args.dataset and args.backbone):
        parser.error("give --run RUN_DIR, or --dataset NAME and --backbone B")
    if scores and (args.protocol in ("supervised", "reference")) == bool(args.run or args.encoder):
        parser.error("give --run RUN_DIR or --encoder FILE, but neither for supervised, reference")
    if args.protocol not in LABEL_PROTOCOLS:
        args = prepare_data.drop_unused(parser, args, NAME_FLAGS)
    if args.protocol in ("classify", "reference"):
        args = prepare_data.drop_unused(parser, args, ["flips"])
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
