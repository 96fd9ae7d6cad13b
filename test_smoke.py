"""Every stage through its command line, every formula against an independent source.   bash run_all.sh test"""

import argparse
import copy
import csv
import http.server
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import unicodedata
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import segmentation_models_pytorch as smp
import skimage.filters
import sklearn.metrics
import tifffile
import timm
import torch
import torch.nn.functional as F
import torchvision
from lightly import loss as lightly_loss
from PIL import Image, ImageFilter, ImageOps

import finetune_eval
import losses
import models
import prepare_data
import pretrain
from baselines import byol, dino, mae, simmim, simsiam

HERE = Path(__file__).parent
rng = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------------- helpers

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with the demo, prepared at 32 px."""
    folder = tmp_path_factory.mktemp("data")
    prepare_data.main(["--dataset", "demo", "--size", "32", "--out", str(folder)])
    return folder


def train(data, out, *flags, epochs=2):
    """Run pretrain.py in this process on the demo; returns the run folder."""
    pretrain.main(["--dataset", "demo", "--data", str(data), "--out", str(out), "--epochs", str(epochs), "--workers", "0",
                   "--device", "cpu", *flags])
    return max(out.glob("demo/*/*/seed*"), key=lambda f: f.stat().st_mtime)


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """An end-to-end ResNet-50 run of two epochs."""
    return train(data, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def vit_run(data, tmp_path_factory):
    """A ViT-small run of one epoch."""
    return train(data, tmp_path_factory.mktemp("vit"), "--backbone", "vit_small", epochs=1)


def contents(folder, names=("best.pt", "last.pt", "encoder.pth")):
    """The weights in a run folder; a finished baseline has no best.pt."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def write_folder(folder, n=12, size=40, masks=True, value=255):
    """A raw folder of n random colour images with square objects and their masks, the same in whatever order tests run."""
    rng = np.random.default_rng(n)
    for sub in ("images", "masks") if masks else ("images",):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        image, mask = rng.integers(0, 90, (size, size, 3), np.uint8), np.zeros((size, size), np.uint8)
        mask[5 + i:15 + i, 8:20] = value
        image[mask > 0] += 120
        Image.fromarray(image).save(folder / "images" / f"p{i // 3}_{i:02d}.png")
        if masks:
            Image.fromarray(mask).save(folder / "masks" / f"p{i // 3}_{i:02d}.png")
    return folder


def prepare(raw, out, *flags):
    prepare_data.main(["--dataset", "folder", "--raw", str(raw), "--size", "32", "--out", str(out), *flags])
    return out / raw.name


def refused(call, *words):
    """The call ends the program with a message that holds all the words, and no traceback; returns the message."""
    with pytest.raises(SystemExit) as end:
        call()
    assert end.value.code not in (0, None)
    for word in words:
        assert str(word) in str(end.value.code), (word, end.value.code)
    return str(end.value.code)


# -------------------------------------------------------------------------------------------------------------- losses

def logits_and_target(seed=0, share=0.3):
    r = np.random.default_rng(seed)
    return r.normal(0, 2, (3, 1, 9, 7)), (r.random((3, 1, 9, 7)) < share).astype(np.float64)


def test_losses_equal_their_closed_form():
    z, y = logits_and_target()
    p = 1 / (1 + np.exp(-z))
    tp, fn, fp = (p * y).sum(), ((1 - p) * y).sum(), (p * (1 - y)).sum()
    ti = (tp + 1) / (tp + .7 * fn + .3 * fp + 1)
    ce = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    pt = np.where(y == 1, p, 1 - p)
    expected = dict(tversky=1 - ti, focal_tversky=(1 - ti) ** .75, dice=1 - (2 * tp + 2) / (2 * tp + fn + fp + 2),
                    bce=ce.mean(), focal=((1 - pt) ** 2 * ce).mean())
    logits, target = torch.tensor(z), torch.tensor(y)
    assert losses.tversky_index(logits, target).item() == pytest.approx(ti, abs=1e-12)
    for name, loss in losses.LOSSES.items():
        assert loss(logits, target).item() == pytest.approx(expected[name], abs=1e-12), name
    weighed = np.where(y == 1, .25, .75) * (1 - pt) ** 3 * ce
    assert losses.focal_loss(logits, target, alpha=.25, gamma=3.0).item() == pytest.approx(weighed.mean(), abs=1e-12)
    assert losses.focal_tversky_loss(logits, target, .4, .6, 2.0, 5.0).item() == pytest.approx(
        (1 - (tp + 5) / (tp + .4 * fn + .6 * fp + 5)) ** .5, abs=1e-12)


def test_losses_equal_segmentation_models_pytorch():
    logits, target = (torch.tensor(a) for a in logits_and_target(1))
    theirs = smp.losses.TverskyLoss("binary", alpha=.3, beta=.7, smooth=1.0)      # smp's alpha weighs false positives
    assert losses.tversky_loss(logits, target).item() == pytest.approx(theirs(logits, target).item(), abs=1e-9)
    theirs = smp.losses.DiceLoss("binary", smooth=1.0)
    assert losses.dice_loss(logits, target).item() == pytest.approx(theirs(logits, target).item(), abs=1e-9)
    for alpha, gamma in ((None, 2.0), (.25, 2.0), (.6, 3.0)):
        theirs = smp.losses.FocalLoss("binary", alpha=alpha, gamma=gamma)
        assert losses.focal_loss(logits, target, alpha, gamma).item() == pytest.approx(theirs(logits, target).item(), abs=1e-9)
    theirs = smp.losses.SoftBCEWithLogitsLoss()
    assert losses.bce_loss(logits, target).item() == pytest.approx(theirs(logits, target).item(), abs=1e-9)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_losses_and_gradients_are_finite_at_the_extremes(name, dtype):
    for value in (-1e4, -30, 0, 30, 1e4):
        for share in (0, .5, 1):
            logits = torch.full((2, 1, 300, 300), float(value), dtype=dtype, requires_grad=True)
            target = (torch.arange(2 * 300 * 300).view(2, 1, 300, 300) % 2 < 2 * share).to(torch.uint8)
            with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
                loss = losses.LOSSES[name](logits, target)
            loss.backward()
            assert torch.isfinite(loss) and torch.isfinite(logits.grad).all(), (value, share)
    perfect = torch.where(target > 0, 1e4, -1e4).to(dtype)
    assert losses.LOSSES[name](perfect, target).item() == 0


# -------------------------------------------------------------------------------------------------------------- models

def test_resnet50_unet_equals_segmentation_models_pytorch():
    theirs = smp.Unet("resnet50", encoder_weights=None, encoder_depth=3, decoder_channels=(256, 128, 64),
                      decoder_attention_type="scse")
    ours = models.build_unet("resnet50")
    source = {k: v for k, v in theirs.state_dict().items() if not re.match(r"encoder\.layer[34]", k)}
    encoder = {k: v for k, v in source.items() if k.startswith("encoder.")}
    rename = {"convs.0.0": "conv1.0", "convs.0.1": "conv1.1", "convs.1.0": "conv2.0", "convs.1.1": "conv2.1",
              "channel": "attention.cSE", "spatial": "attention.sSE"}
    state, renamed = {}, {}
    for name in ours.state_dict():
        other = re.sub(r"^up(\d)", lambda m: f"decoder.blocks.{int(m[1]) - 1}", name).replace("head", "segmentation_head.0")
        for mine, smp_name in rename.items():
            other = other.replace(mine, smp_name)
        state[name], renamed[name] = source.pop(other), other
    assert not source and len(encoder) == len(ours.encoder.state_dict())
    ours.load_state_dict(state)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == 4_536_047
    for mode in (True, False):
        for shape in ((2, 3, 64, 64), (2, 3, 70, 93)):
            x = torch.randn(shape)
            ours.train(mode), theirs.train(mode)
            assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    with torch.no_grad():                                       # for those who serve it without Python
        assert torch.equal(torch.jit.trace(ours, x)(x), ours(x))
    # The ways round full-size maps (Gate, upsampled_conv, recomputation) give the plain network's gradients.
    x, target = torch.randn(2, 3, 64, 64).double(), torch.rand(2, 1, 64, 64) < .3
    for network in (ours, theirs):
        network.double().train().zero_grad()
        losses.focal_tversky_loss(network(x), target).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        mine, other = parameter.grad, gradients[renamed[name]]
        assert torch.allclose(mine, other, atol=1e-10) if mine is not None else other is None, name


def test_vit_unet_has_the_paper_s_form():
    unet = models.build_unet("vit_small", img_size=64)
    vit = unet.encoder
    assert (vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads, vit.patch_embed.patch_size) == (384, 12, 6, (8, 8))
    assert vit.blocks[0].mlp.fc1.out_features == 1536
    unet(torch.randn(2, 3, 64, 64)).mean().backward()
    # The class token and its norm-free path feed only through attention; every weight learns from the map.
    assert not [n for n, p in unet.named_parameters() if p.grad is None]
    with pytest.raises(ValueError, match="multiple of 16"):
        models.build_unet("vit_small", img_size=72)
    with pytest.raises(ValueError, match="unknown backbone"):
        models.build_unet("resnet18")


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_exported_encoder_loads_elsewhere(backbone, tmp_path, capsys):
    unet, path = models.build_unet(backbone, 64), tmp_path / "encoder.pth"
    missing = models.export_encoder(unet, path)
    state = torch.load(path, weights_only=True)
    others = [timm.create_model(models.BACKBONES[backbone], **({} if backbone == "resnet50" else {"img_size": 64}))]
    others += [torchvision.models.resnet50()] if backbone == "resnet50" else []
    for other in others:
        keys = other.load_state_dict(state, strict=False)
        assert not keys.unexpected_keys and sorted(keys.missing_keys) == sorted(missing)
        assert {name.split(".")[0] for name in missing} <= {"layer3", "layer4", "fc", "head"}
    if backbone == "resnet50":
        assert "layer3 (95 tensors)" in capsys.readouterr().out


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_encoders_from_elsewhere_load(backbone, tmp_path):
    source = timm.create_model(models.BACKBONES[backbone], num_classes=10)
    state, path = source.state_dict(), tmp_path / "f.pth"
    for wrapped in (state, {"state_dict": state, "epoch": 3}, {"module." + k: v for k, v in state.items()},
                    {"model": {"module.backbone." + k: v for k, v in state.items()}},
                    {"teacher": {"backbone." + k: v for k, v in state.items()}, "args": argparse.Namespace(arch="vit_small")}):
        torch.save(wrapped, path)
        unet = models.build_unet(backbone, 224)
        unused = models.load_encoder(unet, path)
        assert all(torch.equal(v, state[k]) for k, v in unet.encoder.state_dict().items())
        assert sorted(unused) == sorted(set(state) - set(unet.encoder.state_dict()))


def test_position_embeddings_are_resampled(tmp_path):
    models.export_encoder(models.build_unet("vit_small", 64), tmp_path / "e.pth")
    unet = models.build_unet("vit_small", 96)
    assert models.load_encoder(unet, tmp_path / "e.pth") == []
    assert unet.encoder.pos_embed.shape[1] == 12 * 12 + 1


def test_wrong_encoder_files_are_refused(tmp_path):
    unet, path = models.build_unet("resnet50"), tmp_path / "f.pth"
    complete = unet.encoder.state_dict()
    cut = {k: v for k, v in complete.items() if k != "bn1.weight"}
    shape = complete | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
    for content, words in ((timm.create_model("vit_small_patch8_224").state_dict(), "vit_small encoder, not a resnet50"),
                           ({"a": torch.zeros(1)}, "no encoder"), ([1, 2], "list"), (cut, "bn1.weight"), (shape, "conv1.weight"),
                               (complete | {"bn1.weight": torch.full((64,), float("nan"))}, "not finite"),
                           ({p + k: v for k, v in complete.items() for p in ("online.", "target.")}, "several")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=words) as error:
            models.load_encoder(unet, path)
        assert str(path) in str(error.value)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="not a readable"):
        models.load_encoder(unet, path)
    with pytest.raises(ValueError, match="no such file"):
        models.load_encoder(unet, tmp_path / "absent.pth")


# -------------------------------------------------------------------------------------------------------- pseudo-masks

def test_otsu_equals_skimage_and_the_definition(data):
    images, _ = prepare_data.open_part(data / "demo", "train")
    grays = [image[..., 0] for image in images[:20]] + [rng.integers(0, 256, (31, 17), np.uint8)]
    for gray in grays:
        t = pretrain.otsu_threshold(gray)
        assert np.array_equal(gray > t, gray > skimage.filters.threshold_otsu(gray))
        flat = gray.ravel().astype(np.float64)
        between = [(flat <= s).mean() * (flat > s).mean() * (flat[flat > s].mean() - flat[flat <= s].mean()) ** 2
                   for s in range(int(flat.min()), int(flat.max()))]
        assert between[t - int(flat.min())] == pytest.approx(max(between), rel=1e-9)


def ght_score(gray, t, nu, tau, kappa, omega):
    """Barron's score of one threshold, from the pixels themselves (ECCV 2020, eqs. 7 to 13)."""
    total = 0.0
    for side, share in ((gray[gray <= t], omega), (gray[gray > t], 1 - omega)):
        x = side.astype(np.float64)
        w = max(len(x), 1e-30)
        d = ((x - x.mean()) ** 2).sum() if len(x) else 0.0
        p = w / gray.size
        v = max((p * nu * tau ** 2 + d) / (p * nu + w), 1e-30)
        total += -d / v - w * math.log(v) + 2 * (w + kappa * share) * math.log(w)
    return total


def test_ght_is_the_maximum_of_barrons_score_and_otsu_in_its_limit():
    for seed in range(6):
        r = np.random.default_rng(seed)
        gray = np.concatenate([r.normal(70, 9, 300), r.normal(150, 25, 200)]).clip(0, 255).astype(np.uint8).reshape(20, 25)
        for constants in ((1e3, 12.0, 0.0, .5), (500.0, 3.0, 800.0, .2), (1e-3, 1.0, 1e4, .9)):
            scores = [ght_score(gray, t, *constants) for t in range(255)]
            t = pretrain.ght_threshold(gray, *constants)
            assert scores[t] == pytest.approx(max(scores), rel=1e-9)
        limit = pretrain.ght_threshold(gray, nu=1e60, tau=1e-2, kappa=0.0, omega=.5)
        assert np.array_equal(gray > limit, gray > pretrain.otsu_threshold(gray))


def test_pseudo_masks_follow_their_definitions():
    images = rng.integers(0, 256, (3, 24, 20, 3), np.uint8)
    for i, image in enumerate(images):
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        padded = np.pad(gray, 5, mode="edge").astype(np.float64)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (11, 11))
        gauss = cv2.getGaussianKernel(11, -1)[:, 0]
        scale = gray.size / 2 ** 20
        expected = dict(otsu=gray > pretrain.otsu_threshold(gray), fixed=gray > 127,
                        adaptive_mean=gray > np.round(windows.mean((2, 3))) - 2,
                        adaptive_gaussian=gray > np.round(np.einsum("ijkl,k,l", windows, gauss, gauss)) - 2,
                        ght=gray > pretrain.ght_threshold(gray, 2 ** 29.5 * scale, 2 ** 3.125, 2 ** 22.25 * scale, 2 ** -3.25))
        for method, mask in expected.items():
            bright = pretrain.pseudo_mask(images, method)[i]
            assert bright.dtype == np.uint8 and (bright != mask).mean() < .005, method      # cv2 rounds the local mean
            assert np.array_equal(pretrain.pseudo_mask(images, method, "dark")[i], 1 - bright)
    flat = np.full((1, 24, 24, 3), 200, np.uint8)
    for method in pretrain.THRESHOLDS:
        for foreground in ("bright", "dark"):
            assert not pretrain.pseudo_mask(flat, method, foreground).any()
    with pytest.raises(ValueError):
        pretrain.pseudo_mask(images, "otzu")


# -------------------------------------------------------------------------------------------------------- augmentation

def test_warps_are_torchvisions_inside_and_mirror_outside():
    image = torch.from_numpy(cv2.GaussianBlur(rng.integers(0, 256, (64, 64, 3), np.uint8), (0, 0), 2)).permute(2, 0, 1)
    for ours, theirs in ((pretrain.Rotation(degrees=(20, 20)), torchvision.transforms.v2.functional.affine),
                         (pretrain.Perspective(distortion_scale=.2, p=1.0), torchvision.transforms.v2.functional.perspective)):
        with pretrain.seeded(7):
            params = ours.make_params([image])
        bilinear = torchvision.transforms.InterpolationMode.BILINEAR
        their_params = params if "angle" in params else dict(startpoints=None, endpoints=None, **params)
        reference = theirs(image, interpolation=bilinear, **their_params)
        inside = theirs(torch.full_like(image, 255), interpolation=bilinear, **their_params) == 255
        # A pixel's centre is (x, y) for Pillow's coefficients and (x + .5, y + .5) for torchvision's perspective grid.
        difference = (ours.transform(image, params).int() - reference.int()).abs()[inside]
        assert inside.float().mean() > .5 and difference.float().mean() < 2.5
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    for warp in (pretrain.Rotation(degrees=(30, 30)), pretrain.Perspective(distortion_scale=.9, p=1.0)):
        assert (warp(white) == 255).all()                       # torchvision would leave black corners


def test_channel_is_the_most_separable():
    gray = spot(40, 50)[0]
    t, x = pretrain.otsu_threshold(gray), gray.astype(float)
    between = sum((x[part].mean() - x.mean()) ** 2 * part.mean() for part in (gray <= t, gray > t))
    assert pretrain.separability(gray) == pytest.approx(between / x.var(), rel=1e-9)
    assert pretrain.separability(np.full((5, 5), 7, np.uint8)) == 0
    images = np.stack([np.dstack([rng.integers(0, 256, (40, 50)), spot(40, 50)[0], rng.integers(0, 256, (40, 50))]) for _ in range(5)]).astype(np.uint8)
    assert pretrain.choose_channel(images)[0] == "green"
    assert pretrain.choose_channel(np.repeat(gray[None, ..., None], 3, axis=3))[0] == "gray"        # all alike: gray wins
    for k, channel in enumerate(pretrain.CHANNELS[1:]):
        dark, bright = (pretrain.one_channel(images[0], channel, foreground) for foreground in ("dark", "bright"))
        assert np.array_equal(dark, images[0, ..., k]) and np.array_equal(bright, 255 - dark)
        assert np.array_equal(pretrain.dark_mask(dark), dark <= skimage.filters.threshold_otsu(dark))


def connected(mask, starts):
    """bool (H, W) -> its pixels that are 4-connected to one of `starts`, by a loop."""
    found, queue = np.zeros_like(mask), [start for start in starts if mask[start]]
    while queue:
        y, x = queue.pop()
        if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not found[y, x]:
            found[y, x] = True
            queue += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return found


def test_frame_equals_a_flood_from_border_and_corners():
    noise = np.random.default_rng(0)
    for _ in range(5):
        values = cv2.resize(noise.integers(0, 256, (8, 9)).astype(np.uint8), (72, 64), interpolation=cv2.INTER_CUBIC)
        often = noise.random((64, 72)) < .6
        border = [(y, x) for y in range(64) for x in range(72) if y in (0, 63) or x in (0, 71)]
        assert np.array_equal(pretrain.common_frame(often), connected(often, border))
        corners = [(y, x) for y in (0, 63) for x in (0, 71)]
        frame = connected(values <= .55 * np.median(values), corners) | connected(often, border)
        grown = [[frame[max(0, y - 2):y + 3, max(0, x - 2):x + 3].any() for x in range(72)] for y in range(64)]
        assert np.array_equal(pretrain.frame_of(values, pretrain.common_frame(often)), grown)
        seen = values[~np.array(grown)]
        assert np.array_equal(pretrain.dark_mask(values, np.array(grown)), (values <= skimage.filters.threshold_otsu(seen)) & ~np.array(grown))


def test_position_map_equals_its_definition():
    masks = np.random.default_rng(1).random((13, 24, 30)) < np.linspace(0, .8, 30)
    position, reliability = pretrain.position_map(masks, len(masks))
    halves, generator = [], np.random.default_rng(0)
    for _ in range(8):
        order = generator.permutation(13)
        pair = [cv2.GaussianBlur(masks[rows].mean(axis=0), (0, 0), 30 / 24) for rows in (order[:6], order[6:])]
        halves.append(np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1])
    c, smooth = np.mean(halves) - 2 * np.std(halves), cv2.GaussianBlur(masks.mean(axis=0), (0, 0), 30 / 24)
    assert reliability == pytest.approx(2 * c / (1 + c), rel=1e-4)
    assert np.allclose(position, smooth.mean() + reliability * (smooth - smooth.mean()), atol=1e-4)
    mask = masks[0]
    kept = pretrain.drop_unlikely(mask, position)
    likely = position >= .5 * position.max()
    expected = connected(mask, [tuple(start) for start in np.argwhere(mask & likely)])
    assert np.array_equal(kept, expected) and not np.array_equal(kept, mask)


@pytest.mark.parametrize("n", [8, 9, 16, 40, 200])
def test_position_drops_nothing_where_objects_lie_anywhere(n):
    generator, discs = np.random.default_rng(n), np.zeros((n, 64, 64), np.uint8)
    for disc in discs:
        for centre in generator.integers(0, 64, (12, 2)):
            cv2.circle(disc, centre.tolist(), 3, 1, -1)
    images = np.repeat(200 - 120 * discs[..., None], 3, axis=3)
    masks, evidence = pretrain.refined_masks(images, "dark", ["position"])
    assert np.array_equal(masks, discs) and evidence["dropped"] == 0
    for disc in discs:                                          # now each in the middle, and a blob in a corner
        disc[:] = 0
        cv2.circle(disc, (32 + generator.integers(-6, 7, 2)).tolist(), 10, 1, -1)
    corner = discs.copy()
    corner[::3, :7, :7] = 1
    masks, evidence = pretrain.refined_masks(np.repeat(200 - 120 * corner[..., None], 3, axis=3), "dark", ["position"])
    assert np.array_equal(masks, discs) and 0 < evidence["dropped"] < .3 and evidence["reliability"] > .8
    bright, _ = pretrain.refined_masks(np.repeat(20 + 120 * corner[..., None], 3, axis=3), "bright", ["position"])
    assert np.array_equal(bright, discs)


def test_pseudo_mask_is_of_the_very_view():
    method = pretrain.MedSASS("resnet50", foreground="dark")
    image = torch.from_numpy(rng.integers(0, 256, (3, 48, 48), np.uint8))
    view, mask = method.augment(image)
    assert view.dtype == mask.dtype == torch.uint8 and mask.shape == (1, 48, 48)
    assert np.array_equal(mask.numpy(), pretrain.pseudo_mask(view.permute(1, 2, 0).numpy()[None], "otsu", "dark"))
    assert torch.equal(method.plain(image)[0], image)


