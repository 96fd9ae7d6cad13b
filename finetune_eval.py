"""Score a network on a test set it never saw, or let it draw masks for a folder of images.

    python finetune_eval.py --run runs/demo/resnet50/medsass/seed0
    python finetune_eval.py --protocol reference --dataset demo --backbone resnet50
    python finetune_eval.py --encoder encoder.pth --dataset isic --backbone vit_small
    python finetune_eval.py --run runs/demo/resnet50/medsass/seed0 --predict my_images --out my_masks
    python finetune_eval.py --report

transfer: the pre-trained network as it is; where only an encoder was trained, that encoder in a fresh, seeded decoder
that nobody trained (section 4.1). reference: what costs nothing, on the same test images. One JSON an evaluation,
under results/; --report prints them all.
"""

import argparse
import csv
import functools
import hashlib
import json
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import prepare_data
from models import BACKBONES, build_unet, load_encoder
from pretrain import THRESHOLDS, load_checkpoint, normalise, pick_device, pseudo_mask, seed_from, write_atomically

BATCH = 16                                                      # images at a time; no score depends on it


# ------------------------------------------------------------------------------------------------ metrics (appendix G)

def count_pixels(pred, target):
    """bool (N, H, W) twice -> int64 (N, 4): true positives, false positives, false negatives, true negatives."""
    pred, target = pred.reshape(len(pred), -1), target.reshape(len(target), -1)
    return np.stack([(a & b).sum(axis=1) for a, b in ((pred, target), (pred, ~target), (~pred, target),
                                                      (~pred, ~target))], axis=1).astype(np.int64)


def scores_from_counts(counts):
    """int (..., 4) from count_pixels -> dict of float (...): iou, dice, precision, recall, accuracy, each in [0, 1].

    0 / 0 is 1 where neither mask has any foreground (nothing to find, nothing found), and 0 elsewhere.
    """
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)

    def ratio(part, whole):
        return np.where(whole > 0, part / np.maximum(whole, 1), np.where(tp + fp + fn == 0, 1.0, 0.0))

    return dict(iou=ratio(tp, tp + fp + fn), dice=ratio(2 * tp, 2 * tp + fp + fn), precision=ratio(tp, tp + fp),
                recall=ratio(tp, tp + fn), accuracy=ratio(tp + tn, tp + fp + fn + tn))


def summarise(counts):
    """int (N, 4) -> dict iou_global, iou_image, ...: counts summed over the set, and the mean over its images."""
    overall, single = scores_from_counts(counts.sum(axis=0)), scores_from_counts(counts)
    return {f"{name}_{kind}": float(np.mean(value)) for name in overall
            for kind, value in (("global", overall[name]), ("image", single[name]))}


def segmentation_scores(pred, target):
    """bool (N, H, W) twice -> dict iou, dice, precision, recall, accuracy, each "_global" (counts summed over the set)
    and "_image" (mean over images). Raises ValueError for another dtype or unequal shapes."""
    if pred.dtype != bool or target.dtype != bool or pred.shape != target.shape or pred.ndim != 3 or not len(pred):
        raise ValueError(f"two bool arrays (N, H, W) of one shape are needed, not {pred.dtype} {pred.shape} and "
                         f"{target.dtype} {target.shape}")
    return summarise(count_pixels(pred, target))


# ------------------------------------------------------------------------------------------------ networks and batches

def read_run(run):
    """The settings of a run folder (its config.json), a dict; ends the program where it is not a finished run."""
    try:
        settings = json.loads((run / "config.json").read_text())["settings"]
    except (OSError, ValueError, KeyError):
        sys.exit(f"{run} is not a run folder: it has no readable config.json (see python pretrain.py --help)")
    if not (run / "samples.png").exists():
        sys.exit(f"{run} is not finished: run its command again, it goes on where it stopped")
    return settings


