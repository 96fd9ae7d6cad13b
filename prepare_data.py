"""Turn raw images into arrays that training maps into memory: data/<name>/.

    python prepare_data.py --dataset demo
    python prepare_data.py --dataset folder --raw my_images --size 224
    python prepare_data.py --dataset isic --raw raw/isic --download
    python prepare_data.py --dataset isic --check

demo draws a small set of stained nuclei. folder takes any folder of images, sub-folders included:
masks lie in masks/, labels/, gt/ ... with the names of their images, or are called NAME_mask;
train/, val/ and test/ are kept as the parts; an optional labels.csv has name,label. dm, tissuenet,
isic, xray, drone and dsb2018 take the files as their authors publish them, extracted or not.

Writes data/<name>/{train,val,test}_images.npy, uint8 (N, S, S, 3) RGB; {...}_masks.npy, uint8
{0, 1} (N, S, S), where there are masks (of the first images in train, if only some have one);
{...}.csv (name, group, label); meta.json; preview.png.
"""

import argparse
import collections
import contextlib
import csv
import ctypes
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
from dataclasses import dataclass, field, replace
import signal, time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError
from tqdm import tqdm

PARTS = ("train", "val", "test")
EXTENSIONS = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom"}
IMAGE_FOLDER = re.compile("(image|img)s?|imagest[rs]", re.IGNORECASE)
MASK_WORD = "masks?|labels?|gt|ground[ _-]?truths?|annotations?|segmentations?|segs?|manual"
MASK_FOLDER = re.compile(                       # masks, lung_masks, labelsTr, gt_val, 1st_manual
    rf"({MASK_WORD}|.+[ _-](masks?|ground[ _-]?truths?|manual))([ _-]?(tr|ts|train|val|test))?",
    re.IGNORECASE)
MASK_NAME = re.compile(                         # NAME_mask, NAME-seg, NAME_mask_2
    rf"(.*[^/])[ _.-]({MASK_WORD}|(cp|inst)_masks?|lesion|binary|anno|[12](st|nd)ho)([ _.-]?\d+)?",
    re.IGNORECASE)
MASK_FIRST = re.compile(rf"(.*/)?({MASK_WORD})([ _.-][^/]*)?", re.IGNORECASE)      # mask_NAME
PART_FOLDER = re.compile(                       # training/x: train, x
    "(.*?/)??(train(?=/|ing/)|val(?=/|id/|idation/)|test(?=/|ing/))[^/]*/(.*)", re.IGNORECASE)
DEMO_COUNTS = {"train": 64, "val": 16, "test": 32}
PLAIN_MODES = {"P": "RGB", "PA": "RGBA", "RGBa": "RGBA", "La": "LA", "CMYK": "RGB", "YCbCr": "RGB",
               "LAB": "RGB", "HSV": "RGB", "RGBX": "RGB"}           # Pillow's mode: converted to
TILE = 480                                      # side of a tile of a dm slide (section 3.1)

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)     # error at double
warnings.filterwarnings("ignore", module="pydicom")             # of files that it still reads
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)     # of what it raises too


@dataclass
class DatasetInfo:
    """What we, the paper or the authors say of a data set. above: the value above which a mask
    pixel is foreground; counts: train, val, test; inside: folders that --raw may name instead of
    the one that holds them; files: what --download fetches, where no account is needed."""
    foreground: str
    above: int = 0
    counts: tuple = ()
    homepage: str = ""
    inside: str = "-"
    files: tuple = ()
    size: int = 224


ISIC_FILES = "https://isic-challenge-data.s3.amazonaws.com/2017/ISIC-2017_{}_{}"
DATASET_INFO = {
    "demo": DatasetInfo("bright", size=64),
    "folder": DatasetInfo("auto"),
    "dm": DatasetInfo(
        "bright", 0, (1656, 240, 480),
        "its authors: Van Buren et al. 2022, https://doi.org/10.1016/j.jim.2022.113233",
        "CD27[ _]Panel[^/]*|Labels"),
    "tissuenet": DatasetInfo(
        "bright", 0, (2580, 3140, 1249), "https://datasets.deepcell.org/data (free account)"),
    "isic": DatasetInfo(
        "dark", 127, (2000, 150, 600), "https://challenge.isic-archive.com/data/#2017",
        "ISIC-2017_[^/]*_[^/]*",
        [ISIC_FILES.format(part, what)
         for part in ("Training", "Validation", "Test_v2")
         for what in ("Data.zip", "Part1_GroundTruth.zip", "Part3_GroundTruth.csv")]),
    "xray": DatasetInfo(
        "dark", 127, (14730, 2202, 4233), "https://www.kaggle.com/datasets/tawsifurrahman/"
        "covid19-radiography-database (free account)",
        "(COVID|Lung_Opacity|Normal|Viral Pneumonia)(/images|/masks)?"),
    "drone": DatasetInfo(
        "bright", 0, (280, 40, 80), "http://dronedataset.icg.tugraz.at (or the Semantic Drone "
        "Dataset on Kaggle, free account)",
        "original_images|label_images_semantic|RGB_color_image_masks|training_set(/images|/gt)?"),
    "dsb2018": DatasetInfo(
        "auto", 0, (469, 67, 134), "https://bbbc.broadinstitute.org/BBBC038",
        files=["https://data.broadinstitute.org/bbbc/BBBC038/stage1_train.zip"]),
}


# ---------------------------------------------------------------------------------- reading files

@dataclass
class Picture:
    """One page of an image file. pixels: gray (H, W), bool or numbers; or (H, W, 2, 3 or 4), gray
    and alpha, RGB, RGB and alpha; values as stored. read_picture undoes what a reader says of
    orientation (the number of EXIF and TIFF) and white_is_zero."""
    pixels: np.ndarray
    pages: int = 1                              # of the file
    orientation: int = 1
    white_is_zero: bool = False
    patient: str = ""                           # DICOM: a hash of the patient's id


def read_picture(path, page=0, as_mask=False):
    """Read one page of an image file: a Picture, upright, with bright as the larger value.

    as_mask: keep the stored values of DICOM, and the indices of palettes that start with black and
    hold colours. Raises ValueError, path and reason, where a file cannot be read whole and
    correctly.
    """
    try:
        with open(path, "rb") as file:          # Pillow misreads some turned TIFFs given by path
            head = file.read(132)
            file.seek(0)
            if not head:
                raise ValueError("the file is empty")
            if head[128:] == b"DICM" or Path(path).suffix.lower() in (".dcm", ".dicom"):
                picture = read_dicom(file, page, as_mask)
            else:
                try:
                    picture = read_with_pillow(file, page, as_mask)
                except UnidentifiedImageError:
                    if head[:2] not in (b"II", b"MM"):
                        raise ValueError("not an image, or of a kind that is unknown") from None
                    picture = read_with_tifffile(file, page)
        pixels = picture.pixels
        if pixels.dtype.kind == "c":
            raise ValueError("holds complex numbers")
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise ValueError("holds values that are not finite")
    except Exception as error:                  # Pillow raises OSError, SyntaxError, struct.error
        reason = str(error).partition("\n")[0] or repr(error)
        raise ValueError(f"{path}: cannot be read: {reason}") from None
    if picture.white_is_zero:
        pixels = max(1, pixels.max()) - pixels if pixels.dtype.kind == "f" else ~pixels
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
    """Read an open file with Pillow, or with OpenCV where Pillow would cut 16-bit colour to 8.
    Raises UnidentifiedImageError where neither reads it rightly."""
    with Image.open(file) as image:
        pages = getattr(image, "n_frames", 1)
        require_page(page, pages)
        image.seek(page)
        is_deep = ";16" in str(image.tile)
        tags, orientation = getattr(image, "tag_v2", {}), 1         # which Pillow turns by itself
        if not tags:
            orientation = image.getexif().get(274, 1)
        elif not pillow_can_read(image):
            raise UnidentifiedImageError
        image.load()
        mode = PLAIN_MODES.get(image.mode, image.mode)
        if image.mode == "P" and as_mask:
            palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
            if not palette[0].any() and (palette != palette[:, :1]).any():
                mode = "P"                      # class numbers, not colours or grays
        pixels = np.asarray(image.convert(mode))
    if is_deep and pixels.ndim == 3:
        file.seek(0)
        pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
        if page or pixels is None or pixels.dtype != np.uint16:
            raise UnidentifiedImageError
        pixels = pixels[..., [2, 1, 0, 3][:pixels.shape[2]]]        # BGR
    bits, sample_format = kind_of_numbers(tags)
    if (bits, sample_format) == (32, 1):
        pixels = pixels.view(np.uint32)         # Pillow has no such mode
    white_is_zero = tags.get(262) == 0 and bits > 8         # it inverts the rest
    return Picture(pixels, pages, orientation, white_is_zero)


