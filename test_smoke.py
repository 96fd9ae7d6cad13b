"""Every stage through its command line, every formula against an independent source, every promise
by breaking it.

    bash run_all.sh test                    # all but the benchmarks
    pytest -m smoke test_smoke.py           # a minute
"""

import argparse
import copy
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
import time
import tracemalloc
import unicodedata
import zipfile
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
from baselines import mae, simmim

HERE = Path(__file__).parent
rng = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------ helpers

@pytest.fixture(autouse=True)
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


def write_folder(folder, n=12, size=40, masks=True):
    """A raw folder of n pictures, three a patient, and their masks; the same each time."""
    names = ["images/{patient}_{i:02d}.png", "masks/{patient}_{i:02d}.png"]
    write_layout(folder, *names[:1 + masks], n=n, shape=(size, size))
    return folder



def prepare(raw, out, *flags):
    prepare_data.main(["--dataset", "folder", "--raw", str(raw), "--size", "32", "--out", str(out),
                       *flags])
    return out / raw.name


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with the demo, prepared at 32 px."""
    folder = tmp_path_factory.mktemp("data")
    prepare_data.main(["--dataset", "demo", "--size", "32", "--out", str(folder)])
    return folder


def command(data, out, *flags, epochs=2):
    """Return the flags of a run on the demo, on the CPU."""
    return ["--dataset", "demo", "--data", str(data), "--out", str(out), "--epochs", str(epochs),
            "--workers", "0", "--device", "cpu", *flags]


def newest(paths):
    return max(paths, key=lambda path: path.stat().st_mtime_ns)


def train(data, out, *flags, epochs=2):
    """Run pretrain.py in this process on the demo; return the run folder."""
    pretrain.main(command(data, out, *flags, epochs=epochs))
    return newest(out.glob("demo/*/*/seed*"))


def score(data, out, *flags):
    """Run finetune_eval.py in this process; return the JSON's path and the result."""
    finetune_eval.main(["--data", str(data), "--out", str(out), "--runs", str(out / "runs"),
                        "--device", "cpu", *flags])
    path = newest(path for path in out.rglob("*.json") if path.name != "config.json")
    return path, json.loads(path.read_text())


def tune(data, out, *flags, epochs=1):
    """Run finetune_eval.py with training; return the result and the folder of its training."""
    path, result = score(data, out, "--epochs", str(epochs), "--workers", "0", *flags)
    places = [out]
    if "--run" in flags:
        places.append(Path(flags[flags.index("--run") + 1]))
    folders = []
    for place in places:
        folders += [config.parent for config in place.rglob("config.json")
                    if config.parent.name.startswith(path.stem)]
    return result, newest(folders)


