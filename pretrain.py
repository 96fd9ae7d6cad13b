"""Pre-train a U-Net on Otsu pseudo-masks (MedSASS, section 3.3 of the paper), or a baseline encoder; without any label.

    python pretrain.py --dataset demo --epochs 10
    python pretrain.py --dataset isic --backbone vit_small
    python pretrain.py --dataset isic --train encoder --threshold ght --loss tversky
    python pretrain.py --dataset isic --method byol
    torchrun --standalone --nproc-per-node 4 pretrain.py --dataset xray

Reads data/<dataset>/ (see prepare_data.py), writes runs/<dataset>/<backbone>/<method>[-variant]/seed<k>/. The same
command again goes on where it was stopped, to the bit.
"""

import argparse
import contextlib
import copy
import csv
import datetime
import functools
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import sys
import tempfile
import threading
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

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # timm's default for both backbones

cv2.setNumThreads(0)                                            # the loader's workers are the parallelism

# ---------------------------------------------------------------------------------------------- pseudo-masks (3.3.2)

THRESHOLDS = ("otsu", "ght", "adaptive_mean", "adaptive_gaussian", "fixed")
# Barron's constants for H-DIBCO 2016 (ECCV 2020, section 4). nu and kappa are pixel counts, tuned on pages of about
# 2 ** 20 pixels; pseudo_mask scales them to the image, or a 224 x 224 image would be all prior.
GHT_NU, GHT_TAU, GHT_KAPPA, GHT_OMEGA, GHT_PIXELS = 2 ** 29.5, 2 ** 3.125, 2 ** 22.25, 2 ** -3.25, 2 ** 20


def otsu_threshold(gray):
    """uint8 (H, W) -> int t; foreground is gray > t (Otsu 1979, by OpenCV)."""
    return int(cv2.threshold(gray, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0])


def ght_threshold(gray, nu=GHT_NU, tau=GHT_TAU, kappa=GHT_KAPPA, omega=GHT_OMEGA):
    """uint8 (H, W) -> int t by Generalized Histogram Thresholding; foreground is gray > t (Barron, ECCV 2020, sec. 3).

    Two Gaussians are fitted, one on either side of every split. nu >= 0: strength (in pixels) of the prior that each
    has standard deviation tau; kappa >= 0: strength of the prior that a share omega of the pixels is at or below t.
    Ties give the mean of the tied thresholds, as in Barron's code.
    """
    n = np.bincount(gray.ravel(), minlength=256).astype(np.float64)
    x = np.arange(256.0)

    def side(n, x, share):                                      # cumulated over levels 0..t, for t = 0..254
        w = np.maximum(np.cumsum(n)[:-1], 1e-30)
        mean = np.cumsum(n * x)[:-1] / w
        d = np.cumsum(n * x ** 2)[:-1] - w * mean ** 2          # sum of squared deviations
        p = w / n.sum()
        v = np.maximum((p * nu * tau ** 2 + d) / (p * nu + w), 1e-30)
        return -d / v - w * np.log(v) + 2 * (w + kappa * share) * np.log(w)

    score = side(n, x, omega) + side(n[::-1], x[::-1], 1 - omega)[::-1]
    return int(np.flatnonzero(score == score.max()).mean())


def pseudo_mask(images, method="otsu", foreground="bright"):
    """uint8 (B, H, W, 3) RGB -> uint8 {0, 1} (B, H, W): the label that an image gives itself (Algorithm 1).

    method: one of THRESHOLDS. "dark" is the complement of "bright" at the same threshold. An image of one gray value
    has no foreground. GHT's pixel-count constants are scaled to the image's size.
    """
    if method not in THRESHOLDS or foreground not in ("bright", "dark"):
        raise ValueError(f"no pseudo-mask {method!r} / {foreground!r}: {', '.join(THRESHOLDS)}; bright, dark")
    masks = np.zeros(images.shape[:3], np.uint8)
    for image, mask in zip(images, masks):
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if gray.min() == gray.max():
            continue
        if method.startswith("adaptive"):                       # gray > local mean - C, block 11, C 2
            kind = cv2.ADAPTIVE_THRESH_MEAN_C if method == "adaptive_mean" else cv2.ADAPTIVE_THRESH_GAUSSIAN_C
            bright = cv2.adaptiveThreshold(gray, 1, kind, cv2.THRESH_BINARY, 11, 2) == 1
        elif method == "ght":
            scale = gray.size / GHT_PIXELS
            bright = gray > ght_threshold(gray, GHT_NU * scale, GHT_TAU, GHT_KAPPA * scale, GHT_OMEGA)
        else:
            bright = gray > (otsu_threshold(gray) if method == "otsu" else 127)
        mask[:] = bright == (foreground == "bright")
    return masks


# ---------------------------------------------------------- refined pseudo-masks, without labels (not in the paper)

CHANNELS = ("gray", "red", "green", "blue")
REFINEMENTS = ("channel", "frame", "position")


def one_channel(image, channel="gray", foreground="dark"):
    """uint8 (H, W, 3) RGB -> uint8 (H, W), dark where the foreground is: gray as OpenCV weighs the
    colours, or one colour; inverted for "bright" foreground."""
    if channel == "gray":
        values = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    else:
        values = np.ascontiguousarray(image[..., CHANNELS.index(channel) - 1])
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
    """uint8 (N, H, W, 3), may be mapped -> (one of CHANNELS, {channel: mean separability}).

    The channel that Otsu's threshold separates best, in the mean over images; gray wins ties. Skin
    lesions stand out more in blue than in gray.
    """
    means = dict.fromkeys(CHANNELS, 0.0)
    for image in images:
        for channel in CHANNELS:
            means[channel] += separability(one_channel(image, channel)) / len(images)
    return max(CHANNELS, key=lambda channel: round(means[channel], 6)), means


def dark_mask(values, frame=None):
    """uint8 (H, W) -> bool (H, W): not above Otsu's threshold. What is frame, bool (H, W), is
    neither counted in the histogram nor foreground. Nothing where all values are alike."""
    seen = values if frame is None else values[~frame][:, None]
    if not seen.size or seen.min() == seen.max():
        return np.zeros(values.shape, bool)
    mask = values <= otsu_threshold(seen)
    return mask if frame is None else mask & ~frame