def kind_of_numbers(tags):
    """Of the tags of a TIFF: bits a sample, and 1 for unsigned, 2 signed, 3 float."""
    return tags.get(258, (1,))[0], tags.get(339, (1,))[0]


def pillow_can_read(image):
    """Whether Pillow, or OpenCV for 16-bit colour, reads a page of a TIFF that Pillow opened as it
    is meant: not signed bytes, unknown channels, alpha in planes, or what it swaps or turns."""
    tags, kind, n = image.tag_v2, kind_of_numbers(image.tag_v2), len(image.getbands())
    is_gray = tags.get(262, 0) < 2
    in_planes = tags.get(284, 1) == 2
    extra = tags.get(338, ())                   # 0: channels of which it is not said what they are
    if n != tags.get(277, 1) or is_gray and (extra == (0,) or n == 3):
        return False
    if kind[0] <= 8:
        return kind[1] == 1 and not (in_planes and extra)
    if n > 1:
        return kind == (16, 1) and tags.get(262) == 2 and not in_planes and tags.get(274, 1) == 1
    if kind not in ((12, 1), (16, 1), (32, 1), (16, 2), (32, 2), (32, 3)):
        return False
    return tags.prefix == b"II" or kind == (16, 1)


def read_with_tifffile(file, page):
    """Read an open TIFF with tifffile. Raises ValueError for what is not gray or RGB."""
    try:
        import tifffile
    except ImportError:
        raise ValueError("a TIFF of a kind (bits, channels, byte order, orientation) that Pillow "
                         "misreads: pip install tifffile") from None
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        require_page(page, len(tiff.pages))
        found = tiff.pages[page]
        n = found.samplesperpixel
        has_alpha = n == 4 and found.photometric == 2 or found.extrasamples in ((1,), (2,))
        if found.photometric > 2 or n not in (1, 3) and not has_alpha or found.ndim > 3:
            raise ValueError(f"a TIFF of {n} channels and the axes {found.axes}, neither gray nor "
                             "RGB")
        pixels = found.asarray()
        if found.axes == "SYX":                 # separate planes
            pixels = np.moveaxis(pixels, 0, -1)
        orientation = found.tags.valueof(274, 1)
        return Picture(pixels, len(tiff.pages), orientation, found.photometric == 0)


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
    groups = [*ds.get("SharedFunctionalGroupsSequence", ())]
    groups += ds.get("PerFrameFunctionalGroupsSequence", ())[page:page + 1]
    for group in groups:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(name, ()):
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
            white = 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
            pixels = to_eight_bits(dicom.apply_voi_lut(pixels, ds), (0, white))
        elif ds.get("WindowWidth"):
            ends = dicom.apply_voi_lut(np.array([-1e9, 1e9]), ds)       # its black and white
            pixels = to_eight_bits(dicom.apply_voi_lut(pixels, ds), ends)
    patient = str(ds.get("PatientID") or "").strip()
    if patient:
        patient = hashlib.sha256(patient.encode()).hexdigest()[:12]
    return Picture(pixels, pages, white_is_zero=photometric == "MONOCHROME1", patient=patient)


def to_eight_bits(pixels, ends=None):
    """Scale numbers of any type to uint8: `ends`, two values, become 0 and 255; unset: the 0.1 and
    99.9 percentiles. If both ends are equal, the smallest and the largest value are used."""
    pixels = pixels.astype(np.float64)
    low, high = np.percentile(pixels, (0.1, 99.9)) if ends is None else ends
    if high == low:
        low = pixels.min()
        high = max(pixels.max(), low + 1)
    return ((pixels - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)


def to_rgb(picture):
    """Picture -> uint8 (H, W, 3). Gray is repeated; alpha is dropped, not blended; other types
    than bool and uint8 are scaled by to_eight_bits, all channels alike."""
    pixels = np.atleast_3d(picture.pixels)
    if pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    if pixels.dtype != np.uint8:
        pixels = to_eight_bits(pixels)
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), order="C")


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


def read_mask(path, page=0):
    """Read a mask file; one with a single page serves any `page`. Raises ValueError.

    Values stay as stored, but bool becomes 0 and 255. Of colours the largest channel counts; of
    palettes see read_picture; the alpha channel counts where it alone varies.
    """
    picture = read_picture(path, as_mask=True)
    if page and picture.pages > 1:
        picture = read_picture(path, page, as_mask=True)
    values = np.atleast_3d(picture.pixels)
    if values.shape[2] in (2, 4):
        alpha, values = values[..., -1:], values[..., :-1]
        is_flat = (values == values[0, 0]).all()
        if is_flat and (alpha.min() < alpha.max() or not alpha.any()):
            values = alpha
    values = values.max(axis=2)
    if values.dtype == bool:
        values = values * np.uint8(255)
    spans = [255, 65535, math.inf]
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        kind = "two values" if values.min() == 0 and np.unique(values).size == 2 else "soft edges"
        spans = [1, *spans]
    else:
        if values.dtype not in (np.uint8, np.uint16):
            values = values.astype(np.float64).clip(-2 ** 62, 2 ** 62).astype(np.int64)
        kind = kind_of(values, Path(path).suffix.lower() in (".jpg", ".jpeg"))
    top = values.max()
    span = 1 if kind == "0/1" else min(span for span in spans if top <= span)
    return Mask(str(path), values, kind, top, span)


def kind_of(values, is_jpg):
    """Say what the integers (H, W) of a mask are.

    "0/1"; "0/255"; another "two values", or one; "classes and 255"; "soft edges", more than two
    values between background and foreground that lie on slopes, as in resized, blurred and jpg
    masks; "classes" (below 32), "numbers" (of classes or instances) or "levels" (of a jpg), which
    do not; else "few values".
    """
    found = np.unique(values)
    top = found[-1]
    inner = found[(found > 0) & (found < top)]
    if top == 1:
        return "soft edges" if is_jpg else "0/1"    # in a jpg a 1 is noise
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
    cuts: dict = field(default_factory=dict)    # a span that is not there: 0
    half: bool = False                          # asked for: masks of two values are cut as well
    inverted: bool = False
    ignored: int | None = None


def decide_mask_rule(asked, masks):
    """Return the MaskRule of a data set from --mask-foreground and all its Masks (values unused),
    and the rule in words.

    auto: above half of the range where any mask has soft edges, else above 0; masks of two values
    always above 0. zero: the inverse. half: above half of the range for all. Ends the program with
    an example of each kind where one rule cannot read all files.
    """
    if asked[0].isdigit():
        return MaskRule(tuple(map(int, asked.split(",")))), f"the values {asked}"
    kinds, tops = collections.defaultdict(list), collections.Counter()
    for mask in masks:
        kinds[mask.kind].append(mask.path)
        tops[mask.span] = max(tops[mask.span], mask.top)
    evidence = f"{asked}; masks: " + ", ".join(
        f"{len(paths)} with {kind}, as {paths[0]}" for kind, paths in sorted(kinds.items()))
    rule = MaskRule(half=asked == "half", inverted=asked == "zero")
    is_soft = rule.half or asked != "nonzero" and "soft edges" in kinds
    if asked in ("auto", "zero"):
        classes = {"classes", "classes and 255"} & kinds.keys()
        mixed = is_soft and (classes or "numbers" in kinds)
        if mixed or "levels" in kinds or classes and "0/255" in kinds:
            sys.exit(f"{evidence}: say what is foreground, --mask-foreground half, nonzero, or a "
                     "list such as 1,255")
        if "classes and 255" in kinds:
            rule.ignored = 255
            evidence += "; 255 beside class numbers is the ignore value, and not foreground"
    if is_soft:
        rule.cuts = {span: max(top, span == 1) / 2 for span, top in tops.items()}
    cuts = " or ".join(f"{cut:g}" for cut in rule.cuts.values()) or "0"
    return rule, f"{'not ' * rule.inverted}above {cuts} ({evidence})"