ON_DEMO = ["--dataset", "demo", "--backbone", "resnet50"]


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """An end-to-end ResNet-50 run of two epochs."""
    return train(data, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def vit_run(data, tmp_path_factory):
    """A ViT-small run of one epoch."""
    return train(data, tmp_path_factory.mktemp("vit"), "--backbone", "vit_small", epochs=1)


@pytest.fixture
def copied_run(run, tmp_path):
    """A copy of the run where train(data, tmp_path) has its folder."""
    return Path(shutil.copytree(run, tmp_path / run.relative_to(run.parents[3])))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A folder with a data set "demo" of eight images to train on."""
    folder = tmp_path_factory.mktemp("small")
    prepare(write_folder(folder / "raw"), folder, "--name", "demo")
    return folder


def load(path):
    return torch.load(path, weights_only=True)


def weights_of(folder):
    return load(folder / "best.pt")["model"]


def load_unet(folder):
    unet = models.build_unet("resnet50")
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
    with pytest.raises(SystemExit) as end:
        call()
    message = str(end.value.code)
    assert message not in ("0", "None")
    for word in words:
        assert str(word) in message
    return message


def fails(*arguments, cwd=HERE, **options):
    """Check that Python ends with an error and without a traceback; return the lines it says."""
    end = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True,
                         **options)
    assert end.returncode in (1, 2) and "Traceback" not in end.stderr, end.stderr
    return end.stderr.splitlines()


# ============================================================================================ smoke
# Every stage runs through its command line on the demo and leaves the files that design and README
# name. `pytest -m smoke` is these tests alone.

METHODS = [("medsass", "resnet50"), ("medsass", "vit_small"), ("byol", "resnet50"),
           ("simsiam", "resnet50"), ("dino", "resnet50"), ("dino", "vit_small"),
           ("mae", "vit_small"), ("simmim", "vit_small")]


@pytest.mark.smoke
@pytest.mark.parametrize("method, backbone", METHODS)
def test_every_method_trains_and_is_scored(method, backbone, small_data, tmp_path):
    flags = ["--method", method, "--backbone", backbone, "--batch-size", "4"]
    folder = train(small_data, tmp_path, *flags, epochs=1)
    files = {"config.json", "log.csv", "last.pt", "encoder.pth", "samples.png"}
    assert set(os.listdir(folder)) - {"best.pt"} == files
    [row] = log_of(folder)
    assert math.isfinite(float(row["train_loss"]) + float(row["val_loss"])) and len(row) > 4
    path, result = score(small_data, tmp_path / "results", "--run", str(folder))
    assert path.relative_to(tmp_path / "results").as_posix() == (
        f"demo/{backbone}/{method}-e1-b4/seed0/transfer.json")
    assert 0 <= result["iou_global"] <= 1 and result["method"] == method
    assert result["run"]["epochs"] == 1 and result["n_test"] == 3


@pytest.mark.smoke
def test_every_protocol_is_scored_and_reported(data, copied_run, tmp_path, capsys):
    out = tmp_path / "results"
    few = ["--labels", "6", "--epochs", "2", "--workers", "0"]
    for protocol in ("frozen", "finetune", "semi"):
        _, result = score(data, out, "--run", str(copied_run), "--protocol", protocol, *few)
        assert (result["n_labels_train"], result["budget_steps"]) == (6, 10)
    score(data, out, "--run", str(copied_run), "--flips")
    score(data, out, *ON_DEMO, "--protocol", "reference")
    _, result = score(data, out, *ON_DEMO, "--protocol", "supervised", *few)
    keys = {"dataset", "backbone", "method", "train", "protocol", "labels", "seed", "n_test",
            "iou_global", "iou_image", "dice_global", "accuracy_image", "command", "data"}
    assert keys <= result.keys() and result["iou_global_ci"][0] <= result["iou_global"]
    finetune_eval.main(["--report", "--out", str(out)])
    text = (out / "README.md").read_text()
    for title in ("medsass-e2: transfer-flips", "medsass-e2: semi-l6-e2", "refined_trusted"):
        assert f"| {title} |" in text
    assert (out / "demo.png").exists() and "--protocol semi" in text


@pytest.mark.smoke
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
            "numpy.save('predicted.npy', torch.cat(pair).numpy())\n")
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    unet, _ = finetune_eval.whole_network(folder)
    logits = torch.tensor(finetune_eval.predict_logits(unet, images[[0, 1, 2, 3, 4, 0]], "cpu"))
    predicted = np.load(tmp_path / "predicted.npy")[:, 0]
    assert np.allclose(predicted, torch.sigmoid(logits), atol=1e-4)


SIZES = {"a b": (50, 31), "c": (32, 32), "dé": (20, 90)}


@pytest.fixture
def predict(run, tmp_path):
    """A function that runs --predict on three images of SIZES, in "in", with other flags."""
    for name, (width, height) in SIZES.items():
        save_image(tmp_path / "in" / f"{name}.tif", rng.integers(0, 256, (height, width), np.uint8))
    flags = ["--run", str(run), "--device", "cpu", "--predict", str(tmp_path / "in"), "--out"]
    return lambda out, *more: finetune_eval.main([*flags, str(tmp_path / out), *more])


@pytest.mark.smoke
def test_predict_writes_masks_at_each_image_s_own_size(predict, tmp_path):
    predict("out", "--overlay")
    rows = prepare_data.read_csv(tmp_path / "out/foreground.csv")
    fractions = {row["name"]: float(row["foreground_fraction"]) for row in rows}
    for name, size in SIZES.items():
        mask = Image.open(tmp_path / "out" / f"{name}.png")
        assert mask.size == size == Image.open(tmp_path / "out/overlay" / f"{name}.png").size
        assert set(np.unique(mask)) <= {0, 255}
        assert np.mean(np.asarray(mask) > 0) == pytest.approx(fractions[f"{name}.tif"], abs=1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("stage", ["prepare_data", "pretrain", "finetune_eval"])
def test_help_is_printed(stage):
    with pytest.raises(SystemExit, match="0"):
        sys.modules[stage].parse_args(["--help"])


# ========================================================================================= formulas
# Each formula against code that others wrote, a closed form, or a loop that is slow and plain. A
# tolerance is what the arithmetic costs.

# smp's alpha weighs false positives, ours false negatives; its gamma is the inverse of ours.
@pytest.mark.parametrize("name, flags, theirs", [
    ("focal_tversky", {}, smp.losses.TverskyLoss("binary", smooth=1, alpha=.3, beta=.7, gamma=.75)),
    ("focal_tversky", dict(alpha=.4, beta=.6, gamma=2.0, smooth=5.0),
     smp.losses.TverskyLoss("binary", smooth=5, alpha=.6, beta=.4, gamma=.5)),
    ("tversky", {}, smp.losses.TverskyLoss("binary", smooth=1, alpha=.3, beta=.7)),
    ("dice", {}, smp.losses.DiceLoss("binary", smooth=1)),
    ("focal", {}, smp.losses.FocalLoss("binary", gamma=2)),
    ("focal", dict(alpha=.6, gamma=3.0), smp.losses.FocalLoss("binary", alpha=.6, gamma=3)),
    ("bce", {}, smp.losses.SoftBCEWithLogitsLoss())])
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


SMP_NAMES = {"up1": "decoder.blocks.0", "up2": "decoder.blocks.1", "up3": "decoder.blocks.2",
             "convs.0.0": "conv1.0", "convs.0.1": "conv1.1",
             "convs.1.0": "conv2.0", "convs.1.1": "conv2.1",
             "channel": "attention.cSE", "spatial": "attention.sSE", "head": "segmentation_head.0"}


def smp_name(name):
    for ours, theirs in SMP_NAMES.items():
        name = name.replace(ours, theirs)
    return name


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
            if other is not parameter.grad:                     # both None if there is no skip
                assert torch.allclose(parameter.grad, other, atol=1e-9), name


def test_every_weight_of_the_vit_unet_learns():
    unet = models.build_unet("vit_small", img_size=64)
    loss = unet(torch.randn(2, 3, 64, 64)).mean()
    torch.autograd.grad(loss, list(unet.parameters()))          # raises if one has no part in it


@pytest.mark.parametrize("backbone, lacking, elsewhere", [
    ("resnet50", {"layer3", "layer4", "fc"}, [timm.models.resnet50, torchvision.models.resnet50]),
    ("vit_small", set(), [timm.models.vit_small_patch8_224])])
def test_exported_encoder_loads_elsewhere(backbone, lacking, elsewhere, tmp_path):
    missing = models.export_encoder(models.build_unet(backbone), tmp_path / "encoder.pth")
    assert {name.split(".")[0] for name in missing} == lacking
    for create in elsewhere:
        keys = create().load_state_dict(load(tmp_path / "encoder.pth"), strict=False)
        assert not keys.unexpected_keys and set(keys.missing_keys) == set(missing)


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_encoders_from_elsewhere_load(backbone, tmp_path):
    state = timm.create_model(models.BACKBONES[backbone], num_classes=10).state_dict()
    of_dino = {"teacher": prefixed("backbone.", state), "args": argparse.Namespace(arch="vit")}
    numbers = {child: number for number, child in models.SEQUENTIAL.items()}
    sequential = {}                                             # as RadImageNet's and lightly's
    for name, tensor in state.items():
        child, _, rest = name.partition(".")
        sequential[f"backbone.{numbers.get(child, child)}.{rest}"] = tensor
    if backbone == "resnet50":
        torch.save(sequential, tmp_path / "f.pth")
        unet = models.build_unet(backbone)
        models.load_encoder(unet, tmp_path / "f.pth")
        assert not differing(unet.encoder.state_dict(), state)
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
            ("holds no resnet50", [1, 2]), ("lacks 1 .*bn1.weight", cut),
            ("2 resnet50", prefixed("online.", complete) | prefixed("target.", complete)),
            ("mismatch for conv1.weight", complete | {"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            ("bn1.weight .*not finite", complete | {"bn1.weight": torch.full((64,), math.nan)}),
            ("", None)):
        torch.save(content, path)
        if content is None:
            path.write_bytes(b"no checkpoint")
        with pytest.raises(ValueError, match=f"{path}.*{words}"):
            models.load_encoder(models.build_unet("resnet50"), path)


def ght_score(gray, t, nu, tau, kappa, omega):
    """Return Barron's score of one threshold, from the pixels themselves (ECCV 2020, eqs. 7-13)."""
    total = 0
    for side, fraction in ((gray[gray <= t], omega), (gray[gray > t], 1 - omega)):
        n, d = side.size, side.size * side.var()
        p = n / gray.size
        v = (p * nu * tau ** 2 + d) / (p * nu + n)
        total += -d / v - n * math.log(v) + 2 * (n + kappa * fraction) * math.log(n)
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


def test_image_and_mask_are_augmented_alike(tmp_path):
    _, truth = spot(48, 48)
    np.save(tmp_path / "train_masks.npy", truth[None])
    np.save(tmp_path / "train_images.npy", np.repeat(truth[None, ..., None] * 200 + 20, 3, axis=3))
    rows = [("train", 0)]
    labelled = pretrain.Images(tmp_path, rows, pretrain.paper_augmentation(), 0, tmp_path)
    moved = 0
    for epoch in range(30):
        _, (view, mask) = labelled[epoch, 0]
        is_wrong = (view[1] > 110) != (mask[0] == 1)
        assert is_wrong.float().mean() < .04, epoch     # edges are sampled bilinear and nearest
        moved += not np.array_equal(mask[0], truth)
    assert moved > 20
    view, mask = pretrain.MedSASS("resnet50", foreground="dark").augment(view)
    pixels = view.permute(1, 2, 0).numpy()[None]
    assert np.array_equal(mask, pretrain.pseudo_mask(pixels, "otsu", "dark"))   # of the view


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


@pytest.mark.parametrize("seed", range(3))
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
    assert reliability == pytest.approx(2 * c / (1 + c), rel=1e-4) and radius == 0
    disc = skimage.morphology.disk(23)
    exact = skimage.morphology.medial_axis(np.pad(disc, 1), return_distance=True)[1].max()
    assert pretrain.position_reliability([np.pad(disc, 1)] * 3, 3)[1] == exact // 7 == 3


def slow_morphology(mask, radius, value):
    """Return where the ellipse about a pixel holds nothing but `value`, by a loop over pixels."""
    offsets = np.argwhere(pretrain.ellipse(radius)) - radius
    out = np.zeros(mask.shape, bool)
    for y, x in np.ndindex(mask.shape):
        inside = [(y + dy, x + dx) for dy, dx in offsets
                  if 0 <= y + dy < mask.shape[0] and 0 <= x + dx < mask.shape[1]]
        out[y, x] = all(mask[place] == value for place in inside)
    return out


def slow_dilation(mask, radius):
    return ~slow_morphology(mask, radius, False)


def slow_open(mask, radius):
    padded = np.pad(mask, radius, mode="edge")
    opened = slow_dilation(slow_morphology(padded, radius, True), radius)
    return opened[radius:-radius, radius:-radius]


def test_position_masks_equal_a_slow_loop():
    blobs = [cv2.GaussianBlur(rng.random((30, 34)), (0, 0), 3) for _ in range(6)]
    masks = np.array([blob > np.quantile(blob, .7) for blob in blobs])
    opened = [slow_open(mask, 2) for mask in masks]
    for mask, expected in zip(masks, opened, strict=True):
        assert np.array_equal(pretrain.open_mask(mask, 2), expected)
    inner = [o & ~flood(o, border_of(o.shape)) for o in opened]
    p = cv2.GaussianBlur(np.mean(inner, axis=0), (0, 0), 34 / 24)
    p = p.mean() + .7 * (p - p.mean())
    likely = pretrain.likely_positions(masks, 6, .7, 2)
    assert np.array_equal(likely, p >= p.max() / 2) and 0 < likely.mean() < 1
    for mask, o in zip(masks, opened, strict=True):
        kept = flood(o, likely)
        expected = slow_dilation(kept, 2) & mask if kept.any() else mask
        expected = slow_dilation(expected, 1)
        assert np.array_equal(pretrain.position_mask(mask, 2, likely), expected)
    assert np.array_equal(pretrain.position_mask(mask, 2, likely & False), slow_dilation(mask, 1))


def polygon_area(points):
    x, y = np.transpose(points)
    return abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2


def slow_hull(points):
    """Return the convex hull of integer points by walking around them (Jarvis 1973)."""
    points = sorted({*map(tuple, points)})
    hull, current = [], points[0]
    while not hull or current != hull[0]:
        hull.append(current)
        best = points[0]
        for point in points:
            (ax, ay), (bx, by) = np.subtract(best, current), np.subtract(point, current)
            cross = ax * by - ay * bx
            further = bx ** 2 + by ** 2 > ax ** 2 + ay ** 2
            if best == current or cross < 0 or cross == 0 and further:
                best = point
        current = best
    return hull


def test_mask_quality_equals_slow_loops():
    values = rng.integers(0, 256, (24, 30), np.uint8)
    mean_mask = rng.random((24, 30))
    blob = cv2.GaussianBlur(rng.random((24, 30)), (0, 0), 2)
    mask = blob > np.quantile(blob, .6)
    area = hull = 0
    for contour in cv2.findContours(np.uint8(mask), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
        area += polygon_area(contour[:, 0])
        hull += polygon_area(slow_hull(contour[:, 0]))
    classes = np.where(mask, values[mask].mean(), values[~mask].mean())
    expected = classes.var() / values.var(), area / hull, np.mean([*mean_mask[mask]])
    assert pretrain.mask_quality(mask, values, mean_mask) == pytest.approx(expected)
    assert pretrain.mask_quality(mask & False, values, mean_mask) == (0, 0, 0)
    assert pretrain.mask_quality(mask | True, values, mean_mask)[0] == 0


@pytest.mark.parametrize("n, reliability, kept", [(9, 1.0, 4), (10, .5, 7), (1, 1.0, 1), (6, 0, 6)])
def test_trusted_are_those_of_the_best_ranks(n, reliability, kept):
    quality = rng.integers(0, 4, (n, 3)) / 4            # with many ties
    sums = []
    for row in quality:
        sums.append(sum((column < value).sum() + ((column == value).sum() + 1) / 2
                        for column, value in zip(quality.T, row, strict=True)))
    order = sorted(range(n), key=lambda k: (-sums[k], k))
    is_trusted = pretrain.trusted(quality, reliability)
    assert np.flatnonzero(is_trusted).tolist() == sorted(order[:kept])


@pytest.mark.parametrize("n, size, seed, lengths", [            # lengths: of each rank's batches
    (33, 16, 3, [[16, 17]]), (39, 16, 3, [[16, 23]]), (40, 16, 3, [[16, 16, 8]]),
    (5, 2, 3, [[2, 3]]), (33, 8, 3, [[8, 9], [8, 8]]), (33, 8, None, [[8, 8], [8, 9]]),
    (7, 2, None, [[2, 3], [2]]), (10, 1, 3, [[1, 2], [1, 2], [1, 1], [1, 1]])])
def test_batches_cover_an_epoch_once_and_none_is_small(n, size, seed, lengths):
    shares = [list(pretrain.Batches(n, size, seed, shard=(rank, len(lengths))))
              for rank in range(len(lengths))]
    assert [[len(batch) for batch in share] for share in shares] == lengths
    indices = [index for share in shares for batch in share for _, index in batch]
    assert sorted(indices) == list(range(n))


def test_batches_are_of_their_seed_and_of_several_passes():
    whole = list(pretrain.Batches(33, 16, seed=3))
    assert list(pretrain.Batches(33, 16, seed=3)) == whole != list(pretrain.Batches(33, 16, seed=4))
    several = sum(pretrain.Batches(5, 4, seed=3, epoch_size=10), [])         # of (pass, image)
    assert sorted(several) == [*itertools.product((0, 1), range(5))]


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


@pytest.mark.parametrize("name, backbone", METHODS[2:])
def test_baseline_encoder_is_plain_timm_and_learns_and_its_loss_is_float32(name, backbone):
    method, views = build(name, backbone)
    plain = timm.create_model(models.BACKBONES[backbone], num_classes=0)
    assert method.encoder.state_dict().keys() == plain.state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(method)(views).dtype == torch.float32
    before = weights(method.encoder)
    one_step(method, views, total_steps=1, epoch_steps=1)
    assert torch.isfinite(weights(method)).all()
    assert not torch.equal(weights(method.encoder), before)
    state = copy.deepcopy(method.state_dict())
    method.eval()(views)                                        # as validation does
    assert not differing(method.state_dict(), state)


def lightlys_loss(name, method, views):
    """Return the loss of one of our methods, by lightly's criteria from what its networks give."""
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


@pytest.mark.parametrize("name, backbone", METHODS[2:6])
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


@pytest.mark.parametrize("name, fraction", [("byol", .03), ("dino", .2)])
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
    if name == "simmim":
        [free] = [g["params"] for g in optimizer.param_groups if not g["weight_decay"]]
        assert {method.encoder.cls_token, method.encoder.pos_embed} < {*free}


@pytest.mark.parametrize("name, outputs, healthy", [
    ("byol", torch.eye(64), [1]), ("byol", torch.ones(64, 64), [0]),
    ("simsiam", torch.eye(64), [1]), ("simsiam", torch.ones(64, 64), [0]),
    ("dino", torch.eye(64), [1, 0]), ("dino", torch.eye(64)[[3] * 32], [0, 0]),
    ("dino", torch.full((32, 64), 1 / 64), [1, 1])])
def test_health_shows_a_collapse(name, outputs, healthy):
    after_forward = argparse.Namespace(z=outputs, q=outputs)
    health = pretrain.METHODS[name].health(after_forward)
    assert [*health.values()] == pytest.approx(healthy, abs=.01)


def test_dino_views_head_momentum_and_frozen_prototypes():
    method, views = build("dino", "vit_small", prototypes=50)
    assert [view.shape[-1] for view in views] == [32] * 2 + [16] * 8
    momenta = [method.momentum(step, 5000) for step in (0, 2500, 5000)]
    assert momenta == pytest.approx([.996, .998, 1]) and method.momentum(0, 200) == .95
    prototypes = method.student[1].prototypes.weight
    prototypes.data *= 7                                        # their length does not matter
    assert method.student(views[0]).abs().max() <= 1 + 1e-6
    start = prototypes.clone()
    one_step(method, views, step=4, epoch_steps=5)
    assert torch.equal(prototypes, start)                       # in the first epoch
    one_step(method, views, step=5, epoch_steps=5)
    assert not torch.equal(prototypes, start)


def test_mae_encodes_and_scores_as_its_paper_says():
    method, (images,) = build("mae", "vit_small", size=64)
    p = images[1, :, 8:16, 8:16].flatten()
    assert torch.equal(method.patchify(images)[1, 9], p)
    expected = (p - p.mean()) / (p.var() + 1e-6).sqrt()
    assert torch.allclose(method.target(images)[1, 9], expected, atol=1e-4)
    assert torch.equal(method.unpatchify(method.patchify(images)), images)
    torch.manual_seed(1)
    loss = method([images]).item()
    torch.manual_seed(1)
    latent, mask, restore = method.encode(images)
    hidden = method.target(images)[mask]
    error = (method.decode(latent, restore)[mask] - hidden).square().mean().item()
    assert loss == pytest.approx(error, rel=1e-5)               # of hidden patches alone
    of_a_constant = hidden.view(-1, 3, 64).numpy().var(axis=(0, 2)).mean()      # one a channel
    assert method.health()["error"] == pytest.approx(error / of_a_constant, rel=1e-4)
    theirs = modules.MaskedVisionTransformerTIMM(vit=copy.deepcopy(method.encoder))
    theirs.vit.load_state_dict(method.encoder.state_dict())     # lightly has weights of its own
    assert torch.equal(mask, restore >= 16)                     # of 64: a quarter is seen
    kept = F.pad(restore.argsort(dim=1)[:, :16] + 1, (1, 0))    # and the class token, 0
    assert torch.allclose(latent, theirs.encode(images, idx_keep=kept), atol=1e-5)
    theirs = lightly_utils.get_2d_sine_cosine_positional_embedding(16, 3, cls_token=True)
    assert np.allclose(mae.sincos_positions(16, 3)[0], theirs, atol=1e-6)


@pytest.mark.parametrize("size", [64, 80, 224])
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
    hidden = method.pixels_of(mask)[:, 0]
    reconstruction = method.reconstruct(images, mask)
    noise = images.where(~method.pixels_of(mask), torch.randn_like(images))
    assert torch.equal(method.reconstruct(noise, mask), reconstruction)
    pixels, guess = [x.detach().movedim(1, 3)[hidden] for x in (images, reconstruction)]
    error = F.l1_loss(guess, pixels).item()
    assert loss == pytest.approx(error, rel=1e-5)
    of_a_constant = F.l1_loss(pixels, pixels.median(dim=0).values.expand_as(pixels)).item()
    assert method.health()["error"] == pytest.approx(error / of_a_constant, rel=1e-4)
    tokens = method.encoder.forward_features(images)[:, 1:]     # timm's, if nothing is hidden
    expected = method.head(tokens.transpose(1, 2).reshape(4, 384, 8, 8))
    whole = method.reconstruct(images, torch.zeros(4, 8, 8, dtype=torch.bool))
    assert torch.allclose(whole, expected, atol=1e-5)


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


def test_bootstrap_equals_a_loop_over_resampled_images():
    pred = rng.random((8, 6, 5)) < .5
    target = rng.random((8, 6, 5)) < .4
    times = finetune_eval.bootstrap_weights(tuple("aabcccde"))[:50]
    samples = finetune_eval.weighted_scores(finetune_eval.count_pixels(pred, target), times)
    for k, weight in enumerate(times):
        assert weight[0] == weight[1] and weight[3] == weight[4] == weight[5]   # groups stay whole
        assert weight[[0, 2, 3, 6, 7]].sum() == 5       # as many as there are
        chosen = np.repeat(np.arange(8), weight.astype(int))
        expected = finetune_eval.segmentation_scores(pred[chosen], target[chosen])
        assert {name: value[k] for name, value in samples.items()} == pytest.approx(expected)


def test_labelled_images_are_nested_and_by_group():
    names = [dict(name=f"{i}", group=f"g{i // 4}" if i < 40 else "") for i in range(50)]

    def rows(fraction, seed=5, of=50):
        return finetune_eval.labelled_rows(names, range(of), fraction, seed)

    for few, many in itertools.pairwise([.001, .1, 7 / 50, .5, 1.0]):
        assert set(rows(few)) < set(rows(many))
    assert [len(rows(fraction)) for fraction in (.001, .1, 7 / 50, .5, 1.0)] == [1, 5, 7, 25, 50]
    assert len({names[k]["group"] or k for k in rows(.5)}) < 13     # whole groups but the last
    assert rows(.5) == rows(.5) != rows(.5, seed=6)
    assert set(rows(1.0, of=8)) == set(range(8))


def test_focal_cross_entropy_equals_its_definition():
    logits = torch.randn(6, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, 1, 1, 2, 0])
    p = torch.softmax(logits, dim=1).numpy()[range(6), target]
    expected = (-(1 - p) ** 2 * np.log(p)).mean()
    assert finetune_eval.focal_cross_entropy(logits, target).item() == pytest.approx(expected)


def test_transfer_and_reference_rows_by_hand(data, run, tmp_path):
    path, result = score(data, tmp_path, "--run", str(run))
    images, masks = [np.array(part) for part in prepare_data.open_part(data / "demo", "test")]
    pixels = torch.tensor(images).permute(0, 3, 1, 2) / 255
    pixels = torchvision.transforms.v2.functional.normalize(
        pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.inference_mode():
        pred = load_unet(run)(pixels)[:, 0].numpy() > 0
    expected = finetune_eval.segmentation_scores(pred, masks > 0)
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=2e-4)
    rows = prepare_data.read_csv(path.with_suffix(".csv"))
    tp, fp, fn = [sum(int(row[name]) for row in rows) for name in ("tp", "fp", "fn")]
    assert len(rows) == 32 and result["iou_global"] == pytest.approx(tp / (tp + fp + fn))
    _, result = score(data, tmp_path, "--protocol", "reference", *ON_DEMO)
    raw = [image[..., 0] > skimage.filters.threshold_otsu(image[..., 0]) for image in images]
    train_images, truths = prepare_data.open_part(data / "demo", "train")
    truths = np.array(truths) > 0
    cuts = [truths.mean(axis=0) >= k / len(truths) for k in range(1, len(truths) + 1)]
    constant = max(cuts, key=lambda cut: (cut & truths).sum() / (cut | truths).sum())
    refinement, _ = pretrain.decide_refinement(train_images, "bright")
    refined = np.array([*refinement.refine_masks(images)])
    is_trusted, _ = refinement.choose_trusted(images)
    predictions = dict(all_foreground=True, all_background=False, best_constant=constant,
                       raw_threshold=raw, raw_threshold_inverted=np.invert(raw),
                       refined_threshold=refined)
    for name, pred in predictions.items():
        pred = np.broadcast_to(pred, masks.shape)
        expected = finetune_eval.segmentation_scores(pred, masks > 0)
        assert {key: result[name][key] for key in expected} == pytest.approx(expected)
    expected = finetune_eval.segmentation_scores(refined[is_trusted], masks[is_trusted] > 0)
    better = result["refined_trusted"]
    assert {key: better[key] for key in expected} == pytest.approx(expected)
    assert better["n_test"] == is_trusted.sum() and "random_init" in result


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


@pytest.mark.parametrize("stage, width", [("layer2", 512), ("layer4", 2048)])
def test_linear_probe_learns_on_an_encoder_that_stays(stage, width, labelled_data, tmp_path):
    torch.manual_seed(0)
    encoder = timm.create_model("resnet50", zero_init_last=False)
    if stage == "layer2":
        encoder = models.build_unet("resnet50").encoder
    torch.save(encoder.state_dict(), tmp_path / "some.pth")
    result, folder = tune(labelled_data, tmp_path, "--protocol", "classify", "--lr", "0.05",
                          "--batch-size", "8", *ON_DEMO, "--encoder", str(tmp_path / "some.pth"),
                          epochs=20)
    kept = weights_of(folder)
    for name, value in load(tmp_path / "some.pth").items():
        assert name.startswith("fc.") or value.equal(kept[f"encoder.{name}"])
    assert kept["linear.weight"].shape[1] == width and result["stage"] == stage
    [path] = tmp_path.glob("demo/*/*/*/classify*.csv")
    rows = prepare_data.read_csv(path)
    truth = [row["label"] for row in rows]
    pred = [row["prediction"] for row in rows]
    recall = sklearn.metrics.recall_score(truth, pred, average="macro")
    confusion = sklearn.metrics.confusion_matrix(truth, pred, labels=result["classes"])
    assert result["macro_recall"] == pytest.approx(recall) and recall > .8
    assert result["confusion"] == confusion.tolist() and result["n_test"] == len(rows)


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


def test_flips_are_the_mean_over_four_views(predict, run, tmp_path):
    predict("out", "--flips")
    image = prepare_data.read_image(tmp_path / "in/c.tif")
    turned = []
    for y, x in itertools.product((1, -1), (1, -1)):
        flipped = np.ascontiguousarray(image[::y, ::x])[None]
        logits = finetune_eval.predict_logits(load_unet(run), flipped, "cpu")[0]
        turned.append(logits[::y, ::x])
    mask = np.asarray(Image.open(tmp_path / "out/c.png")) > 0
    assert (mask == (np.mean(turned, axis=0) > 0)).mean() > .999


# ========================================================================================= promises
# No label is seen before it may be; a killed run goes on to the bit; workers, ranks, a full disk
# and a second process change nothing; a file that is copied stands alone.

def test_no_true_mask_is_read_and_workers_do_not_matter(data, run, tmp_path):
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("*_masks.npy"))
    blind = train(tmp_path / "data", tmp_path, "--workers", "2")
    assert contents(blind) == contents(run)


