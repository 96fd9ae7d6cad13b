"""Every stage through its command line, every formula against an independent source, every promise
by breaking it.

    bash run_all.sh test                    # all but the benchmarks
    pytest -m smoke test_smoke.py           # a minute
"""

import argparse
import copy
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
import textwrap
import time
import tracemalloc
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pydicom
import scipy.ndimage
import scipy.spatial
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
from numpy import array_equal
from PIL import Image, ImageOps, PngImagePlugin
from pytest import approx, fixture, mark, raises

import finetune_eval
import losses
import models
import prepare_data
import pretrain
from baselines import byol, mae, simmim
from models import build_unet
from prepare_data import PARTS, open_part, read_image, read_names

HERE = Path(__file__).parent
rng = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------ helpers

@fixture(autouse=True)
def seeds():
    """Make what a test draws at random independent of which tests ran before it."""
    torch.manual_seed(0)
    rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


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


def write_layout(raw, image_name, mask_name="", n=12, side=40, value=255):
    """Write n pictures and their masks, 0 and `value`, under such names, three of each patient.
    Return {k: (picture, mask {0, 1} or None, what its names say)}; k stands in every name."""
    written = {}
    for i in range(n):
        third = i * 3 // n
        fields = dict(
            k=f"p{i // 3}_{i:02d}", patient=f"p{i // 3}", part=PARTS[third],
            isic=("Training", "Validation", "Test_v2")[third], lungs=LUNGS[i % 4], odd=i % 2)
        gray, mask = spot(side, side, n, i)
        written[fields["k"]] = gray, None, fields
        save_image(raw / image_name.format(**fields), gray)
        if mask_name:
            save_image(raw / mask_name.format(**fields), mask * np.uint8(value))
            written[fields["k"]] = gray, mask, fields
    return written


