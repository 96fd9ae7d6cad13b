"""Turn raw images into arrays that training maps into memory: data/<name>/.

    python prepare_data.py --dataset demo
    python prepare_data.py --dataset folder --raw my_images --size 224

`demo` draws a small set of stained nuclei. `folder` takes images/ and, if there, masks/ with the same stems (or the
images straight inside, or train/ val/ test/ sub-folders of that form; an optional labels.csv has name,label).

Writes data/<name>/{train,val,test}_images.npy, uint8 (N, S, S, 3) RGB; {...}_masks.npy, uint8 {0, 1} (N, S, S), where
there are masks; {...}.csv (name, group, label); meta.json; preview.png.
"""

import argparse
import collections
import contextlib
import csv
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

PARTS = ("train", "val", "test")
EXTENSIONS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
DEMO_COUNTS = {"train": 64, "val": 16, "test": 32}


# ---------------------------------------------------------------------------------------------------- reading files

def read_pixels(path, palette_index=False):
    """The pixels of an image file as stored, EXIF rotation applied: (H, W) or (H, W, 3 or 4), uint8, wider, or bool.

    Palette files give colours; with palette_index their indices, unless index 0 is another colour than black. Raises
    ValueError with the reason for a file that cannot be read to its end.
    """
    if os.path.getsize(path) == 0:
        raise ValueError("the file is empty")
    try:
        with Image.open(path) as image:
            deep_colour = ";16" in str(image.tile)              # Pillow keeps only 8 bits of 16-bit colour
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode == "P" and not (palette_index and image.getpalette()[:3] == [0, 0, 0]):
                image = image.convert("RGB")
            elif image.mode not in ("1", "L", "P", "RGB", "RGBA", "F") and not image.mode.startswith("I"):
                image = image.convert("L" if image.mode in ("LA", "La") else "RGB")     # alpha is dropped, not blended
            pixels = np.asarray(image)
    except UnidentifiedImageError:
        raise ValueError("not an image, or of a kind that cannot be read") from None
    except Exception as error:                                  # Pillow raises OSError, SyntaxError, struct.error, ...
        raise ValueError(f"cannot be read: {error}") from None
    if deep_colour and pixels.ndim == 3:
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)[..., 2::-1]
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError("holds values that are not finite")
    return pixels


