"""Turn raw images into arrays that training maps into memory: data/<name>/.

    python prepare_data.py --dataset demo
    python prepare_data.py --dataset folder --raw my_images --size 224
    python prepare_data.py --dataset isic --raw raw/isic --download
    python prepare_data.py --dataset isic --check

demo draws a small set of stained nuclei. folder takes any folder of images, sub-folders included:
masks stand in masks/, labels/, gt/ ... under the names of their images, or are called NAME_mask;
train/, val/ and test/ are kept as the parts; an optional labels.csv has name,label. dm, tissuenet,
isic, xray, drone and dsb2018 take the files as their authors publish them, extracted or not.

Writes data/<name>/{train,val,test}_images.npy, uint8 (N, S, S, 3) RGB; {...}_masks.npy, uint8
{0, 1} (N, S, S), where there are masks; {...}.csv (name, group, label); meta.json; preview.png.
"""

import argparse
import collections
import contextlib
import csv
import fcntl
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from tqdm import tqdm

PARTS = ("train", "val", "test")
EXTENSIONS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom"}
VOLUMES = {".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".mgz", ".npy", ".npz", ".h5"}
IMAGE_FOLDERS = {"image", "images", "img", "imgs", "imagestr", "imagests"}
MASK_WORD = "masks?|labels?|gt|ground[ _-]?truths?|annotations?|segmentations?|segs?|manual"
MASK_FOLDER = re.compile(                       # masks, lung_masks, labelsTr, gt_val, 1st_manual
    rf"({MASK_WORD}|.+[ _-](masks?|gt|ground[ _-]?truths?|manual))([ _-]?(tr|ts|train|val|test))?",
    re.IGNORECASE)
MASK_NAME = re.compile(                         # NAME_mask, NAME-seg, NAME_mask_2
    rf"(.*[^/])[ _.-]({MASK_WORD}|lesion|binary)([ _.-]?\d+)?", re.IGNORECASE)
MASK_FIRST = re.compile(rf"(.*/)?({MASK_WORD})([ _.-][^/]*)?", re.IGNORECASE)      # mask_NAME
PART_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val",
              "validation": "val", "test": "test", "testing": "test"}
DEMO_COUNTS = {"train": 64, "val": 16, "test": 32}
TILE = 480                                      # side of a tile of a dm slide (section 3.1)

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)     # an error at twice
warnings.filterwarnings("ignore", module="pydicom")             # of what it can read all the same
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)     # errors are raised as well


@dataclass
class Published:
    """What the paper or the authors say of a data set. counts: train, val, test; above: the value
    above which a mask pixel is foreground; inside: folders that --raw may name instead of the one
    that holds them; files: what --download fetches, where no account is needed."""
    foreground: str
    above: int
    counts: tuple
    licence: str
    page: str
    inside: str = "-"
    files: tuple = ()


PUBLISHED = {
    "dm": Published(
        "bright", 0, (1656, 240, 480), "from its authors", "the authors of Van Buren et al. 2022 "
        "(J. Immunol. Methods), https://doi.org/10.1016/j.jim.2022.113233", "CD27[^/]*|Labels.*"),
    "tissuenet": Published(
        "bright", 0, (2580, 3140, 1249), "modified Apache 2.0, non-commercial",
        "https://datasets.deepcell.org/data (free account)"),
    "isic": Published(
        "dark", 127, (2000, 150, 600), "CC0", "https://challenge.isic-archive.com/data/#2017",
        "ISIC-2017_[^/]*",
        [f"https://isic-challenge-data.s3.amazonaws.com/2017/ISIC-2017_{part}_{what}"
         for part in ("Training", "Validation", "Test_v2")
         for what in ("Data.zip", "Part1_GroundTruth.zip", "Part3_GroundTruth.csv")]),
    "xray": Published(
        "dark", 127, (14730, 2202, 4233), "of each source; see the page", "https://www.kaggle.com/"
        "datasets/tawsifurrahman/covid19-radiography-database (free account)",
        "(COVID|Lung_Opacity|Normal|Viral Pneumonia)(/images|/masks)?"),
    "drone": Published(
        "bright", 0, (280, 40, 80), "research and education, non-commercial",
        "http://dronedataset.icg.tugraz.at (or the Semantic Drone Dataset on Kaggle, free account)",
        "original_images|label_images_semantic|RGB_color_image_masks|training_set.*"),
    "dsb2018": Published(
        "auto", 0, (469, 67, 134), "CC0", "https://bbbc.broadinstitute.org/BBBC038",
        files=["https://data.broadinstitute.org/bbbc/BBBC038/stage1_train.zip"]),
}


# ---------------------------------------------------------------------------------- reading files

@dataclass
class Picture:
    """One page of an image file. pixels: gray (H, W), bool or numbers; or (H, W, 2, 3 or 4), gray
    and alpha, RGB, RGB and alpha; values as stored. The readers below leave orientation (the number
    of EXIF and TIFF) and white_is_zero to read_picture."""
    pixels: np.ndarray
    pages: int = 1                              # of the file
    orientation: int = 1
    white_is_zero: bool = False
    patient: str = ""                           # DICOM: a hash of the patient's id


def read_picture(path, page=0, as_mask=False):
    """Read one page of an image file: a Picture, upright, with bright as the larger value.

    Pillow reads png, jpg, bmp and webp; for TIFF and DICOM see read_tiff and read_dicom. as_mask:
    keep the stored values of DICOM, and the indices of palettes that start with black and hold
    colours. Raises ValueError with the reason where a file cannot be read to its end, or rightly.
    """
    try:
        with open(path, "rb") as file:          # Pillow misreads some turned TIFFs given by path
            head = file.read(132)
            file.seek(0)
            if not head:
                raise ValueError("the file is empty")
            if head[128:] == b"DICM" or Path(path).suffix.lower() in (".dcm", ".dicom"):
                picture = read_dicom(file, page, as_mask)
            elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                picture = read_tiff(file, page, as_mask)
            else:
                picture = read_with_pillow(file, page, as_mask)
    except UnidentifiedImageError:
        raise ValueError("not an image, or of a kind that cannot be read") from None
    except ValueError:
        raise
    except Exception as error:                  # Pillow raises OSError, SyntaxError, struct.error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"cannot be read: {reason}") from None
    pixels = picture.pixels
    is_float = pixels.dtype.kind == "f"
    if pixels.dtype.kind not in "buif":
        raise ValueError(f"holds {pixels.dtype} values, which cannot be shown")
    if is_float and not np.isfinite(pixels).all():
        raise ValueError("holds values that are not finite")
    if picture.white_is_zero:
        pixels = max(1, pixels.max()) - pixels if is_float else ~pixels
    if picture.orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if picture.orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if picture.orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    picture.pixels = pixels
    return picture


def require_page(page, pages):
    """Raise ValueError where a file with so many pages has no such page."""
    if page >= pages:
        raise ValueError(f"has no page {page}: it has {pages}, counted from 0")


def read_with_pillow(file, page, as_mask):
    """Read an open file with Pillow, or with OpenCV where Pillow would cut 16-bit colour to 8."""
    with Image.open(file) as image:
        pages = getattr(image, "n_frames", 1)
        require_page(page, pages)
        image.seek(page)
        is_deep = ";16" in str(image.tile)
        orientation = image.getexif().get(274, 1)
        if image.format == "TIFF":
            orientation = 1                     # Pillow and OpenCV turn TIFFs, and nothing else
        image.load()
        if image.mode == "P" and not (as_mask and has_class_palette(image)):
            image = image.convert("RGB")
        elif image.mode in ("PA", "RGBa", "La"):
            image = image.convert("LA" if image.mode == "La" else "RGBA")
        elif image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
            image = image.convert("RGB")
        pixels = np.asarray(image)
    if is_deep and pixels.ndim == 3:
        file.seek(0)
        data = np.frombuffer(file.read(), np.uint8)
        _, decoded = cv2.imdecodemulti(data, cv2.IMREAD_UNCHANGED)
        if page >= len(decoded) or decoded[page].dtype != np.uint16:
            raise ValueError("16-bit colour that OpenCV cannot read")
        pixels = decoded[page][..., [2, 1, 0, 3][:decoded[page].shape[2]]]
    return Picture(pixels, pages, orientation)


def has_class_palette(image):
    """Whether a Pillow image of mode P holds class numbers, not colours or grays: its palette
    starts with black, and its used entries are not all gray."""
    palette = np.zeros((256, 3), np.uint8)
    colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
    palette[:len(colours)] = colours
    used = palette[np.unique(np.asarray(image))]
    return not palette[0].any() and bool((used != used[:, :1]).any())