LUNGS = ["COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]


def write_folder(folder, n=12, masks=True):
    """Write a raw folder of n pictures and their masks; the same each time."""
    write_layout(folder, "images/{k}.png", "masks/{k}.png" if masks else "", n=n)
    return folder


def prepare(raw, out, *flags):
    prepare_data.main(["--dataset", "folder", "--raw", str(raw), "--size", "32", "--out", str(out),
                       *flags])
    return out / raw.name


@fixture(scope="session")
def data(tmp_path_factory):
    """A folder with the demo, prepared at 32 px."""
    folder = tmp_path_factory.mktemp("data")
    prepare_data.main(["--dataset", "demo", "--size", "32", "--out", str(folder)])
    return folder


@fixture(scope="session")
def small_data(tmp_path_factory):
    """A folder with a data set "demo" of eight images to train on."""
    folder = tmp_path_factory.mktemp("small")
    prepare(write_folder(folder / "raw"), folder, "--name", "demo")
    return folder


def command(data, out, *flags, epochs=2):
    """Return the flags of a run on the demo, on the CPU."""
    return [*f"--dataset demo --data {data} --out {out} --epochs {epochs}".split(),
            "--workers", "0", "--device", "cpu", *map(str, flags)]


def newest(paths):
    return max(paths, key=lambda path: path.stat().st_mtime_ns)


def train(data, out, *flags, epochs=2):
    """Run pretrain.py in this process on the demo; return the run folder."""
    pretrain.main(command(data, out, *flags, epochs=epochs))
    return newest(out.glob("demo/*/*/seed*"))


def score(data, out, *flags):
    """Run finetune_eval.py in this process; return the JSON's path and the result."""
    places = f"--data {data} --out {out} --runs {out}/runs --device cpu"
    finetune_eval.main([*places.split(), *map(str, flags)])
    path = newest(path for path in out.rglob("*.json") if path.name != "config.json")
    return path, json.loads(path.read_text())


def tune(data, out, *flags, epochs=1):
    """Run finetune_eval.py with training; return the result and the folder of its training."""
    path, result = score(data, out, "--epochs", epochs, "--workers", "0", *flags)
    return result, newest(out.rglob(f"{path.stem}*/**/config.json")).parent


ON_DEMO = ["--dataset", "demo", "--backbone", "resnet50"]


@fixture(scope="session")
def run(data, tmp_path_factory):
    """An end-to-end ResNet-50 run of two epochs."""
    return train(data, tmp_path_factory.mktemp("runs"))


@fixture(scope="session")
def vit_run(data, tmp_path_factory):
    """A ViT-small run of one epoch."""
    return train(data, tmp_path_factory.mktemp("vit"), "--backbone", "vit_small", epochs=1)


@fixture
def copied_run(run, tmp_path):
    """A copy of the run where train(data, tmp_path) has its folder."""
    return Path(shutil.copytree(run, tmp_path / run.relative_to(run.parents[3])))


def load(path):
    return torch.load(path, weights_only=True)


def weights_of(folder):
    return load(folder / "best.pt")["model"]


def load_unet(folder):
    unet = build_unet("resnet50")
    unet.load_state_dict(weights_of(folder))
    return unet.eval()


def contents(folder, names=("best.pt", "last.pt", "encoder.pth")):
    """Return the bytes of files, of the weights in a run folder; a baseline has no best.pt."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def log_of(folder):
    return prepare_data.read_csv(folder / "log.csv")


def differing(state, other):
    """Return the names of the tensors of `state` that are not the same in `other`."""
    return {name for name, value in state.items() if not torch.equal(value, other[name])}


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def weights(network):
    """Return the parameters of a network, one vector."""
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


def refused(call, *words):
    """Check that the call exits with a message that holds all the words; return the message."""
    with raises(SystemExit) as end:
        call()
    message = str(end.value.code)
    assert message not in ("0", "None")
    for word in words:
        assert str(word) in message
    return message


def fails(*arguments, **options):
    """Check that Python ends with an error and without a traceback; return the lines it says."""
    options = dict(cwd=HERE) | options
    end = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **options)
    assert end.returncode in (1, 2)
    assert "Traceback" not in end.stderr, end.stderr
    return end.stderr.splitlines()


# ============================================================================================ smoke
# Every stage runs through its command line on the demo and leaves the files that design and README
# name. `pytest -m smoke` is these tests alone.

METHODS = [("medsass", "resnet50"), ("medsass", "vit_small"), ("byol", "resnet50"),
           ("simsiam", "resnet50"), ("dino", "resnet50"), ("dino", "vit_small"),
           ("mae", "vit_small"), ("simmim", "vit_small")]


@mark.smoke
@mark.parametrize("method, backbone", METHODS)
def test_every_method_trains_and_is_scored(method, backbone, small_data, tmp_path):
    flags = ["--method", method, "--backbone", backbone, "--batch-size", "4"]
    folder = train(small_data, tmp_path, *flags, epochs=1)
    assert {*os.listdir(folder)} - {"best.pt"} == {
        "config.json", "log.csv", "last.pt", "encoder.pth", "samples.png"}
    [row] = log_of(folder)
    assert math.isfinite(float(row["train_loss"]) + float(row["val_loss"]))
    path, result = score(small_data, tmp_path / "results", "--run", folder)
    expected = f"demo/{backbone}/{method}-e1-b4/seed0/transfer.json"
    assert path == tmp_path / "results" / expected
    assert 0 <= result["iou_global"] <= 1
    assert (result["method"], result["n_test"]) == (method, 3)


@mark.smoke
def test_every_protocol_is_scored_and_reported(data, copied_run, tmp_path):
    out = tmp_path / "results"
    few = ["--labels", "6", "--epochs", "2", "--workers", "0"]
    for protocol in ("frozen", "finetune", "semi"):
        _, result = score(data, out, "--run", copied_run, "--protocol", protocol, *few)
        assert (result["n_labels_train"], result["budget_steps"]) == (6, 10)
    score(data, out, *ON_DEMO, "--protocol", "reference")
    _, result = score(data, out, *ON_DEMO, "--protocol", "supervised", *few)
    assert "iou_global_ci" in result
    finetune_eval.main(["--report", "--out", str(out)])
    text = (out / "README.md").read_text()
    for title in ("medsass-e2: frozen-l6-e2", "medsass-e2: semi-l6-e2", "refined_trusted"):
        assert f"| {title} |" in text
    assert (out / "demo.png").exists()


PREDICT_ELSEWHERE = """import json, numpy, torch
about = {"network.json": ""}
network = torch.export.load("network.pt2", extra_files=about).module()
about = json.loads(about["network.json"])
assert (about["size"], about["foreground"]) == (32, "bright")
images = torch.from_numpy(numpy.load("images.npy"))
numpy.save("predicted.npy", torch.cat([network(images), network(images[:1])]).numpy())
"""


@mark.smoke
@mark.parametrize("network", ["run", "vit_run"])
def test_exported_network_needs_none_of_our_code(network, data, tmp_path, request):
    folder = request.getfixturevalue(network)
    finetune_eval.main(["--run", str(folder), "--export", str(tmp_path / "network.pt2")])
    images = open_part(data / "demo", "test")[0][:5]
    np.save(tmp_path / "images.npy", images.transpose(0, 3, 1, 2))
    subprocess.run([sys.executable, "-I", "-c", PREDICT_ELSEWHERE], cwd=tmp_path, check=True)
    unet, _, _ = finetune_eval.whole_network(folder)
    logits = finetune_eval.predict_logits(unet, images[[0, 1, 2, 3, 4, 0]], "cpu")
    predicted = np.load(tmp_path / "predicted.npy")[:, 0]
    assert np.allclose(predicted, 1 / (1 + np.exp(-logits)), atol=1e-4)


SIZES = {"a b": (50, 31), "c": (32, 32), "dé": (20, 90)}


@fixture
def predict(run, tmp_path):
    """A function that runs --predict on three images of SIZES, in "in", with other flags."""
    for name, (width, height) in SIZES.items():
        save_image(tmp_path / "in" / f"{name}.tif", rng.integers(0, 256, (height, width), np.uint8))
    flags = f"--run {run} --device cpu --predict {tmp_path}/in --out {tmp_path}"
    return lambda more: finetune_eval.main(f"{flags}/{more}".split())


@mark.smoke
def test_predict_writes_masks_at_each_image_s_own_size(predict, tmp_path):
    predict("out --overlay")
    rows = prepare_data.read_csv(tmp_path / "out/foreground.csv")
    assert len(rows) == len(SIZES)
    for row in rows:
        name = Path(row["name"]).stem
        mask = Image.open(tmp_path / f"out/{name}.png")
        overlay = Image.open(tmp_path / f"out/overlay/{name}.overlay.png")
        assert mask.size == overlay.size == SIZES[name]
        mask = np.asarray(mask)
        assert set(np.unique(mask)) <= {0, 255}
        assert (mask > 0).mean() == approx(float(row["foreground_fraction"]), abs=1e-6)


# ========================================================================================= formulas
# Each formula against code that others wrote, a closed form, or a loop that is slow and plain. A
# tolerance is what the arithmetic costs.

# smp's alpha weighs false positives, ours false negatives; its gamma is the inverse of ours.
@mark.parametrize("name, theirs", [
    ("focal_tversky", smp.losses.TverskyLoss("binary", smooth=1, alpha=.3, beta=.7, gamma=.75)),
    ("tversky", smp.losses.TverskyLoss("binary", smooth=1, alpha=.3, beta=.7)),
    ("dice", smp.losses.DiceLoss("binary", smooth=1)),
    ("focal", smp.losses.FocalLoss("binary", gamma=2)),
    ("bce", smp.losses.SoftBCEWithLogitsLoss())])
def test_losses_equal_segmentation_models_pytorch(name, theirs):
    logits = 2 * torch.randn(3, 1, 9, 7, dtype=torch.float64)
    target = (torch.rand(3, 1, 9, 7) < .3).double()
    ours = losses.LOSSES[name](logits, target)
    assert ours.item() == approx(theirs(logits, target).item(), abs=1e-12)


@mark.parametrize("name", losses.LOSSES)
@mark.parametrize("value", [-1e4, 0, 1e4])
@mark.parametrize("dtype", [torch.float32, torch.float16])
def test_losses_and_gradients_are_finite_at_the_extremes(name, value, dtype):
    half = (torch.arange(300) % 2).expand(2, 1, 300, 300)
    for target in (half, half * 0, half * 0 + 1):
        logits = torch.full(half.shape, value, dtype=dtype, requires_grad=True)
        loss = losses.LOSSES[name](logits, target)
        loss.backward()
        assert torch.isfinite(logits.grad + loss).all()


SMP_NAMES = {"up1": "decoder.blocks.0", "up2": "decoder.blocks.1", "up3": "decoder.blocks.2",
             "convs.0.0": "conv1.0", "convs.0.1": "conv1.1",
             "convs.1.0": "conv2.0", "convs.1.1": "conv2.1",
             "channel": "attention.cSE", "spatial": "attention.sSE", "head": "segmentation_head.0"}


def smp_name(name):
    for ours, theirs in SMP_NAMES.items():
        name = name.replace(ours, theirs)
    return name


@mark.parametrize("training", [True, False])
def test_resnet50_unet_and_its_gradients_are_those_of_segmentation_models_pytorch(training):
    theirs = smp.Unet("resnet50", encoder_weights=None, encoder_depth=3,
                      decoder_channels=(256, 128, 64), decoder_attention_type="scse").double()
    ours = build_unet("resnet50").double()
    source = theirs.state_dict()
    ours.load_state_dict({name: source[smp_name(name)] for name in ours.state_dict()})
    assert weights(ours).numel() == 4_536_047
    x = torch.randn(2, 3, 70, 93).double()
    with torch.set_grad_enabled(training):                      # other code without gradients
        out = ours.train(training)(x)
        expected = theirs.train(training)(x)
    assert torch.allclose(out, expected, atol=1e-10)
    if not training:
        return
    out.sin().sum().backward()
    expected.sin().sum().backward()
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(smp_name(name)).grad
        if other is not parameter.grad:                         # both None if there is no skip
            assert torch.allclose(parameter.grad, other, atol=1e-9), name


@mark.parametrize("backbone, lacking, create", [
    ("resnet50", {"layer3", "layer4", "fc"}, timm.models.resnet50),
    ("resnet50", {"layer3", "layer4", "fc"}, torchvision.models.resnet50),
    ("vit_small", set(), timm.models.vit_small_patch8_224)])
def test_exported_encoder_loads_elsewhere(backbone, lacking, create, tmp_path):
    missing = models.export_encoder(build_unet(backbone), tmp_path / "encoder.pth")
    assert {name.split(".")[0] for name in missing} == lacking
    keys = create().load_state_dict(load(tmp_path / "encoder.pth"), strict=False)
    assert not keys.unexpected_keys
    assert set(keys.missing_keys) == set(missing)


@mark.parametrize("backbone", models.BACKBONES)
def test_encoders_from_elsewhere_load(backbone, tmp_path):
    state = timm.create_model(models.BACKBONES[backbone], num_classes=10).state_dict()
    of_dino = {"teacher": prefixed("backbone.", state), "args": argparse.Namespace(arch="vit")}
    of_ranks = {"model": prefixed("module.backbone.", state)}
    for content in (state, {"state_dict": state}, of_ranks, of_dino):
        torch.save(content, tmp_path / "f.pth")
        unet = build_unet(backbone)
        models.load_encoder(unet, tmp_path / "f.pth")
        assert not differing(unet.encoder.state_dict(), state)


def test_wrong_encoder_files_are_refused(tmp_path):
    path = tmp_path / "f.pth"
    complete = models.build_unet("resnet50").encoder.state_dict()
    cut = complete.copy()
    del cut["bn1.weight"]
    for words, content in (
            ("holds no resnet50", [1, 2]), ("lacks 1 .*bn1.weight", cut),
            ("2 resnet50", prefixed("online.", complete) | prefixed("target.", complete)),
            ("mismatch for conv1.weight", complete | {"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            ("bn1.weight .*not finite", complete | {"bn1.weight": torch.full((64,), math.nan)}),
            ("", None)):
        torch.save(content, path)
        if content is None:
            path.write_bytes(b"no checkpoint")
        with raises(ValueError, match=f"{path}.*{words}"):
            models.load_encoder(models.build_unet("resnet50"), path)


def ght_score(gray, t, nu, tau, kappa, omega):
    """Return Barron's score of one threshold, from the pixels themselves (ECCV 2020, eqs. 7-13)."""
    total = 0
    for side, fraction in ((gray[gray <= t], omega), (gray[gray > t], 1 - omega)):
        n = side.size
        p = n / gray.size
        v = (p * nu * tau ** 2 + n * side.var()) / (p * nu + n)
        total += -n * side.var() / v - n * math.log(v)
        total += 2 * (n + kappa * fraction) * math.log(n)
    return total


@mark.parametrize("constants", [
    (1e3, 12.0, 0.0, .5), (500.0, 3.0, 800.0, .2), (1e-3, 1.0, 1e4, .9)])
def test_ght_is_the_maximum_of_barrons_score(constants):
    values = np.append(rng.normal(70, 9, 300), rng.normal(150, 25, 200))
    gray = values.clip(0, 255).astype(np.uint8)
    best = max(ght_score(gray, t, *constants) for t in range(gray.min(), gray.max()))
    t = pretrain.ght_threshold(gray, *constants)
    assert ght_score(gray, t, *constants) == approx(best, rel=1e-9)


@mark.parametrize("method", pretrain.THRESHOLDS)
def test_pseudo_masks_follow_their_definitions_and_a_flat_picture_has_no_foreground(method):
    images = rng.integers(0, 256, (1, 24, 20, 3), np.uint8)
    gray = cv2.cvtColor(images[0], cv2.COLOR_RGB2GRAY)
    threshold = 127
    if method == "otsu":
        threshold = skimage.filters.threshold_otsu(gray)
    elif method == "ght":
        scale = 480 / 2 ** 20                                   # his pages have 2 ** 20 pixels
        threshold = pretrain.ght_threshold(gray, 2 ** 29.5 * scale, kappa=2 ** 22.25 * scale)
    elif method == "adaptive_mean":
        threshold = cv2.blur(gray, (11, 11), borderType=cv2.BORDER_REPLICATE).astype(int) - 2
    elif method == "adaptive_gaussian":
        local = cv2.GaussianBlur(gray, (11, 11), 0, borderType=cv2.BORDER_REPLICATE)
        threshold = local.astype(int) - 2
    bright = pretrain.pseudo_mask(images, method)
    assert array_equal(bright[0], gray > threshold)
    assert array_equal(pretrain.pseudo_mask(images, method, "dark"), 1 - bright)
    for foreground in ("bright", "dark"):
        assert not pretrain.pseudo_mask(images * 0 + 200, method, foreground).any()


@mark.parametrize("warp", [
    pretrain.Rotation(degrees=(20, 20), interpolation=Image.BILINEAR),
    pretrain.Perspective(distortion_scale=.2, p=1.0)])
def test_warps_are_torchvisions_inside_and_mirror_outside(warp):
    noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
    image = torch.from_numpy(cv2.GaussianBlur(noise, (0, 0), 2)).permute(2, 0, 1)
    white = torch.full_like(image, 255)
    params = warp.make_params([image])
    torchvisions = super(type(warp), warp).transform
    inside = torchvisions(white, params) == 255                 # black outside
    # Pillow takes (x, y) for a pixel's centre, torchvision's perspective grid (x + .5, y + .5).
    difference = warp.transform(image, params).int() - torchvisions(image, params).int()
    assert difference[inside].abs().float().mean() < 2.5
    assert (warp.transform(white, params) == 255).all()


def test_image_and_mask_are_augmented_alike(tmp_path):
    _, truth = spot(48, 48)
    path = tmp_path / "train_masks.npy"
    np.save(path, truth[None])
    np.save(tmp_path / "train_images.npy", np.dstack([truth * 200 + 20] * 3)[None])
    rows = [("train", 0)]
    labelled = pretrain.Images(tmp_path, rows, pretrain.paper_augmentation(), 0, tmp_path)
    moved = 0
    for epoch in range(30):
        _, (view, mask) = labelled[epoch, 0]
        is_wrong = (view[1] > 110) != (mask[0] == 1)
        assert is_wrong.float().mean() < .04, epoch     # edges are sampled bilinear and nearest
        moved += not array_equal(mask[0], truth)
    assert moved > 20
    view, mask = pretrain.MedSASS("resnet50", foreground="dark").augment(view)
    assert array_equal(mask[0], view[1] < 110)       # of the view itself


def test_channel_is_the_most_separable():
    images = rng.integers(0, 256, (5, 40, 50, 3), np.uint8)
    images[..., 1] = spot(40, 50)[0]
    assert pretrain.choose_channel(images)[0] == "green"
    images[:] = images[..., 1:2]
    assert pretrain.choose_channel(images)[0] == "gray"         # of equals


def flood(mask, starts):
    """Return the pixels of `mask` that are 4-connected to one of `starts` in it, bool (H, W)."""
    labels = skimage.measure.label(mask, connectivity=1)
    return np.isin(labels, labels[mask & starts])


def border_of(shape):
    return ~np.pad(np.ones((shape[0] - 2, shape[1] - 2), bool), 1)


@mark.parametrize("seed", range(3))
def test_frame_equals_a_flood_from_border_and_corners(seed):
    noise = np.random.default_rng(seed)
    values = noise.choice(np.uint8([40, 54, 56, 100]), (64, 72), p=[.3, .12, .06, .52])
    frequent = noise.random((64, 72)) < .4
    corners = np.zeros((64, 72), bool)
    corners[::63, ::71] = True
    shared = pretrain.touching_border(frequent)
    assert np.array_equal(shared, flood(frequent, border_of((64, 72))))
    frame = shared | flood(values <= .55 * np.median(values), corners)
    frame = skimage.morphology.dilation(frame, np.ones((5, 5)))
    assert np.array_equal(pretrain.image_frame(values, shared), frame)
    counted = pretrain.otsu_threshold(values[~frame][:, None])
    assert np.array_equal(pretrain.dark_mask(values, frame), (values <= counted) & ~frame)


def test_position_reliability_of_two_images_equals_its_definition():
    """Any halves are these two, so that their correlation does not vary."""
    masks = np.random.default_rng(1).random((2, 24, 30)) < np.linspace(0, .8, 30)
    halves = [cv2.GaussianBlur(mask.astype(float), (0, 0), 30 / 24) for mask in masks]
    c = np.corrcoef(*map(np.ravel, halves))[0, 1]
    reliability, radius = pretrain.position_reliability(masks, 2)
    assert reliability == approx(2 * c / (1 + c), rel=1e-4) and radius == 0
    disc = skimage.morphology.disk(23)
    exact = skimage.morphology.medial_axis(np.pad(disc, 1), return_distance=True)[1].max()
    assert pretrain.position_reliability([np.pad(disc, 1)] * 3, 3)[1] == exact // 7 == 3


def dilated(mask, radius):
    return scipy.ndimage.binary_dilation(mask, pretrain.ellipse(radius))


def plain_open(mask, radius):
    padded = np.pad(mask, radius, mode="edge")
    eroded = scipy.ndimage.binary_erosion(padded, pretrain.ellipse(radius), border_value=1)
    return dilated(eroded, radius)[radius:-radius, radius:-radius]


def test_position_masks_equal_scipys_morphology_and_a_flood():
    blobs = [cv2.GaussianBlur(rng.random((30, 34)), (0, 0), 3) for _ in range(6)]
    masks = np.array([blob > np.quantile(blob, .7) for blob in blobs])
    opened = [plain_open(mask, 2) for mask in masks]
    for mask, expected in zip(masks, opened, strict=True):
        assert np.array_equal(pretrain.open_mask(mask, 2), expected)
    inner = [o & ~flood(o, border_of(o.shape)) for o in opened]
    p = cv2.GaussianBlur(np.mean(inner, axis=0), (0, 0), 34 / 24)
    p = p.mean() + .7 * (p - p.mean())
    likely = pretrain.likely_positions(masks, 6, .7, 2)
    assert np.array_equal(likely, p >= p.max() / 2) and 0 < likely.mean() < 1
    for mask, o in zip(masks, opened, strict=True):
        kept = flood(o, likely)
        expected = dilated(kept, 2) & mask if kept.any() else mask
        expected = dilated(expected, 1)
        assert np.array_equal(pretrain.position_mask(mask, 2, likely), expected)
    assert np.array_equal(pretrain.position_mask(mask, 2, likely & False), dilated(mask, 1))


def polygon_area(points):
    x, y = np.transpose(points)
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def test_mask_quality_equals_slow_loops():
    values = rng.integers(0, 256, (24, 30), np.uint8)
    mean_mask = rng.random((24, 30))
    blob = cv2.GaussianBlur(rng.random((24, 30)), (0, 0), 2)
    mask = blob > np.quantile(blob, .6)
    area = hull = 0
    for contour in cv2.findContours(np.uint8(mask), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
        area += polygon_area(contour[:, 0])
        hull += scipy.spatial.ConvexHull(contour[:, 0]).volume        # in 2D, the area
    classes = np.where(mask, values[mask].mean(), values[~mask].mean())
    expected = classes.var() / values.var(), area / hull, np.mean([*mean_mask[mask]])
    assert pretrain.mask_quality(mask, values, mean_mask) == approx(expected)
    assert pretrain.mask_quality(mask & False, values, mean_mask) == (0, 0, 0)
    assert pretrain.mask_quality(mask | True, values, mean_mask)[0] == 0


@mark.parametrize("n, reliability, kept", [(9, 1.0, 4), (10, .5, 7), (1, 1.0, 1), (6, 0, 6)])
def test_trusted_are_those_of_the_best_ranks(n, reliability, kept):
    quality = rng.integers(0, 4, (n, 3)) / 4            # with many ties
    sums = []
    for row in quality:
        sums.append(sum((column < value).sum() + ((column == value).sum() + 1) / 2
                        for column, value in zip(quality.T, row, strict=True)))
    order = sorted(range(n), key=lambda k: (-sums[k], k))
    is_trusted = pretrain.trusted(quality, reliability)
    assert np.flatnonzero(is_trusted).tolist() == sorted(order[:kept])


@mark.parametrize("n, size, seed, lengths", [            # lengths: of each rank's batches
    (39, 16, 3, [[16, 23]]), (40, 16, 3, [[16, 16, 8]]),
    (33, 8, 3, [[8, 9], [8, 8]]), (33, 8, None, [[8, 8], [8, 9]])])
def test_batches_cover_an_epoch_once_and_none_is_small(n, size, seed, lengths):
    indices = []
    for rank, expected in enumerate(lengths):
        batches = list(pretrain.Batches(n, size, seed, shard=(rank, len(lengths))))
        assert [*map(len, batches)] == expected
        indices += [index for _, index in sum(batches, [])]
    assert sorted(indices) == list(range(n))


def build(method, backbone, size=32, **kwargs):
    """Return a method and a batch of its views of random images."""
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


@mark.parametrize("name, backbone", METHODS[2:])
def test_baseline_encoder_is_plain_timm_and_learns_and_its_loss_is_float32(name, backbone):
    method, views = build(name, backbone)
    plain = timm.create_model(models.BACKBONES[backbone], num_classes=0)
    assert method.encoder.state_dict().keys() == plain.state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(method)(views).dtype == torch.float32
    before = weights(method.encoder)
    one_step(method, views, total_steps=1, epoch_steps=1)
    assert not torch.equal(weights(method.encoder), before)
    state = copy.deepcopy(method.state_dict())
    method.eval()(views)                                        # as validation does
    assert not differing(method.state_dict(), state)


def lightlys_dino_loss(method, views):
    encoder, head = method.student
    features = torch.cat([encoder(torch.cat(views[:2])), encoder(torch.cat(views[2:]))])
    criterion = lightly_loss.DINOLoss(output_dim=1024, warmup_teacher_temp=.04, teacher_temp=.04,
                                      student_temp=.1)
    teacher = method.teacher(torch.cat(views[:2])).chunk(2)
    loss = criterion(teacher, head(features).chunk(10), epoch=0)
    method.center = criterion.center.view(1, -1)
    return loss


def lightlys_cosine_loss(method, views):
    """Return BYOL's or SimSiam's loss."""
    cosine = lightly_loss.NegativeCosineSimilarity()
    z = [method.projector(method.encoder(view)) for view in views]
    p = [method.predictor(projection) for projection in z]
    if hasattr(method, "target"):
        z = [method.target(view) for view in views]
        return 4 + 2 * cosine(p[0], z[1]) + 2 * cosine(p[1], z[0])
    return (cosine(p[0], z[1].detach()) + cosine(p[1], z[0].detach())) / 2


@mark.parametrize("name, backbone", METHODS[2:6])
def test_loss_and_gradients_are_those_of_lightlys_criteria(name, backbone):
    ours, views = build(name, backbone)
    theirs = copy.deepcopy(ours)
    loss = ours(views)
    if name == "dino":
        expected = lightlys_dino_loss(theirs, views)
        assert torch.allclose(ours.center, theirs.center)
    else:
        expected = lightlys_cosine_loss(theirs, views)
    assert loss.item() == approx(expected.item(), rel=1e-6, abs=1e-6)
    loss.backward()
    expected.backward()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        if our.grad is not their.grad:                          # both None in target and teacher
            assert (our.grad - their.grad).norm() <= 1e-3 * their.grad.norm() + 1e-6


@mark.parametrize("name, outputs, healthy", [
    ("byol", torch.eye(64), [1]), ("byol", torch.ones(64, 64), [0]),
    ("simsiam", torch.eye(64), [1]), ("simsiam", torch.ones(64, 64), [0]),
    ("dino", torch.eye(64), [1, 0]), ("dino", torch.eye(64)[[3] * 32], [0, 0]),
    ("dino", torch.full((32, 64), 1 / 64), [1, 1])])
def test_health_shows_a_collapse(name, outputs, healthy):
    after_forward = argparse.Namespace(z=outputs, q=outputs)
    health = pretrain.METHODS[name].health(after_forward)
    assert [*health.values()] == approx(healthy, abs=.01)


@mark.parametrize("name, fraction", [("byol", .03), ("dino", .2)])
def test_target_and_teacher_are_the_exact_moving_average(name, fraction):
    method, views = build(name, "resnet50")
    if name == "byol":
        average, source = method.target, torch.nn.Sequential(method.encoder, method.projector)
    else:
        average, source = method.teacher, method.student
    one_step(method, views, step=2)
    before = weights(average)
    one_step(method, views, step=3, total_steps=10)
    fraction *= (1 + math.cos(.3 * math.pi)) / 2
    assert torch.allclose(weights(average), before.lerp(weights(source), fraction), atol=1e-7)
    assert not torch.equal(average[0].bn1.running_mean, source[0].bn1.running_mean)


@mark.parametrize("name, backbone, kind, decay, rates", [
    ("byol", "resnet50", "Adam", 1.5e-6, {0: 3e-5, 9: 3e-4, 505: 1.5e-4, 999: 0}),
    ("simsiam", "resnet50", "SGD", 1e-4, {0: .003125, 500: .0015625, 999: 0}),
    ("dino", "resnet50", "SGD", 1e-4, {99: .001875, 999: 1e-6}),
    ("dino", "vit_small", "AdamW", .4, {0: 3.125e-7, 99: 3.125e-5, 999: 1e-6}),
    ("mae", "vit_small", "AdamW", .05, {49: 9.375e-6, 525: 4.6875e-6, 999: 0}),
    ("simmim", "vit_small", "AdamW", .05, {99: 7.0710678e-5, 550: 3.5355339e-5, 999: 0}),
    ("tuned", "resnet50", "Adam", 1e-5, {0: 3.6e-6, 99: 3.6e-4, 550: 1.8e-4, 999: 0})])
def test_optimizer_in_a_run_of_1000_steps(name, backbone, kind, decay, rates):
    methods = pretrain.METHODS | dict(tuned=finetune_eval.FineTuning)
    method = methods[name](backbone, 32)
    optimizer = method.optimizer()
    assert type(optimizer).__name__ == kind
    groups = optimizer.param_groups
    assert len(groups) == 1 + (name not in ("byol", "tuned"))   # biases, no decay
    for step, lr in rates.items():
        method.before_step(optimizer, step, 1000, 10)
        assert groups[0]["lr"] == approx(lr, rel=1e-6, abs=2e-8)
    method.before_step(optimizer, 1000, 1000, 10)
    assert max(group["weight_decay"] for group in groups) == approx(decay)


def test_dino_has_ten_views_and_prototypes_that_are_frozen_in_the_first_epoch():
    method, views = build("dino", "vit_small", prototypes=50)
    assert [view.shape[-1] for view in views] == [32] * 2 + [16] * 8
    prototypes = method.student[1].prototypes.weight
    start = prototypes.clone()
    one_step(method, views, step=4, epoch_steps=5)
    assert torch.equal(prototypes, start)
    one_step(method, views, step=5, epoch_steps=5)
    assert not torch.equal(prototypes, start)


def test_mae_encodes_a_quarter_as_lightly_and_scores_hidden_patches_normalised_one_by_one():
    method, (images,) = build("mae", "vit_small", size=64)
    p = images[1, :, 8:16, 8:16].flatten()
    expected = (p - p.mean()) / (p.var() + 1e-6).sqrt()
    assert torch.allclose(method.target(images)[1, 9], expected, atol=1e-4)
    torch.manual_seed(1)
    loss = method([images]).item()
    torch.manual_seed(1)
    latent, mask, restore = method.encode(images)
    error = method.decode(latent, restore) - method.target(images)
    assert loss == approx(error[mask].square().mean().item(), rel=1e-5)
    theirs = modules.MaskedVisionTransformerTIMM(vit=copy.deepcopy(method.encoder))
    theirs.vit.load_state_dict(method.encoder.state_dict())     # lightly has weights of its own
    assert torch.equal(mask, restore >= 16)                     # of 64: a quarter is seen
    kept = F.pad(restore.argsort(dim=1)[:, :16] + 1, (1, 0))    # and the class token, 0
    assert torch.allclose(latent, theirs.encode(images, idx_keep=kept), atol=1e-5)
    theirs = lightly_utils.get_2d_sine_cosine_positional_embedding(16, 3, cls_token=True)
    assert np.allclose(mae.sincos_positions(16, 3)[0], theirs, atol=1e-6)


@mark.parametrize("size", [64, 80])
def test_simmim_hides_blocks_of_four_patches(size):
    mask = simmim.SimMIM("vit_small", size).random_mask(50)
    side, blocks = size // 8, math.ceil(size / 32)
    corners = mask[:, ::4, ::4]
    assert (corners.sum(dim=(1, 2)) == math.ceil(.6 * blocks ** 2)).all()
    whole = corners.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(whole[:, :side, :side], mask)


def test_simmim_scores_hidden_pixels_alone_and_does_not_see_them():
    method, (images,) = build("simmim", "vit_small", size=64)
    torch.manual_seed(2)
    loss = method([images]).item()
    torch.manual_seed(2)
    mask = method.random_mask(4)
    is_hidden = method.pixels_of(mask)
    reconstruction = method.reconstruct(images, mask)
    noise = images.where(~is_hidden, torch.randn_like(images))
    assert torch.equal(method.reconstruct(noise, mask), reconstruction)
    is_hidden = is_hidden.expand_as(images)
    expected = F.l1_loss(reconstruction[is_hidden], images[is_hidden]).item()
    assert loss == approx(expected, rel=1e-5)
    tokens = method.encoder.forward_features(images)[:, 1:]     # timm's, if nothing is hidden
    expected = method.head(tokens.transpose(1, 2).reshape(4, 384, 8, 8))
    assert torch.allclose(method.reconstruct(images, mask & False), expected, atol=1e-5)


def test_segmentation_scores_equal_sklearn():
    pred = rng.random((5, 12, 10)) < .4
    target = rng.random((5, 12, 10)) < .3
    pred[3] = target[3:] = False                        # nothing to find, nothing found
    pred[4] = True                                      # nothing to find, something found
    ours = finetune_eval.segmentation_scores(pred, target)
    flat = target.ravel(), pred.ravel()
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        *flat, average="binary")
    theirs = dict(precision_global=precision, recall_global=recall, dice_global=f1,
                  iou_global=sklearn.metrics.jaccard_score(*flat),
                  accuracy_global=sklearn.metrics.accuracy_score(*flat))
    assert {name: ours[name] for name in theirs} == approx(theirs)
    ious = [sklearn.metrics.jaccard_score(target[k].ravel(), pred[k].ravel()) for k in range(3)]
    assert ours["iou_image"] == approx((sum(ious) + 1 + 0) / 5)


def test_bootstrap_equals_a_loop_over_resampled_images():
    """Groups are resampled, a, b, c, d and e; an image counts as often as its group."""
    pred = rng.random((8, 6, 5)) < .5
    target = rng.random((8, 6, 5)) < .4
    times = finetune_eval.bootstrap_weights(tuple("aabcccde"))[:50]
    samples = finetune_eval.weighted_scores(finetune_eval.count_pixels(pred, target), times)
    for k, weight in enumerate(times):
        assert array_equal(weight, weight[[1, 0, 2, 5, 3, 4, 6, 7]])     # groups stay whole
        assert weight[[0, 2, 3, 6, 7]].sum() == 5       # as many as there are
        chosen = np.repeat(np.arange(8), weight.astype(int))
        expected = finetune_eval.segmentation_scores(pred[chosen], target[chosen])
        assert {name: value[k] for name, value in samples.items()} == approx(expected)


def test_labelled_images_are_nested_and_by_group():
    names = [dict(name=f"{i}", group=f"g{i // 5}") for i in range(50)]
    before = set()
    for fraction, n in ((.001, 1), (.1, 5), (7 / 50, 7), (.5, 25), (1.0, 50)):
        rows = finetune_eval.labelled_rows(names, range(50), fraction, seed=5)
        assert len(rows) == n
        assert before < {*rows}
        assert len({k // 5 for k in rows}) == math.ceil(n / 5)          # whole but for the last
        before = {*rows}


def test_focal_cross_entropy_equals_its_definition():
    logits = torch.randn(6, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, 1, 1, 2, 0])
    p = torch.softmax(logits, dim=1).numpy()[range(6), target]
    expected = (-(1 - p) ** 2 * np.log(p)).mean()
    assert losses.focal_cross_entropy(logits, target).item() == approx(expected)


def test_transfer_is_scored_by_hand(data, run, tmp_path):
    _, result = score(data, tmp_path, "--run", run)
    images, masks = open_part(data / "demo", "test")
    pixels = torch.tensor(np.array(images)).permute(0, 3, 1, 2) / 255
    pixels = torchvision.transforms.v2.functional.normalize(
        pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.inference_mode():
        pred = load_unet(run)(pixels)[:, 0].numpy() > 0
    expected = finetune_eval.segmentation_scores(pred, masks > 0)
    assert {name: result[name] for name in expected} == approx(expected, abs=2e-4)


def test_reference_rows_by_hand(data, tmp_path):
    _, result = score(data, tmp_path, "--protocol", "reference", *ON_DEMO)
    images, masks = open_part(data / "demo", "test")
    _, truths = open_part(data / "demo", "train")
    truths = truths > 0
    constants = [truths.mean(axis=0) >= k / 64 for k in range(1, 65)]
    constant = max(constants, key=lambda cut: (cut & truths).sum() / (cut | truths).sum())
    raw = [image[..., 0] > skimage.filters.threshold_otsu(image[..., 0]) for image in images]
    predictions = dict(all_foreground=True, best_constant=constant, raw_threshold=raw)
    for name, pred in predictions.items():
        pred = np.broadcast_to(pred, masks.shape)
        expected = finetune_eval.segmentation_scores(pred, masks > 0)
        assert {key: result[name][key] for key in expected} == approx(expected)


def test_linear_probe_learns_on_an_encoder_that_stays(tmp_path):
    raw = write_folder(tmp_path / "raw", n=30)
    lines = ["name,label"]
    for path in (raw / "images").iterdir():
        lines.append(f"{path.stem},{int(path.stem[-1]) % 2}")
        if lines[-1].endswith("1"):                     # that class is much darker
            save_image(path, np.array(Image.open(path)) // 5)
    (raw / "labels.csv").write_text("\n".join(lines))
    prepare(raw, tmp_path / "data", "--name", "demo")
    encoder = timm.create_model("resnet50", zero_init_last=False).state_dict()
    torch.save(encoder, tmp_path / "some.pth")
    flags = f"--protocol classify --lr 0.002 --batch-size 8 --encoder {tmp_path}/some.pth"
    result, folder = tune(tmp_path / "data", tmp_path, *ON_DEMO, *flags.split(), epochs=20)
    kept = weights_of(folder)
    for name in encoder.keys() - {"fc.weight", "fc.bias"}:
        assert encoder[name].equal(kept[f"encoder.{name}"])
    confusion = np.array(result["confusion"])           # true classes by row
    recall = np.mean(confusion.diagonal() / confusion.sum(axis=1))
    assert result["macro_recall"] == approx(recall)
    assert recall > .8


class Local(torch.nn.Module):
    """A network that sees 5 pixels around: what it says of a pixel does not depend on a window
    that holds those."""

    def forward(self, x):
        gray = x.mean(dim=1, keepdim=True)
        return F.avg_pool2d(gray, 11, stride=1, padding=5, count_include_pad=False)


@mark.parametrize("shape", [(32, 32), (20, 90), (131, 97), (1, 1)])
def test_tiles_have_no_seams(shape):
    noise = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 3).reshape(*shape, 3)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX)
    whole = finetune_eval.predict_logits(Local(), image[None], "cpu")[0]
    mask = finetune_eval.predict_tiled(Local(), image, 32, 32, "cpu")
    assert mask.shape == shape
    is_clear = np.abs(whole) > .05      # a window's own border counts, by less than 3 % of a window
    assert array_equal(mask[is_clear], whole[is_clear] > 0)


def test_flips_are_the_mean_over_four_views():
    def bright_at_the_top(x):                                   # sees the place alone
        return torch.linspace(-1, 3, 32 * 32).expand(len(x), 1, -1).unflatten(2, (32, 32))

    image = np.zeros((1, 32, 32, 3), np.uint8)
    logits = finetune_eval.predict_logits(bright_at_the_top, image, "cpu", flips=True)
    assert np.allclose(logits, 1, atol=1e-5)


# ========================================================================================= promises
# No label is seen before it may be; a killed run goes on to the bit; workers, ranks, a full disk
# and a second process change nothing; a file that is copied stands alone.

def test_no_true_mask_is_read_and_workers_do_not_matter(data, run, tmp_path):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*_masks.npy"))
    blind = train(tmp_path / "data", tmp_path, "--workers", "2")
    assert contents(blind) == contents(run)


def test_test_masks_are_never_seen_before_the_score(small_data, tmp_path):
    """Other test masks change the score, and not a bit of the network."""
    noisy = shutil.copytree(small_data, tmp_path / "noisy")
    np.save(noisy / "demo/test_masks.npy", rng.integers(0, 2, (3, 32, 32), np.uint8))
    flags = [*ON_DEMO, "--protocol", "supervised", "--labels", "8"]
    clean, folder = tune(small_data, tmp_path / "clean", *flags)
    other, other_folder = tune(noisy, tmp_path / "other", *flags)
    assert contents(folder) == contents(other_folder)
    assert clean["iou_global"] != other["iou_global"]


DIE_BEFORE_THE_SECOND_SAVE = """
import os, pathlib, signal, sys, pretrain
replace, saves = pathlib.Path.replace, []

def replace_or_die(source, target):
    saves.extend([target] * (pathlib.Path(target).name == "last.pt"))
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)

pathlib.Path.replace = replace_or_die
pretrain.main(sys.argv[1:])
"""


@fixture(scope="session")
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


@mark.parametrize("data_set, flags", [
    ("lens_data", "--refine"), ("small_data", "--method byol"),
    ("small_data", "--method dino --backbone vit_small"),
    ("small_data", "--method mae --backbone vit_small")])
def test_a_killed_run_resumes_to_the_bit(data_set, flags, tmp_path, request):
    """One a family: masks in files; moving average; centre and schedules; masks in the network."""
    folder = request.getfixturevalue(data_set)
    flags = [*flags.split(), "--batch-size", "4"]
    whole = train(folder, tmp_path / "whole", *flags)
    script = ["-c", DIE_BEFORE_THE_SECOND_SAVE, *command(folder, tmp_path / "cut", *flags)]
    assert subprocess.run([sys.executable, *script], cwd=HERE).returncode == -signal.SIGKILL
    cut = train(folder, tmp_path / "cut", *flags, "--workers", "1")
    assert contents(cut) == contents(whole)
    for row, other in zip(log_of(cut), log_of(whole), strict=True):
        assert row | dict(seconds="") == other | dict(seconds="")


def test_a_finished_run_is_left_alone_or_completed(data, run, copied_run, tmp_path):
    before = (copied_run / "last.pt").stat()
    assert before.st_size < 10_000                              # its weights are in best.pt alone
    train(data, tmp_path)
    assert (copied_run / "last.pt").stat() == before
    for name in ("samples.png", "encoder.pth"):                 # as if killed before the last files
        (copied_run / name).unlink()
    train(data, tmp_path)
    assert contents(copied_run) == contents(run)
    assert (copied_run / "samples.png").exists()


def test_refined_run_learns_from_trusted_masks(lens_data, tmp_path):
    folder = train(lens_data, tmp_path, "--refine", epochs=1)
    evidence = config_of(folder)["refinement"]
    assert evidence["channel"] == "blue"
    for part in ("train", "val"):
        images, truth = open_part(lens_data / "demo", part)
        masks = np.load(folder / f"{part}_masks.npy")
        otsu = pretrain.pseudo_mask(images, foreground="dark")
        assert (masks == truth).mean() > .95 > (otsu == truth).mean()
    method = pretrain.MedSASS("resnet50", 48)
    method.refine = pretrain.REFINEMENTS
    sets = pretrain.image_sets(method, lens_data / "demo", 0, folder)
    is_trusted = np.load(folder / "train_trusted.npy")
    assert [row for _, row in sets.train.rows] == np.flatnonzero(is_trusted).tolist()
    assert len(sets.train) < sets.epoch_size == 14


def discs(centres, radius):
    """Return masks with discs at int (N, discs, 2), bool (N, 64, 64)."""
    masks = np.zeros((len(centres), 64, 64), np.uint8)
    for mask, of_mask in zip(masks, centres.tolist(), strict=True):
        for centre in of_mask:
            cv2.circle(mask, centre, radius, 1, -1)
    return masks > 0


@mark.parametrize("n", [8, 9, 40, 400])
def test_position_drops_blobs_in_a_corner_but_no_object_that_lies_anywhere(n):
    generator = np.random.default_rng(n)
    middle = discs(generator.integers(26, 39, (n, 1, 2)), 10)
    blobs = middle.copy()
    blobs[::3, :7, :7] = True
    masks, _ = pretrain.position_masks(blobs)
    assert not masks[:, :6, :6].any() and (masks & middle).sum() == middle.sum()
    anywhere = discs(generator.integers(-12, 76, (n, 4, 2)), 8)
    masks, reliability = pretrain.position_masks(anywhere)
    opened = np.array([pretrain.open_mask(mask, 1) for mask in anywhere])
    assert (masks & opened).sum() == opened.sum() and reliability < .3
    thin = discs(generator.integers(0, 64, (n, 12, 2)), 5)
    assert np.array_equal(pretrain.position_masks(thin)[0], thin)
    assert not pretrain.position_masks(middle & False)[0].any()


def test_two_kinds_of_images_are_warned_of(tmp_path, capfd):
    for k in range(60):
        picture, _ = spot(48, 48, k)
        if k % 2:
            picture = cv2.GaussianBlur(rng.integers(0, 256, (48, 48), np.uint8), (0, 0), 1)
        save_image(tmp_path / "raw" / f"{k}.png", picture)
    prepare(tmp_path / "raw", tmp_path, "--name", "demo", "--foreground", "bright")
    train(tmp_path, tmp_path / "runs", "--refine", epochs=1)
    assert "training images are of two kinds" in capfd.readouterr().out


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    peaks = []
    for n in (300, 1200):
        np.save(tmp_path / "train_images.npy", rng.integers(0, 256, (n, 64, 64, 3), np.uint8))
        tracemalloc.start()
        rows = pretrain.rows_of(tmp_path, "train")
        images = pretrain.Images(tmp_path, rows, torchvision.transforms.v2.Identity(), 0)
        assert images[0, n - 1][1].shape == (3, 64, 64)
        mapped = np.load(tmp_path / "train_images.npy", mmap_mode="r")
        pretrain.decide_refinement(mapped, "dark")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 10 ** 6
    peaks = []
    for times in (1, 8):                                        # and with the height of a picture
        tall = np.zeros((128 * times, 96, 3), np.uint8)
        tracemalloc.start()
        finetune_eval.predict_tiled(Local(), tall, 32, 32, "cpu")
        peaks.append(tracemalloc.get_traced_memory()[1] - tall[..., 0].size)    # but for the mask
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2


def test_encoder_only_leaves_the_decoder_as_it_began(small_data, tmp_path):
    folder = train(small_data, tmp_path, "--train", "encoder", epochs=1)
    torch.manual_seed(pretrain.seed_from(0))
    begin = build_unet("resnet50", 32).state_dict()
    changed = differing(begin, weights_of(folder))
    assert {"encoder.conv1.weight", "encoder.bn1.running_mean"} <= changed
    assert all(name.startswith("encoder.") for name in changed)


def test_training_starts_from_an_encoder(small_data, run, tmp_path):
    given = run / "encoder.pth"
    folder = train(small_data, tmp_path, "--encoder", given, "--lr", "0", epochs=1)
    changed = differing(load(folder / "encoder.pth"), load(given))
    assert all("running" in name or "num_batches" in name for name in changed)


def test_patience_stops_and_exports_the_best(small_data, tmp_path):
    """Nothing learns, so that epoch 1 stays the best."""
    folder = train(small_data, tmp_path, "--lr", "0", "--patience", "2", epochs=30)
    best = load(folder / "best.pt")
    assert (len(log_of(folder)), best["epoch"]) == (3, 1)
    assert not differing(prefixed("encoder.", load(folder / "encoder.pth")), best["model"])


def test_batchnorm_is_settled_on_plain_training_images(data, run):
    """The mean over batches of one size is that over all images."""
    encoder = load(run / "encoder.pth")
    images = torch.from_numpy(np.load(data / "demo/train_images.npy")).permute(0, 3, 1, 2)
    maps = F.conv2d(pretrain.normalise(images), encoder["conv1.weight"], stride=2, padding=3)
    assert torch.allclose(maps.mean(dim=(0, 2, 3)), encoder["bn1.running_mean"], atol=1e-5)


@mark.parametrize("flags, name", [
    ("--train encoder --threshold ght --loss dice --foreground dark --epochs 20 --batch-size 8"
     " --amp bf16", "medsass-encoder-ght-dice-dark-e20-b8-bf16"),
    ("--encoder a/encoder.pth --epochs 1 --lr 0", "medsass-from-encoder-e1-lr0.0"),
    ("--refine", "medsass+"), ("--refine trust position frame channel", "medsass+"),
    ("--refine frame channel", "medsass+channel-frame"),
    ("--method simsiam --threshold ght --lr 3e-3", "simsiam-lr0.003")])
def test_variants_name_their_folder(flags, name):
    assert pretrain.parse_args(["--dataset", "demo", *flags.split()])[1] == name


@mark.parametrize("flags", [
    "--amp fp16 --batch-size 2 --threshold ght --loss bce",
    "--amp bf16 --threshold adaptive_mean --loss focal"])
def test_other_precisions_thresholds_and_losses_train(flags, small_data, tmp_path):
    folder = train(small_data, tmp_path, *flags.split(), epochs=1)
    assert math.isfinite(float(log_of(folder)[0]["train_loss"]))


TERM_TO_ITS_GROUP = """import os, subprocess, sys, pretrain, prepare_data
def stop(self, step, total):
    if step == 5:                                       # by somebody else, as a cluster does
        kill = f"kill -s TERM -- -{os.getpgrp()}"
        subprocess.run(["sh", "-c", kill], start_new_session=True)
pretrain.MedSASS.after_step = stop
prepare_data.run_script(lambda: pretrain.main(sys.argv[1:]), "the same command goes on")
"""


def limit_file_size():
    """Make the disk full after a megabyte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, 10 ** 6))


def test_a_stop_or_a_full_disk_loses_an_epoch_at_most(data, run, tmp_path):
    flags = command(data, tmp_path, "--workers", "2")
    lines = fails("-c", TERM_TO_ITS_GROUP, *flags, start_new_session=True)
    assert lines[-1].endswith("; the same command goes on")
    path = tmp_path / "demo/resnet50/medsass-e2/seed0/last.pt"
    before = path.read_bytes()
    lines = fails("pretrain.py", *flags, preexec_fn=limit_file_size)
    assert "goes on from the last whole epoch" in lines[-1]
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.tmp"))
    pretrain.main(flags)
    assert contents(path.parent) == contents(run)


def test_a_crash_does_not_wait_for_its_workers(small_data, tmp_path):
    """A traceback holds the loader, and Python would wait for ever."""
    crash = "import sys, pretrain; del pretrain.MedSASS.after_step; pretrain.main(sys.argv[1:])"
    flags = command(small_data, tmp_path, "--workers", "2")
    end = subprocess.run([sys.executable, "-c", crash, *flags], cwd=HERE, timeout=100)
    assert end.returncode == 1


@mark.parametrize("changed, words", [
    ("runs/demo/resnet50/medsass-e2/seed0/config.json", "another one"),     # of a second process
    ("data/demo/meta.json", "data/demo was prepared again")])
def test_a_run_ends_if_another_process_takes_it_over_or_prepares_its_data(
        changed, words, data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / changed

    def change(self, step, total):
        if step == 5:                                   # of ten
            text = path.read_text()
            path.write_text(text.replace('"fingerprint": "', '"fingerprint": "0'))

    monkeypatch.setattr(pretrain.MedSASS, "after_step", change)
    refused(lambda: train(tmp_path / "data", tmp_path / "runs"), words)
    [last] = tmp_path.glob("runs/demo/*/*/*/last.pt")
    assert load(last)["epoch"] == 1


IN_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
KILL_RANK_1 = """import os, sys, pretrain
if os.environ["RANK"] == "1":
    pretrain.DINO.after_step = lambda *args: os.kill(os.getpid(), 9)
pretrain.main(sys.argv[1:])
"""


def test_two_ranks_train_one_run(lens_data, tmp_path):
    """Rank 0 alone writes, and the other waits for the refined masks."""
    flags = command(lens_data, tmp_path, "--batch-size", "4", "--refine")
    subprocess.run([*IN_RANKS, "pretrain.py", *flags], cwd=HERE, check=True, timeout=200)
    [folder] = tmp_path.glob("demo/*/*/seed0")
    assert len(log_of(folder)) == 2
    assert config_of(folder)["ranks"] == 2
    score(lens_data, tmp_path / "results", "--run", folder)


def test_a_killed_rank_ends_the_run(small_data, tmp_path):
    """The other must not wait for it in a collective call."""
    (tmp_path / "kill.py").write_text(KILL_RANK_1)
    flags = command(small_data, tmp_path, "--batch-size", "2", "--method", "dino")
    end = subprocess.run([*IN_RANKS, str(tmp_path / "kill.py"), *flags], timeout=200,
                         env=os.environ | dict(PYTHONPATH=str(HERE)))
    assert end.returncode == 1
    assert list(tmp_path.glob("demo/*/*/seed0/config.json"))
    assert not list(tmp_path.glob("demo/*/*/seed0/samples.png"))


def test_protocols_train_what_they_say(data, copied_run, tmp_path):
    source = weights_of(copied_run)
    of_run = ["--run", copied_run, "--protocol"]
    frozen, folder = tune(data, tmp_path, *of_run, "frozen", "--labels", "0.1")
    changed = {name.split(".")[0] for name in differing(weights_of(folder), source)}
    assert changed == {"up1", "up2", "up3", "head"}
    assert (frozen["n_labels_train"], frozen["n_labels_val"]) == (6, 2)
    tuned, folder = tune(data, tmp_path, *of_run, "finetune", "--labels", "3")
    assert "encoder.conv1.weight" in differing(weights_of(folder), source)
    assert tuned["n_labels_train"] == 3
    assert frozen["budget_steps"] == tuned["budget_steps"] == 5     # few labels, same steps
    _, result = score(data, tmp_path, "--run", folder)          # of the tuned network
    assert result["iou_global"] == tuned["iou_global"]
    again = ["--run", folder, "--protocol", "finetune"]
    refused(lambda: score(data, tmp_path, *again), folder, "has seen labels")
    other = tmp_path / "other"
    prepare_data.main(f"--dataset demo --size 32 --out {other} --seed 3".split())
    refused(lambda: score(other, tmp_path, "--run", folder), "another preparation of demo")


def test_supervised_is_fine_tuning_of_an_untrained_encoder(data, tmp_path):
    encoder = tmp_path / "untrained.pth"
    torch.manual_seed(pretrain.seed_from(0))            # as pre-training does
    models.export_encoder(models.build_unet("resnet50"), encoder)
    few = [*ON_DEMO, "--labels", "2", "--protocol"]
    _, scratch = tune(data, tmp_path, *few, "supervised")
    _, tuned = tune(data, tmp_path, *few, "finetune", "--encoder", str(encoder))
    assert not differing(weights_of(scratch), weights_of(tuned))


def test_semi_is_the_average_that_two_folds_choose(data, copied_run, tmp_path):
    flags = ["--run", str(copied_run), "--protocol", "semi", "--labels", "6"]
    result, folder = tune(data, tmp_path, *flags, epochs=4)
    before = weights_of(copied_run)
    tuned, kept = [weights_of(path) for path in (folder / "tuned", folder)]
    scores = result["fold_scores"]
    weight = result["weight"]
    assert scores[str(weight)] == max(scores.values()) and list(scores) == [
        "0", "0.25", "0.5", "0.75", "1"]
    name = "head.weight"
    assert torch.allclose(kept[name], before[name].lerp(tuned[name], weight))
    assert sum(result["fold_labels"]) == 6 + 2 and result["fold_steps"] == 10
    path, again = score(data, tmp_path, "--run", str(folder))   # of the network that was kept
    assert again["iou_global"] == result["iou_global"] and "semi-l6-e4" in str(path)
    _, folder = tune(data, tmp_path, *flags[:3], "finetune", *flags[4:], epochs=4)
    assert not differing(weights_of(folder), tuned)             # B is what finetune gives


def test_semi_reads_no_other_label_and_is_repeatable(data, copied_run, tmp_path):
    blind = Path(shutil.copytree(data, tmp_path / "blind"))
    masks = np.load(blind / "demo/train_masks.npy")
    names = prepare_data.read_names(data / "demo", "train")
    rows = finetune_eval.labelled_rows(names, range(64), 2 / 64, 0)
    masks[~np.isin(range(64), rows)] = 1
    np.save(blind / "demo/train_masks.npy", masks)
    flags = ["--protocol", "semi", "--labels", "2", "--run", str(copied_run)]
    flags += ["--epochs", "4", "--workers", "0"]
    _, whole = score(data, tmp_path / "whole", *flags)
    folder = copied_run / "semi-l2-e4"
    kept = weights_of(folder)
    shutil.rmtree(folder)
    _, again = score(blind, tmp_path / "again", *flags)
    assert not differing(kept, weights_of(folder)) and again["weight"] == whole["weight"]


def test_a_copied_run_is_what_its_config_says(data, run, tmp_path):
    network = tmp_path / "Downloads/network"
    network.mkdir(parents=True)
    for name in ("config.json", "best.pt"):
        shutil.copy(run / name, network)
    path, _ = score(data, tmp_path / "out", "--run", str(network))
    assert path.parts[-5:] == ("demo", "resnet50", "medsass-e2", "seed0", "transfer.json")


def test_report_pools_seeds_but_no_other_preparation_and_names_what_it_cannot_read(
        data, run, tmp_path):
    path, result = score(data, tmp_path, "--run", run)
    for name, change in dict(again=dict(seed=1), other=dict(data="other")).items():
        path.with_name(f"{name}.json").write_text(json.dumps(result | change))
        shutil.copy(path.with_suffix(".csv"), path.with_name(f"{name}.csv"))
    (tmp_path / "foreign.json").write_text('{"a": [1]}')
    finetune_eval.main(["--report", "--out", str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "foreign.json" in text
    iou = f"{result['iou_global']:.4f}"
    assert f"| medsass-e2: transfer | 0 | {iou} ± 0.0000 (2) |" in text
    assert f"| medsass-e2: transfer | 0 | {iou} (1) |" in text


@mark.parametrize("path", [
    HERE / "models.py", HERE / "losses.py", *HERE.glob("baselines/*.py")])
def test_files_that_are_copied_import_nothing_of_ours(path):
    imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    assert not {*imported} & {"baselines", "losses", "models", "prepare_data", "pretrain"}


def test_readme_snippets_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE / "baselines")
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save("image.png")
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    loop, _, _ = byol.__doc__.partition("Any other")
    loop = textwrap.dedent(loop.partition("timm.\n")[2])
    assert len(snippets) == 2
    for code in (*snippets, f"import torch\nfrom byol import BYOL\n{loop}"):
        for old, new in (("runs/demo/resnet50/medsass-e16/seed0", str(run)),
                         ("(64, 64)", "(32, 32)"), ("(32, 3, 64, 64)", "(4, 3, 32, 32)"),
                         ("img_size=64", "img_size=32"), ("(16)", "(2)")):
            code = code.replace(old, new)
        exec(code, {})
    assert Path("encoder.pth").exists()


def test_an_empty_folder_of_the_users_own_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "text.png").write_text("no picture")
    flags = f"--dataset folder --raw {tmp_path}/raw --out {tmp_path}/mine"
    refused(lambda: prepare_data.main(flags.split()), "nothing was written")
    assert not [*(tmp_path / "mine").iterdir()]


def test_images_of_one_name_are_all_found(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("q.png", "q.jpg", "images/q.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    assert len(prepare_data.find_files(tmp_path, match=False).images) == 3


# ================================================================================== files and masks
# A file is read as a viewer shows it or refused with its path; a mask means what its values say; no
# picture or patient is in two parts, and nothing is left out without a word.

def prepared(out):
    """[(part, row of its table, image, mask or None)] of a prepared data set."""
    found = []
    for part in PARTS:
        images, masks = open_part(out, part)
        rows = read_names(out, part)
        if masks is None:
            masks = []
        for row, image, mask in itertools.zip_longest(rows, images, masks):
            found.append((part, row, image, mask))
    return found


def groups_in(out):
    """Return the groups, each of which one part has all of."""
    part_of = {}
    for part, row, *_ in prepared(out):
        assert part_of.setdefault(row["group"], part) == part
    return {*part_of}


def check_as_written(out, written):
    """Check images and masks against write_layout's; yield (part, row, what its names say)."""
    found = prepared(out)
    assert len(found) == len(written)
    for part, row, image, mask in found:
        [key] = [key for key in written if key in row["name"]]
        gray, expected, fields = written[key]
        assert np.corrcoef(image[..., 1].ravel(), gray.ravel())[0, 1] > .9
        assert array_equal(mask, expected)
        yield part, row, fields


@fixture
def raw(tmp_path):
    return write_folder(tmp_path / "in/raw")


def prepare_beside(raw, *flags):
    """Prepare a folder into out/ beside it, in place of what is there."""
    return prepare(raw, raw.parent / "out", "--overwrite", *flags)


def refuse(raw, *words):
    """Check that a folder is refused with these words, and nothing is written."""
    refused(lambda: prepare_beside(raw), *words)
    assert not (raw.parent / "out").exists()


def test_folder_is_resized_split_and_repeatable(raw, tmp_path):
    out = prepare_beside(raw)
    again = prepare(raw, tmp_path / "more")
    names = {*os.listdir(out)} - {"meta.json"}
    assert contents(out, names) == contents(again, names)
    for _, row, image, mask in prepared(out):
        gray = cv2.imread(f"{raw}/images/{row['name']}.png", 0)
        truth = cv2.imread(f"{raw}/masks/{row['name']}.png", 0)
        gray, truth = [cv2.resize(page, (32, 32), interpolation=cv2.INTER_AREA)
                       for page in (gray, truth)]
        assert array_equal(image[..., 0], gray)
        assert array_equal(mask, truth > 127)
    counts = prepare_data.read_meta(out)["counts"]
    assert [*counts.values()] == [8, 1, 3]                      # cut at int(8.4) and int(9.6)
    refused(lambda: prepare(raw, tmp_path / "more"), again, "--overwrite")
    prepare_beside(raw, "--seed", "1")
    assert os.listdir(out.parent) == ["raw"]
    assert read_names(out, "test") != read_names(again, "test")


@mark.parametrize("table", [                     # as spreadsheets write them
    "name;label\np0_00;gut\np0_01.png;schlecht für\n".encode("cp1252"),
    "name\tlabel\np0_00\tgut\np0_01.png\tschlecht für\n".encode("utf-16"),
    "\ufeffname,label \np0_00,gut\np0_01.png,schlecht für\n".encode()])
def test_groups_stay_whole_and_labels_are_taken(table, raw):
    (raw / "labels.csv").write_bytes(table)
    out = prepare_beside(raw, "--group-regex", r"^(p\d+)_")
    assert groups_in(out) == {"p0", "p1", "p2", "p3"}
    labels = {row["name"]: row["label"] for _, row, _, _ in prepared(out)}
    assert (labels["p0_00"], labels["p0_01"], labels["p0_02"]) == ("gut", "schlecht für", "")
    (raw / "labels.csv").write_text("name,label\nS00.PNG,1\n")
    refused(lambda: prepare_beside(raw), "labels.csv", "S00")


def test_wide_numbers_are_stretched_between_their_percentiles(tmp_path):
    wide = rng.integers(1000, 3000, (6, 9, 3), np.uint16)
    cv2.imwrite(str(tmp_path / "a.png"), wide[..., ::-1])
    expected = np.interp(wide, np.percentile(wide, (.1, 99.9)), (0, 255)).round()
    assert array_equal(read_image(tmp_path / "a.png"), expected)


@mark.parametrize("orientation, name", [(6, "a.png"), (5, "a.webp"), (7, "a.tif")])
def test_orientations_are_undone(orientation, name, tmp_path):
    image = Image.fromarray(rng.integers(0, 256, (40, 28, 3), np.uint8))
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / name, exif=exif, lossless=True)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / name))
    assert array_equal(read_image(tmp_path / name), expected)


