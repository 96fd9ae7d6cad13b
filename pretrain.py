"""Pre-train a U-Net on Otsu pseudo-masks (MedSASS, section 3.3 of the paper), or a baseline
encoder; without any label.

    python pretrain.py --dataset demo --epochs 10
    python pretrain.py --dataset isic --backbone vit_small
    python pretrain.py --dataset isic --train encoder --threshold ght --loss tversky
    python pretrain.py --dataset isic --method byol
    torchrun --standalone --nproc-per-node 4 pretrain.py --dataset xray

Reads data/<dataset>/ (see prepare_data.py), writes
runs/<dataset>/<backbone>/<method>[-variant]/seed<k>/. The same command resumes where it was
stopped, on a CPU bit for bit.
"""

import argparse
import atexit
import contextlib
import csv
import datetime
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

import prepare_data
from baselines.byol import BYOL
from baselines.dino import DINO
from baselines.mae import MAE
from baselines.simmim import SimMIM
from baselines.simsiam import SimSiam
from losses import LOSSES
from models import BACKBONES, build_unet, export_encoder, load_encoder

# ImageNet's mean and standard deviation, timm's defaults for both backbones; (3, 1, 1)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

cv2.setNumThreads(0)                                    # the loader's workers are the parallelism

# -------------------------------------------------------------------------- pseudo-masks (3.3.2)

THRESHOLDS = ("otsu", "ght", "adaptive_mean", "adaptive_gaussian", "fixed")
# Barron's constants for H-DIBCO 2016 (ECCV 2020, section 4). nu and kappa count pixels, of pages of
# about 2 ** 20; is_bright scales them, or at 224 x 224 the prior would dominate.
GHT_NU, GHT_TAU, GHT_KAPPA, GHT_OMEGA = 2 ** 29.5, 2 ** 3.125, 2 ** 22.25, 2 ** -3.25
GHT_PIXELS = 2 ** 20


def otsu_threshold(gray):
    """uint8 (H, W) -> int t; foreground is gray > t (Otsu 1979, by OpenCV)."""
    return int(cv2.threshold(gray, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0])


def ght_threshold(gray, nu=GHT_NU, tau=GHT_TAU, kappa=GHT_KAPPA, omega=GHT_OMEGA):
    """uint8 (H, W) -> int t by Generalized Histogram Thresholding; foreground is gray > t (Barron,
    ECCV 2020, section 3). nu >= 0: strength (in pixels) of the prior that the Gaussians on either
    side of t have standard deviation tau; kappa >= 0: of the prior that a share omega of the pixels
    is at or below t. Ties give the mean of the tied thresholds, as in Barron's code."""
    counts = np.bincount(gray.ravel(), minlength=256).astype(np.float64)
    levels = np.arange(256.0)

    def side(n, x, share):                              # cumulated over levels 0..t, t = 0..254
        w = np.maximum(np.cumsum(n)[:-1], 1e-30)
        mean = np.cumsum(n * x)[:-1] / w
        d = np.cumsum(n * x ** 2)[:-1] - w * mean ** 2  # sum of squared deviations
        p = w / n.sum()
        v = np.maximum((p * nu * tau ** 2 + d) / (p * nu + w), 1e-30)
        return -d / v - w * np.log(v) + 2 * (w + kappa * share) * np.log(w)

    score = side(counts, levels, omega) + side(counts[::-1], levels[::-1], 1 - omega)[::-1]
    return int(np.flatnonzero(score == score.max()).mean())


def is_bright(gray, method):
    """uint8 (H, W) -> bool (H, W): what one of THRESHOLDS calls bright."""
    if method == "otsu":
        return gray > otsu_threshold(gray)
    if method == "fixed":
        return gray > 127
    if method == "ght":
        scale = gray.size / GHT_PIXELS
        return gray > ght_threshold(gray, GHT_NU * scale, GHT_TAU, GHT_KAPPA * scale, GHT_OMEGA)
    kind = cv2.ADAPTIVE_THRESH_GAUSSIAN_C
    if method == "adaptive_mean":
        kind = cv2.ADAPTIVE_THRESH_MEAN_C
    # gray > local mean - C, block 11, C 2
    return cv2.adaptiveThreshold(gray, 1, kind, cv2.THRESH_BINARY, 11, 2) == 1


def pseudo_mask(images, method="otsu", foreground="bright"):
    """uint8 (B, H, W, 3) RGB -> uint8 {0, 1} (B, H, W): the label that an image gives itself
    (Algorithm 1). "dark" is the complement of "bright" at the same threshold; an image of one gray
    value has no foreground. Raises ValueError for words other than THRESHOLDS, "bright", "dark"."""
    if method not in THRESHOLDS or foreground not in ("bright", "dark"):
        raise ValueError(f"no pseudo-mask {method!r} / {foreground!r}")
    masks = np.zeros(images.shape[:3], np.uint8)
    for image, mask in zip(images, masks, strict=True):
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if gray.min() < gray.max():
            mask[:] = is_bright(gray, method) == (foreground == "bright")
    return masks


# ------------------------------------ refined pseudo-masks, without labels (not in the paper)

CHANNELS = ("gray", "red", "green", "blue")
REFINEMENTS = ("channel", "frame", "position")


def one_channel(image, channel="gray", foreground="dark"):
    """uint8 (H, W, 3) RGB -> uint8 (H, W), dark where the foreground is."""
    if channel == "gray":
        values = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    else:
        values = cv2.extractChannel(image, CHANNELS.index(channel) - 1)
    return values if foreground == "dark" else 255 - values


def separability(values):
    """uint8 (H, W) -> float in [0, 1]: variance between the two classes of Otsu's threshold over
    the total variance (Otsu 1979, eq. 12)."""
    above = values > otsu_threshold(values)
    share = above.mean()
    if not 0 < share < 1:
        return 0.0
    gap = values[above].mean() - values[~above].mean()
    return float(share * (1 - share) * gap ** 2 / values.var())