def foreground_of(mask, rule):
    """Mask -> bool (H, W). Raises ValueError for values below 0, unless the rule names values."""
    if rule.values:
        return np.isin(mask.values, rule.values)
    if mask.values.min() < 0:
        raise ValueError(f"{mask.path}: has values below 0: say which are foreground, as in "
                         "--mask-foreground 1")
    cut = rule.cuts.get(mask.span, 0)
    if mask.kind in ("two values", "0/255", "0/1") and not rule.half:
        cut = 0
    above = mask.values > cut
    return (above != rule.inverted) & (mask.values != rule.ignored)


# ------------------------------------------------------------------ bright or dark, label-free

def otsu_mask(image, foreground):
    """uint8 (H, W, 3) RGB -> uint8 {0, 1} (H, W): above Otsu's threshold for "bright", not above it
    for "dark"; all 0 where the image is of one gray."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if gray.min() == gray.max():
        return np.zeros_like(gray)
    side = cv2.THRESH_BINARY if foreground == "bright" else cv2.THRESH_BINARY_INV
    return cv2.threshold(gray, 0, 1, side | cv2.THRESH_OTSU)[1]


def enclosed_areas(image):
    """uint8 (H, W, 3) -> (bright, dark): the share of the picture in components, of either side of
    Otsu's threshold, that do not touch the border. Objects lie inside a picture; the background
    runs out of it."""
    areas = []
    for foreground in ("bright", "dark"):
        mask = cv2.copyMakeBorder(otsu_mask(image, foreground), 1, 1, 1, 1, cv2.BORDER_CONSTANT,
                                  value=1)
        cv2.floodFill(mask, None, (0, 0), 0)    # the border, and all that touches it
        areas.append(float(mask[1:-1, 1:-1].mean()))
    return tuple(areas)


def decide_foreground(asked, areas):
    """"bright" or "dark" for the whole data set, and the evidence. areas: enclosed_areas of the
    training images, (N, 2)."""
    if asked != "auto":
        return asked, "set by --foreground, or known of this data set"
    bright, dark = np.array(areas).T
    decision, agree = "bright", np.mean(bright > dark)
    if dark.mean() > bright.mean():
        decision, agree = "dark", np.mean(dark > bright)
    evidence = (f"enclosed regions cover {bright.mean():.3f} of a training image when bright, "
                f"{dark.mean():.3f} when dark; {agree:.0%} of {len(bright)} images agree")
    if agree < 0.75:
        evidence += "; the evidence is thin: see preview.png, and set --foreground if it is wrong"
    return decision, evidence


# ----------------------------------------------------------------------------- finding the files

@dataclass
class Pair:
    """An image with its masks, where it belongs, and what load found."""
    name: str
    image: Path                                 # or a name, where it is no file of its own
    masks: list = field(default_factory=list)   # paths; their union is the mask
    group: str = ""                             # patient, or what else must stay in one part
    label: str = ""
    part: str = ""
    unit: str = ""                              # what stays in one part, see join_duplicates
    index: tuple = ()                           # tissuenet: folder, number; demo: of default_rng
    pages: int = 1
    row: int = 0                                # of the scratch file
    share: float = 0                            # of the mask that is foreground
    areas: tuple = ()                           # enclosed_areas
    digest: str = ""                            # digest_of
    patient: str = ""                           # of DICOM
    is_binary: bool = False                     # two values, as masks have


@dataclass
class Files:
    """The image files below a folder; bad: a line for each that cannot be used."""
    images: dict                                # {name: path}
    masks: dict                                 # {name: [paths]}, of some of these images
    bad: list


def warn(found, words):
    """Print how many there are of what was found, if any, and the first."""
    if found:
        print(f"{len(found)} {words} (the first: {found[0]})")


def find_files(raw):
    """All image files below the folder `raw`, as Files; links are followed, hidden files left out.

    A name is the path below raw without suffix, in Unicode NFC, and without folders called images
    or as MASK_FOLDER. Masks are the files in such a folder, and NAME_mask beside NAME. Beside a
    folder images/ only folders of masks are looked into. What is not taken is printed. Ends the
    program where two readings are possible.
    """
    if not raw.is_dir():
        sys.exit(f"{raw}: no such folder")
    images, in_folders, bad, others, unread, seen = {}, [], [], [], [], set()
    for place, folders, files in os.walk(raw, followlinks=True):
        place = Path(place)
        if "train_images.npy" in files or place.resolve() in seen:      # links may go in circles
            print(f"{place}: not taken: prepared arrays, or a link to what is taken elsewhere")
            folders.clear()
            continue
        seen.add(place.resolve())
        folders[:] = sorted(filter(is_content, folders))
        files = sorted(filter(is_content, files))
        if any(map(IMAGE_FOLDER.fullmatch, folders)):
            aside = [name for name in folders if not is_image_or_mask_folder(name)]
            warn(aside + files, f"in {place} are beside images/ and masks/, and not taken")
            folders[:] = filter(is_image_or_mask_folder, folders)
            continue
        is_mask = any(map(MASK_FOLDER.fullmatch, place.relative_to(raw).parts))
        for file in files:
            path = place / file
            name = name_of(path.relative_to(raw))
            if kind_of_file(path) not in EXTENSIONS:
                others.append(path)
                if is_mask:
                    unread.append(path)
            elif name.encode(errors="ignore").decode() != name:
                bad.append(f"{path}: its name is not UTF-8 (of a Windows zip?): rename it")
            elif is_mask:
                in_folders.append((name, path))
            elif name in images:
                bad.append(f"{path}: the name {name} is used twice, see {images[name]}")
            else:
                images[name] = path
    kinds = sorted({path.suffix for path in others})
    warn(others, f"files are of kinds that are not read, {kinds} (volumes: cut them into slices, a "
         "file each)")
    masks = match_masks(raw, images, in_folders)
    if not images:
        sys.exit("\n".join([*bad, f"{raw}: no images here ({' '.join(sorted(EXTENSIONS))}), "
                            f"{len(in_folders)} in folders that are called as those of masks"]))
    if unread and not masks:
        sys.exit(f"{unread[0]}: a mask of a kind that is not read: convert it, or give the folder "
                 "of the images alone")
    return Files(images, masks, bad)


def is_content(name):
    """Whether a file or folder of this name is looked into."""
    return name[0] != "." and name not in ("__MACOSX", "labels.csv")


def is_image_or_mask_folder(folder):
    """Whether a folder is called images, masks or the like, which is no part of a name."""
    return IMAGE_FOLDER.fullmatch(folder) or MASK_FOLDER.fullmatch(folder)


def kind_of_file(path):
    """The suffix of a file, in lower case; .dcm for DICOM under an unknown suffix, or none."""
    kind = path.suffix.lower()
    if kind not in EXTENSIONS and path.name != "DICOMDIR" and path.is_file():
        with open(path, "rb") as file:
            if file.read(132)[128:] == b"DICM":
                return ".dcm"
    return kind


def name_of(path):
    """The name of an image or mask file from its path below --raw: see find_files."""
    *folders, file = path.parts
    if path.suffix.lower() in EXTENSIONS:
        file = path.stem
    if {"imagesTr", "imagesTs"} & set(folders):
        file = re.sub(r"_\d{4}$", "", file)     # nnU-Net's channel
    folders = [folder for folder in folders if not is_image_or_mask_folder(folder)]
    return unicodedata.normalize("NFC", "/".join([*folders, file]))


def match_masks(raw, images, in_folders):
    """Return {name: [mask paths]}. images: {name: path}, from which masks beside them are removed;
    in_folders: (name, path) of the files in mask folders. Ends the program where two readings are
    possible."""
    found, unclear, names = [*in_folders], [], {*images}
    endings = collections.Counter()
    for name, path in [*images.items()]:
        match = MASK_NAME.fullmatch(name)
        other = re.fullmatch(r"(.+[^/])([ _.-]\D+?)", name)
        if match and match[1] in names:
            found.append((name, images.pop(name)))
        elif match or MASK_FIRST.fullmatch(name):
            unclear.append(path)
        elif other and other[1] in names:
            endings[other[2]] += 1
    for ending, n in endings.items():
        if n > max(2, 0.45 * len(names)):
            sys.exit(f"{raw}: nearly every image NAME has a NAME{ending}. If these are its masks, "
                     "call them NAME_mask or put them into masks/; if not, into another folder")
    if 0 < len(unclear) < len(images):
        sys.exit(f"{unclear[0]}: by its name a mask, but of no image here. Put masks into "
                 f"{raw}/masks under their images' names, or rename the image")
    masks, orphans = join_names({name: name for name in images}, found)
    by_file = {Path(name).name: name for name in images}
    if orphans and not masks and len(by_file) == len(images):       # original/x with masks/x
        masks, orphans = join_names(by_file, [(Path(name).name, path) for name, path in found])
    warn(orphans, "masks have no image and are not used")
    folders = {path.parent for paths in masks.values() for path in paths}
    unused = {path.parent for path in orphans} - folders
    if images and unused:
        sys.exit(f"{min(unused)}: no mask there has the name of an image, such as {min(images)}: "
                 "rename them, or take them away")
    for name, paths in masks.items():
        unnumbered = [path for path in paths if not path.stem[-1].isdigit()]
        if len({path.parent for path in paths}) > 1 or len(unnumbered) > 1:
            sys.exit(f"{images[name]}: has two masks, {paths[0]} and {paths[1]}: keep one, or "
                     "number them in one folder if they belong together")
    if masks:
        print(f"masks of {len(masks)} images in {', '.join(sorted(map(str, folders))[:3])}")
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
    """All images below --raw as Pairs: with masks where a part has any (--keep-unlabelled: or for
    train), parts as train/, val/ and test/ say, groups and labels."""
    files = find_files(raw)
    bad += files.bad
    above = raw.resolve().parent
    if IMAGE_FOLDER.fullmatch(raw.resolve().name):
        warn([path for path in sorted(above.iterdir()) if MASK_FOLDER.fullmatch(path.name)],
             f"folders of masks are beside {raw}, and not taken: give --raw {above} for them")
    pairs = []
    for name, path in sorted(files.images.items()):
        pair = Pair(name, path, files.masks.get(name, []))
        match = PART_FOLDER.fullmatch(name)
        if match:
            pair.part = match[2].lower()
            pair.name = (match[1] or "") + match[3]
        pairs.append(pair)
    found = {pair.part for pair in pairs}
    if found not in ({""}, {*PARTS}):
        sys.exit(f"{raw}: has {' '.join(sorted(found)).strip()}: give all of train, val and test, "
                 "and no images outside of them; or rename them, to be split here")
    masked = {pair.part for pair in pairs if pair.masks}
    kept, unlabelled = [], []
    for pair in pairs:
        if pair.masks or pair.part not in masked:
            kept.append(pair)
        elif pair.part in ("val", "test"):
            bad.append(f"{pair.image}: has no mask")
        elif args.keep_unlabelled:
            kept.append(pair)
            unlabelled.append(pair.image)
        else:
            bad.append(f"{pair.image}: has no mask; --keep-unlabelled trains on it without")
    warn(unlabelled, "images have no mask, and are kept for the part train")
    if args.group_regex:
        kept = group_by_regex(kept, args.group_regex, bad)
    else:
        group_by_folder(raw, kept)
    if (raw / "labels.csv").is_file():
        set_labels(raw / "labels.csv", kept)
    return kept


def group_by_regex(pairs, regex, bad):
    """The pairs in whose names `regex` finds a group, set to the match's first group, or the whole
    match."""
    for pair in pairs:
        match = re.search(regex, pair.name)
        if match:
            pair.group = match[match.re.groups and 1]
        if not pair.group:
            bad.append(f"{pair.image}: {pair.name} does not match --group-regex {regex}")
    return [pair for pair in pairs if pair.group]


def group_by_folder(raw, pairs):
    """Set the group of each pair to the topmost folder of its name that not all share. Ends the
    program where few large folders may be classes."""
    folders = [pair.name.split("/")[:-1] for pair in pairs]
    shared = len(os.path.commonprefix(folders))
    for pair, inside in zip(pairs, folders, strict=True):
        pair.group = "".join(inside[shared:shared + 1])
    names = sorted({pair.group for pair in pairs} - {""})
    if not names or pairs[0].part or kind_of_file(pairs[0].image) in (".dcm", ".dicom"):
        return                                  # DICOM has an id
    n = len({pair.group or pair.name for pair in pairs})
    if n < 5 and len(pairs) >= 8 * n:
        sys.exit(f"{raw}: {len(pairs)} images in the folders {', '.join(names)}. Is each of them a "
                 "patient, whose images stay in one part? Then give --group-regex '^([^/]+)/'. If "
                 "they are classes, give --group-regex '.+'")
    warn(names, f"folders of {raw} are taken as patients, and each stays in one part: "
         "--group-regex '.+' splits image by image")


def set_labels(path, pairs):
    """Set the label of each pair from the table labels.csv, where it stands by the pair's name or
    its file's. Ends the program where none does."""
    labels = {}
    for row in read_table(path, ("name", "label")):
        name = name_of(Path(row["name"] or "?"))
        if labels.setdefault(name, row["label"]) != row["label"]:
            sys.exit(f"{path}: {name} has two labels, {labels[name]} and {row['label']}")
    used = set()
    for pair in pairs:
        file = name_of(pair.image.relative_to(path.parent))
        for name in (Path(file).name, file, pair.name):
            if name in labels:                  # the last that is there counts
                pair.label = labels[name]
                used.add(name)
    left = sorted(labels.keys() - used)
    print(f"{path}: {sum(not pair.label for pair in pairs)} of {len(pairs)} images have no label")
    warn(left, "rows of it have no image")
    if pairs and not used:
        sys.exit(f"{path}: none of its names, {left[:1]}, is that of an image, {pairs[0].name}")


