"""Every stage through its command line, every formula against an independent source.

    bash run_all.sh test
"""

import argparse
import copy
import csv
import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
import segmentation_models_pytorch as smp
import skimage.filters
import skimage.measure
import skimage.morphology
import sklearn.metrics
import tifffile
import timm
import torch
import torch.nn.functional as F
import torchvision
from lightly import loss as lightly_loss
from lightly import transforms
from lightly.models import modules
from lightly.models import utils as lightly_utils
from PIL import Image, ImageOps

import finetune_eval
import losses
import models
import prepare_data
import pretrain
from baselines import byol, mae, simmim

HERE = Path(__file__).parent
rng = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------ helpers

@pytest.fixture(autouse=True)
def seeds():
    """What a test draws does not depend on which ran before it."""
    torch.manual_seed(0)
    rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with the demo, prepared at 32 px."""
    folder = tmp_path_factory.mktemp("data")
    prepare_data.main(["--dataset", "demo", "--size", "32", "--out", str(folder)])
    return folder


def command(data, out, *flags, epochs=2, dataset="demo"):
    """The flags of a run on the CPU."""
    return ["--dataset", dataset, "--data", str(data), "--out", str(out), "--epochs", str(epochs),
            "--workers", "0", "--device", "cpu", *flags]


def train(data, out, *flags, epochs=2):
    """Run pretrain.py in this process on the demo; returns the run folder."""
    pretrain.main(command(data, out, *flags, epochs=epochs))
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


def write_folder(folder, n=12, size=40, masks=True):
    """A raw folder of n pictures, three a patient, and their masks; the same each time."""
    names = ["images/{patient}_{i:02d}.png", "masks/{patient}_{i:02d}.png"]
    write_layout(folder, *names[:1 + masks], n=n, shape=(size, size))
    return folder


def prepare(raw, out, *flags):
    prepare_data.main(["--dataset", "folder", "--raw", str(raw), "--size", "32", "--out", str(out),
                       *flags])
    return out / raw.name


def refused(call, *words):
    """The call ends the program with a message that holds all the words, and no traceback; returns
    the message."""
    with pytest.raises(SystemExit) as end:
        call()
    message = str(end.value.code)
    assert message not in ("0", "None")
    for word in words:
        assert str(word) in message
    return message


# ------------------------------------------------------------------------------------------- losses

# smp's alpha weighs false positives, ours false negatives; its gamma is the inverse of ours.
@pytest.mark.parametrize("name, flags, theirs", [
    ("focal_tversky", {}, smp.losses.TverskyLoss("binary", smooth=1, alpha=.3, beta=.7, gamma=.75)),
    ("focal_tversky", dict(alpha=.4, beta=.6, gamma=2.0, smooth=5.0),
     smp.losses.TverskyLoss("binary", smooth=5, alpha=.6, beta=.4, gamma=.5)),
    ("tversky", {}, smp.losses.TverskyLoss("binary", smooth=1, alpha=.3, beta=.7)),
    ("dice", {}, smp.losses.DiceLoss("binary", smooth=1)),
    ("focal", {}, smp.losses.FocalLoss("binary", gamma=2)),
    ("focal", dict(alpha=.6, gamma=3.0), smp.losses.FocalLoss("binary", alpha=.6, gamma=3)),
    ("bce", {}, smp.losses.SoftBCEWithLogitsLoss()),
])
def test_losses_equal_segmentation_models_pytorch(name, flags, theirs):
    logits = 2 * torch.randn(3, 1, 9, 7, dtype=torch.float64)
    target = (torch.rand(3, 1, 9, 7) < .3).double()
    ours = losses.LOSSES[name](logits, target, **flags)
    assert ours.item() == pytest.approx(theirs(logits, target).item(), abs=1e-12)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_losses_and_gradients_are_finite_at_the_extremes(name, dtype):
    half = (torch.arange(300) % 2).expand(2, 1, 300, 300)
    for value, target in itertools.product((-1e4, 0, 1e4), (half, half < 0, half >= 0)):
        logits = torch.full(half.shape, value, dtype=dtype, requires_grad=True)
        loss = losses.LOSSES[name](logits, target)
        loss.backward()
        assert torch.isfinite(logits.grad + loss).all()


# ------------------------------------------------------------------------------------------- models

SMP_NAMES = {"up1": "decoder.blocks.0", "up2": "decoder.blocks.1", "up3": "decoder.blocks.2",
             "convs.0.0": "conv1.0", "convs.0.1": "conv1.1",
             "convs.1.0": "conv2.0", "convs.1.1": "conv2.1",
             "channel": "attention.cSE", "spatial": "attention.sSE", "head": "segmentation_head.0"}


def smp_name(name):
    for ours, theirs in SMP_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def weights(network):
    """The parameters of a network, one vector."""
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


@pytest.fixture(scope="module")
def unets():
    """Our ResNet-50 U-Net and that of segmentation_models_pytorch with the same weights."""
    theirs = smp.Unet("resnet50", encoder_weights=None, encoder_depth=3,
                      decoder_channels=(256, 128, 64), decoder_attention_type="scse")
    ours = models.build_unet("resnet50")
    source = theirs.state_dict()
    ours.load_state_dict({name: source[smp_name(name)] for name in ours.state_dict()})
    return ours.double(), theirs.double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("height, width", [(64, 64), (70, 93)])
def test_resnet50_unet_and_its_gradients_are_those_of_segmentation_models_pytorch(
        unets, training, height, width):
    x = torch.randn(2, 3, height, width).double()
    for network in unets:
        network.train(training).zero_grad()
    with torch.set_grad_enabled(training):                      # other code without gradients
        out, expected = [network(x) for network in unets]
    assert torch.allclose(out, expected, atol=1e-10)
    ours, theirs = unets
    assert weights(ours).numel() == 4_536_047
    if training:
        out.sin().sum().backward()
        expected.sin().sum().backward()
        for name, parameter in ours.named_parameters():
            other = theirs.get_parameter(smp_name(name)).grad
            if other is not parameter.grad:                     # both None where there is no skip
                assert torch.allclose(parameter.grad, other, atol=1e-9), name


def test_every_weight_of_the_vit_unet_learns():
    unet = models.build_unet("vit_small", img_size=64)
    loss = unet(torch.randn(2, 3, 64, 64)).mean()
    torch.autograd.grad(loss, list(unet.parameters()))          # raises where one has no part in it


@pytest.mark.parametrize("backbone, lacking, elsewhere", [
    ("resnet50", {"layer3", "layer4", "fc"}, [timm.models.resnet50, torchvision.models.resnet50]),
    ("vit_small", set(), [timm.models.vit_small_patch8_224])])
def test_exported_encoder_loads_elsewhere(backbone, lacking, elsewhere, tmp_path):
    missing = models.export_encoder(models.build_unet(backbone), tmp_path / "encoder.pth")
    assert {name.split(".")[0] for name in missing} == lacking
    for create in elsewhere:
        keys = create().load_state_dict(load(tmp_path / "encoder.pth"), strict=False)
        assert not keys.unexpected_keys and set(keys.missing_keys) == set(missing)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_encoders_from_elsewhere_load(backbone, tmp_path):
    state = timm.create_model(models.BACKBONES[backbone], num_classes=10).state_dict()
    of_dino = {"teacher": prefixed("backbone.", state), "args": argparse.Namespace(arch="vit")}
    for content in (state, {"state_dict": state, "epoch": 3},
                    {"model": prefixed("module.backbone.", state)}, of_dino):
        torch.save(content, tmp_path / "f.pth")
        unet = models.build_unet(backbone)
        unused = models.load_encoder(unet, tmp_path / "f.pth")
        loaded = unet.encoder.state_dict()
        assert set(unused) == set(state) - set(loaded) and not differing(loaded, state)


def test_position_embeddings_are_resampled(tmp_path):
    small, large = models.build_unet("vit_small", 64), models.build_unet("vit_small", 96)
    torch.nn.init.constant_(small.encoder.pos_embed, .5)
    models.export_encoder(small, tmp_path / "e.pth")
    assert models.load_encoder(large, tmp_path / "e.pth") == []
    assert torch.allclose(large.encoder.pos_embed, torch.tensor(.5))


def test_wrong_encoder_files_are_refused(tmp_path):
    path = tmp_path / "f.pth"
    complete = models.build_unet("resnet50").encoder.state_dict()
    cut = complete.copy()
    del cut["bn1.weight"]
    for words, content in (
            ("0 resnet50", [1, 2]), ("lacks 1 .*bn1.weight", cut),
            ("2 resnet50", prefixed("online.", complete) | prefixed("target.", complete)),
            ("mismatch for conv1.weight", complete | {"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            ("bn1.weight .*not finite", complete | {"bn1.weight": torch.full((64,), math.nan)}),
            ("", None)):
        torch.save(content, path)
        if content is None:
            path.write_bytes(b"no checkpoint")
        with pytest.raises(ValueError, match=f"{path}.*{words}"):
            models.load_encoder(models.build_unet("resnet50"), path)


# ------------------------------------------------------------------------------------- pseudo-masks

def ght_score(gray, t, nu, tau, kappa, omega):
    """Barron's score of one threshold, from the pixels themselves (ECCV 2020, eqs. 7 to 13)."""
    total = 0
    for side, share in ((gray[gray <= t], omega), (gray[gray > t], 1 - omega)):
        n, d = side.size, side.size * side.var()
        p = n / gray.size
        v = (p * nu * tau ** 2 + d) / (p * nu + n)
        total += -d / v - n * math.log(v) + 2 * (n + kappa * share) * math.log(n)
    return total


@pytest.mark.parametrize("constants", [
    (1e3, 12.0, 0.0, .5), (500.0, 3.0, 800.0, .2), (1e-3, 1.0, 1e4, .9)])
def test_ght_is_the_maximum_of_barrons_score(constants):
    values = np.append(rng.normal(70, 9, 300), rng.normal(150, 25, 200))
    gray = values.clip(0, 255).astype(np.uint8)
    best = max(ght_score(gray, t, *constants) for t in range(gray.min(), gray.max()))
    t = pretrain.ght_threshold(gray, *constants)
    assert ght_score(gray, t, *constants) == pytest.approx(best, rel=1e-9)


def test_pseudo_masks_follow_their_definitions_and_a_flat_picture_has_no_foreground():
    images = np.random.default_rng(0).integers(0, 256, (1, 24, 20, 3), np.uint8)
    gray = cv2.cvtColor(images[0], cv2.COLOR_RGB2GRAY)
    scale = 24 * 20 / 2 ** 20
    barrons = 2 ** 29.5 * scale, 2 ** 3.125, 2 ** 22.25 * scale, 2 ** -3.25
    window = dict(ksize=(11, 11), borderType=cv2.BORDER_REPLICATE)
    thresholds = dict(
        otsu=skimage.filters.threshold_otsu(gray),
        ght=pretrain.ght_threshold(gray, *barrons), fixed=127,
        adaptive_mean=cv2.blur(gray, **window).astype(int) - 2,
        adaptive_gaussian=cv2.GaussianBlur(gray, sigmaX=0, **window).astype(int) - 2)
    for method, threshold in thresholds.items():
        bright = pretrain.pseudo_mask(images, method)
        assert bright.dtype == np.uint8 and np.array_equal(bright[0], gray > threshold), method
        assert np.array_equal(pretrain.pseudo_mask(images, method, "dark"), 1 - bright)
        for foreground in ("bright", "dark"):
            assert not pretrain.pseudo_mask(images * 0 + 200, method, foreground).any()
    with pytest.raises(ValueError, match="otzu"):
        pretrain.pseudo_mask(images, "otzu")


# ------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("warp", [
    pretrain.Rotation(degrees=(20, 20), interpolation=Image.BILINEAR),
    pretrain.Perspective(distortion_scale=.2, p=1.0)])
def test_warps_are_torchvisions_inside_and_mirror_outside(warp):
    noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
    image = torch.from_numpy(cv2.GaussianBlur(noise, (0, 0), 2)).permute(2, 0, 1)
    white = torch.full_like(image, 255)
    with pretrain.seeded(7):
        params = warp.make_params([image])
    torchvisions = super(type(warp), warp).transform
    inside = torchvisions(white, params) == 255                 # black outside
    # Pillow takes (x, y) for a pixel's centre, torchvision's perspective grid (x + .5, y + .5).
    difference = warp.transform(image, params).int() - torchvisions(image, params).int()
    assert difference[inside].abs().float().mean() < 2.5
    assert (warp.transform(white, params) == 255).all()


def test_channel_is_the_most_separable():
    images = rng.integers(0, 256, (5, 40, 50, 3), np.uint8)
    images[..., 1] = spot(40, 50)[0]
    assert pretrain.choose_channel(images)[0] == "green"
    images[:] = images[..., 1:2]
    assert pretrain.choose_channel(images)[0] == "gray"         # of equals


def connected(mask, starts):
    """bool (H, W) twice -> the pixels of `mask` that are 4-connected to one of `starts` in it."""
    labels = skimage.measure.label(mask, connectivity=1)
    return np.isin(labels, labels[mask & starts])


@pytest.mark.parametrize("seed", range(5))
def test_frame_equals_a_flood_from_border_and_corners(seed):
    noise = np.random.default_rng(seed)
    values = noise.choice(np.uint8([40, 54, 56, 100]), (64, 72), p=[.3, .12, .06, .52])
    often = noise.random((64, 72)) < .4
    border = ~np.pad(np.ones((62, 70), bool), 1)
    corners = np.zeros((64, 72), bool)
    corners[::63, ::71] = True
    common = pretrain.common_frame(often)
    assert np.array_equal(common, connected(often, border))
    frame = common | connected(values <= .55 * np.median(values), corners)
    frame = skimage.morphology.dilation(frame, np.ones((5, 5)))
    assert np.array_equal(pretrain.frame_of(values, common), frame)
    counted = pretrain.otsu_threshold(values[~frame][:, None])
    assert np.array_equal(pretrain.dark_mask(values, frame), (values <= counted) & ~frame)


def test_position_map_of_two_images_equals_its_definition():
    """Any halves are these two, so that their correlation does not vary."""
    masks = np.random.default_rng(1).random((2, 24, 30)) < np.linspace(0, .8, 30)
    halves = [cv2.GaussianBlur(mask.astype(float), (0, 0), 30 / 24) for mask in masks]
    c = np.corrcoef(*map(np.ravel, halves))[0, 1]
    p = np.mean(halves, axis=0)
    position, reliability = pretrain.position_map(masks, 2)
    assert reliability == pytest.approx(2 * c / (1 + c), rel=1e-4)
    assert np.allclose(position, p.mean() + reliability * (p - p.mean()), atol=1e-4)


def draw_discs(centres, radius):
    """int (N, discs, 2) -> masks uint8 {0, 1} (N, 64, 64)."""
    masks = np.zeros((len(centres), 64, 64), np.uint8)
    for mask, of_mask in zip(masks, centres.tolist(), strict=True):
        for centre in of_mask:
            cv2.circle(mask, centre, radius, 1, -1)
    return masks


@pytest.mark.parametrize("n", [8, 9, 16, 40, 200])
@pytest.mark.parametrize("foreground", ["dark", "bright"])
def test_position_drops_blobs_in_a_corner_unless_objects_lie_anywhere(n, foreground):
    generator = np.random.default_rng(n)
    anywhere = draw_discs(generator.integers(0, 64, (n, 12, 2)), 3)
    middle = draw_discs(generator.integers(26, 39, (n, 1, 2)), 10)
    with_blobs = middle.copy()
    with_blobs[::3, :7, :7] = 1
    for drawn, expected in ((anywhere, anywhere), (with_blobs, middle)):
        images = np.repeat(200 - 120 * drawn[..., None], 3, axis=3)
        if foreground == "bright":
            images = 255 - images
        masks, _ = pretrain.refined_masks(images, foreground, ["position"])
        assert np.array_equal(masks, expected)


def test_pseudo_mask_is_of_the_very_view():
    method = pretrain.MedSASS("resnet50", foreground="dark")
    image = torch.from_numpy(rng.integers(0, 256, (3, 48, 48), np.uint8))
    for view, mask in (method.augment(image), method.plain(image)):
        expected = pretrain.pseudo_mask(view.permute(1, 2, 0).numpy()[None], "otsu", "dark")
        assert view.dtype == torch.uint8 and np.array_equal(mask, expected)
    assert torch.equal(view, image)