def test_batches_cover_an_epoch_once():
    for n, size, count in ((33, 16, 2), (34, 16, 3), (1, 16, 1), (16, 16, 1), (5, 1, 5)):
        batches = pretrain.Batches(n, size, seed=3)
        batches.epoch = 4
        drawn = list(batches)
        assert len(drawn) == len(batches) == count and sorted(i for b in drawn for _, i in b) == list(range(n))
        assert size == 1 or n == 1 or min(len(b) for b in drawn) > 1
        assert drawn == list(batches)
    other = pretrain.Batches(33, 16, seed=3)
    assert list(other) != list(pretrain.Batches(33, 16, seed=4))
    for n, each, seed in ((33, 8, 3), (52, 4, 3), (7, 2, None), (33, 8, None)):        # of several ranks, together one process's
        shares = [pretrain.Batches(n, each, seed, share=(rank, 2)) for rank in (0, 1)]
        parts = [list(share) for share in shares]
        assert sorted(i for batches in parts for b in batches for _, i in b) == list(range(n))
        if seed is not None:
            assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(b) for b in pretrain.Batches(n, 2 * each, seed)]
            assert len(parts[0]) == len(parts[1]) and min(len(b) for batches in parts for b in batches) > 1
    other.done = 1
    assert list(other) == list(pretrain.Batches(33, 16, seed=3))[1:] and len(other) == 2
    several = sum(pretrain.Batches(5, 4, seed=3, draws=12), [])
    parts = [list(pretrain.Batches(10, 1, 0, share=(rank, 4))) for rank in range(4)]        # no rank is left without an image
    assert {len(part) for part in parts} == {2} and all(batch for part in parts for batch in part)
    assert [k for k, _ in several] == [0] * 5 + [1] * 5 + [2] * 2 and all(
        sorted(i for j, i in several if j == k) == list(range(5)) for k in (0, 1))


def test_seeded_leaks_nothing():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    with pretrain.seeded(1, 2, 3):
        torch.rand(7)
        assert torch.get_num_threads() == 1
    assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------------------------------ pretrain

def test_run_folder_is_complete(run, data):
    assert run.parts[-4:] == ("demo", "resnet50", "medsass-e2", "seed0")
    assert {f.name for f in run.iterdir()} == {"config.json", "log.csv", "last.pt", "best.pt", "encoder.pth", "samples.png"}
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_loss", "val_loss", "pseudo_foreground", "predicted_foreground", "seconds", "waited"} < set(rows[0])
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["data"] == json.loads((data / "demo/meta.json").read_text())["fingerprint"]
    share = pretrain.pseudo_mask(np.array(prepare_data.open_part(data / "demo", "train")[0])).mean()
    assert float(rows[0]["pseudo_foreground"]) == pytest.approx(share, rel=.2)          # augmented, so not the same


def test_no_true_mask_is_read_and_workers_do_not_matter(data, run, tmp_path):
    blind = tmp_path / "data"
    shutil.copytree(data, blind)
    for mask in blind.glob("demo/*_masks.npy"):
        mask.unlink()
    for workers in ("1", "2"):
        other = train(blind, tmp_path / workers, "--workers", workers)
        assert contents(other) == contents(run)


def test_killed_run_resumes_to_the_bit(data, tmp_path):
    whole = train(data, tmp_path / "whole", epochs=4)
    flags = ["--dataset", "demo", "--data", str(data), "--out", str(tmp_path / "cut"), "--epochs", "4", "--device", "cpu"]
    command = [sys.executable, str(HERE / "pretrain.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    folder = tmp_path / "cut/demo/resnet50/medsass-e4/seed0"
    deadline = time.time() + 120
    while not (folder / "last.pt").exists() and time.time() < deadline:
        time.sleep(.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "samples.png").exists()
    (folder / "last.pt.tmp").write_bytes(b"half a file")
    pretrain.main(flags)
    assert contents(folder) == contents(whole)
    assert len(list(csv.DictReader(open(folder / "log.csv")))) == 4
    before = (folder / "last.pt").stat().st_mtime_ns
    pretrain.main(flags)                                        # finished: nothing to do
    assert (folder / "last.pt").stat().st_mtime_ns == before
    (folder / "samples.png").unlink()                           # as if killed after the last epoch, before the last file
    (folder / "encoder.pth").unlink()
    pretrain.main(flags)
    assert contents(folder) == contents(whole) and (folder / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()
    assert (folder / "last.pt").stat().st_size < 10_000         # a finished run keeps its weights once


def test_vit_resumes_to_the_bit(tmp_path, monkeypatch):
    data = tmp_path / "data"
    prepare(write_folder(tmp_path / "raw"), data, "--name", "demo")
    whole = train(data, tmp_path / "whole", "--backbone", "vit_small", epochs=2)
    save, calls = torch.save, []

    def crash(state, path):
        calls.append(path)
        if len(calls) == 3:                                     # in the second epoch's best.pt or last.pt
            raise KeyboardInterrupt
        save(state, path)

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "cut", "--backbone", "vit_small", epochs=2)
    monkeypatch.undo()
    cut = train(data, tmp_path / "cut", "--backbone", "vit_small", epochs=2)
    assert contents(cut) == contents(whole)


def test_encoder_only_leaves_the_decoder_as_drawn(data, tmp_path):
    folder = train(data, tmp_path, "--train", "encoder", epochs=1)
    assert folder.parent.name == "medsass-encoder-e1"
    torch.manual_seed(pretrain.seed_from(0))
    start = models.build_unet("resnet50", 32).state_dict()
    end = torch.load(folder / "best.pt", weights_only=True)["model"]
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and all(name.startswith("encoder.") for name in changed)
    assert any("running_mean" in name for name in changed)


def test_training_starts_from_an_encoder(data, run, tmp_path, monkeypatch):
    given = torch.load(run / "encoder.pth", weights_only=True)
    folder = train(data, tmp_path, "--encoder", str(run / "encoder.pth"), "--lr", "0", epochs=1)
    assert folder.parent.name == "medsass-from-encoder-e1-lr0.0" and "encoder_sha256" in (folder / "config.json").read_text()
    own = torch.load(folder / "encoder.pth", weights_only=True)
    assert all(torch.equal(own[name], given[name]) for name in own if "running" not in name and "num_batches" not in name)
    source = timm.create_model("resnet50")
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    method = byol.BYOL("resnet50", 32)
    pretrain.start_from(method, str(tmp_path / "timm.pth"), "resnet50")
    for net in (method.encoder, method.target[0]):
        assert torch.equal(net.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    refused(lambda: train(data, tmp_path, "--encoder", str(tmp_path / "none.pth")), "none.pth", "no such file")

    def no_network(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(pretrain.timm, "create_model", no_network)
    refused(lambda: pretrain.start_from(method, "imagenet", "resnet50"), "--encoder imagenet", "network")


def test_patience_stops_and_exports_the_best(data, tmp_path):
    folder = train(data, tmp_path, "--lr", "0", "--patience", "2", epochs=30)   # nothing learns: epoch 1 stays the best
    assert len(list(csv.DictReader(open(folder / "log.csv")))) == 3
    saved = torch.load(folder / "best.pt", weights_only=True)
    exported = torch.load(folder / "encoder.pth", weights_only=True)
    assert saved["epoch"] == 1 and all(torch.equal(v, saved["model"]["encoder." + k]) for k, v in exported.items())


def test_batchnorm_is_settled_on_plain_training_images(data, run):
    """With running statistics taken anew, eval mode is the mean of train mode's statistics over the training batches."""
    saved = torch.load(run / "best.pt", weights_only=True)["model"]
    unet = models.build_unet("resnet50")
    unet.load_state_dict(saved)
    images = torch.from_numpy(np.array(prepare_data.open_part(data / "demo", "train")[0])).permute(0, 3, 1, 2)
    means, order = [], torch.randperm(64, generator=torch.Generator().manual_seed(pretrain.seed_from(0, 0)))
    unet.encoder.bn1.register_forward_hook(lambda module, inputs, _: means.append(inputs[0].mean(dim=(0, 2, 3))))
    unet.train()
    with torch.no_grad():
        for batch in order.split(16):
            unet(pretrain.normalise(images[batch]))
    assert torch.allclose(torch.stack(means).mean(dim=0), saved["encoder.bn1.running_mean"], atol=1e-5)


def test_variants_name_their_folder(data):
    meta = prepare_data.read_meta(data / "demo")
    args = pretrain.parse_args(["--dataset", "demo", "--train", "encoder", "--threshold", "ght", "--loss", "dice", "--foreground",
                                "dark", "--epochs", "20", "--batch-size", "8", "--seed", "3"])
    _, own = pretrain.build_method(args, meta)
    assert str(pretrain.run_folder(args, own)) == "runs/demo/resnet50/medsass-encoder-ght-dice-dark-e20-b8/seed3"


def test_every_threshold_and_loss_trains(data, tmp_path):
    small = tmp_path / "data"
    prepare(write_folder(tmp_path / "raw"), small, "--name", "demo")
    for threshold, loss in zip(pretrain.THRESHOLDS, losses.LOSSES):
        folder = train(small, tmp_path / "runs", "--threshold", threshold, "--loss", loss, epochs=1)
        assert math.isfinite(float(list(csv.DictReader(open(folder / "log.csv")))[0]["train_loss"]))


def lens(raw, n=20):
    """A raw folder of dark objects seen through a lens, clearest in blue."""
    generator = np.random.default_rng(0)
    (raw / "images").mkdir(parents=True), (raw / "masks").mkdir()
    for k in range(n):
        y, x = np.mgrid[-24:24, -24:24]
        disc = np.hypot(y - generator.integers(-8, 8), x - generator.integers(-8, 8)) < 9
        image = np.dstack([180 - 60 * disc + generator.normal(0, noise, disc.shape) for noise in (40, 40, 8)]).clip(0, 255).astype(np.uint8)
        image[np.hypot(y, x) > 28] = 3
        Image.fromarray(image).save(raw / f"images/{k}.png"), Image.fromarray(disc).save(raw / f"masks/{k}.png")
    return raw


def test_refined_run_learns_its_masks_and_resumes(tmp_path, capsys):
    folder = prepare(lens(tmp_path / "lens"), tmp_path / "data", "--foreground", "dark", "--size", "48")
    flags = ["--dataset", "lens", "--data", str(tmp_path / "data"), "--epochs", "2", "--workers", "0", "--device", "cpu"]
    pretrain.main([*flags, "--out", str(tmp_path / "a"), "--refine"])
    run, out = tmp_path / "a/lens/resnet50/medsass+-e2/seed0", capsys.readouterr().out
    config, kept = json.loads((run / "config.json").read_text()), contents(run)
    assert config["settings"]["refine"] == list(pretrain.REFINEMENTS) and config["refinement"]["channel"] == "blue"
    assert "refined masks: channel blue" in out and config["refinement"]["framed"] > .1
    refinement, _ = pretrain.decide_refinement(prepare_data.open_part(folder, "train")[0], "dark")
    for part in ("train", "val"):
        images, truth = prepare_data.open_part(folder, part)
        masks = np.load(run / f"{part}_masks.npy")
        assert np.array_equal(masks, [refinement.draw(np.array(image)) for image in images])
        assert (masks == truth).mean() > .98 > (pretrain.pseudo_mask(np.array(images), foreground="dark") == truth).mean()
    assert np.asarray(Image.open(run / "samples.png")).shape[1] == 4 * 116             # image, Otsu, refined, prediction
    killed(f"pretrain.main({[*flags, '--out', str(tmp_path / 'b'), '--refine', 'position', 'frame', 'channel']})")
    pretrain.main([*flags, "--out", str(tmp_path / "b"), "--refine"])
    assert contents(tmp_path / "b/lens/resnet50/medsass+-e2/seed0") == kept
    pretrain.main([*flags, "--out", str(tmp_path / "a"), "--refine", "frame", "channel", "--epochs", "1"])
    assert (tmp_path / "a/lens/resnet50/medsass+channel-frame-e1/seed0/samples.png").exists()
    r = score(tmp_path / "data", tmp_path, "--run", str(run))[1]
    assert r["variant"] == "medsass+-e2" and 0 < r["teacher_agreement"] <= 1
    pretrain.main([*flags, "--out", str(tmp_path / "a")])       # the paper's rows are without refinement
    plain = score(tmp_path / "data", tmp_path, "--run", str(tmp_path / "a/lens/resnet50/medsass-e2/seed0"))[1]
    for result in (r, plain):
        result["dataset"] = "isic"
        path = tmp_path / f"isic/{result['variant']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result))
        shutil.copy(tmp_path / "lens/resnet50" / result["variant"] / "seed0/transfer.csv", path.with_suffix(".csv"))
    finetune_eval.main(["--report", "--out", str(tmp_path)])
    row = re.search(r"\| Otsu \|[^|]*\|[^|]*\| ([\d.]+)", (tmp_path / "README.md").read_text())
    assert r["refine"] == "channel frame position" and row and float(row[1]) == pytest.approx(plain["iou_global"], abs=1e-3) != r["iou_global"]
    refused(lambda: pretrain.main([*flags, "--refine", "--threshold", "ght"]), 2)
    config["settings"]["fov"] = "auto"
    (run / "config.json").write_text(json.dumps(config))
    refused(lambda: score(tmp_path / "data", tmp_path, "--run", str(run)), "flags that are gone", "fov")


def test_every_teacher_has_its_row_and_its_picture(tmp_path, capsys):
    folder = prepare(lens(tmp_path / "lens"), tmp_path / "data", "--foreground", "dark", "--size", "48")
    path, r = score(tmp_path / "data", tmp_path, "--dataset", "lens", "--backbone", "resnet50", "--protocol", "reference")
    images, masks = (np.array(part) for part in prepare_data.open_part(folder, "test"))
    train_images = prepare_data.open_part(folder, "train")[0]
    for name, parts in (("otsu+channel", ["channel"]), ("otsu+channel-frame", ["channel", "frame"]), ("otsu+", pretrain.REFINEMENTS)):
        refinement, evidence = pretrain.decide_refinement(train_images, "dark", parts)
        drawn = np.stack([refinement.draw(image) for image in images])
        assert r[f"teacher-{name}"]["iou_global"] == finetune_eval.segmentation_scores(drawn, masks > 0)["iou_global"]
        assert {key: r[f"teacher-{name}"][key] for key in evidence} == evidence and evidence["channel"] == "blue"
    assert r["teacher-otsu+"]["iou_global"] > .95 > r["teacher-otsu"]["iou_global"] == r["raw_threshold"]["iou_global"]
    height, width = np.asarray(Image.open(path.parent / "teachers.png")).shape[:2]
    assert (height, width) == (18 + 6 * 148, (1 + len(finetune_eval.TEACHERS)) * 148)
    for part in prepare_data.PARTS:                             # without masks: the picture
        (folder / f"{part}_masks.npy").unlink()
    path.unlink(), (path.parent / "teachers.png").unlink()
    finetune_eval.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path), "--dataset", "lens", "--backbone", "resnet50", "--protocol", "reference"])
    assert (path.parent / "teachers.png").exists() and not path.exists() and "no test masks" in capsys.readouterr().out


def test_reduced_precision_trains_resumes_and_is_named(data, tmp_path):
    folder = train(data, tmp_path / "one", "--amp", "bf16")
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert folder.parent.name == "medsass-e2-bf16" and settings["amp"] == "bf16"
    flags = ["--dataset", "demo", "--data", str(data), "--out", str(tmp_path / "two"), "--epochs", "2", "--device", "cpu", "--amp", "bf16"]
    killed(f"pretrain.main({flags})")
    pretrain.main(flags)
    assert contents(tmp_path / "two/demo/resnet50/medsass-e2-bf16/seed0") == contents(folder)
    scaled = train(data, tmp_path / "one", "--amp", "fp16", epochs=1)
    log = list(csv.DictReader(open(scaled / "log.csv")))
    assert math.isfinite(float(log[0]["train_loss"])) and 0 <= int(log[0]["skipped"]) < 4
    assert math.isfinite(json.loads(json.dumps(score(data, tmp_path / "results", "--run", str(scaled))[1]))["iou_global"])
    refused(lambda: train(data, tmp_path, "--method", "dino", "--backbone", "vit_small", "--amp", "fp16"), "dino", "bf16")


def test_a_stop_or_a_full_disk_inside_an_epoch_loses_nothing(data, run, tmp_path):
    """SIGTERM to the whole process group saves at the next step; a disk that is full leaves what was saved; then to the bit."""
    flags = ["--dataset", "demo", "--data", str(data), "--out", str(tmp_path), "--epochs", "2", "--device", "cpu", "--workers", "2"]
    stop = ("import os, subprocess, sys, pretrain\n"           # by somebody else, as a cluster does
            "kill = lambda: subprocess.run(['sh', '-c', f'kill -s TERM -- -{os.getpgrp()}'], start_new_session=True)\n"
            "pretrain.MedSASS.after_step = lambda self, step, total: step == 5 and kill()\n"
            "pretrain.main(sys.argv[1:])")
    end = subprocess.run([sys.executable, "-c", stop, *flags], cwd=HERE, capture_output=True, text=True, start_new_session=True)
    assert end.returncode == 1 and end.stderr.splitlines()[-1].startswith("stopped by SIGTERM after step 7") and "Traceback" not in end.stderr
    folder = tmp_path / "demo/resnet50/medsass-e2/seed0"
    saved, before = torch.load(folder / "last.pt", weights_only=True), (folder / "last.pt").read_bytes()
    assert (saved["epoch"], saved["done"]) == (1, 3)
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))
    end = subprocess.run([sys.executable, "pretrain.py", *flags], cwd=HERE, capture_output=True, text=True, preexec_fn=small)
    assert end.returncode == 1 and "cannot be written" in end.stderr.splitlines()[-1] and "Traceback" not in end.stderr, end.stderr
    assert (folder / "last.pt").read_bytes() == before and not list(folder.glob("*.tmp"))
    pretrain.main(flags)
    assert contents(folder) == contents(run)


def test_killed_inside_an_epoch_goes_on_from_the_last_saved_step(data, run, tmp_path):
    flags = ["--dataset", "demo", "--data", str(data), "--out", str(tmp_path), "--epochs", "2", "--device", "cpu", "--save-minutes", "0"]
    killed(f"pretrain.main({flags})")
    folder = tmp_path / "demo/resnet50/medsass-e2/seed0"
    assert torch.load(folder / "last.pt", weights_only=True)["done"] == 1
    pretrain.main(flags)
    assert contents(folder) == contents(run)


RANK_SCRIPT = """import sys; sys.path.insert(0, {here!r})
import torch, pretrain
torch.nn.modules.batchnorm._BatchNorm.train = lambda self, mode=True: torch.nn.Module.train(self, False)
pretrain.MedSASS.keep_best = False
pretrain.main(sys.argv[1:])
"""


def start_ranks(folder, n, *flags):
    """pretrain.py in n gloo ranks, BatchNorm in eval mode, which would see each rank's images alone; best.pt is the last epoch's,
    so that all steps can be compared; a Popen."""
    (folder / "ranks.py").write_text(RANK_SCRIPT.format(here=str(HERE)))
    how = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else [])]
    return subprocess.Popen([*how, str(folder / "ranks.py"), "--data", str(folder), "--workers", "1", "--device", "cpu", *flags], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | dict(OMP_NUM_THREADS="1"), start_new_session=True)