def common_frame(often):
    """bool (H, W), what is dark in most images -> bool (H, W): the part of it that is 4-connected
    to the border. Objects rarely lie there; lens corners, letterboxes, collimators do."""
    ringed = cv2.copyMakeBorder(often.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=1)
    cv2.floodFill(ringed, None, (0, 0), 2)                      # from the ring inwards
    return ringed[1:-1, 1:-1] == 2


def frame_of(values, common=None):
    """uint8 (H, W) of one_channel -> bool (H, W), what is frame in one image: `common`, and what is
    at most .55 of the median and 4-connected to a corner; dilated by 1/32 of the side, because the
    edge of a lens is blurred."""
    dark = (values <= 0.55 * np.median(values)).astype(np.uint8)
    _, labels = cv2.connectedComponents(dark, connectivity=4)
    corners = labels[[0, 0, -1, -1], [0, -1, 0, -1]]
    frame = np.isin(labels, corners[corners > 0])
    if common is not None:
        frame |= common
    side = 2 * (max(values.shape) // 32) + 1
    return cv2.dilate(frame.astype(np.uint8), np.ones((side, side), np.uint8)) > 0


def position_map(masks, n=None, splits=8):
    """masks: bool (H, W) each, a sequence, or with n any iterable of so many -> (float (H, W),
    reliability in [0, 1]): where objects are, as far as the images agree on it.

    The smoothed mean mask p (Gaussian of 1/24 of the side), drawn towards its mean where such maps
    of random halves do not correlate: p' = mean(p) + r (p - mean(p)), r = 2 c / (1 + c) of their
    mean correlation c (Spearman 1910, Brown 1910), not below 0. Objects anywhere: r near 0, p' flat.
    c is taken lower by two standard deviations over the splits: of 60 sets of 8 images with objects
    anywhere 6 lost some without that, none with it; r of skin and X-rays stays above .97.
    """
    n = len(masks) if n is None else n
    generator = np.random.default_rng(0)
    first = np.zeros((splits, n), bool)
    for row in first:
        row[generator.permutation(n)[:n // 2]] = True
    sums = 0                                                    # of all, then of the first halves
    for k, mask in enumerate(masks):
        weights = np.concatenate([[1], first[:, k]]).astype(np.float32)
        sums = sums + weights[:, None, None] * mask
    sigma = max(sums.shape[1:]) / 24
    maps = [cv2.GaussianBlur(total, (0, 0), sigma).astype(np.float64) for total in sums]
    whole = maps[0] / n
    correlations = []
    for half in maps[1:]:
        other = maps[0] - half
        is_flat = half.std() == 0 or other.std() == 0
        correlations.append(0 if is_flat else np.corrcoef(half.ravel(), other.ravel())[0, 1])
    c = max(0.0, float(np.mean(correlations) - 2 * np.std(correlations)))
    reliability = 2 * c / (1 + c)
    return whole.mean() + reliability * (whole - whole.mean()), reliability


def drop_unlikely(mask, position):
    """bool (H, W) -> the same without the 4-connected components that nowhere reach half of the
    largest value of `position` (position_map); and how many were kept and dropped."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    likely = np.unique(labels[position >= 0.5 * position.max()])
    likely = likely[likely > 0]
    return np.isin(labels, likely), len(likely), count - 1 - len(likely)


@dataclass
class Refinement:
    """What --refine has decided on the training images; draw() then needs one image at a time."""
    foreground: str
    channel: str = "gray"
    common: np.ndarray | None = None                            # common_frame
    has_frame: bool = False
    positions: list = field(default_factory=list)               # of position_map, one after the other

    def draw(self, image):
        """uint8 (H, W, 3) -> bool (H, W), the refined mask."""
        return self.trace(image)[0]

    def trace(self, image):
        """uint8 (H, W, 3) -> its mask, its frame (bool (H, W) or None), and how many components
        were kept and dropped by their position."""
        values = one_channel(image, self.channel, self.foreground)
        frame = frame_of(values, self.common) if self.has_frame else None
        mask = dark_mask(values, frame)
        kept = dropped = 0
        for position in self.positions:
            mask, kept, fewer = drop_unlikely(mask, position)
            dropped += fewer
        return mask, frame, kept, dropped

    def draw_all(self, images):
        """The masks of uint8 (N, H, W, 3), may be mapped, one after the other, drawn on all cores."""
        with prepare_data.thread_pool() as pool:
            for start in range(0, len(images), 256):
                yield from pool.map(self.draw, [np.array(i) for i in images[start:start + 256]])


def decide_refinement(images, foreground, parts=REFINEMENTS):
    """Training images uint8 (N, H, W, 3), may be mapped -> (Refinement, evidence). Holds at
    most 256 images. parts: of REFINEMENTS. evidence: a dict of what was decided and measured: channel and
    separability; common_frame and framed, shares of a picture; reliability; dropped, a share of
    the components. framed and dropped are measured on at most 200 images."""
    refinement = Refinement(foreground)
    evidence = {}
    if "channel" in parts:
        refinement.channel, means = choose_channel(images)
        evidence["separability"] = means
    evidence["channel"] = refinement.channel
    if "frame" in parts:
        often = sum(mask.astype(np.int64) for mask in refinement.draw_all(images))
        refinement.common = common_frame(often > 0.7 * len(images))
        refinement.has_frame = True
        evidence["common_frame"] = float(refinement.common.mean())
    for _ in range(2 if "position" in parts else 0):            # again, from the masks of the first
        position, evidence["reliability"] = position_map(refinement.draw_all(images), len(images))
        refinement.positions.append(position)
    some = [refinement.trace(np.array(image)) for image in images[::math.ceil(len(images) / 200)]]
    if refinement.has_frame:
        evidence["framed"] = float(np.mean([frame.mean() for _, frame, _, _ in some]))
    if refinement.positions:
        dropped = sum(trace[3] for trace in some)
        evidence["dropped"] = dropped / max(1, dropped + sum(trace[2] for trace in some))
    return refinement, evidence


def refined_masks(images, foreground, parts=REFINEMENTS):
    """uint8 (N, H, W, 3) -> (uint8 {0, 1} (N, H, W), evidence): decide_refinement and its masks in
    one call, for images that fit into memory."""
    refinement, evidence = decide_refinement(images, foreground, parts)
    return np.stack(list(refinement.draw_all(images))).astype(np.uint8), evidence


# ----------------------------------------------------------------------------------------- augmentation (appendix D)

def warp(image, matrix):
    """uint8 (3, H, W) -> the same: the pixel at (x, y) is taken from matrix @ (x, y, 1), bilinear, of a tv_tensors.Mask
    (1, H, W) the nearest. What lies outside is the mirror image of what lies inside: torchvision fills with black,
    which Otsu would take for dark foreground."""
    is_mask, (height, width) = isinstance(image, tv_tensors.Mask), image.shape[1:]
    how = (cv2.INTER_NEAREST if is_mask else cv2.INTER_LINEAR) | cv2.WARP_INVERSE_MAP
    out = cv2.warpPerspective(image.permute(1, 2, 0).numpy(), matrix, (width, height), flags=how,
                              borderMode=cv2.BORDER_REFLECT_101)
    return tv_tensors.Mask(out[None]) if is_mask else torch.from_numpy(out).permute(2, 0, 1)


class Perspective(v2.RandomPerspective):
    """torchvision's, with mirrored borders."""

    def transform(self, image, params):
        return warp(image, np.append(params["coefficients"], 1.0).reshape(3, 3))


class Rotation(v2.RandomAffine):
    """torchvision's random affine map (here a rotation about the centre), with mirrored borders."""

    def transform(self, image, params):
        centre = ((image.shape[2] - 1) / 2, (image.shape[1] - 1) / 2)
        forward = np.vstack([cv2.getRotationMatrix2D(centre, -params["angle"], params["scale"]), [0, 0, 1]])
        return warp(image, np.linalg.inv(forward))


def paper_augmentation():
    """uint8 (3, H, W), or with its tv_tensors.Mask (1, H, W) -> the same. The paper's list and order; it gives no
    strengths, these are mild, common ones."""
    jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
    return v2.Compose([v2.RandomChoice([jitter, Perspective(distortion_scale=0.2, p=1.0)]),
                       v2.RandomChoice([jitter, Rotation(degrees=10)]),
                       v2.RandomVerticalFlip(), v2.RandomHorizontalFlip()])


# -------------------------------------------------------------------------------------------------------- the method

class MedSASS(nn.Module):
    """A U-Net that learns to draw the pseudo-mask of the very image it sees (section 3.3.1, Algorithm 1).

    augment(image): uint8 (3, H, W) -> [view uint8 (3, H, W), pseudo-mask uint8 {0, 1} (1, H, W)], in the workers.
    plain(image): the same without augmentation, for validation. forward([views, masks]) -> scalar loss.
    train_part "encoder" or "decoder": only that part learns; the other stays as it is, its BatchNorm in eval mode
    (section 4.1). The other members are those of every class in baselines/.
    """

    backbones = tuple(BACKBONES)
    stops_early = True

    def __init__(self, backbone, img_size=224, batch_size=16, threshold="otsu", foreground="bright",
                 loss="focal_tversky", train_part="end2end", refine=()):
        super().__init__()
        self.unet, self.img_size = build_unet(backbone, img_size), img_size
        self.foreground, self.refine = foreground, refine       # with refine, masks come with the images
        self.loss, self.train_part = LOSSES[loss], train_part
        self.lr, self.weight_decay = 3.6e-4, 1e-5               # not in the paper: the authors' sibling code
        if train_part != "end2end":
            self.unet.requires_grad_(train_part == "decoder").encoder.requires_grad_(train_part == "encoder")
        draw = functools.partial(pseudo_mask, method=threshold, foreground=foreground)
        self.plain = functools.partial(view_and_mask, v2.Identity(), draw)
        self.augment = functools.partial(view_and_mask, paper_augmentation(), draw)
        if refine:
            self.plain, self.augment = v2.Identity(), paper_augmentation()

    @property
    def encoder(self):
        return self.unet.encoder

    def train(self, mode=True):
        super().train(mode)
        if self.train_part != "end2end":
            self.unet.train(mode and self.train_part == "decoder").encoder.train(mode and self.train_part == "encoder")
        return self

    def forward(self, views):
        images, masks = views
        logits = self.unet(normalise(images))                   # (B, 1, H, W)
        self.shares = masks.float().mean(), (logits.detach() > 0).float().mean()
        return self.loss(logits, masks)

    def optimizer(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], self.lr,
                                weight_decay=self.weight_decay, fused=True)

    def before_step(self, optimizer, step, total_steps, epoch_steps): pass      # noqa: E704; constant

    def after_backward(self): pass                              # noqa: E704; no clipping, nothing frozen

    def after_step(self, step, total_steps): pass               # noqa: E704; no moving average

    def health(self):
        return dict(zip(("pseudo_foreground", "predicted_foreground"), (share.item() for share in self.shares)))

    def collapsed(self, health):
        if health["predicted_foreground"] in (0, 1):
            return (f"the network calls every pixel {'foreground' if health['predicted_foreground'] else 'background'}: "
                    "if it stays so, try --loss focal_tversky (bce does this in appendix B.1) or a smaller --lr")

    def samples(self, views):
        columns = {"image": views[0]}
        if self.refine:
            raw = pseudo_mask(views[0].permute(0, 2, 3, 1).cpu().numpy(), "otsu", self.foreground)
            columns["Otsu"] = torch.from_numpy(raw)[:, None]
        return columns | {"pseudo-mask": views[1], "prediction": self.unet(normalise(views[0])) > 0}


METHODS = dict(medsass=MedSASS, byol=BYOL, dino=DINO, simsiam=SimSiam, mae=MAE, simmim=SimMIM)


def view_and_mask(transform, draw, image):
    """uint8 (3, H, W) -> [transform(image), its pseudo-mask uint8 {0, 1} (1, H, W)]."""
    view = transform(image)
    return [view, torch.from_numpy(draw(view.permute(1, 2, 0).numpy()[None]))]


def normalise(images):
    """uint8 (B, 3, H, W) RGB -> float, by ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images / 255 - mean) / std


# --------------------------------------------------------------------------------------------- data and its randomness

def seed_from(*key):
    """A 63-bit seed from non-negative integers such as (seed, epoch, index): randomness is their function alone."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def seeded(*key):
    """Inside, torch's CPU generator is seeded from `key` and one thread computes (as in a loader's worker, so that
    sums round alike); afterwards both are as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(*key))
            yield
    finally:
        torch.set_num_threads(threads)


class Images(torch.utils.data.Dataset):
    """One part of a data set, or some `rows` of it. Key (epoch, k) -> (row, transform(image)), the same in whatever process;
    with `masks`, an .npy, uint8 {0, 1} (N, S, S): (row, [view, mask (1, S, S)]), moved together."""

    def __init__(self, folder, part, transform, seed, rows=None, masks=None):
        self.path, self.masks = Path(folder) / f"{part}_images.npy", masks
        n = len(prepare_data.open_part(folder, part)[0])        # true masks are not read in this file
        self.rows, self.transform, self.seed = range(n) if rows is None else rows, transform, seed

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, row = key[0], self.rows[key[1]]
        image = np.array(np.load(self.path, mmap_mode="r")[row])        # mapped afresh: nothing to send to a worker
        with seeded(self.seed, epoch, row):
            image = torch.from_numpy(image).permute(2, 0, 1)
            if self.masks is None:
                return row, self.transform(image)
            mask = tv_tensors.Mask(np.array(np.load(self.masks, mmap_mode="r")[row])[None])
            view, mask = self.transform(image, mask)
            return row, [view, mask.as_subclass(torch.Tensor)]


def ranks():
    """(number of this process, how many train together): (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(*values):
    """Numbers -> their sums over all ranks, a list of floats. Each rank has to call it."""
    total = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


class Batches:
    """The batches of an epoch, lists of (pass, index): in an order of (seed, pass) alone, or as stored without seed.

    An epoch is one pass over the n images; or, where `draws` is more than n, as many as give so many draws. A last
    batch of one image joins the batch before it. At most `most` batches, where it is given. With share = (rank, ranks), each
    rank gets its part of batches that are `ranks` times as large, or in stored order every so-manieth batch: each image once.
    The first `done` batches are left out (they were done before a stop).
    """

    def __init__(self, n, batch_size, seed=None, most=None, draws=None, share=(0, 1)):
        self.n, self.seed, self.epoch, self.done = n, seed, 0, 0
        self.rank, self.ranks = share
        self.draws, batch_size = max(n, draws or 0), batch_size * (1 if seed is None else self.ranks)
        self.cuts = list(range(0, self.draws, batch_size)) + [self.draws]
        least = 2 * (1 if seed is None else self.ranks)
        if batch_size > self.ranks and len(self.cuts) > 2 and self.cuts[-1] - self.cuts[-2] < least:
            del self.cuts[-2]
        if most:
            del self.cuts[most + 1:]

    def __len__(self):
        return len(self.cuts) - 1

    def __iter__(self):
        passes = math.ceil(self.draws / self.n)
        first, generator = self.epoch * passes, torch.Generator()
        order = torch.cat([torch.arange(self.n) if self.seed is None else
                           torch.randperm(self.n, generator=generator.manual_seed(seed_from(self.seed, k)))
                           for k in range(first, first + passes)])
        spans = list(zip(self.cuts, self.cuts[1:]))
        for start, end in spans[self.rank::self.ranks] if self.seed is None else spans[self.done:]:
            batch = [(first + k // self.n, index) for k, index in enumerate(order[start:end].tolist(), start)]
            yield batch if self.seed is None else batch[self.rank::self.ranks]


def start_worker(worker):
    """In a loader's worker: signals to the whole group or job are for the main process, which still needs what is being
    loaded. The main process itself ends its workers by SIGTERM."""
    def listen():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):                          # not on a Mac
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=listen, daemon=True).start()


def make_loader(dataset, batches, workers):
    """Loads `batches` (their .epoch may change between passes); the workers stay alive."""
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=start_worker,
                                       persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())


def pick_device(name):
    """"auto" -> cuda, mps or cpu, whichever is there first, and says which; ends the program where the one asked for is
    not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        print(f"device: {torch.cuda.get_device_name() if name == 'cuda' else name}")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {name} cannot be used here: {str(error).splitlines()[0]}")
    return torch.device(name)


def pick_precision(asked, device, method):
    """--amp -> "off", "bf16" or "fp16": auto is bf16 on a GPU that has it, else fp16 there, off elsewhere. DINO is never trained
    in fp16 (its authors advise against it for small patches). Ends the program where that is asked for."""
    if asked == "auto":
        asked = "off" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        asked = "off" if asked == "fp16" and isinstance(method, DINO) else asked
    if asked == "fp16" and isinstance(method, DINO):
        sys.exit("--amp fp16 is not for dino, whose loss becomes nan in it: bf16 or off")
    return asked


def autocast(args):
    """The context in which networks run: as --amp was decided (args.precision), on args.device."""
    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(args.device, dtype, enabled=args.precision != "off")


# ----------------------------------------------------------------------------------------------------------- the loop

def write_atomically(path, write):
    """write(temporary path), then rename: a killed run or a full disk never leaves half a file under the real name."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError):                     # torch.save on a full disk
            raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None
        raise
    os.replace(temporary, path)


def write_csv(path, rows):
    """A list of dicts with the same keys as a CSV, whole or not at all."""
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def load_checkpoint(path, device):
    """A checkpoint of this file, a dict; ends the program with one line where it cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                                  # torch raises a dozen kinds for a damaged file
        sys.exit(f"{path} cannot be read ({type(error).__name__}): --overwrite starts the run afresh")


def network_of(method):
    """The network that is kept in eval mode for others to use: the U-Net of MedSASS, the encoder of a baseline."""
    return getattr(method, "unet", method.encoder)


def to_device(views, device):
    """Move a batch's views; channels_last is what CPU and GPU convolutions are fastest in."""
    views = [view.to(device, non_blocking=True) for view in views]
    return [view.contiguous(memory_format=torch.channels_last) if view.ndim == 4 else view for view in views]


@torch.no_grad()
def settle_batchnorm(method, loader, device):
    """Set BatchNorm's statistics to their mean over un-augmented training images under the weights as they are now.

    The usual running average looks back over some ten steps; where an epoch has not many more, that is a network that
    is no longer there, and validation and test see it (Wu & Johnson 2021, "precise BN"). Training does not use them.
    """
    method.train()
    network = network_of(method)
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) and m.training]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                                    # the plain mean over batches
    for _, images in loader if norms else ():
        network(normalise(to_device([images], device)[0]))
    for norm in norms:
        norm.momentum = 0.1