@pytest.mark.parametrize("n, size, seed, lengths", [            # lengths: of each rank's batches
    (33, 16, 3, [[16, 17]]), (39, 16, 3, [[16, 23]]), (40, 16, 3, [[16, 16, 8]]),
    (5, 2, 3, [[2, 3]]),
    (33, 8, 3, [[8, 9], [8, 8]]), (33, 8, None, [[8, 8], [8, 9]]), (7, 2, None, [[2, 3], [2]]),
    (10, 1, 3, [[1, 2], [1, 2], [1, 1], [1, 1]])])
def test_batches_cover_an_epoch_once_and_none_is_small(n, size, seed, lengths):
    shares = [list(pretrain.Batches(n, size, seed, shard=(rank, len(lengths))))
              for rank in range(len(lengths))]
    assert [[len(batch) for batch in share] for share in shares] == lengths
    indices = [index for share in shares for batch in share for _, index in batch]
    assert sorted(indices) == list(range(n))


def test_batches_of_two_ranks_or_after_a_stop_are_those_of_one_run():
    whole = list(pretrain.Batches(33, 16, seed=3))
    assert list(pretrain.Batches(33, 16, seed=4)) != whole
    cut = pretrain.Batches(33, 16, seed=3)
    cut.done = 1
    assert list(cut) == whole[1:]
    several = sum(pretrain.Batches(5, 4, seed=3, epoch_size=10), [])         # of (pass, image)
    assert sorted(several) == [*itertools.product((0, 1), range(5))]
    shares = [pretrain.Batches(33, 8, seed=3, shard=(rank, 2)) for rank in range(2)]
    for both, one, two in zip(whole, *shares, strict=True):
        assert {*one, *two} == {*both}


# ----------------------------------------------------------------------------------------- pretrain

def resumed(data, out, *flags):
    """The folder of a run that was killed before its second last.pt, and went on."""
    killed(f"pretrain.main({command(data, out, *flags)})")
    return train(data, out, *flags)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def load(path):
    return torch.load(path, weights_only=True)


def encoder_of(folder):
    return load(folder / "encoder.pth")


def differing(state, other):
    """The names of the tensors of `state` that are not the same in `other`."""
    return {name for name, value in state.items() if not torch.equal(value, other[name])}


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A folder with a data set "demo" of eight images to train on."""
    folder = tmp_path_factory.mktemp("small")
    prepare(write_folder(folder / "raw"), folder, "--name", "demo")
    return folder


def test_run_folder_is_complete(run):
    files = {"config.json", "log.csv", "last.pt", "best.pt", "encoder.pth", "samples.png"}
    assert set(os.listdir(run)) == files
    rows = pretrain.read_log(run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"train_loss", "val_loss", "pseudo_foreground", "seconds", "waited"} < set(rows[0])


def test_no_true_mask_is_read_and_workers_do_not_matter(data, run, tmp_path):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*_masks.npy"))
    blind = train(tmp_path / "data", tmp_path, "--workers", "2")
    assert contents(blind) == contents(run)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    np.save(tmp_path / "train_images.npy", np.zeros((2000, 64, 64, 3), np.uint8))
    tracemalloc.start()
    images = pretrain.Images(tmp_path, "train", torchvision.transforms.v2.Identity(), 0)
    assert images[0, 1999][1].shape == (3, 64, 64)
    assert tracemalloc.get_traced_memory()[1] < 10 ** 6
    tracemalloc.stop()


@pytest.mark.parametrize("flags", [
    ["--workers", "1"],
    ["--save-minutes", "0"]])                                   # saved after every step
def test_killed_run_resumes_to_the_bit(flags, data, run, tmp_path):
    folder = resumed(data, tmp_path, *flags)
    assert contents(folder) == contents(run)
    assert len(pretrain.read_log(folder)) == len(pretrain.read_log(run))


@pytest.fixture
def copied_run(run, tmp_path):
    """A copy of the run where train(data, tmp_path) has its folder."""
    return Path(shutil.copytree(run, tmp_path / run.relative_to(run.parents[3])))


def test_finished_run_is_left_alone_or_completed(data, run, copied_run, tmp_path):
    folder = copied_run
    before = (folder / "last.pt").stat()
    assert before.st_size < 10_000                              # its weights are in best.pt alone
    train(data, tmp_path)
    assert (folder / "last.pt").stat() == before
    for name in ("samples.png", "encoder.pth"):                 # as if killed before the last files
        (folder / name).unlink()
    train(data, tmp_path)
    assert contents(folder) == contents(run) and (folder / "samples.png").exists()


def test_encoder_only_leaves_the_decoder_as_drawn(data, tmp_path):
    folder = train(data, tmp_path, "--train", "encoder", epochs=1)
    torch.manual_seed(pretrain.seed_from(0))
    drawn = models.build_unet("resnet50", 32).state_dict()
    flags = ["--run", str(folder), "--export", str(tmp_path / "network.pt2")]
    refused(lambda: finetune_eval.main(flags), "an encoder only")
    changed = differing(drawn, weights_of(folder))
    assert "encoder.conv1.weight" in changed and "encoder.bn1.running_mean" in changed
    assert all(name.startswith("encoder.") for name in changed)


def test_training_starts_from_an_encoder(data, run, tmp_path):
    given = run / "encoder.pth"
    folder = train(data, tmp_path, "--encoder", str(given), "--lr", "0", epochs=1)
    assert "encoder_sha256" in config_of(folder)["settings"]
    changed = differing(encoder_of(folder), load(given))
    assert all("running" in name or "num_batches" in name for name in changed)


def test_both_encoders_of_byol_start_from_timms(tmp_path, monkeypatch):
    plain = timm.create_model("resnet50")
    source = plain.state_dict()
    torch.save(source, tmp_path / "timm.pth")
    method = byol.BYOL("resnet50", 32)
    pretrain.start_from(method, tmp_path / "timm.pth", "resnet50")
    assert not differing(method.encoder.state_dict(), source)
    assert not differing(method.target[0].state_dict(), source)
    monkeypatch.setattr(timm, "create_model", lambda *args, **flags: plain)
    first, again = [pretrain.start_from(method, "imagenet", "resnet50") for _ in range(2)]
    assert first == again                                       # else no run of it could go on
    monkeypatch.delattr(timm, "create_model")                   # as without a network
    refused(lambda: pretrain.start_from(method, "imagenet", "resnet50"), "imagenet", "network")


def test_patience_stops_and_exports_the_best(data, tmp_path, monkeypatch, capfd):
    """Nothing learns, so that epoch 1 stays the best; what collapses is said aloud."""
    monkeypatch.setattr(pretrain.MedSASS, "health", lambda self: dict(predicted_foreground=0))
    folder = train(data, tmp_path, "--lr", "0", "--patience", "2", epochs=30)
    assert len(pretrain.read_log(folder)) == 3
    best = load(folder / "best.pt")
    assert best["epoch"] == 1 and "every pixel background" in "".join(capfd.readouterr())
    assert not differing(prefixed("encoder.", encoder_of(folder)), best["model"])


def test_batchnorm_is_settled_on_plain_training_images(data, run):
    """The mean over batches of one size is that over all images."""
    encoder = encoder_of(run)
    images = torch.from_numpy(np.load(data / "demo/train_images.npy")).permute(0, 3, 1, 2)
    maps = F.conv2d(pretrain.normalise(images), encoder["conv1.weight"], stride=2, padding=3)
    assert torch.allclose(maps.mean(dim=(0, 2, 3)), encoder["bn1.running_mean"], atol=1e-5)


@pytest.mark.parametrize("flags, name", [
    ("--train encoder --threshold ght --loss dice --foreground dark --epochs 20 --batch-size 8"
     " --amp bf16", "medsass-encoder-ght-dice-dark-e20-b8-bf16"),
    ("--encoder a/encoder.pth --epochs 1 --lr 0", "medsass-from-encoder-e1-lr0.0"),
    ("--refine", "medsass+"),
    ("--refine position frame channel", "medsass+"),
    ("--refine frame channel", "medsass+channel-frame"),
    ("--method simsiam --threshold ght --patience 0 --lr 3e-3", "simsiam-lr0.003")])
def test_variants_name_their_folder(flags, name, data):
    args = pretrain.parse_args(["--dataset", "demo", "--seed", "3", *flags.split()])
    meta = prepare_data.read_meta(data / "demo")
    settings, folder = pretrain.run_settings(args, pretrain.build_method(args, meta), meta)
    assert str(folder) == f"runs/demo/resnet50/{name}/seed3"
    assert settings["data"] == meta["fingerprint"]


@pytest.fixture(scope="session")
def lens_data(tmp_path_factory):
    """A folder with a data set "demo" of dark discs seen through a lens, clearest in blue."""
    raw = tmp_path_factory.mktemp("raw")
    lens = cv2.circle(np.zeros((48, 48), np.uint8), (24, 24), 28, 1, -1)
    for k in range(20):
        gray, disc = spot(48, 48, k)
        image = np.dstack([255 - gray] * 3)
        image[..., :2] += rng.integers(0, 60, (48, 48, 2), np.uint8)
        image[lens == 0] = 3
        save_image(raw / f"{k}.png", image)
        save_image(raw / f"{k}_mask.png", disc * 255)
    folder = tmp_path_factory.mktemp("lens")
    prepare(raw, folder, "--name", "demo", "--foreground", "dark", "--size", "48")
    return folder


@pytest.fixture(scope="session")
def refined_run(lens_data, tmp_path_factory):
    return train(lens_data, tmp_path_factory.mktemp("refined"), "--refine")


@pytest.mark.parametrize("flags", [
    "--amp fp16 --batch-size 2 --threshold ght --loss bce",
    "--amp bf16 --threshold adaptive_mean --loss focal"])
def test_other_precisions_thresholds_and_losses_train(flags, small_data, tmp_path):
    folder = train(small_data, tmp_path, *flags.split(), epochs=1)
    assert math.isfinite(float(pretrain.read_log(folder)[0]["train_loss"]))


def test_refined_run_learns_its_masks_and_resumes(lens_data, refined_run, tmp_path):
    evidence = config_of(refined_run)["refinement"]
    assert evidence["channel"] == "blue" and evidence["common_frame"] > 0
    for part in ("train", "val"):
        images, truth = prepare_data.open_part(lens_data / "demo", part)
        masks = np.load(refined_run / f"{part}_masks.npy")
        otsu = pretrain.pseudo_mask(images, foreground="dark")
        assert (masks == truth).mean() > .98 > (otsu == truth).mean()
    assert contents(resumed(lens_data, tmp_path, "--refine")) == contents(refined_run)


STOPPED_BY_ITS_GROUP = """import os, subprocess, sys, pretrain
def stop(self, step, total):
    if step == 5:                                      # by somebody else, as a cluster does
        kill = f"kill -s TERM -- -{os.getpgrp()}"
        subprocess.run(["sh", "-c", kill], start_new_session=True)
pretrain.MedSASS.after_step = stop
pretrain.main(sys.argv[1:])
"""


def fails(*arguments, cwd=HERE, **options):
    """Python ends with an error and without a traceback; the lines that it says."""
    end = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
                         **options)
    assert end.returncode in (1, 2) and "Traceback" not in end.stderr, end.stderr
    return end.stderr.splitlines()


def limit_file_size():
    """The disk is full after a megabyte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))


def test_a_stop_or_a_full_disk_inside_an_epoch_loses_nothing(data, run, tmp_path):
    flags = command(data, tmp_path, "--workers", "2")
    lines = fails("-c", STOPPED_BY_ITS_GROUP, *flags, start_new_session=True)
    assert lines[-1].startswith("stopped after step 7")
    path = tmp_path / "demo/resnet50/medsass-e2/seed0/last.pt"
    before = path.read_bytes()
    lines = fails("pretrain.py", *flags, preexec_fn=limit_file_size)
    assert "cannot be written" in lines[-1]
    assert path.read_bytes() == before and not list(path.parent.glob("*.tmp"))
    pretrain.main(flags)
    assert contents(path.parent) == contents(run)


def test_a_crash_does_not_wait_for_its_workers(data, tmp_path):
    crash = "import sys, pretrain; del pretrain.MedSASS.after_step; pretrain.main(sys.argv[1:])"
    flags = command(data, tmp_path, "--workers", "2")
    end = subprocess.run([sys.executable, "-c", crash, *flags], cwd=HERE, timeout=100)
    assert end.returncode == 1


# BatchNorm in eval mode, which would see each rank's images alone; best.pt is the last epoch's, so
# that all steps can be compared.
RANK_SCRIPT = """import os, sys
sys.path.insert(0, os.getcwd())
import torch, pretrain
torch.nn.modules.batchnorm._BatchNorm.train = lambda self, mode: torch.nn.Module.train(self, False)
pretrain.MedSASS.keep_best = False
pretrain.main(sys.argv[1:])
"""


# MedSASS' loss is of the whole batch, whatever a rank's part of it: 33 images to train on make
# batches of 16 and 17. A baseline's is a mean, here of 32 images, over parts of equal size.
@pytest.mark.parametrize("method, backbone, n_images, flags", [
    ("medsass", "resnet50", 48, ["--refine"]),                  # the first rank draws the masks
    ("medsass", "vit_small", 48, []),
    ("dino", "vit_small", 46, [])])