@mark.parametrize("dtype, how", [
    ("u2", dict(byteorder=">")), ("u2", dict(compression="zlib", predictor=True)),
    ("f4", dict(rowsperstrip=7)), ("f8", dict(bigtiff=True)), ("i1", {}), ("u4", {}),
    ("u1", dict(photometric="miniswhite"))])
def test_tiffs_are_read_rightly_or_refused(dtype, how, tmp_path, monkeypatch):
    shown = stored = (spot(48, 64)[0] // 2).astype(dtype)
    if "photometric" in how:
        stored = ~shown
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored, metadata=None, **dict(photometric="minisblack") | how)
    found = read_image(path)
    assert array_equal(found, prepare_data.to_rgb(prepare_data.Picture(shown)))
    monkeypatch.setitem(sys.modules, "tifffile", None)          # as if it were not installed
    try:
        assert array_equal(read_image(path), found)
    except ValueError as error:
        assert "pip install tifffile" in str(error)


MR = Path(pydicom.data.get_testdata_file("MR_small.dcm"))
FRAMES = Path(pydicom.data.get_testdata_file("SC_rgb_rle_2frame.dcm"))


def test_dicom_is_shown_through_its_window(tmp_path):
    """That of PS3.3, C.11.2.1.2.1; MONOCHROME1 is then inverted."""
    ds = pydicom.dcmread(MR)
    ds.RescaleSlope, ds.RescaleIntercept = 2, -100
    ds.WindowCenter, ds.WindowWidth = 1100, 3200
    ds.PhotometricInterpretation = "MONOCHROME1"
    ds.save_as(tmp_path / "a.dcm")
    values = ds.pixel_array * 2. - 100
    shown = (((values - (1100 - .5)) / (3200 - 1) + .5) * 255).clip(0, 255)
    found = read_image(tmp_path / "a.dcm")[..., 0]
    assert np.abs(255 - found - shown).max() <= .5 + 1e-6
    assert array_equal(read_image(FRAMES, 1), pydicom.dcmread(FRAMES).pixel_array[1])
    with raises(ValueError, match=f"^{FRAMES}: .*page 9"):
        read_image(FRAMES, 9)