@torch.no_grad()
def validate(method, loader, device, seed):
    """Mean loss over the validation images: the same images, views and masks each time, and nothing learns."""
    method.eval()
    loss, n, (rank, all_ranks) = 0.0, 0, ranks()
    for batch, (index, views) in enumerate(loader):
        torch.manual_seed(seed_from(seed, rank + batch * all_ranks))    # what a method hides is drawn in its forward
        loss += method(to_device(views, device)).item() * len(index)
        n += len(index)
    loss, n = over_ranks(loss, n)
    return loss / n


@contextlib.contextmanager
def asked_to_stop():
    """Inside, SIGTERM (a cluster's pre-emption) and SIGINT (Ctrl-C) end nothing; their names come into the list that is
    yielded."""
    names = []
    before = {number: signal.signal(number, lambda got, _: names.append(signal.Signals(got).name))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield names
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_one_epoch(method, network, loader, optimizer, scaler, device, state, args, bar, stop, save):
    """An epoch, or what `state` says is left of it; its sums are kept in `state`. network: the method, or
    DistributedDataParallel around it. save(): called every --save-minutes, and when `stop` holds a signal's name, which ends the
    program.

    A step whose loss is not finite on some rank, or whose gradient overflows in fp16, is left out and counted; ten in a row
    (or an epoch) end the program.
    """
    method.train()
    rank, batches = ranks()[0], loader.batch_sampler
    steps, batches.done, bad_in_a_row, saved, start = len(batches), state["done"], 0, time.time(), time.time()
    asked, seconds_before, sums = start, state["seconds"], state["sums"]
    for index, views in loader:
        state["waited"] += time.time() - asked
        step = state["epoch"] * steps + state["done"]
        torch.manual_seed(seed_from(args.seed, step, *[rank] * (rank > 0)))
        method.before_step(optimizer, step, args.epochs * steps, steps)
        optimizer.zero_grad(set_to_none=True)
        with autocast(args):
            loss = network(to_device(views, device))
        bad, stopping = over_ranks(not math.isfinite(loss.item()), bool(stop))
        if not bad:
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            method.after_backward()
            scaler.step(optimizer)
            scaler.update()
            bad = scaler.get_scale() < scale
        if bad:
            state["skipped"], bad_in_a_row = state["skipped"] + 1, bad_in_a_row + 1
        else:
            method.after_step(step, args.epochs * steps)
            figures, bad_in_a_row = dict(train_loss=loss.item(), **method.health()), 0
            for name, value in dict(n=1, **figures).items():
                sums[name] = sums.get(name, 0.0) + value * len(index)
            bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in figures.items()), refresh=False)
        state["done"] += 1
        state["seconds"] = seconds_before + time.time() - start
        bar.update()
        if bad_in_a_row == min(10, steps):
            names = prepare_data.read_names(Path(args.data) / args.dataset, "train")
            bar.close()
            sys.exit(f"the loss was not finite in {bad_in_a_row} steps in a row, last at step {step}, in the batch of "
                     f"{', '.join(names[i]['name'] for i in index)}: try --amp off, or a smaller --lr")
        if stopping or time.time() - saved > 60 * args.save_minutes:
            save()
            saved = time.time()
        if stopping:
            bar.close()
            sys.exit(f"stopped by {stop[0] if stop else 'another rank'} after step {step + 1}; the same command goes on from "
                     "there")
        asked = time.time()


