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
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
import zipfile
from pathlib import Path
from resource import RLIMIT_FSIZE, setrlimit
from unittest.mock import Mock

import cv2
import numpy as np
import pydicom
import segmentation_models_pytorch as smp
import tifffile
import timm
import torch
import torch.nn.functional as F
import torchvision
from lightly import transforms
from lightly.loss import DINOLoss, NegativeCosineSimilarity
from lightly.models import modules, utils
from numpy import array_equal
from PIL import Image, ImageOps, PngImagePlugin
from pytest import approx, fixture, mark, raises
from skimage import filters, morphology
from sklearn import metrics
from torch import allclose, equal, manual_seed

import finetune_eval
import losses
import models
import prepare_data
import pretrain
from baselines import byol, mae
from finetune_eval import predict_logits, predict_tiled, segmentation_scores
from models import build_unet
from prepare_data import PARTS, Pair, check, open_part, read_csv, read_image, read_meta
from pretrain import METHODS, MedSASS, ellipse, open_mask, position_masks, pseudo_mask, seed_from

HERE = Path(__file__).parent
rng = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------ helpers

@fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Run each test in an empty folder of its own, its draws independent of other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    manual_seed(0)
    rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


def spot(height, width, *seed):
    """A picture with one bright disc on noise, gray uint8 (H, W), and its mask {0, 1}."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(.3, .7, 2) * (width, height)
    mask = np.zeros((height, width), np.uint8)
    cv2.circle(mask, centre.astype(int), min(mask.shape) // 5, 1, -1)
    return np.uint8(rng.normal(100, 8, mask.shape) + mask * 90), mask


def save_image(path, picture, **how):
    """Save a picture with Pillow, in a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **how)


def write_layout(raw, image_name, mask_name="", n=12, side=40, value=255):
    """Write n pictures and their masks, 0 and `value`, under such names, three of each patient.
    Return {k: (picture, mask {0, 1} or None, what its names say)}; k stands in every name."""
    written = {}
    for i in range(n):
        third = i * 3 // n
        k = f"p{i // 3}_{i:02d}"
        fields = dict(k=k, patient=k[:2], part=PARTS[third], isic=ISIC[third],
                      lungs=LUNGS[i % 4], odd=i % 2)
        gray, mask = spot(side, side, n, i)
        save_image(f"{raw}/{image_name}".format(**fields), gray)
        if mask_name:
            save_image(f"{raw}/{mask_name}".format(**fields), mask * np.uint8(value))
        written[k] = gray, mask if mask_name else None, fields
    return written