def read_table(path, columns):
    """The rows of a CSV as programs write it (UTF-8, UTF-16 or Windows-1252; comma, semicolon or
    tab), a list of dicts; ends the program where one of the columns is not there."""
    data = path.read_bytes()
    is_wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
    if not {*columns} <= {*rows.fieldnames}:
        sys.exit(f"{path}: needs the columns {' and '.join(columns)}, has {rows.fieldnames}")
    return [{key: (row[key] or "").strip() for key in columns} for row in rows]


# -------------------------------------------------------------------------------------- splitting

def join_duplicates(pairs):
    """Set what stays in one part, Pair.unit: groups that share a picture (Pair.digest) or a patient
    become one. Prints how many pictures are there twice."""
    names, units = np.unique([pair.group or f"{pair.part}/{pair.name}" for pair in pairs],
                             return_inverse=True)
    first, again = {}, []
    for k, pair in enumerate(pairs):
        for key in filter(None, (pair.digest, pair.patient)):
            other = first.setdefault(key, k)
            if other != k:
                units[units == units[k]] = units[other]
                if key == pair.digest:
                    again.append(f"{pair.image} and {pairs[other].image}")
    for pair, unit in zip(pairs, units, strict=True):
        pair.unit = str(names[unit])
    warn(again, "pictures are there twice: equal ones go into one part, unless parts are given")


def split(pairs, seed):
    """Set the part of every pair: units in seeded order, cut at int(.7 n) and int(.8 n) images, or
    slides; a unit that a cut falls into stays whole. Of three or more units, some of several
    images, each part gets at least one."""
    images = collections.defaultdict(set)       # of each unit; the tiles of a slide are one
    for pair in pairs:
        images[pair.unit].add(pair.image)
    order = np.random.default_rng(seed).permutation(sorted(images)).tolist()
    ends = np.cumsum([0] + [len(images[unit]) for unit in order])
    n, total = len(order), ends[-1]
    cuts = np.searchsorted(ends, [int(0.7 * total), int(0.8 * total)])
    if 3 <= n < total:
        cuts[0] = np.clip(cuts[0], 1, n - 2)
        cuts[1] = np.clip(cuts[1], cuts[0] + 1, n - 1)
    place_of = dict(zip(order, np.searchsorted(cuts, range(n), "right"), strict=True))
    for pair in pairs:
        pair.part = PARTS[place_of[pair.unit]]