def load_network(args, settings, device):
    """The U-Net to score, in eval mode, and the file its weights come from: the saved network of an end-to-end run, or
    an encoder (of a run or of --encoder) in a decoder drawn afresh from --seed."""
    torch.manual_seed(seed_from(args.seed, 1))                  # not the draw that pre-training started from
    path = Path(args.encoder or Path(args.run) / ("encoder.pth" if settings["train"] == "encoder" else "best.pt"))
    try:
        unet = build_unet(settings["backbone"], settings["img_size"])
        if settings["train"] == "encoder":
            load_encoder(unet, path)
        else:
            unet.load_state_dict(load_checkpoint(path, "cpu")["model"])
    except ValueError as error:
        sys.exit(str(error))
    return unet.to(device, memory_format=torch.channels_last).eval(), path


@torch.inference_mode()
def predict_logits(unet, images, device):
    """uint8 ndarray (B, S, S, 3) -> float32 ndarray (B, S, S): logits, foreground where > 0."""
    batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).to(device)      # channels_last as it is
    return unet(normalise(batch))[:, 0].float().cpu().numpy()


def count_test(predict, images, masks, batch=BATCH):
    """int64 (N, 4) over a mapped test set. predict: uint8 (B, S, S, 3) -> bool (B, S, S). Memory: one batch."""
    counts = []
    for start in tqdm(range(0, len(images), batch), "score", unit=" batches", leave=False):
        target = masks[start:start + batch].astype(bool)
        counts.append(count_pixels(predict(np.array(images[start:start + batch])), target))
    return np.concatenate(counts)


def open_test(args, meta):
    """(images, masks) of the test part; ends the program where there are no masks to score against."""
    folder = Path(args.data) / args.dataset
    images, masks = prepare_data.open_part(folder, "test")
    if masks is None:
        sys.exit(f"{folder} has no test masks: nothing can be scored; --predict draws masks without any")
    if not masks.any():
        print(f"{folder}: no test mask has any foreground; IoU is 1 where nothing is predicted, else 0")
    return images, masks


# ----------------------------------------------------------------------------------------------------------- protocols

def sheet_of_three(unet, images, masks, counts, settings, names, device):
    """As the paper's Table 6: image, pseudo-mask, truth, prediction; the images of best, median and worst IoU."""
    iou = scores_from_counts(counts)["iou"]
    order = np.argsort(-iou, kind="stable")
    rows, captions = [], []
    for title, k in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        image = np.array(images[k])
        pseudo = pseudo_mask(image[None], settings["threshold"], settings["foreground"])[0]
        rows.append([image, pseudo, masks[k], predict_logits(unet, image[None], device)[0] > 0])
        captions.append(f"{title}: IoU {iou[k]:.4f}   {names[k]['name']}"[:64])
    return prepare_data.contact_sheet(rows, ["image", settings["threshold"], "truth", "prediction"], captions)


def transfer(args, settings, meta, device):
    """Score a pre-trained network as it is. Returns the result and the qualitative sheet."""
    images, masks = open_test(args, meta)
    unet, weights = load_network(args, settings, device)
    counts = count_test(lambda batch: predict_logits(unet, batch, device) > 0, images, masks)
    names = prepare_data.read_names(Path(args.data) / args.dataset, "test")
    sheet = sheet_of_three(unet, images, masks, counts, settings, names, device)
    return dict(n_test=len(images), weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
                **summarise(counts)), sheet


def best_constant(data):
    """The one mask that is best to predict for every image, bool (S, S): the pixelwise majority of the training
    truths. None where there are none."""
    _, masks = prepare_data.open_part(data, "train")
    if masks is None:
        return None
    return sum(mask.astype(np.int64) for mask in masks) * 2 >= len(masks)