def read_tiff(file, page, as_mask):
    """Read an open TIFF with Pillow where it reads that kind rightly, else with tifffile.

    Gray, RGB (three channels of gray count as RGB), palette, CMYK and YCbCr, with alpha or without.
    Raises ValueError that names the kind ("float64", "5 channels") where neither can read it.
    """
    tags, pages = read_tiff_tags(file, page)
    bits = np.atleast_1d(tags.get(258, 1)).tolist()
    sample_format = np.atleast_1d(tags.get(339, 1)).tolist()[0]
    kind = {2: "int", 3: "float", 5: "complex int", 6: "complex"}.get(sample_format, "uint")
    kind += str(bits[0])
    photometric = tags.get(262, 0)              # 0 and 1 gray, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr
    orientation = tags.get(274, 1)
    channels = tags.get(277, len(bits))
    colours = {2: 3, 5: 4, 6: 3, 8: 3}.get(photometric, 1)
    has_alpha = colours == 3 or np.atleast_1d(tags.get(338, ())).tolist() in ([1], [2])
    like_rgb = photometric == 1 and channels == 3
    if not (channels == colours or channels == colours + 1 and has_alpha or like_rgb):
        raise ValueError(f"a TIFF of {channels} channels ({kind}), neither gray nor colour")

    in_planes = tags.get(284, 1) == 2
    trusted = kind in ("uint1", "uint2", "uint4", "uint8") and not like_rgb
    trusted = trusted and not (in_planes and channels > colours)
    if channels == 1 and not trusted:
        is_little = tags.prefix == b"II" and kind in ("uint32", "int16", "int32", "float32")
        trusted = is_little or kind in ("uint12", "uint16")
    elif kind == "uint16" and photometric == 2:
        trusted = orientation == 1 and not in_planes
    if trusted:
        with contextlib.suppress(UnidentifiedImageError, ValueError):
            file.seek(0)
            picture = read_with_pillow(file, page, as_mask)
            if kind == "uint32":                # Pillow has no such mode
                picture.pixels = picture.pixels.view(np.uint32)
            picture.white_is_zero = photometric == 0 and bits[0] > 8       # Pillow inverts the rest
            return picture

    try:
        import tifffile
    except ImportError:
        raise ValueError(f"a TIFF of {kind}, {channels} channel(s), orientation {orientation}: pip "
                         "install tifffile to read it") from None
    if photometric not in (0, 1, 2):
        raise ValueError(f"a TIFF of {kind} with photometric interpretation {photometric}")
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        pixels = tiff.pages[page].asarray()
        axes = tiff.pages[page].axes
    if axes == "SYX":                           # separate planes
        pixels = np.moveaxis(pixels, 0, -1)
    elif axes not in ("YX", "YXS"):
        raise ValueError(f"a TIFF with the axes {axes}, not one picture a page")
    return Picture(pixels, pages, orientation, photometric == 0)


def read_tiff_tags(file, page):
    """Return the tags of a page, a mapping by number, and the number of pages of an open TIFF."""
    head = file.read(8)
    if head[:4] == b"MM\0+":
        raise ValueError("a big-endian BigTIFF: save it as little-endian or as plain TIFF")
    if head[2:3] == b"+":                       # BigTIFF
        head += file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head)
    offsets, of_page = [], None
    while tags.next and tags.next not in offsets:
        offsets.append(tags.next)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(offsets[-1])
        tags.load(file)
        if len(offsets) == page + 1:
            of_page = tags
    pages = len(offsets)
    stack = re.match(r"ImageJ=[\s\S]*\bimages=(\d+)", str(tags.get(270, "")))
    if stack and pages == 1:                    # ImageJ gives a large stack the tags of one page
        pages = int(stack[1])
    require_page(page, pages)
    if of_page is None:
        raise ValueError("an ImageJ stack without pages of its own: save its slices as files")
    return of_page, pages


def read_dicom(file, page, as_mask):
    """Read one frame of an open DICOM file with pydicom. Modality and colour lookup tables are
    applied, and but for masks the first VOI lookup table or window."""
    try:
        import pydicom
        from pydicom import pixels as dicom
    except ImportError:
        raise ValueError("a DICOM file: pip install pydicom (3 or newer) to read it") from None
    ds = pydicom.dcmread(file, force=True)      # some lack the mark DICM
    if "Rows" not in ds:
        raise ValueError("not a DICOM file with an image")
    pages = int(ds.get("NumberOfFrames") or 1)
    require_page(page, pages)
    pixels = dicom.pixel_array(ds, index=page)
    per_frame = list(ds.get("PerFrameFunctionalGroupsSequence") or ())[page:page + 1]
    for group in [*(ds.get("SharedFunctionalGroupsSequence") or ()), *per_frame]:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(name) or ():
                ds.update(item)                 # where enhanced files keep slope and window
    photometric = ds.PhotometricInterpretation
    if photometric == "MONOCHROME1" and as_mask:
        raise ValueError("a MONOCHROME1 mask, whose foreground is not clear: save it as png")
    if photometric == "PALETTE COLOR":
        pixels = dicom.apply_color_lut(pixels, ds)
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
    elif photometric.startswith("MONOCHROME") and not as_mask:
        pixels = dicom.apply_modality_lut(pixels, ds)
        if ds.get("VOILUTSequence"):
            ends = (0, 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1)
            pixels = to_eight_bits(dicom.apply_voi_lut(pixels, ds), ends)
        elif ds.get("WindowCenter") is not None and ds.get("WindowWidth"):
            ends = dicom.apply_voi_lut(np.array([-1e9, 1e9]), ds)       # of darkest and brightest
            pixels = to_eight_bits(dicom.apply_voi_lut(pixels, ds), ends)
    patient = str(ds.get("PatientID") or "").strip()
    if patient:
        patient = hashlib.sha256(patient.encode()).hexdigest()[:12]
    return Picture(pixels, pages, white_is_zero=photometric == "MONOCHROME1", patient=patient)