def stratify(pairs, seed):
    """Set the part of every pair: 20 % test, then 13 % of the rest validation, both rounded up,
    stratified by label. Equal pictures go together to the first part with room for them."""
    classes = collections.defaultdict(list)
    members = collections.defaultdict(list)
    for pair in pairs:
        classes[pair.label].append(pair.unit)
        members[pair.unit].append(pair)
    ranked = []                                 # the classes, each in seeded order, evenly merged
    generator = np.random.default_rng(seed)
    for label, units in sorted(classes.items()):
        for k, unit in enumerate(generator.permutation(units).tolist()):
            ranked.append(((k + 0.5) / len(units), label, k, unit))
    test = math.ceil(0.2 * len(pairs))
    val = math.ceil(0.13 * (len(pairs) - test))
    room = {"test": test, "val": val, "train": len(pairs)}
    for *_, unit in sorted(ranked):
        together = members.pop(unit, [])
        part = next(part for part in room if room[part] >= len(together))
        room[part] -= len(together)
        for pair in together:
            pair.part = part


# ---------------------------------------------------------------------- the data sets as published

def unpack(archive):
    """Extract a .zip, .npz or .tar[.gz] beside itself, once, into a folder of the same name. Both
    libraries reject members that point outside. Ends the program where it is broken."""
    folder = archive.with_name(re.sub(r"(\.tar)?\.\w+$", "", archive.name))
    if folder.exists():
        return
    print(f"{archive}: extracting to {folder}")
    with new_folder(folder) as partial:
        try:
            if archive.suffix.lower() in (".zip", ".npz"):
                shutil.unpack_archive(archive, partial, "zip")
            elif not hasattr(tarfile, "data_filter"):       # before Python 3.10.12, 3.11.4
                sys.exit(f"{archive}: cannot be extracted safely by this Python: extract it by "
                         "hand, or use Python 3.11.4 or newer")
            else:
                shutil.unpack_archive(archive, partial, "tar", filter="data")
        except Exception as error:              # of zipfile, tarfile, zlib, lzma, shutil
            sys.exit(f"{archive}: cannot be extracted ({error}); nothing was kept: get it again")


def find_all(raw, pattern, missing):
    """Paths below `raw` that match a pattern such as COVID/images/*, at any depth, near ones first;
    links are followed, hidden files left out. A pattern that none matches goes to `missing`."""
    found = glob.glob(f"**/{pattern}", root_dir=raw, recursive=True)
    if not found:
        missing.append(pattern)
    return [raw / path for path in sorted(found, key=lambda path: (path.count("/"), path))]


def images_in(raw, pattern, missing, ending=""):
    """{stem without `ending`: path} of the image files that match find_all's pattern and whose stem
    ends so; of equal stems the nearest to raw."""
    found = {}
    for path in find_all(raw, pattern, missing):
        if path.suffix.lower() in EXTENSIONS and path.stem.lower().endswith(ending):
            found.setdefault(path.stem[:len(path.stem) - len(ending)], path)
    return found


def pair_up(images, masks, **more):
    """Pairs of {name: image path}, with the mask of {name: mask path} where there is one; more:
    fields that all have."""
    pairs = []
    for name, path in sorted(images.items()):
        found = [masks[name]] if name in masks else []
        pairs.append(Pair(name, path, found, **more))
    return pairs


def find_isic(raw, args, missing):
    """ISIC-2017: the official parts; labels from Part3, nevus where neither column says 1."""
    pairs = []
    diseases = ["seborrheic_keratosis", "melanoma"]
    for part, official in zip(PARTS, ("Training", "Validation", "Test_v2"), strict=True):
        stem = f"ISIC-2017_{official}_"
        images = images_in(raw, stem + "Data/*[0-9].*", missing)           # not *_superpixels.png
        masks = images_in(raw, stem + "Part1_GroundTruth/*", missing, "_segmentation")
        labels = {}
        for table in find_all(raw, stem + "Part3_GroundTruth.csv", missing)[:1]:
            for row in read_table(table, ["image_id", *diseases]):
                found = [disease for disease in diseases if row[disease] in ("1", "1.0")]
                labels[row["image_id"]] = ["nevus", *found][-1]
        for pair in pair_up(images, masks, part=part):
            pair.label = labels.get(pair.name, "")
            pairs.append(pair)
    return pairs


def find_xray(raw, args, missing):
    """The COVID-19 Radiography data: class = label; masks of 256 px for images of 299."""
    pairs = []
    for label in ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"):
        images = images_in(raw, f"{label}/images/*", missing)
        masks = images_in(raw, f"{label}/masks/*", missing)
        pairs += pair_up(images, masks, label=label)
    return pairs


def find_drone(raw, args, missing):
    """The Semantic Drone Dataset, from Kaggle or its own page: foreground is any class but
    `unlabeled`, which is index 0 and black, so nearly everything."""
    for layout in (("original_images/*", "label_images_semantic/*"),
                   ("original_images/*", "RGB_color_image_masks/*"),
                   ("training_set/images/*", "training_set/gt/semantic/label_images/*")):
        images, masks = [images_in(raw, pattern, []) for pattern in layout]
        if images and masks:
            print("foreground is nearly everything: 99.8 % of the pixels of the published masks")
            return pair_up(images, masks)
    missing += layout
    return []


def find_dsb2018(raw, args, missing):
    """BBBC038 stage 1: one folder per image, named after it; one mask per nucleus."""
    pairs = []
    for name, path in sorted(images_in(raw, "images/*", missing).items()):
        folder = path.parent.parent
        if name == folder.name:
            pairs.append(Pair(name, path, sorted(folder.glob("masks/[!.]*.*"))))
    return pairs


def find_dm(raw, args, missing):
    """Dermatomyositis slides, paired by what stands before `_component`; a slide's tiles stay
    together, or with --split-by patient all of a patient's (the first two fields of the name).
    Masks are named as in either publication."""
    images = images_in(raw, "*_component_data.tif*", missing, "_component_data")
    pattern = "*_component*[mM]ask*.tif*"
    masks = images_in(raw, pattern, missing, "_component_data.tifmask")
    masks |= images_in(raw, pattern, [], "_component_mask_labels")
    pairs = pair_up(images, masks)
    for pair in pairs:
        pair.group = pair.name
        if args.split_by == "patient":
            pair.group = "_".join(pair.name.split("_")[:2])
    return pairs


def find_tissuenet(raw, args, missing):
    """TissueNet: the official parts, of the latest version; foreground is the whole cell."""
    pairs = []
    for part in PARTS:
        for path in find_all(raw, f"tissuenet_v*_{part}/X.npy", missing)[-1:]:
            folder = path.parent
            for i in range(len(np.load(path, mmap_mode="r"))):
                name = f"{folder}[{i}]"
                pairs.append(Pair(f"{part}_{i:05d}", name, [name], part=part, index=(folder, i)))
    return pairs


def two_channels(x):
    """TissueNet's (H, W, 2), nuclei and membranes -> uint8 (H, W, 3) RGB as DeepCell's
    documentation shows them: green and blue, each from the 5 and 95 percentiles of its non-zero
    pixels."""
    image = np.zeros((*x.shape[:2], 3), np.uint8)
    for channel in (0, 1):
        values = x[..., channel]
        lit = values[values > 0]
        if lit.size:
            low, high = np.percentile(lit, (5, 95))
            image[..., channel + 1] = to_eight_bits(values, (low, max(high, low + 1e-9)))
    return image


def find_demo(args):
    """What draw_nuclei will draw; every picture has a generator of its own."""
    pairs = []
    for p, (part, n) in enumerate(DEMO_COUNTS.items()):
        for i in range(n):
            name = f"{part}_{i:03d}"
            pairs.append(Pair(name, name, [name], part=part, index=(args.seed, p, i)))
    return pairs


FINDERS = {"dm": find_dm, "tissuenet": find_tissuenet, "isic": find_isic, "xray": find_xray,
           "drone": find_drone, "dsb2018": find_dsb2018}


def find_published(raw, args, bad):
    """The Pairs of a published data set; prints what is missing, and ends the program where a whole
    part is."""
    info = DATASET_INFO[args.dataset]
    if not raw.is_dir():
        sys.exit(f"{raw}: no such folder. {info.homepage}")
    raw = Path(re.sub(f"/({info.inside})$", "", raw.resolve().as_posix()))    # class -> its parent
    for path in sorted(raw.glob("[!.]*")):
        if re.search(r"\.(zip|npz|tar|tar\.gz|tgz)$", path.name, re.IGNORECASE):
            unpack(path)
    missing = []
    found = FINDERS[args.dataset](raw, args, missing)
    pairs = [pair for pair in found if pair.masks]
    bad += [f"{pair.image}: has no mask" for pair in found if not pair.masks]
    if missing:
        print(f"missing: {', '.join(missing)}; from {info.homepage}")
    if {pair.part for pair in pairs} not in ({""}, set(PARTS)):
        sys.exit(f"{raw}: not enough of {args.dataset} is here to fill train, val and test; "
                 "nothing was written")
    return pairs