def test_two_ranks_follow_one_process(method, backbone, n_images, flags, tmp_path):
    prepare(write_folder(tmp_path / "raw", n=n_images), tmp_path, "--name", "set")
    (tmp_path / "ranks.py").write_text(RANK_SCRIPT)
    runs = []
    for n in (1, 2):
        script = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] * (n - 1)
        script += [tmp_path / "ranks.py", *command(tmp_path, tmp_path / f"out{n}", dataset="set")]
        more = ["--method", method, "--backbone", backbone, "--batch-size", str(16 // n), *flags]
        runs.append(subprocess.Popen([sys.executable, *script, *more], cwd=HERE))
    assert [run.wait(timeout=200) for run in runs] == [0, 0]
    one, two = sorted(tmp_path.glob("out*/set/*/*/seed0"))
    for row, other in zip(pretrain.read_log(one), pretrain.read_log(two), strict=True):
        for key in row.keys() & {"train_loss", "val_loss", "pseudo_foreground"}:
            assert float(row[key]) == pytest.approx(float(other[key]), rel=2e-3), key
    others = encoder_of(two)
    for name, weight in encoder_of(one).items():                # two Adam steps of 3.6e-4 an epoch
        assert (weight.float() - others[name].float()).abs().mean() < 2e-5, name


def test_a_run_with_other_settings_is_refused(data, copied_run, tmp_path):
    config = config_of(copied_run)
    config["settings"]["lr"] = .5
    (copied_run / "config.json").write_text(json.dumps(config))
    refused(lambda: train(data, tmp_path), copied_run, "lr (0.5 there, 0.00036 asked)")
    (copied_run / "samples.png").unlink()
    refused(lambda: score(data, tmp_path, "--run", str(copied_run)), copied_run, "not finished")


def test_losses_that_are_not_finite_end_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "bce", lambda logits, target: logits.sum() * math.nan)
    refused(lambda: train(data, tmp_path, "--loss", "bce"), "no loss was finite", "--lr")


# ---------------------------------------------------------------------------------------- baselines


PAIRINGS = [("byol", "resnet50"), ("simsiam", "resnet50"), ("dino", "resnet50"),
            ("dino", "vit_small"), ("mae", "vit_small"), ("simmim", "vit_small")]


def build(method, backbone, size=32, **kwargs):
    """A method and a batch of its views of random images."""
    torch.manual_seed(0)
    method = pretrain.METHODS[method](backbone, size, **kwargs)
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    views = zip(*map(method.augment, images), strict=True)
    return method, [torch.stack(view) for view in views]


def one_step(method, views, step=0, total_steps=10, epoch_steps=5):
    optimizer = method.optimizer()
    method.before_step(optimizer, step, total_steps, epoch_steps)
    method(views).backward()
    method.after_backward()
    optimizer.step()
    method.after_step(step, total_steps)


@pytest.mark.parametrize("name, backbone", PAIRINGS)
def test_baseline_encoder_is_plain_timm_and_learns_in_a_run_of_one_step(name, backbone):
    method, views = build(name, backbone)
    plain = timm.create_model(models.BACKBONES[backbone], num_classes=0)
    assert method.encoder.state_dict().keys() == plain.state_dict().keys()
    before = weights(method.encoder)
    one_step(method, views, total_steps=1, epoch_steps=1)
    assert torch.isfinite(weights(method)).all()
    assert not torch.equal(weights(method.encoder), before)
    state = copy.deepcopy(method.state_dict())
    method.eval()(views)                                        # as validation does
    assert not differing(method.state_dict(), state)


@pytest.mark.parametrize("name, backbone", [*PAIRINGS, ("medsass", "resnet50")])
def test_losses_are_taken_in_float32_under_autocast(name, backbone):
    method, views = build(name, backbone)
    values = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = copy.deepcopy(method)(views)
        assert loss.dtype == torch.float32
        values.append(loss.item())
    assert values[1] == pytest.approx(values[0], abs=.03) and values[1] != values[0]


@pytest.mark.parametrize("name", ["dino", "mae", "simmim"])
def test_baselines_refuse_sides_that_patches_do_not_divide(name):
    with pytest.raises(ValueError, match="patches of 8"):
        pretrain.METHODS[name]("vit_small", 36)


def lightlys_loss(name, method, views):
    """The loss of one of our methods, by lightly's criteria from what its networks give."""
    if name == "dino":
        encoder, head = method.student
        large, small = torch.cat(views[:2]), torch.cat(views[2:])
        student = head(torch.cat([encoder(large), encoder(small)])).chunk(10)
        criterion = lightly_loss.DINOLoss(output_dim=1024, warmup_teacher_temp=.04,
                                          teacher_temp=.04, student_temp=.1)
        loss = criterion(method.teacher(large).chunk(2), student, epoch=0)
        method.center = criterion.center.view(1, -1)
        return loss
    cosine = lightly_loss.NegativeCosineSimilarity()
    z = [method.projector(method.encoder(view)) for view in views]
    p = [method.predictor(projection) for projection in z]
    if name == "byol":
        z = [method.target(view) for view in views]
        return 4 + 2 * cosine(p[0], z[1]) + 2 * cosine(p[1], z[0])
    return (cosine(p[0], z[1].detach()) + cosine(p[1], z[0].detach())) / 2


@pytest.mark.parametrize("name, backbone", PAIRINGS[:4])
def test_loss_and_gradients_are_those_of_lightlys_criteria(name, backbone):
    ours, views = build(name, backbone)
    theirs = copy.deepcopy(ours)
    loss, expected = ours(views), lightlys_loss(name, theirs, views)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    loss.backward()
    expected.backward()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        if our.grad is not their.grad:                          # both None in target and teacher
            assert (our.grad - their.grad).norm() <= 1e-3 * their.grad.norm() + 1e-6
    if name == "dino":
        assert torch.allclose(ours.center, theirs.center)


@pytest.mark.parametrize("name, share", [("byol", .03), ("dino", .2)])
def test_target_and_teacher_are_the_exact_moving_average(name, share):
    method, views = build(name, "resnet50")
    if name == "byol":
        average, source = method.target, torch.nn.Sequential(method.encoder, method.projector)
    else:
        average, source = method.teacher, method.student
    one_step(method, views, step=2)
    before = weights(average)
    one_step(method, views, step=3, total_steps=10)
    share *= (1 + math.cos(.3 * math.pi)) / 2
    assert torch.allclose(weights(average), before.lerp(weights(source), share), atol=1e-7)
    assert not torch.equal(average[0].bn1.running_mean, source[0].bn1.running_mean)


@pytest.mark.parametrize("name, backbone, kind, rates, decays", [
    ("byol", "resnet50", "Adam", {0: 3e-5, 9: 3e-4, 505: 1.5e-4, 999: 0}, 1.5e-6),
    ("simsiam", "resnet50", "SGD", {0: .003125, 500: .0015625, 999: 0}, 1e-4),
    ("dino", "resnet50", "SGD", {99: .001875, 999: 1e-6}, 1e-4),
    ("dino", "vit_small", "AdamW", {0: 3.125e-7, 99: 3.125e-5, 999: 1e-6}, [.04, .4]),
    ("mae", "vit_small", "AdamW", {49: 9.375e-6, 525: 4.6875e-6, 999: 0}, .05),
    ("simmim", "vit_small", "AdamW", {99: 7.0710678e-5, 550: 3.5355339e-5, 999: 0}, .05),
    ("tuned", "resnet50", "Adam", {0: 3.6e-6, 99: 3.6e-4, 550: 1.8e-4, 999: 0}, 1e-5)])
def test_optimizer_in_a_run_of_1000_steps(name, backbone, kind, rates, decays):
    method = (pretrain.METHODS | dict(tuned=finetune_eval.FineTuning))[name](backbone, 32)
    optimizer = method.optimizer()
    assert type(optimizer).__name__ == kind
    assert len(optimizer.param_groups) == 1 + (name not in ("byol", "tuned"))   # biases, no decay
    for step, lr in rates.items():
        method.before_step(optimizer, step, 1000, 10)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-6, abs=2e-8)
    for step, decay in zip((0, 1000), np.broadcast_to(decays, 2), strict=True):
        method.before_step(optimizer, step, 1000, 10)
        found = max(group["weight_decay"] for group in optimizer.param_groups)
        assert found == pytest.approx(decay)


def test_simmim_s_class_token_and_positions_do_not_decay():
    method = simmim.SimMIM("vit_small", 32)
    [free] = [group["params"] for group in method.optimizer().param_groups
              if not group["weight_decay"]]
    assert {method.encoder.cls_token, method.encoder.pos_embed} < {*free}


@pytest.mark.parametrize("name, outputs, healthy, is_collapsed", [
    ("byol", torch.eye(64), [1], False), ("byol", torch.ones(64, 64), [0], True),
    ("simsiam", torch.eye(64), [1], False), ("simsiam", torch.ones(64, 64), [0], True),
    ("dino", torch.eye(64), [1, 0], False), ("dino", torch.eye(64)[[3] * 32], [0, 0], True),
    ("dino", torch.full((32, 64), 1 / 64), [1, 1], True)])
def test_health_shows_a_collapse(name, outputs, healthy, is_collapsed):
    method = pretrain.METHODS[name]
    after_forward = argparse.Namespace(z=outputs, q=outputs)
    health = method.health(after_forward)
    assert [*health.values()] == pytest.approx(healthy, abs=.01)
    assert bool(method.collapsed(None, health)) == is_collapsed


@pytest.fixture(scope="module")
def dino_vit():
    return build("dino", "vit_small", prototypes=50)


def test_dino_views_and_head(dino_vit):
    method, views = copy.deepcopy(dino_vit)
    assert [view.shape[-1] for view in views] == [32] * 2 + [16] * 8
    method.student[1].prototypes.weight.data *= 7               # their length does not matter
    assert method.student(views[0]).abs().max() <= 1 + 1e-6


def test_dino_s_prototypes_are_frozen_in_the_first_epoch(dino_vit):
    method, views = copy.deepcopy(dino_vit)
    prototypes = method.student[1].prototypes.weight
    start = prototypes.clone()
    one_step(method, views, step=4, epoch_steps=5)
    assert torch.equal(prototypes, start)
    one_step(method, views, step=5, epoch_steps=5)
    assert not torch.equal(prototypes, start)


def test_dino_s_momentum(dino_vit):
    momenta = [dino_vit[0].momentum(step, 5000) for step in (0, 2500, 5000)]
    assert momenta == pytest.approx([.996, .998, 1]) and dino_vit[0].momentum(0, 200) == .95


@pytest.fixture(scope="module")
def mae_64():
    return build("mae", "vit_small", size=64)


def test_mae_patches_and_their_target(mae_64):
    method, (images,) = mae_64
    p = images[1, :, 8:16, 8:16].flatten()
    assert torch.equal(method.patchify(images)[1, 9], p)
    expected = (p - p.mean()) / (p.var() + 1e-6).sqrt()
    assert torch.allclose(method.target(images)[1, 9], expected, atol=1e-4)
    assert torch.equal(method.unpatchify(method.patchify(images)), images)


def test_mae_loss_and_error_are_of_hidden_patches_alone(mae_64):
    method, (images,) = mae_64
    torch.manual_seed(1)
    loss = method([images]).item()
    torch.manual_seed(1)
    latent, mask, restore = method.encode(images)
    hidden = method.target(images)[mask]
    error = (method.decode(latent, restore)[mask] - hidden).square().mean().item()
    assert loss == pytest.approx(error, rel=1e-5)
    of_a_constant = hidden.view(-1, 3, 64).numpy().var(axis=(0, 2)).mean()      # one a channel
    assert method.health()["error"] == pytest.approx(error / of_a_constant, rel=1e-4)


def test_mae_encodes_what_is_not_hidden_as_lightly(mae_64):
    method, (images,) = mae_64
    theirs = modules.MaskedVisionTransformerTIMM(vit=copy.deepcopy(method.encoder))
    theirs.vit.load_state_dict(method.encoder.state_dict())     # lightly draws weights of its own
    latent, mask, restore = method.encode(images)
    assert torch.equal(mask, restore >= 16)                     # of 64: a quarter is seen
    kept = F.pad(restore.argsort(dim=1)[:, :16] + 1, (1, 0))    # and the class token, 0
    assert torch.allclose(latent, theirs.encode(images, idx_keep=kept), atol=1e-5)


def test_mae_positions_are_lightlys():
    theirs = lightly_utils.get_2d_sine_cosine_positional_embedding(16, 3, cls_token=True)
    assert np.allclose(mae.sincos_positions(16, 3)[0], theirs, atol=1e-6)


@pytest.mark.parametrize("size", [64, 80, 224])
def test_simmim_hides_blocks_of_four_patches(size):
    mask = simmim.SimMIM("vit_small", size).draw_mask(50)
    side, blocks = size // 8, math.ceil(size / 32)
    corners = mask[:, ::4, ::4]
    assert (corners.sum(dim=(1, 2)) == math.ceil(.6 * blocks ** 2)).all()
    whole = corners.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(whole[:, :side, :side], mask)


@pytest.fixture(scope="module")
def simmim_64():
    return build("simmim", "vit_small", size=64)


def test_simmim_loss_and_error_are_of_hidden_pixels_alone(simmim_64):
    method, (images,) = simmim_64
    torch.manual_seed(2)
    loss = method([images]).item()
    torch.manual_seed(2)
    mask = method.draw_mask(4)
    hidden = method.pixels_of(mask)[:, 0]
    drawn = method.reconstruct(images, mask)
    pixels, drawn = [part.detach().movedim(1, 3)[hidden] for part in (images, drawn)]
    error = F.l1_loss(drawn, pixels).item()
    assert loss == pytest.approx(error, rel=1e-5)
    of_a_constant = F.l1_loss(pixels, pixels.median(dim=0).values.expand_as(pixels)).item()
    assert method.health()["error"] == pytest.approx(error / of_a_constant, rel=1e-4)


def test_simmim_does_not_see_what_is_hidden(simmim_64):
    method, (images,) = simmim_64
    mask = method.draw_mask(4)
    noise = images.where(~method.pixels_of(mask), torch.randn_like(images))
    assert torch.equal(method.reconstruct(noise, mask), method.reconstruct(images, mask))


def test_simmim_is_timm_s_forward_where_nothing_is_hidden(simmim_64):
    method, (images,) = simmim_64
    tokens = method.encoder.forward_features(images)[:, 1:]
    expected = method.head(tokens.transpose(1, 2).reshape(4, 384, 8, 8))
    drawn = method.reconstruct(images, torch.zeros(4, 8, 8, dtype=torch.bool))
    assert torch.allclose(drawn, expected, atol=1e-5)


DIE_BEFORE_THE_SECOND_SAVE = """
import os, signal
import finetune_eval, pretrain

replace, saves = os.replace, []

def replace_or_die(source, target):
    if str(target).endswith("last.pt"):
        saves.append(target)
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
"""


def killed(call):
    """Run `call` in a process that kills itself just before its second last.pt is in place."""
    end = subprocess.run([sys.executable, "-c", DIE_BEFORE_THE_SECOND_SAVE + call], cwd=HERE,
                         capture_output=True, text=True)
    assert end.returncode == -signal.SIGKILL, end.stderr


@pytest.mark.parametrize("name, backbone, logged", [
    ("byol", "resnet50", "std"), ("dino", "vit_small", "entropy_single"),
    ("mae", "vit_small", "error")])
def test_killed_baselines_resume_to_the_bit_and_are_scored(name, backbone, logged, small_data,
                                                           tmp_path):
    """One a family: moving average; with centre and schedules; masks drawn in the forward pass."""
    flags = ["--method", name, "--backbone", backbone, "--batch-size", "4"]
    whole = train(small_data, tmp_path / "whole", *flags)
    cut = resumed(small_data, tmp_path / "cut", *flags, "--workers", "1")
    assert contents(cut) == contents(whole) and logged in pretrain.read_log(cut)[0]
    assert sum(path.stat().st_size for path in cut.iterdir()) < 100e6       # no heads, no copies
    assert score(small_data, tmp_path, "--run", str(cut))[1]["method"] == name


@pytest.mark.parametrize("name, backbone", [("byol", "resnet50"), ("mae", "vit_small"),
                                            ("simsiam", "resnet50"), ("simmim", "vit_small")])
def test_baselines_learn_in_three_epochs(name, backbone, data, tmp_path):
    log = pretrain.read_log(train(data, tmp_path, "--method", name, "--backbone", backbone,
                                  epochs=3))
    assert float(log[-1]["train_loss"]) < float(log[0]["train_loss"])


def test_flags_of_medsass_are_ignored_by_baselines(data, tmp_path, capsys):
    train(data, tmp_path, "--method", "simsiam", "--threshold", "ght", "--loss", "dice", "--lr",
          "0", "--batch-size", "64")
    out = capsys.readouterr().out
    assert "--threshold is not used" in out and "--loss is not used" in out
    assert "weights of epoch 2 are kept" in out         # the last, though its loss is no better


# ------------------------------------------------------------------------------------ finetune_eval

def test_segmentation_scores_equal_sklearn_and_smp():
    pred = rng.random((5, 12, 10)) < .4
    target = rng.random((5, 12, 10)) < .3
    pred[3], target[3] = False, False                   # nothing to find, nothing found
    pred[4], target[4] = True, False                    # nothing to find, something found
    ours = finetune_eval.segmentation_scores(pred, target)
    for name, theirs in dict(iou="jaccard", dice="f1", precision="precision", recall="recall",
                             accuracy="accuracy").items():
        score_of = getattr(sklearn.metrics, f"{theirs}_score")
        assert ours[f"{name}_global"] == pytest.approx(score_of(target.ravel(), pred.ravel()))
    counts = smp.metrics.get_stats(torch.tensor(pred[:3, None]).long(),
                                   torch.tensor(target[:3, None]).long(), mode="binary")
    three = smp.metrics.iou_score(*counts, reduction="micro-imagewise").item()
    assert ours["iou_image"] == pytest.approx((3 * three + 1 + 0) / 5)
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


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def load_unet(run):
    unet = models.build_unet("resnet50")
    unet.load_state_dict(weights_of(run))
    return unet.eval()


def weights_of(folder):
    return load(folder / "best.pt")["model"]