def reference(args, settings, meta, device):
    """Score what costs nothing on the same test images. Only best_constant uses labels."""
    images, masks = open_test(args, meta)
    torch.manual_seed(seed_from(args.seed))                     # the very weights that pre-training starts from
    try:
        unet = build_unet(args.backbone, meta["size"]).to(device, memory_format=torch.channels_last).eval()
    except ValueError as error:
        sys.exit(str(error))
    other = "dark" if settings["foreground"] == "bright" else "bright"
    rows = dict(all_foreground=lambda batch: np.ones(batch.shape[:3], bool),
                all_background=lambda batch: np.zeros(batch.shape[:3], bool),
                raw_threshold=lambda batch: pseudo_mask(batch, settings["threshold"], settings["foreground"]) > 0,
                raw_threshold_inverted=lambda batch: pseudo_mask(batch, settings["threshold"], other) > 0,
                random_init=lambda batch: predict_logits(unet, batch, device) > 0)
    constant = best_constant(Path(args.data) / args.dataset)
    if constant is None:
        print(f"{args.dataset} has no training masks: no row best_constant")
    else:
        rows["best_constant"] = lambda batch: np.repeat(constant[None], len(batch), axis=0)
    result = {name: summarise(count_test(predict, images, masks)) for name, predict in rows.items()}
    if constant is not None:
        result["best_constant"]["uses_labels"] = True
    return dict(n_test=len(images), **result), None