def test_metadata_never_decide_whether_pixels_can_be_read(tmp_path):
    gray, _ = spot(24, 30)
    info = PngImagePlugin.PngInfo()
    info.add(b"eXIf", b"no EXIF block")
    large = rng.integers(0, 256, 3 * 10 ** 6, np.uint8).tobytes()
    save_image(tmp_path / "a.png", gray, pnginfo=info)
    save_image(tmp_path / "b.png", gray, icc_profile=large)
    for name in ("a.png", "b.png"):
        assert array_equal(read_image(tmp_path / name)[..., 0], gray)


def test_what_is_transparent_is_shown_on_white(tmp_path):
    rgba = np.full((2, 3, 4), (10, 20, 30, 255), np.uint8)
    rgba[0, :, 3] = 0, 51, 102
    save_image(tmp_path / "a.png", rgba)
    expected = np.full((2, 3, 3), (10, 20, 30))
    expected[0] = [[255, 255, 255], [206, 208, 210], [157, 161, 165]]
    assert array_equal(read_image(tmp_path / "a.png"), expected)


def test_each_side_is_resized_by_its_own_rule():
    strip = np.repeat(np.arange(3000) % 2 * 200, 24).reshape(3000, 24).astype(np.uint8)
    assert set(np.unique(prepare_data.resize(strip, 60))) == {100}  # means of whole columns