def write_masks(refinement, images, path):
    """Write the refined masks of uint8 (N, S, S, 3), may be mapped: an .npy, uint8 {0, 1} (N, S, S), whole or not at all."""
    def write(temporary):
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=images.shape[:3]))
            with contextlib.closing(refinement.draw_all(images)) as masks:     # also on a full disk
                for mask in masks:
                    file.write(mask.astype(np.uint8).tobytes())

    write_atomically(path, write)


def image_sets(method, args, folder):
    """Three Images: training, the same un-augmented, validation; none with labels. With --refine the first rank draws masks
    on the plain images into train_masks.npy and val_masks.npy of the run's folder, once, and keeps the evidence in its
    config.json; the others wait."""
    data, masks = Path(args.data) / args.dataset, dict(train=None, val=None)
    if args.refine:
        masks = {part: folder / f"{part}_masks.npy" for part in masks}
        if ranks()[0] == 0 and not all(path.exists() for path in masks.values()):
            refinement, evidence = decide_refinement(prepare_data.open_part(data, "train")[0], method.foreground, args.refine)
            print("refined masks: " + ", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
                                                for name, value in evidence.items() if name != "separability"))
            if evidence.get("framed", 0) > 0.4:
                print("the frame covers more of a picture than a lens or letterbox should: is --foreground right? Else "
                      "--refine channel position")
            config = json.loads((folder / "config.json").read_text()) | dict(refinement=evidence)
            write_json(folder / "config.json", config)
            for part, path in masks.items():
                write_masks(refinement, prepare_data.open_part(data, part)[0], path)
        over_ranks()                                            # until they are written
    plain = getattr(method, "plain", method.augment)
    return (Images(data, "train", method.augment, args.seed, masks=masks["train"]),
            Images(data, "train", v2.Identity(), args.seed), Images(data, "val", plain, args.seed, masks=masks["val"]))