def test_transfer_scores_the_saved_network(data, run, tmp_path):
    path, result = score(data, tmp_path, "--run", str(run))
    assert path.relative_to(tmp_path) == Path("demo/resnet50/medsass-e2/seed0/transfer.json")
    assert path.with_suffix(".png").exists()
    images, masks = [np.array(part) for part in prepare_data.open_part(data / "demo", "test")]
    pixels = torch.tensor(images).permute(0, 3, 1, 2) / 255
    pixels = torchvision.transforms.v2.functional.normalize(
        pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.inference_mode():
        pred = load_unet(run)(pixels)[:, 0].numpy() > 0
    expected = finetune_eval.segmentation_scores(pred, masks > 0)
    assert {k: result[k] for k in expected} == pytest.approx(expected, abs=2e-4)
    rows = rows_of(path.with_suffix(".csv"))
    tp, fp, fn = [sum(int(row[name]) for row in rows) for name in ("tp", "fp", "fn")]
    assert len(rows) == 32 and result["iou_global"] == pytest.approx(tp / (tp + fp + fn))
    about = dict(protocol="transfer", n_test=32, labels=0, train="end2end", method="medsass")
    assert about.items() <= result.items()


def test_a_result_is_replaced_only_by_the_same(data, run, tmp_path, monkeypatch):
    path, result = score(data, tmp_path, "--run", str(run))
    again = path.read_bytes()
    score(data, tmp_path, "--run", str(run), "--epochs", "3")       # which is not used
    assert path.read_bytes() == again
    path.write_text(json.dumps(result | {"iou_global": .99}))
    refused(lambda: score(data, tmp_path, "--run", str(run)), path, "iou_global", "--overwrite")
    monkeypatch.setattr(finetune_eval, "segment", None)         # it is said before any training
    path.write_text(json.dumps(result | {"weights_sha256": "0"}))
    refused(lambda: score(data, tmp_path, "--run", str(run)), path, "weights_sha256")
    path.write_text("")
    refused(lambda: score(data, tmp_path, "--run", str(run)), path, "cannot be read")


def test_encoder_runs_and_files_get_a_fresh_seeded_decoder(data, run, vit_run, tmp_path):
    def iou(name, *flags):
        return score(data, tmp_path / name, *flags)[1]["iou_global"]

    encoder = ["--encoder", str(run / "encoder.pth"), *ON_DEMO]
    assert iou("a", *encoder) == iou("b", *encoder) != iou("c", *encoder, "--seed", "1")
    assert iou("a", *encoder) != iou("d", "--run", str(run))
    vit = ["--encoder", str(vit_run / "encoder.pth"), "--dataset", "demo", "--backbone"]
    iou("e", *vit, "vit_small")
    refused(lambda: iou("f", *vit, "resnet50"), vit[1], "vit_small")


def test_reference_rows_by_hand(data, tmp_path):
    _, result = score(data, tmp_path, "--protocol", "reference", *ON_DEMO)
    images, masks = [np.array(part) for part in prepare_data.open_part(data / "demo", "test")]
    raw = [image[..., 0] > skimage.filters.threshold_otsu(image[..., 0]) for image in images]
    train_images, truths = prepare_data.open_part(data / "demo", "train")
    truths = np.array(truths) > 0
    cuts = [truths.mean(axis=0) >= k / len(truths) for k in range(1, len(truths) + 1)]
    constant = max(cuts, key=lambda cut: (cut & truths).sum() / (cut | truths).sum())
    refinement, _ = pretrain.decide_refinement(train_images, "bright")
    expected = dict(all_foreground=True, all_background=False, best_constant=constant,
                    raw_threshold=raw, raw_threshold_inverted=np.invert(raw),
                    refined_threshold=[refinement.draw(image) for image in images])
    for name, pred in expected.items():
        pred = np.broadcast_to(pred, masks.shape)
        scores = finetune_eval.segmentation_scores(pred, masks > 0)
        assert {key: result[name][key] for key in scores} == pytest.approx(scores)
    assert result["best_constant"]["uses_labels"] and "random_init" in result
    assert .5 < result["raw_threshold"]["iou_global"] < .9      # neither trivial nor hopeless


def test_hausdorff_equals_all_distances_of_boundary_pixels():
    def edge(mask):
        p = np.pad(mask, 1)
        inner = p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
        return np.argwhere(mask & ~inner)

    blobs = [cv2.GaussianBlur(rng.random((23, 31)), (0, 0), 2) > .5 for _ in range(6)]
    blobs.append(np.ones((23, 31), bool))
    for a, b in itertools.pairwise(blobs):
        distances = np.linalg.norm(edge(a)[:, None] - edge(b), axis=2)
        expected = max(np.percentile(distances.min(axis), 95) for axis in (0, 1))
        assert finetune_eval.hausdorff95(a, b) == pytest.approx(expected, abs=1e-9)
    empty = np.zeros((23, 31), bool)
    assert finetune_eval.hausdorff95(empty, empty) == 0
    assert finetune_eval.hausdorff95(empty, a) == math.hypot(23, 31)
    assert finetune_eval.hausdorff95(a, empty) == math.hypot(23, 31)


def test_bootstrap_equals_a_loop_over_drawn_images():
    pred = rng.random((8, 6, 5)) < .5
    target = rng.random((8, 6, 5)) < .4
    weights = finetune_eval.bootstrap_weights(tuple("aabcccde"))[:50]
    samples = finetune_eval.resampled_scores(finetune_eval.count_pixels(pred, target), weights)
    for k, weight in enumerate(weights):
        assert weight[0] == weight[1] and weight[3] == weight[4] == weight[5]   # groups stay whole
        assert weight[[0, 2, 3, 6, 7]].sum() == 5       # as many as there are
        drawn = np.repeat(np.arange(8), weight.astype(int))
        expected = finetune_eval.segmentation_scores(pred[drawn], target[drawn])
        assert {name: value[k] for name, value in samples.items()} == pytest.approx(expected)


def test_labelled_images_are_nested_and_by_group():
    names = [dict(name=f"{i}", group=f"g{i // 4}" if i < 40 else "") for i in range(50)]

    def rows(share, seed=5, of=50):
        return finetune_eval.labelled_rows(names, range(of), share, seed)

    for few, many in itertools.pairwise([.001, .1, 7 / 50, .5, 1.0]):
        assert set(rows(few)) < set(rows(many))
    assert [len(rows(share)) for share in (.001, .1, 7 / 50, .5, 1.0)] == [1, 5, 7, 25, 50]
    assert len({names[k]["group"] or k for k in rows(.5)}) < 13     # whole groups but the last
    assert rows(.5) == rows(.5) != rows(.5, seed=6)
    assert set(rows(1.0, of=8)) == set(range(8))


def test_image_and_truth_are_augmented_alike(tmp_path):
    _, truth = spot(48, 48)
    path = tmp_path / "train_masks.npy"
    np.save(path, truth[None])
    np.save(tmp_path / "train_images.npy", np.repeat(truth[None, ..., None] * 200 + 20, 3, axis=3))
    labelled = pretrain.Images(tmp_path, "train", pretrain.paper_augmentation(), 0, masks=path)
    moved = 0
    for epoch in range(30):
        _, (view, mask) = labelled[epoch, 0]
        is_wrong = (view[1] > 110) != (mask[0] == 1)
        assert is_wrong.float().mean() < .04, epoch     # edges are drawn bilinear and nearest
        moved += not np.array_equal(mask[0], truth)
    assert moved > 20


def tune(data, out, *flags, epochs=1):
    """Run finetune_eval.py with training, on the demo; returns the result, the folder of its
    training, and the JSON's path."""
    path, result = score(data, out / "results", "--epochs", str(epochs), "--workers", "0",
                         "--runs", str(out / "runs"), *flags)
    found = [*out.rglob("config.json"), *data.parent.rglob("config.json")]
    found = [config.parent for config in found if config.parent.name.startswith(path.stem)]
    return result, max(found, key=lambda folder: folder.stat().st_mtime_ns), path


def test_protocols_train_what_they_say(data, copied_run, tmp_path):
    source = weights_of(copied_run)
    of_run = ["--run", str(copied_run), "--protocol"]

    def changed(folder):
        new = weights_of(folder)
        return {name.split(".")[0] for name in new if not torch.equal(new[name], source[name])}

    frozen, folder, path = tune(data, tmp_path, *of_run, "frozen", "--labels", "0.1")
    assert changed(folder) == {"up1", "up2", "up3", "head"} and path.name == "frozen-l0.1-e1.json"
    assert (frozen["n_labels_train"], frozen["n_labels_val"]) == (6, 2)
    three = [*of_run, "finetune", "--labels", "3"]
    tuned, folder, _ = tune(data, tmp_path, *three)
    assert config_of(folder)["settings"]["decoder"] == "pretrained"
    assert tuned["n_labels_train"] == tuned["labels"] == 3 and "encoder" in changed(folder)
    _, other_folder, path = tune(data, tmp_path, *three, "--seed", "5")     # other labels
    assert other_folder.name == folder.name + "-seed5" and path.parent.name == "seed5"
    scratch, _, _ = tune(data, tmp_path, *ON_DEMO, "--protocol", "supervised")
    about = dict(method="supervised", n_labels_train=64, n_labels_val=16, budget_steps=4)
    assert about.items() <= scratch.items()
    assert frozen["budget_steps"] == tuned["budget_steps"] == 4     # few labels, same steps
    for labels, word in (("65", "64 training"), ("1.5", 2)):
        flags = [*three[:-1], labels]
        refused(lambda flags=flags: tune(data, tmp_path, *flags), word)


def test_supervised_is_fine_tuning_of_an_untrained_encoder(data, tmp_path):
    encoder = tmp_path / "untrained.pth"
    torch.manual_seed(pretrain.seed_from(0))            # as pre-training does
    models.export_encoder(models.build_unet("resnet50"), encoder)
    few = [*ON_DEMO, "--labels", "2", "--protocol"]
    _, scratch, _ = tune(data, tmp_path, *few, "supervised")
    _, tuned, _ = tune(data, tmp_path, *few, "finetune", "--encoder", str(encoder))
    assert contents(scratch, ["encoder.pth"]) == contents(tuned, ["encoder.pth"])
    assert weights_of(scratch)["head.weight"].equal(weights_of(tuned)["head.weight"])


def test_half_of_what_a_partly_labelled_set_gives_is_labelled(data):
    masks = data / "demo/train_masks.npy"
    plain = torchvision.transforms.v2.Identity()
    images = finetune_eval.PartlyLabelled(data / "demo", plain, 0, [5, 9], masks)
    drawn = [images[epoch, k] for epoch in (0, 1) for k in range(64)]
    rows = [row for row, _ in drawn]
    assert rows.count(5) == rows.count(9) == 33 and set(rows) == set(range(64))
    row, (_, mask) = drawn[2]
    assert np.array_equal(mask[0], np.load(masks)[row])


@pytest.mark.parametrize("ious, trusted", [             # the signs are at odds, in both
    ((.77, .50, .51, .37), True), ((.88, .87, .82, .76), False)])
def test_semi_weighs_validation_labels_against_agreement(ious, trusted, data, tmp_path,
                                                         monkeypatch):
    left = iter(ious)
    monkeypatch.setattr(finetune_eval, "scores_from_counts", lambda counts: dict(iou=next(left)))
    job = argparse.Namespace(data=data / "demo", device="cpu")
    sets = [argparse.Namespace(rows=[3, 5])] * 3
    decision = finetune_eval.compare_tuned(Local(), {}, {}, sets, job, tmp_path)
    assert decision["trusted"] == trusted and next(left, None) is None


def test_semi_trusts_labels_that_teach_more_than_pseudo_masks(data, copied_run, tmp_path,
                                                              monkeypatch):
    """Its second half does not repeat the order and augmentations of the first."""
    seeds, plain_train = [], pretrain.train

    def noted_train(method, sets, options, *more):
        seeds.append(options.seed + sets[0].seed)
        plain_train(method, sets, options, *more)

    monkeypatch.setattr(pretrain, "train", noted_train)
    result, _, _ = tune(data, tmp_path, "--run", str(copied_run), "--protocol", "semi",
                        "--labels", "0.5", epochs=6)
    about = dict(trusted=True, n_labels_train=32, budget_steps=24)
    assert about.items() <= result.items() and len({*seeds}) == 2


def test_semi_draws_the_missing_masks_where_labels_ruin_the_network(data, run, tmp_path,
                                                                    monkeypatch):
    """A large rate ruins the tuned one. No other label is read; killed, it goes on to the bit."""
    _, supervised, _ = tune(data, tmp_path, *ON_DEMO, "--protocol", "supervised", epochs=8)
    good = Path(shutil.copytree(run, tmp_path / "good"))
    shutil.copy(supervised / "best.pt", good / "best.pt")       # as if it had seen no label
    blind = Path(shutil.copytree(data, tmp_path / "blind"))
    shutil.copytree(good, blind / "run")
    few = ["--protocol", "semi", "--labels", "2", "--lr", "0.2", "--run"]
    result, folder, _ = tune(data, tmp_path, *few, str(good), epochs=2)
    assert not result["trusted"] and result["agreement"] < .8 * result["pretrained_iou"]
    images, truth = [np.array(part) for part in prepare_data.open_part(data / "demo", "train")]
    names = prepare_data.read_names(data / "demo", "train")
    rows = finetune_eval.labelled_rows(names, range(64), 2 / 64, 0)
    is_labelled = np.isin(np.arange(64), rows)
    drawn = finetune_eval.predict_logits(load_unet(good), images, "cpu") > 0
    masks = np.load(folder / "labels/train_masks.npy")
    assert np.array_equal(masks[is_labelled], truth[is_labelled])
    assert (masks[~is_labelled] == drawn[~is_labelled]).mean() > .999
    truth[~is_labelled] = 1
    np.save(blind / "demo/train_masks.npy", truth)
    flags = [*few, str(blind / "run"), "--data", str(blind), "--out", str(blind / "results"),
             "--epochs", "2", "--workers", "0", "--device", "cpu"]
    killed(f"finetune_eval.main({flags})")
    assert not list((blind / "results").rglob("*.json"))
    finetune_eval.main(flags)
    assert contents(blind / "run" / folder.name) == contents(folder)
    [path] = (blind / "results").rglob("*.json")
    assert json.loads(path.read_text())["iou_global"] == result["iou_global"]
    monkeypatch.setattr(finetune_eval, "compare_tuned", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):              # a stop between the halves
        finetune_eval.main([*flags, "--overwrite"])
    assert not (blind / "run" / folder.name / "samples.png").exists()


def test_semi_trains_on_images_that_have_no_mask(data, copied_run, tmp_path):
    some = Path(shutil.copytree(data, tmp_path / "some"))
    truth = np.load(some / "demo/train_masks.npy")[:6]
    np.save(some / "demo/train_masks.npy", truth)
    flags = ["--run", str(copied_run), "--protocol", "semi", "--lr", "0.2"]     # ruins the tuned
    result, folder, _ = tune(some, tmp_path, *flags, epochs=2)
    assert (result["n_labels_train"], result["budget_steps"], result["trusted"]) == (6, 8, False)
    masks = np.load(folder / "labels/train_masks.npy")
    assert np.array_equal(masks[:6], truth) and masks[6:].any() and len(masks) == 64
    refused(lambda: tune(some, tmp_path, *flags, "--labels", "7", epochs=2), "6 training images")


def test_a_network_that_saw_labels_is_only_scored_and_on_the_same_split(data, tmp_path):
    _, tuned, _ = tune(data, tmp_path, *ON_DEMO, "--protocol", "supervised", "--labels", "2")
    for protocol in ("finetune", "semi"):
        more = ["--run", str(tuned), "--protocol", protocol]
        refused(lambda more=more: score(data, tmp_path, *more), tuned, "has seen labels")
    other = tmp_path / "other"
    prepare_data.main(["--dataset", "demo", "--size", "32", "--out", str(other), "--seed", "3"])
    refused(lambda: score(other, tmp_path, "--run", str(tuned)), "another preparation of demo")


def test_test_masks_are_never_seen_before_the_score(data, tmp_path):
    shutil.copytree(data, tmp_path / "noisy")
    np.save(tmp_path / "noisy/demo/test_masks.npy", rng.integers(0, 2, (32, 32, 32), np.uint8))
    flags = [*ON_DEMO, "--protocol", "supervised", "--labels", "8"]
    clean, folder, _ = tune(data, tmp_path / "clean", *flags)
    other, other_folder, _ = tune(tmp_path / "noisy", tmp_path / "other", *flags)
    assert contents(folder) == contents(other_folder)
    assert clean["iou_global"] != other["iou_global"]


@pytest.fixture(scope="module")
def labelled_data(tmp_path_factory):
    """A folder with a data set "demo" of two classes: every other image is much darker."""
    raw = write_folder(tmp_path_factory.mktemp("raw"), n=30)
    lines = ["name,label"]
    for k, path in enumerate(sorted((raw / "images").iterdir())):
        lines.append(f"{path.stem},{('bright', 'dull')[k % 2]}")
        Image.fromarray(np.array(Image.open(path)) // (1 + k % 2 * 4)).save(path)
    del lines[8]                                        # one has no label
    (raw / "labels.csv").write_text("\n".join(lines))
    folder = tmp_path_factory.mktemp("labelled")
    prepare(raw, folder, "--name", "demo")
    return folder


PROBE = ["--protocol", "classify", "--lr", "0.05", "--batch-size", "8", *ON_DEMO, "--encoder"]


@pytest.mark.parametrize("widths", [dict(layer2=512), dict(layer2=512, layer4=2048)])
def test_linear_probe_learns_on_an_encoder_that_stays(widths, labelled_data, tmp_path):
    torch.manual_seed(0)
    whole = timm.create_model("resnet50", zero_init_last=False)
    encoder = tmp_path / "some.pth"
    torch.save((whole if len(widths) == 2 else models.build_unet("resnet50").encoder).state_dict(),
               encoder)
    result, folder, path = tune(labelled_data, tmp_path, *PROBE, str(encoder), epochs=20)
    kept = weights_of(folder)
    for name, value in load(encoder).items():
        assert name.startswith("fc.") or "layer3" in name or value.equal(kept[f"encoder.{name}"])
    assert [kept[f"linear.{k}.weight"].shape[1] for k in range(len(widths))] == [*widths.values()]
    rows = rows_of(path.with_suffix(".csv"))
    truth = [row["label"] for row in rows]
    pred = [row["prediction"] for row in rows]
    recall = sklearn.metrics.recall_score(truth, pred, average="macro")
    confusion = sklearn.metrics.confusion_matrix(truth, pred, labels=result["classes"])
    assert result["macro_recall"] == pytest.approx(recall) and recall > .8
    assert result["confusion"] == confusion.tolist() and result["n_test"] == len(rows)
    lines = [line.split(" | ") for line in report_of(tmp_path / "results").splitlines()]
    stages = [line[2] for line in lines if line[0].startswith("| file-some: classify")]
    assert set(stages) == set(widths) and stages[0] == result["stage"] == [*widths][-1]


def test_focal_cross_entropy_equals_its_definition():
    logits = torch.randn(6, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, 1, 1, 2, 0])
    p = torch.softmax(logits, dim=1).numpy()[range(6), target]
    expected = (-(1 - p) ** 2 * np.log(p)).mean()
    assert finetune_eval.focal_cross_entropy(logits, target).item() == pytest.approx(expected)


def fake_result(out, variant, seed, quality, protocol="transfer", dataset="isic", data="x", **more):
    """A result with its CSV, of 20 images in which a share `quality` of the foreground is found;
    returns its IoU."""
    names = [dict(name=f"i{k}", group="") for k in range(20)]
    target = np.random.default_rng(1).random((20, 16, 16)) < .3
    pred = target & (np.random.default_rng(seed).random((20, 16, 16)) < quality)
    table = finetune_eval.score_masks(pred, target)
    row = "raw_threshold" if protocol == "reference" else ""
    block = finetune_eval.summarise(table, finetune_eval.groups_of(names))
    result = dict(dataset=dataset, backbone="resnet50", method=variant.split("-")[0], data=data,
                  variant=variant, protocol=protocol, labels=0.0, seed=seed, n_test=20,
                  train="encoder" if variant == "byol" else "end2end", threshold="otsu",
                  loss="focal_tversky", epochs=50, batch_size=16, img_size=224, name=protocol,
                  command=f"python {variant}", earlier_commands=["python first"])
    result |= ({row: block} if row else block) | more
    path = out / dataset / data / variant / f"seed{seed}" / f"{protocol}.json"
    pretrain.write_json(path, result)
    pretrain.write_csv(path.with_suffix(".csv"), finetune_eval.per_image(row, table, names))
    return block["iou_global"]


def report_of(out):
    finetune_eval.main(["--report", "--out", str(out)])
    return (out / "README.md").read_text(encoding="utf-8")


def test_report_shows_what_is_there_and_names_what_is_not(tmp_path, capsys):
    out = tmp_path / "results"
    iou = [fake_result(out, "medsass", seed, .8) for seed in range(3)]
    fake_result(out, "byol", 0, .5)
    fake_result(out, "medsass+", 0, .7)
    raw = fake_result(out, "reference", 0, .5, "reference")
    trained = dict(n_labels_train=20, n_labels_val=4, budget_steps=9, labels=.1)
    fake_result(out, "supervised", 0, .9, "supervised", **trained)
    fine = fake_result(out, "medsass", 0, .85, "finetune", **trained)
    other = fake_result(out, "medsass", 0, .7, dataset="my set")            # of the same arrays
    fake_result(out, "medsass-finetune", 0, .9, dataset="xray", data="z", **trained)
    for seed in (0, 1):                                         # prepared twice: never pooled
        fake_result(out, "medsass-e9", seed, .6, dataset="dm", data=f"{seed}abcdefgh", epochs=9)
    no_results = {"broken.json": "{", "foreign.json": '{"a": [1]}', "list.json": "[3]"}
    for name, text in no_results.items():
        (out / name).write_text(text)
    shutil.copytree(out / "isic/x/medsass/seed1", out / "copy")
    (out / "copy/transfer.csv").unlink()
    old = Path(shutil.copytree(out / "isic/x/medsass/seed1", out / "old")) / "transfer.json"
    old.write_text(old.read_text().replace('hd95_image"', 'of an older version"'))
    text = report_of(out)
    printed = capsys.readouterr().out
    assert "12 results, 5 warnings" in printed
    for name in (*no_results, "copy/transfer.json", "old/transfer.json"):
        assert name in text and name in printed
    lines = {line.split(" | ")[0]: line for line in text[:text.index("## my set")].splitlines()}
    mean = f"{np.mean(iou):.4f} ± {np.std(iou, ddof=1):.4f} (3)"
    assert f"| medsass: transfer | 0 | {mean} |" in lines["| medsass: transfer"]
    assert "vs raw_threshold" in text and "≈" in lines["| byol: transfer"].split(" | ")[4]
    assert "≈" not in lines["| medsass: transfer"]
    tuned = lines["| medsass: finetune"].split(" | ")
    assert tuned[1] == "20 + 4" and tuned[5].startswith("-0.0")     # against supervised
    assert float(tuned[4].split()[0]) == pytest.approx(fine - raw, abs=1e-4)
    for seed in "01":
        section = text[text.index(f"## dm ({seed}abcdefg)"):]
        assert re.match(r".*?\| medsass-e9: transfer \| 0 \| [.\d]+ \(1\) \|", section, re.DOTALL)
    section = text[text.index("## my set"):text.index("## xray")]
    assert "vs best reference" in section and f"medsass: transfer | 0 | {other:.4f} (1)" in section
    assert "![my set](my%20set.png)" in text and Image.open(out / "my set.png").size[0] > 400
    paper = text[text.index("## The paper's tables"):]
    tables = paper[:paper.index("## Commands")]
    assert f"| isic | medsass: transfer | {mean}, 50 epochs, 224 px | 0.4847 |" in tables
    assert re.search(r"\| byol: transfer \| 0\.\d{4} \(1\), .* \| 0\.2412 \|", tables)
    assert "| isic | dino: transfer | - | 0.2426 |" in tables and "Table 2" not in tables
    assert re.search(r"\| dm \| medsass: transfer \| .*, 9 epochs, 224 px \| 0.1810 \|", tables)
    assert "medsass+" not in tables and "xray" not in tables    # that network saw labels
    assert paper.count("python first\n") == paper.count("python byol\n") == 1


def test_report_without_matplotlib_has_no_chart(tmp_path, capsys, monkeypatch):
    fake_result(tmp_path, "medsass", 0, .5)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ".png" not in report_of(tmp_path)
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_report_on_a_terminal_that_is_not_utf8(tmp_path):
    fake_result(tmp_path, "medsass", 0, .5, dataset="é ü")
    end = subprocess.run([sys.executable, str(HERE / "finetune_eval.py"), "--report", "--out", "."],
                         cwd=tmp_path, env=os.environ | dict(PYTHONIOENCODING="ascii"))
    assert end.returncode == 0 and "é ü" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("backbone", ["resnet50", "vit_small"])
def test_exported_network_needs_none_of_our_code(backbone, data, tmp_path, request):
    folder = request.getfixturevalue(dict(resnet50="run", vit_small="vit_run")[backbone])
    path = tmp_path / "network.pt2"
    flags = ["--run", str(folder), "--export", str(path)]
    finetune_eval.main(flags)
    refused(lambda: finetune_eval.main(flags), path, "--overwrite")
    images = np.array(prepare_data.open_part(data / "demo", "test")[0][:5])
    np.save(tmp_path / "images.npy", images.transpose(0, 3, 1, 2))
    code = ("import json, numpy, torch\n"
            "about = {'network.json': ''}\n"
            "network = torch.export.load('network.pt2', extra_files=about).module()\n"
            "about = json.loads(about['network.json'])\n"
            "assert (about['size'], about['foreground']) == (32, 'bright')\n"
            "images = torch.from_numpy(numpy.load('images.npy'))\n"
            "pair = network(images), network(images[:1])\n"
            "numpy.save('drawn.npy', torch.cat(pair).numpy())\n")
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    unet, _ = finetune_eval.whole_network(finetune_eval.parse_args(flags))
    logits = torch.tensor(finetune_eval.predict_logits(unet, images[[0, 1, 2, 3, 4, 0]], "cpu"))
    drawn = np.load(tmp_path / "drawn.npy")[:, 0]
    assert np.allclose(drawn, torch.sigmoid(logits), atol=1e-4)


def run_all(folder, *words, start=subprocess.run, **settings):
    """run_all.sh in `folder`, with no other settings in its environment, to its end; or only
    started, by subprocess.Popen."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return start(["bash", folder / "run_all.sh", *words], env=dict(settings, PATH=path), text=True,
                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def dry_run(folder, word, **settings):
    """The runs that are listed, each with what is made of it in the lines below it."""
    shutil.copy(HERE / "run_all.sh", folder)
    end = run_all(folder, word, DRY_RUN="1", **settings)
    assert not end.returncode and not end.stderr and os.listdir(folder) == ["run_all.sh"]
    return re.split(r"\n(?=python)", end.stdout.strip())


def test_dry_run_lists_each_network_with_what_is_made_of_it(tmp_path):
    listed = dry_run(tmp_path, "main", DATASETS="a b", SEEDS="0 7", BACKBONES="resnet50",
                     METHODS="medsass byol mae", PROTOCOLS="transfer semi", LABELS="0.1",
                     EPOCHS="9")
    assert len(listed) == len(set(listed)) == 4 * 6
    on = "--dataset b --backbone resnet50 --seed 7"
    transfer = "\n    python finetune_eval.py --run RUN --protocol transfer"
    semi = "\n    python finetune_eval.py --run RUN --protocol semi --labels 0.1 --epochs 9"
    assert {run for run in listed if on in run} == {
        f"python finetune_eval.py {on} --protocol reference",
        f"python finetune_eval.py {on} --protocol supervised --labels 0.1 --epochs 9",
        f"python pretrain.py {on} --epochs 9{transfer}{semi}",
        f"python pretrain.py {on} --refine --epochs 9{transfer}{semi}",
        f"python pretrain.py {on} --train encoder --epochs 9{transfer}",
        f"python pretrain.py {on} --method byol --epochs 9{transfer}"}


def test_shards_cover_each_run_of_all_parts_once(tmp_path):
    listed = dry_run(tmp_path, "all")
    assert len({run.splitlines()[0] for run in listed}) == len(listed)
    shards = [dry_run(tmp_path, "all", SHARD=shard) for shard in ("1/3", "02/3", "3/3")]
    assert all(shards) and sorted(sum(shards, [])) == sorted(listed)
    assert run_all(tmp_path, "all", SHARD="4/3").returncode == 1


@pytest.fixture
def project(tmp_path):
    """A copy of what run_all.sh needs, with scripts that are stood in for: they write what they are
    asked to, note it in `seen`, and fail or wait where a file of that name says so."""
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "data/demo").mkdir(parents=True)
    (tmp_path / "data/demo/meta.json").write_text('{"size": 64, "seed": 0}')
    (tmp_path / "data/demo/test_masks.npy").touch()
    (tmp_path / "seen").touch()
    (tmp_path / "pretrain.py").write_text("""if True:
        import os, pathlib, sys, time
        words = ' '.join(sys.argv)
        if '--report' in words:
            sys.exit()
        with open('seen', 'a') as file:
            file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {words}\\n")
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
        print(made)""")
    shutil.copy(tmp_path / "pretrain.py", tmp_path / "finetune_eval.py")
    return tmp_path


SIX = dict(DATASETS="demo", SEEDS="0", BACKBONES="resnet50", METHODS="byol simsiam",
           PROTOCOLS="transfer", LABELS="0.1")


def seen(folder):
    """What the stood-in scripts were called with so far."""
    return (folder / "seen").read_text().splitlines()


def benchmark(folder, **settings):
    """Main, which ends well, of six calls of the scripts; all calls so far."""
    assert run_all(folder, **SIX, **settings).returncode == 0
    return seen(folder)


def test_a_failed_run_stops_no_other_is_listed_and_is_tried_again(project):
    (project / "bad").write_text("--method byol")
    end = run_all(project, **SIX)
    failed = re.search(r"exit code 1: python pretrain.py .*byol\n +log: (\S+)\n$", end.stderr)
    assert end.returncode == 1 and (project / failed[1]).read_text() == "reason\n"
    assert len(seen(project)) == 5                      # its evaluation is not tried
    (project / "bad").unlink()
    calls = benchmark(project)
    assert len(calls) == 7 and "--method byol" in calls[5]


def test_what_is_finished_is_skipped_unless_it_is_gone_or_older_than_its_source(project):
    assert len(benchmark(project)) == len(benchmark(project)) == 6
    shutil.rmtree(next((project / "runs").glob("pretrain*byol*")))
    assert len(benchmark(project)) == 6 + 2             # it, and its score
    os.utime(project / "data/demo/meta.json")
    assert len(benchmark(project)) == 8 + 6


def test_what_another_process_is_at_is_tried_later(project):
    (project / "busy").write_text("--method byol")
    order = ["byol" in line for line in benchmark(project) if " pretrain.py" in line]
    assert order == [True, False, True]


def test_a_stopped_driver_stops_its_runs_and_goes_on(project):
    (project / "slow").touch()
    driver = run_all(project, start=subprocess.Popen, JOBS="2", **SIX)
    while len(seen(project)) < 2:
        time.sleep(.05)
    driver.terminate()
    assert driver.wait() == 130
    (project / "slow").unlink()
    time.sleep(1)
    assert len(seen(project)) == 2 and not (project / "runs").exists()
    benchmark(project)
    assert len(list((project / "runs").iterdir())) == 6


def test_each_gpu_gets_its_copied_runs(project):
    assert {line.split()[0] for line in benchmark(project, GPUS="3 5")} == {"3", "5"}


def test_data_that_cannot_be_scored_is_refused_before_anything_runs(project):
    for wrong in (dict(DATASETS="demo isic"), dict(SIZE="96")):
        end = run_all(project, **SIX | wrong)
        assert end.returncode == 1 and "data/" in end.stderr and not seen(project)


def test_the_scripts_print_what_they_made_last(data, run, tmp_path, capsys):
    """run_all.sh finds a run, and what is finished, by that line."""
    train(data, run.parents[3])
    finished = capsys.readouterr().out.splitlines()[-1]
    finetune_eval.main(["--run", str(run), "--data", str(data), "--out", str(tmp_path)])
    scored = capsys.readouterr().out.splitlines()[-1]
    assert [scored] == [*map(str, tmp_path.rglob("*.json"))] and finished == f"{run}/samples.png"


AT_WORK = """import os, pathlib, sys, time, prepare_data
with prepare_data.only_one(pathlib.Path(sys.argv[1])):
    if os.fork() == 0:                      # a worker that outlives its parent
        time.sleep(20)
        os._exit(0)
    print(flush=True)
    time.sleep(60)
"""


def test_two_processes_never_train_one_run(data, tmp_path):
    lock = tmp_path / "demo/resnet50/medsass-e1/seed0/.lock"
    other = subprocess.Popen([sys.executable, "-c", AT_WORK, lock], cwd=HERE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(SystemExit, match="75"):
        train(data, tmp_path, epochs=1)
    assert os.listdir(lock.parent) == [".lock"]
    other.kill()
    other.wait()                                        # a crash leaves the file, not the lock
    assert (train(data, tmp_path, epochs=1) / "samples.png").exists() and not lock.exists()


SIZES = {"a b": (50, 31), "c": (32, 32), "dé": (20, 90)}


@pytest.fixture
def predict(run, tmp_path):
    """A function that runs --predict on three images of SIZES, in "in", with other flags."""
    (tmp_path / "in").mkdir()
    for name, (width, height) in SIZES.items():
        pixels = rng.integers(0, 256, (height, width), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.tif")
    flags = ["--run", str(run), "--device", "cpu", "--predict", str(tmp_path / "in"), "--out"]
    return lambda out, *more: finetune_eval.main([*flags, str(tmp_path / out), *more])


def test_predict_draws_masks_at_each_image_s_own_size(predict, tmp_path):
    predict("out", "--overlay")
    rows = rows_of(tmp_path / "out/foreground.csv")
    shares = {row["name"]: float(row["foreground_share"]) for row in rows}
    for name, size in SIZES.items():
        mask = Image.open(tmp_path / "out" / f"{name}.png")
        assert mask.size == size == Image.open(tmp_path / "out/overlay" / f"{name}.png").size
        assert set(np.unique(mask)) <= {0, 255}
        assert np.mean(np.asarray(mask) > 0) == pytest.approx(shares[f"{name}.tif"], abs=1e-6)


def test_predict_replaces_nothing_and_names_bad_files(predict, tmp_path):
    predict("out")
    refused(lambda: predict("out"), tmp_path / "out", "--overwrite")
    refused(lambda: predict("in/out", "--overwrite"), tmp_path / "in/out", "another --out")
    (tmp_path / "in/bad.png").write_text("text")
    (tmp_path / "out/c.png").unlink()
    refused(lambda: predict("out", "--overwrite"), tmp_path / "in/bad.png", "not an image")
    assert not (tmp_path / "out/bad.png").exists() and (tmp_path / "out/c.png").exists()


def test_flips_are_the_mean_over_four_views(predict, run, tmp_path):
    predict("out", "--flips")
    image = prepare_data.read_image(tmp_path / "in/c.tif")
    turned = []
    for y, x in itertools.product((1, -1), (1, -1)):
        flipped = np.ascontiguousarray(image[::y, ::x])[None]
        logits = finetune_eval.predict_logits(load_unet(run), flipped, "cpu")[0]
        turned.append(logits[::y, ::x])
    drawn = np.asarray(Image.open(tmp_path / "out/c.png")) > 0
    assert (drawn == (np.mean(turned, axis=0) > 0)).mean() > .999


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


def test_large_pictures_are_drawn_in_tiles(predict, run, tmp_path):
    predict("out", "--tile")
    image = prepare_data.read_image(tmp_path / "in/dé.tif")
    expected = finetune_eval.predict_tiled(load_unet(run), image, 32, 32, "cpu")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/dé.png")) > 0, expected)
    refused(lambda: predict("other", "--page", "1"), "no page 1")


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


# ------------------------------------------------------------------------------------- prepare_data

def spot(height, width, *seed):
    """A picture with one bright disc on noise, gray uint8 (H, W), and its mask {0, 1}."""
    rng = np.random.default_rng(seed)
    centre = (rng.uniform(.3, .7, 2) * (width, height)).astype(int)
    mask = np.zeros((height, width), np.uint8)
    cv2.circle(mask, centre.tolist(), min(height, width) // 5, 1, -1)
    gray = rng.normal(100, 8, mask.shape) + mask * 90
    return gray.clip(0, 255).astype(np.uint8), mask


def save_image(path, picture, **how):
    """Save a picture with Pillow, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **how)