def choose_channel(images):
    """uint8 (N, H, W, 3), may be mapped -> (one of CHANNELS, {channel: mean separability}): that
    which Otsu's threshold separates best; gray wins ties. Skin lesions stand out more in blue."""
    means = dict.fromkeys(CHANNELS, 0.0)
    for image in images:
        for channel in CHANNELS:
            means[channel] += separability(one_channel(image, channel)) / len(images)
    return max(CHANNELS, key=lambda channel: round(means[channel], 6)), means


def dark_mask(values, frame):
    """uint8 (H, W) -> bool (H, W): not above Otsu's threshold. `frame`, bool (H, W), is neither
    counted in the histogram nor foreground. Nothing where all values are alike."""
    counted = values[~frame][:, None]
    if not counted.size or counted.min() == counted.max():
        return np.zeros(values.shape, bool)
    return (values <= otsu_threshold(counted)) & ~frame


def connected(mask, starts):
    """bool (H, W) twice -> bool (H, W): 4-connected components of `mask` that hold a start."""
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return np.isin(labels, labels[mask & starts])


def common_frame(often):
    """bool (H, W), what is dark in most images -> bool (H, W): the part connected to the border.
    Objects rarely lie there; lens corners, letterboxes, collimators do."""
    border = np.ones(often.shape, bool)
    border[1:-1, 1:-1] = False
    return connected(often, border)