def take_up(folder, module, optimizer, scaler, state, device):
    """Go on from last.pt: its contents go into all of these."""
    saved = load_checkpoint(folder / "last.pt", device)
    if "optimizer" in saved:                                    # not after the last epoch
        module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved.get("scaler", {}))         # an older file has none
    for parameter, old in optimizer.state.items():              # as a run left alone names them: equal files, to the byte
        optimizer.state[parameter] = {sys.intern(name): value for name, value in old.items()}
    state |= {key: saved[key] for key in state if key in saved}
    state["done"] = state["done"] * saved.get("ranks", 1) // ranks()[1]        # another number of ranks, other batches: near it
    print(f"{folder}: going on after epoch {state['epoch']}" + (f" and {state['done']} steps" if state["done"] else ""))


EPOCH_BEGUN = dict(done=0, sums={}, skipped=0, waited=0.0, seconds=0.0)         # what train_one_epoch counts up in `state`


def train(method, sets, args, folder, device, draws=None):
    """Train, validate, log, save, maybe stop: until the epochs are done. All that must survive a crash is in `state`.

    sets: training, plain training (for BatchNorm) and validation data, with keys and items as of Images. draws: images an epoch,
    if more than there are. args: as of parse_args, and precision. Of several ranks the first alone writes.
    """
    rank, all_ranks = ranks()
    print(f"{folder}: {sum(p.numel() for p in method.parameters() if p.requires_grad):,} weights learn on {args.device}"
          + (f", {all_ranks} ranks" if all_ranks > 1 else ""))
    few, size = min(args.workers, 1), args.batch_size
    batches = Batches(len(sets[0]), size, args.seed, draws=draws, share=(rank, all_ranks))
    train_loader = make_loader(sets[0], batches, args.workers)
    plain_loader = make_loader(sets[1], Batches(len(sets[1]), size, args.seed, most=64), few)
    val_loader = make_loader(sets[2], Batches(len(sets[2]), size, share=(rank, all_ranks)), few)
    steps, optimizer = len(batches), method.optimizer()
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    module = getattr(method, "unet", method)                    # MedSASS has no weights but its U-Net's
    state = dict(epoch=0, best=math.inf, stale=0) | copy.deepcopy(EPOCH_BEGUN)
    if (folder / "last.pt").exists():
        take_up(folder, module, optimizer, scaler, state, device)
    network = nn.parallel.DistributedDataParallel(method, find_unused_parameters=True) if all_ranks > 1 else method
    log = list(csv.DictReader(open(folder / "log.csv")))[:state["epoch"]] if (folder / "log.csv").exists() else []
    bar = tqdm(total=args.epochs * steps, initial=state["epoch"] * steps + state["done"], unit=" steps", mininterval=1,
               disable=rank > 0)

    def save(name, **content):
        if rank == 0:
            write_atomically(folder / name, functools.partial(torch.save, content))

    def save_state():                                           # nothing goes on from a finished run: its weights are in best.pt
        parts = {} if finished(state, args) else dict(model=module, optimizer=optimizer, scaler=scaler)
        save("last.pt", **state, ranks=all_ranks, **{name: part.state_dict() for name, part in parts.items()})

    with asked_to_stop() as stop:
        while not finished(state, args):
            batches.epoch = state["epoch"]
            bar.set_description(f"epoch {state['epoch'] + 1}/{args.epochs}")
            train_one_epoch(method, network, train_loader, optimizer, scaler, device, state, args, bar, stop, save_state)
            start, sums = time.time(), dict(zip(state["sums"], over_ranks(*state["sums"].values())))
            with autocast(args):
                settle_batchnorm(method, plain_loader, device)
                val_loss = validate(method, val_loader, device, args.seed)
            seconds = state["seconds"] + time.time() - start
            figures = {name: total / sums["n"] for name, total in sums.items() if name != "n"}
            row = dict(epoch=state["epoch"] + 1, val_loss=val_loss, **figures, skipped=state["skipped"], seconds=seconds,
                       waiting_share=state["waited"] / state["seconds"], images_per_second=batches.draws / seconds)
            better = val_loss < state["best"]
            state |= dict(epoch=state["epoch"] + 1, best=min(val_loss, state["best"]), stale=0 if better else state["stale"] + 1,
                          **copy.deepcopy(EPOCH_BEGUN))
            log.append({name: f"{value:.6g}" for name, value in row.items()})
            if warning := method.collapsed(figures):
                bar.write(f"epoch {state['epoch']}: {warning}")
            if rank == 0:
                write_csv(folder / "log.csv", log)
            if better or not method.stops_early:                # a loss that says nothing about quality: the last is kept
                save("best.pt", epoch=state["epoch"], val_loss=val_loss, model=module.state_dict())
            save_state()
    bar.close()
    if rank == 0:
        keep(method, module, val_loader.dataset, args.seed, folder, device)