# MedSASS' loss is of the whole batch, whatever a rank's part of it; a baseline's is a mean, here over parts of equal size.
@pytest.mark.parametrize("method, backbone, n", [("medsass", "resnet50", 48), ("medsass", "vit_small", 48), ("dino", "vit_small", 46)])
def test_two_ranks_follow_one_process(method, backbone, n, tmp_path):
    flags = ["--refine"] if backbone == "resnet50" else []      # the first rank draws the masks, the other waits
    prepare(write_folder(tmp_path / "raw", n=n), tmp_path, "--name", "set")        # 33 to train on: batches of 16 and 17; or 32
    runs = {n: start_ranks(tmp_path, n, "--dataset", "set", "--method", method, "--backbone", backbone, "--epochs", "2", "--batch-size",
                           str(16 // n), "--out", str(tmp_path / f"out{n}"), *flags) for n in (1, 2)}
    logs, weights = {}, {}
    for n, run in runs.items():
        assert run.wait(timeout=200) == 0, run.communicate()[0]
        folder = next((tmp_path / f"out{n}" / "set" / backbone).glob("*/seed0"))
        kept = {"best.pt"} if method == "medsass" else set()
        kept |= {"train_masks.npy", "val_masks.npy"} if flags else set()
        assert {f.name for f in folder.iterdir()} == {"config.json", "log.csv", "last.pt", "encoder.pth", "samples.png"} | kept
        logs[n] = list(csv.DictReader(open(folder / "log.csv")))
        weights[n] = weights_of(folder) if kept else torch.load(folder / "encoder.pth", weights_only=True)
    for one, two in zip(logs[1], logs[2]):
        for key in {*one} & {"val_loss", "train_loss", "pseudo_foreground"}:       # collapse numbers are of a rank's batch
            assert float(one[key]) == pytest.approx(float(two[key]), rel=2e-3), key
    for name, one in weights[1].items():                        # two Adam steps an epoch of 3.6e-4
        assert (one.float() - weights[2][name].float()).abs().mean() < 2e-5, name


def test_a_dead_rank_ends_the_run(tmp_path):
    prepare(write_folder(tmp_path / "raw", n=48), tmp_path, "--name", "set")
    run = start_ranks(tmp_path, 2, "--dataset", "set", "--epochs", "500", "--batch-size", "8", "--out", str(tmp_path / "out"))
    folder = tmp_path / "out/set/resnet50/medsass-e500-b8/seed0"
    deadline = time.time() + 100
    while not (folder / "last.pt").exists() and time.time() < deadline and run.poll() is None:
        time.sleep(.2)
    second = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[1]
    os.kill(int(second), signal.SIGKILL)
    start = time.time()
    assert run.wait(timeout=60) != 0 and time.time() - start < 60
    out = run.communicate()[0]
    assert "another one is gone" in out or "stopped by SIGTERM" in out or "failed (exitcode: -9)" in out
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] >= 1 and not list(folder.glob("*.tmp"))


def test_other_settings_in_a_run_folder_are_refused(data, run):
    flags = ["--dataset", "demo", "--data", str(data), "--out", str(run.parents[3]), "--epochs", "2"]
    config = json.loads((run / "config.json").read_text())
    config["settings"]["lr"] = 0.5
    original = (run / "config.json").read_text()
    (run / "config.json").write_text(json.dumps(config))
    refused(lambda: pretrain.main(flags), run, "lr (0.5 there, 0.00036 asked)")
    (run / "config.json").write_text(original)


def test_a_loss_that_is_not_finite_names_the_images(data, tmp_path, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "bce", lambda logits, target: logits.sum() * float("nan"))
    message = refused(lambda: train(data, tmp_path, "--loss", "bce", epochs=3), "in 10 steps in a row", "train_0")
    assert len(re.findall(r"train_\d{3}", message)) == 16


def test_a_one_class_network_is_said_aloud(data, tmp_path, monkeypatch, capfd):
    bias = lambda unet: torch.nn.init.constant_(unet.head.bias, -1e4)
    build = models.build_unet
    monkeypatch.setattr(pretrain, "build_unet", lambda *a: [unet := build(*a), bias(unet)][0])
    train(data, tmp_path, epochs=1)
    out, err = capfd.readouterr()
    assert "calls every pixel background" in out + err


# ----------------------------------------------------------------------------------------------------------- baselines

PAIRINGS = [("byol", "resnet50"), ("simsiam", "resnet50"), ("dino", "resnet50"), ("dino", "vit_small"), ("mae", "vit_small"),
            ("simmim", "vit_small")]


def build(method, backbone, size=32, **kwargs):
    """A baseline and a batch of its views of random images."""
    torch.manual_seed(0)
    method = pretrain.METHODS[method](backbone, size, **kwargs)
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    return method, [torch.stack(view) for view in zip(*[method.augment(image) for image in images])]


def one_step(method, views, step=0, total_steps=10, epoch_steps=5):
    optimizer = method.optimizer()
    method.before_step(optimizer, step, total_steps, epoch_steps)
    method(views).backward()
    method.after_backward()
    optimizer.step()
    method.after_step(step, total_steps)
    return optimizer


@pytest.mark.parametrize("name, backbone", PAIRINGS)
def test_baseline_encoder_is_plain_timm_and_learns(name, backbone):
    method, views = build(name, backbone)
    assert all(view.is_floating_point() and view.ndim == 4 for view in views)
    before = {k: v.clone() for k, v in method.encoder.state_dict().items()}
    one_step(method, views, step=1)
    learns = method.student[0] if name == "dino" else method.encoder       # DINO's encoder is the teacher
    assert not [k for k, p in learns.named_parameters() if p.requires_grad and p.grad is None]
    assert any(not torch.equal(v, before[k]) for k, v in method.encoder.state_dict().items())
    plain = timm.create_model(models.BACKBONES[backbone], num_classes=0, **({} if backbone == "resnet50" else dict(img_size=32)))
    plain.load_state_dict(method.encoder.state_dict(), strict=True)


@pytest.mark.parametrize("name, backbone", [*PAIRINGS, ("medsass", "resnet50"), ("medsass", "vit_small")])
def test_losses_are_taken_in_float32_under_autocast(name, backbone):
    plain, views = build(name, backbone)
    losses_of = []
    for on in (False, True):
        method = copy.deepcopy(plain)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = method(views)
        loss.backward()
        assert loss.dtype == torch.float32 and all(p.grad is None or p.grad.dtype == torch.float32 for p in method.parameters())
        losses_of.append(loss.item())
    assert losses_of[1] == pytest.approx(losses_of[0], abs=.03) and losses_of[1] != losses_of[0]


def test_baselines_refuse_other_pairings_in_one_line(data, tmp_path):
    for name, backbone in (("byol", "vit_small"), ("simsiam", "vit_small"), ("mae", "resnet50"), ("simmim", "resnet50")):
        message = refused(lambda: train(data, tmp_path, "--method", name, "--backbone", backbone), backbone)
        assert "\n" not in message
    for name in ("byol", "simsiam"):
        assert "at least 2" in refused(lambda: train(data, tmp_path, "--method", name, "--batch-size", "1"))
    for name in ("dino", "mae", "simmim"):
        with pytest.raises(ValueError, match="patches of 8"):
            pretrain.METHODS[name]("vit_small", 36)


def test_byol_loss_is_two_minus_two_cos():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    assert byol.regression_loss(a, b).item() == pytest.approx((2 - 2 * 24 / 25 + 2 - 0) / 2)
    assert byol.regression_loss(a, b).item() == pytest.approx(
        2 + 2 * lightly_loss.NegativeCosineSimilarity()(a, b).item(), abs=1e-6)
    method, views = build("byol", "resnet50")
    with torch.no_grad():
        q = [method.predictor(method.projector(method.encoder(view))) for view in views]
        z = [method.target(view) for view in views]
        cos = [(F.normalize(q[i], dim=1) * F.normalize(z[1 - i], dim=1)).sum(dim=1) for i in (0, 1)]
        assert method(views).item() == pytest.approx(sum((2 - 2 * c).mean().item() for c in cos), abs=1e-4)


def test_byol_target_is_the_exact_moving_average():
    method, views = build("byol", "resnet50")
    before = {k: v.clone() for k, v in method.target.named_parameters()}
    one_step(method, views, step=3)
    tau, online = method.tau(3, 10), torch.nn.Sequential(method.encoder, method.projector)
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())
    for name, p in online.named_parameters():
        expected = tau * before[name] + (1 - tau) * p
        assert torch.allclose(method.target.get_parameter(name), expected, atol=1e-7)
    one_step(method, views, step=4)
    own = [method.target[0].bn1, online[0].bn1]                 # BatchNorm's statistics are the target's own
    assert not torch.equal(own[0].running_mean, own[1].running_mean) and own[0].num_batches_tracked == own[1].num_batches_tracked == 4
    assert [method.tau(k, 100) for k in (0, 50, 100)] == pytest.approx([.97, .985, 1.0])
    optimizer, rates = method.optimizer(), []
    for step in range(1000):
        method.before_step(optimizer, step, 1000, 10)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(3e-5) and rates[9] == max(rates) == pytest.approx(3e-4)
    assert rates[505] == pytest.approx(3e-4 * .5 * (1 + math.cos(math.pi * 495 / 990))) and rates[-1] < 1e-8


def test_simsiam_stops_the_gradient_and_matches_lightly():
    method, views = build("simsiam", "resnet50")
    method(views).backward()
    ours = {k: p.grad.clone() for k, p in method.named_parameters()}
    method.zero_grad()
    z = [method.projector(method.encoder(view)) for view in views]
    p = [method.predictor(x) for x in z]
    cosine = lightly_loss.NegativeCosineSimilarity()
    (cosine(p[0], z[1].detach()) / 2 + cosine(p[1], z[0].detach()) / 2).backward()
    assert all(torch.allclose(p.grad, ours[k], atol=1e-5, rtol=1e-3) for k, p in method.named_parameters())
    a, b = torch.randn(5, 8), torch.randn(5, 8, requires_grad=True)
    assert simsiam.D(a, b).item() == pytest.approx(cosine(a, b).item(), abs=1e-6) and not simsiam.D(a, b).requires_grad


@pytest.mark.parametrize("module", [byol, dino, simsiam])
def test_blur_is_pillows_with_torchs_randomness(module):
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    torch.manual_seed(3)
    sigmas = [torch.empty(()).uniform_(.1, 2).item() for _ in range(5)]
    torch.manual_seed(3)
    for sigma in sigmas:
        assert np.array_equal(module.blur(image), image.filter(ImageFilter.GaussianBlur(sigma)))
    assert len(set(sigmas)) == 5


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_the_collapse_number_is_one_when_spread_and_zero_when_collapsed(name):
    method, _ = build(name, "resnet50")
    method.z = torch.randn(4096, 256)
    assert method.health()["std"] == pytest.approx(1, abs=.02) and method.collapsed(method.health()) is None
    method.z = torch.randn(1, 256).expand(64, -1)
    assert method.health()["std"] == pytest.approx(0, abs=1e-6) and "collapsed" in method.collapsed(method.health())


def test_dino_loss_equals_a_loop_over_pairs_and_lightly():
    student, teacher, center = torch.randn(5, 3, 7), torch.randn(2, 3, 7), torch.randn(1, 7)
    total = 0.0
    for t in range(2):
        for v in range(5):
            if v != t:
                for image in range(3):
                    q = np.exp((teacher[t, image] - center[0]).double().numpy() / .04)
                    p = np.exp(student[v, image].double().numpy() / .1)
                    total -= (q / q.sum() * np.log(p / p.sum())).sum()
    ours = dino.dino_loss(student, teacher, center, .1, .04).item()
    assert ours == pytest.approx(total / 8 / 3, rel=1e-5)
    theirs = lightly_loss.DINOLoss(output_dim=7, warmup_teacher_temp=.04, teacher_temp=.04, student_temp=.1)
    theirs.center = center.view_as(theirs.center)
    assert ours == pytest.approx(theirs(list(teacher), list(student), epoch=0).item(), rel=1e-5)


def test_dino_center_head_teacher_and_schedules():
    method, views = build("dino", "vit_small", prototypes=50)
    head = method.student[1]
    assert len(views) == 10 and views[0].shape[-1] == 32 and views[2].shape[-1] == 16
    assert torch.allclose(head.last_layer().norm(dim=1), torch.ones(50), atol=1e-6)
    assert [type(layer).__name__ for layer in head.mlp] == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear"]
    center = torch.zeros(1, 50)
    for _ in range(2):
        with torch.no_grad():
            out = method.teacher(torch.cat(views[:2]))           # one batch: the head's BatchNorm sees both views
        center = .9 * center + .1 * out.mean(dim=0, keepdim=True)
        method(views)
    assert torch.allclose(method.center, center, atol=1e-6)
    method.eval()(views)
    assert torch.allclose(method.center, center, atol=1e-6)     # validation moves nothing
    method.train()
    prototypes = head.prototypes.weight.clone()
    optimizer = one_step(method, views, step=0)                 # epoch 1: prototypes frozen
    assert torch.equal(head.prototypes.weight, prototypes)
    assert all(p.grad is None for p in method.teacher.parameters())
    before = {name: p.clone() for name, p in method.teacher.named_parameters()}
    one_step(method, views, step=5)                             # epoch 2
    assert not torch.equal(head.prototypes.weight, prototypes)
    momentum = method.momentum(5, 10)
    for name, p in method.teacher.named_parameters():
        assert torch.allclose(p, momentum * before[name] + (1 - momentum) * method.student.get_parameter(name), atol=1e-6)
    lr, decay = [], []
    for step in range(100):
        method.before_step(optimizer, step, 100, 10)
        lr.append(optimizer.param_groups[0]["lr"]), decay.append(optimizer.param_groups[0]["weight_decay"])
    assert lr[9] == max(lr) == pytest.approx(5e-4 * 16 / 256) and lr[-1] < 2e-6 and decay[0] == pytest.approx(.04)
    assert decay[-1] == pytest.approx(.4, abs=1e-3) and optimizer.param_groups[1]["weight_decay"] == 0
    assert [method.momentum(k, 5000) for k in (0, 2500, 5000)] == pytest.approx([.996, .998, 1]) and method.momentum(0, 200) == .95


def test_dino_resnet_has_its_own_recipe():
    method, _ = build("dino", "resnet50", prototypes=50)
    optimizer = method.optimizer()
    method.before_step(optimizer, 10, 100, 10)
    matrices, vectors = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.SGD) and matrices["momentum"] == .9 and matrices["lr"] == pytest.approx(.03 / 16)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (1e-4, 0)
    crops = [view.transforms[1].scale for view in method.views]
    assert crops == [(.14, 1.0)] * 2 + [(.05, .14)] * 8


def lightly_step(method, views, name, criterion):
    """The loss of one of our methods, and what follows a step, from lightly's parts: (loss, moving average)."""
    from lightly.models import utils
    cosine = lightly_loss.NegativeCosineSimilarity()
    if name == "simsiam":
        z = [method.projector(method.encoder(view)) for view in views]
        p = [method.predictor(x) for x in z]
        return (cosine(z[0].detach(), p[1]) + cosine(z[1].detach(), p[0])) / 2, lambda step: None
    if name == "byol":
        online = torch.nn.Sequential(method.encoder, method.projector)
        p = [method.predictor(online(view)) for view in views]
        with torch.no_grad():
            z = [method.target(view) for view in views]
        loss = 4 + 2 * (cosine(p[0], z[1]) + cosine(p[1], z[0]))
        return loss, lambda step: utils.update_momentum(online, method.target, method.tau(step, 10))
    encoder, head = method.student
    with torch.no_grad():
        teacher = method.teacher(torch.cat(views[:2])).chunk(2)
    student = head(torch.cat([encoder(torch.cat(views[:2])), encoder(torch.cat(views[2:]))])).chunk(len(views))
    loss = criterion(list(teacher), list(student), epoch=0)
    return loss, lambda step: utils.update_momentum(method.student, method.teacher, method.momentum(step, 10))


@pytest.mark.parametrize("name, backbone", [("byol", "resnet50"), ("simsiam", "resnet50"), ("dino", "resnet50"), ("dino", "vit_small")])
def test_three_steps_equal_those_of_lightlys_parts(name, backbone):
    ours, views = build(name, backbone)
    theirs, start = copy.deepcopy(ours), [p.detach().clone() for p in ours.parameters()]
    criterion = lightly_loss.DINOLoss(output_dim=1024, warmup_teacher_temp=.04, teacher_temp=.04, student_temp=.1)
    optimizers = ours.optimizer(), theirs.optimizer()
    for step in range(3):
        for method, optimizer in zip((ours, theirs), optimizers):
            method.before_step(optimizer, step, 10, 1)
            optimizer.zero_grad()
            if method is ours:
                loss = method(views)
            else:
                loss, average = lightly_step(theirs, views, name, criterion)
            loss.backward()
            method.after_backward()
            optimizer.step()
            method.after_step(step, 10) if method is ours else average(step)
    moved = sum((one - old).square().sum() for one, old in zip(ours.parameters(), start))
    apart = sum((one - two).square().sum() for one, two in zip(ours.parameters(), theirs.parameters()))
    assert moved > 0 and apart < 1e-3 * moved                   # AdamW makes whole steps of rounding, before a BatchNorm
    if name == "dino":
        assert torch.allclose(ours.center, criterion.center.view(1, -1), atol=1e-4)


def test_dino_entropies_show_both_collapses():
    method, _ = build("dino", "resnet50", prototypes=64)
    one_hot, uniform = torch.zeros(32, 64), torch.full((32, 64), 1 / 64)
    one_hot[:, 3] = 1
    for q, words in ((one_hot, "one prototype"), (uniform, "alike"), (torch.eye(64), None)):
        method.q = q
        assert words is None and method.collapsed(method.health()) is None or words in method.collapsed(method.health())
    assert method.health() == pytest.approx(dict(entropy_mean=1, entropy_single=0), abs=1e-6)


def test_mae_masks_restores_and_hides():
    method, (images,) = build("mae", "vit_small", size=64)
    patches = method.patchify(images)
    assert torch.equal(method.unpatchify(patches), images) and torch.equal(patches[1, 9], images[1, :, 8:16, 8:16].flatten())
    tokens = torch.arange(4 * 64.0).view(4, 64, 1)
    kept, mask, restore = method.random_masking(tokens)
    assert kept.shape[1] == 16 and (mask.sum(dim=1) == 48).all()
    restored = torch.gather(torch.cat([kept, torch.full((4, 48, 1), -1.0)], 1), 1, restore[..., None])
    assert torch.equal(restored[mask == 0], tokens[mask == 0]) and (restored[mask == 1] == -1).all()

    def latent_and_loss(pictures, target=None):
        torch.manual_seed(1)
        latent, mask, restore = method.encode(pictures)
        torch.manual_seed(1)
        if target is not None:                                  # the target alone changes
            keep, method.target = method.target, lambda _: keep(target)
            loss = method([pictures]).item()
            method.target = keep
            return latent, mask, loss
        return latent, mask, method([pictures]).item()

    latent, mask, loss = latent_and_loss(images)
    for hidden in (1, 0):
        where = (mask == hidden)[..., None]
        changed = method.unpatchify(torch.where(where, torch.randn_like(patches), patches))
        assert (latent_and_loss(images, changed)[2] == loss) == (hidden == 0)       # only hidden targets count
        assert torch.equal(latent_and_loss(changed)[0], latent) == (hidden == 1)    # only visible pixels are seen
    target = method.target(images)
    p = patches[2, 5].double().numpy()
    assert np.allclose(target[2, 5], (p - p.mean()) / np.sqrt(p.var(ddof=1) + 1e-6), atol=1e-4)
    hidden = target[mask == 1].numpy().reshape(-1, 3, 64)       # of the best constant, one a channel
    assert method.health()["error"] == pytest.approx(method.error.item() / hidden.var(axis=(0, 2)).mean(), rel=1e-4)
    error = ((method.decode(*[latent_and_loss(images)[0], (torch.manual_seed(1), method.encode(images)[2])[1]]) - target) ** 2).mean(-1)
    assert loss == pytest.approx(((error * mask).sum() / mask.sum()).item(), rel=1e-5)


def test_mae_encoder_is_timm_s_where_nothing_is_hidden():
    method, (images,) = build("mae", "vit_small", size=64, mask_ratio=0.0)
    latent, _, restore = method.encode(images)
    patches = torch.gather(latent[:, 1:], 1, restore[..., None].expand(-1, -1, 384))
    expected = method.encoder.forward_features(images)
    assert torch.allclose(torch.cat([latent[:, :1], patches], dim=1), expected, atol=1e-5)


def test_mae_masked_encoding_equals_lightly():
    from lightly.models.modules import MaskedVisionTransformerTIMM
    method, (images,) = build("mae", "vit_small", size=64)
    theirs = MaskedVisionTransformerTIMM(vit=copy.deepcopy(method.encoder))
    theirs.vit.load_state_dict(method.encoder.state_dict())     # lightly draws weights of its own
    latent, _, restore = method.encode(images)
    kept = torch.cat([torch.zeros(4, 1, dtype=torch.long), restore.argsort(dim=1)[:, :16] + 1], dim=1)
    assert torch.allclose(latent, theirs.encode(images, idx_keep=kept), atol=1e-5)


def test_mae_positions_are_the_direct_formula():
    table = mae.sincos_positions(16, 3)[0]
    assert table.shape == (10, 16) and not table[0].any()
    for row in range(3):
        for column in range(3):
            for i in range(4):
                omega = 10000 ** (-i / 4)
                expected = [math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)]
                assert table[1 + row * 3 + column, i::4].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [64, 80, 224])