def frame_of(values, common):
    """uint8 (H, W) of one_channel -> bool (H, W), the frame of one image: `common`, and what is at
    most .55 of the median and connected to a corner; dilated by 1/32 of the side, because the edge
    of a lens is blurred."""
    corners = np.zeros(values.shape, bool)
    corners[[0, 0, -1, -1], [0, -1, 0, -1]] = True
    frame = common | connected(values <= 0.55 * np.median(values), corners)
    side = 2 * (max(values.shape) // 32) + 1
    return cv2.dilate(frame.astype(np.uint8), np.ones((side, side), np.uint8)) > 0


def position_map(masks, n, splits=8):
    """An iterable of n masks, bool (H, W) -> (float (H, W), reliability in [0, 1]): how often each
    place is foreground, as far as the images agree on it.

    The smoothed mean mask p, drawn towards its mean where such maps of random halves do not
    correlate: p' = mean(p) + r (p - mean(p)), r = 2 c / (1 + c) of their mean correlation c
    (Spearman 1910, Brown 1910). c is lowered by two standard deviations over the splits: of 60 sets
    of 8 images with objects anywhere, 6 lost objects without this, none with it."""
    generator = np.random.default_rng(0)
    is_counted = np.ones((1 + splits, n), np.float32)   # in all, and in the first halves
    for row in is_counted[1:]:
        row[generator.permutation(n)[n // 2:]] = 0
    sums = 0
    for mask, weights in zip(masks, is_counted.T, strict=True):
        sums = sums + weights[:, None, None] * mask
    sigma = max(sums.shape[1:]) / 24
    whole, *halves = [cv2.GaussianBlur(s, (0, 0), sigma).astype(np.float64) for s in sums]
    with np.errstate(invalid="ignore"):                 # nan where a half is flat, counted as 0
        pairs = [np.corrcoef(half.ravel(), (whole - half).ravel()) for half in halves]
    correlations = np.nan_to_num(pairs)[:, 0, 1]
    c = max(0.0, float(correlations.mean() - 2 * correlations.std()))
    reliability = 2 * c / (1 + c)
    p = whole / n
    return p.mean() + reliability * (p - p.mean()), reliability


@dataclass
class Refinement:
    """What --refine has decided on the training images; draw() then needs one image at a time."""
    foreground: str
    channel: str = "gray"
    common: np.ndarray | None = None                    # common_frame; None: no frame is taken off
    positions: list = field(default_factory=list)       # of position_map, one after the other

    def draw(self, image):
        """uint8 (H, W, 3) -> bool (H, W), the refined mask."""
        values = one_channel(image, self.channel, self.foreground)
        frame = np.zeros(values.shape, bool)
        if self.common is not None:
            frame = frame_of(values, self.common)
        mask = dark_mask(values, frame)
        for position in self.positions:                 # what reaches no likely place is dropped
            mask = connected(mask, position >= 0.5 * position.max())
        return mask

    def draw_all(self, images):
        """The masks of uint8 (N, H, W, 3), may be mapped, one after the other, by all cores."""
        with prepare_data.thread_pool() as pool:
            for start in range(0, len(images), 256):
                yield from pool.map(self.draw, map(np.array, images[start:start + 256]))


def decide_refinement(images, foreground, parts=REFINEMENTS):
    """Training images uint8 (N, H, W, 3), may be mapped -> (Refinement, evidence). Holds at most
    256 images. parts: of REFINEMENTS. evidence, a dict: channel and separability, common_frame (a
    share of the picture), reliability of position_map."""
    refinement = Refinement(foreground)
    evidence = {}
    if "channel" in parts:
        refinement.channel, evidence["separability"] = choose_channel(images)
    evidence["channel"] = refinement.channel
    if "frame" in parts:
        times_dark = sum(m.astype(np.int64) for m in refinement.draw_all(images))
        refinement.common = common_frame(times_dark > 0.7 * len(images))
        evidence["common_frame"] = float(refinement.common.mean())
    if "position" in parts:
        for _ in range(2):                              # again, from the masks of the first
            position, reliability = position_map(refinement.draw_all(images), len(images))
            refinement.positions.append(position)
        evidence["reliability"] = reliability
    return refinement, evidence


def refined_masks(images, foreground, parts=REFINEMENTS):
    """uint8 (N, H, W, 3) -> (uint8 {0, 1} (N, H, W), evidence), for images that fit into memory."""
    refinement, evidence = decide_refinement(images, foreground, parts)
    return np.stack(list(refinement.draw_all(images))).astype(np.uint8), evidence


# ---------------------------------------------------------------------- augmentation (appendix D)

def warp(image, matrix):
    """uint8 (3, H, W) -> the same: the pixel at (x, y) is taken from matrix @ (x, y, 1), bilinear;
    of a tv_tensors.Mask (1, H, W) the nearest. Outside is the mirror image of the inside:
    torchvision's black would be dark foreground to Otsu."""
    interpolation = cv2.INTER_LINEAR
    if isinstance(image, tv_tensors.Mask):
        interpolation = cv2.INTER_NEAREST
    out = cv2.warpPerspective(image.permute(1, 2, 0).numpy(), matrix, image.shape[:0:-1],
                              flags=cv2.WARP_INVERSE_MAP | interpolation,
                              borderMode=cv2.BORDER_REFLECT_101)
    out = torch.from_numpy(np.atleast_3d(out)).permute(2, 0, 1)
    return out.as_subclass(type(image))


class Perspective(v2.RandomPerspective):
    """torchvision's, with mirrored borders."""

    def transform(self, image, params):
        return warp(image, np.append(params["coefficients"], 1.0).reshape(3, 3))


class Rotation(v2.RandomAffine):
    """torchvision's, as a rotation about the centre alone, with mirrored borders."""

    def transform(self, image, params):
        centre = ((image.shape[2] - 1) / 2, (image.shape[1] - 1) / 2)
        rotation = cv2.getRotationMatrix2D(centre, -params["angle"], 1)
        return warp(image, np.linalg.inv(np.vstack([rotation, [0, 0, 1]])))


def paper_augmentation():
    """uint8 (3, H, W), or with its tv_tensors.Mask (1, H, W) -> the same. The paper's list and
    order; it gives no strengths, these are mild, common ones."""
    jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
    return v2.Compose([
        v2.RandomChoice([jitter, Perspective(distortion_scale=0.2, p=1.0)]),
        v2.RandomChoice([jitter, Rotation(degrees=10)]),
        v2.RandomVerticalFlip(),
        v2.RandomHorizontalFlip()])


# ------------------------------------------------------------------------------------- the method

class MedSASS(nn.Module):
    """A U-Net that learns to draw the pseudo-mask of the very image it sees (section 3.3.1,
    Algorithm 1).

    augment(image): uint8 (3, H, W) -> [view uint8 (3, H, W), pseudo-mask uint8 {0, 1} (1, H, W)],
    in the workers; with refine, augment(image, mask): masks come from files. plain: the same
    without augmentation. train_part "encoder" or "decoder": only that part learns; the other stays
    as it is, its BatchNorm in eval mode (section 4.1). The rest is as in every class of baselines/.
    """

    backbones = tuple(BACKBONES)
    keep_best = True
    mask_kind = "pseudo"

    def __init__(self, backbone, img_size=224, batch_size=16, threshold="otsu",
                 foreground="bright", loss="focal_tversky", train_part="end2end", refine=()):
        super().__init__()
        self.unet = build_unet(backbone, img_size)
        self.foreground, self.refine, self.train_part = foreground, refine, train_part
        self.loss = LOSSES[loss]
        self.lr, self.weight_decay = 3.6e-4, 1e-5       # not in the paper: its authors' other code
        if train_part != "end2end":
            self.unet.requires_grad_(train_part == "decoder")
            self.unet.encoder.requires_grad_(train_part == "encoder")
        draw = None if refine else (threshold, foreground)
        self.plain = functools.partial(view_and_mask, v2.Identity(), draw)
        self.augment = functools.partial(view_and_mask, paper_augmentation(), draw)

    @property
    def encoder(self):
        return self.unet.encoder

    def train(self, mode=True):
        super().train(mode)
        if self.train_part != "end2end":
            self.unet.train(mode and self.train_part == "decoder")
            self.encoder.train(mode and self.train_part == "encoder")
        return self

    def forward(self, views):
        images, masks = views
        logits = self.unet(normalise(images))           # (B, 1, H, W)
        self.shares = masks.float().mean(), (logits.detach() > 0).float().mean()
        return self.loss(logits, masks)

    def optimizer(self):
        """Adam over what learns."""
        learning = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(learning, self.lr, weight_decay=self.weight_decay, fused=True)

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        """The learning rate is constant."""

    def after_backward(self):
        """No clipping, nothing frozen."""

    def after_step(self, step, total_steps):
        """No moving average."""

    def health(self):
        """Shares of foreground in the last batch: of the masks, and of what was drawn."""
        share, predicted = self.shares
        return {f"{self.mask_kind}_foreground": share.item(),
                "predicted_foreground": predicted.item()}

    def collapsed(self, health):
        """A line that says what to try where the network draws one class only, else None."""
        if health["predicted_foreground"] in (0, 1):
            name = "foreground" if health["predicted_foreground"] else "background"
            return (f"the network calls every pixel {name}, as with --loss bce in appendix B.1: if "
                    "it stays so, try a smaller --lr")

    def samples(self, views):
        """{title: pictures (B, 1 or 3, H, W)}: what it saw and drew."""
        images, masks = views
        columns = {"image": images}
        if self.refine:
            raw = pseudo_mask(images.permute(0, 2, 3, 1).cpu().numpy(), "otsu", self.foreground)
            columns["Otsu"] = torch.from_numpy(raw)[:, None]
        columns[f"{self.mask_kind}-mask"] = masks
        columns["prediction"] = self.unet(normalise(images)) > 0
        return columns


METHODS = dict(medsass=MedSASS, byol=BYOL, dino=DINO, simsiam=SimSiam, mae=MAE, simmim=SimMIM)


def view_and_mask(transform, draw, image, mask=None):
    """uint8 (3, H, W) -> [view, uint8 {0, 1} (1, H, W)]: the mask drawn in the view by `draw`,
    (threshold, foreground), or the given tv_tensors.Mask, moved with the image."""
    if draw is None:
        return transform(image, mask)
    view = transform(image)
    return [view, torch.from_numpy(pseudo_mask(view.permute(1, 2, 0).numpy()[None], *draw))]


def normalise(images):
    """uint8 (B, 3, H, W) RGB -> float, by ImageNet's mean and standard deviation."""
    return (images / 255 - MEAN.to(images.device)) / STD.to(images.device)


# ------------------------------------------------------------------------ data and its randomness

def seed_from(*key):
    """Non-negative integers such as (seed, epoch, index) -> a 63-bit seed. Zeros at the end do not
    count: (5,) and (5, 0) are one key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def seeded(*key):
    """Inside, torch's CPU generator is seeded from `key`, and one thread computes, as in a loader's
    worker, so that sums round alike; afterwards both are as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(*key))
            yield
    finally:
        torch.set_num_threads(threads)


class Images(torch.utils.data.Dataset):
    """One part of a data set, or some `rows` of it. Key (epoch, k) -> (row, transform(image)), the
    same in whatever process; with `masks`, an .npy, uint8 {0, 1} (N, S, S): (row, [view, mask]), or
    with a list of class numbers, one for each row of the part: (row, [view, number])."""

    def __init__(self, folder, part, transform, seed, rows=None, masks=None):
        self.path = Path(folder) / f"{part}_images.npy"
        self.masks = masks
        self.transform = transform
        self.seed = seed
        if rows is None:                                # true masks are not read in this file
            rows = range(len(prepare_data.open_part(folder, part)[0]))
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, k = key
        row = self.rows[k]
        # mapped afresh: nothing to send to a worker
        image = torch.tensor(np.load(self.path, mmap_mode="r")[row]).permute(2, 0, 1)   # (3, S, S)
        with seeded(self.seed, epoch, row):
            if self.masks is None:
                return row, self.transform(image)
            if isinstance(self.masks, list):
                return row, [self.transform(image), self.masks[row]]
            mask = tv_tensors.Mask(np.load(self.masks, mmap_mode="r")[row][None].copy())
            view, mask = self.transform(image, mask)
            return row, [view, mask.as_subclass(torch.Tensor)]


def ranks():
    """(rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(*values):
    """Numbers -> a list of their sums over all ranks, each of which has to call it."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def wait_for_ranks():
    """Go on when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


class Batches:
    """The batches of an epoch, lists of (pass, index): in an order of (seed, pass) alone, or as
    stored without seed. An epoch has max(n, epoch_size) items, in several passes if need be; a last
    batch of one image, or of less than half the size, joins the one before it. shard = (rank,
    ranks): shuffled, a batch is `ranks` times as large and a rank takes every ranks-th item of it;
    as stored, every ranks-th batch. The first `done` batches are left out."""

    def __init__(self, n, batch_size, seed=None, epoch_size=0, shard=(0, 1)):
        self.n, self.seed = n, seed
        self.rank, self.ranks = shard
        self.epoch = self.done = 0
        self.epoch_size = max(n, epoch_size)
        together = 1 if seed is None else self.ranks    # that share a batch
        self.starts = list(range(0, self.epoch_size, batch_size * together))
        # BatchNorm: a last batch of 2 in each epoch cost SimSiam .05 IoU (RESULTS.md).
        least = max(min(batch_size, 2), batch_size / 2) * together
        if len(self.starts) > 1 and self.epoch_size - self.starts[-1] < least:
            self.starts.pop()

    def __len__(self):
        return len(self.starts)

    def __iter__(self):
        number = self.epoch * math.ceil(self.epoch_size / self.n)
        keys = []
        while len(keys) < self.epoch_size:
            order = range(self.n)
            if self.seed is not None:
                generator = torch.Generator().manual_seed(seed_from(self.seed, number))
                order = torch.randperm(self.n, generator=generator).tolist()
            keys += [(number, index) for index in order]
            number += 1
        cuts = itertools.pairwise([*self.starts, self.epoch_size])
        batches = [keys[start:end] for start, end in cuts]
        if self.seed is None:
            return iter(batches[self.rank::self.ranks])
        return iter([batch[self.rank::self.ranks] for batch in batches[self.done:]])


def start_worker(worker):
    """In a loader's worker: Ctrl-C and SIGTERM are for the main process, which still needs what is
    being loaded when a whole group or job is told to stop. A worker ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers():
    """At the end of the program, kill the workers that a traceback still holds: Python would wait
    for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's would report each
    for worker in multiprocessing.active_children():
        worker.kill()


def make_loader(dataset, batches, workers):
    """Loads `batches` (their .epoch may change between passes); the workers stay alive."""
    atexit.register(end_workers)
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=start_worker,
        persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())


def write_masks(masks, shape, path):
    """Write an iterator of masks (S, S), bool or uint8 {0, 1}: an .npy, uint8 of `shape`
    (N, S, S), whole or not at all."""
    header = dict(descr="|u1", fortran_order=False, shape=shape)

    def write(temporary):
        with open(temporary, "wb") as file, contextlib.closing(masks):     # on a full disk too
            np.lib.format.write_array_header_1_0(file, header)
            for mask in masks:
                file.write(mask.astype(np.uint8).tobytes())

    write_atomically(path, write)


def draw_refined(data, foreground, parts, folder):
    """The refined masks of a data set, into train_masks.npy and val_masks.npy of a run's folder;
    the evidence goes into its config.json."""
    images = prepare_data.open_part(data, "train")[0]
    refinement, evidence = decide_refinement(images, foreground, parts)
    print(f"refined masks: {evidence}")
    if evidence.get("common_frame", 0) > 0.4:
        print("the frame covers more of a picture than a lens or letterbox should: if --foreground "
              "is right, leave the frame out, --refine channel position")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | dict(refinement=evidence))
    for part in ("train", "val"):                       # the last shows that all is there
        images = prepare_data.open_part(data, part)[0]
        write_masks(refinement.draw_all(images), images.shape[:3], folder / f"{part}_masks.npy")


def image_sets(method, data, seed, folder):
    """Three Images, none with labels: training, the same un-augmented, validation."""
    train_masks = val_masks = None
    if getattr(method, "refine", ()):
        train_masks, val_masks = folder / "train_masks.npy", folder / "val_masks.npy"
        if ranks()[0] == 0 and not val_masks.exists():
            draw_refined(data, method.foreground, method.refine, folder)
        wait_for_ranks()
    plain = getattr(method, "plain", method.augment)
    return (Images(data, "train", method.augment, seed, masks=train_masks),
            Images(data, "train", v2.Identity(), seed),
            Images(data, "val", plain, seed, masks=val_masks))


# --------------------------------------------------------------------------------------- the loop

@dataclass
class Options:
    """How train() goes about it, as the flags of both stages decide."""
    epochs: int
    batch_size: int                                     # images a step, of each rank
    patience: int                                       # epochs; 0: never stop early
    seed: int
    amp: str                                            # "off", "bf16" or "fp16"
    workers: int
    save_minutes: float = 10


class Trainer:
    """A method with its optimiser and its place in the run: all that last.pt holds. A step whose
    loss is not finite on some rank, or whose gradient overflows in fp16, is left out."""

    STATEFUL = ("method", "optimizer", "scaler")
    # Where it is, and the sums of the epoch so far.
    PROGRESS = ("epoch", "done", "best", "stale", "sums", "skipped")

    def __init__(self, method, options, device, epoch_steps):
        self.method, self.options, self.device = method, options, device
        self.epoch_steps = epoch_steps
        self.optimizer = method.optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        self.epoch = self.stale = 0
        self.best = math.inf
        self.begin_epoch()
        self.network = method
        if ranks()[1] > 1:
            self.network = nn.parallel.DistributedDataParallel(method, find_unused_parameters=True)

    def begin_epoch(self):
        self.done, self.sums, self.skipped = 0, {}, 0

    def finished(self):
        """Whether the epochs are done, or `patience` of them brought no better validation loss."""
        options = self.options
        return self.epoch >= options.epochs or 0 < options.patience <= self.stale

    def autocast(self):
        """The context in which networks run."""
        dtype = torch.float16 if self.options.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.options.amp != "off")

    def step(self, views, n, stopping):
        """Learn from a batch of n images -> ({name: figure}, empty where it was left out; whether
        some rank is `stopping`)."""
        step = self.epoch * self.epoch_steps + self.done
        total = self.options.epochs * self.epoch_steps
        torch.manual_seed(seed_from(self.options.seed, step, ranks()[0]))
        self.method.before_step(self.optimizer, step, total, self.epoch_steps)
        self.optimizer.zero_grad()
        with self.autocast():
            loss = self.network(to_device(views, self.device))
        bad, stopping = over_ranks(not math.isfinite(loss.item()), stopping)
        if not bad:
            scale = self.scaler.get_scale()
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            self.method.after_backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            bad = self.scaler.get_scale() < scale
        self.done += 1
        if bad:
            self.skipped += 1
            return {}, stopping
        self.method.after_step(step, total)
        figures = dict(train_loss=loss.item(), **self.method.health())
        for name, value in dict(n=1, **figures).items():
            self.sums[name] = self.sums.get(name, 0.0) + value * n
        return figures, stopping

    def state_dict(self):
        """What last.pt holds; of a finished run the position alone: its weights are in best.pt."""
        state = {name: getattr(self, name) for name in self.PROGRESS} | dict(ranks=ranks()[1])
        if not self.finished():
            state |= {name: getattr(self, name).state_dict() for name in self.STATEFUL}
        return state

    def load_state_dict(self, state):
        for name, value in state.items():
            if name in self.STATEFUL:
                getattr(self, name).load_state_dict(value)
            else:
                setattr(self, name, value)
        self.done = self.done * state["ranks"] // ranks()[1]    # after about as many images


def network_of(method):
    """The U-Net of MedSASS, the encoder of a baseline."""
    return getattr(method, "unet", method.encoder)


def to_device(views, device):
    """Move a batch's views; channels_last is what CPU and GPU convolutions are fastest in."""
    moved = []
    for view in views:
        view = view.to(device, non_blocking=True)
        if view.ndim == 4:
            view = view.contiguous(memory_format=torch.channels_last)
        moved.append(view)
    return moved


@torch.no_grad()
def update_batchnorm(method, loader, device, batches=64):
    """BatchNorm's statistics become their mean over un-augmented training images under the weights
    as they are now (Wu & Johnson 2021, "precise BN"): the usual running average covers about ten
    steps: in short epochs, a network that has since changed. torch.optim.swa_utils.update_bn would
    reset the BatchNorm of a frozen part, too."""
    method.train()
    network = network_of(method)
    norms = []
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and module.training:
            module.reset_running_stats()
            module.momentum = None                      # the plain mean over batches
            norms.append(module)
    if norms:
        for _, images in itertools.islice(loader, batches):
            network(normalise(to_device([images], device)[0]))
    for norm in norms:
        norm.momentum = 0.1


@torch.no_grad()
def validate(method, loader, device, seed):
    """Mean loss over the validation images: the same views and masks each time."""
    method.eval()
    rank, n_ranks = ranks()
    loss = n = 0
    for batch, (index, views) in enumerate(loader):
        # MAE and SimMIM draw what they hide in forward
        torch.manual_seed(seed_from(seed, rank + batch * n_ranks))
        loss += method(to_device(views, device)).item() * len(index)
        n += len(index)
    loss, n = over_ranks(loss, n)
    return loss / n


@contextlib.contextmanager
def asked_to_stop():
    """Inside, SIGTERM (a cluster's pre-emption) and SIGINT (Ctrl-C) do not end the program; their
    numbers are appended to the yielded list."""
    signals = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, lambda number, frame: signals.append(number))
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(method, sets, options, folder, device, epoch_size=0):
    """Train, validate, log, save, maybe stop: until the epochs are done. The first rank writes.

    sets: training, plain training (for BatchNorm) and validation data, as Images. epoch_size:
    images an epoch, if more than there are. Ends the program on SIGTERM and Ctrl-C, after it has
    saved, and after an epoch of which every step was left out.
    """
    rank, _ = ranks()
    train_set, plain_set, val_set = sets
    seed, size = options.seed, options.batch_size
    batches = Batches(len(train_set), size, seed, epoch_size, ranks())
    val_workers = min(options.workers, 1)
    train_loader = make_loader(train_set, batches, options.workers)
    plain_loader = make_loader(plain_set, Batches(len(plain_set), size, seed), val_workers)
    val_loader = make_loader(val_set, Batches(len(val_set), size, shard=ranks()), val_workers)
    steps = len(batches)
    trainer = Trainer(method, options, device, steps)
    module = getattr(method, "unet", method)            # MedSASS has no weights but its U-Net's
    print(f"{folder}: precision {options.amp}")
    log = []
    if (folder / "last.pt").exists():
        trainer.load_state_dict(load_checkpoint(folder / "last.pt", device))
        print(f"{folder}: going on after {trainer.epoch} epochs and {trainer.done} steps")
        log = read_log(folder)[:trainer.epoch]
    bar = tqdm(total=options.epochs * steps, initial=trainer.epoch * steps + trainer.done,
               unit=" steps", mininterval=1, disable=rank > 0)

    def save(name, content):
        if rank == 0:
            write_atomically(folder / name, functools.partial(torch.save, content))

    with asked_to_stop() as signals, bar:
        while not trainer.finished():
            bar.set_description(f"epoch {trainer.epoch + 1}")
            batches.epoch, batches.done = trainer.epoch, trainer.done
            method.train()
            waited = 0
            start = saved = before = time.time()
            for index, views in train_loader:
                waited += time.time() - before
                figures, stopping = trainer.step(views, len(index), bool(signals))
                before = time.time()
                bar.set_postfix(figures, refresh=False)
                bar.update()
                if stopping or before - saved > 60 * options.save_minutes:
                    save("last.pt", trainer.state_dict())
                    saved = time.time()
                if stopping:
                    step = trainer.epoch * steps + trainer.done
                    sys.exit(f"stopped after step {step}; the same command, without --overwrite, "
                             "goes on from there")
            if not trainer.sums:
                sys.exit(f"epoch {trainer.epoch + 1}: no loss was finite, or every gradient "
                         "overflowed: try --amp off, or a smaller --lr")
            sums = dict(zip(trainer.sums, over_ranks(*trainer.sums.values()), strict=True))
            n = sums.pop("n")
            figures = {name: total / n for name, total in sums.items()}
            with trainer.autocast():
                update_batchnorm(method, plain_loader, device)
                val_loss = validate(method, val_loader, device, seed)
            row = dict(epoch=trainer.epoch + 1, val_loss=val_loss, **figures,
                       skipped=trainer.skipped, seconds=time.time() - start, waited=waited)
            log.append({name: f"{value:.6g}" for name, value in row.items()})
            if method.collapsed(figures):
                bar.write(f"epoch {trainer.epoch + 1}: {method.collapsed(figures)}")
            is_better = val_loss < trainer.best
            trainer.stale += 1
            if is_better:
                trainer.best, trainer.stale = val_loss, 0
            trainer.epoch += 1
            trainer.begin_epoch()
            if rank == 0:
                write_csv(folder / "log.csv", log)
            if is_better or not method.keep_best:       # a loss that says little: the last is kept
                model = module.state_dict()
                save("best.pt", dict(epoch=trainer.epoch, val_loss=val_loss, model=model))
            save("last.pt", trainer.state_dict())
    if rank == 0:                                       # the last files of a run
        kept = load_checkpoint(folder / "best.pt", device)
        module.load_state_dict(kept["model"])
        print(f"{folder}: the weights of epoch {kept['epoch']} are kept")
        write_atomically(folder / "encoder.pth", functools.partial(export_encoder, method))
        write_samples(method, val_set, seed, folder / "samples.png", device)


@torch.no_grad()
def write_samples(method, val_set, seed, path, device):
    """samples.png: what the method sees and makes of validation images (its samples())."""
    method.eval()
    items = [val_set[0, k] for k in range(len(val_set))[:6]]
    _, views = torch.utils.data.default_collate(items)
    torch.manual_seed(seed_from(seed))
    samples = method.samples(to_device(views, device))
    columns = []
    for pictures in samples.values():                   # masks, uint8 images, or normalised ones
        pictures = pictures.cpu()
        if pictures.is_floating_point():
            pictures = (pictures * STD + MEAN).mul(255).round().clamp(0, 255)
        columns.append(pictures.byte().permute(0, 2, 3, 1).squeeze(3).numpy())
    image = prepare_data.contact_sheet(list(zip(*columns, strict=True)), list(samples))
    write_png(path, image)


# ------------------------------------------------------------------------------------ run folders

def write_atomically(path, write):
    """write(temporary path), then rename: never half a file under the real name."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:                       # torch.save on a full disk
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path):
    """A dict from a JSON file, an empty one where there is no file; ends the program where it holds
    none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        sys.exit(f"{path} cannot be read: delete it, and run its command again")


def write_json(path, content):
    """A dict as JSON, whole or not at all."""
    write_atomically(path, lambda file: file.write_text(json.dumps(content, indent=2) + "\n"))


def write_png(path, pixels):
    """uint8 (H, W) or (H, W, 3) as PNG, whole or not at all."""
    write_atomically(path, functools.partial(Image.fromarray(pixels).save, format="PNG"))


def write_csv(path, rows):
    """A list of dicts as a CSV, whole or not at all; the last has all keys."""
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[-1], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def read_log(folder):
    """The rows of a run's log.csv, a list of dicts; none where there is no file."""
    path = folder / "log.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def load_checkpoint(path, device):
    """A checkpoint of this file, a dict; ends the program with one line where it cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                          # torch raises a dozen kinds
        sys.exit(f"{path} cannot be read ({type(error).__name__}): the run's command, with "
                 "--overwrite, starts it afresh")


def pick_device(name):
    """"auto" -> cuda, mps or cpu, whichever is there; ends the program where the one asked for is
    not."""
    if name == "auto":
        name = "cpu"
        if torch.accelerator.is_available():
            name = torch.accelerator.current_accelerator().type
        print(f"device: {name}")
    try:
        return torch.zeros(1, device=name).device       # with a number: the current GPU
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {name} cannot be used here: {str(error).splitlines()[0]}")


def pick_precision(asked, device, method):
    """--amp -> "off", "bf16" or "fp16". DINO is never trained in fp16 (its authors advise against
    it for small patches): ends the program where that is asked for."""
    not_fp16 = isinstance(method, DINO)
    if asked == "fp16" and not_fp16:
        sys.exit("--amp fp16 is not for dino, whose loss becomes nan in it: bf16 or off")
    if asked != "auto":
        return asked
    if device.type != "cuda":
        return "off"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "off" if not_fp16 else "fp16"


@contextlib.contextmanager
def exit_on_value_error():
    """A ValueError inside, as of models.py, ends the program with its message."""
    try:
        yield
    except ValueError as error:
        sys.exit(str(error))


def build_method(args, meta):
    """The method, its weights drawn from --seed; ends the program where there is no such one."""
    flags = {}
    if args.method == "medsass":
        flags = dict(threshold=args.threshold, loss=args.loss, train_part=args.train,
                     foreground=args.foreground or meta["foreground"], refine=args.refine or ())
    torch.manual_seed(seed_from(args.seed))
    batch_size = args.batch_size * ranks()[1]
    with exit_on_value_error():
        method = METHODS[args.method](args.backbone, meta["size"], batch_size, **flags)
    least = 2 * ranks()[1]
    if min(batch_size, meta["counts"]["train"]) < least and isinstance(method, (BYOL, SimSiam)):
        sys.exit(f"{args.method}'s BatchNorm needs at least 2 images a step on each rank: "
                 f"--batch-size 2 or more, and {least} training images")
    return method


def start_from(method, source, backbone):
    """--encoder: load the weights of a file, or timm's of ImageNet, into a method's encoder and its
    moving average. Returns their sha256; ends the program where that cannot be done."""
    with tempfile.TemporaryDirectory() as folder:
        path = source
        if source == "imagenet":
            path = Path(folder, "imagenet.pth")         # torch.save writes the name into the file
            try:
                model = timm.create_model(BACKBONES[backbone], pretrained=True)
            except Exception as error:                  # whatever its hub client raises
                sys.exit("--encoder imagenet: timm cannot fetch its weights "
                         f"({type(error).__name__}): check the network, or give --encoder FILE")
            torch.save(model.state_dict(), path)
        with exit_on_value_error():
            load_encoder(getattr(method, "unet", method), path)
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    for name in ("target", "student"):                  # BYOL's and DINO's other copy of it, a head
        copied = getattr(method, name, None)
        if isinstance(copied, nn.Module):
            copied[0].load_state_dict(method.encoder.state_dict())
    return digest


MEDSASS_FLAGS = ("train", "threshold", "loss", "foreground", "refine")
# Flags that enter a run folder's name when they are not defaults, and the prefix of each value.
VARIANT = dict(train="", threshold="", loss="", foreground="", epochs="e", batch_size="b",
               patience="p", lr="lr", weight_decay="wd", amp="")
# Flags that do not change what a run computes.
NOT_SETTINGS = ("compile", "save_minutes", "workers", "data", "out", "device", "overwrite")


def run_settings(args, method, meta):
    """(a dict of all settings that decide what a run computes; its folder, whose name holds those
    that are not defaults, in flag order). Flags that only MedSASS uses are named and ignored for a
    baseline."""
    defaults = vars(parse_args(["--dataset", args.dataset]))
    defaults |= dict(foreground=meta["foreground"], patience=5 if method.keep_best else 0,
                     lr=method.lr, weight_decay=method.weight_decay)
    settings = defaults.copy()
    for name, value in vars(args).items():
        if value in (None, defaults[name]):
            continue
        if args.method != "medsass" and name in MEDSASS_FLAGS:
            print(f"--{name} is not used by {args.method} and ignored")
        else:
            settings[name] = value
    variant = args.method
    if settings["refine"]:
        variant += "+"
        if settings["refine"] != list(REFINEMENTS):
            variant += "-".join(settings["refine"])
    if args.encoder:
        settings["encoder"] = Path(args.encoder).name
        variant += f"-from-{Path(args.encoder).stem}"
    for name, prefix in VARIANT.items():
        if settings[name] != defaults[name]:
            variant += f"-{prefix}{settings[name]}"
    folder = Path(args.out) / args.dataset / args.backbone / variant / f"seed{args.seed}"
    if args.method != "medsass":
        settings["train"] = "encoder"
    for name in defaults:
        if name in NOT_SETTINGS or settings[name] is None:
            del settings[name]
    return settings | dict(img_size=meta["size"], data=meta["fingerprint"]), folder


def clear_run(folder):
    """Delete what a run has written into its folder."""
    for name in ("config.json", "last.pt", "best.pt", "encoder.pth", "samples.png", "log.csv",
                 "train_masks.npy", "val_masks.npy", "decision.json"):
        (folder / name).unlink(missing_ok=True)


def open_run(settings, folder, command, overwrite):
    """Make a run's folder with its config.json; ends the program where one is there of other
    settings."""
    path = folder / "config.json"
    if path.exists() and not overwrite:
        there = read_json(path).get("settings", {})
        for name, value in settings.items():
            if there.get(name) != value:
                sys.exit(f"{folder} holds a run with another {name} ({there.get(name)} there, "
                         f"{value} asked): --overwrite starts it afresh")
        return
    clear_run(folder)
    versions = {"python": platform.python_version()}
    for library in (torch, torchvision, timm, cv2, np):
        versions[library.__name__] = library.__version__
    write_json(path, dict(settings=settings, command=command, ranks=ranks()[1], versions=versions))


def is_finished(folder):
    """Whether a run folder is complete: samples.png is the last file that a run writes."""
    return (folder / "samples.png").exists()


# ------------------------------------------------------------------------------------------ flags

def parse_args(argv=None):
    parser = argparse.ArgumentParser("pretrain.py", description=__doc__, usage=argparse.SUPPRESS,
                                     allow_abbrev=False, formatter_class=prepare_data.Help)
    add = parser.add_argument
    add("--dataset", required=True, type=prepare_data.dataset_name,
        help="name of a prepared data set, a folder under --data")
    add("--backbone", default="resnet50", choices=BACKBONES, help="the encoder of the U-Net")
    add("--method", default="medsass", choices=METHODS, help="MedSASS, or a baseline's encoder")
    add("--train", default="end2end", choices=["end2end", "encoder"],
        help="the whole U-Net, or the encoder alone against a frozen decoder (section 4.1)")
    add("--threshold", default="otsu", choices=THRESHOLDS, help="of the pseudo-masks (Table 3)")
    add("--refine", nargs="*", choices=REFINEMENTS, metavar="PART",
        help="better Otsu masks, without a label: from the channel that Otsu separates best, "
        "without the frame of the picture, without what lies where objects never lie; no PART: "
        "channel frame position. Unset: off, as in the paper")
    add("--encoder", metavar="FILE",
        help="start from this encoder, a checkpoint of ours, timm's or torchvision's, or from "
        "\"imagenet\", timm's weights. Unset: from scratch, as in the paper")
    add("--loss", default="focal_tversky", choices=LOSSES,
        help="between drawn and pseudo-mask (Table 4; bce: appendix B.1)")
    add("--foreground", choices=["bright", "dark"],
        help="objects against what is around them; unset: what prepare_data.py decided")
    add("--epochs", type=int, default=50, help="at most (Table 5: 10, 20, 50, 70)")
    add("--batch-size", type=int, default=16, help="images a step (Tables 7, 8: 8, 16, 32)")
    add("--patience", type=int,
        help="early stopping: epochs without a better validation loss; 0: never. Unset: 5; for "
        "byol, dino, simsiam, whose loss says nothing about quality, 0")
    add("--lr", type=float, help="unset: the method's own (medsass: 3.6e-4)")
    add("--weight-decay", type=float, help="unset: the method's own (medsass: 1e-5)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"],
        help="precision of the networks; losses stay in float32. auto: bf16 on a GPU that has it, "
        "else fp16 there, off on a CPU")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--save-minutes", type=float, default=10, help="minutes between saves within an epoch")
    add("--sync-batchnorm", action="store_true", default=None,
        help="BatchNorm over the images of all GPUs")
    add("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 1)),
        help="processes that load and augment; their number changes no result")
    add("--data", default="data", metavar="DIR", help="where prepared data sets are")
    add("--out", default="runs", metavar="DIR", help="where runs are kept")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--overwrite", action="store_true", help="start afresh in a folder that holds another run")
    args = parser.parse_args(argv)
    check_numbers(parser, args, epochs=1, batch_size=1, patience=0, lr=0, weight_decay=0, seed=0,
                  workers=0, save_minutes=0)
    if args.refine is not None:                         # in one order, each once; none: all
        args.refine = sorted(set(args.refine or REFINEMENTS))
        if args.threshold != "otsu" and args.method == "medsass":
            parser.error("--refine refines Otsu's masks: leave out --threshold")
    return args


def check_numbers(parser, args, **least):
    """End the program where a number of `args` is below its least, infinite or nan."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value} is not a number from {low} up")