def prepared(out):
    """[(part, row of its table, image, mask or None)] of a prepared data set."""
    found = []
    for part in prepare_data.PARTS:
        images, masks = prepare_data.open_part(out, part)
        rows = prepare_data.read_names(out, part)
        assert len(rows) == len(images)
        for k, row in enumerate(rows):
            found.append((part, row, images[k], masks if masks is None else masks[k]))
    return found


def kept_together(out):
    """The groups, each of which one part has all of."""
    part_of = {}
    for part, row, _, _ in prepared(out):
        assert part_of.setdefault(row["group"], part) == part
    return {*part_of}


def unreadable(path, words, page=0):
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{words}"):
        prepare_data.read_image(path, page)


@pytest.fixture
def raw(tmp_path):
    return write_folder(tmp_path / "in/raw")


def prepare_beside(raw, *flags):
    """Prepare a folder into out/ beside it, in place of what is there."""
    return prepare(raw, raw.parent / "out", "--overwrite", *flags)


def refuse(raw, *words):
    """A folder is refused with these words, and nothing is written."""
    refused(lambda: prepare_beside(raw), *words)
    assert not (raw.parent / "out").exists()


def test_folder_is_resized_split_and_repeatable(raw, tmp_path):
    linked = tmp_path / "linked"
    linked.symlink_to(raw)
    out, again = prepare_beside(raw), prepare(linked, tmp_path / "more")    # named after the link
    names = {*os.listdir(out)} - {"meta.json"}
    assert contents(out, names) == contents(again, names)
    assert os.listdir(out.parent) == ["raw"]
    found = prepared(out)
    for _, row, image, mask in found:
        for kind, small in (("images", image[..., 1]), ("masks", mask * 255)):
            source = np.asarray(Image.open(raw / kind / f"{row['name']}.png"))
            expected = cv2.resize(source, (32, 32), interpolation=cv2.INTER_AREA)
            assert np.array_equal(small, expected if kind == "images" else (expected > 127) * 255)
    parts = [part for part, *_ in found]
    assert parts == ["train"] * 8 + ["val"] + ["test"] * 3      # cut at int(8.4) and int(9.6)
    refused(lambda: prepare(linked, tmp_path / "more"), again, "--overwrite")
    shutil.move(out, tmp_path / "other disk")
    out.symlink_to(tmp_path / "other disk")
    prepare_beside(raw, "--seed", "1")
    prepare_beside(raw, "--seed", "1")
    assert out.is_symlink() and os.listdir(out.parent) == ["raw"]
    assert prepare_data.read_names(out, "test") != prepare_data.read_names(again, "test")