def test_padding_of_dicom_is_the_darkest_and_not_counted(tmp_path):
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        ds = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm"))
        pixels = np.linspace(100, 1000, 64 * 64).reshape(64, 64).astype(np.int16)
        pixels[:, :20] = -2000
        ds.PixelData = pixels.tobytes()
        ds.PhotometricInterpretation = photometric
        ds.add_new("PixelPaddingValue", "SS", -2000)
        for name in ("WindowWidth", "WindowCenter"):
            if name in ds:
                delattr(ds, name)
        ds.save_as(tmp_path / "a.dcm")
        shown = read_image(tmp_path / "a.dcm")[..., 0]
        assert not shown[:, :20].any() and np.ptp(shown[:, 20:]) >= 254


@mark.parametrize("tested", ["test", "validation"])
def test_a_part_that_is_not_given_is_cut_from_train(tested, tmp_path, capsys):
    for part, n in (("train", 20), (tested, 4)):
        for k in range(n):
            picture, mask = spot(40, 40, n, k)
            save_image(tmp_path / f"raw/{part}/images/{k}.png", picture)
            save_image(tmp_path / f"raw/{part}/1st_manual/{k}_manual1.gif", mask * 255)
    out = prepare(tmp_path / "raw", tmp_path / "out")
    assert tuple(len(read_names(out, part)) for part in PARTS) == (17, 3, 4)
    assert "3 of 20 training images" in capsys.readouterr().out
    assert open_part(out, "test")[1].any(axis=(1, 2)).all()