def download(url, path, tries=5):
    """Fetch `url` to `path` with curl; what has come is kept in path.part, and the next try, or
    call, goes on from there. Ends the program where all tries fail."""
    partial = path.with_name(path.name + ".part")
    command = "curl --fail --location --continue-at - --create-dirs --speed-limit 1 --output"
    for _ in range(tries):                      # curl's own --retry would start from the beginning
        ended = subprocess.run([*command.split(), partial, url])
        if ended.returncode == 0:
            partial.replace(path)
            return
        if ended.returncode == 33:              # the server cannot go on from there
            partial.unlink()
    sys.exit(f"{url}: not fetched, see what curl says above (exit code {ended.returncode}). The "
             "same command goes on from there; if the file has moved, see the data set's page")


def fetch(args):
    """--download: the files of a data set that needs no account, into --raw; of another one, say
    where it is to be had."""
    info = DATASET_INFO[args.dataset]
    if not info.files:
        sys.exit(f"{args.dataset} cannot be fetched without an account. Get it from "
                 f"{info.homepage}, put the files or archives into a folder, and give --raw DIR")
    for url in info.files:
        path = Path(args.raw) / url.rpartition("/")[2]
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
        flags = name if name in DATASET_INFO else f"folder --name {name}"
        sys.exit(f"{folder} is not prepared: run python prepare_data.py --raw DIR --dataset "
                 f"{flags}")


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
    size, wrong, first, fingerprint = meta["size"], [], {}, hashlib.sha256()
    for part, n in meta["counts"].items():
        images, masks = open_part(folder, part)
        rows = read_names(folder, part)
        if len(rows) != n or images.shape[:2] != (n, size):
            wrong.append(f"{part}_images.npy is {images.shape}, {part}.csv has {len(rows)} rows, "
                         f"meta.json says {n} of {size} px")
        fingerprint.update(images)
        if masks is not None:
            fingerprint.update(masks)
        for row, image in zip(rows, images, strict=False):
            here = f"{row['name']} of {part}"
            for key in (("group", row["group"]), ("picture", digest_of(image))):
                there = first.setdefault(key, (part, here))
                if key[1] and there[0] != part:
                    wrong.append(f"the same {key[0]} in two parts: {there[1]} and {here}")
    found = fingerprint.hexdigest()
    if found != meta["fingerprint"]:
        wrong.append("not the arrays that were written: their fingerprint is another")
    if wrong:
        lines = "\n".join(f"{folder}: {line}" for line in wrong[:20])
        sys.exit(f"{lines}\n{len(wrong)} things are off: prepare it again with --overwrite")
    print(f"{folder}: {meta['counts']}, all is well; fingerprint {found}")


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
            print(f"{path}: another process is at work on this: try again when it has finished",
                  file=sys.stderr)
            sys.exit(75)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break                               # else its last holder has just removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):      # not empty
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def new_folder(final):
    """A temporary folder that takes the place of `final` when the block ends well, and is removed
    when it does not."""
    final = final.resolve()                     # a link to another disk stays one
    partial = final.with_name(f".{final.name}.partial")
    old = final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():     # a run was killed between two renames
        old.rename(final)
    for left in (partial, old):
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


