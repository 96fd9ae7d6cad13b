"""Turn raw images into arrays that training maps into memory: data/<name>/.

    python prepare_data.py --dataset demo
    python prepare_data.py --dataset folder --raw my_images --size 224
    python prepare_data.py --dataset isic --raw raw/isic --download
    python prepare_data.py --dataset isic --check

`demo` draws a small set of stained nuclei. `folder` takes images/ and, if there, masks/ with the same stems (or the
images straight inside, or train/ val/ test/ sub-folders of that form; an optional labels.csv has name,label). dm,
tissuenet, isic, xray, drone and dsb2018 take the files as their authors publish them, in --raw, extracted or not.

Writes data/<name>/{train,val,test}_images.npy, uint8 (N, S, S, 3) RGB; {...}_masks.npy, uint8 {0, 1} (N, S, S), where
there are masks; {...}.csv (name, group, label); meta.json; preview.png.
"""

import argparse
import collections
import contextlib
import csv
import fcntl
import functools
import hashlib
import http.client
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

PARTS = ("train", "val", "test")
EXTENSIONS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
DEMO_COUNTS = {"train": 64, "val": 16, "test": 32}
TILE = 480                                                      # of a dm slide (section 3.1)
# What the paper or the authors say of each published data set. counts: train, val, test; mask: the value above which a
# mask pixel is foreground; files: what --download fetches, for those that need no account.
PUBLISHED = dict(
    dm=dict(foreground="bright", mask=0, counts=(1656, 240, 480), licence="from its authors",
            page="the authors of Van Buren et al. 2022 (J. Immunol. Methods), https://doi.org/10.1016/j.jim.2022.113233"),
    tissuenet=dict(foreground="bright", mask=0, counts=(2580, 3140, 1249), licence="modified Apache 2.0, non-commercial",
                   page="https://datasets.deepcell.org/data (free account)"),
    isic=dict(foreground="dark", mask=127, counts=(2000, 150, 600), licence="CC0",
              page="https://challenge.isic-archive.com/data/#2017",
              files=[f"https://isic-challenge-data.s3.amazonaws.com/2017/ISIC-2017_{part}_{what}"
                     for part in ("Training", "Validation", "Test_v2")
                     for what in ("Data.zip", "Part1_GroundTruth.zip", "Part3_GroundTruth.csv")]),
    xray=dict(foreground="dark", mask=127, counts=(14730, 2202, 4233), licence="of each source; see the page",
              page="https://www.kaggle.com/datasets/tawsifurrahman/covid19-radiography-database (free account)"),
    drone=dict(foreground="bright", mask=0, counts=(280, 40, 80), licence="research and education, non-commercial",
               page="http://dronedataset.icg.tugraz.at (or the Semantic Drone Dataset on Kaggle, free account)"),
    dsb2018=dict(foreground="auto", mask=0, counts=(469, 67, 134), licence="CC0",
                 page="https://bbbc.broadinstitute.org/BBBC038",
                 files=["https://data.broadinstitute.org/bbbc/BBBC038/stage1_train.zip"]))

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)     # twice that large is an error, in one line


# ---------------------------------------------------------------------------------------------------- reading files

def read_pixels(path, palette_index=False, page=0, least=None):
    """The pixels of an image file as stored, EXIF rotation applied: (H, W) or (H, W, 3 or 4), uint8, wider, or bool; and
    the full (H, W), which is larger where a jpg was decoded at 1/2, 1/4 or 1/8, down to no less than `least` a side.

    Palette files give colours; with palette_index their indices, unless index 0 is another colour than black. Raises
    ValueError with the reason for a file that cannot be read to its end.
    """
    try:
        if os.path.getsize(path) == 0:
            raise ValueError("the file is empty")
        with Image.open(path) as image:
            if page:
                image.seek(page)
            deep_colour = ";16" in str(image.tile)              # Pillow keeps only 8 bits of 16-bit colour
            height, width = image.size[::-1]
            if least:
                image.draft(image.mode, (least, least))         # only jpg can; any other kind is left as it is
            turned = image.getexif().get(0x0112, 1) >= 5        # EXIF orientation: by 90 degrees
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "P" and not (palette_index and image.getpalette()[:3] == [0, 0, 0]):
                image = image.convert("RGB")
            elif image.mode not in ("1", "L", "P", "RGB", "RGBA", "F") and not image.mode.startswith("I"):
                image = image.convert("L" if image.mode in ("LA", "La") else "RGB")     # alpha is dropped, not blended
            pixels = np.asarray(image)
        if deep_colour and pixels.ndim == 3:
            pages = cv2.imdecodemulti(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)[1]
            pixels = pages[page][..., 2::-1]
    except UnidentifiedImageError:
        raise ValueError("not an image, or of a kind that cannot be read") from None
    except EOFError:
        raise ValueError(f"has no page {page} (they count from 0)" if page else "cannot be read: it ends too early") from None
    except ValueError:
        raise
    except Exception as error:                                  # Pillow raises OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot be read: {error}") from None
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError("holds values that are not finite")
    return pixels, (width, height) if turned else (height, width)