def test_simmim_masks_blocks(size):
    method = simmim.SimMIM("vit_small", size)
    mask = method.draw_mask(50)
    blocks = math.ceil(size / 32)
    assert mask.shape == (50, size // 8, size // 8) and mask.dtype == torch.bool
    corners = mask[:, ::4, ::4]
    assert (corners.sum(dim=(1, 2)) == math.ceil(.6 * blocks ** 2)).all()
    assert torch.equal(corners.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :size // 8, :size // 8], mask)


def test_simmim_loss_is_l1_over_hidden_pixels_only():
    method, (images,) = build("simmim", "vit_small", size=64)
    torch.manual_seed(2)
    mask = method.draw_mask(4)
    drawn = method.reconstruct(images, mask)
    hidden = torch.nn.functional.interpolate(mask[:, None].float(), scale_factor=8).bool().expand_as(images)
    torch.manual_seed(2)
    assert method([images]).item() == pytest.approx((drawn - images)[hidden].abs().mean().item(), rel=1e-5)
    values = images.permute(0, 2, 3, 1)[hidden[:, 0]].numpy()
    constant = min(np.abs(values[:, 0] - c).mean() for c in np.unique(values[:, 0]))         # by trying all
    assert np.abs(values[:, 0] - np.median(values[:, 0])).mean() == pytest.approx(constant, rel=1e-4)
    best = np.abs(values - np.median(values, axis=0)).mean()
    assert method.health()["error"] == pytest.approx(method.loss.item() / best, rel=1e-4)
    groups = method.optimizer().param_groups
    kept = {id(p) for p in groups[1]["params"]}
    assert groups[1]["weight_decay"] == 0 and {id(method.encoder.cls_token), id(method.encoder.pos_embed)} < kept
    assert id(method.mask_token) not in kept and method.lr == pytest.approx(7.07e-5, rel=1e-3)
    changed = torch.where(hidden, torch.randn_like(images), images)
    assert torch.equal(method.reconstruct(changed, mask), drawn)                    # hidden pixels are not seen
    assert isinstance(method.mask_token, torch.nn.Parameter)
    full = method.reconstruct(images, torch.zeros_like(mask))                       # nothing hidden: timm's own forward
    tokens = method.encoder.forward_features(images)[:, 1:]
    assert torch.allclose(full, method.head(tokens.transpose(1, 2).reshape(4, 384, 8, 8)), atol=1e-5)


@pytest.mark.parametrize("name, backbone", PAIRINGS)
def test_schedules_survive_one_step(name, backbone):
    method, views = build(name, backbone)
    optimizer = one_step(method, views, step=0, total_steps=1, epoch_steps=1)
    assert all(math.isfinite(group["lr"]) and group["lr"] > 0 for group in optimizer.param_groups)
    assert all(torch.isfinite(p).all() for p in method.parameters())


def killed(call):
    """Run `call`, python code after `import pretrain, finetune_eval`, in a process that kills itself (SIGKILL) just before
    its second last.pt would be renamed into place."""
    code = ("import os, pretrain, finetune_eval\nreplace, seen = os.replace, []\n"
            "def replace_or_die(source, target):\n"
            "    seen.append(target) if str(target).endswith('last.pt') else None\n"
            "    os.kill(os.getpid(), 9) if len(seen) == 2 else replace(source, target)\n"
            f"os.replace = replace_or_die\n{call}")
    end = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert end.returncode == -signal.SIGKILL, end.stderr


@pytest.mark.parametrize("name, backbone", [("byol", "resnet50"), ("dino", "vit_small"), ("mae", "vit_small")])
def test_killed_baselines_resume_to_the_bit_and_are_scored(name, backbone, tmp_path):
    """One a family: moving average; moving average with centre and schedules; masks drawn in the forward pass."""
    data = tmp_path / "data"
    prepare(write_folder(tmp_path / "raw"), data, "--name", "demo")
    flags = ["--method", name, "--backbone", backbone, "--batch-size", "4"]
    whole = train(data, tmp_path / "whole", *flags)
    killed(f"pretrain.main({['--dataset', 'demo', '--data', str(data), '--out', str(tmp_path / 'cut'), '--epochs', '2', *flags]})")
    cut = train(data, tmp_path / "cut", *flags, "--workers", "1")
    assert contents(cut) == contents(whole)
    assert json.loads((cut / "config.json").read_text())["settings"]["train"] == "encoder"
    assert {"byol": "std", "dino": "entropy_single", "mae": "error"}[name] in (cut / "log.csv").read_text()
    assert not (cut / "best.pt").exists() and sum(f.stat().st_size for f in cut.iterdir()) < 100e6
    assert score(data, tmp_path, "--run", str(cut))[1]["method"] == name


def test_flags_of_medsass_are_ignored_by_baselines(data, tmp_path, capsys):
    folder = train(data, tmp_path, "--method", "simsiam", "--threshold", "ght", "--loss", "dice", "--lr", "0", "--batch-size", "64")
    assert folder.parent.name == "simsiam-e2-b64-lr0.0"
    out = capsys.readouterr().out
    assert "ignored: --threshold, --loss" in out and "weights of epoch 2 are kept" in out   # the last, though its loss is no better


# ---------------------------------------------------------------------------------- finetune_eval

def test_segmentation_scores_equal_sklearn_and_smp():
    pred = rng.random((5, 12, 10)) < .4
    target = rng.random((5, 12, 10)) < .3
    pred[3], target[3] = False, False                   # nothing to find, nothing found
    pred[4], target[4] = True, False                    # nothing to find, something found
    ours = finetune_eval.segmentation_scores(pred, target)
    theirs = dict(iou=sklearn.metrics.jaccard_score, dice=sklearn.metrics.f1_score,
                  precision=sklearn.metrics.precision_score, recall=sklearn.metrics.recall_score,
                  accuracy=sklearn.metrics.accuracy_score)
    for name, score_of in theirs.items():
        assert ours[f"{name}_global"] == pytest.approx(score_of(target.ravel(), pred.ravel()))
    stats = smp.metrics.get_stats(torch.tensor(pred[:3, None]).long(),
                                  torch.tensor(target[:3, None]).long(), mode="binary")
    three = finetune_eval.segmentation_scores(pred[:3], target[:3])
    for name, score_of in dict(iou=smp.metrics.iou_score, dice=smp.metrics.f1_score).items():
        for kind, reduction in dict(globally="micro", image="micro-imagewise").items():
            key = f"{name}_{kind.removesuffix('ly')}"
            assert three[key] == pytest.approx(score_of(*stats, reduction=reduction).item())
    assert ours["iou_image"] == pytest.approx((3 * three["iou_image"] + 1 + 0) / 5)
    empty = np.zeros((2, 4, 4), bool)
    assert set(finetune_eval.segmentation_scores(empty, empty).values()) == {1.0}
    with pytest.raises(ValueError, match="bool"):
        finetune_eval.segmentation_scores(empty.astype(int), empty)


def score(data, out, *flags):
    """Run finetune_eval.py in this process; returns the JSON's path and the result."""
    finetune_eval.main(["--data", str(data), "--out", str(out), "--device", "cpu", *flags])
    newest = max(out.rglob("*.json"), key=lambda f: f.stat().st_mtime_ns)
    return newest, json.loads(newest.read_text())


ON_DEMO = ["--dataset", "demo", "--backbone", "resnet50"]


def load_unet(run, size=32):
    unet = models.build_unet("resnet50", size)
    unet.load_state_dict(weights_of(run))
    return unet.eval()


def weights_of(folder):
    return torch.load(folder / "best.pt", weights_only=True)["model"]


def test_transfer_scores_the_saved_network(data, run, tmp_path):
    path, result = score(data, tmp_path, "--run", str(run))
    assert path.relative_to(tmp_path) == Path("demo/resnet50/medsass-e2/seed0/transfer.json")
    assert path.with_suffix(".png").exists()
    images, masks = prepare_data.open_part(data / "demo", "test")
    pixels = torch.tensor(np.array(images)).permute(0, 3, 1, 2) / 255
    pixels = torchvision.transforms.v2.functional.normalize(
        pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.inference_mode():
        pred = load_unet(run)(pixels)[:, 0].numpy() > 0
    expected = finetune_eval.segmentation_scores(pred, np.array(masks).astype(bool))
    assert {k: result[k] for k in expected} == pytest.approx(expected, abs=2e-4)
    about = dict(protocol="transfer", n_test=32, labels=0, train="end2end", method="medsass")
    assert about.items() <= result.items()
    again = path.read_bytes()
    score(data, tmp_path, "--run", str(run))
    assert path.read_bytes() == again
    path.write_text(json.dumps(result | {"iou_global": .99}))
    refused(lambda: score(data, tmp_path, "--run", str(run)), path, "iou_global", "--overwrite")


def test_scores_do_not_depend_on_the_batch_size(data, run, tmp_path, monkeypatch):
    results = []
    for batch in (1, 7, 32):
        monkeypatch.setattr(finetune_eval.score_images, "__defaults__", (batch,))
        result = score(data, tmp_path / str(batch), "--run", str(run))[1]
        results.append(result | dict(command=""))
    assert results[0] == results[1] == results[2]


def test_encoder_runs_and_files_get_a_fresh_seeded_decoder(data, run, vit_run, tmp_path):
    encoder = ["--encoder", str(run / "encoder.pth"), *ON_DEMO]
    first, again, other = [score(data, tmp_path / name, *encoder, "--seed", seed)[1]["iou_global"]
                           for name, seed in (("a", "0"), ("b", "0"), ("c", "1"))]
    assert first == again != other
    assert first != score(data, tmp_path / "d", "--run", str(run))[1]["iou_global"]
    vit = ["--encoder", str(vit_run / "encoder.pth"), "--dataset", "demo", "--backbone"]
    score(data, tmp_path, *vit, "vit_small")
    refused(lambda: score(data, tmp_path, *vit, "resnet50"), vit[1], "vit_small")


def test_reference_rows_by_hand(data, tmp_path):
    _, result = score(data, tmp_path, "--protocol", "reference", *ON_DEMO)
    images, masks = prepare_data.open_part(data / "demo", "test")
    images = np.array(images)
    masks = np.array(masks).astype(bool)
    raw = np.stack([image[..., 0] > skimage.filters.threshold_otsu(image[..., 0])
                    for image in images])
    train_images, truths = prepare_data.open_part(data / "demo", "train")
    truths = np.array(truths) > 0
    cuts = [truths.mean(axis=0) >= k / len(truths) for k in range(1, len(truths) + 1)]
    constant = max(cuts, key=lambda cut: (cut & truths).sum() / (cut | truths).sum())
    refinement, _ = pretrain.decide_refinement(train_images, "bright")
    expected = dict(all_foreground=np.ones_like(masks), all_background=np.zeros_like(masks),
                    raw_threshold=raw, raw_threshold_inverted=~raw,
                    refined_threshold=np.stack([refinement.draw(image) for image in images]),
                    best_constant=np.repeat(constant[None], len(masks), axis=0))
    for name, pred in expected.items():
        scores = finetune_eval.segmentation_scores(pred, masks)
        assert {key: result[name][key] for key in scores} == pytest.approx(scores)
    assert result["best_constant"]["uses_labels"] and "random_init" in result


def test_demo_is_neither_trivial_nor_hopeless(tmp_path):
    for seed in ("0", "1", "7"):
        flags = ["--dataset", "demo", "--out", str(tmp_path), "--seed", seed, "--name", seed]
        prepare_data.main(flags)
        images, masks = prepare_data.open_part(tmp_path / seed, "test")
        raw = pretrain.pseudo_mask(np.array(images)).astype(bool)
        scores = finetune_eval.segmentation_scores(raw, np.array(masks).astype(bool))
        assert .5 < scores["iou_global"] < .9


def test_hausdorff_equals_a_loop_over_boundary_pixels():
    def edge(mask):
        padded = np.pad(mask, 1)
        return [(y, x) for y, x in np.argwhere(mask)
                if not (padded[y, x + 1] and padded[y + 2, x + 1]
                        and padded[y + 1, x] and padded[y + 1, x + 2])]

    def distances(one, other):
        return [min(math.dist(p, q) for q in edge(other)) for p in edge(one)]

    blobs = [cv2.GaussianBlur(rng.random((23, 31)), (0, 0), 2) > .5 for _ in range(6)]
    blobs.append(np.ones((23, 31), bool))
    for a, b in itertools.pairwise(blobs):
        expected = max(np.percentile(distances(a, b), 95), np.percentile(distances(b, a), 95))
        assert finetune_eval.hausdorff95(a[None], b[None])[0] == pytest.approx(expected, abs=1e-9)
    empty = np.zeros((23, 31), bool)
    rules = finetune_eval.hausdorff95(np.stack([empty, empty, blobs[0]]),
                                      np.stack([empty, blobs[0], empty]))
    assert rules.tolist() == [0, math.hypot(23, 31), math.hypot(23, 31)]


def test_bootstrap_equals_a_loop_over_drawn_images():
    pred = rng.random((8, 6, 5)) < .5
    target = rng.random((8, 6, 5)) < .4
    groups = ["a", "a", "b", "c", "c", "c", "d", "e"]
    counts = finetune_eval.count_pixels(pred, target)
    weights = finetune_eval.bootstrap_weights(groups, rounds=50, seed=3)
    assert np.array_equal(weights, finetune_eval.bootstrap_weights(groups, rounds=50, seed=3))
    samples = finetune_eval.resampled_scores(counts, weights)
    for k, weight in enumerate(weights):
        assert weight[0] == weight[1] and weight[3] == weight[4] == weight[5]   # groups stay whole
        assert weight[[0, 2, 3, 6, 7]].sum() == 5       # as many as there are
        drawn = np.repeat(np.arange(8), weight.astype(int))
        expected = finetune_eval.segmentation_scores(pred[drawn], target[drawn])
        assert {name: value[k] for name, value in samples.items()} == pytest.approx(expected)
    single = finetune_eval.bootstrap_weights(range(40), rounds=4000)
    bounds = finetune_eval.interval(single @ np.arange(40) / 40)
    spread = 1.96 * np.arange(40).std() / 40 ** .5      # of a mean: close to the normal interval
    assert bounds == pytest.approx([19.5 - spread, 19.5 + spread], abs=.3)


def test_paired_difference_is_of_the_same_images():
    pred = rng.random((8, 6, 5)) < .5
    target = rng.random((8, 6, 5)) < .4
    groups = list("aabcccde")
    ours, other = [np.column_stack([finetune_eval.count_pixels(p, target), np.zeros(8)])
                   for p in (pred, ~pred)]
    assert finetune_eval.paired_difference([ours, ours], [ours], groups) == (0, [0, 0])
    difference, (low, high) = finetune_eval.paired_difference([ours], [other], groups)
    iou, other_iou = [finetune_eval.segmentation_scores(p, target)["iou_global"]
                      for p in (pred, ~pred)]
    assert difference == pytest.approx(iou - other_iou) and low < difference < high


def test_labelled_images_are_nested_and_by_group():
    names = [dict(name=f"{i}", group=f"g{i // 4}" if i < 40 else "") for i in range(50)]
    rows = {}
    for labels, n in {.01: 1, .1: 5, .5: 25, 1: 1, 7: 7, 50: 50, 1.0001: 50}.items():
        rows[labels] = finetune_eval.labelled_rows(names, labels, 5, 50)
        assert len(rows[labels]) == n
    for few, many in ((.01, .1), (.1, .5), (1, 7), (7, .5), (.5, 50)):
        assert set(rows[few]) <= set(rows[many])
    assert len({names[k]["group"] or k for k in rows[.5]}) < 13     # whole groups but the last
    assert rows[.5] == finetune_eval.labelled_rows(names, .5, 5, 50)
    assert rows[.5] != finetune_eval.labelled_rows(names, .5, 6, 50)
    assert len(finetune_eval.labelled_rows(names[:8], 10, 5, 50)) == 2  # a part: its like share


def test_image_and_truth_are_augmented_alike(tmp_path):
    masks = np.zeros((2, 48, 48), np.uint8)
    masks[0, 5:20, 8:40] = 1
    masks[1, 30:44, 3:20] = 1
    images = np.repeat(masks[..., None] * 200 + 20, 3, axis=3).astype(np.uint8)
    np.save(tmp_path / "train_masks.npy", masks)
    np.save(tmp_path / "train_images.npy", images)
    labelled = pretrain.Images(tmp_path, "train", pretrain.paper_augmentation(), 0, rows=[1, 0],
                               masks=tmp_path / "train_masks.npy")
    moved = 0
    for turn in range(30):
        row, (view, mask) = labelled[turn, turn % 2]
        assert row == 1 - turn % 2 and type(mask) is torch.Tensor and mask.dtype == torch.uint8
        is_wrong = (view[1] > 110) != (mask[0] == 1)
        assert is_wrong.float().mean() < .04, turn      # edges are drawn bilinear and nearest
        moved += not np.array_equal(mask[0].numpy(), masks[row])
    assert moved > 20


def tune(data, out, *flags, epochs=1):
    """Run finetune_eval.py with training, on the demo; returns the result, the folder of its
    training, and the JSON's path."""
    path, result = score(data, out / "results", "--epochs", str(epochs), "--workers", "0",
                         "--runs", str(out / "runs"), *flags)
    found = [*out.rglob("config.json"), *data.parent.rglob("config.json")]
    found = [config.parent for config in found if config.parent.name.startswith(path.stem)]
    return result, max(found, key=lambda folder: folder.stat().st_mtime_ns), path


@pytest.fixture
def own_run(run, tmp_path):
    """A copy of the run, for training on labels inside it."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_protocols_train_what_they_say(data, own_run, tmp_path):
    source = weights_of(own_run)
    of_run = ["--run", str(own_run), "--protocol"]

    def changed(folder):
        new = weights_of(folder)
        return {name for name in new if not torch.equal(new[name], source[name])}

    frozen, folder, path = tune(data, tmp_path, *of_run, "frozen", "--labels", "0.1")
    assert changed(folder) and not any(name.startswith("encoder.") for name in changed(folder))
    assert path.name == "frozen-l0.1-e1.json"
    assert (frozen["n_labels_train"], frozen["n_labels_val"]) == (6, 2)
    tuned, folder, _ = tune(data, tmp_path, *of_run, "finetune", "--labels", "3")
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["decoder"] == "pretrained" and tuned["n_labels_train"] == tuned["labels"] == 3
    assert any(name.startswith("encoder.") for name in changed(folder))
    other, other_folder, path = tune(data, tmp_path, *of_run, "finetune", "--labels", "3",
                                     "--seed", "5")    # other labels
    assert other_folder.name == folder.name + "-seed5" and path.parent.name == "seed5"
    scratch, _, path = tune(data, tmp_path, *ON_DEMO, "--protocol", "supervised")
    about = dict(method="supervised", n_labels_train=64, n_labels_val=16, budget_steps=4)
    assert about.items() <= scratch.items()
    assert frozen["budget_steps"] == tuned["budget_steps"] == 4     # few labels, same steps
    with open(path.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    tp, fp, fn = [sum(int(row[name]) for row in rows) for name in ("tp", "fp", "fn")]
    assert len(rows) == 32 and scratch["iou_global"] == pytest.approx(tp / (tp + fp + fn))
    low, high = scratch["iou_global_ci"]
    assert low < scratch["iou_global"] < high
    finetune_eval.main(["--run", str(folder), "--predict", str(HERE / ".github"), "--out",
                        str(tmp_path / "masks"), "--device", "cpu"])
    assert (tmp_path / "masks" / "demo.png").exists()   # a tuned network draws like any other run
    refused(lambda: tune(data, tmp_path, *of_run, "finetune", "--labels", "65"), "64 training")
    with pytest.raises(SystemExit):
        finetune_eval.main([*of_run, "finetune", "--labels", "1.5"])


def test_the_rate_rises_then_falls_and_the_last_weights_are_kept(data, own_run, tmp_path,
                                                                 monkeypatch):
    rates = []
    step = torch.optim.Adam.step

    def noting_step(self, *args, **more):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **more)

    monkeypatch.setattr(torch.optim.Adam, "step", noting_step)
    few = [*ON_DEMO, "--protocol", "supervised", "--labels", "2"]
    result, _, _ = tune(data, tmp_path, *few, epochs=5)
    cosine = [.5 * (1 + math.cos(math.pi * k / 18)) for k in range(18)]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * factor for factor in cosine)])
    assert result["kept_epoch"] == result["epochs_run"] == 5
    rates.clear()                                       # asked for: stops, keeps the best
    result, _, _ = tune(data, tmp_path, *few, "--lr", "0", "--patience", "2", epochs=30)
    assert set(rates) == {0} and (result["epochs_run"], result["kept_epoch"]) == (3, 1)
    rates.clear()
    tune(data, tmp_path, "--run", str(own_run), "--protocol", "finetune")
    assert max(rates) == 3.6e-4


def test_half_of_what_a_partly_labelled_set_gives_is_labelled(data):
    folder = data / "demo"
    masks = folder / "train_masks.npy"
    truth = np.load(masks)
    n = len(truth)
    plain = torchvision.transforms.v2.Identity()
    images = finetune_eval.PartlyLabelled(folder, plain, 0, [5, 9], masks)
    drawn = [images[epoch, k] for epoch in (0, 1) for k in range(n)]
    rows = [row for row, _ in drawn]
    assert rows.count(5) == rows.count(9) == n // 2 + 1 and set(rows) == set(range(n))
    assert all(np.array_equal(mask[0], truth[row]) for row, (_, mask) in drawn)
    moved = finetune_eval.PartlyLabelled(folder, pretrain.paper_augmentation(), 0, [5], masks)
    assert not torch.equal(moved[0, 0][1][0], moved[0, 2][1][0])    # the same row, drawn again


@pytest.fixture(scope="module")
def good_run(data, run, tmp_path_factory):
    """A run with the weights of supervised training: a good network, as if it had seen no label."""
    folder = tmp_path_factory.mktemp("good")
    _, supervised, _ = tune(data, folder, *ON_DEMO, "--protocol", "supervised", epochs=8)
    good = Path(shutil.copytree(run, folder / "good"))
    shutil.copy(supervised / "best.pt", good / "best.pt")
    return good


def test_semi_trusts_labels_that_teach_more_than_pseudo_masks(data, own_run, tmp_path):
    result, _, _ = tune(data, tmp_path, "--run", str(own_run), "--protocol", "semi",
                        "--labels", "0.5", epochs=6)
    about = dict(trusted=True, n_labels_train=32, budget_steps=24, kept_epoch=6)
    assert about.items() <= result.items()


def test_semi_draws_the_missing_masks_where_labels_ruin_the_network(data, good_run, tmp_path,
                                                                    monkeypatch):
    """A large rate ruins the tuned one. No other label is read; killed, it goes on to the bit."""
    good = Path(shutil.copytree(good_run, tmp_path / "good"))
    flags = ["--run", str(good), "--protocol", "semi", "--labels", "2", "--lr", "0.2"]
    result, folder, _ = tune(data, tmp_path, *flags, epochs=2)
    assert not result["trusted"] and result["agreement"] < .8 * result["pretrained_iou"]
    assert json.loads((folder / "labels/decision.json").read_text()).items() <= result.items()
    images, truth = [np.array(part) for part in prepare_data.open_part(data / "demo", "train")]
    names = prepare_data.read_names(data / "demo", "train")
    rows = finetune_eval.labelled_rows(names, 2, 0, len(names))
    is_labelled = np.isin(np.arange(len(truth)), rows)
    drawn = finetune_eval.predict_logits(load_unet(good), images, "cpu") > 0
    masks = np.load(folder / "labels/train_masks.npy")
    assert np.array_equal(masks[is_labelled], truth[is_labelled])
    assert (masks[~is_labelled] == drawn[~is_labelled]).mean() > .999
    scores = finetune_eval.segmentation_scores(drawn[rows], truth[rows] > 0)
    assert result["pretrained_iou"] == pytest.approx(scores["iou_global"], abs=.01)
    kept = contents(folder)
    blind = tmp_path / "blind"
    shutil.copytree(data, blind)
    ones = np.where(is_labelled[:, None, None], truth, 1).astype(np.uint8)
    np.save(blind / "demo/train_masks.npy", ones)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(finetune_eval, "compare_tuned", lambda *args: 1 / 0)
        tune(blind, tmp_path / "stopped", *flags, "--overwrite", epochs=2)
    assert (folder / "labels/samples.png").exists()     # between the halves:
    assert not (folder / "config.json").exists()        # the old second one is gone
    assert contents(tune(blind, tmp_path / "blind_results", *flags, epochs=2)[1]) == kept
    command = [*flags, "--data", str(data), "--out", str(tmp_path / "cut"), "--epochs", "2",
               "--workers", "0", "--device", "cpu", "--overwrite"]
    killed(f"finetune_eval.main({command})")
    assert not (folder / "samples.png").exists() and (folder / "labels/samples.png").exists()
    assert contents(tune(data, tmp_path / "resumed", *flags, epochs=2)[1]) == kept


def test_semi_needs_a_whole_network_that_saw_no_label(data, run, tmp_path):
    semi = ["--protocol", "semi", "--epochs", "2"]
    encoder = ["--encoder", str(run / "encoder.pth"), *ON_DEMO]
    refused(lambda: score(data, tmp_path, *encoder, *semi), "encoder.pth", "whole U-Net")
    _, supervised, _ = tune(data, tmp_path, *ON_DEMO, "--protocol", "supervised")
    refused(lambda: score(data, tmp_path, "--run", str(supervised), *semi), supervised)
    refused(lambda: tune(data, tmp_path, "--run", str(run), *semi[:2]), 2)      # one epoch: no half


def test_test_masks_are_never_seen_before_the_score(data, tmp_path):
    noisy = tmp_path / "noisy"
    shutil.copytree(data, noisy / "data")
    noise = rng.integers(0, 2, (32, 32, 32), np.uint8)
    np.save(noisy / "data/demo/test_masks.npy", noise)
    flags = [*ON_DEMO, "--protocol", "supervised", "--labels", "8"]
    clean, folder, _ = tune(data, tmp_path / "clean", *flags, epochs=2)
    other, noisy_folder, _ = tune(noisy / "data", noisy, *flags, epochs=2)
    assert contents(folder) == contents(noisy_folder)
    assert clean["iou_global"] != other["iou_global"]


def test_killed_training_on_labels_resumes_to_the_bit(data, tmp_path):
    flags = [*ON_DEMO, "--protocol", "supervised", "--labels", "0.2"]
    whole, folder, _ = tune(data, tmp_path / "whole", *flags, epochs=2)
    cut = tmp_path / "cut"
    command = [*flags, "--data", str(data), "--out", str(cut / "results"), "--runs",
               str(cut / "runs"), "--epochs", "2", "--workers", "0", "--device", "cpu"]
    killed(f"finetune_eval.main({command})")
    assert not list(cut.rglob("*.json.csv")) and not list((cut / "results").rglob("*.json"))
    resumed, resumed_folder, _ = tune(data, cut, *flags, epochs=2)
    assert contents(folder) == contents(resumed_folder)
    assert whole | dict(command="") == resumed | dict(command="")


def test_linear_probe(tmp_path):
    raw = write_folder(tmp_path / "raw", n=30)
    lines = ["name,label"]
    for k, path in enumerate(sorted((raw / "images").iterdir())):
        if k % 2 == 0:                                  # every other image is much brighter
            pixels = np.asarray(Image.open(path)).astype(int) + 90
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        if k != 7:                                      # one has no label
            lines.append(f"{path.stem},{('bright', 'dull')[k % 2]}")
    (raw / "labels.csv").write_text("\n".join(lines))
    prepare(raw, tmp_path / "data", "--name", "demo")
    encoder = tmp_path / "encoder.pth"
    models.export_encoder(models.build_unet("resnet50"), encoder)
    flags = [*ON_DEMO, "--protocol", "classify", "--lr", "0.05", "--batch-size", "8", "--encoder"]
    result, folder, path = tune(tmp_path / "data", tmp_path, *flags, str(encoder), epochs=6)
    with open(path.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    truth = [row["label"] for row in rows]
    pred = [row["prediction"] for row in rows]
    recall = sklearn.metrics.recall_score(truth, pred, average="macro")
    confusion = sklearn.metrics.confusion_matrix(truth, pred, labels=result["classes"])
    assert result["macro_recall"] == pytest.approx(recall) and recall > .8
    assert result["confusion"] == confusion.tolist() and result["n_test"] == len(rows)
    kept = weights_of(folder)
    for name, value in torch.load(encoder, weights_only=True).items():
        assert torch.equal(kept["encoder." + name], value)
    assert result["stage"] == "layer2" and "layer4" not in result
    whole = tmp_path / "whole.pth"                      # with layer3 and layer4: both are read
    torch.save(timm.create_model("resnet50").state_dict(), whole)
    result, folder, _ = tune(tmp_path / "data", tmp_path, *flags, str(whole))
    assert result["stage"] == "layer4" and 0 <= result["layer2"]["macro_recall"] <= 1
    widths = [weights_of(folder)[f"linear.{k}.weight"].shape[1] for k in (0, 1)]
    assert widths == [512, 2048]
    finetune_eval.main(["--report", "--out", str(tmp_path / "results")])
    report = (tmp_path / "results/README.md").read_text()
    assert "| whole: classify" in report and "| layer2 |" in report
    (raw / "labels.csv").unlink()
    prepare(raw, tmp_path / "data", "--name", "bare")
    refused(lambda: tune(tmp_path / "data", tmp_path, *flags, str(encoder), "--dataset", "bare"),
            "at least two labels")


def test_focal_cross_entropy_equals_its_definition():
    logits = torch.randn(6, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, 1, 1, 2, 0])
    p = torch.softmax(logits, dim=1).numpy()[range(6), target]
    expected = (-(1 - p) ** 2 * np.log(p)).mean()
    assert finetune_eval.focal_cross_entropy(logits, target).item() == pytest.approx(expected)
    plain = finetune_eval.focal_cross_entropy(logits, target, gamma=0.0).item()
    assert plain == pytest.approx(F.cross_entropy(logits, target).item())


def fake_result(out, variant, seed, quality, protocol="transfer", dataset="isic", **more):
    """A result with its CSV, of 20 images in which a share `quality` of the foreground is found;
    returns its IoU."""
    names = [dict(name=f"i{k}", group="") for k in range(20)]
    target = np.random.default_rng(1).random((20, 16, 16)) < .3
    pred = target & (np.random.default_rng(seed).random((20, 16, 16)) < quality)
    table = np.column_stack([finetune_eval.count_pixels(pred, target),
                             finetune_eval.hausdorff95(pred, target)])
    row = "raw_threshold" if protocol == "reference" else ""
    block = finetune_eval.summarise(table, [name["name"] for name in names])
    result = dict(dataset=dataset, backbone="resnet50", method=variant.split("-")[0],
                  variant=variant, protocol=protocol, labels=0.0, seed=seed, n_test=20,
                  train="encoder" if variant == "byol" else "end2end", threshold="otsu",
                  loss="focal_tversky", epochs=50, batch_size=16, img_size=224, **more)
    result |= {row: block} if row else block
    folder = out / dataset / "resnet50" / variant / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    finetune_eval.write_csv(folder / f"{protocol}.csv",
                            finetune_eval.per_image({row: table}, names))
    (folder / f"{protocol}.json").write_text(json.dumps(result))
    return block["iou_global"]


def report_of(out):
    finetune_eval.main(["--report", "--out", str(out)])
    return (out / "README.md").read_text(encoding="utf-8")


def test_report_shows_what_is_there_and_names_what_is_not(tmp_path, capsys, monkeypatch):
    out = tmp_path / "results"
    iou = [fake_result(out, "medsass", seed, .8) for seed in range(3)]
    fake_result(out, "byol", 0, .5)
    fake_result(out, "reference", 0, .5, "reference")
    trained = dict(n_labels_train=20, n_labels_val=4, budget_steps=9)
    fake_result(out, "supervised", 0, .9, "supervised", **trained)
    fake_result(out, "medsass", 0, .85, "finetune", **trained)
    fake_result(out, "medsass", 0, .7, dataset="my set")
    (out / "broken.json").write_text("{")
    (out / "foreign.json").write_text('{"a": [1]}')
    (out / "list.json").write_text("[3]")
    seeds = out / "isic/resnet50/medsass"
    shutil.copytree(seeds / "seed1", seeds / "seed9")
    (seeds / "seed9/transfer.csv").unlink()
    text = report_of(out)
    printed = capsys.readouterr().out
    assert "8 results, 4 warnings" in printed
    for name in ("broken.json", "foreign.json", "list.json", "seed9/transfer.json"):
        assert name in text and name in printed
    isic = text[:text.index("## my set")].splitlines()
    lines = {line.split(" | ")[0]: line for line in reversed(isic)}     # the first table's
    mean = f"{np.mean(iou):.4f} ± {np.std(iou, ddof=1):.4f} (3)"
    assert f"| medsass: transfer | 0 | {mean} |" in lines["| medsass: transfer"]
    assert "vs raw_threshold" in text and "≈" in lines["| byol: transfer"]
    assert "≈" not in lines["| medsass: transfer"]
    against = next(line for line in reversed(isic) if "| medsass: finetune" in line)
    assert re.fullmatch(r"\| medsass: finetune \| 20 \+ 4 \| (-0\.0\d+ \[.*\]) \| \1 \(20 \+ 4\) \|",
                        against)
    assert "vs best reference row (none here)" in text[text.index("## my set"):]
    assert "![my set](my%20set.png)" in text and Image.open(out / "my set.png").size[0] > 400
    paper = text[text.index("## The paper's tables"):]
    assert f"| ResNet-50 | {mean} / 0.4847 |" in paper
    assert re.search(r"\| BYOL \| 0\.\d{4} \(1\) / 0\.2412 \|", paper)
    assert "| DINO | - / 0.2426 |" in paper and "Not run here: Table 2" in paper
    monkeypatch.setitem(sys.modules, "matplotlib", None)        # as if it were not installed
    assert ".png" not in report_of(out)
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_report_on_a_terminal_that_is_not_utf8(tmp_path):
    fake_result(tmp_path, "medsass", 0, .5, dataset="é ü")
    end = subprocess.run([sys.executable, str(HERE / "finetune_eval.py"), "--report", "--out", "."],
                         cwd=tmp_path, env=os.environ | dict(PYTHONIOENCODING="ascii"))
    assert end.returncode == 0 and "é ü" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_exported_network_needs_none_of_our_code(run, vit_run, data, tmp_path):
    images = np.array(prepare_data.open_part(data / "demo", "test")[0])
    for folder in (run, vit_run):
        path = tmp_path / f"{folder.parts[-3]}.pt2"
        flags = ["--run", str(folder), "--export", str(path)]
        finetune_eval.main(flags)
        refused(lambda flags=flags: finetune_eval.main(flags), path, "--overwrite")
        np.save(tmp_path / "images.npy", images.transpose(0, 3, 1, 2))
        code = ("import json, sys, numpy, torch\n"
                "about = {'network.json': ''}\n"
                "network = torch.export.load(sys.argv[1], extra_files=about).module()\n"
                "images = torch.from_numpy(numpy.load('images.npy'))\n"
                "pair = network(images[:5]), network(images[:1])\n"
                "numpy.save('drawn.npy', torch.cat(pair).numpy())\n"
                "print(json.dumps(json.loads(about['network.json'])))\n")
        end = subprocess.run([sys.executable, "-I", "-c", code, str(path)], cwd=tmp_path,
                             check=True, capture_output=True, text=True)
        about = json.loads(end.stdout)
        assert (about["size"], about["foreground"]) == (32, "bright")
        unet, _ = finetune_eval.whole_network(finetune_eval.parse_args(flags),
                                              finetune_eval.read_run(folder))
        logits = torch.tensor(finetune_eval.predict_logits(unet, images[[0, 1, 2, 3, 4, 0]], "cpu"))
        drawn = np.load(tmp_path / "drawn.npy")[:, 0]
        assert np.allclose(drawn, torch.sigmoid(logits), atol=1e-4)


def run_all(folder, *words, **environment):
    """run_all.sh in `folder`; returns (exit code, standard output, standard error)."""
    end = start_run_all(folder, *words, **environment)
    out, err = end.communicate()
    return end.returncode, out, err


def start_run_all(folder, *words, **environment):
    plain = dict(os.environ)
    for name in ("DATASETS", "SEEDS", "METHODS", "BACKBONES", "EPOCHS", "SHARD"):
        plain.pop(name, None)
    plain["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(["bash", str(folder / "run_all.sh"), *words], cwd=folder, text=True,
                            env=plain | environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_dry_run_lists_every_run_once_and_shards_cover_it(tmp_path):
    shutil.copy(HERE / "run_all.sh", tmp_path)

    def runs(**more):
        """{line of a run: lines of what is made of it}."""
        flags = dict(DRY_RUN="1", DATASETS="demo", SEEDS="0 1") | more
        code, out, err = run_all(tmp_path, "main", **flags)
        assert (code, err) == (0, "")
        blocks = [block.strip().split("\n    ") for block in re.split(r"\n(?=python)", out)]
        listed = {block[0]: block[1:] for block in blocks}
        assert len(listed) == len(blocks)
        return listed

    listed = runs()
    medsass = ["", " --refine", " --train encoder"]
    expected = set()
    for backbone, methods in dict(resnet50="byol simsiam dino", vit_small="dino mae simmim").items():
        for seed in (0, 1):
            for how in [*medsass, *(f" --method {name}" for name in methods.split())]:
                expected.add(f"python pretrain.py --dataset demo --backbone {backbone} "
                             f"--seed {seed}{how}")
    assert {line for line in listed if "pretrain.py" in line} == expected
    assert all(len(listed[line]) == 7 for line in expected)     # transfer, 3 labels, 2 protocols
    assert sum("--protocol reference" in line for line in listed) == 4
    assert sum("--protocol supervised" in line for line in listed) == 12
    shards = [runs(SHARD=f"{k}/3") for k in (1, 2, 3)]
    assert sum(len(shard) for shard in shards) == len(listed)
    assert {**shards[0], **shards[1], **shards[2]} == listed and all(shards)
    assert [f.name for f in tmp_path.iterdir()] == ["run_all.sh"]
    assert run_all(tmp_path, "main", DRY_RUN="1", DATASETS="demo", SHARD="4/3")[0] == 2


@pytest.fixture
def project(tmp_path):
    """A copy of what run_all.sh needs, with scripts that are stood in for: they write what they are
    asked to, note it in `seen`, and fail or wait where a file of that name says so."""
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "data/demo").mkdir(parents=True)
    (tmp_path / "data/demo/meta.json").write_text("{}")
    stand_in = """import os, pathlib, sys, time
    words = ' '.join(sys.argv)
    with open('seen', 'a') as file:
        file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {words}\\n")
    if '--report' in words:
        sys.exit()
    for name, code in (('busy', 75), ('bad', 1)):
        if pathlib.Path(name).exists() and pathlib.Path(name).read_text() in words:
            os.unlink(name) if name == 'busy' else print('reason')
            sys.exit(code)
    while pathlib.Path('slow').exists():
        time.sleep(.05)
    time.sleep(.2)
    made = pathlib.Path('runs') / words.replace('/', '_').replace(' ', '') / 'samples.png'
    made.parent.mkdir(parents=True, exist_ok=True)
    made.touch()
    print(made)
    """
    for name in ("pretrain.py", "finetune_eval.py"):
        (tmp_path / name).write_text(stand_in.replace("\n    ", "\n"))
    return tmp_path


FOUR = dict(DATASETS="demo", SEEDS="0", BACKBONES="resnet50", METHODS="byol simsiam",
            PROTOCOLS="transfer", LABELS="0.1")


def seen(folder):
    """What the stood-in scripts were called with, without the report."""
    lines = (folder / "seen").read_text().splitlines()
    return [line for line in lines if "--report" not in line]


def test_a_failed_run_stops_no_other_is_listed_and_is_tried_again(project):
    (project / "bad").write_text("--method byol")
    code, out, err = run_all(project, **FOUR)
    assert code == 1 and re.search(r"exit code 1: python pretrain.py .* --method byol\n", err)
    log = re.search(r"log: (\S+)", err)[1]
    assert (project / log).read_text() == "reason\n"
    assert len(seen(project)) == 5                      # its evaluation is not tried
    (project / "bad").unlink()
    assert run_all(project, **FOUR)[0] == 0             # what is there is left
    assert len(seen(project)) == 5 + 2 and "--method byol" in seen(project)[5]
    assert run_all(project, **FOUR)[0] == 0
    assert len(seen(project)) == 7
    made = next((project / "runs").glob("pretrain*byol*"))
    shutil.rmtree(made)                                 # and what somebody deleted is made again
    assert run_all(project, **FOUR)[0] == 0 and made.exists() and len(seen(project)) == 8


def test_what_another_process_is_at_is_tried_later(project):
    (project / "busy").write_text("--method byol")
    assert run_all(project, **FOUR)[0] == 0
    order = ["byol" in line for line in seen(project) if line.split()[1] == "pretrain.py"]
    assert order == [True, False, True]


def test_a_stopped_driver_stops_its_runs_and_goes_on(project):
    (project / "slow").touch()
    driver = start_run_all(project, JOBS="2", **FOUR)
    while not (project / "seen").exists() or len(seen(project)) < 2:
        time.sleep(.05)
    driver.terminate()
    assert driver.wait() == 130
    (project / "slow").unlink()
    time.sleep(1)
    assert len(seen(project)) == 2 and not (project / "runs").exists()
    assert run_all(project, **FOUR)[0] == 0 and len(list((project / "runs").iterdir())) == 6


def test_each_gpu_gets_its_own_runs(project):
    assert run_all(project, GPUS="3 5", **FOUR)[0] == 0
    assert {line.split()[0] for line in seen(project)} == {"3", "5"}


def test_the_real_scripts_print_what_they_made_last(data, run, tmp_path):
    """run_all.sh finds a run, and what is finished, by that line."""
    common = ["--data", str(data), "--device", "cpu", "--dataset", "demo"]
    pretraining = ["pretrain.py", *common, "--epochs", "2", "--out", str(run.parents[3])]
    scoring = ["finetune_eval.py", *common, "--run", str(run), "--out", str(tmp_path)]
    for command, made in ((pretraining, run / "samples.png"), (scoring, None)):
        end = subprocess.run([sys.executable, *command], cwd=HERE, check=True, text=True,
                             capture_output=True)
        last = Path(end.stdout.splitlines()[-1])
        assert last.exists() and last == (made or next(tmp_path.rglob("*.json")))


def test_two_processes_never_train_one_run(data, tmp_path):
    folder = tmp_path / "demo/resnet50/medsass-e1/seed0"
    code = f"""if True:
        import os, pathlib, time, prepare_data
        with prepare_data.only_one(pathlib.Path({str(folder / ".lock")!r})):
            child = os.fork()                           # a worker that outlives its parent
            print(child, flush=True) if child else None
            time.sleep(60)"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE,
                             text=True)
    child = int(other.stdout.readline())
    with pytest.raises(SystemExit) as end:
        train(data, tmp_path, epochs=1)
    assert end.value.code == 75 and {f.name for f in folder.iterdir()} == {".lock"}
    other.kill()
    other.wait()                                        # a crash leaves the file, not the lock
    assert (train(data, tmp_path, epochs=1) / "samples.png").exists()
    assert not (folder / ".lock").exists()
    os.kill(child, signal.SIGKILL)


def test_predict_draws_masks_at_each_image_s_own_size(run, tmp_path):
    source = tmp_path / "in"
    out = tmp_path / "out"
    source.mkdir()
    sizes = {"a b": (50, 31), "c": (32, 32), "dé": (20, 90)}
    for name, (width, height) in sizes.items():
        pixels = rng.integers(0, 256, (height, width), np.uint8)
        Image.fromarray(pixels).save(source / f"{name}.tif")
    flags = ["--run", str(run), "--predict", str(source), "--out", str(out), "--overlay",
             "--device", "cpu"]
    finetune_eval.main(flags)
    with open(out / "foreground.csv", encoding="utf-8", newline="") as file:
        shares = {row["name"]: float(row["foreground_share"]) for row in csv.DictReader(file)}
    for name, size in sizes.items():
        mask = Image.open(out / f"{name}.png")
        assert mask.size == size == Image.open(out / "overlay" / f"{name}.png").size
        assert set(np.unique(mask)) <= {0, 255}
        assert np.mean(np.asarray(mask) > 0) == pytest.approx(shares[f"{name}.tif"], abs=1e-6)
    image = prepare_data.read_image(source / "c.tif")
    turned = []
    for y, x in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        flipped = np.ascontiguousarray(image[::y, ::x])[None]
        logits = finetune_eval.predict_logits(load_unet(run), flipped, "cpu")[0]
        turned.append(logits[::y, ::x])
    finetune_eval.main([*flags, "--flips", "--overwrite"])
    drawn = np.asarray(Image.open(out / "c.png")) > 0
    assert (drawn == (np.mean(turned, axis=0) > 0)).mean() > .999
    refused(lambda: finetune_eval.main(flags), out, "--overwrite")
    inside = ["--out", str(source / "out"), "--overwrite"]
    refused(lambda: finetune_eval.main([*flags, *inside]), source / "out", "another --out")
    (source / "bad.png").write_text("text")
    refused(lambda: finetune_eval.main([*flags, "--overwrite"]), source / "bad.png", "not an image")
    assert not (out / "bad.png").exists() and (out / "c.png").exists()


class Local(torch.nn.Module):
    """A network that sees 5 pixels around: what it says of a pixel does not depend on a window
    that holds those."""

    def forward(self, x):
        gray = x.mean(dim=1, keepdim=True)
        return F.avg_pool2d(gray, 11, stride=1, padding=5, count_include_pad=False)


@pytest.mark.parametrize("shape", [(32, 32), (20, 90), (70, 33), (131, 97), (1, 1)])
def test_tiles_have_no_seams(shape):
    noise = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 3).reshape(*shape, 3)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    whole = finetune_eval.predict_logits(Local(), image[None], "cpu")[0]
    mask = finetune_eval.predict_tiled(Local(), image, 32, 32, "cpu")
    assert mask.shape == shape and mask.dtype == bool
    is_clear = np.abs(whole) > .1       # a window's own border counts, by less than 3 % of a window
    assert ((mask == (whole > 0)) | ~is_clear).mean() > .99


def test_tiles_of_a_trained_network_agree_with_the_whole_picture(run, tmp_path):
    unet = load_unet(run)
    rows = []
    for y in range(4):
        row = [prepare_data.draw_nuclei(32, np.random.default_rng([y, x]))[0] for x in range(3)]
        rows.append(np.hstack(row))
    image = np.vstack(rows)
    whole = finetune_eval.predict_logits(unet, image[None], "cpu")[0] > 0
    tiled = finetune_eval.predict_tiled(unet, image, 32, 32, "cpu")
    inside = (whole == tiled)[16:-16, 16:-16]
    assert inside.mean() > .8           # scSE looks at the mean of all that it is given
    source = tmp_path / "in"
    source.mkdir()
    pages = [Image.fromarray(image[..., 0].astype(np.uint16) * k) for k in (0, 200)]
    pages[0].save(source / "slide.tif", save_all=True, append_images=pages[1:])
    flags = ["--run", str(run), "--predict", str(source), "--out", str(tmp_path / "out"),
             "--device", "cpu", "--tile"]
    finetune_eval.main([*flags, "--page", "1"])
    page = prepare_data.read_image(source / "slide.tif", page=1)
    expected = finetune_eval.predict_tiled(unet, page, 32, 32, "cpu")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/slide.png")) > 0, expected)
    refused(lambda: finetune_eval.main([*flags, "--page", "2", "--overwrite"]), "no page 2")


def test_memory_of_tiles_does_not_grow_with_the_height():
    peaks = []
    for times in (1, 8):
        tall = np.zeros((128 * times, 96, 3), np.uint8)
        tracemalloc.start()
        finetune_eval.predict_tiled(Local(), tall, 32, 32, "cpu")
        peaks.append(tracemalloc.get_traced_memory()[1] - tall[..., 0].size)    # but for the mask
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2


def test_flags_that_are_not_used_are_named_and_ignored(data, run, tmp_path, capsys):
    path, _ = score(data, tmp_path, "--run", str(run), "--epochs", "7", "--overlay")
    assert "ignored: --epochs, --overlay" in capsys.readouterr().out
    assert path.name == "transfer.json"


# -------------------------------------------------------------------------------------------------------- prepare_data

def test_folder_is_split_and_repeatable(tmp_path):
    raw = write_folder(tmp_path / "raw", n=13)
    first, second = prepare(raw, tmp_path / "a"), prepare(raw, tmp_path / "b")
    assert all((second / f.name).read_bytes() == f.read_bytes() for f in first.iterdir() if f.name != "meta.json")
    meta = json.loads((first / "meta.json").read_text())
    assert meta["counts"] == dict(train=9, val=1, test=3)       # cut at int(9.1) and int(10.4)
    names = {part: {row["name"] for row in prepare_data.read_names(first, part)} for part in prepare_data.PARTS}
    assert len(set.union(*names.values())) == 13
    for part in prepare_data.PARTS:
        images, masks = prepare_data.open_part(first, part)
        assert images.dtype == masks.dtype == np.uint8 and images.shape == (meta["counts"][part], 32, 32, 3)
        for k, row in enumerate(prepare_data.read_names(first, part)):
            image = np.asarray(Image.open(raw / "images" / f"{row['name']}.png"))
            assert np.array_equal(images[k], cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA))
            mask = np.asarray(Image.open(raw / "masks" / f"{row['name']}.png")) > 127
            assert np.array_equal(masks[k], cv2.resize(mask.astype(np.float32), (32, 32), interpolation=cv2.INTER_AREA) >= .5)
    assert not [f for f in (tmp_path / "a").iterdir() if f.name.startswith(".")]
    refused(lambda: prepare(raw, tmp_path / "a"), first, "--overwrite")
    prepare(raw, tmp_path / "a", "--overwrite", "--seed", "1")
    assert {row["name"] for row in prepare_data.read_names(first, "test")} != names["test"]