def test_groups_stay_whole_and_labels_are_taken(raw):
    (raw / "labels.csv").write_text("name,label\np0_00,sick\np0_01.png,well\n")
    out = prepare_beside(raw, "--group-regex", r"^(p\d+)_")
    assert len(kept_together(out)) == 4
    labels = {row["name"]: row["label"] for _, row, _, _ in prepared(out)}
    assert (labels["p0_00"], labels["p0_01"], labels["p0_02"]) == ("sick", "well", "")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_become_colour(mode, tmp_path):
    colour = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8))
    image = colour.convert(mode)
    if mode.endswith("A"):
        image.putalpha(colour.getchannel("R"))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert np.array_equal(prepare_data.read_image(path), image.convert("RGB"))


@pytest.mark.parametrize("channels", [[1], [1, .5, .9]])
def test_wide_numbers_are_stretched_between_their_percentiles(channels, tmp_path):
    wide = (np.linspace(1000, 3000, 54).reshape(6, 9, 1) * channels).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), wide[..., ::-1])
    expected = np.interp(wide, np.percentile(wide, (.1, 99.9)), (0, 255)).round()
    assert (prepare_data.read_image(tmp_path / "a.png") == expected).all()


def test_decompression_bombs_are_refused(tmp_path):
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    unreadable(tmp_path / "bomb.png", "bomb")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode, photometric", [("L", "minisblack"), ("RGB", "rgb")])
def test_every_orientation_is_undone(orientation, mode, photometric, tmp_path):
    image = Image.effect_noise((40, 28), 90).convert(mode)      # fills 0 to 255: not stretched
    exif = image.getexif()
    exif[274] = orientation
    expected = ImageOps.exif_transpose(image).convert("RGB")
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "a.webp", exif=exif, lossless=True)
    for dtype in ("u1", "u2"):                                  # of which others read other kinds
        tifffile.imwrite(tmp_path / f"{dtype}.tif", np.asarray(image).astype(dtype), metadata=None,
                         photometric=photometric, extratags=[(274, "H", 1, orientation, True)])
    for path in tmp_path.iterdir():
        assert np.array_equal(prepare_data.read_image(path), expected), path


TIFFS = [(dtype, {}) for dtype in "u1 u2 u4 u8 i1 i2 i4 i8 f2 f4 f8".split()]
TIFFS += [
    ("u2", dict(byteorder=">")), ("i2", dict(byteorder=">", compression="zlib")),
    ("f4", dict(byteorder=">", compression="lzma")),
    ("u2", dict(compression="zlib", predictor=True)), ("f8", dict(bigtiff=True)),
    ("u1", dict(tile=(16, 16))), ("u4", dict(tile=(16, 16), byteorder=">"))]
FORMS = {                                                       # {form: how it is stored}
    "gray": dict(photometric="minisblack"),
    "white is zero": dict(photometric="miniswhite"),
    "alpha": dict(photometric="minisblack", planarconfig="contig", extrasamples=["unassalpha"]),
    "rgb": dict(photometric="rgb", planarconfig="contig"),
    "planes": dict(photometric="rgb", planarconfig="separate"),
    "three grays": dict(photometric="minisblack", planarconfig="contig")}