def read_image(path):
    """An image file as uint8 (H, W, 3) RGB. Gray is repeated; alpha is dropped; more than 8 bits, or floats, are
    scaled from their 0.1 and 99.9 percentiles to 0 and 255. Raises ValueError with the reason."""
    pixels = read_pixels(path)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype != np.uint8:
        low, high = np.percentile(pixels, (0.1, 99.9))
        if high <= low:                                         # nearly all pixels alike: the full range, then
            low, high = float(pixels.min()), max(float(pixels.max()), float(pixels.min()) + 1)
        pixels = ((pixels.astype(np.float64) - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return np.array(pixels[..., :3], order="C")                 # a copy: what Pillow gives is read-only


def read_mask(path):
    """A mask file as int32 (H, W), the values as stored: colours by their largest channel, palettes by their index
    (by colour where index 0 is not black), floats up to 1 times 255. Raises ValueError with the reason."""
    pixels = read_pixels(path, palette_index=True)
    if pixels.ndim == 3:
        pixels = pixels[..., :3].max(axis=2)
    if pixels.dtype.kind == "f":
        pixels = (pixels * (255 if pixels.max() <= 1 else 1)).round()
    return pixels.astype(np.int32)


def resize(picture, size):
    """(H, W) or (H, W, 3) -> (size, size[, 3]): mean over the covered area to shrink, bilinear to enlarge."""
    shrink = picture.shape[0] >= size and picture.shape[1] >= size
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)


def load_pair(job):
    """(image path, mask path or None, size) -> (image uint8 (S, S, 3), {mask value: pixels}, error or None)."""
    image_path, mask_path, size = job
    path = image_path
    try:
        image = read_image(path)
        values = {}
        if mask_path:
            path = mask_path
            mask = read_mask(path)
            if mask.shape != image.shape[:2]:
                raise ValueError(f"the mask is {mask.shape[1]}x{mask.shape[0]}, its image "
                                 f"{image.shape[1]}x{image.shape[0]}")
            values = dict(zip(*(a.tolist() for a in np.unique(mask, return_counts=True))))
        return resize(image, size), values, None
    except (ValueError, OSError) as error:
        return None, {}, f"{path}: {error}"


def load_mask(job):
    """(mask path, size, threshold) -> uint8 {0, 1} (S, S): foreground where at least half the area is above."""
    path, size, threshold = job
    return (resize((read_mask(path) > threshold).astype(np.float32), size) >= 0.5).astype(np.uint8)


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


def decide_foreground(asked, images, pool):
    """"bright" or "dark" for the whole data set, and the evidence. images: the training images, uint8 (S, S, 3)."""
    if asked != "auto":
        return asked, "set by --foreground"
    areas = np.array(list(pool.imap(enclosed_areas, images, chunksize=8)))             # (N, 2)
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
    """The images of one folder, with their masks if it has masks/: a list of dicts name, image, mask, part."""
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
            pairs.append(dict(name=name, image=path, mask=masks[name] if masks else None, part=part))
    return pairs


def find_folder(raw, group_regex, bad):
    """All images below --raw, as find_pairs lists them, with group and label added."""
    if not raw.is_dir():
        sys.exit(f"{raw}: no such folder")
    given = [part for part in PARTS if (raw / part).is_dir()]
    if given and len(given) < len(PARTS):
        sys.exit(f"{raw}: has {', '.join(given)} but not {', '.join(p for p in PARTS if p not in given)}; "
                 "give all three, or images/ to be split here")
    pairs = [pair for part in given for pair in find_pairs(raw / part, part, bad)] or find_pairs(raw, None, bad)
    labels = {}
    if (raw / "labels.csv").is_file():
        with open(raw / "labels.csv", newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"name", "label"} <= set(rows.fieldnames or ()):
                sys.exit(f"{raw / 'labels.csv'}: needs the columns name and label")
            labels = {row["name"]: row["label"] for row in rows}
    matched = []
    for pair in pairs:
        match = group_regex.search(pair["name"])
        if match:
            label = labels.get(pair["name"], labels.get(pair["image"].name, ""))
            matched.append(pair | dict(group=match.group(1 if group_regex.groups else 0), label=label))
        else:
            bad.append(f"{pair['image']}: the name does not match --group-regex {group_regex.pattern}")
    return matched


def split(pairs, seed):
    """Set the part of every pair: groups in seeded order, cut at int(.7 n) and int(.8 n) images; a group that a cut
    falls into stays whole. Without groups of several images that is the shuffled names, cut there."""
    groups = collections.defaultdict(list)
    for pair in sorted(pairs, key=lambda p: p["name"]):
        groups[pair["group"]].append(pair)
    order = np.random.default_rng(seed).permutation(sorted(groups)).tolist()
    done, n = 0, len(pairs)
    for group in order:
        part = "train" if done < int(0.7 * n) else "val" if done < int(0.8 * n) else "test"
        for pair in groups[group]:
            pair["part"] = part
        done += len(groups[group])


# --------------------------------------------------------------------------------------------------- reading them back

def read_meta(folder):
    """The meta.json of a prepared data set, a dict; ends the program with one line where there is none."""
    try:
        return json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        name = Path(folder).name
        sys.exit(f"{folder} is not prepared: run python prepare_data.py "
                 + ("--dataset demo" if name == "demo" else f"--dataset folder --raw DIR --name {name}"))


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
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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
        if final.exists():
            old = final.with_name(f".{final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old)
        else:
            partial.rename(final)
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


# ------------------------------------------------------------------------------------------------------------- folder

def read_all(pairs, size, scratch, pool, bad):
    """Decode every image once into `scratch`, row after row; set each pair's row. Returns {mask value: pixels}."""
    values, good = collections.Counter(), 0
    jobs = [(pair["image"], pair["mask"], size) for pair in pairs]
    with open(scratch, "wb") as file:
        for pair, (image, found, error) in zip(pairs, tqdm(pool.imap(load_pair, jobs, chunksize=4), "read", len(jobs),
                                                           unit=" images")):
            if error:
                bad.append(error)
                continue
            file.write(image.tobytes())
            pair["row"], good = good, good + 1
            values.update(found)
    return values


def write_folder(folder, args, size, pairs, pool, values):
    """Write the arrays of a `folder` data set; returns the parts, the meta data and the fingerprint's digest."""
    digest, row_bytes = hashlib.sha256(), size * size * 3
    parts = {part: [p for p in sorted(pairs, key=lambda p: p["name"]) if p["part"] == part] for part in PARTS}
    threshold, mask_evidence = decide_mask_threshold(args.mask_foreground, values)
    if values:
        print(f"mask foreground: {mask_evidence}")
    empty, has_masks = {}, {}

    def rows(part):
        with open(folder / "scratch", "rb") as file:
            for pair in parts[part]:
                file.seek(pair["row"] * row_bytes)
                yield np.frombuffer(file.read(row_bytes), np.uint8).reshape(size, size, 3)

    def masks(part):
        jobs = [(pair["mask"], size, threshold) for pair in parts[part]]
        for mask in tqdm(pool.imap(load_mask, jobs, chunksize=4), f"{part} masks", len(jobs), unit=" masks"):
            empty[part] += not mask.any()
            yield mask

    for part in PARTS:
        n = len(parts[part])
        write_npy(folder / f"{part}_images.npy", (n, size, size, 3), rows(part), digest)
        has_masks[part] = parts[part][0]["mask"] is not None
        if has_masks[part]:
            empty[part] = 0
            write_npy(folder / f"{part}_masks.npy", (n, size, size), masks(part), digest)
            if empty[part]:
                print(f"{part}: {empty[part]} of {n} masks are empty at {size} px")
    foreground, evidence = decide_foreground(args.foreground or "auto", rows("train"), pool)
    print(f"foreground: {foreground} ({evidence})")
    meta = dict(dataset="folder", name=args.name, foreground=foreground, foreground_evidence=evidence, size=size,
                seed=args.seed, source=str(args.raw), has_masks=has_masks, mask_foreground=mask_evidence,
                empty_masks=empty, group_regex=args.group_regex, wide_values="16-bit and float images are scaled from "
                "their own 0.1 and 99.9 percentiles to 0..255", command=args.command)
    return parts, meta, digest


def prepare_folder(args, final):
    """Prepare any folder of images. Every bad file is found in one pass; without --skip-bad nothing is written then."""
    size, start, bad = args.size or 224, time.time(), []
    pairs = find_folder(Path(args.raw), re.compile(args.group_regex), bad)
    with new_folder(final) as folder, multiprocessing.Pool(initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        values = read_all(pairs, size, folder / "scratch", pool, bad)
        if bad:
            print("\n".join(bad), file=sys.stderr)
            if not args.skip_bad:
                sys.exit(f"{len(bad)} bad file(s) in {args.raw}, listed above; nothing was written. "
                         "Mend them, or leave them out with --skip-bad")
        pairs = [pair for pair in pairs if "row" in pair]
        if any(p["part"] is None for p in pairs):
            split(pairs, args.seed)
        counts = collections.Counter(p["part"] for p in pairs)
        if any(not counts[part] for part in PARTS):
            sys.exit(f"{args.raw}: {len(pairs)} usable images in {len({p['group'] for p in pairs})} groups are too few "
                     f"to fill train, val and test ({', '.join(f'{p} {counts[p]}' for p in PARTS)})")
        parts, meta, digest = write_folder(folder, args, size, pairs, pool, values)
        (folder / "scratch").unlink()
        finish(folder, meta | dict(skipped=bad), parts, digest)
    print(f"{len(pairs) / (time.time() - start):.0f} images per second")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help of every script: the docstring as it is written, and each flag's default."""


def parse_args(argv):
    parser = argparse.ArgumentParser("prepare_data.py", description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=Help)
    parser.add_argument("--dataset", required=True, choices=["demo", "folder"], help="what to prepare")
    parser.add_argument("--raw", metavar="DIR", help="folder: where the images are")
    parser.add_argument("--name", help="the data set's name under --out; unset: the raw folder's own name")
    parser.add_argument("--out", default="data", metavar="DIR", help="where data sets are kept")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels; unset: 224 (the paper's), demo 64")
    parser.add_argument("--seed", type=int, default=0, help="of the split, and of the demo's drawing")
    parser.add_argument("--foreground", choices=["bright", "dark", "auto"],
                        help="what the objects are against their background; unset: auto, label-free; demo bright")
    parser.add_argument("--mask-foreground", default="auto", choices=["auto", "half", "nonzero"],
                        help="folder: mask values that count: above half the range, or any but 0")
    parser.add_argument("--group-regex", default=".+", metavar="REGEX", help="folder: the part of a file's stem that "
                        "names its patient (first group, or the whole match); a patient's images stay in one part")
    parser.add_argument("--skip-bad", action="store_true", help="folder: leave bad files out and record them")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is already there")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.command = shlex.join(["python", "prepare_data.py", *(sys.argv[1:] if argv is None else argv)])
    if args.dataset == "folder" and not args.raw:
        sys.exit("--dataset folder needs --raw DIR, the folder with the images")
    args.name = args.name or ("demo" if args.dataset == "demo" else Path(args.raw).resolve().name)
    if not re.fullmatch(r"[^./\\][^/\\]*", args.name):
        sys.exit(f"--name {args.name!r} cannot be a folder's name here")
    if args.size is not None and args.size < 16:
        sys.exit(f"--size {args.size} is too small: at least 16")
    try:
        re.compile(args.group_regex)
    except re.error as error:
        sys.exit(f"--group-regex {args.group_regex!r} is not a regular expression: {error}")
    final = Path(args.out) / args.name
    with only_one(final.with_name(f".{args.name}.lock")):
        if final.exists() and not args.overwrite:
            sys.exit(f"{final} is already there: nothing done; --overwrite replaces it")
        (prepare_demo if args.dataset == "demo" else prepare_folder)(args, final)
    meta = json.loads((final / "meta.json").read_text(encoding="utf-8"))
    print(f"{final}: " + ", ".join(f"{n} {part}" for part, n in meta["counts"].items())
          + f", {meta['size']} px, foreground {meta['foreground']}; look at {final / 'preview.png'}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:               # a full disk, a forbidden folder, Ctrl-C
        sys.exit(f"prepare_data.py: {error or 'interrupted'}; nothing half-written is left")