def test_groups_labels_and_given_parts(tmp_path):
    raw = write_folder(tmp_path / "raw", n=24)
    (raw / "labels.csv").write_text("name,label\np0_00,sick\np0_01.png,well\n")
    out = prepare(raw, tmp_path / "out", "--group-regex", r"^(p\d+)_")
    rows = {part: prepare_data.read_names(out, part) for part in prepare_data.PARTS}
    groups = [{row["group"] for row in rows[part]} for part in prepare_data.PARTS]
    assert groups[0].isdisjoint(groups[1] | groups[2]) and groups[1].isdisjoint(groups[2])
    labels = {row["name"]: row["label"] for part in rows.values() for row in part}
    assert (labels["p0_00"], labels["p0_01"], labels["p0_02"]) == ("sick", "well", "")
    given = tmp_path / "given"
    for part, n in (("train", 5), ("val", 2), ("test", 3)):
        write_folder(given / part, n=n, masks=part == "test")
    out = prepare(given, tmp_path / "out")
    prepare_data.main(["--dataset", "folder", "--name", "given", "--out", str(tmp_path / "out"), "--check"])   # equal names are usual there
    assert prepare_data.read_meta(out)["counts"] == dict(train=5, val=2, test=3)
    assert prepare_data.open_part(out, "train")[1] is None and prepare_data.open_part(out, "test")[1] is not None