def join_ranks():
    """Under torchrun: find the other processes; all but the first are silent."""
    if dist.is_torchelastic_launched():
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
    if ranks()[0] > 0:
        sys.stdout = open(os.devnull, "w")


def main(argv=None):
    args = parse_args(argv)
    flags = sys.argv[1:] if argv is None else argv
    join_ranks()
    rank, n_ranks = ranks()
    data = Path(args.data) / args.dataset
    meta = prepare_data.read_meta(data)
    device = pick_device(args.device)
    if args.sync_batchnorm and (device.type != "cuda" or n_ranks == 1):
        sys.exit("--sync-batchnorm is for several GPUs, under torchrun")
    torch.set_float32_matmul_precision("high")          # TF32: mantissas of 10 bits, on a GPU
    method = build_method(args, meta)
    settings, folder = run_settings(args, method, meta)
    settings["amp"] = pick_precision(args.amp, device, method)
    method.lr, method.weight_decay = settings["lr"], settings["weight_decay"]
    if args.encoder:
        settings["encoder_sha256"] = start_from(method, args.encoder, args.backbone)
    method.to(device, memory_format=torch.channels_last)
    if args.compile:
        method.compile()
    if args.sync_batchnorm:
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    options = Options(args.epochs, args.batch_size, settings["patience"], args.seed,
                      settings["amp"], args.workers, args.save_minutes)
    with prepare_data.only_one(folder / ".lock") if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            command = shlex.join(["python", "pretrain.py", *flags])
            open_run(settings, folder, command, args.overwrite)
        wait_for_ranks()
        if is_finished(folder):
            print(f"{folder} is finished: nothing to do")
        else:
            sets = image_sets(method, data, args.seed, folder)
            train(method, sets, options, folder, device)
        wait_for_ranks()                                # until the first has written the last file
        if args.method != "medsass":                    # heads and copies that nobody reads again
            (folder / "best.pt").unlink(missing_ok=True)
    print(folder / "samples.png")                       # run_all.sh finds the run by this line


def explain_memory(error):
    """End the program with one line where a RuntimeError of torch means too little memory."""
    text = str(error).lower()
    if "shared memory" in text or "bus error" in text:
        sys.exit("shared memory (/dev/shm) is too small for the processes that load images: "
                 "--workers 0, or more of it (docker run --shm-size 1g)")
    if "out of memory" in text or "allocate memory" in text:
        sys.exit("out of memory: a smaller --batch-size, or pictures prepared at a smaller --size")


def end_on_sigterm(signum, frame):
    """SIGTERM outside of training, where there is nothing to save, ends the program as Ctrl-C."""
    raise KeyboardInterrupt("stopped by SIGTERM")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_on_sigterm)
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:       # a full disk, a forbidden folder, Ctrl-C
        sys.exit(f"pretrain.py: {str(error) or 'interrupted'}; the same command, without "
                 "--overwrite, goes on from where it was saved last")
    except RuntimeError as error:
        explain_memory(error)
        raise