def test_test_masks_are_never_seen_before_the_score(data, tmp_path):
    shutil.copytree(data, tmp_path / "noisy")
    np.save(tmp_path / "noisy/demo/test_masks.npy", rng.integers(0, 2, (32, 32, 32), np.uint8))
    flags = [*ON_DEMO, "--protocol", "supervised", "--labels", "8"]
    clean, folder = tune(data, tmp_path / "clean", *flags)
    other, other_folder = tune(tmp_path / "noisy", tmp_path / "other", *flags)
    assert contents(folder) == contents(other_folder)
    assert clean["iou_global"] != other["iou_global"]


DIE_BEFORE_THE_SECOND_SAVE = """
import os, pathlib, signal, sys
import finetune_eval, pretrain

replace, saves = pathlib.Path.replace, []

def replace_or_die(source, target):
    saves.extend([target] * (pathlib.Path(target).name == "last.pt"))
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)

pathlib.Path.replace = replace_or_die
getattr(sys.modules[sys.argv[1]], "main")(sys.argv[2:])
"""


def killed(stage, flags):
    """Run a stage in a process that kills itself just before its second last.pt is in place."""
    end = subprocess.run([sys.executable, "-c", DIE_BEFORE_THE_SECOND_SAVE, stage, *flags],
                         cwd=HERE, capture_output=True, text=True)
    assert end.returncode == -signal.SIGKILL, end.stderr


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