def keep(method, module, val_set, seed, folder, device):
    """The last files of a run, encoder.pth and samples.png, from best.pt."""
    kept = load_checkpoint(folder / "best.pt", device)
    module.load_state_dict(kept["model"])
    print(f"{folder}: kept is epoch {kept['epoch']}, validation loss {kept['val_loss']:.4f}")
    export_encoder(method, folder / "encoder.pth")
    write_samples(method, val_set, seed, folder / "samples.png", device)


def finished(state, args):
    """Whether the epochs are done, or `patience` of them went by without a better validation loss (0: never)."""
    return state["epoch"] >= args.epochs or 0 < args.patience <= state["stale"]


def finished_run(folder):
    """Whether a run folder is complete: samples.png is the last file that a run writes."""
    return (folder / "samples.png").exists()


@torch.no_grad()
def write_samples(method, val_set, seed, path, device, rows=6):
    """samples.png: what the method sees and makes of validation images (its samples())."""
    method.eval()
    items = [val_set[0, i][1] for i in range(min(rows, len(val_set)))]
    torch.manual_seed(seed_from(seed))
    columns = method.samples(to_device([torch.stack(view) for view in zip(*items)], device))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def picture(tile):                                          # masks, uint8 images, normalised float images
        tile = (tile.cpu() * std + mean).mul(255).round().clamp(0, 255) if tile.is_floating_point() else tile.cpu()
        return tile[0].numpy() if len(tile) == 1 else tile.byte().permute(1, 2, 0).numpy()

    sheet = [[picture(tile) for tile in row] for row in zip(*columns.values())]
    image = Image.fromarray(prepare_data.contact_sheet(sheet, list(columns)))
    write_atomically(path, functools.partial(image.save, format="PNG"))