def to_eight_bits(pixels, ends=None):
    """Scale numbers of any type to uint8: `ends`, two values, become 0 and 255; unset: the 0.1 and
    99.9 percentiles. Where these are equal the smallest and largest value do."""
    pixels = pixels.astype(np.float64)
    low, high = np.percentile(pixels, (0.1, 99.9)) if ends is None else ends
    if high == low:
        low = pixels.min()
        high = max(pixels.max(), low + 1)
    return ((pixels - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)


def to_rgb(picture):
    """Picture -> uint8 (H, W, 3). Gray is repeated; alpha is dropped, not blended; more than 8 bits
    are scaled by to_eight_bits, all channels alike."""
    pixels = picture.pixels
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    if pixels.dtype != np.uint8:
        pixels = to_eight_bits(pixels)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return np.array(pixels, order="C")          # a copy: Pillow's array cannot be written to


def read_image(path, page=0):
    """Read an image file as uint8 (H, W, 3) RGB, as a viewer shows it; see read_picture."""
    return to_rgb(read_picture(path, page))


def resize(picture, size):
    """(H, W) or (H, W, 3) -> (size, size[, 3]): mean over the covered area to shrink, bilinear to
    enlarge."""
    shrinks = min(picture.shape[:2]) >= size
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(picture, (size, size), interpolation=how)


# ------------------------------------------------------------------------------------------ masks

@dataclass
class Mask:
    """A mask file. values: (H, W) integers, or floats that are not whole; kind: see kind_of; top:
    the largest value; span: the range in which it lies, up to 1, 255, 65535 or more."""
    path: str
    values: np.ndarray
    kind: str
    top: float
    span: float
    is_alpha: bool


def read_mask(path, page=0):
    """Read a mask file; one with a single page serves any `page`. Raises ValueError.

    Values stay as stored, but bool becomes 0 and 255. Of colours the largest channel counts; of
    palettes see read_picture; the alpha channel counts where it alone varies.
    """
    picture = read_picture(path, as_mask=True)
    if page and picture.pages > 1:
        picture = read_picture(path, page, as_mask=True)
    values = picture.pixels
    is_alpha = False
    if values.ndim == 3 and values.shape[2] in (2, 4):
        alpha, values = values[..., -1], values[..., :-1]
        is_flat = (values == values[0, 0]).all()
        is_alpha = bool(is_flat and (alpha.min() < alpha.max() or not alpha.any()))
        if is_alpha:
            values = alpha
    if values.ndim == 3:
        values = values.max(axis=2)
    if values.dtype == bool:
        values = values * np.uint8(255)
    is_whole = values.dtype.kind != "f" or (values == np.rint(values)).all()
    if is_whole and values.dtype not in (np.uint8, np.uint16):
        values = values.astype(np.float64).clip(-2 ** 62, 2 ** 62).astype(np.int64)
    kind = "soft edges"
    if is_whole:
        kind = kind_of(values, Path(path).suffix.lower() in (".jpg", ".jpeg"))
    top = values.max()
    spans = (255, 65535, math.inf) if is_whole and kind != "0/1" else (1, 255, 65535, math.inf)
    span = next(span for span in spans if top <= span)
    return Mask(str(path), np.ascontiguousarray(values), kind, top, span, is_alpha)


def kind_of(values, is_jpg):
    """Say what the integers (H, W) of a mask are.

    "empty"; "0/1"; "0/255" or another "two values"; "classes and 255"; "soft edges", more than two
    values between background and foreground that lie on slopes, as in resized, blurred and jpg
    masks; "classes" (below 32), "numbers" (of classes or instances) or "levels" (of a jpg), which
    do not; else "few values".
    """
    found = np.unique(values)
    top = found[-1]
    inner = found[(found > 0) & (found < top)]
    if found[0] == top == 0:
        return "empty"
    if top == 1 and not is_jpg:                 # in a jpg a 1 is noise
        return "0/1"
    if not inner.size:
        return "0/255" if top == 255 else "two values"
    if top == 255 and inner[-1] < 32 and not is_jpg:
        return "classes and 255"
    if top > 65535 or found[0] < 0:
        return "numbers"
    values = values.astype(np.uint16)
    margin = 0.2 * top if is_jpg else 0         # where jpg leaves noise
    between = (values > margin) & (values < top - margin)
    square = np.ones((3, 3), np.uint8)
    on_slope = (cv2.erode(values, square) < values) & (values < cv2.dilate(values, square))
    # Of masks of nuclei, histology, skin and X-rays: .58 to 1 in soft masks, 0 to .07 of instances.
    if (on_slope & between).sum() < 0.5 * between.sum():
        return "levels" if is_jpg else "classes" if top < 32 else "numbers"
    return "soft edges" if is_jpg or top >= 64 and inner.size > 2 else "few values"


@dataclass
class MaskRule:
    """What is foreground in the masks of a data set: one of `values`; where these are unset, what
    is above cuts[Mask.span], or with `inverted` what is not; but never `ignored`."""
    values: tuple = ()
    cuts: dict = field(default_factory=dict)
    inverted: bool = False
    ignored: int | None = None
    evidence: str = ""


# Kinds of masks that one data set cannot have together, or ("levels") at all.
CONFLICTS = (("levels", "levels"), ("0/255", "classes"), ("0/255", "classes and 255"),
             ("soft edges", "classes"), ("soft edges", "classes and 255"),
             ("soft edges", "numbers"))


def decide_mask_rule(asked, masks):
    """Return the MaskRule of a data set from --mask-foreground and all its Masks (values unused).

    auto: above half of the range where there are soft edges, else all but 0; zero: the inverse.
    Raises ValueError with an example of each kind where one rule cannot read all files.
    """
    if asked[0].isdigit():
        return MaskRule(tuple(map(int, asked.split(","))), evidence=f"the values {asked}")
    kinds, example, tops = collections.Counter(), {}, {}
    for mask in masks:
        kinds[mask.kind] += 1
        example.setdefault(mask.kind, mask.path)
        tops[mask.span] = max(tops.get(mask.span, 0), mask.top)
    listed = ", ".join(f"{n} with {kind}" for kind, n in sorted(kinds.items()))
    rule = MaskRule(inverted=asked == "zero")
    half = asked == "half"
    if asked in ("auto", "zero"):
        for one, other in CONFLICTS:
            if one in kinds and other in kinds:
                raise ValueError(
                    f"masks: {listed}; {example[one]} has {one}, {example[other]} {other}: say "
                    "what is foreground, --mask-foreground half, nonzero, or a list such as 1,255")
        half = "soft edges" in kinds
        rule.ignored = 255 if "classes and 255" in kinds else None
    for span, top in tops.items():
        rule.cuts[span] = max(top, span == 1) / 2 if half else 0
    cuts = " or ".join(f"{cut:g}" for cut in rule.cuts.values())
    rule.evidence = f"{'not ' * rule.inverted}above {cuts} ({asked}; masks: {listed})"
    if rule.ignored:
        rule.evidence += "; 255 beside class numbers is the ignore value, and not foreground"
    return rule


def foreground_of(mask, rule):
    """Mask -> bool (H, W). Raises ValueError for values below 0, unless the rule names values."""
    if rule.values:
        return np.isin(mask.values, rule.values)
    if mask.values.min() < 0:
        raise ValueError("has values below 0: say which are foreground, as in --mask-foreground 1")
    above = mask.values > rule.cuts.get(mask.span, 0)
    return (above != rule.inverted) & (mask.values != rule.ignored)


def shrink_mask(mask, size):
    """bool (H, W) -> uint8 {0, 1} (S, S): foreground where at least half the area is."""
    return (resize(mask.astype(np.float32), size) >= 0.5).astype(np.uint8)


# ------------------------------------------------------------------ bright or dark, label-free

def otsu_mask(image, foreground):
    """uint8 (H, W, 3) RGB -> uint8 {0, 1} (H, W): above Otsu's threshold for "bright", not above it
    for "dark"; all 0 where the image is of one gray."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if gray.min() == gray.max():
        return np.zeros_like(gray)
    threshold, _ = cv2.threshold(gray, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return ((gray > threshold) == (foreground == "bright")).astype(np.uint8)


def enclosed_areas(image):
    """uint8 (H, W, 3) -> (bright, dark): the share of the picture in components, of either side of
    Otsu's threshold, that do not touch the border. Objects lie inside a picture; the background
    runs out of it."""
    areas = []
    for foreground in ("bright", "dark"):
        mask = otsu_mask(image, foreground)
        _, labels = cv2.connectedComponents(mask, connectivity=4)
        border = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
        areas.append(float((mask.astype(bool) & ~np.isin(labels, border)).mean()))
    return tuple(areas)


def decide_foreground(asked, areas):
    """"bright" or "dark" for the whole data set, and the evidence. areas: enclosed_areas of the
    training images, (N, 2)."""
    if asked != "auto":
        return asked, "set by --foreground, or as published"
    areas = np.array(areas)
    bright, dark = areas.mean(axis=0)
    decision = "bright" if bright >= dark else "dark"
    larger = areas[:, 0] > areas[:, 1] if bright >= dark else areas[:, 1] > areas[:, 0]
    evidence = (f"enclosed regions cover {bright:.3f} of a training image when bright, {dark:.3f} "
                f"when dark; {larger.mean():.0%} of {len(areas)} images agree")
    if larger.mean() < 0.75:
        evidence += ("; the evidence is thin: look at preview.png and set --foreground yourself if "
                     "it is wrong")
    return decision, evidence


# ----------------------------------------------------------------------------- finding the files

@dataclass
class Pair:
    """An image with its masks, where it belongs, and what load_row found."""
    name: str
    image: str                                  # its path
    masks: list = field(default_factory=list)   # paths; their union is the mask
    group: str = ""                             # patient, or what else must stay in one part
    label: str = ""
    part: str = ""
    slide: str = ""                             # dm: the slide ...
    tile: tuple = ()                            # ... and the row and column of the tile
    array: tuple = ()                           # tissuenet: folder of X.npy and y.npy, and index
    any_shape: bool = False                     # mask and image differ in size, as published
    row: int = 0                                # of the scratch file
    areas: tuple = ()                           # enclosed_areas
    digest: str = ""                            # digest_of
    pages: int = 1
    is_binary: bool = False                     # two values, as masks have


@dataclass
class Files:
    """The image files below a folder; bad: a line for each that cannot be used."""
    images: dict                                # {name: path}
    masks: dict                                 # {name: [paths]}, of some of these images
    bad: list


def find_files(raw):
    """All image files below the folder `raw`, as Files; links are followed, hidden files left out.

    A name is the path below raw without suffix, in Unicode NFC, and without folders called images
    or as MASK_FOLDER. Masks are the files in such a folder, and NAME_mask beside NAME. Beside a
    folder images/ only folders of masks are looked into. What is not taken is printed. Ends the
    program where two readings are possible.
    """
    images, in_folders, bad = {}, [], []
    others, unread, seen = collections.Counter(), "", {raw.resolve()}
    for place, folders, files in os.walk(raw, followlinks=True):
        place = Path(place)
        if {"meta.json", "train_images.npy"} <= {*files}:
            print(f"{place}: a prepared data set, not taken")
            folders.clear()
            continue
        if any(name.lower() in IMAGE_FOLDERS for name in folders):
            taken = [name for name in folders
                     if name.lower() in IMAGE_FOLDERS or MASK_FOLDER.fullmatch(name)]
            aside = sorted({*folders, *files} - {*taken, "labels.csv"})
            if aside:
                print(f"{place}: beside {', '.join(taken)} not taken: {', '.join(aside[:9])}")
            folders[:], files = taken, []
        real = {name: (place / name).resolve() for name in sorted(folders)
                if name[0] != "." and name != "__MACOSX"}
        folders[:] = [name for name in real if real[name] not in seen]     # links may go in circles
        seen.update(real.values())
        inside = place.relative_to(raw).parts
        is_mask = any(MASK_FOLDER.fullmatch(folder) for folder in inside)
        for file in sorted(files):
            path = place / file
            name = name_of((*inside, file))
            if file[0] == "." or file == "Thumbs.db" or path == raw / "labels.csv":
                continue
            other = other_kind(path)
            if other:
                others[other] += 1
                unread = unread or is_mask and str(path)
            elif name.encode(errors="ignore").decode() != name:
                bad.append(f"{path}: its name is not UTF-8 (of a Windows zip?): rename it")
            elif is_mask:
                in_folders.append((name, path))
            elif name in images:
                bad.append(f"{path}: the name {name} is used twice, see {images[name]}")
            else:
                images[name] = path
    if others:
        listed = ", ".join(f"{n} {kind}" for kind, n in sorted(others.items()))
        hint = "; cut volumes into slices, a file each" if VOLUMES & set(others) else ""
        print(f"{raw}: of other kinds and not read: {listed}{hint}")
    masks = match_masks(raw, images, in_folders)
    if unread and images and not masks:
        sys.exit(f"{unread}: a mask of a kind that is not read: convert it, or give the folder of "
                 "the images alone")
    if not images:
        if in_folders:
            bad.append(f"{in_folders[0][1]}: in a folder of masks")
        sys.exit("\n".join([*bad, f"{raw}: no images here ({' '.join(sorted(EXTENSIONS))})"]))
    return Files(images, masks, bad)


def other_kind(path):
    """"" for a file that can be read as an image, else its suffix, or without one its name."""
    suffix = path.suffix.lower()
    if suffix in EXTENSIONS:
        return ""
    if path.name.lower().endswith(".nii.gz"):
        return ".nii.gz"
    if path.name != "DICOMDIR" and suffix not in VOLUMES:
        with open(path, "rb") as file:
            if file.read(132)[128:] == b"DICM":
                return ""
    return suffix or path.name


def name_of(inside):
    """The name of an image or mask file, from the parts of its path: see find_files."""
    *folders, file = inside
    if Path(file).suffix.lower() in EXTENSIONS:
        file = Path(file).stem
    if {"imagesTr", "imagesTs"} & set(folders):
        file = re.sub(r"_\d{4}$", "", file)     # nnU-Net's channel
    folders = [folder for folder in folders
               if folder.lower() not in IMAGE_FOLDERS and not MASK_FOLDER.fullmatch(folder)]
    return unicodedata.normalize("NFC", "/".join([*folders, file]))


def match_masks(raw, images, in_folders):
    """Return {name: [mask paths]}. images: {name: path}, from which masks beside them are removed;
    in_folders: (name, path) of the files in mask folders. Ends the program where two readings are
    possible."""
    beside, unclear = [], []
    for name, path in images.items():
        match = MASK_NAME.fullmatch(name)
        if match and match[1] in images:
            beside.append((name, path))
        elif match or MASK_FIRST.fullmatch(name):
            unclear.append(path)
    for name, _ in beside:
        del images[name]
    if 0 < len(unclear) < len(images):
        sys.exit(f"{unclear[0]}: by its name a mask, but of no image here. Put masks into "
                 f"{raw / 'masks'} under their images' names, or rename the image")
    masks, orphans = join_names({name: name for name in images}, beside + in_folders)
    last = {name.rsplit("/", 1)[-1]: name for name in images}
    if orphans and not masks and len(last) == len(images):      # original/x with masks/x
        masks, orphans = join_names(last, [(name.rsplit("/", 1)[-1], path)
                                           for name, path in in_folders])
    if orphans and images:
        print(f"{len(orphans)} masks have no image and are not used, {orphans[0]} first")
        if not masks:
            sys.exit(f"{raw}: no mask has the name of an image, such as {min(images)}")
    for name, paths in masks.items():
        numbered = sum(path.stem[-1].isdigit() for path in paths)
        if len({path.parent for path in paths}) > 1 or 1 < len(paths) > numbered + 1:
            sys.exit(f"{images[name]}: has two masks, {paths[0]} and {paths[1]}: leave one of them")
    if masks:
        folders = sorted({str(path.parent) for paths in masks.values() for path in paths})
        several = sum(len(paths) > 1 for paths in masks.values())
        print(f"masks of {len(masks)} images in {', '.join(folders[:3])}; {several} images have "
              "several, which are joined")
    return masks


def join_names(images, candidates):
    """Return {image: [mask paths]}, and a list of paths that belong to none. images: {name: image};
    candidates: (NAME or NAME_mask, path)."""
    masks, orphans = collections.defaultdict(list), []
    for name, path in candidates:
        match = MASK_NAME.fullmatch(name)
        if name not in images and match:
            name = match[1]
        if name in images:
            masks[images[name]].append(path)
        else:
            orphans.append(path)
    return masks, orphans


def find_folder(raw, args, bad):
    """All images below --raw as Pairs: with masks where a part has any, parts as train/, val/ and
    test/ say, groups (set_groups) and labels (set_labels)."""
    files = find_files(raw)
    bad += files.bad
    above = raw.resolve().parent
    sisters = [path for path in above.iterdir() if MASK_FOLDER.fullmatch(path.name)]
    if sisters and raw.resolve().name.lower() in IMAGE_FOLDERS:
        print(f"{sisters[0]} is not used: give --raw {above} for these masks")
    pairs = []
    for name, path in sorted(files.images.items()):
        pair = Pair(name, str(path), [str(mask) for mask in files.masks.get(name, ())])
        pair.part, pair.name = part_of_name(name)
        pairs.append(pair)
    found = {pair.part for pair in pairs}
    if found != {""} and found != set(PARTS):
        outside = [pair.image for pair in pairs if not pair.part]
        sys.exit(f"{raw}: has {' '.join(sorted(found - {''}))}: give all of train, val and test, "
                 f"and no images outside of them, or none of them ({len(outside)} are outside)")
    masked = {pair.part for pair in pairs if pair.masks}
    bare = [pair for pair in pairs if pair.part in masked and not pair.masks]
    bad += [f"{pair.image}: has no mask" for pair in bare]
    pairs = [pair for pair in pairs if pair not in bare]
    set_groups(raw, pairs, args.group_regex, bad)
    if (raw / "labels.csv").is_file():
        set_labels(raw, pairs)
    return pairs


def part_of_name(name):
    """("train", "val" or "test", the rest of the name) where one of its folders is called so, or
    else ("", name)."""
    *folders, _ = inside = name.split("/")
    for k, folder in enumerate(folders):
        part = PART_NAMES.get(folder.lower(), "")
        if part:
            return part, "/".join(inside[k + 1:])
    return "", name


def set_groups(raw, pairs, regex, bad):
    """Set the group of each pair: what `regex` finds in its name, or without one the topmost folder
    of the name that not all share. Ends the program where few large folders may be classes."""
    folders = [pair.name.split("/")[:-1] for pair in pairs]
    shared = len(os.path.commonprefix(folders))
    for pair, inside in zip(pairs, folders):
        pair.group = "".join(inside[shared:shared + 1])
        if regex:
            match = re.search(regex, pair.name)
            pair.group = match and match[1 if match.re.groups else 0]
        if pair.group is None:
            bad.append(f"{pair.image}: {pair.name} does not match --group-regex {regex}")
    names = sorted({pair.group for pair in pairs} - {""})
    if regex or not names:
        return
    groups = {pair.group or pair.name for pair in pairs}
    has_id = Path(pairs[0].image).suffix.lower() not in EXTENSIONS - {".dcm", ".dicom"}
    if len(groups) < 5 and len(pairs) >= 8 * len(groups) and not pairs[0].part and not has_id:
        sys.exit(f"{raw}: {len(pairs)} images in the folders {', '.join(names)}. Is each of them a "
                 "patient, whose images stay in one part? Then give --group-regex '^([^/]+)/'. If "
                 "they are classes, give --group-regex '.+'")
    print(f"{raw}: {len(names)} folders are taken as patients, {names[0]} first, and each stays in "
          "one part (--group-regex '.+' splits image by image)")


def set_labels(raw, pairs):
    """Set the label of each pair from labels.csv, where it stands by its name or its file's. Ends
    the program where none does."""
    path = raw / "labels.csv"
    labels = {}
    for row in read_table(path, ("name", "label")):
        name = unicodedata.normalize("NFC", row["name"])
        if labels.setdefault(name, row["label"]) != row["label"]:
            sys.exit(f"{path}: {name} has two labels, {labels[name]} and {row['label']}")
    used = set()
    for pair in pairs:
        file = Path(unicodedata.normalize("NFC", str(Path(pair.image).relative_to(raw))))
        for name in (pair.name, str(file), str(file.with_suffix("")), file.name, file.stem):
            if name in labels:
                pair.label = labels[name]
                used.add(name)
                break
    left = sorted(labels.keys() - used)
    unlabelled = sum(not pair.label for pair in pairs)
    print(f"{path}: {unlabelled} of {len(pairs)} images have no label; {len(left)} rows have no "
          f"image ({', '.join(left[:3]) or 'none'})")
    if not used:
        sys.exit(f"{path}: no row is of an image: {left[:1]} there, {pairs[0].name} here")


def read_table(path, columns):
    """The rows of a CSV as programs write it (UTF-8, UTF-16 or Windows-1252; comma, semicolon or
    tab), a list of dicts; ends the program where one of the columns is not there."""
    data = path.read_bytes()
    try:
        is_wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
    if not set(columns) <= set(rows.fieldnames):
        sys.exit(f"{path}: needs the columns {' and '.join(columns)}, has {rows.fieldnames}")
    return [{key: (row[key] or "").strip() for key in columns} for row in rows]


# -------------------------------------------------------------------------------------- splitting

def join_duplicates(pairs):
    """{name: group} of the pairs: groups that share a picture (Pair.digest) become one. Prints how
    many pictures are there twice."""
    leader, first, again = {}, {}, []

    def lead(pair):
        group = pair.group or pair.name
        while group in leader:
            group = leader[group]
        return group

    for pair in pairs:
        other = first.setdefault(pair.digest or pair.name, pair)
        if other is not pair:
            again.append(f"{pair.image} and {other.image}")
        if lead(other) != lead(pair):
            leader[lead(pair)] = lead(other)
    if again:
        print(f"{len(again)} pictures are there twice, {again[0]} first: kept in one part, unless "
              "parts are given")
    return {pair.name: lead(pair) for pair in pairs}


def split(pairs, seed):
    """Set the part of every pair: groups in seeded order, cut at int(.7 n) and int(.8 n) images, or
    slides; a group that a cut falls into stays whole. Few large groups fill each part with at least
    one, where there are three."""
    groups = join_duplicates(pairs)
    if len(set(groups.values())) < len(PARTS):
        print("nearly all pictures are the same, and so in several parts")
        groups = {pair.name: pair.group or pair.name for pair in pairs}
    units = collections.defaultdict(set)        # the images, or slides, of a group
    for pair in pairs:
        units[groups[pair.name]].add(pair.slide or pair.name)
    order = np.random.default_rng(seed).permutation(sorted(units)).tolist()
    ends = np.cumsum([0] + [len(units[group]) for group in order])
    first, second = np.searchsorted(ends, [int(0.7 * ends[-1]), int(0.8 * ends[-1])]).tolist()
    if 3 <= len(order) < ends[-1]:
        first = max(1, min(first, len(order) - 2))
        second = min(max(second, first + 1), len(order) - 1)
    place = {group: k for k, group in enumerate(order)}
    for pair in pairs:
        k = place[groups[pair.name]]
        pair.part = PARTS[(k >= first) + (k >= second)]


def stratify(pairs, seed):
    """Set the part of every pair: ceil(20 %) test, then ceil(13 %) of the rest validation, of each
    class its like share, to one image. A picture that is there twice changes places with one of its
    class, to be in one part."""
    classes = collections.defaultdict(list)
    for pair in pairs:
        classes[pair.label].append(pair)
    ranked = []                                 # the classes, each in seeded order, evenly merged
    for label, members in sorted(classes.items()):
        order = np.random.default_rng([seed, len(label)]).permutation(len(members))
        ranked += [((k + 0.5) / len(members), label, members[i]) for k, i in enumerate(order)]
    ranked.sort(key=lambda entry: entry[:2])
    test = math.ceil(0.2 * len(pairs))
    val = math.ceil(0.13 * (len(pairs) - test))
    for k, (_, _, pair) in enumerate(ranked):
        pair.part = PARTS[2 if k < test else 1 if k < test + val else 0]
    groups = join_duplicates(pairs)
    sizes = collections.Counter(groups.values())
    part_of = {}
    for pair in pairs:
        part = part_of.setdefault(groups[pair.name], pair.part)
        if pair.part != part:
            other = next(other for other in classes[pair.label]
                         if other.part == part and sizes[groups[other.name]] == 1)
            pair.part, other.part = other.part, pair.part


# ---------------------------------------------------------------------- the data sets as published

def unpack(archive):
    """Extract a .zip, .npz or .tar[.gz] beside itself, once, into a folder of its name, which both
    libraries see to that nothing leaves. Ends the program where the archive is broken."""
    folder = archive.with_name(re.sub(r"(\.tar)?\.\w+$", "", archive.name))
    if folder.exists():
        return
    print(f"{archive}: extracting to {folder}")
    broken = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)
    with new_folder(folder) as partial:
        try:
            if zipfile.is_zipfile(archive):
                with zipfile.ZipFile(archive) as file:
                    file.extractall(partial)
            else:
                with tarfile.open(archive) as file:
                    file.extractall(partial, filter="data")
        except broken as error:
            sys.exit(f"{archive}: cannot be extracted ({error}); nothing was kept: get it again")


def find_all(raw, pattern):
    """Paths below `raw` that match a pattern such as COVID/images/*, at any depth, near ones first;
    links are followed, hidden files left out."""
    found = glob.glob(f"**/{pattern}", root_dir=raw, recursive=True)
    return [raw / path for path in sorted(found, key=lambda path: (path.count("/"), path))]


def images_in(raw, pattern):
    """{stem: path} of the image files that match find_all's pattern, of one stem the nearest."""
    found = {}
    for path in find_all(raw, pattern):
        if path.suffix.lower() in EXTENSIONS:
            found.setdefault(path.stem, path)
    return found


def pair_up(images, masks, bad, **more):
    """Pairs of {name: image path} and {name: mask path}; an image without a mask goes to `bad`;
    more: fields that all have."""
    bad += [f"{images[name]}: has no mask" for name in sorted(images.keys() - masks.keys())]
    orphans = sorted(masks.keys() - images.keys())
    if orphans:
        print(f"{len(orphans)} masks have no image and are not used, {masks[orphans[0]]} first")
    return [Pair(name, str(images[name]), [str(masks[name])], **more)
            for name in sorted(images.keys() & masks.keys())]


def find_isic(raw, args, bad, missing):
    """ISIC-2017: the official parts; labels from Part3, nevus where neither column says 1."""
    pairs = []
    for part, official in zip(PARTS, ("Training", "Validation", "Test_v2")):
        images = images_in(raw, f"ISIC-2017_{official}_Data/*")
        images = {stem: path for stem, path in images.items() if "_superpixels" not in stem}
        masks = images_in(raw, f"ISIC-2017_{official}_Part1_GroundTruth/*")
        masks = {stem.removesuffix("_segmentation"): path for stem, path in masks.items()}
        tables = find_all(raw, f"ISIC-2017_{official}_Part3_GroundTruth.csv")
        there = {"Data": images, "Part1_GroundTruth": masks, "Part3_GroundTruth.csv": tables}
        missing += [f"ISIC-2017_{official}_{what}" for what in there if not there[what]]
        new = pair_up(images, masks, bad, part=part)
        labels = {}
        diseases = ("melanoma", "seborrheic_keratosis")
        for row in read_table(tables[0], ("image_id", *diseases)) if tables else ():
            found = [disease for disease in diseases if float(row[disease]) == 1]
            labels[row["image_id"]] = (found or ["nevus"])[0]
        for pair in new:
            pair.label = labels.get(pair.name, "")
        pairs += new
    return pairs


def find_xray(raw, args, bad, missing):
    """The COVID-19 Radiography data: class = label; masks of 256 px for images of 299."""
    pairs = []
    for label in ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"):
        images = images_in(raw, f"{label}/images/*")
        masks = images_in(raw, f"{label}/masks/*")
        if not images or not masks:
            missing.append(f"{label}/images and masks")
        pairs += pair_up(images, masks, bad, label=label, any_shape=True)
    return pairs


def find_drone(raw, args, bad, missing):
    """The Semantic Drone Dataset, from Kaggle or its own page: foreground is any class but
    `unlabeled`, which is index 0 and black, so nearly everything."""
    layouts = (("original_images/*", "label_images_semantic/*"),
               ("original_images/*", "RGB_color_image_masks/*"),
               ("training_set/images/*", "training_set/gt/semantic/label_images/*"))
    for layout in layouts:
        images, masks = images_in(raw, layout[0]), images_in(raw, layout[1])
        if images and masks:
            print("foreground is nearly everything: 99.8 % of the pixels of the published masks")
            return pair_up(images, masks, bad)
    missing += [" with ".join(layout) for layout in layouts]
    return []


def find_dsb2018(raw, args, bad, missing):
    """BBBC038 stage 1: a folder an image, of the image's name; one mask a nucleus."""
    images, others = {}, 0
    for path in find_all(raw, "images/*"):
        folder = path.parent.parent
        alone = len(list(path.parent.glob("[!.]*"))) == 1
        if alone and path.stem == folder.name and path.suffix.lower() in EXTENSIONS:
            images[path.stem] = path
        else:
            others += 1
    masks = {name: sorted(images[name].parent.parent.glob("masks/[!.]*.*")) for name in images}
    if others:
        print(f"{others} files in folders images/ are not the only one, of its folder's name, and "
              "not taken")
    missing += [] if images else ["stage1_train/<id>/images/<id>.png"]
    pairs = pair_up(images, {name: paths[0] for name, paths in masks.items() if paths}, bad)
    for pair in pairs:
        pair.masks = [str(path) for path in masks[pair.name]]
    return pairs


def find_dm(raw, args, bad, missing):
    """Dermatomyositis slides, paired by what stands before `_component`, cut into tiles; a slide's
    tiles stay together, or with --split-by patient all of a patient's (the first two fields of the
    name). Masks are named as in either publication."""
    kinds = {"_data": {}, "_mask_labels": {}, "_data.tifmask": {}}
    for path in find_all(raw, "*_component*.tif*"):
        name, _, kind = path.name.partition("_component")
        kinds.get(Path(kind).stem.lower(), {}).setdefault(name, path)
    images, masks, others = kinds.values()
    if masks.keys() & others.keys():
        print("there are masks of both namings: *_mask_labels is taken")
    masks = others | masks
    missing += [] if images else ["*_component_data.tif"]
    missing += [] if masks else ["*_component_mask_labels.tiff or *_component_data.tifMask.tif"]
    pairs = []
    for pair in pair_up(images, masks, bad):
        try:
            with Image.open(pair.image) as slide:
                width, height = slide.size
        except (OSError, SyntaxError) as error:
            bad.append(f"{pair.image}: cannot be read: {error}")
            continue
        group = pair.name
        if args.split_by == "patient":
            group = "_".join(pair.name.split("_")[:2])
        for y in range(math.ceil(height / TILE)):
            for x in range(math.ceil(width / TILE)):
                pairs.append(Pair(f"{pair.name}_{y}_{x}", pair.image, pair.masks, group,
                                  slide=pair.name, tile=(y, x)))
    return pairs


def find_tissuenet(raw, args, bad, missing):
    """TissueNet: the official parts; foreground is the whole cell."""
    pairs = []
    for part in PARTS:
        found = find_all(raw, f"tissuenet_v*_{part}/X.npy")
        if not found:
            missing.append(f"tissuenet_v1.*_{part}.npz")
            continue
        folder = found[-1].parent               # the latest version
        try:
            x = np.load(folder / "X.npy", mmap_mode="r")
            y = np.load(folder / "y.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            sys.exit(f"{folder}: cannot be read ({error}); get it again")
        if x.ndim != 4 or x.shape[3] != 2 or x.shape != y.shape:
            sys.exit(f"{folder}: X is {x.shape} and y {y.shape}, not (N, H, W, 2) both")
        for i in range(len(x)):
            path = f"{folder}[{i}]"
            pairs.append(Pair(f"{part}_{i:05d}", path, [path], part=part, array=(folder, i)))
    return pairs


def two_channels(x):
    """TissueNet's (H, W, 2), nuclei and membranes -> uint8 (H, W, 3) RGB as DeepCell's
    documentation shows them: green and blue, each from the 5 and 95 percentiles of its non-zero
    pixels."""
    image = np.zeros((*x.shape[:2], 3), np.uint8)
    for channel in (0, 1):
        lit = x[..., channel][x[..., channel] > 0]
        if lit.size:
            low, high = np.percentile(lit, (5, 95))
            image[..., channel + 1] = to_eight_bits(x[..., channel], (low, max(high, low + 1e-9)))
    return image


FINDERS = {"isic": find_isic, "xray": find_xray, "drone": find_drone, "dsb2018": find_dsb2018,
           "dm": find_dm, "tissuenet": find_tissuenet}


def find_published(raw, args, bad):
    """The Pairs of a published data set; prints what is there and what is missing, and ends the
    program where a part is."""
    facts = PUBLISHED[args.dataset]
    raw = Path(re.sub(f"/({facts.inside})$", "", raw.resolve().as_posix()))    # class -> its parent
    endings = (".npz",) if args.dataset == "tissuenet" else (".zip", ".tar", ".tar.gz", ".tgz")
    for path in sorted(raw.iterdir()):
        if path.name.lower().endswith(endings) and path.is_file() and path.name[0] != ".":
            unpack(path)
    missing = []
    pairs = FINDERS[args.dataset](raw, args, bad, missing)
    counts = collections.Counter(pair.part for pair in pairs)
    print(f"{raw}: {len(pairs)} images with masks")
    if missing:
        print(f"missing: {', '.join(missing)}; from {facts.page}")
    if not pairs or ("" not in counts and len(counts) < len(PARTS)):
        sys.exit(f"{raw}: not enough of {args.dataset} is here to fill train, val and test; "
                 "nothing was written")
    return pairs


def download(url, path, timeout=30, tries=5):
    """Fetch `url` to `path` with curl; what has come is kept in path.part, and the next try, or
    call, goes on from there. Ends the program where all tries fail, or the server refuses."""
    partial = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["curl", "--fail", "--location", "--continue-at", "-", "--output", str(partial),
               "--speed-limit", "1", "--speed-time", str(timeout), "--write-out", "%{http_code}",
               url]
    if not shutil.which("curl"):
        sys.exit(f"{url}: curl is not installed: install it, or fetch this file to {path}")
    for _ in range(tries):
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if ended.returncode == 0:
            os.replace(partial, path)
            return
        if ended.returncode in (33, 36):        # the server cannot go on from there
            partial.unlink(missing_ok=True)
        elif ended.stdout.startswith("4"):
            break
    sys.exit(f"{url}: not fetched: HTTP status {ended.stdout}, exit code of curl "
             f"{ended.returncode}. The same command goes on from there; if the file has moved, see "
             "the data set's page")


def fetch(args):
    """--download: the files of a data set that needs no account, into --raw; of another one, say
    where it is to be had."""
    facts = PUBLISHED[args.dataset]
    if not facts.files:
        sys.exit(f"{args.dataset} cannot be fetched without an account. Get it from {facts.page}, "
                 "put the files or archives into a folder, then: python prepare_data.py --dataset "
                 f"{args.dataset} --raw FOLDER")
    for url in facts.files:
        path = Path(args.raw) / url.rsplit("/", 1)[1]
        if path.exists() or path.with_suffix("").is_dir():
            print(f"{path} is there")
        else:
            download(url, path)


# ------------------------------------------------------------------------------- reading them back

def read_meta(folder):
    """The meta.json of a prepared data set, a dict; ends the program where there is none."""
    try:
        return json.loads((Path(folder) / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        name = Path(folder).name
        flags = f"folder --raw DIR --name {name}"
        if name == "demo" or name in PUBLISHED:
            flags = name if name == "demo" else f"{name} --raw DIR"
        sys.exit(f"{folder} is not prepared: run python prepare_data.py --dataset {flags}")


def open_part(folder, part):
    """(images, masks) of "train", "val" or "test", mapped, not read: uint8 (N, S, S, 3), and uint8
    {0, 1} (N, S, S) or None. Ends the program with one line where they cannot be read."""
    masks = Path(folder) / f"{part}_masks.npy"
    try:
        images = np.load(Path(folder) / f"{part}_images.npy", mmap_mode="r")
        return images, np.load(masks, mmap_mode="r") if masks.exists() else None
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"{folder}: the {part} arrays cannot be read ({error}); prepare the data set "
                 "again with --overwrite")


def read_names(folder, part):
    """The rows of {part}.csv in the order of the arrays: a list of dicts name, group, label."""
    with open(Path(folder) / f"{part}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def digest_of(image):
    """A hash of a picture's pixels; "" where all are alike, as two blank pictures may well be."""
    if (image == image[0, 0]).all():
        return ""
    return hashlib.sha256(image.tobytes()).hexdigest()


def check(folder):
    """Read a prepared data set back; ends the program (exit code 1) with a line for each thing that
    is off."""
    meta = read_meta(folder)
    wrong, seen, fingerprint = [], {}, hashlib.sha256()
    for part in PARTS:
        images, masks = open_part(folder, part)
        rows = read_names(folder, part)
        shape = (meta["counts"][part], meta["size"], meta["size"])
        if len(rows) != shape[0] or images.shape != (*shape, 3):
            wrong.append(f"{part}_images.npy is {images.shape}, {part}.csv has {len(rows)} rows, "
                         f"meta.json says {shape}")
        for row, image in zip(rows, images):
            fingerprint.update(image)
            keys = {"name": row["name"], "group": row["group"], "picture": digest_of(image)}
            for kind, key in keys.items():
                other, name = seen.setdefault((kind, key), (part, row["name"]))
                if key and other != part:
                    wrong.append(f"the same {kind} in two parts: {name} of {other} and "
                                 f"{row['name']} of {part}")
        covered = "no masks"
        if masks is not None:
            if masks.shape != shape or masks.max() > 1:
                wrong.append(f"{part}_masks.npy is {masks.shape} up to {masks.max()}, not {shape} "
                             "up to 1")
            for mask in masks:
                fingerprint.update(mask)
            covered = f"foreground {np.mean(masks):.4f} of the pixels"
        groups = {row["group"] for row in rows} - {""}
        print(f"{part}: {len(rows)} images, {len(groups)} groups, {covered}")
    if fingerprint.hexdigest() != meta["fingerprint"]:
        wrong.append("the arrays are not those that were written: fingerprint "
                     f"{fingerprint.hexdigest()}, meta.json has {meta['fingerprint']}")
    if wrong:
        lines = [f"{folder}: {line}" for line in wrong[:20]]
        sys.exit("\n".join([*lines, f"{len(wrong)} things are off"]))
    print(f"{folder}: all is well; fingerprint {meta['fingerprint']}")


# ---------------------------------------------------------------------------------------- writing

@contextlib.contextmanager
def only_one(path):
    """Hold a lock, on the file `path`, that ends with the block or with this process, however it
    ends. Ends the program (exit code 75: try again later) where another process has it. Leaves no
    file, and no folder made for nothing."""
    made = [folder for folder in path.parents if not folder.exists()]
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)    # unlike flock's, no child keeps it
        except (BlockingIOError, PermissionError):
            print(f"{path.parent}: another process is at work on this", file=sys.stderr)
            sys.exit(75)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break                               # else its last holder has just removed it
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
    """A temporary folder that takes the place of `final` when the block ends well, and is removed
    when it does not."""
    partial = final.with_name(f".{final.name}.partial")
    old = final.with_name(f".{final.name}.old")
    for left in (partial, old):                 # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_npy(path, shape, rows, digest):
    """Stream uint8 rows into a .npy file, never more than one in memory; update the sha256
    `digest`."""
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for row in rows:
            data = np.ascontiguousarray(row, dtype=np.uint8).tobytes()
            digest.update(data)
            file.write(data)


def contact_sheet(rows, titles, captions=None, cell=112):
    """A table of pictures, uint8 (H, W, 3) RGB, with a title over each column and a caption under
    each row. rows: lists of uint8 (S, S, 3), masks {0, 1} or bool (S, S) (drawn black and white),
    or None (left empty)."""
    line, gap = 18, 4
    row_height = cell + gap + (line if captions else 0)
    sheet = np.full((line + len(rows) * row_height, len(titles) * (cell + gap), 3), 255, np.uint8)

    def write(text, x, y):
        font = cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(sheet, text, (x + 2, y + 13), font, 0.4, (0, 0, 0), 1, cv2.LINE_AA)

    for i, title in enumerate(titles):
        write(title, i * (cell + gap), 0)
    for k, row in enumerate(rows):
        y = line + k * row_height
        for i, tile in enumerate(row):
            if tile is None:
                continue
            if tile.ndim == 2:
                tile = np.repeat(tile[..., None].astype(np.uint8) * 255, 3, axis=2)
            sheet[y:y + cell, i * (cell + gap):][:, :cell] = resize(np.array(tile), cell)
        if captions:
            write(captions[k], 0, y + cell)
    return sheet


def write_preview(folder, foreground):
    """preview.png: image, pseudo-mask and truth side by side, for up to four images a part."""
    rows, titles = [[], [], [], []], []
    for part in PARTS:
        images, masks = open_part(folder, part)
        titles += [f"{part}: image", "Otsu", "no truth" if masks is None else "truth"]
        for k, row in enumerate(rows):
            if k < len(images):
                row += [images[k], otsu_mask(np.array(images[k]), foreground)]
                row.append(None if masks is None else masks[k])
            else:
                row += [None, None, None]
    Image.fromarray(contact_sheet(rows, titles)).save(folder / "preview.png")


def finish(folder, meta, parts, digest):
    """The small files of a data set: {part}.csv, preview.png, and last meta.json. parts: {part: its
    Pairs in the order of the arrays}."""
    for part in PARTS:
        with open(folder / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["name", "group", "label"])
            writer.writerows([pair.name, pair.group, pair.label] for pair in parts[part])
    write_preview(folder, meta["foreground"])
    meta["counts"] = {part: len(parts[part]) for part in PARTS}
    meta["fingerprint"] = digest.hexdigest()
    text = json.dumps(meta, indent=2) + "\n"
    (folder / "meta.json").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------- demo

def draw_nuclei(size, rng):
    """One picture in the look of stained nuclei, and its true mask: uint8 (S, S, 3), uint8 {0, 1}
    (S, S)."""
    fine = 4 * size                             # drawn four times as fine, then averaged down
    glow = rng.uniform(10, 60, (3, 3)).astype(np.float32)
    glow = cv2.resize(glow, (size, size), interpolation=cv2.INTER_CUBIC)
    light = np.zeros((size, size), np.float32)
    mask = np.zeros((size, size), bool)
    centres = rng.uniform(0, fine, (rng.integers(2, 6), 2))
    for _ in range(rng.integers(6, 16)):
        centre = centres[rng.integers(len(centres))] + rng.normal(0, 0.13 * fine, 2)    # clumped
        axes = rng.uniform(0.04, 0.085, 2) * fine
        nucleus = np.zeros((fine, fine), np.float32)
        cv2.ellipse(nucleus, centre.astype(int).tolist(), axes.astype(int).tolist(),
                    rng.uniform(0, 180), 0, 360, 1, -1)
        nucleus = resize(nucleus, size)
        light = np.maximum(light, nucleus * rng.uniform(50, 140))
        mask |= nucleus >= 0.5
    picture = cv2.GaussianBlur(glow + light, (0, 0), size / 90) + rng.normal(0, 7, (size, size))
    gray = picture.round().clip(0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2), mask.astype(np.uint8)


def prepare_demo(args, final):
    """Draw the demo from the seed; every picture has a generator of its own."""
    digest, parts = hashlib.sha256(), {}
    size = args.size
    with new_folder(final) as folder:
        for p, (part, n) in enumerate(DEMO_COUNTS.items()):
            images, masks = [], []
            for i in range(n):
                image, mask = draw_nuclei(size, np.random.default_rng([args.seed, p, i]))
                images.append(image)
                masks.append(mask)
            write_npy(folder / f"{part}_images.npy", (n, size, size, 3), images, digest)
            write_npy(folder / f"{part}_masks.npy", (n, size, size), masks, digest)
            parts[part] = [Pair(f"{part}_{i:03d}", "") for i in range(n)]
        meta = {"dataset": "demo", "name": args.name, "foreground": args.foreground,
                "foreground_evidence": "drawn so", "size": size, "seed": args.seed,
                "source": "drawn by prepare_data.py", "command": args.command}
        finish(folder, meta, parts, digest)


# --------------------------------------------------------------------- folders and published sets

def load_rows(pairs, args, rule):
    """Read the image that `pairs` share, the tiles of a slide or else one pair, and their masks;
    fill in what was found. Returns each pair's row of the scratch file: the bytes of its image
    (S, S, 3) and its mask (S, S). Raises ValueError with the path of the file that is bad."""
    pair, size = pairs[0], args.size
    path = pair.image
    try:
        if pair.array:
            folder, i = pair.array
            image = two_channels(np.load(folder / "X.npy", mmap_mode="r")[i])
            mask = np.load(folder / "y.npy", mmap_mode="r")[i, ..., 0] > 0
        else:
            picture = read_picture(path, args.page)
            pair.pages = picture.pages
            if picture.patient and not args.group_regex:
                pair.group = picture.patient
            image = to_rgb(picture)
            mask = None
            for path in pair.masks:
                one = foreground_of(read_mask(path, args.page), rule)
                if one.shape != image.shape[:2] and not pair.any_shape:
                    raise ValueError(f"the mask is {one.shape[1]}x{one.shape[0]}, its image "
                                     f"{image.shape[1]}x{image.shape[0]}")
                mask = one if mask is None else mask | one
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    rows = []
    for pair in pairs:
        small = resize(cut(image, pair.tile), size)
        if small.shape != (size, size, 3) or small.dtype != np.uint8:
            raise ValueError(f"{path}: read as {small.shape} {small.dtype}, which is no picture")
        coarse = image[::4, ::4]
        pair.is_binary = bool(((coarse == coarse.min()) | (coarse == coarse.max())).all())
        pair.areas = enclosed_areas(small)
        pair.digest = digest_of(small)
        row = small.tobytes()
        if pair.masks:
            row += shrink_mask(cut(mask, pair.tile), size).tobytes()
        rows.append(row.ljust(4 * size * size, b"\0"))
    return rows


def cut(picture, tile):
    """The tile (row, column) of a slide, (TILE, TILE[, 3]), 0 outside; without tile the picture."""
    if not tile:
        return picture
    y, x = tile[0] * TILE, tile[1] * TILE
    piece = picture[y:y + TILE, x:x + TILE]
    out = np.zeros((TILE, TILE, *picture.shape[2:]), picture.dtype)
    out[:piece.shape[0], :piece.shape[1]] = piece
    return out


def try_each(work, items, what, bad):
    """(item, work(item)) of each item, in order, on all cores; where work raises ValueError, its
    words go to `bad` instead. Threads: Pillow and OpenCV let go of Python's lock."""
    def attempt(item):
        try:
            return work(item), ""
        except ValueError as error:
            return None, str(error)

    with ThreadPool(os.cpu_count()) as pool:
        done = pool.imap(attempt, items)
        for item, (result, error) in zip(items, tqdm(done, what, len(items), unit=f" {what}")):
            if error:
                bad.append(error)
            else:
                yield item, result


def mask_rule(pairs, args, bad):
    """The MaskRule of a data set: as published, or decided on a look at all masks of a folder."""
    if args.dataset != "folder":
        above = PUBLISHED[args.dataset].above
        cuts = {255: above, 65535: above * 257, math.inf: 0}
        return MaskRule(cuts=cuts, evidence=f"above {above}, as published")

    def look(path):
        try:
            mask = read_mask(path, args.page)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: {error}") from None
        mask.values = None                      # all of them would fill the memory
        return mask

    paths = [path for pair in pairs for path in pair.masks]
    masks = [mask for _, mask in try_each(look, paths, "masks", bad)]
    alpha = [mask.path for mask in masks if mask.is_alpha]
    if alpha:
        print(f"{len(alpha)} masks are taken from the alpha channel, {alpha[0]} first")
    try:
        rule = decide_mask_rule(args.mask_foreground, masks)
    except ValueError as error:
        sys.exit(str(error))
    if masks:
        print(f"mask foreground: {rule.evidence}")
    return rule


def read_all(pairs, args, scratch, bad):
    """The Pairs that can be read, with their rows in the file `scratch`; prints how many files have
    several pages."""
    rule = mask_rule(pairs, args, bad)
    files = [list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair.image)]

    def load(group):
        return load_rows(group, args, rule)

    good, stacks = [], []
    with open(scratch, "wb") as file:
        for group, rows in try_each(load, files, "images", bad):
            for pair, row in zip(group, rows):
                pair.row = len(good)
                good.append(pair)
                file.write(row)
            if group[0].pages > 1:
                stacks.append(f"{group[0].image} has {group[0].pages}")
    binary = [pair.image for pair in good if pair.is_binary]
    if binary and args.dataset == "folder":
        print(f"{len(binary)} of {len(good)} images have two values or one, {binary[0]} first: are "
              "they masks? See python prepare_data.py --help for the names of masks")
    if stacks:
        print(f"{len(stacks)} files have several pages or frames ({stacks[0]}): page {args.page} "
              "is taken, counted from 0; --page takes another")
    return good, rule


def write_parts(folder, parts, size, scratch):
    """Write the arrays of {part: Pairs}. Returns the sha256 of all, {part: how many masks are
    empty} of those with masks, and the share of foreground."""
    digest, empty, shares = hashlib.sha256(), {}, []

    def rows(pairs, first, length):
        with open(scratch, "rb") as file:
            for pair in pairs:
                file.seek(pair.row * 4 * size * size + first)
                yield np.frombuffer(file.read(length), np.uint8)

    def masks(pairs):
        for mask in rows(pairs, 3 * size * size, size * size):
            shares.append(mask.mean())
            yield mask

    for part, pairs in parts.items():
        n = len(pairs)
        images = rows(pairs, 0, 3 * size * size)
        write_npy(folder / f"{part}_images.npy", (n, size, size, 3), images, digest)
        if pairs[0].masks:
            write_npy(folder / f"{part}_masks.npy", (n, size, size), masks(pairs), digest)
            empty[part] = shares[-n:].count(0)
            if empty[part]:
                print(f"{part}: {empty[part]} of {n} masks are empty at {size} px")
    share = float(np.mean(shares)) if shares else None
    if shares:
        question = ""
        if share > 0.5:
            question = ": inverted? --mask-foreground zero, or a list of the values that count"
        print(f"masks cover {share:.1%} of the pixels{question}")
    return digest, empty, share


def prepare_images(args, final):
    """Prepare a folder of images, or a published data set. Every bad file is found in one pass;
    without --skip-bad nothing is written then."""
    bad, raw = [], Path(args.raw)
    facts = PUBLISHED.get(args.dataset)
    if not raw.is_dir():
        sys.exit(f"{raw}: no such folder" + (f"; from {facts.page}" if facts else ""))
    pairs = find_published(raw, args, bad) if facts else find_folder(raw, args, bad)
    with new_folder(final) as folder:
        scratch = folder / "scratch"
        pairs, rule = read_all(pairs, args, scratch, bad)
        bad = list(dict.fromkeys(bad))          # a mask may have been read twice
        if bad:
            print("\n".join(bad), file=sys.stderr)
            if not args.skip_bad:
                sys.exit(f"{len(bad)} bad file(s) in {raw}, listed above; nothing was written. "
                         "Mend them, or leave them out with --skip-bad")
        parts = divide(pairs, args)
        digest, empty, share = write_parts(folder, parts, args.size, scratch)
        if share == 0 and rule.values:
            sys.exit(f"{raw}: no mask holds {args.mask_foreground}, see --mask-foreground")
        scratch.unlink()
        areas = [pair.areas for pair in parts["train"]]
        foreground, evidence = decide_foreground(args.foreground, areas)
        print(f"foreground: {foreground} ({evidence})")
        meta = {"dataset": args.dataset, "name": args.name, "foreground": foreground,
                "foreground_evidence": evidence, "size": args.size, "seed": args.seed,
                "source": str(raw), "has_masks": {part: part in empty for part in PARTS},
                "mask_foreground": rule.evidence, "mask_share": share, "empty_masks": empty,
                "page_taken": args.page, "group_regex": args.group_regex, "split_by": args.split_by,
                "skipped": bad, "command": args.command}
        if facts:
            meta |= {"page": facts.page, "licence": facts.licence,
                     "published_counts": dict(zip(PARTS, facts.counts))}
        finish(folder, meta, parts, digest)


def divide(pairs, args):
    """{part: Pairs by name}, split where the parts are not given. Ends the program where one would
    be empty."""
    pairs = sorted(pairs, key=lambda pair: pair.name)
    if pairs and pairs[0].part:
        join_duplicates(pairs)                  # for its words
    elif args.dataset == "xray":
        stratify(pairs, args.seed)
    else:
        split(pairs, args.seed)
    parts = {part: [pair for pair in pairs if pair.part == part] for part in PARTS}
    counts = {part: len(parts[part]) for part in PARTS}
    if not all(counts.values()):
        groups = {pair.group or pair.name for pair in pairs}
        sys.exit(f"{args.raw}: {len(pairs)} usable images in {len(groups)} groups are too few to "
                 f"fill train, val and test ({counts})")
    if args.dataset in PUBLISHED and tuple(counts.values()) != PUBLISHED[args.dataset].counts:
        print(f"warning: the counts are not the published ones: {counts} here, "
              f"{PUBLISHED[args.dataset].counts} published")
    return parts


# ------------------------------------------------------------------------------------------- main

class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help of every script: the docstring as it is written, and each flag's default."""


def parse_args(argv):
    parser = argparse.ArgumentParser("prepare_data.py", description=__doc__, allow_abbrev=False,
                                     usage=argparse.SUPPRESS, formatter_class=Help)
    add = parser.add_argument
    add("--dataset", required=True, choices=["demo", "folder", *PUBLISHED], help="what to prepare")
    add("--raw", metavar="DIR", help="where the images, or the published files or archives, are")
    add("--name", help="the data set's name under --out; unset: the raw folder's own name, or the "
        "published name")
    add("--out", default="data", metavar="DIR", help="where data sets are kept")
    add("--size", type=int, help="side of the pictures in pixels; unset: 224 as in the paper, demo "
        "64")
    add("--seed", type=int, default=0, help="of the split, and of the demo's drawing")
    add("--foreground", choices=["bright", "dark", "auto"], help="what the objects are against "
        "their background; unset: dark for isic and xray, bright for dm, tissuenet, drone and "
        "demo, else auto, label-free")
    add("--mask-foreground", default="auto", metavar="RULE", help="folder: the mask values that "
        "are foreground: half (above half the range), nonzero, zero (the inverse), a list such as "
        "1 or 85,255, or auto, decided on all masks")
    add("--group-regex", metavar="REGEX", help="folder: what in an image's name (its path below "
        "--raw) says the patient (first group, or the whole match), whose images stay in one "
        "part; unset: the topmost folder, or DICOM's patient id")
    add("--split-by", default="slide", choices=["slide", "patient"], help="dm: what stays whole; "
        "the paper's tiles are split by slide, so that a patient may be in all parts")
    add("--page", type=int, default=0, help="the page or frame of files that have several; of a dm "
        "slide its stain, 0 is DAPI")
    add("--download", action="store_true", help="isic, dsb2018: first fetch the published files "
        "into --raw")
    add("--check", action="store_true", help="read a prepared data set back, report what is off; "
        "exit code 1 if anything is")
    add("--skip-bad", action="store_true", help="leave bad files out and record them")
    add("--overwrite", action="store_true", help="replace a data set that is already there")
    args = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", "prepare_data.py", *given])
    if args.download and not args.raw:
        args.raw = f"raw/{args.dataset}"
    if not args.raw and args.dataset != "demo" and not args.check:
        where = "the folder with the images"
        if args.dataset in PUBLISHED:
            where = f"the folder with the published files; from {PUBLISHED[args.dataset].page}"
        sys.exit(f"--dataset {args.dataset} needs --raw DIR, {where}")
    if args.dataset == "folder" and not (args.raw or args.name):
        sys.exit("--dataset folder --check needs --raw DIR or --name NAME")
    if not args.name:
        args.name = Path(args.raw).resolve().name if args.dataset == "folder" else args.dataset
    if not re.fullmatch(r"[^./\\][^/\\]*", args.name):
        sys.exit(f"--name {args.name!r} cannot be a folder's name here")
    args.size = args.size if args.size is not None else 64 if args.dataset == "demo" else 224
    if args.size < 16 or args.page < 0 or args.seed < 0:
        sys.exit("--size is at least 16; --page and --seed count from 0")
    try:
        re.compile(args.group_regex or "")
    except re.error as error:
        sys.exit(f"--group-regex {args.group_regex!r} is not a regular expression: {error}")
    if not re.fullmatch(r"auto|half|nonzero|zero|\d+(,\d+)*", args.mask_foreground):
        sys.exit(f"--mask-foreground {args.mask_foreground} is not auto, half, nonzero, zero, or a "
                 "list of values such as 85,255")
    if not args.foreground:
        args.foreground = "bright" if args.dataset == "demo" else "auto"
        if args.dataset in PUBLISHED:
            args.foreground = PUBLISHED[args.dataset].foreground
    name_unused(args, parser)
    return args


def name_unused(args, parser):
    """Print in one line which flags were given that this data set does not use."""
    used = {"folder": ("raw", "mask_foreground", "group_regex", "page", "skip_bad"),
            "dm": ("raw", "split_by", "page", "skip_bad", "download"), "demo": ()}
    used = used.get(args.dataset, ("raw", "skip_bad", "download"))
    flags = ("raw", "mask_foreground", "group_regex", "split_by", "page", "skip_bad", "download")
    given = [f"--{flag.replace('_', '-')}" for flag in flags
             if flag not in used and getattr(args, flag) != parser.get_default(flag)]
    if given:
        print(f"not used by {args.dataset} and ignored: {', '.join(given)}")


def main(argv=None):
    args = parse_args(argv)
    final = Path(args.out) / args.name
    if args.check:
        return check(final)
    with only_one(final.with_name(f".{args.name}.lock")):
        if final.exists() and not args.overwrite:
            sys.exit(f"{final} is already there: nothing done; --overwrite replaces it")
        if args.download and args.dataset in PUBLISHED:
            fetch(args)
        prepare = prepare_demo if args.dataset == "demo" else prepare_images
        prepare(args, final)
    meta = read_meta(final)
    counts = ", ".join(f"{n} {part}" for part, n in meta["counts"].items())
    print(f"{final}: {counts}, {meta['size']} px, foreground {meta['foreground']}; look at "
          f"{final / 'preview.png'}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # for names that the terminal cannot show
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:               # a full disk, a forbidden folder
        sys.exit(f"prepare_data.py: {error or 'interrupted'}; nothing half-written is left")