@pytest.mark.parametrize("flags", [
    ["--refine"], ["--method", "byol", "--batch-size", "4"],
    ["--method", "dino", "--backbone", "vit_small", "--batch-size", "7"],
    ["--method", "mae", "--backbone", "vit_small"]])
def test_a_killed_run_resumes_to_the_bit(flags, lens_data, tmp_path):
    """One a family: masks in files; moving average; centre and schedules; masks in the network."""
    whole = train(lens_data, tmp_path / "whole", *flags)
    killed("pretrain", command(lens_data, tmp_path / "cut", *flags))
    cut = train(lens_data, tmp_path / "cut", *flags, "--workers", "1")
    assert contents(cut) == contents(whole)
    for row, other in zip(log_of(cut), log_of(whole), strict=True):
        assert row | dict(seconds="") == other | dict(seconds="")
    assert sum(path.stat().st_size for path in cut.iterdir()) < 100e6       # no heads, no copies


def test_a_finished_run_is_left_alone_or_completed(data, run, copied_run, tmp_path):
    before = (copied_run / "last.pt").stat()
    assert before.st_size < 10_000                              # its weights are in best.pt alone
    train(data, tmp_path)
    assert (copied_run / "last.pt").stat() == before
    for name in ("samples.png", "encoder.pth"):                 # as if killed before the last files
        (copied_run / name).unlink()
    train(data, tmp_path)
    assert contents(copied_run) == contents(run) and (copied_run / "samples.png").exists()


def test_refined_run_learns_from_trusted_masks(lens_data, tmp_path, capfd):
    folder = train(lens_data, tmp_path, "--refine", epochs=1)
    assert "val_agreement" in capfd.readouterr().out
    evidence = config_of(folder)["refinement"]
    assert evidence["channel"] == "blue" and evidence["shared_frame"] > 0
    assert evidence["train_trusted"]["images"] + evidence["train_distrusted"]["images"] == 14
    for part in ("train", "val"):
        images, truth = prepare_data.open_part(lens_data / "demo", part)
        masks = np.load(folder / f"{part}_masks.npy")
        otsu = pretrain.pseudo_mask(images, foreground="dark")
        assert (masks == truth).mean() > .95 > (otsu == truth).mean()
    method = pretrain.MedSASS("resnet50", 48, refine=pretrain.REFINEMENTS)
    sets = pretrain.image_sets(method, lens_data / "demo", 0, folder)
    is_trusted = np.load(folder / "train_trusted.npy")
    assert [row for _, row in sets.train.rows] == np.flatnonzero(is_trusted).tolist()
    assert (len(sets.plain), sets.epoch_size, len(sets.captions)) == (14, 14, 4)


def discs(centres, radius):
    """Return masks with discs at int (N, discs, 2), bool (N, 64, 64)."""
    masks = np.zeros((len(centres), 64, 64), np.uint8)
    for mask, of_mask in zip(masks, centres.tolist(), strict=True):
        for centre in of_mask:
            cv2.circle(mask, centre, radius, 1, -1)
    return masks > 0


@pytest.mark.parametrize("n", [8, 9, 40, 400])
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


def test_encoder_only_leaves_the_decoder_as_it_began(data, tmp_path):
    folder = train(data, tmp_path, "--train", "encoder", epochs=1)
    torch.manual_seed(pretrain.seed_from(0))
    begin = models.build_unet("resnet50", 32).state_dict()
    changed = differing(begin, weights_of(folder))
    assert "encoder.conv1.weight" in changed and "encoder.bn1.running_mean" in changed
    assert all(name.startswith("encoder.") for name in changed)
    flags = ["--run", str(folder), "--export", str(tmp_path / "network.pt2")]
    refused(lambda: finetune_eval.main(flags), "an encoder only")


def test_training_starts_from_an_encoder(data, run, tmp_path, monkeypatch):
    given = run / "encoder.pth"
    folder = train(data, tmp_path, "--encoder", str(given), "--lr", "0", epochs=1)
    changed = differing(load(folder / "encoder.pth"), load(given))
    assert all("running" in name or "num_batches" in name for name in changed)
    plain = timm.create_model("resnet50")
    meta = dict(size=32, counts=dict(train=64))
    flags = ["--dataset", "demo", "--method", "byol", "--encoder", "imagenet"]
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more:
                        plain if pretrained else create(name, **more))
    method = pretrain.build_method(pretrain.parse_args(flags)[0], meta)
    for encoder in (method.encoder, method.target[0]):
        assert not differing(encoder.state_dict(), plain.state_dict())
    monkeypatch.setattr(plain, "state_dict", None)              # as without a network
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more:
                        1 / 0 if pretrained else create(name, **more))
    args, _ = pretrain.parse_args(flags)
    refused(lambda: pretrain.build_method(args, meta), "imagenet", "network")


def test_patience_stops_and_exports_the_best(data, tmp_path):
    """Nothing learns, so that epoch 1 stays the best."""
    folder = train(data, tmp_path, "--lr", "0", "--patience", "2", epochs=30)
    best = load(folder / "best.pt")
    assert len(log_of(folder)) == 3 and best["epoch"] == 1
    assert not differing(prefixed("encoder.", load(folder / "encoder.pth")), best["model"])


def test_batchnorm_is_settled_on_plain_training_images(data, run):
    """The mean over batches of one size is that over all images."""
    encoder = load(run / "encoder.pth")
    images = torch.from_numpy(np.load(data / "demo/train_images.npy")).permute(0, 3, 1, 2)
    maps = F.conv2d(pretrain.normalise(images), encoder["conv1.weight"], stride=2, padding=3)
    assert torch.allclose(maps.mean(dim=(0, 2, 3)), encoder["bn1.running_mean"], atol=1e-5)


@pytest.mark.parametrize("flags, name", [
    ("--train encoder --threshold ght --loss dice --foreground dark --epochs 20 --batch-size 8"
     " --amp bf16", "medsass-encoder-ght-dice-dark-e20-b8-bf16"),
    ("--encoder a/encoder.pth --epochs 1 --lr 0", "medsass-from-encoder-e1-lr0.0"),
    ("--refine", "medsass+"), ("--refine trust position frame channel", "medsass+"),
    ("--refine frame channel", "medsass+channel-frame"),
    ("--method simsiam --threshold ght --lr 3e-3", "simsiam-lr0.003")])
def test_variants_name_their_folder(flags, name):
    assert pretrain.parse_args(["--dataset", "demo", *flags.split()])[1] == name