ISIC = ["Training", "Validation", "Test_v2"]
LUNGS = ["COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]


def write_folder(folder, n=12, masks=True):
    """Write a raw folder of n pictures and their masks, the same each time; return it."""
    write_layout(folder, "images/{k}.png", "masks/{k}.png" if masks else "", n=n)
    return folder


def prepare(raw, *flags):
    """Prepare a folder at 32 px, in place of what is there; return where it is by default."""
    prepare_data.main(["--dataset", "folder", "--raw", str(raw), "--size", "32", "--overwrite",
                       *map(str, flags)])
    return Path("data", Path(raw).name)


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
    prepare(write_folder(folder / "raw"), "--out", folder, "--name", "demo")
    return folder


def command(data, *flags, epochs=2):
    """Return the flags of a run on the demo, on the CPU."""
    return [*f"--dataset demo --data {data} --epochs {epochs}".split(),
            "--workers", "0", "--device", "cpu", *map(str, flags)]


def newest(paths):
    return max(paths, key=lambda path: path.stat().st_mtime_ns)


def train(data, *flags, epochs=2, out="runs"):
    """Run pretrain.py in this process on the demo; return the run folder."""
    pretrain.main(command(data, "--out", out, *flags, epochs=epochs))
    return newest(Path(out).glob("demo/*/*/seed*"))


def score(data, *flags):
    """Run finetune_eval.py in this process; return the JSON's path and the result."""
    finetune_eval.main(["--data", str(data), "--device", "cpu", *map(str, flags)])
    path = newest(Path("results").rglob("*.json"))
    return path, json.loads(path.read_text())


def tune(data, *flags, epochs=1):
    """Run finetune_eval.py with training; return the result and the folder of its training."""
    path, result = score(data, "--epochs", epochs, "--workers", "0", *flags)
    return result, newest(Path("runs").rglob(f"{path.stem}*/**/config.json")).parent


ON_DEMO = ["--dataset", "demo", "--backbone", "resnet50"]


@fixture(scope="session")
def run(data, tmp_path_factory):
    """An end-to-end ResNet-50 run of two epochs."""
    return train(data, out=tmp_path_factory.mktemp("runs"))


@fixture(scope="session")
def vit_run(data, tmp_path_factory):
    """A ViT-small run of one epoch."""
    out = tmp_path_factory.mktemp("vit")
    return train(data, "--backbone", "vit_small", epochs=1, out=out)


@fixture
def copied_run(run):
    """A copy of the run where train(data) has its folder."""
    return Path(shutil.copytree(run, "runs/demo/resnet50/medsass-e2/seed0"))


def load(path):
    return torch.load(path, weights_only=True)


def weights_of(folder):
    return load(folder / "best.pt")["model"]


def load_unet(folder):
    """Return the U-Net of a run at 32 px, in eval mode."""
    unet = build_unet(config_of(folder)["settings"]["backbone"], 32)
    unet.load_state_dict(weights_of(folder))
    return unet.eval()


def pictures(data, part="test"):
    """Return the images of a part of the demo, uint8 (N, 3, H, W), and as a network takes them."""
    images = np.array(open_part(data / "demo", part)[0]).transpose(0, 3, 1, 2)
    images = torch.from_numpy(images)
    return images, torchvision.transforms.v2.functional.normalize(
        images / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def contents(folder, names=("best.pt", "last.pt", "encoder.pth")):
    """Return the bytes of files, of the weights in a run folder; a baseline has no best.pt."""
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def differing(state, other):
    """Return the names of the tensors of `state` that are not the same in `other`."""
    return {name for name, value in state.items() if not equal(value, other[name])}


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


def python(*arguments, **options):
    """Run Python, and return how it ended."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300,
                          **options)


def fails(*arguments, **options):
    """Check that Python ends with an error and without a traceback; return the lines it says."""
    end = python(*arguments, **options)
    assert end.returncode in (1, 2)
    assert "Traceback" not in end.stderr, end.stderr
    return end.stderr.splitlines()


# ============================================================================================ smoke
# Every stage runs through its command line on the demo and leaves the files that design and README
# name. `pytest -m smoke` is these tests alone.
NETWORKS = [("medsass", "resnet50"), ("medsass", "vit_small"), ("byol", "resnet50"),
           ("simsiam", "resnet50"), ("dino", "resnet50"), ("dino", "vit_small"),
           ("mae", "vit_small"), ("simmim", "vit_small")]


@mark.smoke
@mark.parametrize("method, backbone", NETWORKS)
def test_every_method_trains_and_is_scored(method, backbone, small_data):
    flags = ["--method", method, "--backbone", backbone, "--batch-size", "4"]
    folder = train(small_data, *flags, epochs=1)
    assert {*os.listdir(folder)} - {"best.pt"} == {
        "config.json", "log.csv", "last.pt", "encoder.pth", "samples.png"}
    path, _ = score(small_data, "--run", folder)
    assert str(path) == f"results/demo/{backbone}/{method}-e1-b4/seed0/transfer.json"


@mark.smoke
@mark.parametrize("protocol", ["frozen", "finetune", "semi"])
def test_every_protocol_trains_what_it_says(protocol, data, copied_run):
    flags = ["--run", copied_run, "--labels", "0.1", "--protocol", protocol, "--seed", "7"]
    result, folder = tune(data, *flags, epochs=2)
    assert result["name"].endswith("-e2-seed7")                 # other labels, another result
    assert (result["n_labels_train"], result["n_labels_val"]) == (6, 2)
    assert result["budget_steps"] == 10                         # few labels, same steps
    changed = {name.split(".")[0] for name in differing(weights_of(folder), weights_of(copied_run))}
    assert changed - {"encoder"} == {"up1", "up2", "up3", "head"}
    assert ("encoder" in changed) == (protocol != "frozen")


@mark.smoke
def test_report_pools_seeds_but_no_other_preparation_and_names_what_it_cannot_read(data, run):
    score(data, *ON_DEMO, "--protocol", "reference")
    path, result = score(data, "--run", run)
    for name, change in dict(again=dict(seed=1), other=dict(data="other")).items():
        path.with_name(f"{name}.json").write_text(json.dumps(result | change))
        shutil.copy(path.with_suffix(".csv"), path.with_name(f"{name}.csv"))
    Path("results/foreign.json").write_text('{"a": [1]}')
    finetune_eval.main(["--report"])
    text = Path("results/README.md").read_text()
    transfer = f"| medsass-e2: transfer | 0 | {result['iou_global']:.4f}"
    for words in ("| refined_trusted |", f"{transfer} ± 0.0000 (2) |", f"{transfer} (1) |",
                  "foreign.json"):
        assert words in text


PREDICT_ELSEWHERE = """import json, sys, torch
about = {"network.json": ""}
network = torch.export.load("network.pt2", extra_files=about).module()
assert '"size": 32' in about["network.json"] and '"foreground": "bright"' in about["network.json"]
images = torch.load("images")
torch.save([network(images), network(images[:1])], "predicted")
"""


@mark.smoke
@mark.parametrize("network", ["run", "vit_run"])
def test_exported_network_needs_none_of_our_code(network, data, request):
    folder = request.getfixturevalue(network)
    finetune_eval.main(["--run", str(folder), "--export", "network.pt2"])
    images, normalised = pictures(data)
    torch.save(images, "images")
    assert not python("-I", "-c", PREDICT_ELSEWHERE).returncode
    with torch.inference_mode():
        expected = load_unet(folder)(normalised).sigmoid()
    for predicted in load("predicted"):                         # all, and one
        assert allclose(predicted, expected[:len(predicted)], atol=1e-4)


SIZES = {"a b.tif": (50, 31), "c.tif": (32, 32), "dé.tif": (20, 90), "x_HE.png": (8, 8),
         "x.png": (8, 8), "c_mask.tif": (8, 8), f"{'n' * 246}.png": (8, 8)}


@fixture
def predict(run):
    """A function that runs --predict on images of SIZES, in "in", with --out and other flags."""
    for name, size in SIZES.items():
        save_image(f"in/{name}", rng.integers(0, 256, size[::-1], np.uint8))
    for name in ("images/c.png", "1st_manual/c_manual1.png"):   # another c, and its mask
        save_image(f"in/{name}", np.zeros((8, 8), np.uint8))
    flags = ["--run", str(run), "--device", "cpu", "--predict", "in", "--out"]
    return lambda more: finetune_eval.main([*flags, *more.split()])


@mark.smoke
def test_predict_writes_a_mask_for_every_image_at_its_own_size(predict):
    predict("out --overlay")
    rows = read_csv(Path("out/foreground.csv"))
    fractions = {row["name"]: float(row["foreground_fraction"]) for row in rows}
    assert {*fractions} == {*SIZES, "images/c.png"}
    for name, size in SIZES.items():
        mask = np.asarray(Image.open(f"out/{name[:-4]}.png"))
        overlay = Image.open(f"out/overlay/{name[:-4]}.jpg")
        assert mask.shape[::-1] == overlay.size == size
        assert set(np.unique(mask)) <= {0, 255}
        assert mask.mean() / 255 == approx(fractions[name], abs=1e-6)


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
    logits = 2 * torch.randn(3, 1, 9, 7).double()
    target = (torch.rand(3, 1, 9, 7) < .3).double()
    assert allclose(losses.LOSSES[name](logits, target), theirs(logits, target), atol=1e-12)


def test_focal_cross_entropy_of_two_classes_is_the_focal_loss():
    logits = torch.randn(9, 2)
    target = torch.arange(9) % 2
    expected = losses.focal_loss(logits[:, 1] - logits[:, 0], target)
    assert allclose(losses.focal_cross_entropy(logits, target), expected, atol=1e-6)


@mark.parametrize("name", losses.LOSSES)
@mark.parametrize("value", [-1e4, 0, 1e4])
def test_half_precision_losses_and_gradients_are_finite_at_the_extremes(name, value):
    for columns in range(3):                                    # none, one of two, all
        target = (torch.arange(300) % 2 < columns).float().expand(2, 1, 300, 300)
        logits = torch.full(target.shape, value, dtype=torch.half, requires_grad=True)
        loss = losses.LOSSES[name](logits, target)
        loss.backward()
        assert torch.isfinite(logits.grad + loss).all()


SMP_NAMES = {"up1": "decoder.blocks.0", "up2": "decoder.blocks.1", "up3": "decoder.blocks.2",
             "convs.0.0": "conv1.0", "convs.0.1": "conv1.1",
             "convs.1.0": "conv2.0", "convs.1.1": "conv2.1",
             "channel": "attention.cSE", "spatial": "attention.sSE", "head": "segmentation_head.0"}


def test_resnet50_unet_and_its_gradients_are_those_of_segmentation_models_pytorch():
    theirs = smp.Unet("resnet50", encoder_weights=None, encoder_depth=3,
                      decoder_channels=(256, 128, 64), decoder_attention_type="scse").double()
    ours = build_unet("resnet50").double()
    names = {name: name for name in ours.state_dict()}
    for old, new in SMP_NAMES.items():
        names = {name: their.replace(old, new) for name, their in names.items()}
    ours.load_state_dict({name: theirs.state_dict()[their] for name, their in names.items()})
    x = torch.randn(2, 3, 70, 93).double()
    ours(x).sin().sum().backward()
    theirs(x).sin().sum().backward()
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(names[name]).grad
        if other is not parameter.grad:                         # both None if there is no skip
            assert allclose(parameter.grad, other, atol=1e-9), name
    ours.eval()
    theirs.eval()
    with torch.inference_mode():                                # other code without gradients
        assert allclose(ours(x), theirs(x), atol=1e-10)


@mark.parametrize("backbone, lacking, create", [
    ("resnet50", {"layer3", "layer4", "fc"}, timm.models.resnet50),
    ("resnet50", {"layer3", "layer4", "fc"}, torchvision.models.resnet50),
    ("vit_small", set(), timm.models.vit_small_patch8_224)])
def test_encoders_load_elsewhere_and_those_from_elsewhere_here(backbone, lacking, create):
    listed = models.export_encoder(build_unet(backbone), "f.pth")
    network = create()
    keys = network.load_state_dict(load("f.pth"), strict=False)
    assert not keys.unexpected_keys and {*keys.missing_keys} == {*listed}
    assert {name.split(".")[0] for name in listed} == lacking
    state = network.state_dict()
    of_dino = {"teacher": prefixed("backbone.", state), "args": argparse.Namespace(arch="vit")}
    of_ranks = {"model": prefixed("module.backbone.", state)}
    for content in (state, {"state_dict": state}, of_ranks, of_dino):
        torch.save(content, "f.pth")
        unet = build_unet(backbone)
        models.load_encoder(unet, "f.pth")
        assert not differing(unet.encoder.state_dict(), state)


@mark.parametrize("words, name, values", [
    ("lacks 1 .*bn1.weight", "bn1.weight", []),
    ("one .*, b\\.", "b.layer1.0.conv1.weight", [1.]),
    ("mismatch for conv1.weight", "conv1.weight", [1.]),
    ("bn1.weight .*not finite", "bn1.weight", [math.nan] * 64)])
def test_wrong_encoder_files_are_refused(words, name, values):
    state = build_unet("resnet50").encoder.state_dict()
    state.pop(name, None)
    if values:
        state[name] = torch.tensor(values)
    torch.save(state, "f.pth")
    with raises(ValueError, match=f"f.pth.*{words}"):
        models.load_encoder(build_unet("resnet50"), "f.pth")


@mark.parametrize("nu, tau, kappa, omega", [
    (1e3, 12.0, 0.0, .5), (500.0, 3.0, 800.0, .2), (1e-3, 1.0, 1e4, .9)])
def test_ght_is_the_maximum_of_barrons_score(nu, tau, kappa, omega):
    gray = np.append(rng.normal(70, 9, 300), rng.normal(130, 25, 200)).astype(np.uint8)
    scores = {}
    for t in range(gray.min(), gray.max()):             # ECCV 2020, eqs. 7-13
        scores[t] = 0
        for side, fraction in ((gray[gray <= t], omega), (gray[gray > t], 1 - omega)):
            n = side.size
            prior = n / gray.size * nu
            v = (prior * tau ** 2 + n * side.var()) / (prior + n)
            scores[t] += 2 * (n + kappa * fraction) * math.log(n)
            scores[t] -= n * (side.var() / v + math.log(v))
    t = pretrain.ght_threshold(gray, nu, tau, kappa, omega)
    assert scores[t] == approx(max(scores.values()), rel=1e-9)


@mark.parametrize("method", pretrain.THRESHOLDS)
def test_pseudo_masks_follow_their_definitions_and_a_flat_picture_has_no_foreground(method):
    images = rng.integers(0, 256, (1, 24, 20, 3), np.uint8)
    gray = cv2.cvtColor(images[0], cv2.COLOR_RGB2GRAY)
    scale = 480 / 2 ** 20                                       # Barron's pages have 2 ** 20 pixels
    replicate = dict(borderType=cv2.BORDER_REPLICATE)
    threshold = dict(
        otsu=filters.threshold_otsu(gray), fixed=127,
        ght=pretrain.ght_threshold(gray, 2 ** 29.5 * scale, kappa=2 ** 22.25 * scale),
        adaptive_mean=cv2.blur(gray, (11, 11), **replicate) - 2.,
        adaptive_gaussian=cv2.GaussianBlur(gray, (11, 11), 0, **replicate) - 2.)
    bright = pseudo_mask(images, method)
    assert array_equal(bright[0], gray > threshold[method])
    assert array_equal(pseudo_mask(images, method, "dark"), 1 - bright)
    for foreground in ("bright", "dark"):
        assert not pseudo_mask(images * 0 + 200, method, foreground).any()


@mark.parametrize("warp", [
    pretrain.Rotation(degrees=(20, 20), interpolation=Image.BILINEAR),
    pretrain.Perspective(distortion_scale=.2, p=1.0)])
def test_warps_are_torchvisions_inside_and_mirror_outside(warp):
    noise = rng.integers(0, 256, (64, 64), np.uint8)
    image = torch.from_numpy(cv2.GaussianBlur(noise, (0, 0), 2)).expand(3, 64, 64)
    white = torch.full_like(image, 255)
    params = warp.make_params([image])
    torchvisions = super(type(warp), warp).transform
    inside = torchvisions(white, params) == 255                 # black outside
    # Pillow takes (x, y) for a pixel's centre, torchvision's perspective grid (x + .5, y + .5).
    difference = warp.transform(image, params).int() - torchvisions(image, params).int()
    assert difference[inside].abs().float().mean() < 2.5
    assert (warp.transform(white, params) == 255).all()


def test_image_and_mask_are_augmented_alike():
    _, truth = spot(48, 48)
    image = torch.from_numpy(truth * 200 + 20).expand(3, 48, 48)
    method = MedSASS("resnet50", foreground="dark")
    moved = 0
    for _ in range(30):
        view, mask = method.augment(image, torchvision.tv_tensors.Mask(truth[None]))
        is_wrong = (view[1] > 110) != (mask[0] == 1)
        assert is_wrong.float().mean() < .04            # edges are sampled bilinear and nearest
        moved += not array_equal(mask[0], truth)
    assert moved > 20
    view, mask = method.augment(image)
    images = view.permute(1, 2, 0)[None].numpy()
    assert array_equal(mask, pseudo_mask(images, foreground="dark"))    # of the view itself


def flood(mask, starts):
    return morphology.reconstruction(mask & starts, mask, footprint=morphology.diamond(1)) > 0


def test_frame_is_what_skimage_floods_from_border_and_corners():
    values = rng.choice(np.uint8([40, 100, 100]), (64, 72))
    values[:9, :9] = range(50, 59)
    frequent = rng.random((64, 72)) < .4
    shared = pretrain.touching_border(frequent)
    border = np.pad(np.zeros((62, 70), bool), 1, constant_values=True)
    assert array_equal(shared, flood(frequent, border))
    corners = border & False
    corners[::63, ::71] = True
    frame = shared | flood(values <= .55 * np.median(values), corners)
    frame = morphology.dilation(frame, np.ones((5, 5)))
    assert array_equal(pretrain.image_frame(values, shared), frame)


def test_position_reliability_and_radius_equal_their_definitions():
    masks = rng.random((2, 24, 30)) < np.linspace(0, .8, 30)    # so that any halves are these two
    halves = filters.gaussian(masks * 1., (0, 1.25, 1.25), mode="mirror")   # a 24th of 30
    c = np.corrcoef(halves.reshape(2, -1))[0, 1]
    assert pretrain.position_reliability(masks, 2) == (approx(2 * c / (1 + c), rel=1e-4), 0)
    assert pretrain.position_reliability([morphology.disk(23)], 1)[1] == 24 // 7


def test_position_masks_equal_skimages_morphology():
    smooth = filters.gaussian(rng.random((6, 30, 34)), (0, 3, 3))
    masks = smooth > np.quantile(smooth, .7)
    inner = 0
    border = np.pad(np.zeros((28, 32), bool), 1, constant_values=True)
    for mask in masks:
        padded = np.pad(mask, 2, mode="edge")
        opened = morphology.opening(padded, ellipse(2), mode="ignore")[2:-2, 2:-2]
        assert array_equal(open_mask(mask, 2), opened)
        inner = inner + (opened & ~flood(opened, border))
    p = filters.gaussian(inner / 6, 34 / 24, mode="mirror")
    p = p.mean() + .7 * (p - p.mean())
    likely = pretrain.likely_positions(masks, 6, .7, 2)
    assert array_equal(likely, p >= p.max() / 2)
    for mask in masks:
        kept = flood(open_mask(mask, 2), likely)
        kept = morphology.dilation(kept, ellipse(2), mode="ignore") & mask
        kept = kept if kept.any() else mask             # true of one of the six
        expected = morphology.dilation(kept, ellipse(1), mode="ignore")
        assert array_equal(pretrain.position_mask(mask, 2, likely), expected)


@mark.parametrize("n", [8, 400])
def test_position_drops_corner_blobs_but_no_object_that_lies_anywhere(n):
    def discs(low, high, radius, each):
        masks = np.zeros((n, 64, 64), np.uint8)
        for mask in [*masks] * each:
            cv2.circle(mask, rng.integers(low, high, 2), radius, 1, -1)
        return masks > 0
    middle = discs(26, 39, 10, 1)
    middle[1] = False
    blobs = middle.copy()
    blobs[::3, :7, :7] = True
    images = blobs[..., None].repeat(3, axis=3) * np.uint8(9)
    refinement, evidence = pretrain.decide_refinement(images, "bright", ["position"])
    masks = np.stack([*refinement.refine_masks(images)])
    assert not masks[:, :6, :6].any() and masks[middle].all()
    dropped = len(blobs[::3])
    assert evidence["dropped_components"] == approx(dropped / (n - 1 + dropped), abs=1e-4)
    assert "np." not in str(evidence)                           # it is printed
    anywhere = discs(-12, 76, 8, 4)
    masks, reliability = position_masks(anywhere)
    assert reliability < .3
    for mask, before in zip(masks, anywhere, strict=True):
        assert mask[open_mask(before, 1)].all()
    thin = discs(0, 64, 5, 9)
    assert array_equal(position_masks(thin)[0], thin)


def test_mask_quality_equals_its_definition_and_two_kinds_of_images_are_said(capsys):
    """Areas are of the polygon through the middles of the outermost pixels, counted by hand."""
    values = rng.integers(0, 256, (24, 30), np.uint8)
    mean_mask = rng.random((24, 30))
    mask = mean_mask > 1                                # nothing
    mask[2:12, 3:8] = mask[7:12, 3:15] = True           # an L: 4 x 9 + 7 x 4, and half a pixel
    mask[15:20, 20:25] = True                           # 4 x 4, its hole does not count
    mask[17, 22] = False
    separability = np.corrcoef(mask.ravel(), values.ravel())[0, 1] ** 2
    solidity = (64.5 + 16) / (81.5 + 16)                # hull of the L: 11 x 9 less a triangle
    expected = separability, solidity, mean_mask[mask].mean()
    assert pretrain.mask_quality(mask, values, mean_mask) == approx(expected)
    quality = rng.random((60, 3)) / 10
    quality[:30] += .6
    pretrain.warn_of_two_kinds(quality, quality[:, 0] > .5)
    assert "two kinds" in capsys.readouterr().out


def test_trusted_are_those_of_the_best_ranks():
    quality = np.array([[0, 0, 0], [1, 1, 1], [1, 1, 1], [2, 0, 1], [2, 2, 2], [0, 1, 0]])
    # Rank sums are 4.5, 11.5, 11.5, 11, 17.5, 7; without the first 8.5, 8.5, 8.5, 14.5, 5.
    assert [*np.flatnonzero(pretrain.trusted(quality, .4))] == [1, 2, 3, 4]
    assert [*np.flatnonzero(pretrain.trusted(quality[1:], 1))] == [0, 3]


def test_refined_masks_do_not_depend_on_cores(lens_data, monkeypatch):
    images, _ = open_part(lens_data / "demo", "train")
    results = []
    for cores in (2, 1):
        monkeypatch.setattr(os, "cpu_count", lambda n=cores: n)
        refinement, evidence = pretrain.decide_refinement(images, "dark")
        results.append([evidence, [*refinement.refine_masks(images)],
                        *refinement.choose_trusted(images)])
    assert all(map(array_equal, *results))


@mark.parametrize("n, size, seed, lengths", [            # lengths: of each rank's batches
    (39, 16, 3, [[16, 23]]),
    (33, 8, 3, [[8, 9], [8, 8]]),
    (33, 8, None, [[8, 8], [8, 9]])])
def test_batches_cover_an_epoch_once_and_none_is_small(n, size, seed, lengths):
    indices = []
    for rank, expected in enumerate(lengths):
        batches = list(pretrain.Batches(n, size, seed, shard=(rank, len(lengths))))
        assert [*map(len, batches)] == expected
        indices += [index for _, index in sum(batches, [])]
    assert sorted(indices) == list(range(n))


def build(method, backbone, size=32, **kwargs):
    """Return a method and a batch of its views of random images."""
    manual_seed(0)
    method = METHODS[method](backbone, size, **kwargs)
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    views = zip(*map(method.augment, images), strict=True)
    return method, [torch.stack(view) for view in views]


def test_medsass_learns_the_masks_of_normalised_images_and_keeps_an_average():
    method, views = build("medsass", "resnet50")
    method.student = copy.deepcopy(method.unet)
    before = weights(method.unet)
    one_step(method, views, step=5)
    after = weights(method.student)
    assert allclose(weights(method.unet), before.lerp(after, 9 / 15), atol=1e-7)
    for unet, mode in ((method.student, True), (method.unet, False)):
        method.train(mode)
        logits = unet(pretrain.normalise(views[0]))
        assert allclose(method(views), losses.focal_tversky_loss(logits, views[1]))
        assert method.health()["target_foreground"] == approx(views[1].float().mean())


def one_step(method, views, step=0, total_steps=10, epoch_steps=5):
    optimizer = method.optimizer()
    method.before_step(optimizer, step, total_steps, epoch_steps)
    method(views).backward()
    method.after_backward()
    optimizer.step()
    method.after_step(step, total_steps)


@mark.parametrize("name, backbone", NETWORKS[1:])
def test_vit_or_baseline_encoder_is_plain_timm_and_learns_and_its_loss_is_float32(name, backbone):
    method, views = build(name, backbone)
    plain = timm.create_model(models.BACKBONES[backbone], num_classes=0)
    assert method.encoder.state_dict().keys() == plain.state_dict().keys()
    before = weights(method.encoder)
    one_step(method, views, total_steps=1, epoch_steps=1)
    assert not equal(weights(method.encoder), before)
    state = copy.deepcopy(method.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert method.eval()(views).dtype == torch.float32
    assert not differing(method.state_dict(), state)            # by validation


@mark.parametrize("name, backbone", NETWORKS[2:6])
def test_loss_and_gradients_are_those_of_lightlys_criteria(name, backbone):
    ours, views = build(name, backbone)
    theirs = copy.deepcopy(ours)
    loss = ours(views)
    if name == "dino":
        encoder, head = theirs.student
        large = torch.cat(views[:2])
        features = torch.cat([encoder(large), encoder(torch.cat(views[2:]))])
        dino = DINOLoss(1024, warmup_teacher_temp=.04, teacher_temp=.04)
        expected = dino(theirs.teacher(large).chunk(2), head(features).chunk(10), epoch=0)
        assert allclose(ours.center, dino.center.view(1, -1))
    else:
        targets = [theirs.projector(theirs.encoder(view)) for view in views]
        predictions = [theirs.predictor(target) for target in targets]
        if name == "byol":
            targets = [theirs.target(view) for view in views]
        cosine = NegativeCosineSimilarity()
        expected = sum(map(cosine, predictions, [targets[1].detach(), targets[0].detach()])) / 2
        if name == "byol":
            expected = 4 + 4 * expected
    assert loss.item() == approx(expected.item(), rel=1e-6, abs=1e-6)
    loss.backward()
    expected.backward()
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        if our.grad is not their.grad:                          # both None in target and teacher
            assert (our.grad - their.grad).norm() <= 1e-3 * their.grad.norm() + 1e-6


@mark.parametrize("name, fraction", [("byol", .03), ("dino", .2)])
def test_target_and_teacher_are_the_exact_moving_average(name, fraction):
    method, views = build(name, "resnet50")
    if name == "byol":
        average, source = method.target, [method.encoder, method.projector]
    else:
        average, source = method.teacher, method.student
    one_step(method, views, step=2)
    before = weights(average)
    one_step(method, views, step=3, total_steps=10)
    fraction *= (1 + math.cos(.3 * math.pi)) / 2
    expected = before.lerp(torch.cat([*map(weights, source)]), fraction)
    assert allclose(weights(average), expected, atol=1e-7)
    assert not equal(average[0].bn1.running_mean, source[0].bn1.running_mean)


@mark.parametrize("name, backbone, kind, decay, rates", [
    ("byol", "resnet50", "Adam", 1.5e-6, {9: 3e-4, 505: 1.5e-4, 999: 0}),
    ("simsiam", "resnet50", "SGD", 1e-4, {0: .003125, 500: .0015625, 999: 0}),
    ("dino", "resnet50", "SGD", 1e-4, {99: .001875, 999: 1e-6}),
    ("dino", "vit_small", "AdamW", .4, {0: 3.125e-7, 99: 3.125e-5, 999: 1e-6}),
    ("mae", "vit_small", "AdamW", .05, {49: 9.375e-6, 525: 4.6875e-6, 999: 0}),
    ("simmim", "vit_small", "AdamW", .05, {99: 7.0710678e-5, 550: 3.5355339e-5, 999: 0}),
    ("tuned", "resnet50", "Adam", 1e-5, {0: 3.6e-6, 99: 3.6e-4, 550: 1.8e-4, 999: 0})])
def test_optimizer_in_a_run_of_1000_steps(name, backbone, kind, decay, rates):
    method = (METHODS | dict(tuned=finetune_eval.FineTuning))[name](backbone, 32)
    optimizer = method.optimizer()
    assert type(optimizer).__name__ == kind
    for step, lr in rates.items():
        method.before_step(optimizer, step, 1000, 10)
        assert optimizer.param_groups[0]["lr"] == approx(lr, rel=1e-6, abs=2e-8)
    method.before_step(optimizer, 1000, 1000, 10)
    groups = optimizer.param_groups
    assert max(group["weight_decay"] for group in groups) == approx(decay)
    assert len(groups) == 1 + (name not in ("byol", "tuned"))   # biases, no decay


def test_mae_encodes_a_quarter_as_lightly_and_scores_hidden_patches_normalised_one_by_one():
    method, (images,) = build("mae", "vit_small", size=64)
    manual_seed(1)
    loss = method([images])
    manual_seed(1)
    latent, mask, restore = method.encode(images)
    patches = F.unfold(images, 8, stride=8).transpose(1, 2)
    target = F.layer_norm(patches, (192,)) * (191 / 192) ** .5  # his deviation is that of a sample
    hidden = method.decode(latent, restore)[mask]
    assert allclose(loss, F.mse_loss(hidden, target[mask]), rtol=1e-4)
    assert equal(mask, restore >= 16)                           # of 64: a quarter is seen
    theirs = modules.MaskedVisionTransformerTIMM(vit=copy.deepcopy(method.encoder))
    theirs.vit.load_state_dict(method.encoder.state_dict())     # lightly has weights of its own
    kept = F.pad(restore.argsort(dim=1)[:, :16] + 1, (1, 0))    # and the class token, 0
    assert allclose(latent, theirs.encode(images, idx_keep=kept), atol=1e-5)
    theirs = utils.get_2d_sine_cosine_positional_embedding(16, 3, cls_token=True)
    assert np.allclose(mae.sincos_positions(16, 3)[0], theirs, atol=1e-6)


def test_simmim_hides_blocks_of_four_patches_and_scores_them_alone():
    method, (images,) = build("simmim", "vit_small", size=80)   # 2.5 blocks a side
    manual_seed(2)
    loss = method([images])
    manual_seed(2)
    mask = method.random_mask(4)
    blocks = mask[:, ::4, ::4]
    assert blocks.sum(dim=(1, 2)).tolist() == [6] * 4           # of 9: .6, rounded up
    whole = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert equal(whole[:, :10, :10], mask)
    is_hidden = method.pixels_of(mask).expand_as(images)
    reconstruction = method.reconstruct(images, mask)
    noise = images.where(~is_hidden, torch.randn_like(images))
    assert equal(method.reconstruct(noise, mask), reconstruction)
    assert allclose(loss, F.l1_loss(reconstruction[is_hidden], images[is_hidden]))


def test_segmentation_scores_equal_sklearn():
    pred = rng.random((5, 120)) < .4
    target = rng.random((5, 120)) < .3
    pred[3] = target[3:] = False                        # nothing to find, nothing found
    pred[4] = True                                      # nothing to find, something found
    ours = segmentation_scores(pred[:, None], target[:, None])
    for name, theirs in dict(precision="precision", recall="recall", dice="f1", iou="jaccard",
                             accuracy="accuracy").items():
        metric = getattr(metrics, f"{theirs}_score")
        assert ours[f"{name}_global"] == approx(metric(target.ravel(), pred.ravel()))
    of_images = metrics.jaccard_score(target, pred, average="samples", zero_division=1)
    assert ours["iou_image"] == approx(of_images)


def test_best_constant_and_its_interval_over_groups_by_hand():
    out = prepare(write_folder("demo", n=60), "--group-regex", "^(p[0-9]+)_")
    path, result = score("data", *ON_DEMO, "--protocol", "reference")
    truths, masks = [open_part(out, part)[1] > 0 for part in ("train", "test")]
    mean = truths.mean(axis=0)
    constants = [mean >= level for level in np.unique(mean)]
    constant = max(constants, key=lambda cut: (cut & truths).sum() / (cut | truths).sum())
    iou = (constant & masks).sum() / (constant | masks).sum()
    assert result["best_constant"]["iou_global"] == approx(iou)
    groups = {}
    for row in read_csv(path.with_suffix(".csv")):
        if row["row"] == "best_constant":
            counts = np.array([int(row[kind]) for kind in ("tp", "fp", "fn")])
            groups[row["group"]] = groups.get(row["group"], 0) + counts
    drawn = rng.choice([*groups.values()], (9999, len(groups))).sum(axis=1)
    expected = np.percentile(drawn[:, 0] / drawn.sum(axis=1), (2.5, 97.5))
    assert result["best_constant"]["iou_global_ci"] == approx(expected, abs=.002)


@fixture
def labels_read(monkeypatch):
    """The (part, row) of the images that training has read with their masks so far."""
    rows = set()
    read = pretrain.Images.__getitem__
    def note(self, key):
        if self.masks:
            rows.add(self.rows[key[1]])
        return read(self, key)
    monkeypatch.setattr(pretrain.Images, "__getitem__", note)
    return rows


def test_labelled_images_are_nested_and_by_group(labels_read):
    out = prepare(write_folder("demo", n=24), "--group-regex", "^(p[0-9]+)_")
    names = read_csv(out / "train.csv")
    taken = []
    for n in (7, 4):
        labels_read.clear()
        tune("data", *ON_DEMO, "--protocol", "supervised", "--labels", n)
        rows = {row for part, row in labels_read if part == "train"}
        assert len(rows) == n
        assert len({names[row]["group"] for row in rows}) == math.ceil(n / 3)   # whole but the last
        taken.append({*labels_read})
    assert taken[1] < taken[0]


def test_a_copied_run_is_what_its_config_says_and_scored_by_hand(data, run):
    network = shutil.copytree(run, "Downloads/network",
                              ignore=shutil.ignore_patterns("last.pt", "encoder.pth", "*g"))
    path, result = score(data, "--run", network, "--flips")
    assert str(path) == "results/demo/resnet50/medsass-e2/seed0/transfer-flips.json"
    _, images = pictures(data)
    logits = 0
    with torch.inference_mode():
        for axes in ((), (2,), (3,), (2, 3)):
            logits = logits + load_unet(run)(images.flip(axes)).flip(axes)
    _, masks = open_part(data / "demo", "test")
    expected = segmentation_scores(logits[:, 0].numpy() > 0, masks > 0)
    assert {name: result[name] for name in expected} == approx(expected, abs=2e-4)


def test_linear_probe_learns_on_an_encoder_that_stays():
    table = "name,label\n"
    for k in range(30):
        save_image(f"demo/{k}.png", spot(32, 32, k)[0] // (1 + k % 2 * 4))
        table += f"{k},{k % 2}\n"
    Path("demo/labels.csv").write_text(table)
    prepare("demo")
    encoder = timm.create_model("resnet50", num_classes=0, zero_init_last=False).state_dict()
    torch.save(encoder, "some.pth")
    flags = "--protocol classify --lr 0.002 --batch-size 8 --encoder some.pth".split()
    result, folder = tune("data", *ON_DEMO, *flags, epochs=20)
    assert not differing(prefixed("encoder.", encoder), weights_of(folder))
    confusion = np.array(result["confusion"])           # true classes by row
    recall = np.mean(confusion.diagonal() / confusion.sum(axis=1))
    assert result["macro_recall"] == approx(recall) and recall > .8


def local_mean(x):
    """A network that sees 5 pixels around: all windows that hold those say the same."""
    return F.avg_pool2d(x, 11, stride=1, padding=5, count_include_pad=False)[:, :1]


@mark.parametrize("shape", [(32, 32), (20, 90), (131, 97), (1, 1)])
def test_tiles_have_no_seams(shape):
    image = cv2.GaussianBlur(rng.choice(np.uint8([0, 255]), (*shape, 3)), (0, 0), 3)
    whole = predict_logits(local_mean, image[None], "cpu")[0]
    mask = predict_tiled(local_mean, image, 32, 32, "cpu")
    assert mask.shape == shape
    is_clear = np.abs(whole) > .05      # a window's own border counts, by less than 3 % of a window
    assert array_equal(mask[is_clear], whole[is_clear] > 0)


# ========================================================================================= promises
# No label is seen before it may be; a killed run goes on to the bit; workers, ranks, a full disk
# and a second process change nothing; a file that is copied stands alone.

def test_no_true_mask_is_read_and_workers_do_not_matter(data, run):
    shutil.copytree(data, "data", ignore=shutil.ignore_patterns("*_masks.npy"))
    assert contents(train("data", "--workers", "2")) == contents(run)


def test_batchnorm_is_settled_on_plain_training_images(data, run):
    encoder = load(run / "encoder.pth")
    _, images = pictures(data, "train")                         # in batches of one size
    maps = F.conv2d(images, encoder["conv1.weight"], stride=2, padding=3)
    assert allclose(maps.mean(dim=(0, 2, 3)), encoder["bn1.running_mean"], atol=1e-5)


def test_supervised_is_fine_tuning_an_untrained_encoder_and_never_sees_test_masks(small_data):
    """Other test masks change the score, and not a bit of the network."""
    shutil.copytree(small_data, "noisy")
    np.save("noisy/demo/test_masks.npy", rng.integers(0, 2, (3, 32, 32), np.uint8))
    manual_seed(seed_from(0))            # as pre-training does
    models.export_encoder(build_unet("resnet50"), "f.pth")
    few = [*ON_DEMO, "--labels", "8", "--protocol"]
    clean, folder = tune(small_data, *few, "supervised")
    other, tuned = tune("noisy", *few, "finetune", "--encoder", "f.pth")
    assert not differing(weights_of(folder), weights_of(tuned))
    assert clean["iou_global"] != other["iou_global"]
    again = ["--run", folder, "--protocol", "finetune"]
    refused(lambda: score(small_data, *again), folder, "has seen labels")
    prepare_data.main("--dataset demo --size 32 --seed 3".split())
    refused(lambda: score("data", "--run", folder), "another preparation of demo")


DIE_BEFORE_THE_SECOND_SAVE = """
import os, pathlib, sys, pretrain
replace = pathlib.Path.replace
def replace_or_die(source, target):
    if target.name == "last.pt" and target.exists():
        os.kill(os.getpid(), 9)
    return replace(source, target)
pathlib.Path.replace = replace_or_die
pretrain.main(sys.argv[1:])
"""


@fixture(scope="session")
def lens_data(tmp_path_factory):
    """A folder with a data set "demo" of dark discs seen through a lens, clearest in blue."""
    folder = tmp_path_factory.mktemp("lens")
    lens = morphology.disk(28)[4:52, 4:52]
    for k in range(20):
        gray, disc = spot(48, 48, k)
        image = np.dstack([255 - gray] * 3)
        image[..., :2] += rng.integers(0, 60, (48, 48, 2), np.uint8)
        image[lens == 0] = 3
        save_image(folder / f"raw/{k}.png", image)
        save_image(folder / f"raw/{k}_mask.png", disc * 255)
    prepare(folder / "raw", "--out", folder, "--name", "demo", "--size", "48")
    return folder


@mark.parametrize("data_set, flags", [
    ("lens_data", "--refine"), ("small_data", "--method byol"),
    ("small_data", "--method dino --backbone vit_small"),
    ("small_data", "--method mae --backbone vit_small")])
def test_a_killed_run_resumes_to_the_bit(data_set, flags, request):
    """One a family: masks in files; moving average; centre and schedules; masks in the network."""
    folder = request.getfixturevalue(data_set)
    flags = [*flags.split(), "--batch-size", "4"]
    whole = train(folder, *flags, out="whole")
    end = python("-c", DIE_BEFORE_THE_SECOND_SAVE, *command(folder, *flags))
    assert end.returncode == -signal.SIGKILL
    cut = train(folder, *flags, "--workers", "1")
    assert contents(cut) == contents(whole)
    assert (cut / "log.csv").read_text() == (whole / "log.csv").read_text()


def test_a_finished_run_is_left_alone_or_completed(data, run, copied_run):
    before = (copied_run / "last.pt").stat()
    assert before.st_size < 10_000                              # its weights are in best.pt alone
    train(data)
    assert (copied_run / "last.pt").stat() == before
    for name in ("samples.png", "encoder.pth"):                 # as if killed before the last files
        (copied_run / name).unlink()
    train(data)
    assert contents(copied_run) == contents(run)


def test_refined_run_learns_from_trusted_masks(lens_data):
    assert read_meta(lens_data / "demo")["foreground"] == "dark"        # bright: see dsb2018
    folder = train(lens_data, "--refine", epochs=1)
    for part in ("train", "val"):
        _, truth = open_part(lens_data / "demo", part)
        assert (np.load(folder / f"{part}_masks.npy") == truth).mean() > .95    # Otsu's: .6
    method = MedSASS("resnet50", 48)
    method.refine = pretrain.REFINEMENTS
    sets = pretrain.image_sets(method, lens_data / "demo", 0, folder)
    assert sets.train.masks == sets.val.masks == folder         # not those of the data set
    is_trusted = np.load(folder / "train_trusted.npy")
    assert [row for _, row in sets.train.rows] == np.flatnonzero(is_trusted).tolist()
    assert len(sets.train) < sets.epoch_size == 14


def peak_memory(call, *arguments):
    tracemalloc.start()
    call(*arguments)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_images_or_height():
    np.save("images.npy", rng.integers(0, 256, (1200, 64, 64, 3), np.uint8))
    images = np.load("images.npy", mmap_mode="r")
    few = peak_memory(pretrain.decide_refinement, images[:200], "dark")
    assert peak_memory(pretrain.decide_refinement, images, "dark") < 1.2 * few + 10 ** 6
    tall = np.zeros((1200, 96, 3), np.uint8)
    low = peak_memory(predict_tiled, local_mean, tall[:200], 32, 32, "cpu")
    high = peak_memory(predict_tiled, local_mean, tall, 32, 32, "cpu")
    assert high < 1.2 * low + 5 * tall[..., 0].size     # its logits, float32, and mask


def test_encoder_only_goes_on_from_an_encoder_and_leaves_the_decoder_as_it_began(small_data, run):
    flags = f"--train encoder --encoder {run}/encoder.pth --lr 1e-5 --threshold ght --loss bce"
    folder = train(small_data, *flags.split(), "--amp", "fp16", epochs=1)
    manual_seed(seed_from(0))
    changed = differing(build_unet("resnet50", 32).state_dict(), weights_of(folder))
    assert all(name.startswith("encoder.") for name in changed)
    given, after = [load(path / "encoder.pth")["conv1.weight"] for path in (run, folder)]
    assert not equal(given, after) and allclose(given, after, atol=1e-4)


def test_patience_stops_and_exports_the_best(small_data):
    flags = "--lr 0 --patience 2 --amp bf16 --threshold adaptive_mean --loss focal"
    folder = train(small_data, *flags.split(), epochs=30)
    best = load(folder / "best.pt")
    assert (len(read_csv(folder / "log.csv")), best["epoch"]) == (3, 1)
    assert not differing(prefixed("encoder.", load(folder / "encoder.pth")), best["model"])


TERM_TO_ITS_GROUP = """import os, subprocess, sys, pretrain, prepare_data
def stop(self, step, total):
    if step == 5:                                       # by somebody else, as a cluster does
        kill = f"kill -s TERM -- -{os.getpgrp()}"
        subprocess.run(["sh", "-c", kill], start_new_session=True)
pretrain.MedSASS.after_step = stop
prepare_data.run_script(lambda: pretrain.main(sys.argv[1:]), "the same command goes on")
"""


def test_a_stop_or_a_full_disk_loses_an_epoch_at_most(data, run):
    flags = command(data, "--workers", "2")
    lines = fails("-c", TERM_TO_ITS_GROUP, *flags, start_new_session=True)
    assert lines[-1].endswith("; the same command goes on")
    folder = Path("runs/demo/resnet50/medsass-e2/seed0")
    before = contents(folder)
    lines = fails(f"{HERE}/pretrain.py", *flags,
                  preexec_fn=lambda: setrlimit(RLIMIT_FSIZE, (10 ** 6, 10 ** 6)))
    assert "goes on from the last whole epoch" in lines[-1]
    assert contents(folder) == before
    assert not list(folder.glob(".*.tmp"))
    pretrain.main(flags)
    assert contents(folder) == contents(run)


def test_a_crash_does_not_wait_for_its_workers(small_data):
    """A traceback holds the loader, and Python would wait for ever."""
    crash = "import sys, pretrain; del pretrain.MedSASS.after_step; pretrain.main(sys.argv[1:])"
    assert python("-c", crash, *command(small_data, "--workers", "2")).returncode == 1


@mark.parametrize("changed, words", [
    ("runs/demo/resnet50/medsass-e2/seed0/config.json", "another process"),
    ("data/demo/meta.json", "data/demo was prepared again")])
def test_a_run_that_another_takes_over_or_whose_data_change_ends(changed, words, data, monkeypatch):
    shutil.copytree(data, "data")
    def change(self, step, total):
        if step == 5:                                   # of ten
            text = Path(changed).read_text()
            Path(changed).write_text(text.replace('"fingerprint": "', '"fingerprint": "0'))
    monkeypatch.setattr(MedSASS, "after_step", change)
    refused(lambda: train("data"), words)
    assert load("runs/demo/resnet50/medsass-e2/seed0/last.pt")["epoch"] == 1


IN_RANKS = "-m torch.distributed.run --standalone --nproc-per-node=2".split()
SAVE_RANK = """import os, sys, pretrain, torch
def train_and_save(method, *others, train=pretrain.train):
    train(method, *others)
    torch.save(dict(method.named_parameters()), os.environ["RANK"])
pretrain.train = train_and_save
pretrain.main(sys.argv[1:])
"""


def test_two_ranks_train_one_network_on_the_gradients_of_both(lens_data):
    Path("save.py").write_text(SAVE_RANK)
    flags = command(lens_data, "--batch-size", "4", "--refine")
    assert not python(*IN_RANKS, "save.py", *flags).returncode
    assert not differing(load("0"), load("1"))
    [folder] = Path("runs").glob("demo/*/*/seed0")
    score(lens_data, "--run", folder)


def test_semi_averages_as_two_folds_choose_and_reads_no_other_label(
        data, copied_run, labels_read, monkeypatch):
    monkeypatch.setattr(finetune_eval, "WEIGHTS", (.25, .5, .75))
    count = Mock(wraps=finetune_eval.count_masks)
    monkeypatch.setattr(finetune_eval, "count_masks", count)
    flags = ["--run", copied_run, "--labels", "7", "--protocol", "semi"]
    result, folder = tune(data, *flags, epochs=4)
    before, tuned, kept = map(weights_of, (copied_run, folder / "tuned", folder))
    weight = result["weight"]
    assert weight == (.25, .5, .75)[np.argmax([*result["fold_scores"].values()])]
    expected = before["head.weight"].lerp(tuned["head.weight"], weight)
    assert allclose(kept["head.weight"], expected)
    assert len(labels_read) == 7 + 2
    assert result["fold_steps"] == 10                           # half as many as of all labels
    scored = [len(masks) for (_, masks), _ in count.call_args_list]
    assert scored[:6] == [5, 5, 5, 4, 4, 4]     # tuned on 4 + 5, scored on the others, each weight
    shutil.copytree(data, "blind")
    masks = np.load("blind/demo/train_masks.npy", mmap_mode="r+")
    for row in range(64):
        if ("train", row) not in labels_read:
            masks[row] = 1
    tune("blind", *flags, "--overwrite", epochs=4)
    assert not differing(kept, weights_of(folder))
    _, again = score(data, "--run", folder)
    assert again["iou_global"] == result["iou_global"]


def test_copied_files_import_nothing_of_ours_and_readme_snippets_run(run, monkeypatch):
    ours = r"\n(from|import) (baselines|finetune_eval|losses|models|prepare_data|pretrain)\b"
    for path in (HERE / "models.py", HERE / "losses.py", *HERE.glob("baselines/*.py")):
        assert not re.search(ours, path.read_text())
    monkeypatch.syspath_prepend(HERE / "baselines")
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save("image.png")
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    loop = byol.__doc__.partition("timm.\n")[2].partition("Any other")[0]
    for code in (*snippets, f"import torch\nfrom byol import BYOL\n{textwrap.dedent(loop)}"):
        code = code.replace("runs/demo/resnet50/medsass-e16/seed0", str(run))
        exec(code.replace("64", "32").replace("(16)", "(2)"), {})


# ================================================================================== files and masks
# A file is read as a viewer shows it or refused with its path; a mask means what its values say; no
# picture or patient is in two parts, and nothing is left out without a word.

def prepared(out):
    """[(part, row of its table, image, mask or None)] of a prepared data set."""
    found = []
    for part in PARTS:
        images, masks = open_part(out, part)
        rows = read_csv(out / f"{part}.csv")
        if masks is None:
            masks = []
        found += itertools.zip_longest([part] * len(rows), rows, images, masks)
    return found


def groups_in(out):
    """Return the groups, each of which one part has all of."""
    pairs = {(row["group"], part) for part, row, *_ in prepared(out)}
    groups = {group for group, _ in pairs}
    assert len(groups) == len(pairs)
    return groups


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
def raw():
    return write_folder("raw")


def refuse(raw, *words):
    """Check that a folder is refused, nothing is written, and an empty folder of the user stays."""
    os.mkdir("data")
    refused(lambda: prepare(raw), *words)
    os.rmdir("data")


def test_folder_is_resized_split_and_repeatable():
    written = write_layout("raw", "images/{k}.png", "masks/{k}.png")
    out = prepare("raw")
    os.rename("data", "before")
    prepare("raw")
    names = {*os.listdir(out)} - {"meta.json"}
    assert contents(out, names) == contents(Path("before/raw"), names)
    for _, row, image, mask in prepared(out):
        gray, truth, _ = written[row["name"]]
        gray = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA)
        truth = cv2.resize(truth * 1., (32, 32), interpolation=cv2.INTER_AREA)
        assert array_equal(image[..., 0], gray)
        assert array_equal(mask, truth >= .5)
    strip = np.zeros((3000, 24), np.uint8)
    strip[::2] = 200
    assert (prepare_data.resize(strip, 60) == 100).all()        # each side by its own rule
    assert [*read_meta(out)["counts"].values()] == [8, 1, 3]    # cut at int(8.4) and int(9.6)


@mark.parametrize("encoding, separator", [
    ("cp1252", ";"), ("utf-8", "\t"), ("utf-8-sig", ",")])      # as spreadsheets write them
def test_labels_and_patients_of_a_table_are_taken(encoding, separator, raw):
    table = "name,patient_id,label \n"
    for k, name in enumerate(sorted(os.listdir("raw/images"))):
        table += f"{name[:5 + k % 2 * 4]},{k // 4},größer {k}\n"        # with .png and without
    Path("raw/labels.csv").write_text(table.replace(",", separator), encoding)
    out = prepare(raw, "--group-regex", ".+")                   # if the table had no patients
    assert groups_in(out) == {"0", "1", "2"}
    for _, row, _, _ in prepared(out):
        assert row["label"] == f"größer {int(row['name'][-2:])}"


def test_wide_numbers_are_stretched_between_their_percentiles():
    wide = rng.integers(1000, 3000, (6, 9, 3), np.uint16)
    cv2.imwrite("a.png", wide[..., ::-1])
    expected = np.interp(wide, np.percentile(wide, (.1, 99.9)), (0, 255)).round()
    assert array_equal(read_image("a.png"), expected)


@mark.parametrize("orientation, name", [(6, "a.png"), (5, "a.webp"), (7, "a.tif")])
def test_orientations_are_undone(orientation, name):
    image = Image.fromarray(rng.integers(0, 256, (40, 28, 3), np.uint8))
    exif = image.getexif()
    exif[274] = orientation
    image.save(name, exif=exif, lossless=True)
    assert array_equal(read_image(name), ImageOps.exif_transpose(Image.open(name)))


@mark.parametrize("dtype, how", [
    ("u2", dict(byteorder=">")), ("u2", dict(compression="zlib", predictor=True)),
    ("f4", dict(rowsperstrip=7)), ("f8", dict(bigtiff=True)), ("i1", {}), ("u4", {}),
    ("u1", dict(photometric="miniswhite"))])
def test_tiffs_are_read_rightly_or_what_to_install_is_said(dtype, how, monkeypatch):
    shown = (spot(48, 64)[0] // 2).astype(dtype)
    stored = ~shown if "photometric" in how else shown
    tifffile.imwrite("a.tif", stored, metadata=None, **dict(photometric="minisblack") | how)
    expected = prepare_data.to_rgb(prepare_data.Picture(shown))
    assert array_equal(read_image("a.tif"), expected)
    monkeypatch.setitem(sys.modules, "tifffile", None)          # as if it were not installed
    if dtype in ("f8", "u4", "i1"):
        with raises(ValueError, match="pip install tifffile"):
            read_image("a.tif")
    else:
        assert array_equal(read_image("a.tif"), expected)


MR = Path(pydicom.data.get_testdata_file("MR_small.dcm"))
FRAMES = Path(pydicom.data.get_testdata_file("SC_rgb_rle_2frame.dcm"))


@mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_is_shown_through_its_window_and_padding_is_darkest(kind):
    """By PS3.3, C.11.2.1.2.1; MONOCHROME1 is then inverted."""
    ds = pydicom.dcmread(MR)
    pixels = ds.pixel_array.copy()
    pixels[:, :20] = -2000
    ds.add_new("PixelPaddingValue", "SS", -2000)
    ds.PixelData = pixels.tobytes()
    ds.PhotometricInterpretation = kind
    ds.RescaleSlope, ds.RescaleIntercept = 2, -100
    ds.WindowCenter, ds.WindowWidth = 1100, 3200
    ds.save_as("a.dcm")
    shown = (pixels * 2. - 100 - (1100 - .5)) / (3200 - 1) + .5
    shown = 255 * (shown if kind == "MONOCHROME2" else 1 - shown).clip(0, 1)
    shown[:, :20] = 0
    assert np.abs(read_image("a.dcm")[..., 0] - shown).max() <= .5 + 1e-6
    del ds.WindowCenter, ds.WindowWidth
    ds.save_as("b.dcm")
    shown = read_image("b.dcm")
    assert not shown[:, :20].any() and np.ptp(shown[:, 20:]) >= 254     # padding is not counted
    assert array_equal(read_image(FRAMES, 1), pydicom.dcmread(FRAMES).pixel_array[1])


def test_what_is_transparent_is_shown_on_white_and_bad_metadata_do_not_matter():
    info = PngImagePlugin.PngInfo()
    info.add(b"eXIf", b"no EXIF block")
    rgba = np.full((1, 4, 4), (10, 20, 30, 255), np.uint8)
    rgba[0, :, 3] = 0, 51, 102, 255
    save_image("a.png", rgba, pnginfo=info, icc_profile=os.urandom(3 * 10 ** 6))
    expected = [[255, 255, 255], [206, 208, 210], [157, 161, 165], [10, 20, 30]]
    assert array_equal(read_image("a.png")[0], expected)
    save_image("b.png", np.uint8([[10, 20]]), transparency=10)
    assert read_image("b.png")[0, :, 0].tolist() == [255, 20]


@mark.parametrize("tested", ["test", "validation"])
def test_a_part_that_is_not_given_is_cut_from_train(tested, capsys):
    for part, n in (("train", 20), (tested, 4)):
        write_layout(f"raw/{part}", "images/{k}.png", "1st_manual/{k}_manual1.gif", n)
    out = prepare("raw")
    assert [len(open_part(out, part)[1]) for part in PARTS] == [17, 3, 4]
    assert "an eighth of 20 training images" in capsys.readouterr().out


def test_dicom_patients_stay_whole_and_unnamed():
    ds = pydicom.dcmread(MR)
    Path("raw").mkdir()
    for k in range(18):
        ds.PatientID = f"Mustermann{k // 3}"
        ds.PixelData = np.roll(ds.pixel_array, k + 1).tobytes()
        ds.save_as(f"raw/{k}.dcm")
    out = prepare("raw")
    assert len(groups_in(out)) == 6
    assert not [file for file in out.iterdir() if b"Mustermann" in file.read_bytes()]


_, disc = spot(48, 64)
halves = disc.copy()                                            # classes 1 and 3
halves[24:] *= 3
soft = cv2.GaussianBlur(disc * 255, (0, 0), .8)
ringed = disc | cv2.dilate(disc, np.ones((9, 9))) * 254         # an ignored border, 254
red = np.dstack([disc * 255, disc * 0, disc * 0])
classes = red.copy()
classes[24:, :, 2] = red[24:, :, 0]


def foreground(values, rule="auto"):
    """Return the foreground of a mask file that holds these values."""
    save_image("mask.tif", values)
    return prepare_data.find_foreground(Path("mask.tif"), rule)[0]


@mark.parametrize("rule, values, expected", [
    ("auto", disc > 0, disc), ("auto", disc + 1, disc), ("auto", red, disc), ("auto", ~red, disc),
    ("auto", np.dstack([red * 0 + 255, disc * 255]), disc),             # in the alpha channel
    ("auto", disc * 0, disc * 0), ("auto", disc * 0 + 255, disc * 0 + 1),
    ("auto", soft / np.float32(255), soft > 127),
    ("<1", halves, 1 - disc), ("1,3", halves, disc),
    ("#ff0000", classes, halves == 1)])
def test_masks_mean_what_each_file_or_the_flag_says(rule, values, expected):
    assert array_equal(foreground(values, rule), expected > 0)


@mark.parametrize("values, shown, flag", [
    (halves, "0, 1, 3", "'>0'"), (ringed, "0, 254, 255", "ignore value"),
    (disc.astype(np.int32) - 1, "-1, 0", "1 or 1,2"), (np.minimum(soft, 60), "0, .*", "'>30'"),
    (classes, "#000000, #ff0000, #ff00ff", "'#ff0000'")])
def test_masks_of_several_meanings_are_refused(values, shown, flag):
    with raises(ValueError, match=f"mask.tif: .*{shown}.*--mask-foreground .*{flag}"):
        foreground(values)


@mark.parametrize("image_name, mask_name", [
    ("images/{k}.BMP", "gt/{k}_GT.png"), ("{k}.tif", "{k}_mask.png"), ("{k}.tif", "{k}-label.png"),
    ("images/{k}.png", "images/masks/{k}_mask.png"),
    ("imagesTr/{k}_0000.png", "labelsTr/{k}.png"),              # nnU-Net's
    ("images/ä, b.{k} .png", "masks/ä, b.{k} .png"),
    ("{k}.png", ""), ("{k}_seg.png", ""),                       # all images are called so
    ("{patient}/{k}.png", "{patient}/{k}_mask.png"),
    ("images/{patient}/{k}.png", "masks/{patient}/{k}.png"),
    ("set/images/{part}/{k}.png", "set/masks/{part}/{k}.png")])
def test_folders_as_people_have_them(image_name, mask_name):
    written = write_layout("raw", image_name, mask_name, side=32)
    for part, row, fields in check_as_written(prepare("raw"), written):
        assert "{patient}" not in image_name or row["group"] == fields["patient"]
        assert "{part}" not in image_name or part == fields["part"]


@mark.parametrize("image_name, mask_name, words", [
    ("images/{k}.png", "masks/other{k}.png", ["masks/other", "no mask has the name of"]),
    ("images/{k}.png", "images/seg_{k}.png", ["seg_p0_00.png: a mask by its name"]),
    ("class{odd}/{k}.png", "", ["class0, class1", "'^([^/]+)/'", "'.+'"])])
def test_folders_of_two_readings_are_refused(image_name, mask_name, words):
    write_layout("raw", image_name, mask_name, n=16)
    refuse("raw", *words)


def test_masks_that_contradict_or_lack_are_refused(raw):
    shutil.copytree("raw/masks", "raw/labels")
    refuse(raw, "has two masks", "labels/p0_00", "masks/p0_00")
    shutil.rmtree(raw)
    write_layout(raw, "{part}/{k}.png", "{part}/{k}_mask.png")
    os.remove("raw/val/p1_05_mask.png")                         # a given val part needs all
    refuse(raw, "1 bad file(s)")


def test_nothing_is_left_out_silently(raw, capsys):
    for name in ("images/a.nii.gz", "images/B.NII", "masks/extra.png", ".hidden.png"):
        shutil.copy("raw/masks/p0_00.png", f"raw/{name}")
    shutil.copytree("raw", "raw/__MACOSX")
    os.symlink("..", "raw/images/again")                        # a circle
    Path("raw/labels.csv").write_text("name,label\np0_00,a\nnobody,b\n")
    assert len(prepared(prepare(raw))) == 12
    said = capsys.readouterr().out
    for words in (
            "1 masks have no image", "extra.png", "'.gz': 1", "'.nii': 1", "nobody",
            "12 images, 12 of them with masks"):
        assert words in said


def test_the_same_picture_is_never_in_two_parts(raw, capsys):
    for path in Path("raw").glob("*/p*"):
        shutil.copy(path, path.with_name(f"again_{path.name}"))
    for seed in "012":
        out = prepare(raw, "--seed", seed)
        check(out)
    assert "12 pictures are there twice" in capsys.readouterr().out
    np.load(out / "test_images.npy", mmap_mode="r+")[0] = np.load(out / "train_images.npy")[0]
    (out / "val.csv").write_text("name,group,label\n")
    refused(lambda: check(out), "val.csv has 0 rows", "fingerprint", "same picture in two parts")


def test_every_bad_file_is_found_in_one_pass(raw, capsys):
    Path("raw/images/p0_00.png").write_bytes(b"")
    os.truncate("raw/images/p0_01.png", 500)
    shutil.copy("raw/images/p3_11.png", "raw/images/p3_11.bmp")
    save_image("raw/masks/p1_04.png", np.zeros((9, 9), np.uint8))
    refuse(raw, "4 bad file(s)", "--skip-bad")
    said = capsys.readouterr().err
    for name in ("images/p0_00", "images/p0_01", "masks/p1_04", "images/p3_11"):
        assert f"raw/{name}.png: " in said
    assert len(prepared(prepare(raw, "--skip-bad"))) == 12 - 3


def test_images_without_masks_join_the_training_part(raw, capsys):
    for path in Path("raw").glob("masks/*[0369].png"):
        path.unlink()
    out = prepare(raw)
    assert "5 images without a mask join the part train" in capsys.readouterr().out
    for part, row, _, mask in prepared(out):
        assert os.path.exists(f"raw/masks/{row['name']}.png") == (mask is not None)
        assert part == "train" or mask is not None
    supervised = "--dataset raw --backbone resnet50 --protocol supervised --labels 5".split()
    refused(lambda: score("data", *supervised), "has 4 labelled training images")
    os.rename("raw/images/p0_00.png", "raw/images/p0.png")      # called like its patient
    prepare(raw, "--group-regex", "^[^_]+")                     # not if the patient is in val, test
    assert groups_in(out) == {"p0", "p1", "p2", "p3"}
    left_out = re.search(r"(\d+) images without a mask are left out", capsys.readouterr().out)
    assert len(prepared(out)) == 12 - int(left_out[1]) < 12


def test_a_killed_process_leaves_nothing_for_long(raw):
    """Its temporary files go after a day, and the old data set comes back."""
    out = prepare(raw)
    os.mkdir("data/.77.tmp")
    os.mkdir("data/.78.tmp")                                    # of a process that is at work
    os.utime("data/.77.tmp", (0, time.time() - 90000))
    out.rename("data/.raw.old")                                 # killed between two renames
    again = ["--dataset", "folder", "--raw", "raw"]
    refused(lambda: prepare_data.main(again), out, "already there", "--overwrite")
    assert {*os.listdir("data")} == {"raw", ".78.tmp"}
    check(out)
    refused(lambda: prepare_data.main([*again, "--out", ".", "--overwrite"]), "no data set")


def prepare_published(dataset, *flags):
    """Prepare a published data set in raw/."""
    prepare_data.main([*f"--dataset {dataset} --raw raw --size 32 --overwrite".split(), *flags])
    return Path("data", dataset)


PUBLISHED = {                                   # {data set: (foreground, its images, its masks)}
    "isic": ("dark", "ISIC-2017_{isic}_Data/{k}.jpg",
             "ISIC-2017_{isic}_Part1_GroundTruth/{k}_segmentation.png"),
    "xray": ("dark", "COVID-19_Radiography_Dataset/{lungs}/images/{k}.png",
             "COVID-19_Radiography_Dataset/{lungs}/masks/{k}.png"),
    "drone": ("bright", "original_images/{k}.jpg", "label_images_semantic/{k}.png"),
    "dsb2018": ("bright", "stage1_train/{k}/images/{k}.png", "stage1_train/{k}/masks/1.png")}


def write_published(dataset):
    """Write twelve images of a data set as its authors publish it; see write_layout."""
    value = 7 if dataset == "drone" else 255
    written = write_layout("raw", *PUBLISHED[dataset][1:], side=32, value=value)
    for path in Path("raw").glob("stage1_train/*/masks/1.png"):     # one mask for each nucleus
        mask = np.array(Image.open(path))
        save_image(path.with_name("2.png"), np.tril(mask))
        save_image(path, np.triu(mask))
    table = "image_id,melanoma,seborrheic_keratosis\np0_00,1.0,0.0\np0_01,0.0,1.0\n"
    for path in Path("raw").glob("ISIC*_Data"):
        shutil.copy(next(path.iterdir()), path / "ISIC_superpixels.png")
        Path(str(path).replace("Data", "Part3_GroundTruth.csv")).write_text(table)
    return written


@mark.parametrize("dataset", PUBLISHED)
def test_published_layouts_become_right_arrays(dataset):
    written = write_published(dataset)
    out = prepare_published(dataset)
    check(out)
    assert read_meta(out)["foreground"] == PUBLISHED[dataset][0]
    for part, row, fields in check_as_written(out, written):
        if dataset == "isic":
            assert part == fields["part"]
            assert row["name"] != "p0_00" or row["label"] == "melanoma"
        elif dataset == "xray":
            assert row["label"] == fields["lungs"]


def test_tissuenet_has_its_parts_channels_and_whole_cells():
    os.mkdir("raw")
    for part in PARTS:
        gray, mask = spot(32, 32, len(part))
        np.savez(f"raw/tissuenet_v1.1_{part}.npz",
                 X=np.dstack([gray, 255 - gray])[None],         # nuclei, membranes
                 y=np.dstack([mask * 7, 1 - mask])[None])       # cells, nuclei
    for part, _, image, mask in prepared(prepare_published("tissuenet")):
        assert array_equal(mask, spot(32, 32, len(part))[1])
        red, green, blue = image[mask == 1].mean(axis=0)
        assert red == 0 and green > 150 > blue


@mark.parametrize("image_name, mask_name", [
    ("CD27_Panel_Component/{patient}_Myo_{k}_component_data.tif",
     "Labels/{patient}_Myo_{k}_component_mask_labels.tiff"),
    ("CD27 Panel-- Component/{patient}_Myo_{k}_component_data.tif",     # as in their notebook
     "CD27 cell labels/Mask Labels/{patient}_Myo_{k}_component_data.tifMask.tif")])
def test_tiles_of_a_slide_or_patient_stay_together(image_name, mask_name):
    written = write_layout("raw", image_name, mask_name, side=960, value=7)
    assert len(groups_in(prepare_published("dm"))) == 12        # slides
    out = prepare_published("dm", "--split-by", "patient")
    assert groups_in(out) == {"p0_Myo", "p1_Myo", "p2_Myo", "p3_Myo"}
    for _, row, _, mask in prepared(out):
        _, _, patient, number, y, x = row["name"].split("_")
        tiles = written[f"{patient}_{number}"][1].reshape(2, 480, 2, 480)
        assert mask.mean() == approx(tiles[int(y), :, int(x)].mean(), abs=.02)


def test_published_splits_at_their_full_size():
    xray = []
    for label, n in zip(LUNGS, (3616, 6012, 10192, 1345), strict=True):
        xray += [Pair(f"{label} {i}", i, label=label) for i in range(n)]
    tiles = [Pair(f"{i}", i // 12, group=f"{i // 12}") for i in range(198 * 12)]
    for pairs, expected in ((tiles, [1656, 240, 480]), (xray, [14730, 2202, 4233])):
        prepare_data.join_duplicates(pairs)
        prepare_data.split_pairs(pairs, seed=3, stratified=pairs is xray)
        parts = [pair.part for pair in pairs]
        assert [parts.count(part) for part in PARTS] == expected
    assert abs(parts[:3616].count("test") - 723) < 9            # of COVID


def test_archives_are_unpacked_once_and_cannot_escape():
    write_published("isic")
    folder = "raw/ISIC-2017_Training_Data"
    shutil.make_archive(folder, "zip", "raw", "ISIC-2017_Training_Data")
    shutil.rmtree(folder)
    with zipfile.ZipFile("raw/b.zip", "w") as file:
        file.writestr("../../evil", "x")
    out = prepare_published("isic")
    assert len(prepared(out)) == 12
    assert {*os.listdir()} == {"raw", "data"}
    Path(f"{folder}.zip").write_text("never read again")
    prepare_published("isic")
    shutil.rmtree(folder)
    refused(lambda: prepare_published("isic"), f"{folder}.zip", "get it again")
    check(out)                                     # what was there stays


# ========================================================================================= mistakes
# Each is one line with a path or a flag, an exit code that is not 0, and nothing left behind.

@fixture(scope="session")
def bad(tmp_path_factory):
    """A folder of raw folders that cannot be prepared, and of data sets without a use."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    write_folder(folder / "few", n=2)
    prepare_data.main(f"--dataset demo --size 40 --out {folder}/odd".split())
    prepare(write_folder(folder / "bare", masks=False), "--out", folder / "prepared")
    return folder


@mark.parametrize("command, message", [
    ("prepare_data --dataset folder --raw {bad}/absent", "{bad}/absent: no such folder"),
    ("prepare_data --dataset folder --raw {bad}/empty", "{bad}/empty: no images here"),
    ("prepare_data --dataset folder --raw {bad}/few", "{bad}/few: 2 usable images are too few"),
    ("pretrain --data {data} --dataset isic", "{data}/isic is not prepared: run python"),
    ("pretrain --data {data} --dataset demo --encoder {bad}/absent", "{bad}/absent: no such file"),
    ("pretrain --data {data} --dataset demo --encoder {vit}/encoder.pth", "{vit}/encoder.pth"),
    ("pretrain --data {data} --dataset demo --method byol --batch-size 1", "at least 2 images"),
    ("pretrain --data {bad}/odd --dataset demo --backbone vit_small", "multiple of 16, not 40"),
    ("finetune_eval --run {run} --data {bad}/prepared --dataset bare", "no test masks"),
    ("finetune_eval --run {bad}/absent", "{bad}/absent is not a run folder"),
    ("finetune_eval --data {data} --dataset demo --backbone resnet50 --protocol classify --encoder"
     " {run}/encoder.pth", "at least two labels"),
    ("finetune_eval --data {data} --dataset demo --backbone resnet50 --protocol semi --encoder"
     " {run}/encoder.pth", "a whole U-Net, and {run}"),
    ("finetune_eval --report", "results: no results here")])
def test_a_mistake_is_one_line_and_leaves_nothing(command, message, data, run, vit_run, bad):
    places = dict(data=data, run=run, vit=vit_run, bad=bad)
    stage, *flags = command.format(**places).split()
    text = refused(lambda: sys.modules[stage].main(flags), message.format(**places))
    assert "\n" not in text and not os.listdir()


def test_a_run_with_other_settings_is_refused(data, copied_run):
    path = copied_run / "config.json"
    path.write_text(path.read_text().replace('"ranks": 1', '"ranks": 4'))
    refused(lambda: train(data), copied_run, "ranks (4 there, 1 asked)")
    torch.save(dict(finished=False), copied_run / "last.pt")
    refused(lambda: score(data, "--run", copied_run), copied_run, "not finished")
    path.write_text("{")
    refused(lambda: train(data), path, "cannot be read")
    path.unlink()
    refused(lambda: train(data), copied_run, "no config.json")


def test_a_loss_that_is_not_finite_ends_the_run(small_data, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "bce", lambda logits, target: logits.sum() * math.nan)
    refused(lambda: train(small_data, "--loss", "bce"), "step 1: the loss is not finite")


@mark.parametrize("error, flag", [
    (RuntimeError("unable to allocate shared memory(shm) for file"), "--workers 0"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--batch-size"),
    (KeyboardInterrupt(), "interrupted")])
def test_too_little_memory_and_ctrl_c_are_said_in_one_line(error, flag):
    refused(lambda: prepare_data.run_script(Mock(side_effect=error), "advice"), flag)


def test_flags_that_a_command_does_not_use_are_said_and_change_no_name(capsys):
    args, name = finetune_eval.parse_args([*ON_DEMO, "--protocol", "reference", "--flips"])
    assert (args.flips, name) == (False, "reference")
    assert "ignored: --flips" in capsys.readouterr().out


def test_predict_replaces_nothing_and_names_bad_files(predict, run):
    Path("in/Thumbs.db").touch(mode=0)
    Path("in/bad.png").write_text("text")
    refused(lambda: predict("out --tile"), "in/bad.png", "not an image")
    expected = predict_tiled(load_unet(run), read_image("in/dé.tif"), 32, 32, "cpu")
    assert array_equal(read_image("out/dé.png")[..., 0] > 0, expected)
    refused(lambda: predict("out"), "out is not empty", "--overwrite")
    refused(lambda: predict("in/out --overwrite"), "in/out", "another --out")


# =========================================================================================== driver
# run_all.sh makes each network and what is made of it once, and lists what failed.

def run_all(*words, start=subprocess.run, **settings):
    """Run run_all.sh of this folder, or start it by Popen, with no other environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return start(["bash", "run_all.sh", *words], env=dict(settings, PATH=path), text=True,
                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def dry_run(word, **settings):
    """Return the runs that are listed, each with what is made of it in the lines below it."""
    shutil.copy(HERE / "run_all.sh", ".")                       # where no data are prepared
    end = run_all(word, DRY_RUN="1", **settings)
    assert os.listdir() == ["run_all.sh"]
    return re.split(r"\n(?=python)", end.stdout.strip())


def test_dry_run_lists_each_network_with_what_is_made_of_it():
    listed = dry_run("main", DATASETS="a b", SEEDS="0 7", BACKBONES="resnet50", LABELS="0.1",
                     METHODS="medsass byol mae", PROTOCOLS="transfer semi", EPOCHS="9")
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
    shards = dry_run("all", SHARD="1/2") + dry_run("all", SHARD="02/2")
    assert len(shards) > 100 and sorted(shards) == sorted(dry_run("all"))


# What file run_all.sh, in this folder, expects of a command.
OUTPUT_OF = """eval "$(sed -n '/^output_of()/,/^}/p' run_all.sh)"; output_of "$1" """


def test_the_driver_knows_the_names_that_the_scripts_give():
    listed = "\n".join(dry_run("all", DATASETS="a", SEEDS="50", LABELS="0.1 1.0 150"))
    for command in {*re.findall("python (.*)", listed)}:
        command = command.replace("RUN", "runs/a/vit_small/mae-e3/seed50")
        script, *flags = command.split()
        if script == "pretrain.py":
            args, name = pretrain.parse_args(flags)
            expected = f"runs/{args.dataset}/{args.backbone}/{name}/seed50/samples.png"
        else:
            args, name = finetune_eval.parse_args(flags)
            expected = f"results/{args.dataset}/{args.backbone}/{args.protocol}/seed50/{name}.json"
            if args.run:
                expected = f"results/a/vit_small/mae-e3/seed50/{name}.json"
        output = subprocess.check_output(["bash", "-c", OUTPUT_OF, "", command], text=True)
        assert output.strip() == expected


STAND_IN = f"""import os, subprocess, sys, time
words = ' '.join(sys.argv)
if '--report' in words:
    sys.exit()
with open('seen', 'a') as file:
    print(os.environ.get('CUDA_VISIBLE_DEVICES'), words, file=file)
if os.environ.get('BAD', '?') in words:
    sys.exit('reason')
while os.path.exists('slow'):
    time.sleep(.05)
made = subprocess.check_output(['bash', '-c', {OUTPUT_OF!r}, '', words], text=True).strip()
os.makedirs(os.path.dirname(made), exist_ok=True)
open(made, 'w')
"""


@fixture
def project():
    """Write stand-ins for the scripts: they note the call in `seen`, fail if BAD is in it, wait
    while there is a file `slow`, and write what is expected of them."""
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(HERE / name, ".")
    os.makedirs("data/demo")
    files = {"data/demo/meta.json": '{"size": 64, "seed": 0}', "data/demo/test_masks.npy": "",
             "seen": "", "pretrain.py": STAND_IN, "finetune_eval.py": STAND_IN}
    for name, text in files.items():
        Path(name).write_text(text)


SIX = dict(DATASETS="demo", SEEDS="0", BACKBONES="resnet50", METHODS="byol simsiam",
           PROTOCOLS="transfer", LABELS="0.1")


def seen():
    """Return what the stand-ins were called with so far."""
    return Path("seen").read_text().splitlines()


def benchmark(**settings):
    """Run main, which ends well, of six calls of the scripts; return all calls so far."""
    assert run_all(**SIX, **settings).returncode == 0
    return seen()


def test_a_failed_run_stops_no_other_and_what_is_finished_and_newer_is_skipped(project):
    end = run_all(**SIX, BAD="--method byol")
    failed = re.search(r"failed: python pretrain.py .*byol\n +log: (\S+)\n$", end.stderr)
    assert end.returncode == 1
    assert Path(failed[1]).read_text() == "reason\n"
    assert len(seen()) == 5                             # its evaluation is not tried
    assert len(benchmark()) == len(benchmark()) == 5 + 2
    shutil.rmtree("runs/demo/resnet50/byol")
    assert len(benchmark()) == 7 + 2                    # it, and its score
    time.sleep(.1)
    os.utime("data/demo/meta.json")
    assert len(benchmark()) == 9 + 6


def test_a_stopped_driver_stops_its_runs_and_goes_on(project):
    Path("slow").touch()
    driver = run_all(start=subprocess.Popen, JOBS="2", **SIX)
    while len(seen()) < 2:
        time.sleep(.05)
    driver.terminate()
    assert driver.wait() == 130
    os.remove("slow")
    time.sleep(1)
    assert len(seen()) == 2 and not Path("runs").exists()
    assert {line.split()[0] for line in benchmark(GPUS="3 5")[2:]} == {"3", "5"}


# ============================================================================================ bench
# Ours beside a library that people would use instead (pytest -m bench -s test_smoke.py). A row
# fails only if ours is the slower or larger one: the ratio depends on the processor.

def record(what, against, ours, theirs):
    """Print a row of the table, in seconds or MB, and check it."""
    print("\n", what, against, ours, theirs, ours / theirs, sep=" | ")
    assert ours < theirs


@mark.bench
def test_input_path():
    """Read, augment, pseudo-mask, batches of 16 at 224 px, one worker; medians of five."""
    images = rng.integers(0, 256, (160, 28, 28, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    np.save("train_images.npy", images)
    here = Path()
    rows = pretrain.rows_of(here, "train")
    dataset = pretrain.Images(here, rows, MedSASS("resnet50").augment, 0)
    ours = pretrain.make_loader(dataset, pretrain.Batches(160, 16, 0), 1)
    augment = transforms.BYOLTransform(transforms.BYOLView1Transform(input_size=224),
                                       transforms.BYOLView2Transform(input_size=224))
    theirs = torch.utils.data.DataLoader(
        [*map(Image.fromarray, images)], 16, num_workers=1, persistent_workers=True,
        collate_fn=lambda batch: torch.utils.data.default_collate([*map(augment, batch)]))
    times = []
    for loader in (ours, theirs) * 6:                           # the first of each does not count
        start = time.perf_counter()
        list(loader)
        times.append(time.perf_counter() - start)
    seconds = np.median(np.reshape(times, (6, 2))[1:], axis=0)
    record("input path, s for 160 images", "lightly's BYOL transform", *seconds)


STEP = """import statistics, sys, time, torch, segmentation_models_pytorch as smp, pretrain
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
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
    start = time.perf_counter()
    optimizer.zero_grad()
    loss_of().backward()
    optimizer.step()
    times.append(time.perf_counter() - start)
print(statistics.median(times[1:]), peak() - before)
"""


@mark.bench
def test_training_step():
    """ResNet-50 U-Net, 224 px, batch 8, in a process of its own, against the same network, loss and
    optimiser from segmentation_models_pytorch and torch, written plainly."""
    measured = [python("-c", STEP, side).stdout.split() for side in ("ours", "theirs")]
    seconds, megabytes = np.transpose(np.array(measured, float))
    record("training step, s", "smp", *seconds)
    record("training step, MB", "smp", *megabytes)


@mark.bench
def test_preparing():
    """2000 jpgs of 1022x767 to arrays of 224 px, the whole script against one process."""
    for i in range(20):
        small = rng.integers(0, 256, (95, 127, 3), np.uint8)
        save_image(f"raw/{i}.jpg", cv2.resize(small, (1022, 767)), quality=92)
        for k in range(1, 100):
            shutil.copy(f"raw/{i}.jpg", f"raw/{i}_{k}.jpg")
    times = [time.perf_counter()]
    python(HERE / "prepare_data.py", *"--dataset folder --raw raw".split())
    times.append(time.perf_counter())
    np.stack([Image.open(f).convert("RGB").resize((224, 224)) for f in Path("raw").iterdir()])
    times.append(time.perf_counter())
    record("preparing, s", "a plain loop", *np.diff(times))