def test_patients_of_a_table_stay_in_one_part(raw):
    lines = ["name,patient_id", *(f"{path.stem},{k // 4}" for k, path in
                                  enumerate(sorted((raw / "images").iterdir())))]
    (raw / "labels.csv").write_text("\n".join(lines))
    assert len(groups_in(prepare_beside(raw, "--group-regex", ".+"))) == 3


def test_dicom_patients_stay_whole_and_unnamed(tmp_path):
    """An id is kept as a hash."""
    ds = pydicom.dcmread(MR)
    (tmp_path / "raw").mkdir()
    for k in range(18):
        ds.PatientID = f"Mustermann{k // 3}"
        ds.PixelData = np.roll(ds.pixel_array, k + 1).tobytes()
        ds.save_as(tmp_path / f"raw/{k}.dcm")
    out = prepare_beside(tmp_path / "raw")
    assert len(groups_in(out)) == 6
    for file in out.iterdir():
        assert b"Mustermann" not in file.read_bytes()


disc = cv2.circle(np.zeros((48, 64), np.uint8), (30, 22), 12, 1, -1)
halves = np.where(np.arange(48)[:, None] < 20, disc, disc * 3)  # two classes, 1 above 3
soft = cv2.GaussianBlur(disc * 255, (0, 0), .8)
ringed = np.where(cv2.dilate(disc, np.ones((9, 9))) > disc, 255, disc)      # an ignored border
red = np.dstack([disc * 255, disc * 0, disc * 0])
classes = red + np.dstack([disc * 0, disc * 0, (halves == 3) * np.uint8(255)])


def foreground(values, folder, rule="auto"):
    """The foreground of a mask file that holds these values."""
    path = folder / "mask.tif"
    photometric = "rgb" if values.ndim == 3 else "minisblack"
    if values.dtype == bool:                                    # which tifffile inverts
        save_image(path, values)
    else:
        tifffile.imwrite(path, values, photometric=photometric, metadata=None)
    return prepare_data.find_foreground(path, rule)[0]


@mark.parametrize("rule, values, expected", [
    ("auto", disc > 0, disc), ("auto", disc * 255, disc), ("auto", disc + 1, disc),
    ("auto", np.dstack([disc * 255] * 3), disc),
    ("auto", red, disc), ("auto", ~(red[..., [1, 0, 2]]), disc),        # on black or white
    ("auto", np.dstack([red * 0 + 255, disc * 255]), disc),             # in the alpha channel
    ("auto", disc * 0, disc * 0), ("auto", disc * 0 + 255, disc * 0 + 1),
    ("auto", soft, soft > 127), ("auto", soft / np.float32(255), soft > 127),
    (">2", halves, halves == 3), ("<1", halves, 1 - disc), ("1,3", halves, disc),
    ("#ff0000", classes, halves == 1),
    (">127", classes, disc)])
def test_masks_mean_what_each_file_or_the_flag_says(rule, values, expected, tmp_path):
    assert array_equal(foreground(values, tmp_path, rule), expected > 0)


@mark.parametrize("values, shown, flag", [
    (halves, "0, 1, 3", "'>0'"), (ringed, "0, 1, 255", "1 or 1,2 .*ignore value"),
    (disc.astype(np.int32) - 1, "-1, 0", "a list"), (np.minimum(soft, 60), "0, .*", "'>127'"),
    (classes, "#000000, #ff0000, #ff00ff", "'#ff0000'")])
def test_masks_of_several_meanings_are_refused(values, shown, flag, tmp_path):
    with raises(ValueError, match=f"mask.tif: .*{shown}.*--mask-foreground .*{flag}"):
        foreground(values, tmp_path)


@mark.parametrize("image_name, mask_name", [
    ("images/{k}.png", "masks/{k}.png"), ("images/{k}.BMP", "gt/{k}_GT.png"),
    ("{k}.tif", "{k}_mask.png"), ("{k}.tif", "{k}-label.png"),
    ("images/{k}.png", "images/masks/{k}_mask.png"),
    ("imagesTr/{k}_0000.png", "labelsTr/{k}.png"),              # nnU-Net's
    ("images/ä, b.{k} .png", "masks/ä, b.{k} .png"),
    ("{k}.png", ""), ("{k}_seg.png", ""),                       # all images are called so
    ("{patient}/{k}.png", "{patient}/{k}_mask.png"),
    ("images/{patient}/{k}.png", "masks/{patient}/{k}.png"),
    ("{part}/images/{k}.png", "{part}/masks/{k}.png"),
    ("set/images/{part}/{k}.png", "set/masks/{part}/{k}.png")])
def test_folders_as_people_have_them(image_name, mask_name, tmp_path):
    written = write_layout(tmp_path / "raw", image_name, mask_name, side=32)
    out = prepare_beside(tmp_path / "raw")
    for part, row, fields in check_as_written(out, written):
        if "{patient}" in image_name:
            assert row["group"] == fields["patient"]
        elif "{part}" in image_name:
            assert part == fields["part"]


@mark.parametrize("image_name, mask_name, words", [
    ("images/{k}.png", "masks/other{k}.png", ["masks/other", "no mask has the name of"]),
    ("images/{k}.png", "images/seg_{k}.png", ["seg_p0_00.png: a mask by its name"]),
    ("class{odd}/{k}.png", "", ["class0, class1", "'^([^/]+)/'", "'.+'"])])
def test_folders_of_two_readings_are_refused(image_name, mask_name, words, tmp_path):
    write_layout(tmp_path / "raw", image_name, mask_name, n=16)
    refuse(tmp_path / "raw", *words)


def test_masks_that_contradict_or_lack_are_refused(raw):
    shutil.copytree(raw / "masks", raw / "labels")
    refuse(raw, "has two masks", "labels/p0_00", "masks/p0_00")
    shutil.rmtree(raw)
    write_layout(raw, "{part}/{k}.png", "{part}/{k}_mask.png")
    next(raw.glob("val/*_mask.png")).unlink()                   # a given val part needs all
    refuse(raw, "1 bad file(s)")