# -------------------------------------------------------------------------------------------------------- run folders

def run_settings(args, meta):
    """All that decides what a run computes; equal settings, equal bits (on one machine)."""
    names = ("dataset", "backbone", "method", "train", "threshold", "loss", "foreground", "epochs", "batch_size",
             "patience", "lr", "weight_decay", "seed")
    beyond = {} if not args.refine else dict(refine=args.refine)
    beyond |= {} if not args.encoder else dict(encoder=args.encoder, encoder_sha256=args.encoder_sha256)
    beyond |= {} if args.precision == "off" else dict(amp=args.precision)
    return {name: getattr(args, name) for name in names} | beyond | dict(img_size=meta["size"], data=meta["fingerprint"])


def run_folder(args, defaults):
    """runs/<dataset>/<backbone>/<method>[-variant]/seed<k>; the variant names what is not default, in flag order."""
    short = dict(train="", threshold="", loss="", foreground="", epochs="e", batch_size="b", patience="p", lr="lr",
                 weight_decay="wd", amp="")
    method = args.method + (refined_name(args.refine) if args.refine else "")
    variant = [f"from-{Path(args.encoder).stem}"] if args.encoder else []
    variant += [f"{short[name]}{getattr(args, name)}" for name in short if getattr(args, name) != defaults[name]]
    return Path(args.out) / args.dataset / args.backbone / "-".join([method, *variant]) / f"seed{args.seed}"


def refined_name(parts):
    """What follows "medsass" or "otsu" in names: "+" for all of REFINEMENTS, else "+channel-frame" and the like."""
    return "+" + ("" if tuple(parts) == REFINEMENTS else "-".join(parts))


def build_method(args, meta, defaults):
    """The method with its weights drawn from --seed. Flags that were left unset get the method's own values, in `args`
    and in `defaults`; those that only MedSASS uses are named and ignored for a baseline."""
    defaults |= dict(foreground=meta["foreground"])
    if args.method != "medsass":
        unused = ("train", "threshold", "loss", "foreground", "refine")
        given = [name for name in unused if getattr(args, name) not in (None, defaults[name])]
        if given:
            print(f"not used by {args.method} and ignored: {', '.join('--' + name for name in given)}")
        defaults |= dict(train="encoder")
        vars(args).update({name: defaults[name] for name in unused})
    args.foreground = args.foreground or defaults["foreground"]
    own = (args.threshold, args.foreground, args.loss, args.train, args.refine) if args.method == "medsass" else ()
    torch.manual_seed(seed_from(args.seed))
    try:
        method = METHODS[args.method](args.backbone, meta["size"], args.batch_size * ranks()[1], *own)
    except ValueError as error:
        sys.exit(str(error))
    args.encoder_sha256 = start_from(method, args.encoder, args.backbone) if args.encoder else None
    if min(args.batch_size, meta["counts"]["train"]) < 2 and isinstance(method, (BYOL, SimSiam)):   # of one rank
        sys.exit(f"{args.method}'s BatchNorm needs at least 2 images a step on each rank: --batch-size 2 or more, and 2 "
                 "training images")
    defaults |= dict(lr=method.lr, weight_decay=method.weight_decay, patience=5 if method.stops_early else 0)
    for name in ("lr", "weight_decay", "patience"):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    method.lr, method.weight_decay = args.lr, args.weight_decay
    return method


def start_from(method, source, backbone):
    """--encoder: load the weights of a file, or timm's of ImageNet, into a method's encoder and its moving average. Returns
    their sha256. Ends the program where that cannot be done."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(source)
        if source == "imagenet":
            path = Path(folder) / "imagenet.pth"
            try:
                torch.save(timm.create_model(BACKBONES[backbone], pretrained=True).state_dict(), path)
            except Exception as error:                          # whatever its hub client raises without a network
                sys.exit(f"--encoder imagenet: timm cannot fetch its weights of {BACKBONES[backbone]} "
                         f"({type(error).__name__}): check the network, or give --encoder FILE")
        try:
            load_encoder(getattr(method, "unet", method), path)
        except ValueError as error:
            sys.exit(str(error))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("target", "teacher"):                          # BYOL's and DINO's copy: (encoder, head)
        copied = getattr(method, name, None)
        if isinstance(copied, nn.Module):
            copied[0].load_state_dict(method.encoder.state_dict())
    return digest


def open_run(settings, args, folder):
    """Make the run's folder with its config.json, or check that the one there is of the same settings."""
    path = folder / "config.json"
    if path.exists() and not args.overwrite:
        try:
            config = json.loads(path.read_text())
            there, other_ranks = config["settings"], config.get("ranks", 1) != ranks()[1]
        except (ValueError, KeyError):
            sys.exit(f"{path} is not a run's settings: --overwrite starts this run afresh")
        differ = [f"{key} ({there.get(key)} there, {value} asked)" for key, value in settings.items()
                  if there.get(key) != value and not (key == "lr" and other_ranks)]      # it goes with the batch of all
        if differ:
            sys.exit(f"{folder} holds a run with another {', '.join(differ)}: --overwrite starts it afresh")
        return
    for name in ("last.pt", "best.pt", "encoder.pth", "samples.png", "log.csv", "train_masks.npy", "val_masks.npy"):
        (folder / name).unlink(missing_ok=True)
    config = dict(settings=settings, command=args.command, device=args.device, workers=args.workers, ranks=ranks()[1],
                  versions=dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
                                torchvision=torchvision.__version__, opencv=cv2.__version__, numpy=np.__version__))
    write_json(path, config)