def to_eight_bits(pixels, low=0.1, high=99.9):
    """Pixels of more than 8 bits, or floats -> uint8 of the same shape: two percentiles become 0 and 255."""
    low, high = np.percentile(pixels, (low, high))
    if high <= low:                                             # nearly all pixels alike: the full range, then
        low, high = float(pixels.min()), max(float(pixels.max()), float(pixels.min()) + 1)
    return ((pixels.astype(np.float64) - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)


def read_image(path, page=0, least=None):
    """An image file as uint8 (H, W, 3) RGB. Gray is repeated; alpha is dropped; more than 8 bits, or floats, are
    scaled from their 0.1 and 99.9 percentiles to 0 and 255. With `least` also its full (H, W): see read_pixels. Raises
    ValueError with the reason."""
    pixels, shape = read_pixels(path, page=page, least=least)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype != np.uint8:
        pixels = to_eight_bits(pixels)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    pixels = np.array(pixels[..., :3], order="C")               # a copy: what Pillow gives cannot be written to
    return (pixels, shape) if least else pixels


def read_mask(path):
    """A mask file as int32 (H, W), the values as stored: colours by their largest channel, palettes by their index
    (by colour where index 0 is not black), floats up to 1 times 255. Raises ValueError with the reason."""
    pixels, _ = read_pixels(path, palette_index=True)
    if pixels.ndim == 3:
        pixels = pixels[..., :3].max(axis=2)
    if pixels.dtype.kind == "f":
        pixels = (pixels * (255 if pixels.max() <= 1 else 1)).round()
    return pixels.astype(np.int32)


def resize(picture, size, full=None):
    """(H, W) or (H, W, 3) -> (size, size[, 3]): mean over the covered area to shrink, bilinear to enlarge. full: the
    (H, W) that a jpg decoded smaller stands for; its last row and column stand for a part of a pixel."""
    height, width = picture.shape[:2]
    if full and full != (height, width):
        y, x = (size * round(whole / part) / whole for whole, part in zip(full, (height, width)))
        return cv2.resize(picture, None, fx=x, fy=y, interpolation=cv2.INTER_AREA)[:size, :size]
    how = cv2.INTER_AREA if height >= size and width >= size else cv2.INTER_LINEAR
    return cv2.resize(picture, (size, size), interpolation=how)


def named(read, path, *args, **how):
    """read(path, ...), whose errors begin with the path."""
    try:
        return read(path, *args, **how)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


slide = functools.lru_cache(maxsize=1)(read_image)              # its twelve tiles follow each other
slide_mask = functools.lru_cache(maxsize=1)(read_mask)


def load_pair(pair, size):
    """-> (image uint8 (S, S, 3), mask uint8 {0, 1} (S, S) or None, {mask value: pixels}, error or None).

    The mask is made here only where `above` is known, the value above which a pixel is foreground; else values are
    counted. Several masks of one image are joined.
    """
    values, mask = {}, None
    try:
        if "arrays" in pair:                                    # TissueNet's
            image, masks = two_channels(pair["arrays"][0]), [pair["arrays"][1]]
            shape = image.shape[:2]
        elif "tile" in pair:                                    # scaled as a whole slide, then cut
            image = named(slide, pair["image"], page=pair["page"])
            masks, shape = (named(slide_mask, path) for path in pair["masks"]), image.shape[:2]
        else:
            image, shape = named(read_image, pair["image"], least=3 * size // 2)      # what is left is averaged by resize
            masks = (named(read_mask, path) for path in pair["masks"] or ())
        for k, one in enumerate(masks):
            if one.shape != shape and not pair.get("any_shape"):
                raise ValueError(f"{pair['masks'][k]}: the mask is {one.shape[1]}x{one.shape[0]}, its image "
                                 f"{shape[1]}x{shape[0]}")
            mask = one if mask is None else np.maximum(mask, one)
        if "tile" in pair:
            image, mask, shape = cut(image, pair["tile"]), cut(mask, pair["tile"]), None
        if mask is not None and pair.get("above") is None:
            values, mask = dict(zip(*(a.tolist() for a in np.unique(mask, return_counts=True)))), None
        elif mask is not None:
            mask = shrink_mask(mask > pair["above"], size)
        return resize(image, size, shape), mask, values, None
    except (ValueError, OSError) as error:
        return None, None, {}, str(error)


def two_channels(x):
    """TissueNet's (H, W, 2), nuclei and membranes -> uint8 (H, W, 3) RGB as DeepCell's documentation shows them: green and
    blue, each from the 5 and 95 percentiles of its non-zero pixels."""
    image = np.zeros((*x.shape[:2], 3), np.uint8)
    for channel in (0, 1):
        lit = x[..., channel][x[..., channel] > 0]
        if lit.size:
            low, high = np.percentile(lit, (5, 95))
            scaled = (x[..., channel] - low) * (255 / max(high - low, 1e-9))
            image[..., channel + 1] = scaled.round().clip(0, 255).astype(np.uint8)
    return image


def cut(picture, tile):
    """The tile (row, column) of a slide, (TILE, TILE[, 3]); what lies outside the slide is 0."""
    y, x = (k * TILE for k in tile)
    piece = picture[y:y + TILE, x:x + TILE]
    out = np.zeros((TILE, TILE, *picture.shape[2:]), picture.dtype)
    out[:piece.shape[0], :piece.shape[1]] = piece
    return out


def shrink_mask(mask, size):
    """bool (H, W) -> uint8 {0, 1} (S, S): foreground where at least half the area is."""
    return (resize(mask.astype(np.float32), size) >= 0.5).astype(np.uint8)


def load_mask(job):
    """(mask path, size, threshold) -> uint8 {0, 1} (S, S): foreground where at least half the area is above."""
    path, size, threshold = job
    return shrink_mask(read_mask(path) > threshold, size)


# ---------------------------------------------------------------------------------------------- deciding, label-free

def otsu_mask(image, foreground):
    """uint8 (H, W, 3) RGB -> uint8 {0, 1} (H, W): above Otsu's threshold for "bright", not above it for "dark"."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if gray.min() == gray.max():
        return np.zeros_like(gray)
    threshold, _ = cv2.threshold(gray, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return ((gray > threshold) == (foreground == "bright")).astype(np.uint8)


def enclosed_areas(image):
    """uint8 (H, W, 3) -> (bright, dark): the share of the picture in components, of either side of Otsu's threshold,
    that do not touch the border. Objects lie inside a picture; the background runs out of it."""
    areas = []
    for foreground in ("bright", "dark"):
        mask = otsu_mask(image, foreground)
        _, labels = cv2.connectedComponents(mask, connectivity=4)
        border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
        areas.append(float((mask.astype(bool) & ~np.isin(labels, border)).mean()))
    return tuple(areas)


def decide_foreground(asked, areas):
    """"bright" or "dark" for the whole data set, and the evidence. areas: enclosed_areas of the training images, (N, 2)."""
    if asked != "auto":
        return asked, "set by --foreground, or as published"
    areas = np.array(areas)
    bright, dark = areas.mean(axis=0)
    decision = "bright" if bright >= dark else "dark"
    agree = float(((areas[:, 0] > areas[:, 1]) if decision == "bright" else (areas[:, 1] > areas[:, 0])).mean())
    evidence = (f"enclosed regions cover {bright:.3f} of a training image when bright, {dark:.3f} when dark; "
                f"{agree:.0%} of {len(areas)} images agree")
    if agree < 0.75:
        evidence += "; the evidence is thin: look at preview.png and set --foreground yourself if it is wrong"
    return decision, evidence


def decide_mask_threshold(asked, values):
    """The value above which a mask pixel is foreground, for the whole data set, and the evidence.

    values: {mask value: pixels} over all masks. Two ends, as in 0/1, 0/255 and their anti-aliased or jpg-ringed
    forms, are cut at half the range. Instance and class numbers (every value means something) count where non-zero.
    """
    top = max(values, default=0)
    low, mid, high = (sum(n for v, n in values.items() if a < v <= b)
                      for a, b in ((0, top / 4), (top / 4, 3 * top / 4), (3 * top / 4, top)))
    # Ringing frays both ends alike; numbers that start at 1 leave the upper end clean.
    frayed = sum(n for v, n in values.items() if 3 * top / 4 < v < top) >= 0.1 * low
    two_ends = top <= 1 or (top >= 64 and high > mid and (high > low + mid or frayed))
    rule = asked if asked != "auto" else "half" if two_ends else "nonzero"
    threshold = top // 2 if rule == "half" else 0
    evidence = (f"{rule} ({'decided' if asked == 'auto' else 'set by --mask-foreground'}): mask values reach {top}, "
                f"{len(values)} different; of the non-zero pixels {high} lie in the upper quarter, {mid} in the middle "
                f"half, {low} in the lower quarter; foreground is > {threshold}")
    return threshold, evidence


# -------------------------------------------------------------------------------------------------- finding, splitting

def files_by_stem(folder, bad):
    """{stem: path} of the image files straight inside a folder; a stem used twice goes to `bad`, a list of lines."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file():
            if path.stem in found:
                bad.append(f"{path}: the stem is used twice, see {found[path.stem].name}")
            found.setdefault(path.stem, path)
    return found


def find_pairs(folder, part, bad):
    """The images of one folder, with their masks if it has masks/: a list of dicts name, image, masks, part."""
    image_folder = folder / "images" if (folder / "images").is_dir() else folder
    images = files_by_stem(image_folder, bad)
    if not images:
        sys.exit(f"{image_folder}: no images here ({', '.join(sorted(EXTENSIONS))})")
    masks = files_by_stem(folder / "masks", bad) if (folder / "masks").is_dir() else None
    if masks is not None and len(set(masks) - set(images)):
        print(f"{folder / 'masks'}: {len(set(masks) - set(images))} masks have no image and are not used")
    pairs = []
    for name, path in images.items():
        if masks is not None and name not in masks:
            bad.append(f"{path}: no mask of this name in {folder / 'masks'}")
        else:
            pairs.append(dict(name=name, image=str(path), masks=[str(masks[name])] if masks else None, part=part))
    return pairs


def find_folder(raw, args, bad):
    """All images below --raw, as find_pairs lists them, with group and label added."""
    given, group_regex = [part for part in PARTS if (raw / part).is_dir()], re.compile(args.group_regex)
    if given and len(given) < len(PARTS):
        sys.exit(f"{raw}: has {', '.join(given)} but not {', '.join(p for p in PARTS if p not in given)}; "
                 "give all three, or images/ to be split here")
    pairs = [pair for part in given for pair in find_pairs(raw / part, part, bad)] or find_pairs(raw, None, bad)
    labels = {}
    if (raw / "labels.csv").is_file():
        rows = read_table(raw / "labels.csv", ("name", "label"))
        labels = {row["name"]: row["label"] for row in rows}
    matched = []
    for pair in pairs:
        match = group_regex.search(pair["name"])
        if match:
            label = labels.get(pair["name"], labels.get(Path(pair["image"]).name, ""))
            matched.append(pair | dict(group=match.group(1 if group_regex.groups else 0), label=label))
        else:
            bad.append(f"{pair['image']}: the name does not match --group-regex {group_regex.pattern}")
    return matched


def read_table(path, columns):
    """The rows of a CSV, a list of dicts; ends the program where one of the columns is not there."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if not set(columns) <= set(rows.fieldnames or ()):
            sys.exit(f"{path}: needs the columns {' and '.join(columns)}")
        return list(rows)


def split(pairs, seed):
    """Set the part of every pair: groups in seeded order, cut at int(.7 n) and int(.8 n) images, or slides; a group that a
    cut falls into stays whole. Without groups of several images that is the shuffled names, cut there. Few large groups
    fill each part with at least one, where there are three."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for pair in sorted(pairs, key=lambda p: p["name"]):
        groups[pair["group"] or pair["name"]][pair.get("slide", pair["name"])].append(pair)
    order = np.random.default_rng(seed).permutation(sorted(groups)).tolist()
    ends = np.cumsum([0] + [len(groups[group]) for group in order])
    first, second = (int(np.searchsorted(ends, int(share * ends[-1]))) for share in (0.7, 0.8))
    if 3 <= len(order) < ends[-1]:
        first = max(1, min(first, len(order) - 2))
        second = min(max(second, first + 1), len(order) - 1)
    for k, group in enumerate(order):
        for pair in sum(groups[group].values(), []):
            pair["part"] = "train" if k < first else "val" if k < second else "test"


def stratify(pairs, seed):
    """Set the part of every pair: ceil(20 %) test, then ceil(13 %) of the rest validation, of each class its like share;
    what rounding leaves over goes to the classes with the largest remainders."""
    rest = collections.defaultdict(list)
    for pair in sorted(pairs, key=lambda p: p["name"]):
        pair["part"] = "train"
        rest[pair["label"]].append(pair)
    for name in sorted(rest):
        rest[name] = [rest[name][i] for i in np.random.default_rng([seed, len(name)]).permutation(len(rest[name]))]
    for part, share in (("test", 0.2), ("val", 0.13)):
        n = sum(map(len, rest.values()))
        exact = {name: len(members) * math.ceil(share * n) / n for name, members in rest.items()}
        take = {name: int(value) for name, value in exact.items()}
        order = sorted(exact, key=lambda name: (take[name] - exact[name], name))
        for name in order[:math.ceil(share * n) - sum(take.values())]:
            take[name] += 1
        for name, members in rest.items():
            for pair in members[:take[name]]:
                pair["part"] = part
            rest[name] = members[take[name]:]


# ------------------------------------------------------------------------------------------- the data sets as published

def unpack(archive):
    """Extract a .zip or .tar[.gz] beside itself, once, into a folder of its name. Ends the program where a member would
    leave that folder, or is a link in a zip, or the disk is too small."""
    folder = archive.with_name(re.sub(r"(\.tar)?\.\w+$", "", archive.name))
    if folder.exists():
        return folder
    print(f"{archive}: extracting to {folder}")
    with new_folder(folder) as partial:
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as file:
                    members = file.infolist()
                    for member in members:
                        target = (partial / member.filename).resolve()
                        is_link = member.external_attr >> 28 == 0xA
                        if is_link or not target.is_relative_to(partial.resolve()) or "\\" in member.filename:
                            sys.exit(f"{archive}: its member {member.filename!r} is a link or would "
                                     "leave the folder: nothing extracted")
                    room_for(sum(member.file_size for member in members), archive)
                    for member in tqdm(members, archive.name, unit=" files"):
                        file.extract(member, partial)
            else:
                with tarfile.open(archive) as file:
                    members = file.getmembers()
                    room_for(sum(member.size for member in members), archive)
                    for member in tqdm(members, archive.name, unit=" files"):
                        file.extract(member, partial, filter="data")
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            sys.exit(f"{archive}: cannot be extracted ({error}); nothing was kept: get it again")
    return folder


def room_for(size, archive):
    """End the program if the disk of `archive` has no room for so many bytes."""
    free = shutil.disk_usage(archive.parent).free
    if size > free:
        sys.exit(f"{archive}: {size / 1e9:.1f} GB when extracted, {free / 1e9:.1f} GB are free: nothing extracted")


def folders_below(raw, depth=5):
    """`raw` and the folders below it, near ones first, links followed, hidden ones and Apple's left out."""
    level, found = [raw], []
    for _ in range(depth):
        found += level
        level = sorted(Path(entry) for folder in level for entry in os.scandir(folder)
                       if entry.is_dir() and not entry.name.startswith((".", "__MACOSX")))
    return found


def published_files(folders, names, bad):
    """{stem: path} of the pictures in the nearest folder of that path, such as ("COVID", "images"); {} where none has any."""
    for folder in folders:
        if [part.lower() for part in folder.parts[-len(names):]] == [name.lower() for name in names]:
            found = files_by_stem(folder, bad)
            if found:
                return found
    return {}


def pair_up(images, masks, bad, **more):
    """Pairs of {name: image path} and {name: mask path}; an image without a mask goes to `bad`; more: what all have."""
    for name in sorted(set(images) - set(masks)):
        bad.append(f"{images[name]}: has no mask")
    if set(masks) - set(images):
        print(f"{len(set(masks) - set(images))} masks have no image and are not used, {masks[min(set(masks) - set(images))]} first")
    return [dict(name=name, image=str(images[name]), masks=[str(masks[name])], group="", label="", part=None) | more
            for name in sorted(set(images) & set(masks))]


def find_isic(folders, args, bad, missing):
    """ISIC-2017: the official parts; labels from Part3, nevus where neither column says 1."""
    pairs = []
    for part, official in zip(PARTS, ("Training", "Validation", "Test_v2")):
        images = published_files(folders, [f"ISIC-2017_{official}_Data"], bad)
        masks = published_files(folders, [f"ISIC-2017_{official}_Part1_GroundTruth"], bad)
        tables = [f / f"ISIC-2017_{official}_Part3_GroundTruth.csv" for f in folders]
        table = next((path for path in tables if path.is_file()), None)
        missing += [f"ISIC-2017_{official}_{what}" for what, there in (
            ("Data", images), ("Part1_GroundTruth", masks), ("Part3_GroundTruth.csv (labels)", table)) if not there]
        labels = {}
        for row in read_table(table, ("image_id", "melanoma", "seborrheic_keratosis")) if table else ():
            disease = [name for name in ("melanoma", "seborrheic_keratosis") if float(row[name]) == 1]
            labels[row["image_id"]] = disease[0] if disease else "nevus"
        new = pair_up({stem: path for stem, path in images.items() if not stem.endswith("_superpixels")},
                      {stem.removesuffix("_segmentation"): path for stem, path in masks.items()}, bad, part=part)
        pairs += [pair | dict(label=labels.get(pair["name"], "")) for pair in new]
    return pairs


def find_xray(folders, args, bad, missing):
    """The COVID-19 Radiography data: class = label; masks of 256 px for images of 299."""
    pairs = []
    for label in ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"):
        images, masks = (published_files(folders, [label, kind], bad) for kind in ("images", "masks"))
        missing += [f"{label}/{kind}" for kind, there in (("images", images), ("masks", masks)) if not there]
        pairs += pair_up(images, masks, bad, label=label, any_shape=True)
    return pairs


def find_drone(folders, args, bad, missing):
    """The Semantic Drone Dataset: foreground is any class but `unlabeled`, which is index 0 and black."""
    images = published_files(folders, ["original_images"], bad)
    masks = published_files(folders, ["label_images_semantic"], bad) or published_files(folders, ["RGB_color_image_masks"], bad)
    missing += [name for name, there in (("original_images", images), ("label_images_semantic", masks)) if not there]
    return pair_up(images, masks, bad)


def find_dsb2018(folders, args, bad, missing):
    """BBBC038 stage 1: one folder an image, one mask a nucleus."""
    images, masks = {}, {}
    for folder in (f.parent for f in folders if f.name == "images" and (f.parent / "masks").is_dir()):
        for name, path in files_by_stem(folder / "images", bad).items():
            images.setdefault(name, path)
            masks.setdefault(name, sorted(map(str, files_by_stem(folder / "masks", bad).values())))
    missing += [] if images else ["stage1_train/<id>/images and masks"]
    pairs = pair_up(images, {name: files[0] for name, files in masks.items() if files}, bad)
    return [pair | dict(masks=masks[pair["name"]]) for pair in pairs]


def find_dm(folders, args, bad, missing):
    """Dermatomyositis slides, paired by what stands before `_component`, cut into tiles; a slide's tiles stay together, or
    with --split-by patient all of a patient's (the first two fields of the name)."""
    images, masks = {}, {}
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        match = re.fullmatch(r"([^.].*)_component_(data|mask_labels)\.tiff?", path.name, re.IGNORECASE)
        if match:
            (images if match[2].lower() == "data" else masks).setdefault(match[1], path)
    missing += [name for name, there in (("*_component_data.tif", images), ("*_component_mask_labels.tiff", masks)) if not there]
    pairs = []
    for pair in pair_up(images, masks, bad):
        try:
            with Image.open(pair["image"]) as slide_file:
                width, height = slide_file.size
        except (OSError, SyntaxError) as error:
            bad.append(f"{pair['image']}: cannot be read: {error}")
            continue
        group = "_".join(pair["name"].split("_")[:2]) if args.split_by == "patient" else pair["name"]
        pairs += [pair | dict(name=f"{pair['name']}_{y}_{x}", slide=pair["name"], group=group, tile=(y, x), page=args.page)
                  for y in range(math.ceil(height / TILE)) for x in range(math.ceil(width / TILE))]
    return pairs


def find_tissuenet(folders, args, bad, missing):
    """TissueNet: the official parts; foreground is the whole cell. The arrays are read as they are needed."""
    pairs = []
    for part in PARTS:
        found = [path for folder in folders for path in sorted(folder.iterdir())
                 if re.fullmatch(rf"tissuenet_v[\d.]+_{part}\.npz", path.name, re.IGNORECASE)]
        if not found:
            missing.append(f"tissuenet_v1.*_{part}.npz")
            continue
        path = found[-1]                                        # the latest version
        (n, *shape), (m, *mask_shape) = (next(npy_rows(path, key)) for key in "Xy")
        if n != m or len(shape) != 3 or shape[2] != 2 or mask_shape != shape:
            sys.exit(f"{path}: X is {(n, *shape)} and y {(m, *mask_shape)}, not (N, H, W, 2) both")
        print(f"{path}: {n} images")
        pairs += [dict(name=f"{part}_{i:05d}", image=f"{path}[{i}]", masks=[f"{path}[{i}]"], npz=path, group="", label="",
                       part=part) for i in range(n)]
    return pairs


def npy_rows(path, key):
    """First the shape of an array in an .npz, then its rows, one at a time: it may be larger than the memory. Raises
    ValueError where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(file)
            if fortran or dtype.hasobject or not shape:
                raise ValueError("not a plain array in C order")
            yield shape
            size = dtype.itemsize * math.prod(shape[1:])
            for _ in range(shape[0]):
                yield np.frombuffer(file.read(size), dtype).reshape(shape[1:])
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: {key} cannot be read: {error}") from None


def with_arrays(pairs):
    """The pairs; those of TissueNet with their rows of X and of y's first channel, read in order."""
    rows = {}
    for pair in pairs:
        if "npz" in pair:
            if pair["npz"] not in rows:
                rows[pair["npz"]] = zip(*(npy_rows(pair["npz"], key) for key in "Xy"))
                next(rows[pair["npz"]])                         # the shapes
            x, y = next(rows[pair["npz"]])
            pair = pair | dict(arrays=(x, y[..., 0]))
        yield pair


def find_published(raw, args, bad):
    """The pairs of a published data set: says what is there and what is missing; ends the program where a part is."""
    inside = r"ISIC-2017_.*|COVID|Lung_Opacity|Normal|Viral Pneumonia|original_images|label_images_semantic|CD27_.*|Labels"
    if re.fullmatch(inside, raw.resolve().name):                # a folder inside the one that was meant
        raw = raw.resolve().parent
    for archive in sorted(raw.iterdir()):
        if archive.is_file() and archive.name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz")) and archive.name[0] != ".":
            unpack(archive)
    missing, facts = [], PUBLISHED[args.dataset]
    try:
        pairs = FINDERS[args.dataset](folders_below(raw), args, bad, missing)
    except ValueError as error:
        sys.exit(str(error))
    counts = collections.Counter(pair["part"] for pair in pairs)
    print(f"{raw}: {len(pairs)} images with masks" + (
        f" ({', '.join(f'{counts[p]} {p}' for p in PARTS)})" if counts and None not in counts else ""))
    if missing:
        print(f"missing: {', '.join(missing)}; from {facts['page']}")
    if not pairs or (None not in counts and len(counts) < len(PARTS)):
        sys.exit(f"{raw}: not enough of {args.dataset} is here to fill train, val and test; nothing was written")
    for pair in pairs:
        pair["above"] = facts["mask"]
    return pairs


FINDERS = dict(isic=find_isic, xray=find_xray, drone=find_drone, dsb2018=find_dsb2018, dm=find_dm, tissuenet=find_tissuenet)


def download(url, path, timeout=30, tries=5):
    """Fetch `url` to `path`; what has come is kept in path.part, and gone on from (HTTP Range) after a stall, a cut or in
    another call. Ends the program where the server says no, or after `tries` in a row that brought nothing more."""
    partial, failed, reason = path.with_name(path.name + ".part"), 0, ""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(desc=path.name, unit="B", unit_scale=True) as bar:
        while failed < tries:
            have = before = partial.stat().st_size if partial.exists() else 0
            whole, request = False, urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            try:
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    have = have if answer.status == 206 else 0  # else it sends all of it again
                    length = answer.headers["Content-Length"]
                    bar.reset(have + int(length) if length else None)
                    bar.update(have)
                    with open(partial, "ab" if have else "wb") as file:
                        while chunk := answer.read(2 ** 18):
                            file.write(chunk)
                            bar.update(len(chunk))
                whole, reason = not length or partial.stat().st_size == have + int(length), "it was cut short"
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code == 416:                           # what is here is no beginning of it
                    partial.unlink(missing_ok=True)
                elif error.code < 500 and error.code not in (408, 429):
                    sys.exit(f"{url}: {reason}; it may have moved, see the data set's page")
            except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if whole:
                os.replace(partial, path)
                return
            failed = 0 if partial.exists() and partial.stat().st_size > before else failed + 1
            time.sleep(min(failed, 3))
    sys.exit(f"{url}: given up after {tries} tries that brought nothing ({reason}); the same command goes on from there")


def fetch(args):
    """--download: the files of a data set that needs no account, into --raw; for another one, say where it is to be had."""
    facts = PUBLISHED[args.dataset]
    if "files" not in facts:
        sys.exit(f"{args.dataset} cannot be fetched without an account. Get it from {facts['page']}, put the files or archives "
                 f"into a folder, then: python prepare_data.py --dataset {args.dataset} --raw FOLDER")
    for url in facts["files"]:
        path = Path(args.raw) / url.rsplit("/", 1)[1]
        if path.exists() or path.with_suffix("").is_dir():
            print(f"{path} is there")
        else:
            download(url, path)


# --------------------------------------------------------------------------------------------------- reading them back

def read_meta(folder):
    """The meta.json of a prepared data set, a dict; ends the program with one line where there is none."""
    try:
        return json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        name = Path(folder).name
        sys.exit(f"{folder} is not prepared: run python prepare_data.py " + (
            "--dataset demo" if name == "demo" else f"--dataset {name} --raw DIR" if name in PUBLISHED else
            f"--dataset folder --raw DIR --name {name}"))


def open_part(folder, part):
    """(images, masks) of "train", "val" or "test", mapped, not read: uint8 (N, S, S, 3), and uint8 {0, 1} (N, S, S)
    or None. Ends the program with one line where they cannot be read."""
    images, masks = (Path(folder) / f"{part}_{kind}.npy" for kind in ("images", "masks"))
    try:
        return np.load(images, mmap_mode="r"), np.load(masks, mmap_mode="r") if masks.exists() else None
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"{folder}: the {part} arrays cannot be read ({error}); prepare the data set again with --overwrite")


def read_names(folder, part):
    """The rows of {part}.csv in the order of the arrays: a list of dicts name, group, label."""
    with open(Path(folder) / f"{part}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check(folder):
    """Read a prepared data set back; ends the program (exit code 1) with a line for each thing that is off."""
    meta, wrong, digest, seen = read_meta(folder), [], hashlib.sha256(), {}
    for part in PARTS:
        (images, masks), rows, size = open_part(folder, part), read_names(folder, part), meta["size"]
        arrays = {"images": (images, (size, size, 3))} | ({} if masks is None else {"masks": (masks, (size, size))})
        for kind, (array, shape) in arrays.items():
            if array.dtype != np.uint8 or array.shape[1:] != shape or not len(rows) == len(array) == meta["counts"][part]:
                wrong.append(f"{part}_{kind}.npy is {array.dtype} {array.shape}, {part}.csv has {len(rows)} rows, meta.json says "
                             f"{meta['counts'][part]} of {shape}")
        share = 0.0
        for row, image in zip(rows, images):
            digest.update(image.tobytes())
            keys = dict(name=row["name"], group=row["group"], picture=hashlib.sha256(image.tobytes()).hexdigest())
            for kind, key in keys.items():
                other, name = seen.setdefault((kind, key), (part, row["name"])) if key else (part, "")
                if other != part:
                    wrong.append(f"the same {kind} in two parts: {name} of {other} and {row['name']} of {part}")
        for row, mask in zip(rows, () if masks is None else masks):
            digest.update(mask.tobytes())
            share += mask.mean() / len(masks)
            if mask.max(initial=0) > 1:
                wrong.append(f"{part}_masks.npy: {row['name']} holds {mask.max()}, not only 0 and 1")
        print(f"{part}: {len(images)} images of {images.shape[1]}x{images.shape[2]} px, {len({r['group'] for r in rows if r['group']})} "
              "groups, " + ("no masks" if masks is None else f"foreground {share:.4f} of the pixels"))
    if digest.hexdigest() != meta["fingerprint"]:
        wrong.append(f"the arrays are not those that were written: fingerprint {digest.hexdigest()}, meta.json has {meta['fingerprint']}")
    if wrong:
        sys.exit("\n".join(f"{folder}: {line}" for line in wrong[:20] + [f"and {len(wrong) - 20} more"] * (len(wrong) > 20)))
    print(f"{folder}: all is well; fingerprint {meta['fingerprint']}")


# ------------------------------------------------------------------------------------------------------------ writing

@contextlib.contextmanager
def only_one(path):
    """Hold a lock, on the file `path`, that ends with the block or with this process, however it ends. Ends the program
    (exit code 75: try again later) where another process has it. Leaves no file, and no folder made for nothing."""
    made = [folder for folder in path.parents if not folder.exists()]
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # unlike flock's, no child can keep it
        except (BlockingIOError, PermissionError):
            print(f"{path.parent}: another process is at work on this", file=sys.stderr)
            sys.exit(75)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break                                               # else its last holder has just removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        for folder in made:
            if not any(folder.iterdir()):
                folder.rmdir()


@contextlib.contextmanager
def new_folder(final):
    """A temporary folder that takes the place of `final` when the block ends well, and is removed when it does not."""
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)                  # of a run that was killed
    try:
        partial.mkdir()
        yield partial
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_npy(path, shape, rows, digest):
    """Stream uint8 rows into a .npy file, never more than one in memory; update the sha256 `digest`."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
        for row in rows:
            data = np.ascontiguousarray(row, dtype=np.uint8).tobytes()
            digest.update(data)
            file.write(data)


def contact_sheet(rows, titles, captions=None, cell=112):
    """A table of pictures, uint8 (H, W, 3) RGB, with a title over each column and a caption under each row.

    rows: lists of uint8 (S, S, 3), masks {0, 1} or bool (S, S) (drawn black and white), or None (left empty).
    """
    line, gap = 18, 4
    row_height = cell + gap + (line if captions else 0)
    sheet = np.full((line + len(rows) * row_height, len(titles) * (cell + gap), 3), 255, np.uint8)

    def write(text, x, y):
        cv2.putText(sheet, text, (x + 2, y + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)

    for i, title in enumerate(titles):
        write(title, i * (cell + gap), 0)
    for k, row in enumerate(rows):
        y = line + k * row_height
        for i, tile in enumerate(row):
            if tile is not None:
                tile = np.array(tile) if tile.ndim == 3 else np.repeat(tile[..., None].astype(np.uint8) * 255, 3, axis=2)
                sheet[y:y + cell, i * (cell + gap):][:, :cell] = resize(tile, cell)
        if captions:
            write(captions[k], 0, y + cell)
    return sheet


def write_preview(folder, foreground):
    """preview.png: image, pseudo-mask and truth side by side, for up to four images of each part."""
    rows, titles = [[], [], [], []], []
    for part in PARTS:
        images, masks = open_part(folder, part)
        titles += [f"{part}: image", "Otsu", "truth" if masks is not None else "no truth"]
        for k, row in enumerate(rows):
            row += ([images[k], otsu_mask(np.array(images[k]), foreground), None if masks is None else masks[k]]
                    if k < len(images) else [None, None, None])
    Image.fromarray(contact_sheet(rows, titles)).save(folder / "preview.png")


def finish(folder, meta, parts, digest):
    """The small files of a data set: {part}.csv, preview.png, and last meta.json."""
    for part in PARTS:
        with open(folder / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["name", "group", "label"], extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(parts[part])
    write_preview(folder, meta["foreground"])
    meta |= dict(counts={part: len(parts[part]) for part in PARTS}, fingerprint=digest.hexdigest())
    (folder / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- demo

def draw_nuclei(size, rng):
    """One picture in the look of stained nuclei, and its true mask: uint8 (S, S, 3), uint8 {0, 1} (S, S)."""
    fine = 4 * size                                             # drawn four times as fine, then averaged down
    glow = cv2.resize(rng.uniform(10, 60, (3, 3)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    light, mask = np.zeros((size, size), np.float32), np.zeros((size, size), bool)
    centres = rng.uniform(0, fine, (rng.integers(2, 6), 2))
    for _ in range(rng.integers(6, 16)):
        centre = centres[rng.integers(len(centres))] + rng.normal(0, 0.13 * fine, 2)    # clumped
        axes = rng.uniform(0.04, 0.085, 2) * fine
        nucleus = np.zeros((fine, fine), np.float32)
        cv2.ellipse(nucleus, tuple(int(c) for c in centre), tuple(int(a) for a in axes), rng.uniform(0, 180), 0, 360, 1, -1)
        nucleus = resize(nucleus, size)
        light = np.maximum(light, nucleus * rng.uniform(50, 140))
        mask |= nucleus >= 0.5
    picture = cv2.GaussianBlur(glow + light, (0, 0), size / 90) + rng.normal(0, 7, (size, size))
    gray = picture.round().clip(0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2), mask.astype(np.uint8)


def prepare_demo(args, final):
    """Draw the demo from the seed; every picture has a generator of its own."""
    size, digest = args.size or 64, hashlib.sha256()
    parts = {part: [dict(name=f"{part}_{i:03d}", group="", label="") for i in range(n)] for part, n in DEMO_COUNTS.items()}
    with new_folder(final) as folder:
        for p, part in enumerate(PARTS):
            n = len(parts[part])
            pairs = [draw_nuclei(size, np.random.default_rng([args.seed, p, i])) for i in range(n)]
            write_npy(folder / f"{part}_images.npy", (n, size, size, 3), (image for image, _ in pairs), digest)
            write_npy(folder / f"{part}_masks.npy", (n, size, size), (mask for _, mask in pairs), digest)
        foreground = args.foreground if args.foreground in ("bright", "dark") else "bright"
        meta = dict(dataset="demo", name=final.name, foreground=foreground, foreground_evidence="drawn so",
                    size=size, seed=args.seed, source="drawn by prepare_data.py", command=args.command)
        finish(folder, meta, parts, digest)


# ------------------------------------------------------------------------------------------- folders and published sets

def start_worker(parent):
    """In a worker: one thread, and an end when the main process is gone, however it went."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    cv2.setNumThreads(0)
    threading.Thread(target=watch, daemon=True).start()


def load_row(job):
    """(pair, row, size, folder) -> ({mask value: pixels}, enclosed_areas, error or None). The image, and the mask where it can
    be made already, go to that row of folder/scratch and folder/scratch_masks: arrays would be slow to send."""
    pair, row, size, folder = job
    image, mask, values, error = load_pair(pair, size)
    if error:
        return {}, None, error
    for name, array in (("scratch", image), ("scratch_masks", mask)):
        if array is not None:
            with open(folder / name, "r+b") as file:
                file.seek(row * array.size)
                file.write(array.tobytes())
    return values, enclosed_areas(image), None


def read_all(pairs, size, folder, pool, bad):
    """Decode every image once (load_row); set each pair's row and areas. Returns {mask value: pixels}."""
    values = collections.Counter()
    for name in ("scratch", "scratch_masks"):
        (folder / name).touch()
    jobs = ((pair, row, size, folder) for row, pair in enumerate(with_arrays(pairs)))
    done = tqdm(pool.imap(load_row, jobs, chunksize=4), "read", len(pairs), unit=" images")
    for row, (pair, (found, areas, error)) in enumerate(zip(pairs, done)):
        if error:
            bad.append(error)
        else:
            pair["row"], pair["areas"] = row, areas
            values.update(found)
    return values


def scratch_rows(path, pairs, shape):
    """The uint8 rows of a scratch file that belong to `pairs`, in their order."""
    size = math.prod(shape)
    with open(path, "rb") as file:
        for pair in pairs:
            file.seek(pair["row"] * size)
            yield np.frombuffer(file.read(size), np.uint8).reshape(shape)


def write_parts(folder, args, size, pairs, pool, values):
    """Write the arrays of a data set that was read; returns the parts, the meta data and the fingerprint's digest."""
    digest = hashlib.sha256()
    parts = {part: [p for p in sorted(pairs, key=lambda p: p["name"]) if p["part"] == part] for part in PARTS}
    if args.dataset == "folder":
        threshold, mask_evidence = decide_mask_threshold(args.mask_foreground, values)
    else:
        mask_evidence = f"above {PUBLISHED[args.dataset]['mask']}, as published"
    if values:
        print(f"mask foreground: {mask_evidence}")
    empty, has_masks = {}, {}

    def masks(part):
        if args.dataset == "folder":
            jobs = ((pair["masks"][0], size, threshold) for pair in parts[part])
            rows = tqdm(pool.imap(load_mask, jobs, chunksize=4), f"{part} masks", len(parts[part]), unit=" masks")
        else:
            rows = scratch_rows(folder / "scratch_masks", parts[part], (size, size))
        for mask in rows:
            empty[part] += not mask.any()
            yield mask

    for part in PARTS:
        n = len(parts[part])
        write_npy(folder / f"{part}_images.npy", (n, size, size, 3),
                  scratch_rows(folder / "scratch", parts[part], (size, size, 3)), digest)
        has_masks[part] = parts[part][0]["masks"] is not None
        if has_masks[part]:
            empty[part] = 0
            write_npy(folder / f"{part}_masks.npy", (n, size, size), masks(part), digest)
            if empty[part]:
                print(f"{part}: {empty[part]} of {n} masks are empty at {size} px")
    foreground, evidence = decide_foreground(args.foreground, [pair["areas"] for pair in parts["train"]])
    print(f"foreground: {foreground} ({evidence})")
    meta = dict(dataset=args.dataset, name=args.name, foreground=foreground, foreground_evidence=evidence, size=size,
                seed=args.seed, source=str(args.raw), has_masks=has_masks, mask_foreground=mask_evidence, empty_masks=empty)
    return parts, meta, digest


def facts_of(args, counts):
    """What meta.json says beyond the arrays: for a folder its groups, for a published data set its licence, its split and
    where its counts differ from the published ones."""
    wide = "16-bit and float images are scaled from their own 0.1 and 99.9 percentiles to 0..255"
    if args.dataset == "folder":
        return dict(group_regex=args.group_regex, wide_values=wide)
    facts = PUBLISHED[args.dataset]
    published = dict(zip(PARTS, facts["counts"]))
    if dict(counts) != published:
        print("warning: the counts are not the published ones: " + ", ".join(
            f"{counts[part]} {part} here, {published[part]} published" for part in PARTS))
    wide = "5 and 95 percentiles of each channel's non-zero pixels" if args.dataset == "tissuenet" else wide
    return dict(page=facts["page"], licence=facts["licence"], published_counts=published, wide_values=wide) | (
        dict(split_by=args.split_by, page_of_slide=args.page) if args.dataset == "dm" else {})


def prepare_images(args, final):
    """Prepare a folder of images, or a published data set. Every bad file is found in one pass; without --skip-bad nothing
    is written then."""
    size, start, bad, raw = args.size or 224, time.time(), [], Path(args.raw)
    if not raw.is_dir():
        sys.exit(f"{raw}: no such folder" + ("" if args.dataset == "folder" else f"; from {PUBLISHED[args.dataset]['page']}"))
    pairs = (find_folder if args.dataset == "folder" else find_published)(raw, args, bad)
    with new_folder(final) as folder, multiprocessing.Pool(initializer=start_worker, initargs=(os.getpid(),)) as pool:
        try:
            values = read_all(pairs, size, folder, pool, bad)
        except ValueError as error:                             # an .npz that breaks off
            sys.exit(str(error))
        bad = list(dict.fromkeys(bad))                          # a bad slide has twelve tiles
        if bad:
            print("\n".join(bad), file=sys.stderr)
            if not args.skip_bad:
                sys.exit(f"{len(bad)} bad file(s) in {args.raw}, listed above; nothing was written. "
                         "Mend them, or leave them out with --skip-bad")
        pairs = [pair for pair in pairs if "row" in pair]
        if any(p["part"] is None for p in pairs):
            (stratify if args.dataset == "xray" else split)(pairs, args.seed)
        counts = collections.Counter(p["part"] for p in pairs)
        if any(not counts[part] for part in PARTS):
            sys.exit(f"{args.raw}: {len(pairs)} usable images in {len({p['group'] or p['name'] for p in pairs})} groups are too few "
                     f"to fill train, val and test ({', '.join(f'{p} {counts[p]}' for p in PARTS)})")
        parts, meta, digest = write_parts(folder, args, size, pairs, pool, values)
        for name in ("scratch", "scratch_masks"):
            (folder / name).unlink()
        finish(folder, meta | facts_of(args, counts) | dict(skipped=bad, command=args.command), parts, digest)
    print(f"{len(pairs) / (time.time() - start):.0f} images per second")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help of every script: the docstring as it is written, and each flag's default."""


def parse_args(argv):
    parser = argparse.ArgumentParser("prepare_data.py", description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=Help)
    add = parser.add_argument
    add("--dataset", required=True, choices=["demo", "folder", *PUBLISHED], help="what to prepare")
    add("--raw", metavar="DIR", help="where the images, or the published files or archives, are")
    add("--name", help="the data set's name under --out; unset: the raw folder's own name, or the published name")
    add("--out", default="data", metavar="DIR", help="where data sets are kept")
    add("--size", type=int, help="side of the pictures in pixels; unset: 224 (the paper's), demo 64")
    add("--seed", type=int, default=0, help="of the split, and of the demo's drawing")
    add("--foreground", choices=["bright", "dark", "auto"], help="what the objects are against their background; unset: "
        "dark for isic and xray, bright for dm, tissuenet, drone and demo, else auto, label-free")
    add("--mask-foreground", default="auto", choices=["auto", "half", "nonzero"],
        help="folder: mask values that count: above half the range, or any but 0")
    add("--group-regex", default=".+", metavar="REGEX", help="folder: the part of a file's stem that names its patient (first "
        "group, or the whole match); a patient's images stay in one part")
    add("--split-by", default="slide", choices=["slide", "patient"], help="dm: what stays whole; the paper's tiles are split by "
        "slide, so that a patient may be in all parts")
    add("--page", type=int, default=0, help="dm: the page of a slide, that is its stain; 0 is DAPI")
    add("--download", action="store_true", help="isic, dsb2018: first fetch the published files into --raw")
    add("--check", action="store_true", help="read a prepared data set back, report what is off; exit code 1 if anything is")
    add("--skip-bad", action="store_true", help="leave bad files out and record them")
    add("--overwrite", action="store_true", help="replace a data set that is already there")
    return parser.parse_args(argv)


def name_unused(args):
    """Say in one line which flags were given that this data set does not use."""
    used = dict(raw=args.dataset != "demo", mask_foreground=args.dataset == "folder", group_regex=args.dataset == "folder",
                split_by=args.dataset == "dm", page=args.dataset == "dm", download=args.dataset in PUBLISHED,
                skip_bad=args.dataset != "demo")
    usual = dict(mask_foreground="auto", group_regex=".+", split_by="slide", page=0)
    given = ["--" + name.replace("_", "-") for name in used if not used[name] and getattr(args, name) not in (usual.get(name), None, False)]
    if given:
        print(f"not used by {args.dataset} and ignored: {', '.join(given)}")


def main(argv=None):
    args = parse_args(argv)
    args.command = shlex.join(["python", "prepare_data.py", *(sys.argv[1:] if argv is None else argv)])
    if args.dataset == "folder" and not (args.raw or args.check and args.name):
        sys.exit("--dataset folder needs --raw DIR, the folder with the images" + (", or --name" if args.check else ""))
    args.name = args.name or (Path(args.raw).resolve().name if args.dataset == "folder" else args.dataset)
    if not re.fullmatch(r"[^./\\][^/\\]*", args.name):
        sys.exit(f"--name {args.name!r} cannot be a folder's name here")
    if args.size is not None and args.size < 16:
        sys.exit(f"--size {args.size} is too small: at least 16")
    if args.page < 0 or args.seed < 0:
        sys.exit("--page and --seed count from 0")
    try:
        re.compile(args.group_regex)
    except re.error as error:
        sys.exit(f"--group-regex {args.group_regex!r} is not a regular expression: {error}")
    final = Path(args.out) / args.name
    if args.check:
        return check(final)
    name_unused(args)
    args.foreground = args.foreground or PUBLISHED.get(args.dataset, {}).get("foreground", "auto")
    args.raw = args.raw or (f"raw/{args.dataset}" if args.download else None)
    if args.dataset != "demo" and not args.raw:
        sys.exit(f"--dataset {args.dataset} needs --raw DIR, the folder with the published files; from "
                 f"{PUBLISHED[args.dataset]['page']}")
    with only_one(final.with_name(f".{args.name}.lock")):
        if final.exists() and not args.overwrite:
            sys.exit(f"{final} is already there: nothing done; --overwrite replaces it")
        if args.download and args.dataset in PUBLISHED:
            fetch(args)
        (prepare_demo if args.dataset == "demo" else prepare_images)(args, final)
    meta = json.loads((final / "meta.json").read_text(encoding="utf-8"))
    print(f"{final}: " + ", ".join(f"{n} {part}" for part, n in meta["counts"].items())
          + f", {meta['size']} px, foreground {meta['foreground']}; look at {final / 'preview.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:               # a full disk, a forbidden folder, Ctrl-C
        sys.exit(f"prepare_data.py: {error or 'interrupted'}; nothing half-written is left")