def contact_sheet(rows, titles, captions=None, cell=112):
    """A table of pictures, uint8 (H, W, 3) RGB, with a title over each column and a caption under
    each row. rows: lists of uint8 (S, S, 3), masks {0, 1} or bool (S, S) (drawn black and white),
    or None (left empty)."""
    line, width = 18, cell + 4
    height = width + line * bool(captions)
    sheet = Image.new("RGB", (len(titles) * width, line + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        draw.text((i * width + 2, 2), title, "black")
    for k, row in enumerate(rows):
        top = line + k * height
        for i, tile in enumerate(row):
            if tile is not None:
                tile = to_rgb(Picture(tile if tile.ndim == 3 else tile > 0))
                sheet.paste(Image.fromarray(resize(tile, cell)), (i * width, top))
        if captions:
            draw.text((2, top + width), captions[k], "black")
    return np.array(sheet)


def write_preview(folder, foreground):
    """preview.png: image, pseudo-mask and truth side by side, for up to four images a part."""
    columns, titles = [], []
    for part in PARTS:
        images, masks = open_part(folder, part)
        images = np.array(images[:4])
        columns += [images, [otsu_mask(image, foreground) for image in images]]
        columns.append([] if masks is None else masks[:4])
        titles += [f"{part}: image", "Otsu", "no truth" if masks is None else "truth"]
    sheet = contact_sheet([*itertools.zip_longest(*columns)], titles)
    Image.fromarray(sheet).save(folder / "preview.png")


def write_arrays(folder, parts, size, scratch):
    """Write the arrays of {part: Pairs} from the rows of `scratch`, never more than one in memory.
    Returns the sha256 of them all."""
    digest = hashlib.sha256()
    pixels = size * size
    for part, pairs in parts.items():
        labelled = [pair for pair in pairs if pair.masks]
        for kind, rows, channels, first in (("images", pairs, (3,), 0),
                                            ("masks", labelled, (), 3 * pixels)):
            if not rows:
                continue
            shape = (size, size, *channels)
            with open(folder / f"{part}_{kind}.npy", "wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for pair in rows:
                    start = pair.row * 4 * pixels + first
                    row = np.fromfile(scratch, np.uint8, math.prod(shape), offset=start)
                    digest.update(row)
                    file.write(row)
    return digest.hexdigest()


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


# -------------------------------------------------------------------------------------- preparing

def load(pair, args, rule):
    """Read an image and its masks. Returns [(Pair, bytes)], one for each tile of a dm slide, or one
    in all; bytes: image (S, S, 3) and mask (S, S), zeros where there is none. Sets what a Pair says
    of its pictures. Raises ValueError with the path of the file that is bad."""
    size, mask = args.size, None
    if args.dataset == "demo":
        image, mask = draw_nuclei(size, np.random.default_rng(pair.index))
    elif args.dataset == "tissuenet":
        folder, i = pair.index
        image = two_channels(np.load(folder / "X.npy", mmap_mode="r")[i])
        mask = np.load(folder / "y.npy", mmap_mode="r")[i, ..., 0] > 0
    else:
        picture = read_picture(pair.image, args.page)
        image = to_rgb(picture)
        pair.pages = picture.pages
        if not args.group_regex:                # which says more
            pair.patient = picture.patient
        for path in pair.masks:
            one = foreground_of(read_mask(path, args.page), rule)
            if one.shape != image.shape[:2] and args.dataset != "xray":     # as published
                raise ValueError(f"{path}: the mask has {one.shape[1]} x {one.shape[0]} pixels, "
                                 f"its image {image.shape[1]} x {image.shape[0]}")
            mask = one if mask is None else mask | one
    coarse = image[::4, ::4]
    pair.is_binary = np.isin(coarse, (coarse.min(), coarse.max())).all()
    tiles = cut(pair, image, mask) if args.dataset == "dm" else [(pair, image, mask)]
    rows = []
    for tile, image, mask in tiles:
        image = resize(image, size)
        tile.areas = enclosed_areas(image)
        tile.digest = digest_of(image)
        row = image.tobytes()
        if mask is not None:
            mask = resize(mask.astype(np.float32), size) >= 0.5     # where half the area is
            tile.share = mask.mean()
            row += mask.tobytes()
        rows.append((tile, row.ljust(4 * size * size, b"\0")))
    return rows


def cut(pair, image, mask):
    """The tiles of a slide, each a Pair, its image (TILE, TILE, 3) and mask (TILE, TILE); what lies
    outside of the slide is 0."""
    margin = [(0, -side % TILE) for side in mask.shape]
    image = np.pad(image, [*margin, (0, 0)])
    mask = np.pad(mask, margin)
    for y, x in np.ndindex(*np.array(mask.shape) // TILE):
        window = np.s_[y * TILE:y * TILE + TILE, x * TILE:x * TILE + TILE]
        yield replace(pair, name=f"{pair.name}_{y}_{x}"), image[window], mask[window]


@contextlib.contextmanager
def thread_pool():
    """One thread a core. They are joined when the block ends: Python aborts if it exits while a
    thread is inside OpenCV."""
    with contextlib.suppress(OSError, AttributeError):          # Linux with glibc
        # Keep freed memory: else each picture is mapped anew, and the threads wait for each other
        # in the kernel (12 s instead of 7 for 2000 pictures on two cores).
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(ctypes.c_int(-3), ctypes.c_int(2 ** 25))   # M_MMAP_THRESHOLD
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int(2 ** 29))   # M_TRIM_THRESHOLD
    pool = ThreadPool(os.cpu_count())
    try:
        yield pool
    finally:
        pool.terminate()
        pool.join()


def try_each(pool, work, items, what, bad):
    """work(item) of each item, in order, on all cores; where it raises ValueError, its words go to
    `bad` instead. Threads: Pillow and OpenCV let go of Python's lock."""
    def attempt(item):
        try:
            return [work(item)]
        except ValueError as error:
            bad.append(str(error))
            return []

    for results in tqdm(pool.imap(attempt, items), what, len(items), unit=f" {what}",
                        disable=not items):
        yield from results


def mask_rule(pool, pairs, args, bad):
    """The MaskRule of a data set, and it in words: as published, or decided on a look at all masks
    of a folder."""
    above = DATASET_INFO[args.dataset].above
    if args.dataset != "folder":
        return MaskRule(cuts={255: above, 65535: above * 257}), f"above {above}, as published"

    def look(path):
        mask = read_mask(path, args.page)
        mask.values = None                      # all of them would fill the memory
        return mask

    paths = [path for pair in pairs for path in pair.masks]
    masks = [*try_each(pool, look, paths, "masks", bad)]
    rule, evidence = decide_mask_rule(args.mask_foreground, masks)
    if masks:
        print(f"mask foreground: {evidence}")
    return rule, evidence


def read_all(pairs, args, scratch, bad):
    """The Pairs that can be read, with their rows in the file `scratch`, and what their masks'
    foreground is, in words."""
    good = []
    with thread_pool() as pool, open(scratch, "wb") as file:
        rule, evidence = mask_rule(pool, pairs, args, bad)

        def load_pair(pair):
            return load(pair, args, rule)

        for rows in try_each(pool, load_pair, pairs, "images", bad):
            for tile, row in rows:
                tile.row = len(good)
                good.append(tile)
                file.write(row)
    patients = {pair.patient for pair in good}
    if good and "" not in patients:             # else folders and patients are both kept together
        print(f"{len(patients)} patients by their DICOM ids, and each stays in one part")
        for pair in good:
            pair.group = pair.patient
    warn([pair.image for pair in good if pair.is_binary], "images have two values or one: are they "
         "masks? See python prepare_data.py --help for the names of masks")
    warn([f"{pair.image} has {pair.pages}" for pair in good if pair.pages > 1], "images are of "
         f"several pages or frames: page {args.page} is taken, counted from 0; see --page")
    return good, evidence


def train_unlabelled(unlabelled, labelled):
    """The Pairs without masks that can be trained on, their part set to train: not those whose
    group, patient or equal picture is in the validation or test part."""
    elsewhere = {pair.unit for pair in labelled if pair.part != "train"}
    kept = [pair for pair in unlabelled if pair.unit not in elsewhere]
    for pair in kept:
        pair.part = "train"
    warn([pair.image for pair in unlabelled if pair.unit in elsewhere], "images without a mask are "
         "left out: their group, patient, or an equal picture is in the part val or test")
    return kept


def divide(pairs, args):
    """{part: Pairs by name, those with masks first}, split where the parts are not given. Ends the
    program where one would be empty."""
    pairs = sorted(pairs, key=lambda pair: (not pair.masks, pair.name))
    join_duplicates(pairs)
    labelled = [pair for pair in pairs if pair.masks] or pairs
    if args.dataset == "xray":
        stratify(pairs, args.seed)
    elif not any(pair.part for pair in pairs):
        split(labelled, args.seed)
        pairs = labelled + train_unlabelled(pairs[len(labelled):], labelled)
    part_of = {}
    warn([pair.image for pair in pairs if part_of.setdefault(pair.unit, pair.part) != pair.part],
         "images have their group, patient, or an equal picture in another part, too")
    parts = {part: [pair for pair in pairs if pair.part == part] for part in PARTS}
    counts = tuple(map(len, parts.values()))
    if 0 in counts:
        kind = " with masks" * args.keep_unlabelled
        sys.exit(f"{args.raw}: {len(labelled)} usable images{kind} are too few, or of too few "
                 f"groups (see --group-regex), to fill train, val and test: {counts}")
    if DATASET_INFO[args.dataset].counts not in ((), counts):
        print(f"warning: {counts} images here, {DATASET_INFO[args.dataset].counts} as published")
    return parts


def measure_masks(parts, size):
    """The share of all pixels of masks that is foreground, or None; printed."""
    shares = [pair.share for pairs in parts.values() for pair in pairs if pair.masks]
    if not shares:
        return None
    share = float(np.mean(shares))
    print(f"masks cover {share:.1%} of the pixels; at {size} px {shares.count(0)} of "
          f"{len(shares)} masks are empty")
    if share > 0.5:
        print("are they inverted? --mask-foreground zero, or a list of the values that count "
              "(for --dataset folder)")
    return share


def prepare(args, final):
    """Find, read, split and write a data set. All bad files are listed; if there are any, nothing
    is written without --skip-bad."""
    info, bad, raw = DATASET_INFO[args.dataset], [], Path(args.raw)
    if args.dataset == "demo":
        pairs = find_demo(args)
    elif args.dataset == "folder":
        pairs = find_folder(raw, args, bad)
    else:
        pairs = find_published(raw, args, bad)
    with new_folder(final) as folder:
        scratch = folder / "scratch"
        pairs, mask_evidence = read_all(pairs, args, scratch, bad)
        bad = sorted(set(bad))                  # a mask may have been read twice
        if bad:
            print("\n".join(bad), file=sys.stderr)
            if not args.skip_bad:
                sys.exit(f"{len(bad)} bad file(s) in {raw}, listed above; nothing was written. "
                         "Mend them, or leave them out with --skip-bad")
        parts = divide(pairs, args)
        counts = {part: len(pairs) for part, pairs in parts.items()}
        share = measure_masks(parts, args.size)
        if share == 0 and args.mask_foreground != "auto":
            sys.exit(f"{raw}: no mask holds foreground by --mask-foreground {args.mask_foreground}")
        areas = [pair.areas for pair in parts["train"]]
        foreground, evidence = decide_foreground(args.foreground, areas)
        print(f"foreground: {foreground} ({evidence})")
        meta = vars(args) | {
            "foreground": foreground, "foreground_evidence": evidence, "source": str(raw),
            "mask_foreground": mask_evidence, "mask_share": share, "skipped": bad,
            "homepage": info.homepage, "counts": counts,
            "fingerprint": write_arrays(folder, parts, args.size, scratch)}
        scratch.unlink()
        for part, pairs in parts.items():
            with open(folder / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["name", "group", "label"])
                writer.writerows([pair.name, pair.group, pair.label] for pair in pairs)
        write_preview(folder, foreground)
        (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    print(f"{final}: {counts} of {args.size} px; look at {final / 'preview.png'}")


# ------------------------------------------------------------------------------------------- main

def dataset_name(text):
    """--dataset of the other scripts: the name of a folder under --data; a slash at its end, of tab
    completion, is taken off."""
    name = text.rstrip("/")
    if not name or "/" in name or name in (".", ".."):
        raise argparse.ArgumentTypeError(f"{text} is not the name of a data set: give the folder "
                                         "above it with --data, or to prepare_data.py with --out")
    return name


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help of every script: the docstring as it is written, and each flag's default."""


def parse_args(argv):
    parser = argparse.ArgumentParser("prepare_data.py", description=__doc__, allow_abbrev=False,
                                     usage=argparse.SUPPRESS, formatter_class=Help)
    add = parser.add_argument
    add("--dataset", required=True, choices=[*DATASET_INFO], help="what to prepare")
    add("--raw", metavar="DIR", help="where the images, or the published files or archives, are")
    add("--name", type=dataset_name, help="the data set's name under --out; unset: the raw "
        "folder's own name, or the published name")
    add("--out", default="data", metavar="DIR", help="where data sets are kept")
    add("--size", type=int, help="side of the pictures in pixels; unset: 224 as in the paper, demo "
        "64")
    add("--seed", type=int, default=0, help="of the split, and of the demo's drawing")
    add("--foreground", choices=["bright", "dark", "auto"], help="what the objects are against "
        "their background; unset: dark for isic and xray, bright for dm, tissuenet, drone and "
        "demo, else auto, label-free")
    add("--mask-foreground", default="auto", metavar="RULE", help="folder: the mask values that "
        "are foreground: half (above half the range), nonzero, zero (the inverse), a list such as "
        "1 or 85,255 (of colours the largest channel), or auto, decided on all masks")
    add("--group-regex", metavar="REGEX", help="folder: finds the patient in an image's name "
        "(its path below --raw; first group, or whole match); a patient's images stay in one "
        "part; unset: the topmost folder, or DICOM's patient id")
    add("--split-by", default="slide", choices=["slide", "patient"], help="dm: what stays whole; "
        "the paper's tiles are split by slide, so that a patient may be in all parts")
    add("--keep-unlabelled", action="store_true", help="folder: where some images have masks, the "
        "others are trained on without; unset: they are bad files")
    add("--page", type=int, default=0, help="the page or frame of files that have several; of a dm "
        "slide its stain, 0 is DAPI")
    add("--download", action="store_true", help="isic, dsb2018: first fetch the published files "
        "into --raw")
    add("--check", action="store_true", help="read a prepared data set back, report what is off; "
        "exit code 1 if anything is")
    add("--skip-bad", action="store_true", help="leave bad files out and record them")
    add("--overwrite", action="store_true", help="replace a data set that is already there")
    args = parser.parse_args(argv)
    info = DATASET_INFO[args.dataset]
    for flag, sets in {"mask_foreground": ["folder"], "group_regex": ["folder"],
                       "keep_unlabelled": ["folder"], "split_by": ["dm"], "page": ["folder", "dm"],
                       "download": [*FINDERS]}.items():
        if args.dataset not in sets and getattr(args, flag) != parser.get_default(flag):
            print(f"not used by {args.dataset} and ignored: --{flag.replace('_', '-')}")
    if args.dataset == "demo":
        args.raw = "drawn by prepare_data.py"
    elif args.download and not args.raw:
        args.raw = f"raw/{args.dataset}"
    if not args.raw and not args.check:
        sys.exit(f"--dataset {args.dataset} needs --raw DIR, the folder with the files. "
                 f"{info.homepage}".rstrip())
    if args.dataset != "folder":
        args.name = args.name or args.dataset
    elif not args.name:
        args.name = Path(os.path.abspath(args.raw or "folder")).name
    args.size = args.size or info.size
    args.foreground = args.foreground or info.foreground
    given = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["python", "prepare_data.py", *given])
    if args.size < 16 or args.page < 0 or args.seed < 0 or not args.name:
        sys.exit("--size is at least 16; --page and --seed count from 0; --name is not empty")
    if not re.fullmatch(r"auto|half|nonzero|zero|\d+(,\d+)*", args.mask_foreground):
        sys.exit(f"--mask-foreground {args.mask_foreground} is not auto, half, nonzero, zero, or a "
                 "list of values such as 85,255")
    return args


def main(argv=None):
    args = parse_args(argv)
    final = Path(args.out) / args.name
    if args.check:
        return check(final)
    with only_one(final.with_name(f".{args.name}.lock")):
        if final.exists() and not args.overwrite:
            sys.exit(f"{final} is already there: nothing done; --overwrite replaces it")
        if args.download and DATASET_INFO[args.dataset].homepage:
            fetch(args)
        prepare(args, final)


# ---------------------------------------------------------------------------- files and threads

@contextlib.contextmanager
def new_file(path):
    """Open a temporary binary file that takes the place of `path` when the block ends well: never
    half a file under the real name. Raises OSError, also for torch.save's error on a full disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        temporary.replace(path)
    except RuntimeError as error:
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Delete the temporary files and folders of killed processes, older than a day, in `folder`."""
    for path in folder.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > 24 * 3600:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def read_json(path):
    """Return the dict in a JSON file, an empty one if there is no file; exit if it holds none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        sys.exit(f"{path} cannot be read: delete it, and run its command again")


def write_json(path, content):
    """Write a dict as JSON."""
    with new_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def read_csv(path):
    """Return the rows of a CSV of ours, a list of dicts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path, rows):
    """Write a list of dicts as a CSV; the last one has all keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[-1], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with new_file(path) as file:
        file.write(text.getvalue().encode())


def write_png(path, pixels):
    """Write uint8 (H, W) or (H, W, 3) as PNG."""
    with new_file(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")


def write_npy(path, arrays, shape):
    """Write an iterable of equal arrays, bool or uint8, as uint8 of the full `shape`; one at a time
    is in memory. A memory map would end with SIGBUS on a full disk."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with new_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            file.write(array.astype(np.uint8).tobytes())


def map_threads(function, items):
    """Yield function(item) of each item, in order, computed by all cores. Pillow and OpenCV let go
    of Python's lock. Slices, because executor.map would submit everything at once."""
    items = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(items, 256)):
            yield from pool.map(function, batch)


def print_count(items, message):
    """Print how many items there are, if any, and the first."""
    if items:
        print(f"{len(items)} {message} (the first: {items[0]})")


# ------------------------------------------------------------------ what the command lines share

def dataset_name(text):
    """Return --dataset of the other scripts, the name of a folder under --data, without the slash
    of tab completion. Raises ArgumentTypeError if it is no such name."""
    name = text.rstrip("/")
    if not name or "/" in name or name in (".", ".."):
        raise argparse.ArgumentTypeError(f"{text} is not the name of a data set: give the folder "
                                         "above it with --data, or to prepare_data.py with --out")
    return name


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help of every script: the docstring as it is written, and each flag's default."""


def check_numbers(parser, args, **minimum):
    """Exit if a number of `args` is below its minimum, infinite or nan."""
    for name, low in minimum.items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value} is not a number from {low} up")