def write_json(path, content):
    """A dict as JSON, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def parse_args(argv):
    parser = argparse.ArgumentParser("pretrain.py", description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=prepare_data.Help)
    add = parser.add_argument
    add("--dataset", required=True, help="name of a prepared data set, a folder under --data")
    add("--backbone", default="resnet50", choices=list(BACKBONES), help="the encoder of the U-Net")
    add("--method", default="medsass", choices=list(METHODS), help="MedSASS, or an encoder by a baseline")
    add("--train", default="end2end", choices=["end2end", "encoder"],
        help="the whole U-Net, or the encoder alone against a frozen decoder (section 4.1)")
    add("--threshold", default="otsu", choices=THRESHOLDS, help="who draws the pseudo-masks (Table 3)")
    add("--refine", nargs="*", choices=REFINEMENTS, metavar="PART", help="better Otsu masks, without a label: from the channel "
        "that Otsu separates best, without the frame of the picture, without what lies where objects never lie; no PART: "
        "channel frame position. Unset: off, as in the paper")
    add("--encoder", metavar="FILE", help="start from this encoder, ours or any of timm's or torchvision's form, or from "
        "\"imagenet\", timm's weights. Unset: from scratch, as in the paper")
    add("--loss", default="focal_tversky", choices=list(LOSSES), help="Table 4; bce is appendix B.1")
    add("--foreground", choices=["bright", "dark"], help="unset: what prepare_data.py decided")
    add("--epochs", type=int, default=50, help="the paper's 50 at most (Table 5: 10, 20, 50, 70)")
    add("--batch-size", type=int, default=16, help="images a step (Tables 7, 8: 8, 16, 32)")
    add("--patience", type=int, help="stop after so many epochs without a better validation loss; 0: "
        "never. Unset: 5; for byol, dino, simsiam, whose loss says nothing about quality, 0")
    add("--lr", type=float, help="unset: the method's own (medsass: 3.6e-4; baselines/*.py for others)")
    add("--weight-decay", type=float, help="unset: the method's own (medsass: 1e-5)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"], help="precision of the networks; losses stay in float32. auto: "
        "bf16 on a GPU that has it, else fp16 there, off on a CPU")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--save-minutes", type=float, default=10, help="save so often inside an epoch, too")
    add("--sync-batchnorm", action="store_true", help="several GPUs: BatchNorm over the images of all")
    add("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 1)),
        help="processes that load and augment; any number gives the same bits")
    add("--data", default="data", metavar="DIR", help="where prepared data sets are")
    add("--out", default="runs", metavar="DIR", help="where runs are kept")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--overwrite", action="store_true", help="start afresh in a folder that holds another run")
    args = parser.parse_args(argv)
    for name, least in dict(epochs=1, batch_size=1, patience=0, lr=0, weight_decay=0, seed=0, workers=0,
                            save_minutes=0).items():
        if getattr(args, name) is not None and not least <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is not a number from {least} up")
    if args.refine is not None:                                 # in one order, each once; none: all
        args.refine = [part for part in REFINEMENTS if part in args.refine or not args.refine]
        if args.threshold != "otsu" and args.method == "medsass":
            parser.error("--refine refines Otsu's masks: leave out --threshold")
    return args, {action.dest: action.default for action in parser._actions}


def main(argv=None):
    args, defaults = parse_args(argv)
    args.command = shlex.join(["python", "pretrain.py", *(sys.argv[1:] if argv is None else argv)])
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1:      # by torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(minutes=10))
    rank, all_ranks = ranks()
    if rank > 0:                                                # one speaks for all
        sys.stdout = open(os.devnull, "w")
    meta = prepare_data.read_meta(Path(args.data) / args.dataset)
    if all_ranks > 1 and meta["counts"]["train"] < 2 * all_ranks:
        sys.exit(f"{meta['counts']['train']} training images are too few for {all_ranks} ranks")
    device = pick_device(args.device)
    if device.type == "cuda" and all_ranks > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    args.device = device.type
    torch.set_float32_matmul_precision("high")                  # TF32: products with mantissas of 10 bits, on a GPU
    torch.backends.cudnn.allow_tf32 = True
    method = build_method(args, meta, defaults).to(device, memory_format=torch.channels_last)
    args.precision = pick_precision(args.amp, device, method)
    if device.type == "cuda":
        print(f"precision: {args.precision}, with TF32")
    if args.compile:
        network_of(method).compile()
    if args.sync_batchnorm:
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    folder = run_folder(args, defaults)
    with prepare_data.only_one(folder / ".lock") if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            open_run(run_settings(args, meta), args, folder)
        over_ranks()                                            # until it is opened
        if finished_run(folder):
            print(f"{folder} is finished: nothing to do")
        else:
            train(method, image_sets(method, args, folder), args, folder, device)
        over_ranks()                                            # until the first has written the last file


def explain_memory(error):
    """End the program with one line where a RuntimeError of torch means that some memory was too small."""
    if "shared memory" in str(error) or "bus error" in str(error).lower():
        sys.exit("shared memory (/dev/shm) is too small for the processes that load images: --workers 0, or more of it "
                 "(docker run --shm-size 1g)")
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error) or "allocate memory" in str(error):
        sys.exit("out of memory: a smaller --batch-size, or pictures prepared at a smaller --size")


def terminated(signum, frame):
    """SIGTERM outside of training, where there is nothing to save: ends the program like Ctrl-C."""
    raise KeyboardInterrupt("stopped by SIGTERM")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:               # a full disk, a forbidden folder, Ctrl-C
        sys.exit(f"pretrain.py: {str(error) or 'interrupted'}; the same command goes on from where it was saved last")
    except RuntimeError as error:
        explain_memory(error)
        if not dist.is_initialized():
            raise
        sys.exit(f"pretrain.py: rank {dist.get_rank()} ends, because another one is gone ({str(error).splitlines()[0][:200]}); "
                 "the same command goes on from where it was saved last")