@pytest.mark.parametrize("dtype, how", TIFFS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_tiffs_are_read_rightly_or_refused(dtype, how, form, tmp_path, monkeypatch):
    gray = (spot(48, 64)[0] // 2).astype(dtype)
    if dtype[1] != "1":
        gray *= 100
    shown = gray
    if form in ("rgb", "planes", "three grays"):
        shown = np.dstack([gray, gray // 2, gray[::-1]])
    stored = {"alpha": np.dstack([gray, gray]), "planes": np.moveaxis(shown, -1, 0),
              "white is zero": 99 - gray if dtype[0] == "f" else ~gray}.get(form, shown)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored, metadata=None, **how, **FORMS[form])
    found = prepare_data.read_image(path)
    expected = prepare_data.to_rgb(prepare_data.Picture(shown)).astype(int)
    assert np.abs(found - expected).max() <= (form == "white is zero")
    monkeypatch.setitem(sys.modules, "tifffile", None)          # as if it were not installed
    try:
        assert np.array_equal(prepare_data.read_image(path), found)
    except ValueError as error:
        assert "pip install tifffile" in str(error)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize("channels", [2, 5])
def test_tiffs_of_other_channels_are_refused(dtype, channels, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((9, 9, channels), dtype), metadata=None,
                     photometric="minisblack", planarconfig="contig")
    unreadable(tmp_path / "a.tif", f"{channels} channels")


def dicom(name="MR_small.dcm"):
    """The path of a file that comes with pydicom."""
    return Path(pydicom.data.get_testdata_file(name))


@pytest.mark.parametrize("photometric, slope, is_enhanced", [
    ("MONOCHROME1", 2, False), ("MONOCHROME2", -1, True)])
def test_dicom_is_shown_through_its_window(photometric, slope, is_enhanced, tmp_path):
    """That of PS3.3, C.11.2.1.2.1."""
    ds = pydicom.dcmread(dicom())
    group, scale, window = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    centre, width = 600 * slope - 100, 1600 * abs(slope)
    scale.RescaleSlope, scale.RescaleIntercept = slope, -100
    window.WindowCenter, window.WindowWidth = centre, width
    if is_enhanced:
        group.PixelValueTransformationSequence, group.FrameVOILUTSequence = [scale], [window]
        ds.SharedFunctionalGroupsSequence = [group]
    else:
        ds.update(scale)
        ds.update(window)
    ds.PhotometricInterpretation = photometric
    ds.save_as(tmp_path / "plain")                              # no suffix
    values = ds.pixel_array * float(slope) - 100
    expected = (((values - (centre - .5)) / (width - 1) + .5) * 255).clip(0, 255)
    if photometric == "MONOCHROME1":
        expected = 255 - expected
    found = prepare_data.read_image(tmp_path / "plain")[..., 0]
    assert np.abs(found - expected).max() <= .5 + 1e-6


def test_dicom_frames_and_palettes(monkeypatch):
    path = dicom("SC_rgb_rle_2frame.dcm")
    frames = pydicom.dcmread(path).pixel_array
    assert np.array_equal(prepare_data.read_image(path, 1), frames[1])
    unreadable(path, "no page 9", page=9)
    palette = prepare_data.read_image(dicom("examples_palette.dcm"))
    assert palette.shape == (350, 800, 3) and (palette[..., 0] != palette[..., 2]).any()
    unreadable(dicom("rtplan.dcm"), "not a DICOM file with an image")
    monkeypatch.setitem(sys.modules, "pydicom", None)           # as if it were not installed
    unreadable(path, "pip install pydicom")


def test_dicom_patients_stay_whole_and_unnamed(tmp_path):
    raw, ds = tmp_path / "raw", pydicom.dcmread(dicom())
    ds.WindowWidth = None                                       # as some files have it: no window
    for k in range(18):                                         # of one patient in several studies
        ds.PatientID = f"Mustermann{k // 3}"
        ds.PixelData = np.roll(ds.pixel_array, k + 1).tobytes()
        (raw / f"study{k // 2}").mkdir(parents=True, exist_ok=True)
        ds.save_as(raw / f"study{k // 2}/{k}.dcm")
    out = prepare_beside(raw)
    assert len(kept_together(out)) == 6
    assert not [file for file in out.iterdir() if b"Mustermann" in file.read_bytes()]
    prepare_beside(raw, "--group-regex", "[0-9]+$")
    assert len(kept_together(out)) == 18                        # the regex, not the id


# -------------------------------------------------------------------------------------------- masks

disc = cv2.circle(np.zeros((48, 64), np.uint8), (30, 22), 12, 1, -1)
halves = np.where(np.arange(48)[:, None] < 20, disc, disc * 3)  # two classes, 1 above 3
ringed = np.where(cv2.dilate(disc, np.ones((9, 9))) > disc, 255, disc)      # an ignored border
soft = cv2.GaussianBlur(disc * 255, (0, 0), .5)                 # above 127 the disc
grid = np.arange(256, dtype=np.uint16).reshape(16, 16).repeat(3, 0).repeat(4, 1)
white = np.full((48, 64, 3), 255, np.uint8)
MASKS = {                                                       # {case: (files, their foreground)}
    "two values": ([disc > 0, disc, disc * 255, disc * np.uint16(65535), disc * np.float32(1)],
                   disc),
    "probabilities": ([soft / np.float32(255)], disc),
    "alpha channel": ([np.dstack([white, disc * 255])], disc),
    "empty alpha channel": ([np.dstack([white, disc * 0])], disc * 0),
    "gray classes": ([halves * 85], disc),
    "class colours": ([np.dstack([halves * 40, halves * 0, halves * 80])], disc),
    "classes, some files with one": ([halves, disc, disc * 1.0], disc),
    "classes and an ignored border": ([ringed, disc], disc),
    "instances past 2 ** 31": ([halves * np.uint32(2 ** 31 + 5), disc * np.int32(70000)], disc),
    "many instances": ([grid], grid),
    "weak two values beside soft edges": ([soft, disc * 100, disc * np.float32(.4)], disc)}
UNCLEAR_MASKS = {                                               # {the reason: files}
    "with classes and 255": [disc * 255, ringed],
    "with 0/255": [halves, disc * 255],
    "with soft edges": [soft, halves]}


def foregrounds(files, folder, asked="auto"):
    """The foreground of each of these masks, bool (H, W), by the rule for all."""
    masks = []
    for k, values in enumerate(files):
        path = folder / f"{k}.tif"
        if values.dtype == bool:                                # which tifffile inverts
            save_image(path, values)
        else:
            tifffile.imwrite(path, values)
        masks.append(prepare_data.read_mask(path))
    rule, _ = prepare_data.decide_mask_rule(asked, masks)
    return [prepare_data.foreground_of(mask, rule) for mask in masks]


@pytest.mark.parametrize("case", MASKS)
def test_masks_mean_what_each_file_means(case, tmp_path):
    files, expected = MASKS[case]
    for found in foregrounds(files, tmp_path):
        assert np.array_equal(found, expected > 0)


@pytest.mark.parametrize("reason", UNCLEAR_MASKS)
def test_masks_of_two_meanings_are_refused(reason, tmp_path):
    refused(lambda: foregrounds(UNCLEAR_MASKS[reason], tmp_path), reason, "--mask-foreground")


def test_mask_values_below_0_are_refused(tmp_path):
    with pytest.raises(ValueError, match="0.tif: has values below 0"):
        foregrounds([disc.astype(np.int32) - 1], tmp_path)


@pytest.mark.parametrize("asked, values", [
    ("nonzero", [1, 3]), ("half", [3]), ("zero", [0]), ("1", [1]), ("1,3", [1, 3])])
def test_mask_foreground_by_flag(asked, values, tmp_path):
    [found] = foregrounds([halves], tmp_path, asked)
    assert np.array_equal(found, np.isin(halves, values))


def test_a_1_in_a_jpg_mask_is_noise():
    assert prepare_data.kind_of(np.uint8([[0, 1]]), is_jpg=True) == "soft edges"


def test_levels_in_jpg_masks_are_refused(raw):
    for path in sorted((raw / "masks").iterdir()):
        levels = np.array(Image.open(path))
        levels[:12] = 80
        save_image(path.with_suffix(".jpg"), levels)
        path.unlink()
    refuse(raw, "levels", ".jpg")


# -------------------------------------------------------------------------------- folders and names

LAYOUTS = {                                                     # {case: names of image and masks}
    **{f"images beside {folder}": ("images/{k}.png", folder + "/{k}.png")
       for folder in ("masks", "labels", "gt", "annotations")},
    **{f"NAME{end} beside": ("{k}.tif", "{k}" + end + ".png")
       for end in ("_mask", "_masks", "_segmentation", "-label")},
    "NAME_mask below": ("images/{k}.png", "images/masks/{k}_mask.png"),
    "other suffix": ("images/{k}.BMP", "masks/{k}_GT.png"),
    "nnU-Net": ("imagesTr/{k}_0000.png", "labelsTr/{k}.png"),
    "patients": ("{p}/{k}.png", "{p}/{k}_mask.png"),
    "patients, deep": ("all/{p}/visit/{k}.png", "all/{p}/visit/masks/{k}.png"),
    "patients below images": ("images/{p}/{k}.png", "masks/{p}/{k}.png"),
    "parts": ("{t}/images/{k}.png", "{t}/masks/{k}.png"),
    "parts below": ("images/{t}/{k}.png", "labels/{t}/{k}.png"),
    "parts by other names": ("set/{T}/{k}.png", "set/{T}/{k}_gt.png"),
    "unknown folder": ("CXR_png/{k}.png", "mask/{k}_mask.png"),
    "none": ("{k}.png",),
    "names": ("images/ä, b.{k} .png", "masks/ä, b.{k} .png"),
    "several masks": ("benign ({k}).png", "benign ({k})_mask.png", "benign ({k})_mask_1.png")}
UNCLEAR_LAYOUTS = {                                             # {reason: (names, more of it)}
    "has two masks": (("images/{k}.png", "masks/{k}.png", "labels/{k}.png"),
                      "labels/t", "masks/t"),
    "masks: no mask there has the name": (("images/{k}.png", "masks/other{k}.png"),),
    "mask: no mask there": (("images/{k}.png", "masks/{k}.png", "mask/view_{k}.png"),),
    "seg_test_00000.png: by its name a mask": (("images/{k}.png", "images/seg_{k}.png"),),
    "mask.png: by its name a mask": (("{k}/image.png", "{k}/mask.png"),),
    "class0, class1": (("class{c}/{k}.png",), "'^([^/]+)/'", "'.+'"),
    "masks/test_00000.gif: a mask of a kind": (("images/{k}.png", "masks/{k}.gif"),),
    "NAME_xyz": (("images/{k}.png", "images/{k}_xyz.png"), "NAME_mask")}
LUNGS = ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
SKIN = {"melanoma": "1.0,0.0", "seborrheic_keratosis": "0.0,1.0", "nevus": "0.0,0.0"}


def write_layout(raw, image_name, *mask_names, n=12, shape=(32, 32), pixel=((255,),)):
    """Write n pairs under such names; each of several masks holds some rows of the object, a pixel
    of it as `pixel`. Returns {k: (image, mask, what else the names say)}."""
    written = {}
    for i in range(n):
        part = i * 3 // n
        t = prepare_data.PARTS[part]
        fields = dict(i=i, k=f"{t}_{i - math.ceil(part * n / 3):05d}", t=t, p=f"p{i % 6}",
                      patient=f"p{i // 3}", c=i % 2, T=("Training", "valid", "Test")[part],
                      isic=("Training", "Validation", "Test_v2")[part], lungs=LUNGS[i % 4],
                      skin=[*SKIN][i % 3])
        gray, mask = spot(*shape, n, i)
        save_image(raw / unicodedata.normalize("NFD", image_name.format(**fields)), gray)
        for j, mask_name in enumerate(mask_names):
            rows = np.arange(shape[0])[:, None] % len(mask_names) == j
            save_image(raw / mask_name.format(**fields), np.kron(mask * rows, np.uint8(pixel)))
        written[fields["k"]] = gray, mask if mask_names else None, fields
    return written


def as_written(out, written):
    """Yield (row, part, fields) of each image of a prepared data set, which is what was written, as
    is its mask."""
    found = prepared(out)
    assert len(found) == len(written)
    for part, row, image, mask in found:
        [key] = [key for key in written if key in row["name"]]
        gray, expected, fields = written[key]
        assert np.corrcoef(image[..., 1].ravel(), gray.ravel())[0, 1] > .9
        assert np.array_equal(mask, expected)
        yield row, part, fields


def make_stacks(paths):
    """Turn gray TIFFs into stacks, which begin with the inverse."""
    for path in paths:
        gray = np.array(Image.open(path)).astype(np.float32)
        tifffile.imwrite(path, np.stack([255 - gray, gray]), photometric="minisblack")


@pytest.mark.parametrize("case", LAYOUTS)
def test_folders_as_people_have_them(case, tmp_path):
    written = write_layout(tmp_path / "raw", *LAYOUTS[case])
    out = prepare_beside(tmp_path / "raw")
    for row, part, fields in as_written(out, written):
        assert "patients" not in case or row["group"] == fields["p"]
        assert "parts" not in case or part == fields["t"]
    assert "patients" not in case or len(kept_together(out)) == 6


@pytest.mark.parametrize("reason", UNCLEAR_LAYOUTS)
def test_folders_of_two_readings_are_refused(reason, tmp_path):
    names, *words = UNCLEAR_LAYOUTS[reason]
    write_layout(tmp_path / "raw", *names, n=16)
    refuse(tmp_path / "raw", reason, *words)


@pytest.mark.parametrize("table, words", [
    ("name,label\nS00.PNG,1\n", ["S00", "p0_00"]), (" Name ;label\nx;y\n", ["Name"])])
def test_labels_of_other_names_are_refused(table, words, raw):
    (raw / "labels.csv").write_text(table)
    refuse(raw, "labels.csv", *words)


def test_nothing_is_left_out_silently(raw, capsys):
    for name in ("old.tif", "images/a.nii.gz", "masks/extra.png"):
        shutil.copy(raw / "masks/p0_00.png", raw / name)
    (raw / "images/again").symlink_to(raw)
    prepare_data.main(["--dataset", "demo", "--size", "16", "--out", str(raw / "images")])
    (raw / "labels.csv").write_text("name,label\np0_00,a\nnobody,b\n")
    assert len(prepared(prepare_beside(raw))) == 12
    said = capsys.readouterr().out
    for words in ("old.tif", "1 masks have no image", "extra.png", "volumes", "a.nii.gz", "nobody",
                  "11 of 12 images have no label", "images/demo: not taken", "images/again: "):
        assert words in said


def test_of_several_pages_one_is_taken_and_it_is_said(tmp_path, capsys):
    written = write_layout(tmp_path / "raw", "{k}.tif", "{k}_mask.png")
    make_stacks((tmp_path / "raw").glob("*.tif"))
    assert [*as_written(prepare_beside(tmp_path / "raw", "--page", "1"), written)]
    assert "12 images are of several pages" in capsys.readouterr().out
    unreadable(tmp_path / "raw/val_00000.tif", "no page 2", 2)


@pytest.mark.parametrize("table", [
    "name;label\nPräparat 1;gut\n".encode("cp1252"),
    "name\tlabel\nPräparat 1\tgut\n".encode("utf-16"),
    "\ufeffname,label \nPräparat 1,gut\n".encode()])
def test_labels_as_spreadsheets_write_them(table, tmp_path):
    (tmp_path / "labels.csv").write_bytes(table)
    rows = prepare_data.read_table(tmp_path / "labels.csv", ("name", "label"))
    assert rows == [dict(name="Präparat 1", label="gut")]


def test_the_same_picture_is_never_in_two_parts(raw, capsys):
    for path in sorted(raw.glob("*/p*")):
        shutil.copy(path, path.with_name(f"again_{path.name}"))
    for seed in "012":
        prepare_data.check(prepare_beside(raw, "--seed", seed))
    assert "12 pictures are there twice" in capsys.readouterr().out


def test_equal_names_in_given_parts_are_no_leak(tmp_path, capsys):
    for part, n in zip(prepare_data.PARTS, (12, 13, 14), strict=True):
        write_folder(tmp_path / "raw" / part, n=n)
    prepare_beside(tmp_path / "raw")
    assert "in another part" not in capsys.readouterr().out


def test_thin_and_empty_masks(raw, capsys):
    line = np.zeros((40, 40), np.uint8)
    line[:, 20] = 255                                           # .8 wide at 32 px
    for i, path in enumerate((raw / "masks").iterdir()):
        save_image(path, line if i % 4 else line * 0)
    masks = [mask for *_, mask in prepared(prepare_beside(raw))]
    assert np.array_equal(np.sum(masks, axis=(0, 1)), np.eye(1, 32, 16)[0] * 9 * 32)
    assert "3 of 12 masks are empty" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["bright", "dark"])
def test_foreground_auto_tells_bright_from_dark(name, tmp_path):
    for i in range(12):
        image, _ = prepare_data.draw_nuclei(64, np.random.default_rng(i))
        save_image(tmp_path / f"raw/{i}.png", 255 - image if name == "dark" else image)
    assert prepare_data.read_meta(prepare_beside(tmp_path / "raw"))["foreground"] == name


def test_every_bad_file_is_found_in_one_pass(raw, capsys):
    images = raw / "images"
    cut = (images / "p0_01.png").read_bytes()[:-500]
    for name, data in {"p0_00": b"", "p0_01": cut, "p0_02": b"text", "._x": b"hidden"}.items():
        (images / f"{name}.png").write_bytes(data)
    shutil.copy(images / "p3_11.png", images / "p3_11.bmp")
    (raw / "masks/p1_03.png").unlink()
    save_image(raw / "masks/p1_04.png", np.zeros((9, 9), np.uint8))
    refuse(raw, "6 bad file(s)", "--skip-bad")
    lines = capsys.readouterr().err
    for line in ("images/p0_00.png: .*empty", "images/p0_01.png: ", "p0_02.png: .*not an image",
                 "images/p1_03.png: has no mask", "masks/p1_04.png: .*9 x 9", "p3_11.png: .*twice"):
        assert re.search(line, lines), line
    out = prepare_beside(raw, "--skip-bad")
    assert len(prepared(out)) == 12 - 5
    assert len(prepare_data.read_meta(out)["skipped"]) == 6


def test_images_without_masks_are_trained_on_if_asked(tmp_path, capsys):
    raw = write_folder(tmp_path / "in/raw", n=36, size=32)     # twelve patients
    for i in (0, 4, 8, 9, 10, 11, 20, 35):
        next(raw.glob(f"masks/*_{i:02d}.png")).unlink()
    refused(lambda: prepare(raw, tmp_path), "8 bad file(s)")
    out = prepare(raw, tmp_path, "--keep-unlabelled")
    masks = [np.load(out / f"{part}_masks.npy") for part in prepare_data.PARTS]
    assert [len(part) for part in masks] == [19, 3, 6]  # cut at int(19.6) and int(22.4)
    names = [row["name"] for row in prepare_data.read_names(out, "train")]
    assert names == sorted(names[:19]) + sorted(names[19:]) and len(names) == 19 + 8
    for name, mask in zip(names, masks[0], strict=False):
        assert np.array_equal(mask, cv2.imread(raw / f"masks/{name}.png", 0) > 0)
    assert not any((raw / f"masks/{name}.png").exists() for name in names[19:])
    out = prepare(raw, tmp_path, "--keep-unlabelled", "--overwrite", "--group-regex", "^([^_]+)_")
    rows = [prepare_data.read_names(out, part) for part in prepare_data.PARTS]
    groups = [{row["group"] for row in part} for part in rows]
    assert len(set.union(*groups)) == sum(map(len, groups))
    left_out = re.search(r"(\d+) images without a mask are left out", capsys.readouterr().out)
    counts = prepare_data.read_meta(out)["counts"]
    assert left_out and sum(counts.values()) == 36 - int(left_out[1])
    prepare_data.main(["--dataset", "folder", "--name", "raw", "--out", str(tmp_path), "--check"])


def test_images_outside_of_all_groups_are_bad(raw):
    out = prepare_beside(raw, "--skip-bad", "--group-regex", "^(p[1-9])")
    assert len(prepared(out)) == 9 and kept_together(out) == {"p1", "p2", "p3"}
    (raw / "labels.csv").write_text("name,label\np0_00,a\n")
    refused(lambda: prepare_beside(raw, "--skip-bad", "--group-regex", "^x"), "0 usable images")


# ----------------------------------------------------------------------------------- published data

PUBLISHED = {                # {data set: (foreground, a pixel of the mask, names of the files)}
    "isic": ("dark", [[255]], "ISIC-2017_{isic}_Data/{k}.jpg",
             "ISIC-2017_{isic}_Part1_GroundTruth/{k}_segmentation.png"),
    "xray": ("dark", [[255] * 2] * 2, "COVID-19_Radiography_Dataset/{lungs}/images/{k}.png",
             "COVID-19_Radiography_Dataset/{lungs}/masks/{k}.png"),     # of another size
    "drone": ("bright", [[7]], "original_images/{k}.jpg", "label_images_semantic/{k}.png"),
    "dsb2018": ("bright", [[255]], "stage1_train/{k}/images/{k}.png",
                "stage1_train/{k}/masks/1.png", "stage1_train/{k}/masks/2.png"),
    "dm": ("bright", [[7]], "CD27_Panel_Component/{p}_Myo_{k}_component_data.tif",
           "Labels/{p}_Myo_{k}_component_mask_labels.tiff"),
    "tissuenet": ("bright", [[7]], "{k}.png", "{k}_mask.png")}


def write_published(dataset, raw):
    """Twelve images of a data set in its layout; see write_layout."""
    _, pixel, *names = PUBLISHED[dataset]
    shape = (700, 1100) if dataset == "dm" else (32, 32)        # of tiles, two times three
    written = write_layout(raw, *names, shape=shape, pixel=pixel)
    make_stacks(raw.glob("CD27*/*"))
    table = "image_id,melanoma,seborrheic_keratosis\n"
    for k, (*_, fields) in written.items():
        table += f"{k},{SKIN[fields['skin']]}\n"
    for path in raw.glob("ISIC*_Data/*"):
        shutil.copy(path, path.with_name(f"{path.stem}_superpixels.png"))
        Path(str(path.parent).replace("Data", "Part3_GroundTruth.csv")).write_text(table)
    if dataset == "tissuenet":
        for part in prepare_data.PARTS:
            pairs = [pair[:2] for key, pair in written.items() if key.startswith(part)]
            x, y = np.stack(pairs, axis=1)
            np.savez_compressed(raw / f"tissuenet_v1.1_{part}.npz",
                                X=np.stack([x, 255 - x], axis=-1),      # nuclei, membranes
                                y=np.stack([y * 7, 1 - y], axis=-1))    # cells, nuclei
    return written


def prepare_published(dataset, raw, out, *flags):
    prepare_data.main(["--dataset", dataset, "--raw", str(raw), "--size", "32", "--out", str(out),
                       *flags])
    return out / dataset


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A function that writes and prepares a data set, once: (raw, what was written, out)."""
    @functools.cache
    def get(dataset):
        folder = tmp_path_factory.mktemp(dataset)
        written = write_published(dataset, folder / "raw")
        return folder / "raw", written, prepare_published(dataset, folder / "raw", folder)

    return get


def assert_same_set(raw, out):
    """The data set `out` comes from the folder `raw` too, to the bit."""
    expected = prepare_data.read_meta(out)["fingerprint"]
    again = prepare_published(out.name, raw, raw.parent / "again", "--overwrite")
    assert prepare_data.read_meta(again)["fingerprint"] == expected


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_published_layouts_become_right_arrays(dataset, published):
    _, written, out = published(dataset)
    assert prepare_data.read_meta(out)["foreground"] == PUBLISHED[dataset][0]
    prepare_data.check(out)
    if dataset == "dm":                                         # see below
        return
    for row, part, fields in as_written(out, written):
        assert row["label"] == dict(isic=fields["skin"], xray=fields["lungs"]).get(dataset, "")
        assert part == fields["t"] or dataset not in ("isic", "tissuenet")


def test_tiles_of_a_slide_or_patient_stay_together(published, tmp_path):
    raw, written, out = published("dm")
    other = prepare_published("dm", raw, tmp_path, "--page", "1", "--split-by", "patient")
    assert len(kept_together(out)) == 12
    assert kept_together(other) == {f"p{k}_Myo" for k in range(6)}
    for folder, is_bright in ((out, False), (other, True)):     # stain 0 is the inverse
        for _, row, image, mask in prepared(folder):
            key, y, x = re.search(r"Myo_(.*)_(.)_(.)$", row["name"]).groups()
            y, x = 480 * int(y), 480 * int(x)
            tile = written[key][1][y:y + 480, x:x + 480]
            assert mask.mean() == pytest.approx(tile.sum() / 480 ** 2, abs=.01)
            if mask.mean() > .05:
                assert (image[mask == 1].mean() > image[mask == 0].mean()) == is_bright


@pytest.mark.parametrize("dataset, moves, given", [
    ("drone", {"original_images": "training_set/images",        # as its own page has it
               "label_images_semantic": "training_set/gt/semantic/label_images"}, ""),
    ("drone", {"label_images_semantic": "RGB_color_image_masks"}, ""),
    ("xray", {}, "COVID-19_Radiography_Dataset/COVID/images"),
    ("isic", {}, "ISIC-2017_Validation_Data"),
    ("dm", {"Labels": "CD27 cell labels/Mask Labels",           # as the authors' notebook has them
            "CD27 cell labels": "Labels/CD27 cell labels",
            "CD27_Panel_Component": "CD27 Panel-- Component"}, "CD27 Panel-- Component")])
def test_published_layouts_by_their_other_names(dataset, moves, given, published, tmp_path):
    raw, _, out = published(dataset)
    raw = shutil.copytree(raw, tmp_path / "raw")
    for source, target in moves.items():
        (raw / target).parent.mkdir(parents=True, exist_ok=True)
        (raw / source).rename(raw / target)
    for path in raw.rglob("*mask_labels.tiff"):
        path.rename(str(path).replace("mask_labels.tiff", "data.tifMask.tif"))
    assert_same_set(raw / given, out)


def part_sizes(pairs, split):
    """The sizes of the parts into which `split` divides them."""
    prepare_data.join_duplicates(pairs)
    split(pairs, seed=3)
    parts = [pair.part for pair in pairs]
    return [parts.count(part) for part in prepare_data.PARTS]


def test_published_splits_at_their_full_size():
    pairs = []
    for label, n in zip(LUNGS, (3616, 6012, 10192, 1345), strict=True):
        for i in range(n):                          # the same ten pictures in each class
            digest = str(i) if i < 10 else ""
            pairs.append(prepare_data.Pair(f"{label}{i}", "", label=label, digest=digest))
    assert part_sizes(pairs, prepare_data.stratify) == [14730, 2202, 4233]
    assert len({(pair.digest, pair.part) for pair in pairs if pair.digest}) == 10
    tested = [pair.label for pair in pairs if pair.part == "test"]
    assert abs(tested.count("COVID") - .2 * 3616) < 9
    few = [prepare_data.Pair(f"{i}", "", label="", digest=f"{i % 5}") for i in range(20)]
    assert part_sizes(few, prepare_data.stratify) == [16, 0, 4]         # three have no room in val
    tiles = [prepare_data.Pair(f"{i}", f"{i // 12}", group=f"{i // 12}") for i in range(198 * 12)]
    assert part_sizes(tiles, prepare_data.split) == [1656, 240, 480]


def test_archives_are_unpacked_once(published, tmp_path):
    raw, _, out = published("isic")
    raw = shutil.copytree(raw, tmp_path / "raw")
    kinds = ("zip", "gztar" if hasattr(tarfile, "data_filter") else "zip") * 3
    for path, kind in zip(sorted(raw.glob("*[ah]")), kinds, strict=True):
        shutil.make_archive(path, kind, raw, path.name)
        shutil.rmtree(path)
    assert_same_set(raw, out)
    for path in [*raw.glob("*.zip"), *raw.glob("*.gz")]:
        path.write_bytes(b"never read again")
    assert_same_set(raw, out)
    shutil.rmtree(raw / "ISIC-2017_Training_Data")
    refused(lambda: assert_same_set(raw, out), "ISIC-2017_Training_Data.zip", "get it again")
    (raw / "ISIC-2017_Training_Data.zip").unlink()
    refused(lambda: assert_same_set(raw, out), "not enough")
    prepare_data.check(raw.parent / "again/isic")               # what was there stays


@pytest.mark.parametrize("name, link", [("../evil", ""), ("link", "/etc")])
def test_archives_never_write_outside(name, link, tmp_path):
    raw, member = tmp_path / "raw", tarfile.TarInfo(name)
    raw.mkdir()
    if link:
        member.type, member.linkname = tarfile.SYMTYPE, link
    with tarfile.open(raw / "b.tar", "w") as file:
        file.addfile(member)
    refused(lambda: prepare_published("isic", raw, tmp_path / "out"), "b.tar: cannot be extracted")
    assert os.listdir(tmp_path) == ["raw"] and os.listdir(raw) == ["b.tar"]


def test_where_a_data_set_is_to_be_had_is_said(tmp_path):
    refused(lambda: prepare_published("isic", tmp_path / "nowhere", tmp_path / "out"),
            "challenge.isic-archive.com")
    refused(lambda: prepare_published("xray", tmp_path, tmp_path / "out", "--download"),
            "account", "kaggle")


def off(folder, *words):
    """--check says so."""
    flags = ["--dataset", "demo", "--out", str(folder.parent), "--check"]
    refused(lambda: prepare_data.main(flags), *words)


@pytest.mark.parametrize("name", ["val_images", "train_masks"])
def test_check_finds_changed_arrays(name, data, tmp_path):
    demo = shutil.copytree(data / "demo", tmp_path / "demo")
    np.load(demo / f"{name}.npy", mmap_mode="r+")[2, 9, 9] ^= 1
    off(demo, "fingerprint")


def test_check_finds_the_same_picture_or_group_in_two_parts_and_wrong_tables(data, tmp_path):
    demo = shutil.copytree(data / "demo", tmp_path / "demo")
    np.load(demo / "test_images.npy", mmap_mode="r+")[3] = np.load(demo / "train_images.npy")[5]
    for part in ("train", "test"):
        table = demo / f"{part}.csv"
        table.write_text(table.read_text().replace("_007,", "_007,patient"))
    (demo / "val.csv").write_text("name,group,label\n")
    off(demo, "same picture in two parts: train_005 of train and test_003 of test",
        "same group in two parts: train_007 of train and test_007 of test", "val.csv has 0 rows")


def test_download_goes_on_where_it_stopped(tmp_path):
    (tmp_path / "source").write_bytes(b"0123456789")
    (tmp_path / "file.part").write_bytes(b"cut")
    prepare_data.download(f"file://{tmp_path}/source", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"cut3456789"
    gone = f"file://{tmp_path}/gone"
    refused(lambda: prepare_data.download(gone, tmp_path / "other"), gone)
    assert {*os.listdir(tmp_path)} == {"source", "file"}


# -------------------------------------------------------------------------------- a user's mistakes

@pytest.fixture(scope="session")
def mistakes(tmp_path_factory):
    """A folder of raw folders that cannot be prepared, and of data sets that ViT cannot take and
    that have no masks."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    write_folder(folder / "few", n=2)
    write_folder(folder / "half/train")
    prepare_data.main(["--dataset", "demo", "--size", "40", "--out", str(folder / "odd")])
    prepare(write_folder(folder / "bare", masks=False), folder / "prepared")
    return folder


BAD = "--dataset folder --raw {bad}/"
TRAIN = "--data {data} --dataset "
ON = TRAIN + "demo --backbone resnet50 "


@pytest.mark.parametrize("stage, flags, message", [
    (prepare_data, BAD + "absent", "{bad}/absent: no such folder"),
    (prepare_data, BAD + "empty", "{bad}/empty: no images here"),
    (prepare_data, BAD + "few", "{bad}/few: 2 usable images are too few"),
    (prepare_data, BAD + "half", "{bad}/half: has train: give all of"),
    (prepare_data, "--dataset folder", "needs --raw"),
    (prepare_data, "--dataset folder --raw /", "--name is not empty"),
    (pretrain, TRAIN + "isic", "{data}/isic is not prepared: run python prepare_data.py"),
    (pretrain, TRAIN + "demo --device cuda:99", "cuda:99"),
    (pretrain, TRAIN + "demo --sync-batchnorm", "several GPUs"),
    (pretrain, TRAIN + "demo --encoder {bad}/absent", "{bad}/absent: no such file"),
    (pretrain, TRAIN + "demo --method byol --batch-size 1", "at least 2 images"),
    (pretrain, TRAIN + "demo --method simsiam --batch-size 1", "at least 2 images"),
    (pretrain, TRAIN + "demo --method byol --backbone vit_small", "not for vit_small"),
    (pretrain, TRAIN + "demo --method simsiam --backbone vit_small", "not for vit_small"),
    (pretrain, TRAIN + "demo --method mae", "not resnet50"),
    (pretrain, TRAIN + "demo --method simmim", "not resnet50"),
    (pretrain, TRAIN + "demo --method dino --amp fp16", "not for dino, whose loss becomes nan"),
    (pretrain, TRAIN + "demo --refine --threshold ght", "2"),
    (pretrain, "--data {bad}/odd --dataset demo --backbone vit_small", "multiple of 16, not 40"),
    (finetune_eval, "--run {run} --data {bad}/prepared --dataset bare", "no test masks"),
    (finetune_eval, "--run {bad}/absent", "{bad}/absent is not a run folder"),
    (finetune_eval, "--run {run} --predict {bad}/absent", "{bad}/absent: no such folder"),
    (finetune_eval, ON + "--encoder {bad}/absent", "{bad}/absent"),
    (finetune_eval, ON + "--protocol classify --encoder {run}/encoder.pth", "at least two labels"),
    (finetune_eval, ON + "--protocol semi --encoder {run}/encoder.pth", "a whole U-Net, and {run}"),
    (finetune_eval, "--run {run} --protocol semi --epochs 1", "2"),
    (finetune_eval, "--run {run} --predict {bad}/few --export x.pt2", "2"),
    (finetune_eval, "--report", "out: no results here")])
def test_a_mistake_is_said_in_one_line_and_leaves_nothing(stage, flags, message, data, run,
                                                          mistakes, tmp_path):
    places = dict(data=data, run=run, bad=mistakes)
    flags = [flag.format(**places) for flag in flags.split()]
    text = refused(lambda: stage.main([*flags, "--out", str(tmp_path / "out")]))
    assert message.format(**places) in text and "\n" not in text
    assert not any(tmp_path.iterdir())


def test_a_mistake_on_the_command_line_has_no_traceback(tmp_path):
    [line] = fails(HERE / "finetune_eval.py", "--run", "wrong", cwd=tmp_path)
    assert "wrong" in line and not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------ promises in writing

@pytest.mark.parametrize("error, flag", [
    (RuntimeError("unable to allocate shared memory(shm) for file"), "--workers 0"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--batch-size")])
def test_too_little_memory_is_said_in_one_line(error, flag):
    refused(lambda: pretrain.explain_memory(error), flag)


@pytest.mark.parametrize("stage", [prepare_data, pretrain, finetune_eval])
def test_help_is_printed(stage):
    with pytest.raises(SystemExit, match="0"):
        stage.parse_args(["--help"])


@pytest.mark.parametrize("path", [
    HERE / "models.py", HERE / "losses.py", *HERE.glob("baselines/*.py")])
def test_files_that_are_copied_import_nothing_of_ours(path):
    imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    assert not {"baselines", *[script.stem for script in HERE.glob("*.py")]} & {*imported}


def snippets():
    """The Python in the README: of a network, an encoder, a baseline."""
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def test_readme_snippets_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save("image.png")
    for snippet in snippets()[:2]:
        code = snippet.replace("runs/demo/resnet50/medsass-e16/seed0", str(run))
        scope = {}
        exec(code.replace("(64, 64)", "(32, 32)"), scope)
    assert not scope["keys"].unexpected_keys


@pytest.mark.parametrize("name", ["byol", "simsiam", "dino", "mae", "simmim"])
def test_readme_snippet_of_byol_trains_each_baseline(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE / "baselines")
    method = pretrain.METHODS[name]
    code = snippets()[2].replace("byol", name).replace("BYOL", method.__name__)
    code = code.replace("resnet50", method.backbones[0]).replace("64", "32")
    exec(code.replace("(32, 3", "(4, 3").replace("(16)", "(2)"), {})
    assert Path("encoder.pth").exists()


# ------------------------------------------------------- benchmarks (pytest -m bench test_smoke.py)

@pytest.fixture(scope="session")
def record():
    """record(what, against, ours, theirs, reached): print a row of the table, and keep it in
    results/bench.json; the row has to be as it should."""
    rows = {}
    path = HERE / "results/bench.json"
    path.parent.mkdir(exist_ok=True)

    def row(what, against, ours, theirs, reached):
        rows[what] = dict(against=against, ours=f"{ours:.3g}", theirs=f"{theirs:.3g}",
                          ratio=f"{ours / theirs:.3g}", reached=bool(reached))
        path.write_text(json.dumps(dict(cores=os.cpu_count(), rows=rows), indent=2) + "\n")
        print("\n", what, *rows[what].values(), sep=" | ")
        assert reached

    return row


def interleaved(*work):
    """Median seconds of each of the functions, called in turn, five times after one that does not
    count."""
    times = []
    for call in work * 6:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return np.median(np.reshape(times, (6, -1))[1:], axis=0)


def photograph(height, width, detail=8):
    """uint8 (H, W, 3), smooth and random."""
    small = rng.integers(0, 256, (height // detail, width // detail, 3), np.uint8)
    return cv2.resize(small, (width, height))


@pytest.mark.bench
def test_input_path(tmp_path, record):
    """Read, augment, pseudo-mask, batches of 16 at 224 px, one worker."""
    images = np.stack([photograph(224, 224) for _ in range(160)])
    np.save(tmp_path / "train_images.npy", images)
    dataset = pretrain.Images(tmp_path, "train", pretrain.MedSASS("resnet50").augment, 0)
    ours = pretrain.make_loader(dataset, pretrain.Batches(160, 16, 0), 1)
    augment = transforms.BYOLTransform(transforms.BYOLView1Transform(input_size=224),
                                       transforms.BYOLView2Transform(input_size=224))
    theirs = torch.utils.data.DataLoader(
        [*map(Image.fromarray, images)], 16, num_workers=1, persistent_workers=True,
        collate_fn=lambda batch: torch.utils.data.default_collate([*map(augment, batch)]))
    mine, other = interleaved(lambda: list(ours), lambda: list(theirs))
    record("input path, images/s", "lightly's BYOL transform", 160 / mine, 160 / other,
           other / mine >= 3)


STEP = r"""import re, statistics, sys, time, torch, segmentation_models_pytorch as smp, pretrain

def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024

torch.manual_seed(0)
images = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8)
masks = (torch.rand(8, 1, 224, 224) < .3).to(torch.uint8)
before = peak()
if sys.argv[1] == "ours":
    method = pretrain.MedSASS("resnet50").to(memory_format=torch.channels_last).train()
    optimizer = method.optimizer()
    loss_of = lambda: method(pretrain.to_device([images, masks], "cpu"))
else:
    unet = smp.Unet("resnet50", encoder_weights=None, encoder_depth=3,
                    decoder_channels=(256, 128, 64), decoder_attention_type="scse")
    optimizer = torch.optim.Adam(unet.parameters(), 3.6e-4, weight_decay=1e-5)
    loss = smp.losses.TverskyLoss("binary", alpha=.3, beta=.7, gamma=.75)
    loss_of = lambda: loss(unet(pretrain.normalise(images)), masks.float())
times = []
for _ in range(6):
    times.append(-time.perf_counter())
    optimizer.zero_grad()
    loss_of().backward()
    optimizer.step()
    times[-1] += time.perf_counter()
print(statistics.median(times[1:]), peak() - before)
"""


@pytest.mark.bench
def test_training_step(record):
    """ResNet-50 U-Net, 224 px, batch 8, in a process of its own, against the same network, loss and
    optimiser from segmentation_models_pytorch and torch, written plainly."""
    figures = []
    for side in ("ours", "theirs"):
        out = subprocess.check_output([sys.executable, "-c", STEP, side], cwd=HERE, text=True)
        figures.append([float(number) for number in out.split()])
    (mine, my_peak), (other, other_peak) = figures
    record("training step, s", "smp", mine, other, mine <= .75 * other)
    record("training step, MB", "smp", my_peak, other_peak, my_peak <= .7 * other_peak)


@pytest.mark.bench
def test_preparing_jpgs_is_faster_than_a_plain_loop(tmp_path, record):
    """2000 jpgs of 1022x767 to arrays of 224 px, the whole script against one process."""
    raw = tmp_path / "raw"
    for i in range(20):
        noisy = photograph(767, 1022, detail=32) + rng.normal(0, 4, (767, 1022, 3))
        save_image(raw / f"{i}.jpg", noisy.clip(0, 255).astype(np.uint8), quality=92)
        for k in range(1, 100):
            shutil.copy(raw / f"{i}.jpg", raw / f"{i}_{k}.jpg")
    script = [sys.executable, HERE / "prepare_data.py", "--dataset", "folder", "--raw", raw,
              "--out", tmp_path / "out", "--overwrite"]

    def plain_loop():
        np.stack([Image.open(file).convert("RGB").resize((224, 224)) for file in raw.iterdir()])

    mine, other = interleaved(lambda: subprocess.run(script, check=True), plain_loop)
    record("preparing jpgs, images/s", "a plain loop", 2000 / mine, 2000 / other,
           other / mine >= 1.8)