def drop_unused(parser, args, flags):
    """Return args with the defaults of `flags`, which this command does not use; name those that
    were given."""
    used = vars(args).copy()
    for flag in flags:
        if used[flag] != parser.get_default(flag):
            print(f"not used here and ignored: --{flag.replace('_', '-')}")
            used[flag] = parser.get_default(flag)
    return argparse.Namespace(**used)


def name_suffix(parser, args, prefixes):
    """Return what flags other than their defaults add to a name, such as "-encoder-e20"."""
    name = ""
    for flag, prefix in prefixes.items():
        value = getattr(args, flag)
        if str(value) != str(parser.get_default(flag)):     # --labels 1 is not all, 1.0
            name += f"-{prefix}{value}"
    return name


def interrupt(signum, frame):
    """End on SIGTERM as on Ctrl-C."""
    raise KeyboardInterrupt("stopped by SIGTERM")


def run_script(main, advice):
    """Run a script's main(); exit in one line on SIGTERM, Ctrl-C, errors of the system, and too
    little memory."""
    script = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, interrupt)
    sys.stdout.reconfigure(errors="replace")        # for names that the terminal cannot show
    try:
        main()
    except (OSError, csv.Error, re.error, KeyboardInterrupt) as error:
        sys.exit(f"{script}: {str(error) or 'interrupted'}; {advice}")
    except RuntimeError as error:                   # torch's
        text = str(error).lower()
        if "shared memory" in text or "bus error" in text:
            sys.exit(f"{script}: shared memory (/dev/shm) is too small for the processes that load "
                     "images: --workers 0, or more of it (docker run --shm-size 1g)")
        if "out of memory" in text or "allocate memory" in text:
            sys.exit(f"{script}: out of memory: a smaller --batch-size, or pictures prepared at a "
                     "smaller --size")
        raise


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")    # for names that the terminal cannot show
    try:
        main()
    except (OSError, csv.Error, re.error, KeyboardInterrupt) as error:      # a full disk, ...
        sys.exit(f"prepare_data.py: {str(error) or 'interrupted'}; no half-written data set is "
                 "left")