def evaluate(args, settings, meta, device):
    """Run one protocol, print its scores, write its JSON (and picture)."""
    folder = Path(args.out) / args.dataset / settings["backbone"] / settings["variant"] / f"seed{args.seed}"
    path = folder / f"{args.protocol}.json"
    head = dict(dataset=args.dataset, backbone=settings["backbone"], method=settings["method"],
                variant=settings["variant"], train=settings["train"], protocol=args.protocol, labels=0.0, seed=args.seed)
    head |= {key: settings[key] for key in ("threshold", "loss", "foreground", "epochs", "batch_size") if key in settings}
    head |= dict(img_size=meta["size"], data=meta["fingerprint"])
    protocol = transfer if args.protocol == "transfer" else reference
    result, sheet = protocol(args, settings, meta, device)
    result = head | result
    if path.exists() and not args.overwrite:
        refuse_to_replace(path, result)
    folder.mkdir(parents=True, exist_ok=True)
    if sheet is not None:
        write_atomically(path.with_suffix(".png"), functools.partial(Image.fromarray(sheet).save, format="PNG"))
    text = json.dumps(result | dict(command=args.command), indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
    print_scores([result])
    print(path)


def refuse_to_replace(path, result):
    """End the program if the JSON at `path` holds another evaluation than this one."""
    try:
        there = json.loads(path.read_text())
    except ValueError:
        there = {}
    differ = [key for key, value in result.items() if there.get(key) != value]
    if differ:
        sys.exit(f"{path} holds another evaluation (other {', '.join(differ)}): --overwrite replaces it")


def print_scores(results):
    """A table of results, a line a network or reference row: global IoU, mean IoU of an image, and the rest."""
    lines = []
    for r in results:
        rows = {name: value for name, value in r.items() if isinstance(value, dict)} or {r["variant"]: r}
        for name, row in rows.items():
            lines.append(f"{r['dataset'] + ', ' + r['backbone']:22}{r['protocol'] + ', ' + name:42}{r['seed']:4}"
                         f"{row['iou_global']:9.4f}{row['iou_image']:11.4f}{row['precision_global']:11.4f}"
                         f"{row['recall_global']:8.4f}{row['accuracy_global']:10.4f}"
                         + ("  (uses labels)" if row.get("uses_labels") else ""))
    print(f"{'test set, network':22}{'protocol, row':42}{'seed':>4}{'IoU':>9}{'IoU/image':>11}{'precision':>11}"
          f"{'recall':>8}{'accuracy':>10}\n" + "\n".join(lines))


def report(out):
    """Print one table of every result below `out`; a file that is no result is named and left out."""
    results = []
    for path in sorted(Path(out).rglob("*.json")):
        try:
            result = json.loads(path.read_text())
            assert {"dataset", "backbone", "protocol", "seed", "variant"} <= result.keys()
            results.append(result)
        except (ValueError, AssertionError, AttributeError):
            print(f"{path} is not a result of finetune_eval.py: left out")
    if not results:
        sys.exit(f"{out}: no results here; score a run first, see python finetune_eval.py --help")
    print_scores(sorted(results, key=lambda r: (r["dataset"], r["backbone"], r["protocol"], r["variant"], r["seed"])))


# ------------------------------------------------------------------------------------------------------------- predict

def predict_folder(args, settings, device):
    """Draw a mask, PNG 0 / 255, for every image of a folder, at the image's own size and under its stem; a CSV with
    each foreground share; with --overlay also pictures. A bad file is named, the others are done, the exit code is 1."""
    source, out, bad = Path(args.predict), Path(args.out), []
    if not source.is_dir():
        sys.exit(f"{source}: no such folder")
    files = prepare_data.files_by_stem(source, bad)
    if not files:
        sys.exit(f"{source}: no images here ({', '.join(sorted(prepare_data.EXTENSIONS))})")
    there = [name for name in ["foreground.csv", *(f"{stem}.png" for stem in files)] if (out / name).exists()]
    if out.resolve() == source.resolve() or (there and not args.overwrite):
        sys.exit(f"{out}: {there[0] if there else 'the images themselves'} would be overwritten: "
                 "give another --out, or --overwrite")
    unet, _ = load_network(args, settings, device)
    (out / "overlay" if args.overlay else out).mkdir(parents=True, exist_ok=True)
    shares = []
    for stem, path in tqdm(files.items(), "predict", unit=" images"):
        try:
            image = prepare_data.read_image(path)
        except ValueError as error:
            bad.append(f"{path}: {error}")
            continue
        logits = predict_logits(unet, prepare_data.resize(image, settings["img_size"])[None], device)[0]
        mask = cv2.resize(logits, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) > 0
        picture = Image.fromarray(mask.astype(np.uint8) * 255)
        write_atomically(out / f"{stem}.png", functools.partial(picture.save, format="PNG"))
        if args.overlay:
            image[mask] = (image[mask] * 0.6 + np.array([255, 0, 0]) * 0.4).astype(np.uint8)
            write_atomically(out / "overlay" / f"{stem}.png",
                             functools.partial(Image.fromarray(image).save, format="PNG"))
        shares.append((path.name, f"{mask.mean():.6f}"))

    def write_shares(path):
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("name", "foreground_share"), *shares])

    write_atomically(out / "foreground.csv", write_shares)
    print(f"{out}: {len(shares)} masks, and foreground.csv")
    if bad:
        sys.exit("\n".join(bad) + f"\n{len(bad)} bad file(s), listed above, have no mask")


# ---------------------------------------------------------------------------------------------------------------- main