def test_nothing_is_left_out_silently(raw, capsys):
    for name in ("images/a.nii.gz", "images/B.NII", "masks/extra.png", ".hidden.png"):
        shutil.copy(raw / "masks/p0_00.png", raw / name)
    shutil.copytree(raw, raw / "__MACOSX")
    (raw / "images/again").symlink_to(raw)                      # a circle
    (raw / "labels.csv").write_text("name,label\np0_00,a\nnobody,b\n")
    assert len(prepared(prepare_beside(raw))) == 12
    said = capsys.readouterr().out
    for words in ("1 masks have no image", "extra.png", "'.gz': 1", "'.nii': 1", "nobody",
                  "11 of 12 images have no label", "12 images, 12 of them with masks"):
        assert words in said


def test_the_same_picture_is_never_in_two_parts(raw, capsys):
    for path in sorted(raw.glob("*/p*")):
        shutil.copy(path, path.with_name(f"again_{path.name}"))
    for seed in "012":
        prepare_data.check(prepare_beside(raw, "--seed", seed))
    assert "12 pictures are there twice" in capsys.readouterr().out


def test_foreground_auto_tells_dark_from_bright(tmp_path):    # bright: see dsb2018
    for i in range(12):
        image, _ = prepare_data.draw_nuclei(64, np.random.default_rng(i))
        save_image(tmp_path / f"raw/{i}.png", 255 - image)
    assert prepare_data.read_meta(prepare_beside(tmp_path / "raw"))["foreground"] == "dark"


def test_every_bad_file_is_found_in_one_pass(raw, capsys):
    (raw / "images/p0_00.png").write_bytes(b"")
    (raw / "images/p0_01.png").write_bytes((raw / "images/p0_02.png").read_bytes()[:-500])
    shutil.copy(raw / "images/p3_11.png", raw / "images/p3_11.bmp")
    save_image(raw / "masks/p1_04.png", np.zeros((9, 9), np.uint8))
    refuse(raw, "4 bad file(s)", "--skip-bad")
    said = capsys.readouterr().err
    for name in ("images/p0_00", "images/p0_01", "masks/p1_04", "images/p3_11"):
        assert f"{raw}/{name}.png: " in said
    assert len(prepared(prepare_beside(raw, "--skip-bad"))) == 12 - 3


def test_images_without_masks_join_the_training_part(tmp_path, capsys):
    raw = write_folder(tmp_path / "raw", n=36)
    for i in (0, 4, 8, 9, 10, 11, 20, 35):
        next(raw.glob(f"masks/*_{i:02d}.png")).unlink()
    out = prepare_beside(raw)
    assert "8 images without a mask join the part train" in capsys.readouterr().out
    for part, row, _, mask in prepared(out):
        assert (raw / f"masks/{row['name']}.png").exists() == (mask is not None)
        assert part == "train" or mask is not None
    prepare_beside(raw, "--group-regex", "^([^_]+)_")           # not if the patient is in val, test
    left_out = re.search(r"(\d+) images without a mask are left out", capsys.readouterr().out)
    assert len(prepared(out)) == 36 - int(left_out[1])
    groups_in(out)


def test_a_killed_process_leaves_nothing_for_long(raw):
    """Its temporary files go after a day, and the old data set comes back."""
    out = prepare_beside(raw)
    place = out.parent
    (place / ".77.tmp").mkdir()
    (place / ".78.tmp").write_text("of a process that is at work")
    os.utime(place / ".77.tmp", (0, time.time() - 90000))
    out.rename(place / ".raw.old")                              # killed between two renames
    refused(lambda: prepare(raw, place), "already there")
    assert {*os.listdir(place)} == {"raw", ".78.tmp"}
    prepare_data.check(out)


def prepare_published(dataset, raw, *flags):
    """Prepare a published data set into out/ beside its folder."""
    prepare_data.main(["--dataset", dataset, "--raw", str(raw), "--size", "32", "--overwrite",
                       "--out", str(raw.parent / "out"), *flags])
    return raw.parent / "out" / dataset


PUBLISHED = {                                   # {data set: (foreground, its images, its masks)}
    "isic": ("dark", "ISIC-2017_{isic}_Data/{k}.jpg",
             "ISIC-2017_{isic}_Part1_GroundTruth/{k}_segmentation.png"),
    "xray": ("dark", "COVID-19_Radiography_Dataset/{lungs}/images/{k}.png",
             "COVID-19_Radiography_Dataset/{lungs}/masks/{k}.png"),
    "drone": ("bright", "original_images/{k}.jpg", "label_images_semantic/{k}.png"),
    "dsb2018": ("bright", "stage1_train/{k}/images/{k}.png", "stage1_train/{k}/masks/1.png")}


def write_published(dataset, raw):
    """Write twelve images of a data set as its authors publish it; see write_layout."""
    value = 7 if dataset == "drone" else 255
    written = write_layout(raw, *PUBLISHED[dataset][1:], side=32, value=value)
    for path in raw.glob("stage1_train/*/masks/1.png"):         # one mask for each nucleus
        mask = np.array(Image.open(path))
        save_image(path.with_name("2.png"), np.tril(mask))
        save_image(path, np.triu(mask))
    table = "image_id,melanoma,seborrheic_keratosis\np0_00,1.0,0.0\np0_01,0.0,1.0\n"
    for path in raw.glob("ISIC*_Data"):
        shutil.copy(next(path.iterdir()), path / "ISIC_superpixels.png")
        Path(str(path).replace("Data", "Part3_GroundTruth.csv")).write_text(table)
    return written


@mark.parametrize("dataset", PUBLISHED)
def test_published_layouts_become_right_arrays(dataset, tmp_path):
    written = write_published(dataset, tmp_path / "raw")
    out = prepare_published(dataset, tmp_path / "raw")
    prepare_data.check(out)
    assert prepare_data.read_meta(out)["foreground"] == PUBLISHED[dataset][0]
    for part, row, fields in check_as_written(out, written):
        if dataset == "isic":
            assert part == fields["part"]
            assert row["name"] != "p0_00" or row["label"] == "melanoma"
        elif dataset == "xray":
            assert row["label"] == fields["lungs"]


def test_tissuenet_has_its_parts_channels_and_whole_cells(tmp_path):
    (tmp_path / "raw").mkdir()
    for part in PARTS:
        gray, mask = spot(32, 32, len(part))
        np.savez(tmp_path / f"raw/tissuenet_v1.1_{part}.npz",
                 X=np.dstack([gray, 255 - gray])[None],         # nuclei, membranes
                 y=np.dstack([mask * 7, 1 - mask])[None])       # cells, nuclei
    for part, _, image, mask in prepared(prepare_published("tissuenet", tmp_path / "raw")):
        assert array_equal(mask, spot(32, 32, len(part))[1])
        red, green, blue = image[mask == 1].mean(axis=0)
        assert red == 0 and green > 150 > blue


@mark.parametrize("image_name, mask_name", [
    ("CD27_Panel_Component/{patient}_Myo_{k}_component_data.tif",
     "Labels/{patient}_Myo_{k}_component_mask_labels.tiff"),
    ("CD27 Panel-- Component/{patient}_Myo_{k}_component_data.tif",     # as in their notebook
     "CD27 cell labels/Mask Labels/{patient}_Myo_{k}_component_data.tifMask.tif")])
def test_tiles_of_a_slide_or_patient_stay_together(image_name, mask_name, tmp_path):
    raw = tmp_path / "raw"
    written = write_layout(raw, image_name, mask_name, side=960, value=7)
    out = prepare_published("dm", raw, "--split-by", "patient")
    assert groups_in(out) == {"p0_Myo", "p1_Myo", "p2_Myo", "p3_Myo"}
    assert len(groups_in(prepare_published("dm", raw))) == 12   # slides
    for _, row, _, mask in prepared(out):
        _, _, patient, number, y, x = row["name"].split("_")
        quarters = written[f"{patient}_{number}"][1].reshape(2, 480, 2, 480)
        assert mask.mean() == approx(quarters[int(y), :, int(x)].mean(), abs=.02)


def part_sizes(pairs, stratified):
    """The sizes of the parts into which the pairs are split."""
    prepare_data.join_duplicates(pairs)
    prepare_data.split_pairs(pairs, seed=3, stratified=stratified)
    parts = [pair.part for pair in pairs]
    return [parts.count(part) for part in PARTS]


def test_published_splits_at_their_full_size():
    pairs = []
    for label, n in zip(LUNGS, (3616, 6012, 10192, 1345), strict=True):
        for i in range(n):
            pairs.append(prepare_data.Pair(f"{label}{i}", f"{label}{i}", label=label))
    assert part_sizes(pairs, True) == [14730, 2202, 4233]
    tested = sum((pair.label, pair.part) == ("COVID", "test") for pair in pairs)
    assert abs(tested - .2 * 3616) < 9
    tiles = [prepare_data.Pair(f"{i}", f"{i // 12}", group=f"{i // 12}") for i in range(198 * 12)]
    assert part_sizes(tiles, False) == [1656, 240, 480]


def test_archives_are_unpacked_once_and_cannot_escape(tmp_path):
    raw = tmp_path / "raw"
    write_published("isic", raw)
    shutil.make_archive(raw / "ISIC-2017_Training_Data", "zip", raw, "ISIC-2017_Training_Data")
    shutil.rmtree(raw / "ISIC-2017_Training_Data")
    with zipfile.ZipFile(raw / "b.zip", "w") as file:
        file.writestr("../../evil", "x")
    assert len(prepared(prepare_published("isic", raw))) == 12
    assert {*os.listdir(tmp_path)} == {"raw", "out"}
    (raw / "ISIC-2017_Training_Data.zip").write_bytes(b"never read again")
    out = prepare_published("isic", raw)
    shutil.rmtree(raw / "ISIC-2017_Training_Data")
    refused(lambda: prepare_published("isic", raw), "ISIC-2017_Training_Data.zip", "get it again")
    prepare_data.check(out)                                     # what was there stays


def test_check_finds_the_same_picture_in_two_parts_and_wrong_tables(data, tmp_path):
    demo = shutil.copytree(data / "demo", tmp_path / "demo")
    np.load(demo / "test_images.npy", mmap_mode="r+")[3] = np.load(demo / "train_images.npy")[5]
    (demo / "val.csv").write_text("name,group,label\n")
    refused(lambda: prepare_data.check(demo), "val.csv has 0 rows", "fingerprint",
            "same picture in two parts: train_005 of train and test_003 of test")


# ========================================================================================= mistakes
# Each is said in one line, with a path or a flag, an exit code that is not 0, and nothing left
# behind.