@pytest.mark.parametrize("flags", [
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
    assert path.read_bytes() == before and not list(path.parent.glob(".*.tmp"))
    pretrain.main(flags)
    assert contents(path.parent) == contents(run)


def test_a_crash_does_not_wait_for_its_workers(data, tmp_path):
    crash = "import sys, pretrain; del pretrain.MedSASS.after_step; pretrain.main(sys.argv[1:])"
    flags = command(data, tmp_path, "--workers", "2")
    end = subprocess.run([sys.executable, "-c", crash, *flags], cwd=HERE, timeout=100)
    assert end.returncode == 1


def test_two_processes_never_train_one_run(data, tmp_path, monkeypatch):
    folder = tmp_path / "demo/resnet50/medsass-e2/seed0"

    def begin_again(self, step, total):
        if step == 5:                                   # another process takes the run over
            prepare_data.write_json(folder / "config.json", config_of(folder))

    monkeypatch.setattr(pretrain.MedSASS, "after_step", begin_again)
    refused(lambda: train(data, tmp_path), folder / "config.json", "another one")
    assert load(folder / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("flags", [["--refine"], ["--method", "dino", "--backbone", "vit_small"]])
def test_two_ranks_train_one_run(flags, data, tmp_path):
    script = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "pretrain.py"]
    flags = command(data, tmp_path, "--batch-size", "8", *flags)
    subprocess.run([sys.executable, *script, *flags], cwd=HERE, check=True, timeout=200)
    [folder] = tmp_path.glob("demo/*/*/seed0")
    assert len(log_of(folder)) == 2 and (folder / "samples.png").exists()
    assert config_of(folder)["ranks"] == 2
    score(data, tmp_path / "results", "--run", str(folder))
    if "--refine" not in flags:
        kill = ("import os, sys, pretrain\nif os.environ['RANK'] == '1':\n"
                "    pretrain.DINO.after_step = lambda *args: os.kill(os.getpid(), 9)\n"
                "pretrain.main(sys.argv[1:])\n")
        (tmp_path / "kill.py").write_text(kill)
        flags[flags.index("--out") + 1] = str(tmp_path / "killed")
        end = subprocess.run([sys.executable, *script[:-1], tmp_path / "kill.py", *flags], cwd=HERE,
                             env=os.environ | dict(PYTHONPATH=str(HERE)), timeout=200)
        assert end.returncode == 1 and not list(tmp_path.glob("killed/demo/*/*/*/samples.png"))


def test_protocols_train_what_they_say(data, copied_run, tmp_path):
    source = weights_of(copied_run)
    of_run = ["--run", str(copied_run), "--protocol"]

    def changed(folder):
        return {name.split(".")[0] for name in differing(weights_of(folder), source)}

    frozen, folder = tune(data, tmp_path, *of_run, "frozen", "--labels", "0.1")
    assert changed(folder) == {"up1", "up2", "up3", "head"} and folder.name == "frozen-l0.1-e1"
    assert (frozen["n_labels_train"], frozen["n_labels_val"]) == (6, 2)
    tuned, folder = tune(data, tmp_path, *of_run, "finetune", "--labels", "3")
    assert config_of(folder)["settings"]["decoder"] == "pretrained"
    assert tuned["n_labels_train"] == tuned["labels"] == 3 and "encoder" in changed(folder)
    _, other = tune(data, tmp_path, *of_run, "finetune", "--labels", "3", "--seed", "5")
    assert other.name == folder.name + "-seed5"         # other labels
    scratch, _ = tune(data, tmp_path, *ON_DEMO, "--protocol", "supervised")
    about = dict(method="supervised", n_labels_train=64, n_labels_val=16, budget_steps=5)
    assert about.items() <= scratch.items()
    assert frozen["budget_steps"] == tuned["budget_steps"] == 5     # few labels, same steps
    path, result = score(data, tmp_path, "--run", str(folder))      # of the tuned network
    assert result["iou_global"] == tuned["iou_global"] and result["n_labels_train"] == 3
    assert path.parts[-3] == "medsass-e2-finetune-l3-e1" and path.name == "transfer.json"
    for protocol in ("finetune", "semi"):
        more = ["--run", str(folder), "--protocol", protocol]
        refused(lambda more=more: score(data, tmp_path, *more), folder, "has seen labels")
    other = tmp_path / "other"
    prepare_data.main(["--dataset", "demo", "--size", "32", "--out", str(other), "--seed", "3"])
    refused(lambda: score(other, tmp_path, "--run", str(folder)), "another preparation of demo")


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


def test_semi_resumes_and_reads_no_other_label(data, copied_run, tmp_path):
    blind = Path(shutil.copytree(data, tmp_path / "blind"))
    masks = np.load(blind / "demo/train_masks.npy")
    names = prepare_data.read_names(data / "demo", "train")
    rows = finetune_eval.labelled_rows(names, range(64), 2 / 64, 0)
    masks[~np.isin(range(64), rows)] = 1
    np.save(blind / "demo/train_masks.npy", masks)
    flags = ["--protocol", "semi", "--labels", "2", "--run", str(copied_run)]
    whole, folder = tune(data, tmp_path / "whole", *flags, epochs=4)
    kept = weights_of(folder)
    shutil.rmtree(folder)
    more = ["--data", str(blind), "--out", str(tmp_path / "cut"), "--epochs", "4", "--workers", "0",
            "--device", "cpu"]
    killed("finetune_eval", [*flags, *more])
    path, cut = score(blind, tmp_path / "cut", *flags, "--epochs", "4", "--workers", "0")
    assert not differing(kept, weights_of(folder)) and cut["weight"] == whole["weight"]


def fake_result(out, variant, seed, quality, protocol="transfer", dataset="isic", data="x", **more):
    """Write a result with its CSV, of 20 images in which a fraction `quality` of the foreground is
    found; return its IoU."""
    names = [dict(name=f"i{k}", group="") for k in range(20)]
    target = np.random.default_rng(1).random((20, 16, 16)) < .3
    pred = target & (np.random.default_rng(seed).random((20, 16, 16)) < quality)
    counts = finetune_eval.count_pixels(pred, target)
    row = "raw_threshold" if protocol == "reference" else ""
    block = finetune_eval.summarise(counts, finetune_eval.groups_of(names))
    result = dict(dataset=dataset, backbone="resnet50", data=data, variant=variant, seed=seed,
                  protocol=protocol, labels=0.0, n_test=20, n_labels_train=0, n_labels_val=0,
                  img_size=224, name=protocol, command=f"python {variant}")
    result |= ({row: block} if row else block) | more
    path = out / dataset / data / variant / f"seed{seed}" / f"{protocol}.json"
    prepare_data.write_json(path, result)
    prepare_data.write_csv(path.with_suffix(".csv"), finetune_eval.image_rows(row, counts, names))
    return block["iou_global"]


def test_report_shows_what_is_there_and_names_what_is_not(tmp_path, capsys, monkeypatch):
    out = tmp_path / "results"
    iou = [fake_result(out, "medsass", seed, .8) for seed in range(3)]
    fake_result(out, "byol", 0, .5)
    raw = fake_result(out, "reference", 0, .5, "reference")
    trained = dict(n_labels_train=20, n_labels_val=4, budget_steps=9, labels=.1)
    fake_result(out, "supervised", 0, .9, "supervised", **trained)
    fine = fake_result(out, "medsass", 0, .85, "finetune", **trained)
    for seed in (0, 1):                                         # prepared twice: never pooled
        fake_result(out, "medsass-e9", seed, .6, dataset="é ü", data=f"{seed}abcdefgh")
    bad = {"broken.json": "{", "foreign.json": '{"a": [1]}', "list.json": "[3]"}
    for name, text in bad.items():
        (out / name).write_text(text)
    shutil.copytree(out / "isic/x/medsass/seed1", out / "copy")
    (out / "copy/transfer.csv").unlink()
    finetune_eval.main(["--report", "--out", str(out)])
    text = (out / "README.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "9 rows, 4 warnings" in printed
    for name in (*bad, "copy/transfer.json"):
        assert name in text and name in printed
    section = text[text.index("## isic"):text.index("## é ü")]
    lines = {line.split(" | ")[0]: line for line in section.splitlines()}
    mean = f"{np.mean(iou):.4f} ± {np.std(iou, ddof=1):.4f} (3)"
    assert f"| medsass: transfer | 0 | {mean} |" in lines["| medsass: transfer"]
    assert lines["| medsass: transfer"].endswith("| 0.4847 |") and "≈" not in lines[
        "| medsass: transfer"]
    assert "vs raw_threshold" in text and "≈" in lines["| byol: transfer"].split(" | ")[4]
    tuned = lines["| medsass: finetune"].split(" | ")
    assert tuned[1] == "20 + 4" and tuned[5].startswith("-0.0")     # against supervised
    assert float(tuned[4].split()[0]) == pytest.approx(fine - raw, abs=1e-4)
    for seed in "01":
        section = text[text.index(f"## é ü ({seed}abcdefg)"):]
        assert re.match(r".*?\| medsass-e9: transfer \| 0 \| [.\d]+ \(1\) \|", section, re.DOTALL)
    assert "![isic](isic.png)" in text and Image.open(out / "isic.png").size[0] > 400
    assert text.count("python byol\n") == text.count("python medsass\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    finetune_eval.main(["--report", "--out", str(out)])
    assert ".png" not in (out / "README.md").read_text(encoding="utf-8")
    assert "matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("path", [
    HERE / "models.py", HERE / "losses.py", *HERE.glob("baselines/*.py")])
def test_files_that_are_copied_import_nothing_of_ours(path):
    imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
    assert not {"baselines", *[script.stem for script in HERE.glob("*.py")]} & {*imported}


def test_readme_snippets_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE / "baselines")
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save("image.png")
    for code in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL):
        for old, new in (("runs/demo/resnet50/medsass-e16/seed0", str(run)),
                         ("(64, 64)", "(32, 32)"), ("(32, 3, 64, 64)", "(4, 3, 32, 32)"),
                         ("img_size=64", "img_size=32"), ("(16)", "(2)")):
            code = code.replace(old, new)
        exec(code, {})
    assert Path("encoder.pth").exists()

# ================================================================================== files and masks
# A file is read as a viewer shows it or refused with its path; a mask means what its values say; no
# picture or patient is in two parts, and nothing is left out without a word.

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


@pytest.mark.parametrize("orientation, dtype, name", [
    (6, "u1", "a.png"), (5, "u1", "a.webp"), (7, "u1", "a.tif"), (2, "u2", "b.tif"),
    (8, "u4", "c.tif")])                                        # read in different ways