def parse_args(argv):
    parser = argparse.ArgumentParser("finetune_eval.py", description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=type("Help", (argparse.ArgumentDefaultsHelpFormatter,
                                                                   argparse.RawDescriptionHelpFormatter), {}))
    parser.add_argument("--run", metavar="DIR", help="a finished run folder of pretrain.py")
    parser.add_argument("--encoder", metavar="FILE", help="any encoder (ours, timm's, torchvision's) instead of a run")
    parser.add_argument("--dataset", help="a prepared data set; with --run unset: the one it was trained on")
    parser.add_argument("--backbone", choices=list(BACKBONES), help="without --run: the network")
    parser.add_argument("--protocol", default="transfer", choices=["transfer", "reference"], help="how to score")
    parser.add_argument("--threshold", default="otsu", choices=THRESHOLDS, help="reference: who draws raw_threshold")
    parser.add_argument("--foreground", choices=["bright", "dark"], help="reference; unset: what prepare_data.py decided")
    parser.add_argument("--seed", type=int, help="of fresh weights; unset: the run's, or 0")
    parser.add_argument("--predict", metavar="DIR", help="draw masks for the images of this folder; needs --run, --out")
    parser.add_argument("--overlay", action="store_true", help="with --predict: pictures with the mask in red, too")
    parser.add_argument("--report", action="store_true", help="print one table of all results under --out")
    parser.add_argument("--data", default="data", metavar="DIR", help="where prepared data sets are")
    parser.add_argument("--out", metavar="DIR", help="where results are kept (unset: results); with --predict the folder for the masks")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--overwrite", action="store_true", help="replace results or masks that are already there")
    args = parser.parse_args(argv)
    if args.report:
        return args, parser
    if args.predict and not (args.run and args.out):
        parser.error("--predict needs --run RUN_DIR and --out DIR")
    if args.run and args.encoder:
        parser.error("--run and --encoder exclude each other")
    if not args.run and not (args.dataset and args.backbone):
        parser.error("give --run RUN_DIR, or --dataset NAME and --backbone B")
    if not args.run and not args.encoder and args.protocol == "transfer":
        parser.error("transfer needs --run RUN_DIR or --encoder FILE")
    if args.protocol == "reference" and (args.encoder or args.predict):
        parser.error("reference trains and loads nothing: leave out --encoder and --predict")
    return args, parser


def name_unused(args, parser):
    """Say in one line which flags were given that this job does not use."""
    unused = (["overlay"] if not args.predict else ["dataset", "protocol"]) + ["backbone"] * bool(args.run)
    unused += ["threshold", "foreground"] * (args.protocol != "reference" or bool(args.predict))
    given = ["--" + name for name in unused if getattr(args, name) != parser.get_default(name)]
    if given:
        print(f"not used here and ignored: {', '.join(given)}")


def main(argv=None):
    args, parser = parse_args(argv)
    args.command = shlex.join(["python", "finetune_eval.py", *(sys.argv[1:] if argv is None else argv)])
    if args.report:
        return report(args.out or "results")
    name_unused(args, parser)
    device = pick_device(args.device)
    settings = read_run(Path(args.run)) if args.run else {}
    args.seed = settings.get("seed", 0) if args.seed is None else args.seed
    args.backbone = settings.get("backbone", args.backbone)
    if args.predict:
        return predict_folder(args, settings, device)
    args.dataset, args.out = args.dataset or settings["dataset"], args.out or "results"
    meta = prepare_data.read_meta(Path(args.data) / args.dataset)
    if args.protocol == "reference":
        foreground = args.foreground or meta["foreground"]
        variant = "-".join(["reference", *[args.threshold] * (args.threshold != "otsu"),
                            *[foreground] * (foreground != meta["foreground"])])
        settings = dict(backbone=args.backbone, method="reference", train=None, threshold=args.threshold,
                        foreground=foreground, variant=variant)
    elif args.encoder:
        stem = Path(args.encoder).stem
        settings = dict(backbone=args.backbone, method=stem, train="encoder", threshold="otsu",
                        foreground=meta["foreground"], variant=stem)
    else:
        settings["variant"] = Path(args.run).resolve().parent.name
        if args.dataset != settings["dataset"]:
            settings["variant"] += f"-from-{settings['dataset']}"
        if args.backbone == "vit_small" and settings["train"] == "end2end" and settings["img_size"] != meta["size"]:
            sys.exit(f"{args.run} was trained at {settings['img_size']} px and {args.dataset} is prepared at "
                     f"{meta['size']}: a ViT U-Net needs one size, prepare the data with --size {settings['img_size']}")
    settings["img_size"] = meta["size"]
    evaluate(args, settings, meta, device)


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:               # a full disk, a forbidden folder, Ctrl-C
        sys.exit(f"finetune_eval.py: {error or 'interrupted'}")