@fixture(scope="session")
def bad(tmp_path_factory):
    """A folder of raw folders that cannot be prepared, and of data sets that ViT cannot take and
    that have no masks."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    write_folder(folder / "few", n=2)
    write_folder(folder / "half/train")
    prepare_data.main(f"--dataset demo --size 40 --out {folder}/odd".split())
    prepare(write_folder(folder / "bare", masks=False), folder / "prepared")
    return folder


@mark.parametrize("command, message", [
    ("prepare_data --dataset folder --raw {bad}/absent", "{bad}/absent: no such folder"),
    ("prepare_data --dataset folder --raw {bad}/empty", "{bad}/empty: no images here"),
    ("prepare_data --dataset folder --raw {bad}/few", "{bad}/few: 2 usable images are too few"),
    ("prepare_data --dataset folder --raw {bad}/half", "{bad}/half: has train: give train"),
    ("prepare_data --dataset folder", "needs --raw"),
    ("prepare_data --dataset folder --raw {bad}/few --mask-foreground nonzero", "'>127', '<128'"),
    ("pretrain --data {data} --dataset isic", "{data}/isic is not prepared: run python"),
    ("pretrain --data {data} --dataset demo --device cuda:99", "cuda:99"),
    ("pretrain --data {data} --dataset demo --encoder {bad}/absent", "{bad}/absent: no such file"),
    ("pretrain --data {data} --dataset demo --encoder {vit}/encoder.pth", "{vit}/encoder.pth"),
    ("pretrain --data {data} --dataset demo --method byol --batch-size 1", "at least 2 images"),
    ("pretrain --data {data} --dataset demo --method byol --backbone vit_small", "not for vit"),
    ("pretrain --data {data} --dataset demo --method mae", "not resnet50"),
    ("pretrain --data {data} --dataset demo --method dino --amp fp16", "not for dino"),
    ("pretrain --data {data} --dataset demo --refine --threshold ght", "2"),
    ("pretrain --data {data} --dataset demo --epochs 0", "2"),
    ("pretrain --data {bad}/odd --dataset demo --backbone vit_small", "multiple of 16, not 40"),
    ("finetune_eval --run {run} --data {bad}/prepared --dataset bare", "no test masks"),
    ("finetune_eval --run {bad}/absent", "{bad}/absent is not a run folder"),
    ("finetune_eval --run {run} --predict {bad}/absent", "{bad}/absent: no such folder"),
    ("finetune_eval --data {data} --dataset demo --backbone resnet50 --protocol classify --encoder"
     " {run}/encoder.pth", "at least two labels"),
    ("finetune_eval --data {data} --dataset demo --backbone resnet50 --protocol semi --encoder"
     " {run}/encoder.pth", "a whole U-Net, and {run}"),
    ("finetune_eval --data {data} --dataset demo --backbone resnet50 --protocol supervised"
     " --labels 65", "64 training"),
    ("finetune_eval --run {run} --predict {bad}/few --export x.pt2", "2"),
    ("finetune_eval --report", "out: no results here")])
def test_a_mistake_is_said_in_one_line_and_leaves_nothing(
        command, message, data, run, vit_run, bad, tmp_path):
    places = dict(data=data, run=run, vit=vit_run, bad=bad)
    stage, *flags = f"{command} --out {tmp_path}/out".format(**places).split()
    text = refused(lambda: sys.modules[stage].main(flags), message.format(**places))
    assert "\n" not in text
    assert not any(tmp_path.iterdir())


def test_a_run_with_other_settings_is_refused(data, copied_run, tmp_path):
    config = config_of(copied_run)
    config["settings"]["lr"] = .5
    (copied_run / "config.json").write_text(json.dumps(config))
    refused(lambda: train(data, tmp_path), copied_run, "lr (0.5 there, 0.00036 asked)")
    torch.save(dict(finished=False), copied_run / "last.pt")
    refused(lambda: score(data, tmp_path, "--run", copied_run), copied_run, "not finished")
    (copied_run / "config.json").write_text("{")
    refused(lambda: train(data, tmp_path), copied_run / "config.json", "cannot be read")
    (copied_run / "config.json").unlink()
    refused(lambda: train(data, tmp_path), copied_run, "no config.json")
    assert (copied_run / "best.pt").exists()


def test_a_loss_that_is_not_finite_ends_the_run(small_data, tmp_path, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "bce", lambda logits, target: logits.sum() * math.nan)
    refused(lambda: train(small_data, tmp_path, "--loss", "bce"), "step 1: the loss is not finite")


@mark.parametrize("error, flag", [
    (RuntimeError("unable to allocate shared memory(shm) for file"), "--workers 0"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--batch-size"),
    (OSError(28, "No space left on device", "x.npy"), "x.npy"),
    (KeyboardInterrupt(), "interrupted")])
def test_errors_of_the_system_are_said_in_one_line(error, flag):
    def main():
        raise error

    refused(lambda: prepare_data.run_script(main, "advice"), flag)


def test_every_image_is_predicted_whatever_its_name(predict, tmp_path):
    names = ["c_mask.tif", "c.png", "x_HE.png", "x.png", "n" * 246 + ".png"]
    for name in names:
        save_image(tmp_path / "in" / name, np.zeros((8, 8), np.uint8))
    save_image(tmp_path / "in/1st_manual/c_manual1.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "in/Thumbs.db").touch(mode=0)
    predict("out")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3 + len(names)


def test_predict_replaces_nothing_and_names_bad_files(predict, run, tmp_path):
    predict("out --tile")
    image = read_image(tmp_path / "in/dé.tif")
    expected = finetune_eval.predict_tiled(load_unet(run), image, 32, 32, "cpu")
    assert array_equal(np.asarray(Image.open(tmp_path / "out/dé.png")) > 0, expected)
    refused(lambda: predict("out"), tmp_path / "out", "--overwrite")
    refused(lambda: predict("in/out --overwrite"), tmp_path / "in/out", "another --out")
    (tmp_path / "in/bad.png").write_text("text")
    (tmp_path / "out/c.png").unlink()
    refused(lambda: predict("out --overwrite"), tmp_path / "in/bad.png", "not an image")
    assert (tmp_path / "out/c.png").exists()


# =========================================================================================== driver
# run_all.sh makes each network once and all that is made of it, skips what is finished, and lists
# what failed.

def run_all(folder, *words, start=subprocess.run, **settings):
    """Run run_all.sh in `folder`, with no other settings in its environment, to its end; or only
    start it, by subprocess.Popen."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return start(["bash", folder / "run_all.sh", *words], env=dict(settings, PATH=path), text=True,
                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def dry_run(folder, word, **settings):
    """Return the runs that are listed, each with what is made of it in the lines below it."""
    shutil.copy(HERE / "run_all.sh", folder)                    # where no data are prepared
    end = run_all(folder, word, DRY_RUN="1", **settings)
    assert not end.returncode and os.listdir(folder) == ["run_all.sh"]
    return re.split(r"\n(?=python)", end.stdout.strip())


def test_dry_run_lists_each_network_with_what_is_made_of_it(tmp_path):
    listed = dry_run(tmp_path, "main", DATASETS="a b", SEEDS="0 7", BACKBONES="resnet50",
                     LABELS="0.1", METHODS="medsass byol mae", PROTOCOLS="transfer semi",
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
    shards = dry_run(tmp_path, "all", SHARD="1/2") + dry_run(tmp_path, "all", SHARD="02/2")
    assert len(shards) > 100 and sorted(shards) == sorted(dry_run(tmp_path, "all"))


OUTPUT_OF = """eval "$(sed -n '/^output_of()/,/^}/p' run_all.sh)"; output_of "$1" """


def output_of(command, folder=HERE):
    """Return the last file that run_all.sh expects of a command."""
    return subprocess.check_output(["bash", "-c", OUTPUT_OF, "", command], cwd=folder,
                                   text=True).strip()


def test_the_driver_knows_the_names_that_the_scripts_give(tmp_path):
    listed = "\n".join(dry_run(tmp_path, "all", DATASETS="a", SEEDS="50", LABELS="0.1 1.0 50"))
    for command in {*re.findall("python (.*)", listed)}:
        command = command.replace("RUN", "runs/a/vit_small/mae-e3/seed5")
        script, *flags = command.split()
        if script == "pretrain.py":
            args, variant = pretrain.parse_args(flags)
            expected = f"runs/{args.dataset}/{args.backbone}/{variant}/seed50/samples.png"
        else:
            args, name = finetune_eval.parse_args(flags)
            expected = f"results/{args.dataset}/{args.backbone}/{args.protocol}/seed50/{name}.json"
            if args.run:
                expected = f"results/a/vit_small/mae-e3/seed5/{name}.json"
        assert output_of(command) == expected


STAND_IN = f"""import os, pathlib, subprocess, sys, time
words = ' '.join(sys.argv)
if '--report' in words:
    sys.exit()
with open('seen', 'a') as file:
    file.write(f"{{os.environ.get('CUDA_VISIBLE_DEVICES')}} {{words}}\\n")
bad = pathlib.Path('bad')
if bad.exists() and bad.read_text() in words:
    sys.exit('reason')
while pathlib.Path('slow').exists():
    time.sleep(.05)
made = subprocess.check_output(['bash', '-c', {OUTPUT_OF!r}, '', words], text=True)
made = pathlib.Path(made.strip())
made.parent.mkdir(parents=True, exist_ok=True)
made.touch()
"""


@fixture
def project(tmp_path):
    """A copy of what run_all.sh needs, with stand-ins for the scripts: they write what is expected
    of them, note the call in `seen`, and fail or wait if a file says so."""
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "data/demo").mkdir(parents=True)
    (tmp_path / "data/demo/meta.json").write_text('{"size": 64, "seed": 0}')
    (tmp_path / "data/demo/test_masks.npy").touch()
    (tmp_path / "seen").touch()
    (tmp_path / "pretrain.py").write_text(STAND_IN)
    (tmp_path / "finetune_eval.py").write_text(STAND_IN)
    return tmp_path


SIX = dict(DATASETS="demo", SEEDS="0", BACKBONES="resnet50", METHODS="byol simsiam",
           PROTOCOLS="transfer", LABELS="0.1")


def seen(folder):
    """Return what the stand-ins were called with so far."""
    return (folder / "seen").read_text().splitlines()


def benchmark(folder, **settings):
    """Run main, which ends well, of six calls of the scripts; return all calls so far."""
    assert run_all(folder, **SIX, **settings).returncode == 0
    return seen(folder)


def test_a_failed_run_stops_no_other_is_listed_and_is_tried_again(project):
    (project / "bad").write_text("--method byol")
    end = run_all(project, **SIX)
    failed = re.search(r"failed: python pretrain.py .*byol\n +log: (\S+)\n$", end.stderr)
    assert end.returncode == 1
    assert (project / failed[1]).read_text() == "reason\n"
    assert len(seen(project)) == 5                      # its evaluation is not tried
    (project / "bad").unlink()
    assert len(benchmark(project)) == 7


def test_what_is_finished_is_skipped_unless_it_is_gone_or_older_than_its_source(project):
    """Six calls make two networks, their two scores and two baselines."""
    assert len(benchmark(project)) == len(benchmark(project)) == 6
    shutil.rmtree(project / "runs/demo/resnet50/byol")
    assert len(benchmark(project)) == 6 + 2             # it, and its score
    time.sleep(.1)
    os.utime(project / "data/demo/meta.json")
    assert len(benchmark(project)) == 8 + 6


def test_a_stopped_driver_stops_its_runs_and_goes_on(project):
    (project / "slow").touch()
    driver = run_all(project, start=subprocess.Popen, JOBS="2", **SIX)
    while len(seen(project)) < 2:
        time.sleep(.05)
    driver.terminate()
    assert driver.wait() == 130
    (project / "slow").unlink()
    time.sleep(1)
    assert len(seen(project)) == 2
    assert not (project / "runs").exists()
    assert {line.split()[0] for line in benchmark(project, GPUS="3 5")[2:]} == {"3", "5"}


# ============================================================================================ bench
# Ours beside a library that people would use instead (pytest -m bench -s test_smoke.py). A row
# fails only if ours is the slower or larger one: the ratio depends on the processor.

def record(what, against, ours, theirs):
    """Print a row of the table, in seconds or MB, and check it."""
    print(f"\n| {what} | {against} | {ours:.3g} | {theirs:.3g} | {ours / theirs:.3g} |")
    assert ours < theirs


def interleaved(*work):
    """Return the median seconds of each of the functions, called in turn, five times after one that
    does not count."""
    times = []
    for call in work * 6:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return np.median(np.reshape(times, (6, -1))[1:], axis=0)


def photograph(height, width):
    """Return uint8 (H, W, 3), smooth and random."""
    small = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return cv2.resize(small, (width, height))


@mark.bench
def test_input_path(tmp_path):
    """Read, augment, pseudo-mask, batches of 16 at 224 px, one worker."""
    images = np.stack([photograph(224, 224) for _ in range(160)])
    np.save(tmp_path / "train_images.npy", images)
    rows = pretrain.rows_of(tmp_path, "train")
    dataset = pretrain.Images(tmp_path, rows, pretrain.MedSASS("resnet50").augment, 0)
    ours = pretrain.make_loader(dataset, pretrain.Batches(160, 16, 0), 1)
    augment = transforms.BYOLTransform(transforms.BYOLView1Transform(input_size=224),
                                       transforms.BYOLView2Transform(input_size=224))
    theirs = torch.utils.data.DataLoader(
        [*map(Image.fromarray, images)], 16, num_workers=1, persistent_workers=True,
        collate_fn=lambda batch: torch.utils.data.default_collate([*map(augment, batch)]))
    seconds = interleaved(lambda: list(ours), lambda: list(theirs))
    record("input path, s for 160 images", "lightly's BYOL transform", *seconds)


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


@mark.bench
def test_training_step():
    """ResNet-50 U-Net, 224 px, batch 8, in a process of its own, against the same network, loss and
    optimiser from segmentation_models_pytorch and torch, written plainly."""
    measured = []
    for side in ("ours", "theirs"):
        out = subprocess.check_output([sys.executable, "-c", STEP, side], cwd=HERE, text=True)
        measured.append([*map(float, out.split())])
    seconds, megabytes = zip(*measured, strict=True)
    record("training step, s", "smp", *seconds)
    record("training step, MB", "smp", *megabytes)


@mark.bench
def test_preparing_jpgs_is_faster_than_a_plain_loop(tmp_path):
    """2000 jpgs of 1022x767 to arrays of 224 px, the whole script against one process."""
    raw = tmp_path / "raw"
    for i in range(20):
        save_image(raw / f"{i}.jpg", photograph(767, 1022), quality=92)
        for k in range(1, 100):
            shutil.copy(raw / f"{i}.jpg", raw / f"{i}_{k}.jpg")
    script = f"prepare_data.py --dataset folder --raw {raw} --out {tmp_path}/out --overwrite"

    def ours():
        subprocess.run([sys.executable, *script.split()], cwd=HERE, check=True)

    def plain_loop():
        np.stack([Image.open(file).convert("RGB").resize((224, 224)) for file in raw.iterdir()])

    record("preparing 2000 jpgs, s", "a plain loop", *interleaved(ours, plain_loop))