def test_orientations_are_undone(orientation, dtype, name, tmp_path):
    image = Image.effect_noise((40, 28), 90).convert("RGB")     # fills 0 to 255: not stretched
    exif = image.getexif()
    exif[274] = orientation
    expected = ImageOps.exif_transpose(image)
    if name.endswith("tif"):
        tifffile.imwrite(tmp_path / name, np.asarray(image).astype(dtype), metadata=None,
                         photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    else:
        image.save(tmp_path / name, exif=exif, lossless=True)
    assert np.array_equal(prepare_data.read_image(tmp_path / name), expected)


GRAY = dict(photometric="minisblack")
TIFFS = {                                                       # {kind: (type, how it is stored)}
    "8 bits, tiles": ("u1", GRAY | dict(tile=(16, 16))),
    "16 bits, big-endian": ("u2", GRAY | dict(byteorder=">")),
    "16 bits, predictor": ("u2", GRAY | dict(compression="zlib", predictor=True)),
    "float, multiple strips": ("f4", GRAY | dict(rowsperstrip=7)),
    "float, big-endian": ("f4", GRAY | dict(byteorder=">")),
    "double, BigTIFF": ("f8", GRAY | dict(bigtiff=True)),
    "signed bytes": ("i1", GRAY),
    "signed, 64 bits": ("i8", GRAY),
    "32 bits": ("u4", GRAY),
    "alpha": ("u2", GRAY | dict(planarconfig="contig", extrasamples=["unassalpha"])),
    "white is zero": ("u2", dict(photometric="miniswhite")),
    "white is zero, bytes": ("u1", dict(photometric="miniswhite")),
    "rgb, 16 bits": ("u2", dict(photometric="rgb", planarconfig="contig")),
    "rgb, planes": ("u1", dict(photometric="rgb", planarconfig="separate"))}


@pytest.mark.parametrize("kind", TIFFS)
def test_tiffs_are_read_rightly_or_refused(kind, tmp_path, monkeypatch):
    dtype, how = TIFFS[kind]
    gray = (spot(48, 64)[0] // 2).astype(dtype)
    shown = np.dstack([gray, gray // 2, gray[::-1]]) if "rgb" in kind else gray
    stored = shown
    if "white" in kind:
        stored = ~gray
    elif kind == "alpha":
        stored = np.dstack([gray, gray])
    elif kind == "rgb, planes":
        stored = np.moveaxis(shown, -1, 0)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored, metadata=None, **how)
    found = prepare_data.read_image(path)
    assert np.array_equal(found, prepare_data.to_rgb(prepare_data.Picture(shown)))
    monkeypatch.setitem(sys.modules, "tifffile", None)          # as if it were not installed
    try:
        assert np.array_equal(prepare_data.read_image(path), found)
    except ValueError as error:
        assert "pip install tifffile" in str(error)


@pytest.mark.parametrize("channels", [2, 5])
def test_tiffs_of_other_channels_are_refused(channels, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((9, 9, channels), "u2"), metadata=None,
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
    ds.save_as(tmp_path / "a.dcm")
    values = ds.pixel_array * float(slope) - 100
    expected = (((values - (centre - .5)) / (width - 1) + .5) * 255).clip(0, 255)
    if photometric == "MONOCHROME1":
        expected = 255 - expected
    found = prepare_data.read_image(tmp_path / "a.dcm")[..., 0]
    assert np.abs(found - expected).max() <= .5 + 1e-6


def test_dicom_frames_and_palettes(monkeypatch):
    path = dicom("SC_rgb_rle_2frame.dcm")
    frames = pydicom.dcmread(path).pixel_array
    assert np.array_equal(prepare_data.read_image(path, 1), frames[1])
    unreadable(path, "page 9", page=9)
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


disc = cv2.circle(np.zeros((48, 64), np.uint8), (30, 22), 12, 1, -1)
halves = np.where(np.arange(48)[:, None] < 20, disc, disc * 3)  # two classes, 1 above 3
ringed = np.where(cv2.dilate(disc, np.ones((9, 9))) > disc, 255, disc)      # an ignored border
blurred = cv2.GaussianBlur(disc * 255, (0, 0), .8)
soft = np.where(disc > 0, np.maximum(blurred, 128), np.minimum(blurred, 127)).astype(np.uint8)
grid = np.arange(256, dtype=np.uint16).reshape(16, 16).repeat(3, 0).repeat(4, 1)
white = np.full((48, 64, 3), 255, np.uint8)
red = np.dstack([disc * 255, disc * 0, disc * 0])
classes = red + np.dstack([disc * 0, disc * 0, (halves == 3) * np.uint8(255)])
jpg = cv2.imdecode(cv2.imencode(".jpg", disc * 255, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], 0)
MASKS = {                                                       # {kind: (values, foreground)}
    "bool": (disc > 0, disc), "0 and 1": (disc, disc), "0 and 255": (disc * 255, disc),
    "16 bits": (disc * np.uint16(65535), disc), "two floats": (disc * np.float32(.4), disc),
    "past 2 ** 31": (disc * np.uint32(2 ** 31 + 5), disc), "1 and 2": (disc + 1, disc),
    "gray as RGB": (np.dstack([disc * 255] * 3), disc), "one colour": (red, disc),
    "colour on white": (np.where(red.any(2, keepdims=True), red, white), disc),
    "black on colour": (np.where(disc[..., None] > 0, 0, white * [[[1, 0, 0]]]).astype(np.uint8),
                        1 - disc),
    "alpha channel": (np.dstack([white, disc * 255]), disc),
    "empty alpha channel": (np.dstack([white, disc * 0]), disc * 0),
    "empty": (disc * 0, disc * 0), "full": (disc * 0 + 255, disc * 0 + 1),
    "soft edges": (soft, disc), "probabilities": (soft / np.float32(255), disc),
    "jpg": (jpg, jpg > 127)}
UNCLEAR = {                                                     # {kind: (values, flag to give)}
    "0, 1, 3": (halves, "'>0'"), "0, 85, 255": (halves * 85, "'>127'"),
    "0, 1, 255": (ringed, "1 or 1,2 .*ignore value"), "0, 1, 2, 3, 4, ...": (grid, "'>0'"),
    "-1, 0": (disc.astype(np.int32) - 1, "a list"), "#000000, #ff0000, #ff00ff":
    (classes, "'#ff0000'"), "0, 40": (np.minimum(soft, 60), "'>127'")}


def foreground(values, folder, rule="auto"):
    """The foreground of a mask file that holds these values."""
    path = folder / "mask.tif"
    if values.dtype == bool:                                    # which tifffile inverts
        save_image(path, values)
    else:
        photometric = "rgb" if values.ndim == 3 else "minisblack"
        tifffile.imwrite(path, values, photometric=photometric, metadata=None)
    return prepare_data.find_foreground(path, rule)[0]


@pytest.mark.parametrize("kind", MASKS)
def test_masks_mean_what_each_file_says(kind, tmp_path):
    values, expected = MASKS[kind]
    found = foreground(values, tmp_path)
    assert found.dtype == bool and np.array_equal(found, expected > 0)


@pytest.mark.parametrize("shown", UNCLEAR)
def test_masks_of_several_meanings_are_refused(shown, tmp_path):
    values, flag = UNCLEAR[shown]
    shown = re.escape(shown).replace("0,\\ 40", "0,.*")
    with pytest.raises(ValueError, match=f"mask.tif: .*{shown}.*--mask-foreground .*{flag}"):
        foreground(values, tmp_path)


@pytest.mark.parametrize("rule, values, expected", [
    (">0", halves, disc), (">2", halves, halves == 3), ("<1", halves, 1 - disc),
    ("1", halves, halves == 1), ("1,3", halves, disc), ("1", ringed, disc),
    (">127", disc > 0, disc), ("<128", disc * 255, 1 - disc), (">0.5", soft / 255., disc),
    ("#ff0000", classes, halves == 1), ("#ff0000,#ff00ff", classes, disc),
    ("#FFFFFF", disc * 255, disc), (">127", classes, disc)])
def test_mask_foreground_by_flag(rule, values, expected, tmp_path):
    assert np.array_equal(foreground(np.asarray(values), tmp_path, rule), expected > 0)


def test_palettes_are_class_numbers_or_grays(tmp_path):
    for palette, expected in (([0, 0, 0, 128, 0, 0], disc), ([0, 0, 0, 9, 9, 9], disc * 9)):
        image = Image.fromarray(disc, "P")
        image.putpalette(palette)
        image.save(tmp_path / "a.png")
        values, is_colour = prepare_data.read_mask(tmp_path / "a.png")
        assert not is_colour and np.array_equal(values, expected)


def test_equal_complaints_are_counted(raw, capsys):
    for path in (raw / "masks").iterdir():
        save_image(path, ringed[:40, :40])
    refuse(raw, "12 bad file(s)", "nothing was written")
    lines = capsys.readouterr().err.splitlines()
    assert sum("values 0, 1, 255" in line for line in lines) == 5 and "and 7 like these" in lines
    prepare_beside(raw, "--mask-foreground", "1")
    assert "12 masks: 1;" in capsys.readouterr().out
    refused(lambda: prepare_beside(raw, "--mask-foreground", "#ffffff,1"), "list")
    refused(lambda: prepare_beside(raw, "--mask-foreground", "7"), "--mask-foreground 7")
    refused(lambda: prepare_beside(raw, "--mask-foreground", "half"), "'>127'")


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
    "parts, all below": ("set/images/{t}/{k}.png", "set/masks/{t}/{k}.png"),
    "all called so": ("{k}_seg.png",),
    "none": ("{k}.png",),
    "names": ("images/ä, b.{k} .png", "masks/ä, b.{k} .png"),
    "several masks": ("benign ({k}).png", "benign ({k})_mask.png", "benign ({k})_mask_1.png")}
UNCLEAR_LAYOUTS = {                                             # {reason: (names, more of it)}
    "has two masks": (("images/{k}.png", "masks/{k}.png", "labels/{k}.png"),
                      "labels/t", "masks/t"),
    "manual1": (("images/{k}.png", "manual1/{k}.png", "mask/{k}_mask.png"), "has two masks"),
    "no mask has the name of": (("images/{k}.png", "masks/other{k}.png"), "masks/other"),
    "seg_test_00000.png: a mask by its name": (("images/{k}.png", "images/seg_{k}.png"),),
    "mask.png: a mask by its name": (("{k}/image.png", "{k}/mask.png"),),
    "class0, class1": (("class{c}/{k}.png",), "'^([^/]+)/'", "'.+'")}
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
    for name in ("images/a.nii.gz", "images/B.GIF", "masks/extra.png", ".hidden.png"):
        shutil.copy(raw / "masks/p0_00.png", raw / name)
    shutil.copytree(raw, raw / "__MACOSX")
    (raw / "images/again").symlink_to(raw)                      # a circle
    prepare_data.main(["--dataset", "demo", "--size", "16", "--out", str(raw / "images")])
    (raw / "labels.csv").write_text("name,label\np0_00,a\nnobody,b\n")
    assert len(prepared(prepare_beside(raw))) == 12
    said = capsys.readouterr().out
    for words in ("1 masks have no image", "extra.png", "volumes", "'.gz': 1", "'.gif': 1",
                  "nobody", "11 of 12 images have no label", "12 images, 12 of them with masks"):
        assert words in said


def test_of_several_pages_one_is_taken_and_it_is_said(tmp_path, capsys):
    written = write_layout(tmp_path / "raw", "{k}.tif", "{k}_mask.png")
    make_stacks((tmp_path / "raw").glob("*.tif"))
    assert [*as_written(prepare_beside(tmp_path / "raw", "--page", "1"), written)]
    assert "12 images are of several pages" in capsys.readouterr().out
    unreadable(tmp_path / "raw/val_00000.tif", "page 2", 2)


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


def test_thin_and_empty_masks(raw, capsys):
    line = np.zeros((40, 40), np.uint8)
    line[:, 20] = 255                                           # .8 wide at 32 px
    for i, path in enumerate((raw / "masks").iterdir()):
        save_image(path, line if i % 4 else line * 0)
    masks = [mask for *_, mask in prepared(prepare_beside(raw))]
    assert np.array_equal(np.sum(masks, axis=(0, 1)), np.eye(1, 32, 16)[0] * 9 * 32)
    assert "3 of 12 are empty" in capsys.readouterr().out


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
    save_image(raw / "masks/p1_04.png", np.zeros((9, 9), np.uint8))
    refuse(raw, "5 bad file(s)", "--skip-bad")
    lines = capsys.readouterr().err
    for line in ("images/p0_00.png: .*empty", "images/p0_01.png: ", "p0_02.png: .*not an image",
                 "masks/p1_04.png: .*9, 9", "p3_11.png: .*twice"):
        assert re.search(line, lines), line
    out = prepare_beside(raw, "--skip-bad")
    assert len(prepared(out)) == 12 - 4
    assert len(prepare_data.read_meta(out)["skipped"]) == 5


def test_images_without_masks_join_the_training_part(tmp_path, capsys):
    raw = write_folder(tmp_path / "in/raw", n=36, size=32)     # twelve patients
    bare = [0, 4, 8, 9, 10, 11, 20, 35]
    for i in bare:
        next(raw.glob(f"masks/*_{i:02d}.png")).unlink()
    out = prepare(raw, tmp_path)
    assert "8 images without a mask join the part train" in capsys.readouterr().out
    masks = [np.load(out / f"{part}_masks.npy") for part in prepare_data.PARTS]
    assert [len(part) for part in masks] == [19, 3, 6]  # cut at int(19.6) and int(22.4)
    names = [row["name"] for row in prepare_data.read_names(out, "train")]
    assert names == sorted(names[:19]) + sorted(names[19:]) and len(names) == 19 + 8
    for name, mask in zip(names, masks[0], strict=False):
        assert np.array_equal(mask, cv2.imread(raw / f"masks/{name}.png", 0) > 0)
    assert not any((raw / f"masks/{name}.png").exists() for name in names[19:])
    held_out = [prepare_data.read_names(out, part) for part in ("val", "test")]
    for i in bare:
        next(raw.glob(f"images/*_{i:02d}.png")).unlink()
    out = prepare(raw, tmp_path, "--overwrite")                 # the others' parts stay the same
    assert held_out == [prepare_data.read_names(out, part) for part in ("val", "test")]


def test_images_without_masks_are_left_out_beside_val_and_test(tmp_path, capsys):
    raw = write_folder(tmp_path / "in/raw", n=36, size=32)
    for i in (0, 4, 8, 9, 10, 11, 20, 35):
        next(raw.glob(f"masks/*_{i:02d}.png")).unlink()
    out = prepare(raw, tmp_path, "--group-regex", "^([^_]+)_")
    rows = [prepare_data.read_names(out, part) for part in prepare_data.PARTS]
    groups = [{row["group"] for row in part} for part in rows]
    assert len(set.union(*groups)) == sum(map(len, groups))
    left_out = re.search(r"(\d+) images without a mask are left out", capsys.readouterr().out)
    counts = prepare_data.read_meta(out)["counts"]
    assert left_out and sum(counts.values()) == 36 - int(left_out[1])
    prepare_data.check(out)


def test_given_val_and_test_parts_need_all_their_masks(tmp_path, capsys):
    for part, n in zip(prepare_data.PARTS, (12, 13, 14), strict=True):
        write_folder(tmp_path / "in/raw" / part, n=n)
    (tmp_path / "in/raw/train/masks/p0_00.png").unlink()
    out = prepare_beside(tmp_path / "in/raw")
    assert len(np.load(out / "train_masks.npy")) == 11 == len(np.load(out / "train_images.npy")) - 1
    assert "in another part" not in capsys.readouterr().out     # equal names are no leak
    shutil.rmtree(out.parent)
    (tmp_path / "in/raw/val/masks/p0_00.png").unlink()
    refuse(tmp_path / "in/raw", "1 bad file(s)")


def test_a_killed_process_leaves_nothing_for_long(raw):
    out = prepare_beside(raw)
    place = out.parent
    (place / ".77.tmp").mkdir()
    (place / ".78.tmp").write_text("of a process that is at work")
    os.utime(place / ".77.tmp", (0, time.time() - 90000))
    out.rename(place / ".raw.old")                              # killed between two renames
    refused(lambda: prepare(raw, place), "already there")
    assert {*os.listdir(place)} == {"raw", ".78.tmp"}
    prepare_data.check(out)


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/a.txt"

    with prepare_data.new_file(path) as file:
        file.write(b"whole")
    with pytest.raises(OSError, match=str(path)), prepare_data.new_file(path) as file:
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")
    assert path.read_text() == "whole" and os.listdir(path.parent) == ["a.txt"]


def test_tables_and_arrays_are_read_back_as_written(tmp_path):
    prepare_data.write_csv(tmp_path / "a.csv", [dict(a="1"), dict(a="ä,b", b="")])
    assert prepare_data.read_csv(tmp_path / "a.csv") == [dict(a="1", b=""), dict(a="ä,b", b="")]
    arrays = rng.integers(0, 2, (5, 3, 4)).astype(bool)
    prepare_data.write_npy(tmp_path / "a.npy", iter(arrays), arrays.shape)
    found = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert found.dtype == np.uint8 and np.array_equal(found, arrays)
    assert prepare_data.read_json(tmp_path / "absent.json") == {}
    (tmp_path / "bad.json").write_text("{")
    refused(lambda: prepare_data.read_json(tmp_path / "bad.json"), "bad.json")


def test_threads_keep_the_order_and_are_given_a_slice_at_a_time():
    begun = []
    results = prepare_data.map_threads(lambda k: begun.append(k) or k * k, range(1000))
    assert next(results) == 0 and len(begun) <= 256
    assert list(results) == [k * k for k in range(1, 1000)]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_in_one_line(end, tmp_path):
    raw = write_folder(tmp_path / "raw", n=1, size=2000)
    for k in range(200):
        os.link(raw / "images/p0_00.png", raw / f"images/{k}.png")
    script = [sys.executable, HERE / "prepare_data.py", "--dataset", "folder", "--raw", raw,
              "--out", tmp_path / "out"]
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("out/.*.tmp/scratch")):
        time.sleep(.01)
    process.send_signal(end)
    said = process.communicate()[1]
    assert process.returncode == 1 and "interrupted" in said or "SIGTERM" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("dataset, moves", [
    ("drone", {"original_images": "training_set/images",        # as its own page has it
               "label_images_semantic": "training_set/gt/semantic/label_images"}),
    ("drone", {"label_images_semantic": "RGB_color_image_masks"}),
    ("dm", {"Labels": "CD27 cell labels/Mask Labels",           # as the authors' notebook has them
            "CD27 cell labels": "Labels/CD27 cell labels",
            "CD27_Panel_Component": "CD27 Panel-- Component"})])
def test_published_layouts_by_their_other_names(dataset, moves, published, tmp_path):
    raw, _, out = published(dataset)
    raw = shutil.copytree(raw, tmp_path / "raw")
    for source, target in moves.items():
        (raw / target).parent.mkdir(parents=True, exist_ok=True)
        (raw / source).rename(raw / target)
    for path in raw.rglob("*mask_labels.tiff"):
        path.rename(str(path).replace("mask_labels.tiff", "data.tifMask.tif"))
    assert_same_set(raw, out)


def part_sizes(pairs, stratified):
    """The sizes of the parts into which the pairs are split."""
    prepare_data.join_duplicates(pairs)
    prepare_data.split_pairs(pairs, seed=3, stratified=stratified)
    parts = [pair.part for pair in pairs]
    return [parts.count(part) for part in prepare_data.PARTS]


def test_published_splits_at_their_full_size():
    pairs = []
    for label, n in zip(LUNGS, (3616, 6012, 10192, 1345), strict=True):
        for i in range(n):                          # the same ten pictures in each class
            name, digest = f"{label}{i}", str(i) if i < 10 else ""
            pairs.append(prepare_data.Pair(name, name, label=label, digest=digest))
    assert part_sizes(pairs, True) == [14730, 2202, 4233]
    assert len({(pair.digest, pair.part) for pair in pairs if pair.digest}) == 10
    tested = [pair.label for pair in pairs if pair.part == "test"]
    assert abs(tested.count("COVID") - .2 * 3616) < 9
    tiles = [prepare_data.Pair(f"{i}", f"{i // 12}", group=f"{i // 12}") for i in range(198 * 12)]
    assert part_sizes(tiles, False) == [1656, 240, 480]


def test_archives_are_unpacked_once(published, tmp_path):
    raw, _, out = published("isic")
    raw = shutil.copytree(raw, tmp_path / "raw")
    for path in sorted(raw.glob("*[ah]")):
        shutil.make_archive(path, "zip", raw, path.name)
        shutil.rmtree(path)
    assert_same_set(raw, out)
    for path in raw.glob("*.zip"):
        path.write_bytes(b"never read again")
    assert_same_set(raw, out)
    shutil.rmtree(raw / "ISIC-2017_Training_Data")
    refused(lambda: assert_same_set(raw, out), "ISIC-2017_Training_Data.zip", "get it again")
    (raw / "ISIC-2017_Training_Data.zip").unlink()
    refused(lambda: assert_same_set(raw, out), "not enough")
    prepare_data.check(raw.parent / "again/isic")               # what was there stays


def test_zip_cannot_escape(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    with zipfile.ZipFile(raw / "b.zip", "w") as file:
        file.writestr("../../evil", "x")
        file.writestr("/tmp/evil", "x")
    prepare_data.unpack(raw / "b.zip")
    assert os.listdir(tmp_path) == ["raw"] and {*os.listdir(raw)} == {"b", "b.zip"}
    (raw / "c.zip").write_bytes(b"no archive")
    refused(lambda: prepare_data.unpack(raw / "c.zip"), "c.zip: cannot be extracted")
    assert {*os.listdir(raw)} == {"b", "b.zip", "c.zip"}


def test_check_finds_the_same_picture_or_group_in_two_parts_and_wrong_tables(data, tmp_path):
    demo = shutil.copytree(data / "demo", tmp_path / "demo")
    np.load(demo / "test_images.npy", mmap_mode="r+")[3] = np.load(demo / "train_images.npy")[5]
    for part in ("train", "test"):
        table = demo / f"{part}.csv"
        table.write_text(table.read_text().replace("_007,", "_007,patient"))
    (demo / "val.csv").write_text("name,group,label\n")
    flags = ["--dataset", "demo", "--out", str(tmp_path), "--check"]
    refused(lambda: prepare_data.main(flags), "val.csv has 0 rows", "fingerprint",
            "same picture in two parts: train_005 of train and test_003 of test",
            "same group in two parts: train_007 of train and test_007 of test")


def test_download_goes_on_where_it_stopped(tmp_path, monkeypatch):
    (tmp_path / "source.zip").write_bytes(b"0123456789")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/source.zip.part").write_bytes(b"cut")
    args = argparse.Namespace(dataset="dsb2018", raw=str(tmp_path / "raw"))
    info = prepare_data.DATASET_INFO["dsb2018"]
    monkeypatch.setattr(info, "files", [f"file://{tmp_path}/source.zip"])
    prepare_data.fetch(args)
    assert (tmp_path / "raw/source.zip").read_bytes() == b"cut3456789"
    monkeypatch.setattr(info, "files", [f"file://{tmp_path}/gone.zip"])
    refused(lambda: prepare_data.fetch(args), f"{tmp_path}/gone.zip")
    assert os.listdir(tmp_path / "raw") == ["source.zip"]


# ========================================================================================= mistakes
# Each is said in one line, with a path or a flag, an exit code that is not 0, and nothing left
# behind.

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
    (prepare_data, "--dataset folder --raw /", "--raw / has no name: give --name"),
    (prepare_data, BAD + "few --mask-foreground nonzero", "'>127', '<128', or a list"),
    (prepare_data, BAD + "few --check", "few is not prepared: run python prepare_data.py"),
    (pretrain, TRAIN + "isic", "{data}/isic is not prepared: run python prepare_data.py"),
    (pretrain, TRAIN + "demo --device cuda:99", "cuda:99"),
    (pretrain, TRAIN + "demo --encoder {bad}/absent", "{bad}/absent: no such file"),
    (pretrain, TRAIN + "demo --method byol --batch-size 1", "at least 2 images"),
    (pretrain, TRAIN + "demo --method simsiam --batch-size 1", "at least 2 images"),
    (pretrain, TRAIN + "demo --method byol --backbone vit_small", "not for vit_small"),
    (pretrain, TRAIN + "demo --method simsiam --backbone vit_small", "not for vit_small"),
    (pretrain, TRAIN + "demo --method mae", "not resnet50"),
    (pretrain, TRAIN + "demo --method simmim", "not resnet50"),
    (pretrain, TRAIN + "demo --method dino --amp fp16", "not for dino, whose loss becomes nan"),
    (pretrain, TRAIN + "demo --refine --threshold ght", "2"),
    (pretrain, TRAIN + "demo --epochs 0", "2"),
    (pretrain, "--data {bad}/odd --dataset demo --backbone vit_small", "multiple of 16, not 40"),
    (finetune_eval, "--run {run} --data {bad}/prepared --dataset bare", "no test masks"),
    (finetune_eval, "--run {bad}/absent", "{bad}/absent is not a run folder"),
    (finetune_eval, "--run {run} --predict {bad}/absent", "{bad}/absent: no such folder"),
    (finetune_eval, ON + "--encoder {bad}/absent", "{bad}/absent"),
    (finetune_eval, ON + "--protocol classify --encoder {run}/encoder.pth", "at least two labels"),
    (finetune_eval, ON + "--protocol semi --encoder {run}/encoder.pth", "a whole U-Net, and {run}"),
    (finetune_eval, ON + "--protocol supervised --labels 65", "64 training"),
    (finetune_eval, ON + "--protocol supervised --labels 1.5", "2"),
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


def test_a_run_with_other_settings_is_refused(data, copied_run, tmp_path):
    config = config_of(copied_run)
    config["settings"]["lr"] = .5
    (copied_run / "config.json").write_text(json.dumps(config))
    refused(lambda: train(data, tmp_path), copied_run, "lr (0.5 there, 0.00036 asked)")
    torch.save(dict(finished=False), copied_run / "last.pt")
    refused(lambda: score(data, tmp_path, "--run", str(copied_run)), copied_run, "not finished")
    (copied_run / "config.json").write_text("{")
    refused(lambda: train(data, tmp_path), copied_run / "config.json", "cannot be read")
    (copied_run / "config.json").unlink()
    refused(lambda: train(data, tmp_path), copied_run, "no config.json")
    assert (copied_run / "best.pt").exists()


def test_data_prepared_again_end_the_run(data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    meta = tmp_path / "data/demo/meta.json"

    def prepare_again(self, step, total):
        if step == 5:
            meta.write_text(meta.read_text().replace('"fingerprint": "', '"fingerprint": "0'))

    monkeypatch.setattr(pretrain.MedSASS, "after_step", prepare_again)
    refused(lambda: train(tmp_path / "data", tmp_path), "data/demo was prepared again")
    [path] = tmp_path.glob("demo/*/*/*/last.pt")
    assert load(path)["epoch"] == 1


def test_a_copied_run_is_what_its_config_says(data, run, tmp_path):
    network = tmp_path / "Downloads/network"
    network.mkdir(parents=True)
    for name in ("config.json", "best.pt"):
        shutil.copy(run / name, network)
    path, _ = score(data, tmp_path / "out", "--run", str(network))
    assert path.parts[-5:] == ("demo", "resnet50", "medsass-e2", "seed0", "transfer.json")


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "bce", lambda logits, target: logits.sum() * math.nan)
    refused(lambda: train(data, tmp_path, "--loss", "bce"), "step 1: the loss is not finite")


@pytest.mark.parametrize("error, flag", [
    (RuntimeError("unable to allocate shared memory(shm) for file"), "--workers 0"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--batch-size"),
    (OSError(28, "No space left on device", "x.npy"), "x.npy"),
    (KeyboardInterrupt(), "interrupted")])
def test_errors_of_the_system_are_said_in_one_line(error, flag):
    def main():
        raise error

    refused(lambda: prepare_data.run_script(main, "advice"), flag)


def test_predict_replaces_nothing_and_names_bad_files(predict, run, tmp_path):
    predict("out", "--tile")
    image = prepare_data.read_image(tmp_path / "in/dé.tif")
    expected = finetune_eval.predict_tiled(load_unet(run), image, 32, 32, "cpu")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/dé.png")) > 0, expected)
    refused(lambda: predict("out"), tmp_path / "out", "--overwrite")
    refused(lambda: predict("in/out", "--overwrite"), tmp_path / "in/out", "another --out")
    refused(lambda: predict("other", "--page", "1"), "page 1, counted from 0")
    (tmp_path / "in/bad.png").write_text("text")
    (tmp_path / "out/c.png").unlink()
    refused(lambda: predict("out", "--overwrite"), tmp_path / "in/bad.png", "not an image")
    assert not (tmp_path / "out/bad.png").exists() and (tmp_path / "out/c.png").exists()


def test_flags_that_are_not_used_are_named_and_ignored(data, run, tmp_path, capsys):
    path, _ = score(data, tmp_path, "--run", str(run), "--epochs", "7", "--overlay")
    out = capsys.readouterr().out
    assert "ignored: --epochs" in out and "ignored: --overlay" in out
    assert path.name == "transfer.json"


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
    everything = dry_run(tmp_path, "all")
    assert len({run.splitlines()[0] for run in everything}) == len(everything)
    shards = [dry_run(tmp_path, "all", SHARD=shard) for shard in ("1/3", "02/3", "3/3")]
    assert all(shards) and sorted(sum(shards, [])) == sorted(everything)
    assert run_all(tmp_path, "all", SHARD="4/3").returncode == 1


OUTPUT_OF = """eval "$(sed -n '/^output_of()/,/^}/p' run_all.sh)"; output_of "$1" """


def output_of(command, folder=HERE):
    """Return the last file that run_all.sh expects of a command."""
    return subprocess.check_output(["bash", "-c", OUTPUT_OF, "", command], cwd=folder,
                                   text=True).strip()


def test_the_driver_knows_the_names_that_the_scripts_give(tmp_path):
    listed = dry_run(tmp_path, "all", DATASETS="a", SEEDS="50", LABELS="0.1 1.0 50")
    for run in {line.split("python ")[1] for line in "\n".join(listed).splitlines()}:
        script, *flags = run.replace("RUN", "runs/a/vit_small/mae-e3/seed5").split()
        if script == "pretrain.py":
            args, variant = pretrain.parse_args(flags)
            expected = f"runs/{args.dataset}/{args.backbone}/{variant}/seed50/samples.png"
        else:
            args, name = finetune_eval.parse_args(flags)
            expected = f"results/{args.dataset}/{args.backbone}/{args.protocol}/seed50/{name}.json"
            if args.run:
                expected = f"results/a/vit_small/mae-e3/seed5/{name}.json"
        assert output_of(" ".join([script, *flags])) == expected


@pytest.fixture
def project(tmp_path):
    """A copy of what run_all.sh needs, with stand-ins for the scripts: they write what is expected
    of them, note the call in `seen`, and fail or wait if a file says so."""
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(HERE / name, tmp_path)
    (tmp_path / "data/demo").mkdir(parents=True)
    (tmp_path / "data/demo/meta.json").write_text('{"size": 64, "seed": 0}')
    (tmp_path / "data/demo/test_masks.npy").touch()
    (tmp_path / "seen").touch()
    (tmp_path / "pretrain.py").write_text(f"""if True:
        import os, pathlib, subprocess, sys, time
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
        made.touch()""")
    shutil.copy(tmp_path / "pretrain.py", tmp_path / "finetune_eval.py")
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
    assert end.returncode == 1 and (project / failed[1]).read_text() == "reason\n"
    assert len(seen(project)) == 5                      # its evaluation is not tried
    (project / "bad").unlink()
    calls = benchmark(project)
    assert len(calls) == 7 and "--method byol" in calls[5]


def test_what_is_finished_is_skipped_unless_it_is_gone_or_older_than_its_source(project):
    assert len(benchmark(project)) == len(benchmark(project)) == 6
    shutil.rmtree(project / "runs/demo/resnet50/byol")
    assert len(benchmark(project)) == 6 + 2             # it, and its score
    time.sleep(.1)
    os.utime(project / "data/demo/meta.json")
    assert len(benchmark(project)) == 8 + 6
    (project / "data/demo/test_masks.npy").unlink()
    assert run_all(project, **SIX).returncode == 1 and len(seen(project)) == 14


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
    assert {line.split()[0] for line in benchmark(project, GPUS="3 5")[2:]} == {"3", "5"}


# ============================================================================================ bench
# Ours beside a library that people would use instead (pytest -m bench -s test_smoke.py). A row
# fails only if ours is the slower or larger one: the ratio depends on the processor.

def record(what, against, ours, theirs, is_better):
    """Print a row of the table, and check it."""
    print(f"\n| {what} | {against} | {ours:.3g} | {theirs:.3g} | {ours / theirs:.3g} |")
    assert is_better


def interleaved(*work):
    """Return the median seconds of each of the functions, called in turn, five times after one that
    does not count."""
    times = []
    for call in work * 6:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return np.median(np.reshape(times, (6, -1))[1:], axis=0)


def photograph(height, width, detail=8):
    """Return uint8 (H, W, 3), smooth and random."""
    small = rng.integers(0, 256, (height // detail, width // detail, 3), np.uint8)
    return cv2.resize(small, (width, height))


@pytest.mark.bench
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
    mine, other = interleaved(lambda: list(ours), lambda: list(theirs))
    record("input path, images/s", "lightly's BYOL transform", 160 / mine, 160 / other,
           mine < other)


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
def test_training_step():
    """ResNet-50 U-Net, 224 px, batch 8, in a process of its own, against the same network, loss and
    optimiser from segmentation_models_pytorch and torch, written plainly."""
    measured = []
    for side in ("ours", "theirs"):
        out = subprocess.check_output([sys.executable, "-c", STEP, side], cwd=HERE, text=True)
        measured.append([float(number) for number in out.split()])
    (mine, my_peak), (other, other_peak) = measured
    record("training step, s", "smp", mine, other, mine < other)
    record("training step, MB", "smp", my_peak, other_peak, my_peak < other_peak)


@pytest.mark.bench
def test_preparing_jpgs_is_faster_than_a_plain_loop(tmp_path):
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
    record("preparing jpgs, images/s", "a plain loop", 2000 / mine, 2000 / other, mine < other)
