"""Pre-train a U-Net on Otsu pseudo-masks (MedSASS, section 3.3 of the paper), or a baseline
encoder; without any label.

    python pretrain.py --dataset demo --epochs 10
    python pretrain.py --dataset isic --backbone vit_small
    python pretrain.py --dataset isic --train encoder --threshold ght --loss tversky
    python pretrain.py --dataset isic --method byol
    torchrun --standalone --nproc-per-node 4 pretrain.py --dataset xray

Reads data/<dataset>/, writes runs/<dataset>/<backbone>/<method>[-variant]/seed<k>/. The same
command resumes after the last whole epoch, on a CPU bit for bit.
"""

import argparse
import atexit
import collections
import contextlib
import copy
import itertools
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
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
from prepare_data import new_file, open_part, read_csv, read_json, read_meta, write_json, write_npy

# ImageNet's mean and standard deviation, timm's defaults for both backbones; (3, 1, 1)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
cv2.setNumThreads(0)                                    # the loader's workers are the parallelism

# -------------------------------------------------------------------------- pseudo-masks (3.3.2)
THRESHOLDS = ("otsu", "ght", "adaptive_mean", "adaptive_gaussian", "fixed")
# Barron's constants for H-DIBCO 2016 (ECCV 2020, section 4). nu and kappa count pixels, of pages of
# about 2 ** 20; bright_pixels scales them, or at 224 x 224 the prior would dominate.
GHT_NU, GHT_TAU, GHT_KAPPA, GHT_OMEGA = 2 ** 29.5, 2 ** 3.125, 2 ** 22.25, 2 ** -3.25


def otsu_threshold(gray):
    """Return Otsu's threshold (1979) of uint8 (H, W), an int t; foreground is gray > t."""
    return int(cv2.threshold(gray, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0])


def ght_threshold(gray, nu=GHT_NU, tau=GHT_TAU, kappa=GHT_KAPPA, omega=GHT_OMEGA):
    """Return the Generalized Histogram Threshold of uint8 (H, W), an int t; foreground is gray > t
    (Barron, ECCV 2020, section 3). nu >= 0: strength, in pixels, of the prior that the Gaussians on
    either side of t have deviation tau; kappa >= 0: of the prior that a fraction omega of the
    pixels is at or below t. Ties give the mean of the tied thresholds, as in Barron's code."""
    counts = np.bincount(gray.ravel(), minlength=256).astype(np.float64)
    levels = np.arange(256.0)
    def side_score(n, x, fraction):                     # cumulated over levels 0..t, t = 0..254
        w = np.maximum(np.cumsum(n)[:-1], 1e-30)
        mean = np.cumsum(n * x)[:-1] / w
        d = np.cumsum(n * x ** 2)[:-1] - w * mean ** 2  # sum of squared deviations
        p = w / n.sum()
        v = np.maximum((p * nu * tau ** 2 + d) / (p * nu + w), 1e-30)
        return -d / v - w * np.log(v) + 2 * (w + kappa * fraction) * np.log(w)
    score = side_score(counts, levels, omega)
    score += side_score(counts[::-1], levels[::-1], 1 - omega)[::-1]
    return int(np.flatnonzero(score == score.max()).mean())


def bright_pixels(gray, method):
    """Return what one of THRESHOLDS calls bright in uint8 (H, W), a bool (H, W)."""
    if method == "otsu":
        return gray > otsu_threshold(gray)
    if method == "fixed":
        return gray > 127
    if method == "ght":
        scale = gray.size / 2 ** 20
        return gray > ght_threshold(gray, GHT_NU * scale, kappa=GHT_KAPPA * scale)
    mean = cv2.ADAPTIVE_THRESH_MEAN_C
    if method == "adaptive_gaussian":
        mean = cv2.ADAPTIVE_THRESH_GAUSSIAN_C
    # gray > local mean - C, block 11, C 2
    return cv2.adaptiveThreshold(gray, 1, mean, cv2.THRESH_BINARY, 11, 2) == 1


def pseudo_mask(images, method="otsu", foreground="bright"):
    """Return the label that each image gives itself (Algorithm 1): uint8 (B, H, W, 3) RGB -> uint8
    {0, 1} (B, H, W). "dark" is the complement of "bright" at the same threshold; an image of one
    gray value has no foreground. Raises ValueError for other words."""
    if method not in THRESHOLDS or foreground not in ("bright", "dark"):
        raise ValueError(f"no pseudo-mask {method!r} / {foreground!r}")
    masks = np.zeros(images.shape[:3], np.uint8)
    for image, mask in zip(images, masks, strict=True):
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if gray.min() < gray.max():
            mask[:] = bright_pixels(gray, method) == (foreground == "bright")
    return masks


# ------------------------------------ refined pseudo-masks, without labels (not in the paper)
CHANNELS = ("gray", "red", "green", "blue")             # skin lesions stand out more in blue
REFINEMENTS = ("channel", "frame", "position", "trust")


def foreground_dark_channel(image, channel="gray", foreground="dark"):
    """Return a channel of uint8 (H, W, 3) RGB in which the foreground is dark, uint8 (H, W)."""
    if channel == "gray":
        values = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    else:
        values = cv2.extractChannel(image, CHANNELS.index(channel) - 1)
    return values if foreground == "dark" else 255 - values


def separability(values, mask):
    """Return the variance between bool (H, W) and the rest, over the total (Otsu 1979, eq. 12)."""
    fraction = mask.mean()
    if not 0 < fraction < 1:
        return 0.0
    gap = values[mask].mean() - values[~mask].mean()
    return float(fraction * (1 - fraction) * gap ** 2 / max(values.var(), 1e-9))