def test_images_without_masks_train_but_cannot_be_scored(tmp_path, run):
    raw = write_folder(tmp_path / "bare", masks=False)
    prepare(raw, tmp_path / "data")
    pretrain.main(["--dataset", "bare", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs"), "--epochs", "1"])
    refused(lambda: score(tmp_path / "data", tmp_path, "--run", str(run), "--dataset", "bare"), "no test masks")


def spot(height, width, bright=True):
    """A picture with one disc on noise, gray uint8 (H, W), and its mask {0, 1}."""
    centre = (int(width * rng.uniform(.3, .7)), int(height * rng.uniform(.3, .7)))
    mask = cv2.circle(np.zeros((height, width), np.uint8), centre, min(height, width) // 5, 1, -1)
    return (rng.normal(100, 8, mask.shape) + mask * (90. if bright else -90.)).clip(0, 255).astype(np.uint8), mask


def test_image_files_as_they_are(tmp_path):
    colour = rng.integers(0, 256, (6, 9, 3), np.uint8)
    gray = colour[..., 0]
    alpha = np.dstack([colour, rng.integers(0, 256, (6, 9), np.uint8)])
    palette = Image.fromarray(gray // 64).convert("P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    lookup = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    wide = (np.linspace(1000, 3000, 54).reshape(6, 9)).astype(np.uint16)
    cases = {"gray.png": (Image.fromarray(gray), np.repeat(gray[..., None], 3, 2)),
             "rgb.bmp": (Image.fromarray(colour), colour),
             "rgb.tif": (Image.fromarray(colour), colour),
             "rgb.webp": (Image.fromarray(colour), colour),
             "rgba.png": (Image.fromarray(alpha), colour),
             "palette.png": (palette, lookup[gray // 64]),
             "bit.png": (Image.fromarray(gray > 99), np.repeat((gray > 99)[..., None] * 255, 3, 2))}
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name, **(dict(lossless=True) if name.endswith("webp") else {}))
        assert np.array_equal(prepare_data.read_image(tmp_path / name), expected), name
    for name, image in (("16.png", wide), ("16.tif", wide), ("f.tif", wide.astype(np.float32))):
        Image.fromarray(image).save(tmp_path / name)
        low, high = np.percentile(wide, (.1, 99.9))
        expected = ((wide - low) / (high - low) * 255).round().clip(0, 255)
        assert np.array_equal(prepare_data.read_image(tmp_path / name)[..., 1], expected), name
    cv2.imwrite(str(tmp_path / "deep.png"), np.dstack([wide, wide // 2, wide]))         # 16-bit colour
    assert len(np.unique(prepare_data.read_image(tmp_path / "deep.png"))) > 40
    for name, how in (("lzw.tif", dict(compression="tiff_lzw")), ("deflate.tif", dict(compression="tiff_deflate")),
                      ("big.tif", dict(big_tiff=True)), ("pages.tif", dict(save_all=True, append_images=[Image.fromarray(255 - colour)])),
                      ("1 x 1, ünïcode.png", {})):
        picture = colour[:1, :1] if name.startswith("1") else colour
        Image.fromarray(picture).save(tmp_path / name, **how)
        assert np.array_equal(prepare_data.read_image(tmp_path / name), picture), name
    assert np.array_equal(prepare_data.read_image(tmp_path / "pages.tif", page=1), 255 - colour)
    deep = [np.dstack([wide, wide, wide]), np.dstack([wide, wide, wide])[::-1]]
    cv2.imwritemulti(str(tmp_path / "deep.tif"), deep)
    assert np.array_equal(prepare_data.read_image(tmp_path / "deep.tif", page=1), prepare_data.read_image(tmp_path / "deep.tif")[::-1])
    with pytest.raises(ValueError, match="no page 2"):
        prepare_data.read_image(tmp_path / "pages.tif", page=2)
    Image.fromarray(np.full((8, 8, 3), (200, 100, 50), np.uint8)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(prepare_data.read_image(tmp_path / "cmyk.jpg").astype(int) - (200, 100, 50)).max() <= 3
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="bomb"):
        prepare_data.read_image(tmp_path / "bomb.png")


def stored(picture, orientation):
    """The rows and columns of a file whose EXIF orientation makes a viewer show `picture` (EXIF 2.32, section 4.6.4)."""
    return {1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1], 5: picture.swapaxes(0, 1),
            6: np.rot90(picture), 7: picture[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(picture, -1)}[orientation]


def with_exif(path, orientation):
    """Put an eXIf chunk into a PNG (Pillow writes no 16-bit colour, OpenCV no EXIF)."""
    exif = Image.Exif()
    exif[274] = orientation
    body, data = b"eXIf" + exif.tobytes()[6:], path.read_bytes()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:33] + chunk + data[33:])             # after IHDR


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_undone(orientation, tmp_path):
    smooth = cv2.resize(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8), (40, 28), interpolation=cv2.INTER_CUBIC)
    exif = Image.Exif()
    exif[274] = orientation
    for k, picture in enumerate((smooth, smooth[..., 1], smooth.astype(np.uint16) * 200, smooth[..., 1].astype(np.uint16) * 200)):
        turned, wide = np.ascontiguousarray(stored(picture, orientation)), picture.dtype == np.uint16
        expected = prepare_data.to_rgb(prepare_data.Picture(picture))
        viewed = Image.fromarray(turned if not wide else (turned // 200).astype(np.uint8))
        viewed.getexif()[274] = orientation
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(viewed)), picture // 200 if wide else picture)
        tag = [(274, "H", 1, orientation, True)]
        tifffile.imwrite(tmp_path / f"{k}.tif", turned, photometric="rgb" if picture.ndim == 3 else None, extratags=tag, metadata=None)
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / f"{k}.png")
        cv2.imwrite(str(tmp_path / f"{k}.png"), turned[..., ::-1] if picture.ndim == 3 else turned)
        with_exif(tmp_path / f"{k}.png", orientation)
        if not wide:
            Image.fromarray(turned).save(tmp_path / f"{k}.jpg", exif=exif, quality=98, subsampling=0)
            Image.fromarray(turned).save(tmp_path / f"{k}.webp", exif=exif, lossless=True)
        for path in tmp_path.glob(f"{k}.*"):
            apart = np.abs(prepare_data.read_image(path).astype(int) - expected)
            assert apart.max() <= (12 if path.suffix == ".jpg" else 0), path


TIFFS = [(dtype, {}) for dtype in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")] + [
    ("u2", dict(byteorder=">")), ("i2", dict(byteorder=">", compression="zlib")), ("f4", dict(byteorder=">", compression="lzma")),
    ("u2", dict(compression="zlib", predictor=True)), ("f8", dict(bigtiff=True)),
    ("u1", dict(tile=(16, 16))), ("u4", dict(tile=(16, 16), byteorder=">")), ("u2", dict(rowsperstrip=3, compression="lzma"))]


@pytest.mark.parametrize("dtype, how", TIFFS, ids=str)
@pytest.mark.parametrize("form", ["gray", "white is zero", "rgb", "planes", "three grays", "two", "alpha", "five", "stack"])
def test_tiffs_are_read_rightly_or_refused_by_kind(dtype, how, form, tmp_path, monkeypatch):
    gray = spot(48, 64)[0].astype(float) // 2
    gray = (gray * (100 if dtype[1] in "248" and dtype != "f2" else 1)).astype(dtype)
    colour = np.dstack([gray, gray // 2, gray[::-1]])
    expected = prepare_data.to_rgb(prepare_data.Picture(colour if form in ("rgb", "planes", "three grays") else gray))
    white = np.iinfo(dtype).max - gray if dtype[0] == "u" else -1 - gray if dtype[0] == "i" else 99 - gray
    page, array, more = 0, gray, dict(photometric="minisblack")
    if form == "white is zero":
        array, more = white.astype(dtype), dict(photometric="miniswhite")
    elif form in ("rgb", "three grays"):
        array, more = colour, dict(photometric="rgb" if form == "rgb" else "minisblack", planarconfig="contig")
    elif form == "planes":
        array, more = np.moveaxis(colour, -1, 0).copy(), dict(photometric="rgb", planarconfig="separate")
    elif form in ("two", "alpha", "five"):
        array = np.dstack([gray] * (5 if form == "five" else 2))
        more |= dict(planarconfig="contig", extrasamples=["unassalpha"] if form == "alpha" else None)
    elif form == "stack":
        page, array, more = 1, np.stack([gray[::-1], gray]), more | dict(imagej=dtype in ("u1", "u2") and not how)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, metadata=None, **how, **more)
    if form in ("two", "five"):
        with pytest.raises(ValueError, match="2 channels" if form == "two" else "5 channels"):
            prepare_data.read_image(path)
        return
    picture = prepare_data.read_picture(path, page)
    assert picture.pages == 1 + page and np.abs(prepare_data.to_rgb(picture).astype(int) - expected).max() <= (form == "white is zero")
    monkeypatch.setitem(sys.modules, "tifffile", None)          # as if it were not installed: right, or its kind is named
    try:
        assert np.array_equal(prepare_data.read_image(path, page), prepare_data.to_rgb(picture))
    except ValueError as error:
        assert re.search(f"{np.dtype(dtype).name}.*pip install tifffile", str(error))


def test_dicoms_are_shown_as_a_viewer_shows_them(tmp_path, monkeypatch):
    def path(name):
        return Path(pydicom.data.get_testdata_file(name))

    ds = pydicom.dcmread(path("MR_small.dcm"))
    centre, width = float(ds.WindowCenter), float(ds.WindowWidth)
    window = ((ds.pixel_array.astype(float) - (centre - .5)) / (width - 1) + .5) * 255      # PS3.3, C.11.2.1.2.1
    for name in ("MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm"):
        assert np.abs(prepare_data.read_image(path(name))[..., 0] - window.clip(0, 255)).max() <= .5 + 1e-6
    for value, slope, enhanced in (("MONOCHROME1", 2, False), ("MONOCHROME2", 3, True), ("MONOCHROME2", -1, False)):
        item, group = pydicom.Dataset(), pydicom.Dataset()
        item.RescaleSlope, item.RescaleIntercept, item.WindowCenter, item.WindowWidth = slope, -100, centre * slope - 100, width * abs(slope)
        group.PixelValueTransformationSequence = group.FrameVOILUTSequence = [item]
        ds.PhotometricInterpretation = value
        ds.SharedFunctionalGroupsSequence = [group] if enhanced else []
        ds.update(pydicom.Dataset() if enhanced else item)
        ds.save_as(tmp_path / "plain")                          # no suffix
        values = ds.pixel_array.astype(float) * slope - 100
        window = (((values - (float(item.WindowCenter) - .5)) / (float(item.WindowWidth) - 1) + .5) * 255).clip(0, 255)
        expected = 255 - window if value == "MONOCHROME1" else window
        assert np.abs(prepare_data.read_image(tmp_path / "plain")[..., 0] - expected).max() <= .5 + 1e-6, (value, slope)
    ds.WindowCenter = ds.WindowWidth = None
    del ds.RescaleSlope, ds.RescaleIntercept
    ds.save_as(tmp_path / "plain")                              # an empty window is none
    assert np.array_equal(prepare_data.read_image(tmp_path / "plain")[..., 0], prepare_data.to_eight_bits(ds.pixel_array))
    frames = pydicom.dcmread(path("SC_rgb_rle_2frame.dcm")).pixel_array
    for k in (0, 1):
        assert np.array_equal(prepare_data.read_image(path("SC_rgb_rle_2frame.dcm"), k), frames[k])
    palette = prepare_data.read_image(path("examples_palette.dcm"))
    assert palette.shape == (350, 800, 3) and (palette[..., 0] != palette[..., 2]).any()
    for name, words in (("rtplan.dcm", "not a DICOM file with an image"), ("SC_rgb_rle_2frame.dcm", "no page 9")):
        with pytest.raises(ValueError, match=words):
            prepare_data.read_image(path(name), 9)
    raw = tmp_path / "raw"
    raw.mkdir()
    for k in range(12):                                         # of one patient in several studies
        ds.PatientID, ds.PixelData = f"Mustermann{k // 3}", np.roll(ds.pixel_array, k + 1).tobytes()
        (raw / f"study{k // 2}").mkdir(exist_ok=True)
        ds.save_as(raw / f"study{k // 2}/{k}.dcm")
    out = prepare(raw, tmp_path / "out")
    groups = [{row["group"] for row in prepare_data.read_names(out, part)} for part in prepare_data.PARTS]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 4
    assert not [file for file in out.iterdir() if b"Mustermann" in file.read_bytes()]
    out = prepare(raw, tmp_path / "out", "--overwrite", "--group-regex", "[0-9]+$")           # the regex counts, not the id
    assert {row["group"] for part in prepare_data.PARTS for row in prepare_data.read_names(out, part)} == {str(k) for k in range(12)}
    assert prepare_data.read_meta(out)["counts"] == dict(train=8, val=1, test=3)
    for k in range(12):                                         # some without an id: folder and id are kept together
        Image.fromarray(spot(32, 32)[0]).save(raw / f"study{k // 2}/p{k}.png")
    out = prepare(raw, tmp_path / "out", "--overwrite")
    part_of = {row["name"].split("/")[0]: part for part in prepare_data.PARTS for row in prepare_data.read_names(out, part)}
    assert all(part_of[row["name"].split("/")[0]] == part for part in prepare_data.PARTS for row in prepare_data.read_names(out, part))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match="pip install pydicom"):
        prepare_data.read_image(path("MR_small.dcm"))


# ---------------------------------------------------------------------------------------------------------------- masks

disc = cv2.circle(np.zeros((48, 64), np.uint8), (30, 22), 12, 1, -1)
halves = np.where(np.arange(48)[:, None] < 20, disc, disc * 3)  # two classes, 1 above 3
MASKS = {                                                       # {case: (the files' values, what is foreground)}
    "bool, 0/1, 0/255, 0/65535, floats": ([disc > 0, disc, disc * 255, disc.astype(np.uint16) * 65535, disc.astype(np.float32)], disc),
    "float classes": ([halves.astype(np.float32), disc.astype(np.float64)], disc),
    "probabilities": ([cv2.GaussianBlur(disc.astype(np.float32), (0, 0), 2)], cv2.GaussianBlur(disc.astype(np.float32), (0, 0), 2) > .5),
    "gray classes": ([(halves * 85).astype(np.uint8)], disc), "class colours": ([np.dstack([halves * 40, halves * 0, halves * 80])], disc),
    "classes, some files with one": ([halves, disc, disc], disc),
    "classes and an ignored border": ([np.where(cv2.dilate(disc, np.ones((9, 9))) > disc, 255, disc), disc], disc),
    "instances past 2 ** 31": ([halves.astype(np.uint32) * (2 ** 31 + 5), disc.astype(np.int32) * 70000], disc),
    "many instances": ([np.arange(256).reshape(16, 16).repeat(3, 0).repeat(4, 1).astype(np.uint16)],
                       np.arange(256).reshape(16, 16).repeat(3, 0).repeat(4, 1) > 0),
    "tiny instances": ([np.kron(np.arange(1, 193).reshape(12, 16), [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])],
                       np.kron(np.ones((12, 16)), [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])),
    "alpha, and one without an object": ([np.dstack([disc * 0 + 255] * 3 + [disc * a]) for a in (255, 0)], disc),
    "soft edges": ([cv2.resize(disc * 255, (23, 19), interpolation=cv2.INTER_AREA), disc * 255],
                   cv2.resize(disc * 255, (23, 19), interpolation=cv2.INTER_AREA) > 127.5),
    "weak two values beside soft edges": ([cv2.GaussianBlur(disc * 255, (0, 0), 1), disc * 100, disc * np.float32(.4)], disc),
    "alpha alone": ([np.dstack([disc * 0] * 3 + [disc * 255])], disc),
    "ignored or foreground?": ([halves, disc * 255], ("class", "0/255")),
    "void alone?": ([np.where(disc > 0, 255, 0), np.where(cv2.dilate(disc, np.ones((9, 9))) > disc, 255, disc)], ("classes and 255", "0/255")),
    "soft or classes?": ([cv2.GaussianBlur(disc * 255, (0, 0), 2), halves], ("soft edges", "classes")),
    "values below 0": ([disc.astype(np.int32) - 1], ("below 0", "--mask-foreground"))}


@pytest.mark.parametrize("case", MASKS)
def test_masks_mean_what_each_file_means(case, tmp_path, capsys):
    files, expected = MASKS[case]
    paths = [str(tmp_path / f"{k}.{'tif' if values.dtype.kind == 'f' or values.dtype.itemsize > 2 else 'png'}")
             for k, values in enumerate(files)]
    for path, values in zip(paths, files):
        if path.endswith("tif"):
            tifffile.imwrite(path, values)
        else:
            Image.fromarray(values if values.dtype in (bool, np.uint16) else values.astype(np.uint8)).save(path)
    masks = [prepare_data.read_mask(path) for path in paths]
    if isinstance(expected, tuple):
        with pytest.raises(ValueError) as refusal:
            [prepare_data.foreground_of(mask, prepare_data.decide_mask_rule("auto", masks)) for mask in masks]
        assert all(word in str(refusal.value) for word in expected)
        return
    rule = prepare_data.decide_mask_rule("auto", masks)
    for mask in masks:
        if mask.values.shape == expected.shape and mask.top and not (case.startswith("weak") and mask.kind == "soft edges"):
            assert np.array_equal(prepare_data.foreground_of(mask, rule), expected > 0), (rule, mask.kind)
    assert masks[0].is_alpha == ("alpha" in case) and (rule.ignored == 255) == ("ignored" in rule.evidence or "ignore" in rule.evidence)


def test_mask_foreground_by_flag(tmp_path, capsys):
    raw = write_folder(tmp_path / "raw")
    for path in (raw / "masks").iterdir():
        values = np.asarray(Image.open(path)) // 255 * 200
        values[:3] = 7
        Image.fromarray(values).save(path)
    share = {}
    for asked in ("nonzero", "half", "zero", "7", "7,200"):
        out = prepare(raw, tmp_path / "out", "--overwrite", "--mask-foreground", asked)
        assert prepare_data.read_meta(out)["mask_foreground"]
        share[asked] = prepare_data.read_meta(out)["mask_share"]
    assert share["nonzero"] == share["7,200"] == pytest.approx(share["7"] + share["half"]) and share["zero"] == pytest.approx(1 - share["nonzero"])
    assert "inverted? --mask-foreground zero" in capsys.readouterr().out
    refused(lambda: prepare(raw, tmp_path / "out", "--mask-foreground", "most"), "--mask-foreground most")
    for path in list((raw / "masks").iterdir()):
        levels = np.array(Image.open(path))
        levels[:12] = 80
        Image.fromarray(levels).save(path.with_suffix(".jpg"))
        path.unlink()
    refused(lambda: prepare(raw, tmp_path / "new"), "levels", ".jpg")


# -------------------------------------------------------------------------------------------------- folders and names

PATIENTS = [f"p{k % 6}" for k in range(12)]
LAYOUTS = {                                                     # {case: (image, mask) of the k-th pair}
    **{f"images beside {name}": ("images/{k}.png", name + "/{k}.png") for name in ("masks", "mask", "labels", "gt", "annotations")},
    **{f"NAME{end} beside": ("{k}.tif", "{k}" + end + ".png") for end in ("_mask", "_masks", "_seg", "_segmentation", "-label")},
    "NAME_mask below": ("images/{k}.png", "images/masks/{k}_mask.png"), "other suffix": ("images/{k}.JPG", "masks/{k}_GT.png"),
    "nnU-Net": ("imagesTr/{k}_0000.png", "labelsTr/{k}.png"), "patients": ("{p}/{k}.png", "{p}/{k}_mask.png"),
    "patients, deep": ("all/{p}/visit/{k}.png", "all/{p}/visit/masks/{k}.png"), "patients below images": ("images/{p}/{k}.png", "masks/{p}/{k}.png"),
    "parts": ("{t}/images/{k}.png", "{t}/masks/{k}.png"), "parts below": ("images/{t}/{k}.png", "labels/{t}/{k}.png"),
    "parts by other names": ("set/{T}/{k}.png", "set/{T}/{k}_gt.png"), "unknown folder": ("CXR_png/{k}.png", "mask/{k}_mask.png"),
    "none": ("{k}.png", None), "names": ("images/ä, b.{k} .png", "masks/ä, b.{k} .png")}


@pytest.mark.parametrize("case", LAYOUTS)
def test_folders_as_people_have_them(case, tmp_path, capsys):
    raw, expected, layout = tmp_path / "raw", {}, LAYOUTS[case]
    for k, patient in enumerate(PATIENTS):
        where = dict(k=f"s{k:02d}", p=patient, t=prepare_data.PARTS[k // 4], T=("Training", "valid", "Test")[k // 4])
        gray, mask = spot(32, 32)
        for pattern, picture in zip(layout, (gray, mask * 255)):
            if pattern:
                name = unicodedata.normalize("NFD" if picture is gray else "NFC", pattern.format(**where))
                (raw / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(raw / name, **(dict(quality=100) if name.endswith("JPG") else {}))
        expected[where["k"]] = gray, mask, patient, where["t"]
    out, found = prepare(raw, tmp_path / "out"), {}
    for part in prepare_data.PARTS:
        images, masks = prepare_data.open_part(out, part)
        for k, row in enumerate(prepare_data.read_names(out, part)):
            gray, mask, patient, given = expected[re.search(r"s\d\d", row["name"])[0]]
            assert np.abs(images[k][..., 0].astype(int) - gray).max() <= (4 if case == "other suffix" else 0)
            assert masks is None if case == "none" else np.array_equal(masks[k], mask)
            assert row["group"] == (patient if "patients" in case else "") and ("parts" not in case or part == given)
            assert found.setdefault(row["group"] or row["name"], part) == part
    assert case == "none" or "masks of 12 images" in capsys.readouterr().out


def test_several_masks_of_one_image_are_joined(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for k in range(12):
        Image.fromarray(spot(32, 32)[0]).save(raw / f"benign ({k}).png")
        for part, name in ((slice(0, 9), "_mask"), (slice(20, 30), "_mask_1")):
            mask = np.zeros((32, 32), np.uint8)
            mask[part] = 255
            Image.fromarray(mask).save(raw / f"benign ({k}){name}.png")
    masks = prepare_data.open_part(prepare(raw, tmp_path / "out"), "train")[1]
    assert masks[0].sum() == 32 * 19


def test_two_readings_end_in_one_line(tmp_path, capsys):
    def start():
        shutil.rmtree(tmp_path, ignore_errors=True)
        return write_folder(tmp_path / "raw")

    raw = start()
    shutil.copytree(raw / "masks", raw / "labels")
    refused(lambda: prepare(raw, tmp_path / "out"), "has two masks", raw / "labels", raw / "masks")
    raw = start()
    for k, path in enumerate(sorted((raw / "masks").iterdir())):
        path.rename(raw / "masks" / f"other{k}.png")
    refused(lambda: prepare(raw, tmp_path / "out"), "no mask has the name of an image")
    raw = start()
    for path in sorted((raw / "masks").iterdir())[:3]:
        path.rename(raw / "images" / f"seg_{path.name}")
    refused(lambda: prepare(raw, tmp_path / "out"), "seg_p0_00.png", "by its name a mask")
    raw = start()
    for path in (raw / "images").iterdir():
        (raw / path.stem).mkdir()
        path.rename(raw / path.stem / "image.png"), (raw / "masks" / path.name).rename(raw / path.stem / "mask.png")
    (raw / "images").rmdir(), (raw / "masks").rmdir()
    refused(lambda: prepare(raw, tmp_path / "out"), "mask.png: by its name a mask")
    raw = start()
    for k, path in enumerate([*(raw / "images").iterdir(), *(raw / "images").iterdir(), *(raw / "images").iterdir()]):
        (raw / f"class{k % 2}").mkdir(exist_ok=True)
        shutil.copy(path, raw / f"class{k % 2}/{k}.png")
    shutil.rmtree(raw / "images"), shutil.rmtree(raw / "masks")
    refused(lambda: prepare(raw, tmp_path / "out"), "class0, class1", "'^([^/]+)/'", "'.+'")
    raw = start()
    for path in list((raw / "masks").iterdir()):
        Image.open(path).save(path.with_suffix(".gif")), path.unlink()
    refused(lambda: prepare(raw, tmp_path / "out"), raw / "masks", "not read")
    assert "12 .gif" in capsys.readouterr().out
    raw = start()
    (raw / "mask").mkdir()
    for path in sorted((raw / "masks").iterdir())[:2]:
        shutil.copy(path, raw / "mask" / f"view_{path.name}")
    refused(lambda: prepare(raw, tmp_path / "out"), raw / "mask", "of no image", raw / "masks")
    raw = start()
    for path in (raw / "masks").iterdir():
        path.rename(raw / "images" / f"{path.stem}_xyz.png")
    refused(lambda: prepare(raw, tmp_path / "out"), "NAME_xyz", "NAME_mask")
    raw = start()
    (raw / "labels.csv").write_text("name,label\nS00.PNG,1\n")
    refused(lambda: prepare(raw, tmp_path / "out"), "labels.csv", "S00.PNG", "p0_00")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_out_silently(tmp_path, capsys):
    raw = write_folder(tmp_path / "raw")
    for name in ("notes.txt", "old.tif", "images/a.nii.gz", "masks/extra.png"):
        (raw / name).write_bytes((raw / "masks/p0_00.png").read_bytes())
    (raw / "loop").symlink_to(raw), (raw / "images/again").symlink_to(raw)
    prepare_data.main(["--dataset", "demo", "--size", "16", "--out", str(raw / "images")])
    (raw / "labels.csv").write_text("name,label\np0_00,a\nnobody,b\n")
    prepare(raw, tmp_path / "out")
    out = capsys.readouterr().out
    for words in ("beside images, masks not taken: loop, notes.txt, old.tif", "1 .nii.gz (volumes: cut them into slices", "1 masks have no image", "extra.png",
                  "11 of 12 images have no label", "nobody", "images/demo: a prepared data set, not taken"):
        assert words in out, (words, out)
    stack = tmp_path / "stack"
    stack.mkdir()
    for k in range(10):
        pages = [Image.fromarray(spot(32, 32)[0]) for _ in range(3)]
        pages[0].save(stack / f"{k}.tif", save_all=True, append_images=pages[1:])
        pages[1].save(stack / f"{k}_mask.tif", save_all=True, append_images=pages[:1])
        Image.fromarray(np.asarray(pages[2]) // 200 * 255).save(stack / f"{k}_mask.tif")
    one, other = [prepare(stack, tmp_path / name, "--page", page) for name, page in (("a", "0"), ("b", "2"))]
    assert "10 files have several pages" in capsys.readouterr().out
    assert (prepare_data.open_part(one, "train")[0] != prepare_data.open_part(other, "train")[0]).any()


@pytest.mark.parametrize("data", [
    "name;label\nPräparat 1;gut\n".encode("cp1252"), "name\tlabel\nPräparat 1\tgut\n".encode("utf-16"),
    " Name ;label\n".encode() + "x;y\n".encode(), "\ufeffname,label\nPräparat 1,gut\n".encode()])
def test_labels_as_spreadsheets_write_them(data, tmp_path):
    (tmp_path / "labels.csv").write_bytes(data)
    if b"Name" in data:
        refused(lambda: prepare_data.read_table(tmp_path / "labels.csv", ("name", "label")), "labels.csv", "Name")
    else:
        assert prepare_data.read_table(tmp_path / "labels.csv", ("name", "label")) == [dict(name="Präparat 1", label="gut")]


def test_the_same_picture_is_never_in_two_parts(tmp_path, capsys):
    raw = write_folder(tmp_path / "raw", n=30)
    for k, path in enumerate(sorted((raw / "images").iterdir())[:12]):
        for kind in ("images", "masks"):
            shutil.copy(raw / kind / path.name, raw / kind / f"again{k}.png")
    for seed in range(3):
        prepare(raw, tmp_path / "out", "--seed", str(seed), "--overwrite")
        prepare_data.main(["--dataset", "folder", "--name", "raw", "--out", str(tmp_path / "out"), "--check"])
    assert "12 pictures are there twice" in capsys.readouterr().out
    pairs = [prepare_data.Pair(f"{label}{k:03d}", "", label=label, digest=f"{k if k % 10 == 0 else (label, k)}")
             for label in "ab" for k in range(100)]
    prepare_data.stratify(pairs, 0)
    parts = {}
    assert [sum(p.part == part for p in pairs) for part in prepare_data.PARTS] == [139, 21, 40]
    assert all(parts.setdefault(pair.digest, pair.part) == pair.part for pair in pairs)


def test_thin_and_empty_masks(tmp_path, capsys):
    raw = write_folder(tmp_path / "raw", size=64)
    for i, path in enumerate(sorted((raw / "masks").iterdir())):
        line = np.zeros((64, 64), np.uint8)
        line[:, 20:22] = 255 * (i % 4 > 0)
        Image.fromarray(line).save(path)
    out = prepare(raw, tmp_path / "out")
    parts = np.concatenate([prepare_data.open_part(out, part)[1] for part in prepare_data.PARTS])
    assert {tuple(np.flatnonzero(mask.any(axis=0))) for mask in parts} == {(), (10,)}
    assert "masks are empty" in capsys.readouterr().out
    assert sum(prepare_data.read_meta(out)["empty_masks"].values()) == 3


def test_foreground_auto_tells_bright_from_dark(tmp_path):
    images, _ = prepare_data.draw_nuclei(64, np.random.default_rng(1))
    for name, turn in (("bright", lambda image: image), ("dark", lambda image: 255 - image)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(12):
            Image.fromarray(turn(prepare_data.draw_nuclei(64, np.random.default_rng(i))[0])).save(folder / f"{i}.png")
        out = prepare(folder, tmp_path / "out")
        assert prepare_data.read_meta(out)["foreground"] == name
        assert "images agree" in prepare_data.read_meta(out)["foreground_evidence"]


def test_every_bad_file_is_found_in_one_pass(tmp_path, capsys):
    raw = write_folder(tmp_path / "raw")
    images, masks = sorted((raw / "images").iterdir()), raw / "masks"
    images[0].write_bytes(b"")
    images[1].write_bytes(images[1].read_bytes()[:-500])
    images[2].write_text("not an image")
    (masks / images[3].name).unlink()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(masks / images[4].name)
    Image.open(images[5]).save(images[5].with_suffix(".bmp"))
    (raw / "images/._x.png").write_text("hidden"), (raw / "images/Thumbs.db").write_text("hidden")
    refused(lambda: prepare(raw, tmp_path / "out"), "6 bad file(s)", "--skip-bad")
    lines = capsys.readouterr().err
    for path, reason in ((images[0], "empty"), (images[1], "cannot be read"), (images[2], "not an image"),
                         (images[3], "no mask"), (masks / images[4].name, "9x9"), (images[5], "twice")):
        assert re.search(rf"^{re.escape(str(path))}: .*{reason}", lines, re.MULTILINE), (path, lines)
    assert not (tmp_path / "out").exists()
    out = prepare(raw, tmp_path / "out", "--skip-bad")
    meta = prepare_data.read_meta(out)
    assert sum(meta["counts"].values()) == 12 - 5 and len(meta["skipped"]) == 6
    out = prepare(raw, tmp_path / "out", "--skip-bad", "--overwrite", "--group-regex", "^(p[1-9])")
    (raw / "labels.csv").write_text("name,label\np0_00,a\n")
    refused(lambda: prepare(raw, tmp_path / "none", "--skip-bad", "--group-regex", "^x"), "0 usable images")
    assert sum(prepare_data.read_meta(out)["counts"].values()) == 12 - 5 and "p0_01" not in "".join(f.read_text() for f in out.glob("*.csv"))


# ----------------------------------------------------------------------------------------------------- published data

def miniature(dataset, raw):
    """Some files of a published data set, in its layout (design section 6); {name: true foreground share}."""
    share = {}

    def save(path, picture, **how):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, **how)

    if dataset == "isic":
        for part, n in (("Training", 6), ("Validation", 2), ("Test_v2", 3)):
            labels = "image_id,melanoma,seborrheic_keratosis\n"
            for i in range(n):
                (gray, mask), name = spot(76, 102, False), f"ISIC_{len(part):03d}{i:04d}"
                save(raw / f"ISIC-2017_{part}_Data/{name}.jpg", np.dstack([gray] * 3), quality=95)
                save(raw / f"ISIC-2017_{part}_Data/{name}_superpixels.png", gray)
                save(raw / f"ISIC-2017_{part}_Part1_GroundTruth/{name}_segmentation.png", mask * 255)
                labels += f"{name},{float(i == 0)},{float(i == 1)}\n"
                share[name] = mask.mean()
            (raw / f"ISIC-2017_{part}_Part3_GroundTruth.csv").write_text(labels)
    elif dataset == "xray":
        for label, n in (("COVID", 5), ("Lung_Opacity", 7), ("Normal", 12), ("Viral Pneumonia", 2)):
            for i in range(1, n + 1):
                gray, mask = spot(299, 299, False)
                save(raw / f"COVID-19_Radiography_Dataset/{label}/images/{label}-{i}.png", gray)
                save(raw / f"COVID-19_Radiography_Dataset/{label}/masks/{label}-{i}.png",
                     np.dstack([cv2.resize(mask * 255, (256, 256))] * 3))
                share[f"{label}-{i}"] = mask.mean()
    elif dataset == "drone":
        for i in range(10):
            gray, mask = spot(200, 300)
            save(raw / f"original_images/{i:03d}.jpg", np.dstack([gray] * 3), quality=95)
            save(raw / f"label_images_semantic/{i:03d}.png", mask * np.uint8(i + 1))
            share[f"{i:03d}"] = mask.mean()
    elif dataset == "dsb2018":
        for i in range(10):
            gray, mask = spot(64, 80)
            save(raw / f"stage1_train/id{i}/images/id{i}.png", np.dstack([gray, gray, gray, gray * 0 + 255]))
            for k, half in enumerate((slice(None, 32), slice(32, None))):
                part = np.zeros_like(mask)
                part[half] = mask[half] * 255
                save(raw / f"stage1_train/id{i}/masks/{i}{k}.png", part)
            share[f"id{i}"] = mask.mean()
    elif dataset == "dm":
        for i in range(10):
            (gray, mask), name = spot(1408, 1876), f"1219{i % 4:02d}_Myo{i % 4}_[{i},7]_component"
            pages = [Image.fromarray(page.astype(np.float32) * 9) for page in (gray, 255 - gray)]
            (raw / "CD27_Panel_Component").mkdir(parents=True, exist_ok=True)
            pages[0].save(raw / f"CD27_Panel_Component/{name}_data.tif", save_all=True, append_images=pages[1:])
            save(raw / f"Labels/{name}_mask_labels.tiff", mask.astype(np.uint16) * 7)
            share[name.removesuffix("_component")] = mask.mean()
    else:
        for part, n, size in (("train", 6, 64), ("val", 2, 32), ("test", 3, 32)):
            pairs = [spot(size, size) for _ in range(n)]
            x, y = np.zeros((n, size, size, 2), np.float32), np.zeros((n, size, size, 2), np.int32)
            for i, (gray, mask) in enumerate(pairs):
                x[i, ..., 0], x[i, ..., 1], y[i, ..., 0], y[i, ..., 1] = gray, gray // 2, mask * (i + 300.), 1 - mask
                share[f"{part}_{i:05d}"] = mask.mean()
            raw.mkdir(exist_ok=True)
            np.savez_compressed(raw / f"tissuenet_v1.1_{part}.npz", X=x, y=y)
    return share


def prepare_published(dataset, raw, out, *flags):
    prepare_data.main(["--dataset", dataset, "--raw", str(raw), "--size", "32", "--out", str(out), *flags])
    return out / dataset


@pytest.mark.parametrize("dataset, counts", [("isic", (6, 2, 3)), ("tissuenet", (6, 2, 3)), ("xray", (17, 3, 6)),
                                             ("drone", (7, 1, 2)), ("dsb2018", (7, 1, 2)), ("dm", (84, 12, 24))])
def test_published_layouts_become_right_arrays(dataset, counts, tmp_path, capsys):
    share = miniature(dataset, tmp_path / "raw")
    out = prepare_published(dataset, tmp_path / "raw", tmp_path / "out")
    said, meta = capsys.readouterr().out, prepare_data.read_meta(out)
    assert tuple(meta["counts"].values()) == counts and "not the published ones" in said and meta["licence"] and meta["page"]
    assert meta["foreground"] == ("dark" if dataset in ("isic", "xray") else "bright")
    found = {}
    for part in prepare_data.PARTS:
        images, masks = prepare_data.open_part(out, part)
        for k, row in enumerate(prepare_data.read_names(out, part)):
            name = row["group"] if dataset == "dm" else row["name"]
            found[name] = found.get(name, 0) + masks[k].mean() * (480 * 480 / (1408 * 1876) if dataset == "dm" else 1)
            gray = cv2.cvtColor(images[k], cv2.COLOR_RGB2GRAY).astype(float)
            if masks[k].mean() > .05:                           # the picture and its mask belong together
                assert (gray[masks[k] == 1].mean() > gray[masks[k] == 0].mean()) == (meta["foreground"] == "bright")
            assert row["label"] == (re.sub(r"-\d+$", "", name) if dataset == "xray" else
                                    ["melanoma", "seborrheic_keratosis", "nevus"][min(int(name[-4:]), 2)] if dataset == "isic" else "")
    assert found == pytest.approx(share, abs=.02)
    prepare_data.main(["--dataset", dataset, "--out", str(tmp_path / "out"), "--check"])
    if dataset == "dm":
        assert all(list(r["group"] for r in prepare_data.read_names(out, part)).count(name) == 12 for part in prepare_data.PARTS
                   for name in {r["group"] for r in prepare_data.read_names(out, part)})
        first = np.array(prepare_data.open_part(out, "test")[0])
        prepare_published(dataset, tmp_path / "raw", tmp_path / "out", "--page", "1", "--split-by", "patient", "--overwrite")
        parts = [{r["group"] for r in prepare_data.read_names(out, part)} for part in prepare_data.PARTS]
        assert sum(map(len, parts)) == len(set.union(*parts)) == 4 and all(re.fullmatch(r"\d+_Myo\d", g) for g in set.union(*parts))
        assert prepare_data.open_part(out, "test")[0][:2].mean() > 128 > first[:2].mean()       # the other stain
    if dataset == "drone":                                      # the same by the published colours
        for path in (tmp_path / "raw/label_images_semantic").iterdir():
            colours = np.asarray(Image.open(path))[..., None] * np.array([[[5, 0, 11]]], np.uint8)
            (tmp_path / "raw/RGB_color_image_masks").mkdir(exist_ok=True)
            Image.fromarray(colours).save(tmp_path / "raw/RGB_color_image_masks" / path.name)
        shutil.rmtree(tmp_path / "raw/label_images_semantic")
        prepare_published(dataset, tmp_path / "raw", tmp_path / "out", "--overwrite")
        assert prepare_data.read_meta(out)["fingerprint"] == meta["fingerprint"]


@pytest.mark.parametrize("dataset", ["dm", "drone", "dsb2018", "xray", "isic"])
def test_published_layouts_by_their_other_names(dataset, tmp_path, capsys):
    raw, given = tmp_path / "raw", tmp_path / "raw"
    miniature(dataset, raw)
    if dataset == "dsb2018":
        raw = given = raw.rename(tmp_path / "stage1")
    expected = prepare_data.read_meta(prepare_published(dataset, raw, tmp_path / "out"))["fingerprint"]
    if dataset == "dm":                                         # as the authors' notebook has them
        (raw / "Labels/CD27 cell labels/Mask Labels").mkdir(parents=True)
        for path in list((raw / "Labels").glob("*.tiff")):
            path.rename(raw / "Labels/CD27 cell labels/Mask Labels" / path.name.replace("mask_labels.tiff", "data.tifMask.tif"))
        (raw / "CD27_Panel_Component").rename(raw / "CD27 Panel-- Component")
        given = raw / "CD27 Panel-- Component"
    elif dataset == "drone":                                    # as its own page has it
        (raw / "training_set/gt/semantic").mkdir(parents=True)
        (raw / "original_images").rename(raw / "training_set/images")
        (raw / "label_images_semantic").rename(raw / "training_set/gt/semantic/label_images")
    elif dataset == "dsb2018":                                  # something else lies beside it
        write_folder(raw)
        write_folder(raw / "stage1_train/two", n=2)
    elif dataset == "xray":
        given = raw / "COVID-19_Radiography_Dataset/COVID/images"
    else:
        given = raw / "ISIC-2017_Validation_Data"
    capsys.readouterr()
    out = prepare_published(dataset, given, tmp_path / "out", "--overwrite")
    assert prepare_data.read_meta(out)["fingerprint"] == expected
    out = capsys.readouterr().out
    assert ("nearly everything" in out) == (dataset == "drone") and ("are not the only one in images/" in out) == (dataset == "dsb2018")


def test_published_splits_at_their_full_size():
    sizes = dict(COVID=3616, Lung_Opacity=6012, Normal=10192, Viral=1345)
    pairs = [prepare_data.Pair(f"{label}-{i}", "", label=label) for label, n in sizes.items() for i in range(n)]
    prepare_data.stratify(pairs, 0)
    counts = [sum(p.part == part for p in pairs) for part in prepare_data.PARTS]
    assert counts == [14730, 2202, 4233]
    for label, n in sizes.items():
        assert abs(sum(p.part == "test" and p.label == label for p in pairs) - .2 * n) <= 1
    slides = [prepare_data.Pair(f"{i}_{k}", "", slide=f"{i}", group=f"{i}") for i in range(198) for k in range(12)]
    prepare_data.split(slides, 3)
    assert [sum(p.part == part for p in slides) for part in prepare_data.PARTS] == [1656, 240, 480]


def test_archives_are_unpacked_once_and_never_outside(tmp_path):
    miniature("isic", tmp_path / "raw/x")
    out = prepare_published("isic", tmp_path / "raw", tmp_path / "out")         # one level above
    expected = prepare_data.read_meta(out)["fingerprint"]
    zips = tmp_path / "zips"
    zips.mkdir()
    for folder in (tmp_path / "raw/x").iterdir():
        if folder.is_dir():
            shutil.make_archive(zips / folder.name, "zip" if "Data" in folder.name else "gztar", folder.parent, folder.name)
        else:
            shutil.copy(folder, zips)
    for turn in (1, 2):                                         # the second finds what the first has extracted
        prepare_published("isic", zips, tmp_path / "out", "--overwrite")
        assert prepare_data.read_meta(out)["fingerprint"] == expected
        for path in [*zips.glob("*.zip"), *zips.glob("*.tar.gz")]:
            path.write_bytes(b"never read again")
    shutil.rmtree(zips / "ISIC-2017_Training_Data")
    refused(lambda: prepare_published("isic", zips, tmp_path / "out", "--overwrite"), "ISIC-2017_Training_Data.zip", "get it again")
    (zips / "ISIC-2017_Training_Data.zip").unlink()
    refused(lambda: prepare_published("isic", zips, tmp_path / "out", "--overwrite"), "not enough")
    refused(lambda: prepare_published("isic", tmp_path / "nowhere", tmp_path / "new"), "challenge.isic-archive.com")
    refused(lambda: prepare_data.main(["--dataset", "xray"]), "--raw", "kaggle")
    for name in ("../evil", "/evil", "link"):
        evil = tmp_path / "evil"
        shutil.rmtree(evil, ignore_errors=True)
        evil.mkdir()
        with zipfile.ZipFile(evil / "a.zip", "w") as file:
            member = zipfile.ZipInfo(name)
            member.external_attr = 0o120777 << 16 if name == "link" else 0
            file.writestr(member, "/etc")
        with tarfile.open(evil / "b.tar", "w") as file:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.SYMTYPE, "/etc") if name == "link" else (tarfile.REGTYPE, "")
            file.addfile(member, io.BytesIO())
        words = ("not enough",) if name == "/evil" else ("b.tar", "cannot be extracted")
        refused(lambda: prepare_published("isic", evil, tmp_path / "out", "--overwrite"), *words)
        there = {path for path in evil.rglob("*")} - {evil / "a", evil / "a.zip", evil / "b.tar", evil / "b"}
        assert there <= {evil / "a/evil", evil / "a/link", evil / "b/evil"} and not (tmp_path / "evil/evil").exists()
        assert not any(path.is_symlink() for path in evil.rglob("*")) and not Path("/evil").exists()
    assert prepare_data.read_meta(out)["fingerprint"] == expected


def test_check_finds_what_is_off(tmp_path, data):
    out = tmp_path / "demo"

    def planted(change, *words):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(data / "demo", out)
        change()
        refused(lambda: prepare_data.main(["--dataset", "demo", "--out", str(tmp_path), "--check"]), *words)

    def edit(name, index, value):
        array = np.load(out / name)
        array[index] = value(array)
        np.save(out / name, array)

    planted(lambda: edit("test_images.npy", 3, lambda a: np.load(out / "train_images.npy")[5]),
            "same picture in two parts: train_005 of train and test_003 of test", "fingerprint")
    planted(lambda: edit("val_images.npy", (2, 9, 9, 1), lambda a: a[2, 9, 9, 1] ^ 1), "fingerprint")
    planted(lambda: edit("train_masks.npy", [0, 1], lambda a: a[[1, 0]]), "fingerprint")
    planted(lambda: edit("train_masks.npy", 7, lambda a: a[7] * 255), "train_masks.npy is (64, 32, 32) up to 255")
    planted(lambda: (out / "test.csv").write_text((out / "test.csv").read_text().replace("test_000", "train_000")), "same name")
    planted(lambda: (out / "val.csv").write_text("name,group,label\n"), "val.csv has 0 rows")


def test_download_survives_bad_servers(tmp_path):
    payload, calls = rng.bytes(300_000), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            calls.append((self.path, self.headers["Range"]))
            start = int(re.match(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
            tries = sum(path == self.path for path, _ in calls)
            if self.path in ("/404", "/500") or (self.path == "/flaky" and tries == 1):
                return self.send_error(404 if self.path == "/404" else 503)
            if start >= len(payload):
                return self.send_error(416)
            start = 0 if self.path == "/norange" else start
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(payload) - 1}/{len(payload)}")
            if self.path != "/nolength":
                self.send_header("Content-Length", str(len(payload) - start))
            self.end_headers()
            end = start + 120_000 if self.path in ("/cut", "/stall") and tries < 3 else len(payload)
            end = 200_000 if self.path == "/norange" and tries == 1 else end
            self.wfile.write(payload[start:end])
            if self.path == "/stall" and tries < 3:
                time.sleep(3)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name in ("plain", "cut", "stall", "flaky", "norange", "nolength"):
        prepare_data.download(f"{url}/{name}", tmp_path / name, timeout=1)
        assert (tmp_path / name).read_bytes() == payload, name
    assert [begin for path, begin in calls if path == "/cut"] == [None, "bytes=120000-", "bytes=240000-"]
    (tmp_path / "late.part").write_bytes(payload[:777])         # of an earlier call
    prepare_data.download(f"{url}/late", tmp_path / "late")
    assert (tmp_path / "late").read_bytes() == payload
    refused(lambda: prepare_data.download(f"{url}/404", tmp_path / "x"), "404", "moved")
    refused(lambda: prepare_data.download(f"{url}/500", tmp_path / "x"), "503", "goes on")
    server.shutdown()
    refused(lambda: prepare_data.main(["--dataset", "xray", "--download", "--raw", str(tmp_path)]), "account", "kaggle")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------- a user's mistakes

def test_mistakes_end_in_one_line_and_leave_nothing(data, run, tmp_path):
    empty, few = tmp_path / "empty", write_folder(tmp_path / "few", n=2)
    empty.mkdir()
    out, absent = tmp_path / "out", tmp_path / "absent"
    common = ["--data", str(data), "--out", str(out)]
    refused(lambda: prepare(absent, out), absent, "no such folder")
    refused(lambda: prepare(empty, out), empty, "no images here")
    refused(lambda: prepare(few, out), few, "too few")
    refused(lambda: prepare_data.main(["--dataset", "folder", "--out", str(out)]), "--raw")
    write_folder(tmp_path / "half/train")
    refused(lambda: prepare(tmp_path / "half", out), "has train: give all of")
    refused(lambda: pretrain.main(["--dataset", "isic", *common]), data / "isic", "not prepared", "prepare_data.py")
    refused(lambda: pretrain.main(["--dataset", "demo", "--device", "cuda:99", *common]), "cuda:99")
    refused(lambda: pretrain.main(["--dataset", "demo", "--sync-batchnorm", *common]), "several GPUs")
    refused(lambda: finetune_eval.main(["--run", str(absent), *common]), absent, "not a run folder")
    refused(lambda: finetune_eval.main(["--run", str(run), "--predict", str(absent), "--out", str(out)]), absent)
    refused(lambda: finetune_eval.main(["--encoder", str(absent), "--dataset", "demo", "--backbone", "resnet50", *common]), absent)
    refused(lambda: finetune_eval.main(["--report", "--out", str(absent)]), absent)
    odd = tmp_path / "odd"
    prepare_data.main(["--dataset", "demo", "--size", "40", "--out", str(odd)])
    refused(lambda: pretrain.main(["--dataset", "demo", "--backbone", "vit_small", "--data", str(odd), "--out", str(out)]), "16")
    assert not out.exists()


def test_mistakes_on_the_command_line_have_no_traceback(tmp_path):
    for script, flags, words in (("pretrain.py", ["--dataset", "demo", "--backbone", "resnet18"], "resnet18"),
                                 ("finetune_eval.py", ["--run", "nowhere"], "nowhere")):
        end = subprocess.run([sys.executable, str(HERE / script), *flags], cwd=tmp_path, capture_output=True, text=True)
        assert end.returncode not in (0, None) and "Traceback" not in end.stderr
        assert words in end.stderr and len(end.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- promises in writing

def test_too_little_memory_is_said_in_one_line(tmp_path):
    refused(lambda: pretrain.explain_memory(RuntimeError("unable to allocate shared memory(shm) for file")), "--workers 0")
    refused(lambda: pretrain.explain_memory(torch.OutOfMemoryError("CUDA out of memory")), "--batch-size")
    assert pretrain.explain_memory(RuntimeError("shapes differ")) is None
    prepare_data.main(["--dataset", "demo", "--size", "32", "--out", str(tmp_path)])
    for kind in ("images", "masks"):
        np.save(tmp_path / f"demo/train_{kind}.npy", np.load(tmp_path / f"demo/train_{kind}.npy")[:1])
    meta = json.loads((tmp_path / "demo/meta.json").read_text())
    meta["counts"]["train"] = 1
    (tmp_path / "demo/meta.json").write_text(json.dumps(meta))
    refused(lambda: train(tmp_path, tmp_path / "runs", "--method", "byol"), "at least 2 images")


def test_every_flag_has_help():
    for parse in (prepare_data.parse_args, finetune_eval.parse_args, pretrain.parse_args):
        with pytest.raises(SystemExit) as end:
            parse(["--help"])
        assert end.value.code == 0


def test_files_that_are_copied_import_nothing_of_ours(tmp_path):
    for path in ("models.py", "losses.py"):
        name = Path(path).stem
        shutil.copy(HERE / path, tmp_path)
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {name}"
        subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
        (tmp_path / f"{name}.py").unlink()


def test_readme_snippets_run(run, tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    monkeypatch.chdir(tmp_path)
    Image.fromarray(rng.integers(0, 256, (50, 70, 3), np.uint8)).save("image.png")
    for snippet in snippets[:2]:
        scope = {}
        exec(snippet.replace("runs/demo/resnet50/medsass-e30/seed0", str(run)).replace("(224, 224)", "(32, 32)"), scope)
    assert not scope["keys"].unexpected_keys


def test_each_baseline_trains_alone_in_an_empty_folder(tmp_path):
    """The README's third snippet, beside one file and nothing else of ours, for each of the five."""
    snippet = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[2]
    code = "import os, sys\n"
    for cls in (byol.BYOL, simsiam.SimSiam, dino.DINO, mae.MAE, simmim.SimMIM):
        name = cls.__module__.split(".")[1]
        (tmp_path / name).mkdir()
        shutil.copy(HERE / "baselines" / f"{name}.py", tmp_path / name)
        own = snippet.replace("byol", name).replace("BYOL", cls.__name__).replace('"resnet50"', repr(cls.backbones[0]))
        own = own.replace("64", "32").replace("(32, 3, 32", "(4, 3, 32").replace("split(16)", "split(2)")
        code += f"os.chdir({str(tmp_path / name)!r}); sys.path[0] = os.getcwd()\n{own}\n"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    assert len(list(tmp_path.glob("*/encoder.pth"))) == 5


@pytest.mark.parametrize("name, backbone", PAIRINGS)
def test_three_epochs_on_the_demo_learn_and_do_not_collapse(name, backbone, data, tmp_path):
    folder = train(data, tmp_path, "--method", name, "--backbone", backbone, "--workers", "1", epochs=3)
    rows = list(csv.DictReader(open(folder / "log.csv")))
    last = {key: float(value) for key, value in rows[-1].items()}
    assert not pretrain.METHODS[name](backbone, 32).collapsed(last)
    if name == "dino":
        assert last["entropy_mean"] > last["entropy_single"]    # twelve steps of its rate change the loss little
    else:
        assert last["train_loss"] < float(rows[0]["train_loss"])


# ----------------------------------------------------------------------------- benchmarks (pytest -m bench test_smoke.py)

def lightly_method(name, size):
    """The same method put together from lightly's parts, as its examples do: (augmentation, modules, step, moving average)."""
    from lightly import transforms
    from lightly.models import modules, utils
    if name in ("dino", "mae"):
        return lightly_vit_method(name, size)
    cosine = lightly_loss.NegativeCosineSimilarity()
    encoder = timm.create_model("resnet50", num_classes=0)
    if name == "simsiam":
        heads = modules.SimSiamProjectionHead(2048, 2048, 2048), modules.SimSiamPredictionHead(2048, 512, 2048)

        def loss(views):
            z = [heads[0](encoder(view)) for view in views]
            p = [heads[1](x) for x in z]
            return (cosine(z[0].detach(), p[1]) + cosine(z[1].detach(), p[0])) / 2

        return transforms.SimSiamTransform(input_size=size), torch.nn.ModuleList([encoder, *heads]), loss, lambda: None
    online = torch.nn.Sequential(encoder, modules.BYOLProjectionHead(2048, 4096, 256))
    predict = modules.BYOLPredictionHead(256, 4096, 256)
    momentum = torch.nn.Sequential(timm.create_model("resnet50", num_classes=0), modules.BYOLProjectionHead(2048, 4096, 256))
    utils.deactivate_requires_grad(momentum)

    def loss(views):
        p = [predict(online(view)) for view in views]
        with torch.no_grad():
            z = [momentum(view) for view in views]
        return (cosine(p[0], z[1]) + cosine(p[1], z[0])) / 2

    views = transforms.BYOLView1Transform(input_size=size), transforms.BYOLView2Transform(input_size=size)
    return transforms.BYOLTransform(*views), torch.nn.ModuleList([online, predict]), loss, \
        lambda: utils.update_momentum(online, momentum, .99)


def lightly_vit_method(name, size):
    """lightly_method for DINO and MAE."""
    from lightly import transforms
    from lightly.models import modules, utils
    if name == "dino":
        student, teacher = (torch.nn.Sequential(
            timm.create_model("vit_small_patch8_224", img_size=size, num_classes=0, dynamic_img_size=True),
            modules.DINOProjectionHead(384, 2048, 256, 1024, freeze_last_layer=1)) for _ in range(2))
        utils.deactivate_requires_grad(teacher)
        criterion = lightly_loss.DINOLoss(output_dim=1024)

        def loss(views):
            with torch.no_grad():
                t = [teacher(view) for view in views[:2]]
            return criterion(t, [student(view) for view in views], epoch=1)

        views = transforms.DINOTransform(global_crop_size=size, local_crop_size=max(16, size * 96 // 224 // 8 * 8), n_local_views=8)
        return views, student, loss, lambda: utils.update_momentum(student, teacher, .99)
    encoder = modules.MaskedVisionTransformerTIMM(vit=timm.create_model("vit_small_patch8_224", img_size=size, num_classes=0))
    decoder = modules.MAEDecoderTIMM(num_patches=(size // 8) ** 2, patch_size=8, embed_dim=384, decoder_embed_dim=512,
                                     decoder_depth=8, decoder_num_heads=16)

    def loss(views):
        images = views[0]
        keep, mask = utils.random_token_mask(size=(len(images), encoder.sequence_length), mask_ratio=.75)
        x = decoder.embed(encoder.encode(images, idx_keep=keep))
        masked = utils.repeat_token(decoder.mask_token, (len(images), encoder.sequence_length))
        masked = utils.set_at_index(masked, keep, x.type_as(masked))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(masked), mask))
        target = utils.get_at_index(utils.patchify(images, 8), mask - 1)
        return F.mse_loss(predicted, utils.normalize_mean_var(target, dim=-1))

    return transforms.MAETransform(input_size=size), torch.nn.ModuleList([encoder, decoder]), loss, lambda: None


@pytest.fixture(scope="session")
def record(request):
    """record(what, against, value, reach, ours, theirs): keep a row in results/bench.json, print all at the end as a table, and ask
    that it is reached; reach is ("<=" or ">=", number)."""
    path, rows = HERE / "results/bench.json", {}

    def row(what, against, value, reach, ours, theirs=""):
        good = bool(value <= reach[1] if reach[0] == "<=" else value >= reach[1])
        rows[what] = dict(against=against, value=round(float(value), 4), reach=f"{reach[0]} {reach[1]}", reached=good, ours=ours, theirs=theirs)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(cores=os.cpu_count(), torch=torch.__version__, rows=rows), indent=2) + "\n")
        assert good

    yield row
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\n| what | against | ours | theirs | ratio | reach | reached |\n|---|---|---|---|---|---|---|")
        for what, r in rows.items():
            print(f"| {what} | {r['against']} | {r['ours']} | {r['theirs']} | {r['value']:.3g} | {r['reach']} | {'yes' if r['reached'] else 'NO'} |")


def interleaved(rounds, *work):
    """Median seconds of each of the functions, called in turn, after one call each that does not count."""
    times = [[] for _ in work]
    for k in range(rounds + 1):
        for call, mine in zip(work, times):
            start = time.perf_counter()
            call()
            mine.append(time.perf_counter() - start)
    return [float(np.median(mine[1:])) for mine in times]


def photographs(folder, n, size):
    """A part of a data set of n smooth random pictures, as an array."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [cv2.resize(rng.integers(0, 256, (size // 8, size // 8, 3)).astype(np.uint8), (size, size)) for _ in range(min(n, 64))]
    np.save(folder / "train_images.npy", np.stack([images[i % len(images)] for i in range(n)]))
    return folder


class TwoViews(torch.utils.data.Dataset):
    """The same array for somebody else's transform, which takes a PIL image."""

    def __init__(self, folder, transform):
        self.images, self.transform = np.load(folder / "train_images.npy", mmap_mode="r"), transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index]))


@pytest.mark.bench
def test_input_path(tmp_path, record):
    """Read, augment, pseudo-mask, batches of 16 at 224 px, one worker: images a second, against lightly's BYOL transform."""
    from lightly import transforms
    folder = photographs(tmp_path, 160, 224)
    ours = pretrain.make_loader(pretrain.Images(folder, "train", pretrain.MedSASS("resnet50").augment, 0), pretrain.Batches(160, 16, 0), 1)
    views = transforms.BYOLView1Transform(input_size=224), transforms.BYOLView2Transform(input_size=224)
    theirs = torch.utils.data.DataLoader(TwoViews(folder, transforms.BYOLTransform(*views)), 16, num_workers=1, persistent_workers=True)
    mine, other = interleaved(5, lambda: [None for _ in ours], lambda: [None for _ in theirs])
    record("input path, images/s", "lightly's BYOL transform", other / mine, (">=", 3), round(160 / mine), round(160 / other))


STEP = """import sys; sys.path.insert(0, {here!r})
import torch, segmentation_models_pytorch as smp, pretrain, time
torch.manual_seed(0)
images = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8)
masks = (torch.rand(8, 1, 224, 224) < .3).to(torch.uint8)
peak = lambda: int([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0]) / 1024
before = peak()
if sys.argv[1] == "ours":
    method = pretrain.MedSASS("resnet50").to(memory_format=torch.channels_last).train()
    optimizer = method.optimizer()
    loss_of = lambda: method(pretrain.to_device([images, masks], "cpu"))
else:
    unet = smp.Unet("resnet50", encoder_weights=None, encoder_depth=3, decoder_channels=(256, 128, 64), decoder_attention_type="scse")
    optimizer, mean, std = torch.optim.Adam(unet.parameters(), 3.6e-4, weight_decay=1e-5), *(
        torch.tensor(v).view(1, 3, 1, 1) for v in (pretrain.IMAGENET_MEAN, pretrain.IMAGENET_STD))
    loss = smp.losses.TverskyLoss("binary", alpha=.3, beta=.7, gamma=.75)
    loss_of = lambda: loss(unet((images / 255 - mean) / std), masks.float())
for _ in range(int(sys.argv[2])):
    sys.stdin.readline()
    start = time.perf_counter()
    optimizer.zero_grad()
    loss_of().backward()
    optimizer.step()
    print(time.perf_counter() - start, peak() - before, flush=True)
"""


@pytest.mark.bench
def test_training_step(tmp_path, record):
    """ResNet-50 U-Net, 224 px, batch 8, two processes that take turns: seconds and peak memory, against the same network, loss
    and optimiser from segmentation_models_pytorch and torch, written plainly."""
    (tmp_path / "step.py").write_text(STEP.format(here=str(HERE)))
    both = [subprocess.Popen([sys.executable, str(tmp_path / "step.py"), name, "6"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for name in ("ours", "theirs")]
    said = [[], []]
    for _ in range(6):
        for process, lines in zip(both, said):
            process.stdin.write("\n"), process.stdin.flush()
            lines.append([float(word) for word in process.stdout.readline().split()])
    (mine, my_peak), (other, other_peak) = ((np.median([line[0] for line in lines[1:]]), lines[-1][1]) for lines in said)
    try:
        record("training step, memory", "segmentation_models_pytorch", my_peak / other_peak, ("<=", .7), f"{my_peak:.0f} MB", f"{other_peak:.0f} MB")
    finally:
        record("training step, time", "segmentation_models_pytorch", mine / other, ("<=", .75), f"{mine:.2f} s", f"{other:.2f} s")


@pytest.mark.bench
def test_share_of_a_step_beside_the_network(tmp_path, record, monkeypatch):
    """One epoch of 8 steps, 224 px, batch 8, one worker, by the loop of pretrain.py: what is not forward, backward, optimiser."""
    data = prepare(write_folder(tmp_path / "raw", n=92, size=224), tmp_path, "--size", "224", "--name", "set").parent
    spent = []

    def timed(call):
        def run(*args, **kwargs):
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)
        return run

    monkeypatch.setattr(pretrain.MedSASS, "forward", timed(pretrain.MedSASS.forward))
    monkeypatch.setattr(torch.Tensor, "backward", timed(torch.Tensor.backward))
    monkeypatch.setattr(torch.optim.Adam, "step", timed(torch.optim.Adam.step))
    step, after = pretrain.Trainer.step, []

    def timed_step(self, *args):
        result = step(self, *args)
        after.append((sum(spent), time.perf_counter()))
        return result

    monkeypatch.setattr(pretrain.Trainer, "step", timed_step)
    pretrain.main(["--dataset", "set", "--data", str(data), "--out", str(tmp_path), "--epochs", "1", "--batch-size", "8", "--workers", "1"])
    network, seconds = (last - first for first, last in zip(after[0], after[-1]))
    record("share of a step beside the network", "whole step", 1 - network / seconds, ("<=", .03), f"{seconds - network:.2f} s", f"{seconds:.2f} s")


@pytest.mark.bench
def test_evaluation(record):
    """224 px, batch 16: images a second of prediction with all scores, against the forward pass of training alone."""
    method = pretrain.MedSASS("resnet50").to(memory_format=torch.channels_last)
    images = np.stack([cv2.resize(rng.integers(0, 256, (28, 28, 3)).astype(np.uint8), (224, 224)) for _ in range(16)])
    masks = pretrain.pseudo_mask(images)
    views = pretrain.to_device([torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks)[:, None]], "cpu")

    def evaluate():
        method.eval()
        finetune_eval.score_images(lambda batch: finetune_eval.predict_logits(method.unet, batch, "cpu") > 0, images, masks)

    mine, other = interleaved(5, evaluate, lambda: method.train()(views))
    record("evaluation, images/s", "training forward", other / mine, (">=", .95), round(16 / mine, 2), round(16 / other, 2))


@pytest.mark.bench
def test_loading_is_linear(tmp_path, record):
    """An epoch of 1000, 4000 and 16000 images of 64 px, without a network, one worker: the largest deviation of seconds an image
    from that of 4000, each from 16000 images; and the worker's peak memory (VmHWM, Linux)."""
    loaders = {}
    for n in (1000, 4000, 16000):
        images = pretrain.Images(photographs(tmp_path / str(n), n, 64), "train", pretrain.MedSASS("resnet50", 64).augment, 0)
        loaders[n] = pretrain.make_loader(images, pretrain.Batches(n, 16, 0), 1)
    epochs = [lambda n=n: [None for _ in range(16000 // n) for _ in loaders[n]] for n in loaders]
    us = [t / 16000 * 1e6 for t in interleaved(5, *epochs)]
    peak = [int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{loader._iterator._workers[0].pid}/status").read_text())[1]) / 1024
            for loader in loaders.values()]
    try:
        record("memory of a loader, 16k images", "1k images, MB more", peak[2] - peak[0], ("<=", 20), f"{peak[2]:.0f} MB", f"{peak[0]:.0f} MB")
    finally:
        record("loading 1k, 4k, 16k images, us an image", "linear", max(abs(t / us[1] - 1) for t in us), ("<=", .05), ", ".join(f"{t:.0f}" for t in us))


@pytest.mark.bench
def test_preparing_jpgs_is_faster_than_a_plain_loop(tmp_path, record):
    """2000 jpgs of 1022x767 to arrays of 224 px, the whole script against a loop with Pillow in one process."""
    (tmp_path / "raw").mkdir()
    for i in range(2000):
        if i < 20:
            picture = cv2.resize(rng.integers(0, 256, (24, 32, 3)).astype(np.uint8), (1022, 767), interpolation=cv2.INTER_CUBIC)
            picture = (picture + rng.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / f"raw/{i:04d}.jpg", quality=92)
        else:
            shutil.copy(tmp_path / f"raw/{i % 20:04d}.jpg", tmp_path / f"raw/{i:04d}.jpg")
    files = sorted((tmp_path / "raw").iterdir())
    command = [sys.executable, str(HERE / "prepare_data.py"), "--dataset", "folder", "--raw", str(tmp_path / "raw"),
               "--out", str(tmp_path / "out"), "--overwrite"]
    mine, other = interleaved(5, lambda: subprocess.run(command, check=True, capture_output=True), lambda: np.stack(
        [np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files]))
    record("preparing 2000 jpgs", "a plain Pillow loop", other / mine, (">=", 1.8), f"{mine:.1f} s", f"{other:.1f} s")


@pytest.mark.bench
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, record):
    """Peak memory of the main process for 200 and for 20000 images with masks (VmHWM, Linux)."""
    peak = {}
    for n in (200, 20000):
        for kind in ("images", "masks"):
            (tmp_path / f"{n}/{kind}").mkdir(parents=True)
        Image.fromarray((rng.random((80, 96)) < .3).astype(np.uint8) * 255).save(tmp_path / "a.png")
        for i in range(n):
            picture = cv2.resize(rng.integers(0, 256, (5, 6, 3)).astype(np.uint8), (96, 80))
            cv2.imwrite(str(tmp_path / f"{n}/images/patient_number_{i:06d}.jpg"), picture)
            shutil.copy(tmp_path / "a.png", tmp_path / f"{n}/masks/patient_number_{i:06d}.png")
        code = (f"import prepare_data; prepare_data.main(['--dataset', 'folder', '--size', '64', '--raw', {str(tmp_path / str(n))!r}, "
                f"'--out', {str(tmp_path / 'out')!r}]); print(open('/proc/self/status').read())")
        out = subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True, capture_output=True, text=True).stdout
        peak[n] = int(re.search(r"VmHWM:\s+(\d+) kB", out)[1]) / 1024
    record("memory of preparing 20000 images", "200 images, MB more", peak[20000] - peak[200], ("<=", 50), f"{peak[20000]:.0f} MB", f"{peak[200]:.0f} MB")


@pytest.mark.bench
@pytest.mark.parametrize("name, backbone", [("byol", "resnet50"), ("simsiam", "resnet50"), ("dino", "vit_small"), ("mae", "vit_small")])
def test_baselines_are_no_slower_than_lightly(name, backbone, record):
    """A step (augmentation in one process, forward, backward, optimiser, moving average), 64 px, batch 16; ours laid out as
    pretrain.py does."""
    images = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(16)]
    tensors, pictures = [torch.from_numpy(i).permute(2, 0, 1) for i in images], [Image.fromarray(i) for i in images]
    ours = pretrain.METHODS[name](backbone, 64).to(memory_format=torch.channels_last)
    theirs = lightly_method(name, 64)
    own = ours.optimizer()
    momentum = dict(momentum=.9) if name == "simsiam" else {}
    other_optimizer = type(own)(theirs[1].parameters(), lr=1e-4, weight_decay=1e-4, **momentum)

    def our_step():
        views = pretrain.to_device([torch.stack(v) for v in zip(*[ours.augment(image) for image in tensors])], "cpu")
        ours.before_step(own, 50, 100, 1)
        own.zero_grad()
        ours(views).backward()
        ours.after_backward()
        own.step()
        ours.after_step(50, 100)

    def their_step():
        views = [torch.stack(view) for view in zip(*[theirs[0](picture) for picture in pictures])]
        other_optimizer.zero_grad()
        theirs[2](views).backward()
        other_optimizer.step()
        theirs[3]()

    mine, other = interleaved(9, our_step, their_step)
    record(f"{name}, {backbone}, 64 px: a step", "lightly's parts", mine / other, ("<=", 1), f"{mine:.3f} s", f"{other:.3f} s")