def choose_channel(images):
    """Return the most separable of CHANNELS in uint8 (N, H, W, 3), gray if they are equal."""
    sums = dict.fromkeys(CHANNELS, 0.0)
    for image in images:
        for channel in CHANNELS:
            values = foreground_dark_channel(image, channel)
            sums[channel] += separability(values, values > otsu_threshold(values))
    return max(CHANNELS, key=sums.get)


def dark_mask(values, frame):
    """Return uint8 (H, W) <= Otsu's threshold; bool `frame` is neither counted nor foreground."""
    counted = values[~frame][:, None]
    if not counted.size or counted.min() == counted.max():
        return np.zeros(values.shape, bool)
    return (values <= otsu_threshold(counted)) & ~frame


def connected(mask, starts):
    """Return the 4-connected components of `mask` that hold a start; all are bool (H, W)."""
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return np.isin(labels, labels[mask & starts])


def touching_border(mask):
    """Return the components of bool (H, W) that touch the border of the picture."""
    border = np.ones(mask.shape, bool)
    border[1:-1, 1:-1] = False
    return connected(mask, border)


def image_frame(values, shared):
    """Return the frame of one image (a lens, a letterbox, a collimator), bool (H, W): `shared`, and
    what is at most .55 of the median and connected to a corner; dilated, its edge is blurred."""
    corners = np.zeros(values.shape, bool)
    corners[np.ix_([0, -1], [0, -1])] = True
    frame = shared | connected(values <= 0.55 * np.median(values), corners)
    side = 2 * (max(values.shape) // 32) + 1
    return cv2.dilate(frame.astype(np.uint8), np.ones((side, side), np.uint8)) > 0


def ellipse(radius):
    """Return OpenCV's elliptic structuring element of 2 radius + 1 pixels a side."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def open_mask(mask, radius):
    """Return bool (H, W) without what is thinner than a disc, such as bridges beside an object."""
    if radius == 0:
        return mask
    padded = np.pad(mask.astype(np.uint8), radius, mode="edge")     # it goes on beyond the border
    padded = cv2.morphologyEx(padded, cv2.MORPH_OPEN, ellipse(radius))
    return padded[radius:-radius, radius:-radius] > 0


def position_reliability(masks, n):
    """Return (reliability, radius) of an iterable of n masks, bool (H, W). reliability, in [0, 1]:
    how far they agree on where objects lie, 2 c / (1 + c) of the correlation c of smoothed mean
    masks of random halves (Spearman 1910, Brown 1910), less two standard deviations over the
    splits, or small sets would lose objects. radius, px: a seventh of the median thickness."""
    generator = np.random.default_rng(0)
    is_counted = np.ones((9, n), np.float32)            # in all, and in 8 first halves
    for row in is_counted[1:]:
        row[generator.permutation(n)[n // 2:]] = 0
    sums = 0
    thickness = []
    for mask, weights in zip(masks, is_counted.T, strict=True):
        sums = sums + weights[:, None, None] * mask
        thickness.append(cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5).max())
    sigma = max(sums.shape[1:]) / 24
    whole, *halves = [cv2.GaussianBlur(s, (0, 0), sigma).astype(np.float64) for s in sums]
    with np.errstate(invalid="ignore"):                 # nan where a half is flat, counted as 0
        pairs = [np.corrcoef(half.ravel(), (whole - half).ravel()) for half in halves]
    correlations = np.nan_to_num(pairs)[:, 0, 1]
    c = max(0.0, float(correlations.mean() - 2 * correlations.std()))
    return 2 * c / (1 + c), int(np.median(thickness) // 7)


def likely_positions(masks, n, reliability, radius):
    """Return where objects lie by n masks, bool (H, W): the smoothed mean of the opened ones, less
    what touches the border, is at least half of its maximum. It is pulled to its own mean as far as
    positions are not reliable, until all places are likely."""
    inner = 0
    for mask in masks:
        opened = open_mask(mask, radius)
        inner = inner + (opened & ~touching_border(opened))
    p = cv2.GaussianBlur(inner / n, (0, 0), max(inner.shape) / 24)
    p = p.mean() + reliability * (p - p.mean())
    return p >= 0.5 * p.max()


def position_mask(mask, radius, likely):
    """Return bool (H, W) without components outside of likely positions, or all if none is inside.
    People outline outside of a blurred edge, Otsu cuts in its middle: half the radius is added."""
    if radius == 0:
        return mask
    kept = connected(open_mask(mask, radius), likely).astype(np.uint8)
    if kept.any():
        mask = mask & (cv2.dilate(kept, ellipse(radius)) > 0)
    return cv2.dilate(mask.astype(np.uint8), ellipse((radius + 1) // 2)) > 0


def position_masks(masks):
    """Return position_mask of each of bool (N, H, W), and the reliability of their positions."""
    reliability, radius = position_reliability(masks, len(masks))
    likely = likely_positions(masks, len(masks), reliability, radius)
    return np.stack([position_mask(mask, radius, likely) for mask in masks]), reliability


def mask_quality(mask, values, mean_mask):
    """Return three scores of how far bool (H, W) looks like an object; more is better: separability
    of foreground_dark_channel, uint8 (H, W), by the mask; solidity, the area of its outer contours
    over that of their convex hulls (objects are compact, leaks are not); position, the mean inside
    of it of the training images' mean mask, float (H, W)."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    area = sum(map(cv2.contourArea, contours))
    hull = sum(map(cv2.contourArea, map(cv2.convexHull, contours)))
    position = mean_mask[mask].mean() if mask.any() else 0.0
    return separability(values, mask), area / max(1.0, hull), float(position)


def trusted(quality, reliability):
    """Return which masks are learnt from, bool (N,): the best 1 - reliability / 2 of them by the
    sum of ranks in mask_quality, (N, 3); ties share their mean rank, equal sums keep their order.
    Where objects lie anywhere, there is little to choose by, and leaving out half costs variety."""
    sums = np.zeros(len(quality))
    for scores in np.transpose(quality):
        _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
        sums += (np.cumsum(counts) - (counts - 1) / 2)[place]
    kept = max(1, int(len(sums) * (1 - reliability / 2)))
    is_trusted = np.zeros(len(sums), bool)
    is_trusted[np.argsort(-sums, kind="stable")[:kept]] = True
    return is_trusted


def warn_of_two_kinds(quality, is_trusted):
    """Print a warning if one of the scores of mask_quality, (N, 3), has two peaks, and hardly any
    of the lower is trusted, bool (N,): such as images with an object and images without."""
    for scores in (255 * quality.T).astype(np.uint8):
        upper = scores > otsu_threshold(scores)
        if separability(scores, upper) > 0.82 and is_trusted[~upper].mean() < 0.15:
            print("warning: the training images are of two kinds, and only one of them is learnt "
                  "from: see samples.png; --refine channel frame position takes all")
            return


@dataclass
class Refinement:
    """What --refine has decided on the training images. Then refine_mask needs one image."""
    foreground: str
    channel: str = "gray"
    frame: np.ndarray | None = None                     # what images share; None: not left out
    radius: int = 0
    likely: np.ndarray | None = None                    # likely_positions
    reliability: float = 0.0
    mean_mask: np.ndarray | None = None                 # of the training images, for mask_quality

    def refine_mask(self, image):
        """Return the refined mask of uint8 (H, W, 3), a bool (H, W)."""
        values = foreground_dark_channel(image, self.channel, self.foreground)
        frame = np.zeros(values.shape, bool)
        if self.frame is not None:
            frame = image_frame(values, self.frame)
        return position_mask(dark_mask(values, frame), self.radius, self.likely)

    def refine_masks(self, images):
        """Yield the masks of uint8 (N, H, W, 3), which may be mapped, computed by all cores."""
        return prepare_data.map_threads(self.refine_mask, images)

    def choose_trusted(self, images):
        """Return which of uint8 (N, H, W, 3) are trusted, bool (N,), and their mask_quality."""
        def quality_of(image):
            values = foreground_dark_channel(image, self.channel, self.foreground)
            return mask_quality(self.refine_mask(image), values, self.mean_mask)
        quality = np.array([*prepare_data.map_threads(quality_of, images)])
        return trusted(quality, self.reliability), quality


def decide_refinement(images, foreground, parts=REFINEMENTS):
    """Return the Refinement that uint8 (N, H, W, 3) give by some of REFINEMENTS, and evidence."""
    refinement = Refinement(foreground)
    n = len(images)
    if "channel" in parts:
        refinement.channel = choose_channel(images)
    if "frame" in parts:                                # objects rarely lie there
        times_dark = sum(mask.astype(int) for mask in refinement.refine_masks(images))
        refinement.frame = touching_border(times_dark > 0.7 * n)
    reliability, radius = position_reliability(refinement.refine_masks(images), n)
    refinement.reliability = reliability
    evidence = dict(channel=refinement.channel, reliability=round(reliability, 4), radius=radius)
    if "position" in parts and radius:
        likely = likely_positions(refinement.refine_masks(images), n, reliability, radius)
        kept = total = 0                                # components
        for mask in refinement.refine_masks(images):
            opened = open_mask(mask, radius).astype(np.uint8)
            n_labels, labels = cv2.connectedComponents(opened, connectivity=4)
            total += n_labels - 1
            kept += len(np.unique(labels[likely & (labels > 0)])) or n_labels - 1
        evidence["dropped_components"] = round(1 - kept / max(1, total), 4)
        refinement.radius = radius
        refinement.likely = likely
    if "trust" in parts:
        refinement.mean_mask = sum(mask.astype(int) for mask in refinement.refine_masks(images)) / n
    return refinement, evidence


# ---------------------------------------------------------------------- augmentation (appendix D)
def warp(image, matrix):
    """Warp uint8 (3, H, W), or a tv_tensors.Mask (1, H, W): the pixel at (x, y) is taken from
    matrix @ (x, y, 1), bilinear, of a mask the nearest. Outside is the mirror image of the inside:
    torchvision's black would be dark foreground to Otsu."""
    interpolation = cv2.INTER_NEAREST if isinstance(image, tv_tensors.Mask) else cv2.INTER_LINEAR
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
    """Return the paper's transforms of an image and its mask, if any; mild strengths are ours."""
    jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
    return v2.Compose([
        v2.RandomChoice([jitter, Perspective(distortion_scale=0.2, p=1.0)]),
        v2.RandomChoice([jitter, Rotation(degrees=10)]),
        v2.RandomVerticalFlip(),
        v2.RandomHorizontalFlip()])


# ------------------------------------------------------------------------------------- the method
@dataclass
class ViewAndMask:
    """uint8 (3, H, W) -> [view uint8 (3, H, W), its pseudo-mask uint8 {0, 1} (1, H, W)]; a given
    tv_tensors.Mask is moved with the image instead."""
    transform: nn.Module
    threshold: str
    foreground: str

    def __call__(self, image, mask=None):
        if mask is not None:
            return self.transform(image, mask)
        view = self.transform(image)
        pixels = view.permute(1, 2, 0).numpy()[None]    # (1, H, W, 3)
        return [view, torch.from_numpy(pseudo_mask(pixels, self.threshold, self.foreground))]


class MedSASS(nn.Module):
    """A U-Net that learns to predict the pseudo-mask of the very image it sees (section 3.3.1,
    Algorithm 1). plain makes the same pair, un-augmented. With refine the masks come from files.
    train_part "encoder" or "decoder": only that part learns, the other stays as it is, its
    BatchNorm in eval mode (section 4.1). Other members are as in every class of baselines/."""

    keep_best = True
    refine = ()                                         # of REFINEMENTS

    def __init__(self, backbone, img_size=224, threshold="otsu", foreground="bright",
                 train_part="end2end"):
        super().__init__()
        self.unet = build_unet(backbone, img_size)
        self.student = None                             # if a U-Net, `unet` is its moving average
        self.foreground = foreground
        self.train_part = train_part
        self.loss = LOSSES["focal_tversky"]
        self.lr = 3.6e-4                                # not in the paper: its authors' other code
        self.weight_decay = 1e-5
        self.plain = ViewAndMask(v2.Identity(), threshold, foreground)
        self.augment = ViewAndMask(paper_augmentation(), threshold, foreground)
        if train_part != "end2end":
            self.unet.requires_grad_(train_part == "decoder")
            self.unet.encoder.requires_grad_(train_part == "encoder")

    @property
    def encoder(self):
        return self.unet.encoder

    def train(self, mode=True):
        super().train(mode)
        if self.train_part != "end2end":
            for unet in self.children():
                unet.train(mode and self.train_part == "decoder")
                unet.encoder.train(mode and self.train_part == "encoder")
        return self

    def forward(self, views):
        images, masks = views
        unet = self.student if self.training and self.student else self.unet
        logits = unet(normalise(images))                # (B, 1, H, W)
        self.last_batch = logits.detach() > 0, masks > 0
        return self.loss(logits, masks)

    def optimizer(self):
        """Return Adam; what gets no gradient stays as it is."""
        return torch.optim.Adam(
            self.parameters(), self.lr, weight_decay=self.weight_decay, fused=True)

    def before_step(self, optimizer, step, total_steps, epoch_steps):
        """Keep the learning rate constant."""

    def after_backward(self):
        """Clip nothing, freeze nothing."""

    @torch.no_grad()
    def after_step(self, step, total_steps):
        """Average the student's weights over about the last tenth of the steps, at most 100."""
        if self.student:
            pairs = zip(self.unet.parameters(), self.student.parameters(), strict=True)
            for average, weight in pairs:
                average.lerp_(weight, max(0.01, 9 / (step + 10)))

    def health(self):
        """Return foreground fractions of the last batch; predicted 0 or 1: a collapse (B.1)."""
        predicted, target = self.last_batch
        both = (predicted & target).sum() / (predicted | target).sum().clamp(min=1)
        return dict(target_foreground=target.float().mean().item(),
                    predicted_foreground=predicted.float().mean().item(), agreement=both.item())

    def samples(self, views):
        """Return {title: pictures (B, 1 or 3, H, W)}: what it saw and predicted."""
        images, masks = views
        columns = {"image": images}
        if self.refine:
            raw = pseudo_mask(images.permute(0, 2, 3, 1).cpu().numpy(), "otsu", self.foreground)
            columns["Otsu"] = torch.from_numpy(raw)[:, None]
        columns["refined mask" if self.refine else "target"] = masks
        columns["prediction"] = self.unet(normalise(images)) > 0
        return columns


METHODS = dict(medsass=MedSASS, byol=BYOL, dino=DINO, simsiam=SimSiam, mae=MAE, simmim=SimMIM)


def normalise(images):
    """Return uint8 (B, 3, H, W) RGB as float, normalised by ImageNet's mean and deviation."""
    return (images / 255 - MEAN.to(images.device)) / STD.to(images.device)


# ------------------------------------------------------------------------ data and its randomness
def seed_from(*key):
    """Return a 63-bit seed of non-negative integers; zeros at the end do not count."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


@dataclass
class Images(torch.utils.data.Dataset):
    """Images of a data set. Key (pass, k) -> (row, what transform makes of the k-th), the same in
    whatever process; with masks (row, [view, mask or number])."""
    folder: Path
    rows: list                                          # of (part, row)
    transform: object
    seed: int
    masks: object = None                # folder of {part}_masks.npy, or {(part, row): class number}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        number, k = key                                 # of the pass
        part, row = self.rows[k]                        # mapped afresh: nothing to send to a worker
        images = np.load(self.folder / f"{part}_images.npy", mmap_mode="r")
        if row >= len(images):
            raise OSError(f"{self.folder} was prepared again, of fewer images")
        image = torch.tensor(images[row]).permute(2, 0, 1)      # (3, S, S)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)                        # as in a worker: sums round alike
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(self.seed, number, row))
            if self.masks is None:
                views = self.transform(image)
            elif isinstance(self.masks, dict):
                views = [self.transform(image), self.masks[part, row]]
            else:
                mask = np.load(self.masks / f"{part}_masks.npy", mmap_mode="r")[row]
                view, mask = self.transform(image, tv_tensors.Mask(mask[None].copy()))
                views = [view, mask.as_subclass(torch.Tensor)]
        torch.set_num_threads(threads)
        return row, views


def rows_of(folder, part):
    """Return (part, row) of all images of a part, a list. True masks are not read in this file."""
    return [(part, row) for row in range(len(open_part(folder, part)[0]))]


@dataclass
class ImageSets:
    """What train() reads."""
    train: Images
    plain: Images                                       # un-augmented, for BatchNorm
    val: Images
    epoch_size: int = 0                                 # images an epoch, if more than there are
    shown: Images | None = None                         # in samples.png; default: those of val
    captions: list | None = None


def ranks():
    """Return (rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Batches:
    """The batches of an epoch of max(n, epoch_size) items, lists of (pass, index): in an order of
    (seed, pass) alone, or as stored without seed. A last batch of one image, or of less than half
    the size, joins the one before it. shard, (rank, ranks): a rank takes its part of every
    shuffled batch, or every ranks-th batch as stored."""

    def __init__(self, n, batch_size, seed=None, epoch_size=0, shard=(0, 1)):
        self.n = n
        self.seed = seed
        self.rank, self.ranks = shard
        self.epoch = 0
        self.epoch_size = max(n, epoch_size)
        together = 1 if seed is None else self.ranks    # ranks that share a batch
        self.starts = list(range(0, self.epoch_size, batch_size * together))
        # BatchNorm: a last batch of 2 in each epoch cost SimSiam .05 IoU.
        minimum = max(min(batch_size, 2), batch_size / 2) * together
        if len(self.starts) > 1 and self.epoch_size - self.starts[-1] < minimum:
            self.starts.pop()

    def __len__(self):
        return len(self.starts)

    def __iter__(self):
        passes = math.ceil(self.epoch_size / self.n)
        keys = []
        for number in range(self.epoch * passes, (self.epoch + 1) * passes):
            order = range(self.n)
            if self.seed is not None:
                generator = torch.Generator().manual_seed(seed_from(self.seed, number))
                order = torch.randperm(self.n, generator=generator).tolist()
            keys += [(number, index) for index in order]
        batches = [keys[a:b] for a, b in itertools.pairwise([*self.starts, self.epoch_size])]
        if self.seed is None:
            return iter(batches[self.rank::self.ranks])
        return iter([batch[self.rank::self.ranks] for batch in batches])


@atexit.register
def end_workers():
    """Kill the workers that a traceback still holds: Python would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's would report each
    for worker in multiprocessing.active_children():
        worker.kill()


def ignore_signals(worker):
    """Go on at Ctrl-C and SIGTERM: a worker that ends before us leaves a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(dataset, batches, workers):
    """Return a loader of Batches, whose .epoch may change between passes."""
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_signals,
        persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())


def write_refined_masks(method, data, folder):
    """Write refined masks, and which of them are trusted, into a run's folder."""
    training, _ = open_part(data, "train")
    refinement, evidence = decide_refinement(training, method.foreground, method.refine)
    for part in ("train", "val"):
        images, _ = open_part(data, part)
        masks = refinement.refine_masks(images)
        write_npy(folder / f"{part}_masks.npy", masks, images.shape[:3])
        if "trust" in method.refine:
            is_trusted, quality = refinement.choose_trusted(images)
            write_npy(folder / f"{part}_trusted.npy", is_trusted, is_trusted.shape)
            for name, chosen in dict(trusted=is_trusted, distrusted=~is_trusted).items():
                n = len(quality[chosen])
                means = quality[chosen].sum(axis=0) / max(1, n)
                scores = ("separability", "solidity", "position")
                evidence[f"{part}_{name}"] = dict(
                    zip(scores, means.round(3).tolist(), strict=True),
                    images=n)
            if part == "train":
                warn_of_two_kinds(quality, is_trusted)
    print("refined masks:", evidence)
    config = read_json(folder / "config.json")          # the last: it shows that all is there
    write_json(folder / "config.json", config | dict(refinement=evidence))


def image_sets(method, data, seed, folder):
    """Return the ImageSets of pre-training, none with labels."""
    refine = getattr(method, "refine", ())
    masks = folder if refine else None
    if refine:
        if ranks()[0] == 0 and "refinement" not in read_json(folder / "config.json"):
            write_refined_masks(method, data, folder)
        if dist.is_initialized():
            dist.barrier()
    rows = rows_of(data, "train")
    plain = getattr(method, "plain", method.augment)
    sets = ImageSets(
        train=Images(data, rows, method.augment, seed, masks),
        plain=Images(data, rows, v2.Identity(), seed),
        val=Images(data, rows_of(data, "val"), plain, seed, masks),
        epoch_size=len(rows))                           # as many as without trust
    if "trust" in refine:
        for part, images in dict(train=sets.train, val=sets.val).items():
            is_trusted = np.load(folder / f"{part}_trusted.npy")
            images.rows = [(part, row) for row in np.flatnonzero(is_trusted).tolist()]
        first = sets.train.rows[:2]
        distrusted = sorted({*rows} - {*sets.train.rows})[:2]
        sets.shown = Images(data, first + distrusted, plain, seed, masks)
        sets.captions = ["trusted training image"] * len(first)
        sets.captions += ["distrusted training image"] * len(distrusted)
    return sets


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


def to_device(views, device):
    """Move a batch's views; channels_last is what CPU and GPU convolutions are fastest in."""
    moved = []
    for view in views:
        layout = torch.channels_last if view.ndim == 4 else torch.preserve_format
        moved.append(view.to(device, non_blocking=True, memory_format=layout))
    return moved


@torch.no_grad()
def update_batchnorm(method, loader, device):
    """Set BatchNorm's statistics to their mean over 64 un-augmented batches under these weights (Wu
    & Johnson 2021): the running average is of ten steps, in which a young network changes;
    update_bn of torch would reset a frozen part, too."""
    method.train()
    network = getattr(method, "unet", method.encoder)
    norms = []
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and module.training:
            module.reset_running_stats()
            module.momentum = None                      # the plain mean over batches
            norms.append(module)
    if norms:
        for _, images in itertools.islice(loader, 64):
            network(normalise(to_device([images], device)[0]))
    for norm in norms:
        norm.momentum = 0.1


@torch.no_grad()
def validate(method, loader, device, seed):
    """Return val_loss and, of this rank's part, health: means over images, each time the same."""
    method.eval()
    sums = collections.Counter()
    for batch, (index, views) in enumerate(loader):
        torch.manual_seed(seed_from(seed, batch))       # MAE and SimMIM choose what they hide
        loss = method(to_device(views, device)).item()
        for name, value in dict(n=1, loss=loss, **method.health()).items():
            sums[name] += value * len(index)
    n = sums.pop("n", 0)                                # a rank may have no batch
    total = torch.tensor([sums["loss"], n], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    means = {f"val_{name}": value / n for name, value in sums.items()}
    return means | dict(val_loss=(total[0] / total[1]).item())


def train(method, sets, options, folder, device):
    """Train on ImageSets, or go on with what `folder` holds; the first rank writes. Returns the
    steps of all epochs. Exits if a loss is not finite."""
    # ===== data =====
    rank, n_ranks = ranks()
    seed, size = options.seed, options.batch_size
    batches = Batches(len(sets.train), size, seed, sets.epoch_size, (rank, n_ranks))
    few = min(options.workers, 1)
    train_loader = make_loader(sets.train, batches, options.workers)
    plain_loader = make_loader(sets.plain, Batches(len(sets.plain), size, seed), few)
    val_loader = make_loader(sets.val, Batches(len(sets.val), size, shard=(rank, n_ranks)), few)
    epoch_steps = len(batches)
    total_steps = options.epochs * epoch_steps
    # ===== network, optimiser, precision =====
    network = method
    if n_ranks > 1:
        network = nn.parallel.DistributedDataParallel(method, find_unused_parameters=True)
    optimizer = method.optimizer()
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    dtype = torch.float16 if options.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, dtype, enabled=options.amp != "off")
    # ===== where it was stopped =====
    epoch = epochs_without_improvement = 0
    best, finished, log = math.inf, False, []
    if (folder / "last.pt").exists():
        state = load_checkpoint(folder / "last.pt", device)
        epoch, best, finished = state["epoch"], state["best"], state["finished"]
        epochs_without_improvement = state["epochs_without_improvement"]
        log = read_csv(folder / "log.csv")[:epoch]
        if not finished:
            method.load_state_dict(state["method"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
    print(f"{folder}: precision {options.amp}, going on after {epoch} epochs")
    config = folder / "config.json"                     # open_run has written it anew
    fingerprint = read_json(config)["settings"]["data"]
    config_time = config.stat().st_mtime_ns
    bar = tqdm(total=total_steps, initial=epoch * epoch_steps, mininterval=1, disable=rank > 0)
    while not finished:
        # ===== train =====
        bar.set_description(f"epoch {epoch + 1}")
        batches.epoch = epoch
        method.train()
        sums = collections.Counter()
        for step, (index, views) in enumerate(train_loader, epoch * epoch_steps):
            torch.manual_seed(seed_from(seed, step, rank))
            method.before_step(optimizer, step, total_steps, epoch_steps)
            optimizer.zero_grad()
            with autocast:
                loss = network(to_device(views, device))
            if not math.isfinite(loss.item()):
                sys.exit(f"{folder}: step {step + 1}: the loss is not finite: try a smaller --lr")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            method.after_backward()
            scaler.step(optimizer)
            scaler.update()
            method.after_step(step, total_steps)
            metrics = dict(train_loss=loss.item(), **method.health())
            for name, value in dict(n=1, **metrics).items():
                sums[name] += value * len(index)
            bar.set_postfix(metrics, refresh=False)
            bar.update()
        # ===== validate =====
        with autocast:
            update_batchnorm(method, plain_loader, device)
            validation = validate(method, val_loader, device, seed)
        val_loss = validation["val_loss"]
        epoch += 1
        epochs_without_improvement += 1
        if not math.isfinite(val_loss):
            sys.exit(f"{folder}: epoch {epoch}: the val_loss is not finite: try a smaller --lr")
        if val_loss < best:
            epochs_without_improvement = 0
            best = val_loss
        finished = epoch == options.epochs or 0 < options.patience <= epochs_without_improvement
        if rank > 0:
            continue
        # ===== log and save =====
        if config.stat().st_mtime_ns != config_time:
            sys.exit(f"{config} was rewritten: another process trains here now")
        if read_meta(sets.train.folder)["fingerprint"] != fingerprint:
            sys.exit(f"{sets.train.folder} was prepared again: epoch {epoch} is not kept")
        n = sums.pop("n")
        row = dict(epoch=epoch) | validation | {name: sums[name] / n for name in sums}
        log.append({name: f"{value:.6g}" for name, value in row.items()})
        prepare_data.write_csv(folder / "log.csv", log)
        if epochs_without_improvement == 0 or not method.keep_best:
            model = getattr(method, "unet", method).state_dict()
            with new_file(folder / "best.pt") as file:
                torch.save(dict(epoch=epoch, val_loss=val_loss, model=model), file)
        state = dict(epoch=epoch, best=best, finished=finished,
                     epochs_without_improvement=epochs_without_improvement)
        if not finished:                                # else the weights are in best.pt
            state |= dict(method=method.state_dict(), optimizer=optimizer.state_dict(),
                          scaler=scaler.state_dict())
        with new_file(folder / "last.pt") as file:
            torch.save(state, file)
    bar.close()
    return total_steps


@torch.no_grad()
def finish_run(method, sets, seed, folder, device):
    """Load the weights that are kept into `method`; write encoder.pth and samples.png."""
    kept = load_checkpoint(folder / "best.pt", device)
    getattr(method, "unet", method).load_state_dict(kept["model"])
    row = read_csv(folder / "log.csv")[kept["epoch"] - 1]
    metrics = ", ".join(f"{name} {value}" for name, value in row.items() if "val_" in name)
    print(f"{folder}: epoch {kept['epoch']} is kept: {metrics}; look at samples.png")
    with new_file(folder / "encoder.pth") as file:
        export_encoder(method, file)
    method.eval()
    shown = sets.shown or sets.val
    _, views = torch.utils.data.default_collate([shown[0, k] for k in range(len(shown))[:6]])
    torch.manual_seed(seed_from(seed))
    samples = method.samples(to_device(views, device))
    columns = []
    for pictures in samples.values():                   # masks, uint8 images, or normalised ones
        pictures = pictures.cpu()
        if pictures.is_floating_point():
            pictures = (pictures * STD + MEAN).mul(255).round().clamp(0, 255)
        columns.append(pictures.byte().permute(0, 2, 3, 1).squeeze(3).numpy())
    rows = list(zip(*columns, strict=True))
    sheet = prepare_data.contact_sheet(rows, list(samples), sets.captions)
    prepare_data.write_png(folder / "samples.png", sheet)


# ------------------------------------------------------------------------------------ run folders
def load_checkpoint(path, device):
    """Return a checkpoint of this file, a dict; exit in one line if it cannot be read."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                          # torch raises a dozen kinds
        sys.exit(f"{path} cannot be read ({type(error).__name__}): copy it again, or --overwrite")


def pick_device(name):
    """Return a torch.device; auto is an accelerator or cpu. Exit if it cannot be used."""
    if name == "auto":
        name = "cpu"
        if torch.accelerator.is_available():
            name = torch.accelerator.current_accelerator().type
    try:
        return torch.zeros(1, device=name).device       # with a number: the current GPU
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {name} cannot be used here: {str(error).splitlines()[0]}")


def pick_precision(asked, device, method, config):
    """Return "off", "bf16" or "fp16" for --amp; auto is what the run of `config` began with."""
    if asked == "fp16" and isinstance(method, DINO):
        sys.exit("--amp fp16 is not for dino, whose loss becomes nan in it: bf16 or off")
    cpu = Path("/proc/cpuinfo")                         # of Linux
    if asked == "bf16" and device.type == "cpu" and cpu.exists() and "bf16" not in cpu.read_text():
        print("this processor has no instructions for bf16: --amp off is faster")
    if asked != "auto":
        return asked
    begun = config.get("settings", {}).get("amp")
    if begun or device.type != "cuda":
        return begun or "off"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "off" if isinstance(method, DINO) else "fp16"


@contextlib.contextmanager
def exit_on_value_error():
    """Exit with the message of a ValueError inside, such as one of models.py."""
    try:
        yield
    except ValueError as error:
        sys.exit(str(error))


def build_method(args, meta):
    """Return the method, its weights of --seed or --encoder; exit if it cannot be built."""
    torch.manual_seed(seed_from(args.seed))
    with exit_on_value_error():
        if args.method == "medsass":
            method = MedSASS(args.backbone, meta["size"], args.threshold,
                             args.foreground or meta["foreground"], args.train)
            method.loss = LOSSES[args.loss]
            method.refine = args.refine or ()
        else:
            batch_size = min(args.batch_size * ranks()[1], meta["counts"]["train"])
            method = METHODS[args.method](args.backbone, meta["size"], batch_size)
        if args.encoder:
            load_encoder(getattr(method, "unet", method), args.encoder)
    if args.refine:                                     # weights swing with the masks' noise
        method.student = copy.deepcopy(method.unet)
        method.unet.requires_grad_(False)
    copies = dict(byol="target", dino="student")        # each with a head behind it
    if args.method in copies:
        getattr(method, copies[args.method])[0].load_state_dict(method.encoder.state_dict())
    for name in ("lr", "weight_decay"):
        if getattr(args, name) is not None:
            setattr(method, name, getattr(args, name))
    return method


def open_run(settings, folder, command, overwrite):
    """Make a run's folder with its config.json; exit if it holds another run. It is written anew
    also to go on: an older process at the same run sees it and stops."""
    path = folder / "config.json"
    config = dict(settings=settings, command=command, torch=torch.__version__)
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    elif path.exists():
        config = read_json(path)
        existing = config.get("settings", {})
        for name, value in settings.items():
            there = existing.get(name, value)           # versions before may not have it
            if there != value:
                sys.exit(f"{folder} holds a run with another {name} ({there} there, {value} "
                         "asked): --overwrite starts it afresh")
    elif list(folder.glob("*.pt")):
        sys.exit(f"{folder} holds weights but no config.json: restore it, or move the weights away")
    prepare_data.remove_leftovers(folder)
    write_json(path, config)


# ------------------------------------------------------------------------------------------ flags
# Flags that enter a run folder's name if they are not defaults, and what stands before each value.
VARIANT = dict(train="", threshold="", loss="", foreground="", epochs="e", batch_size="b",
               patience="p", lr="lr", weight_decay="wd", amp="")
# Flags that do not change what a run computes.
NOT_SETTINGS = ("compile", "workers", "data", "out", "device", "overwrite")
MEDSASS_FLAGS = ("train", "threshold", "loss", "foreground", "refine")


def add_training_flags(add):
    """Add the flags that training has in both stages, by a parser's add_argument."""
    add("--batch-size", type=int, default=16, help="images a step, of each process (Tables 7, 8)")
    add("--amp", default="auto", choices=["auto", "off", "bf16", "fp16"],
        help="precision; auto: bf16 on a GPU that has it, else fp16 there, off on a CPU")
    add("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 1)),
        help="processes that load and augment; their number changes no result")
    add("--data", default="data", metavar="DIR", help="where prepared data sets are")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def parse_args(argv=None):
    """Return the flags, and the name that they give to the method: its variant."""
    parser = argparse.ArgumentParser("pretrain.py", description=__doc__, usage=argparse.SUPPRESS,
                                     allow_abbrev=False, formatter_class=prepare_data.Help)
    add = parser.add_argument
    add("--dataset", required=True, type=prepare_data.dataset_name, help="a folder under --data")
    add("--backbone", default="resnet50", choices=BACKBONES, help="the encoder of the U-Net")
    add("--method", default="medsass", choices=METHODS, help="MedSASS, or a baseline's encoder")
    add("--train", default="end2end", choices=["end2end", "encoder"],
        help="the whole U-Net, or the encoder alone against a frozen decoder (section 4.1)")
    add("--threshold", default="otsu", choices=THRESHOLDS, help="of the pseudo-masks (Table 3)")
    add("--refine", nargs="*", choices=REFINEMENTS, metavar="PART",
        help="better Otsu masks, without a label. PARTs: channel frame position trust (README); "
        "--refine alone: all. Default: off, as in the paper")
    add("--encoder", metavar="FILE",
        help="start from this checkpoint, or from \"imagenet\". Default: from scratch")
    add("--loss", default="focal_tversky", choices=LOSSES, help="of the pseudo-mask (Table 4, B.1)")
    add("--foreground", choices=["bright", "dark"], help="default: as prepare_data.py decided")
    add("--epochs", type=int, default=50, help="at most (Table 5: 10, 20, 50, 70)")
    add("--patience", type=int,
        help="epochs without a better loss; 0: never stop. Default: 5; byol, dino, simsiam: 0")
    add("--lr", type=float, help="default: the method's own (medsass: 3.6e-4)")
    add("--weight-decay", type=float, help="default: the method's own (medsass: 1e-5)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--compile", action="store_true", help="torch.compile the network")
    add_training_flags(add)
    add("--out", default="runs", metavar="DIR", help="where runs are kept")
    add("--overwrite", action="store_true", help="start afresh in a folder that holds another run")
    args = parser.parse_args(argv)
    prepare_data.check_numbers(parser, args, epochs=1, batch_size=1, patience=0, lr=0,
                               weight_decay=0, seed=0, workers=0)
    if args.method != "medsass":
        args = prepare_data.drop_unused(parser, args, MEDSASS_FLAGS)
    if args.refine is not None:                         # in one order, each once; none: all
        args.refine = [part for part in REFINEMENTS if part in (args.refine or REFINEMENTS)]
        if args.threshold != "otsu":
            parser.error("--refine refines Otsu's masks: leave out --threshold")
    variant = args.method + "+" * bool(args.refine)
    if args.refine and args.refine != list(REFINEMENTS):
        variant += "-".join(args.refine)
    if args.encoder:                                    # many files are called encoder.pth
        variant += "-from-" + args.encoder.strip("/").replace("/", "-")
    return args, variant + prepare_data.name_suffix(parser, args, VARIANT)


def main(argv=None):
    args, variant = parse_args(argv)
    if dist.is_torchelastic_launched():                 # by torchrun
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    rank, n_ranks = ranks()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    data = Path(args.data) / args.dataset
    folder = Path(args.out, args.dataset, args.backbone, variant, f"seed{args.seed}")
    meta = read_meta(data)
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")          # TF32: mantissas of 10 bits, on a GPU
    method = build_method(args, meta)
    method.to(device, memory_format=torch.channels_last)
    if args.compile:
        method.compile()
    if n_ranks > 1 and device.type == "cuda":
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    patience = args.patience
    if patience is None:
        patience = 5 if method.keep_best else 0
    begun = {} if args.overwrite else read_json(folder / "config.json")
    amp = pick_precision(args.amp, device, method, begun)
    options = Options(args.epochs, args.batch_size, patience, args.seed, amp, args.workers)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    settings |= dict(
        train=getattr(method, "train_part", "encoder"),
        patience=patience, lr=method.lr,
        foreground=args.foreground or meta["foreground"], weight_decay=method.weight_decay,
        amp=amp, variant=variant, img_size=meta["size"], ranks=n_ranks, data=meta["fingerprint"])
    if rank == 0:
        flags = sys.argv[1:] if argv is None else argv
        open_run(settings, folder, shlex.join(["python", "pretrain.py", *flags]), args.overwrite)
    if n_ranks > 1:
        dist.barrier()
    if (folder / "samples.png").exists():               # the last file of a run
        print(folder, "is finished: nothing to do")
        return
    sets = image_sets(method, data, args.seed, folder)
    train(method, sets, options, folder, device)
    if rank == 0:
        finish_run(method, sets, args.seed, folder, device)
        if args.method != "medsass":                    # heads and copies that nobody reads again
            (folder / "best.pt").unlink()
    if n_ranks > 1:                                     # until the first has written the last file
        dist.barrier()


if __name__ == "__main__":
    prepare_data.run_script(
        main, "the same command, without --overwrite, goes on from the last whole epoch")
