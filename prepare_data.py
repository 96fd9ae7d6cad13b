"""Turn raw images into arrays that training maps into memory: data/<name>/.

    python prepare_data.py --dataset demo
    python prepare_data.py --dataset folder --raw my_images --size 224
    python prepare_data.py --dataset isic --raw raw/isic --download

folder takes any folder of images, sub-folders included: masks lie in masks/, labels/, gt/ ... under
the names of their images, or are called NAME_mask. Images without a mask, where others have one,
join the training part. train/, val/ and test/ are kept as the parts; an optional labels.csv has
name,label. The other sets are taken as their authors publish them, extracted or not.

Writes {train,val,test}_images.npy, uint8 (N, S, S, 3) RGB; {...}_masks.npy, uint8 {0, 1} (N, S,
S), of the images with masks, which come first; {...}.csv (name, group, label); meta.json;
preview.png.
"""

import argparse
import collections
import contextlib
import csv
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin, UnidentifiedImageError
from tqdm import tqdm

PARTS = ("train", "val", "test")
DICOM = {".dcm", ".dicom"}
EXTENSIONS = {".gif", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", *DICOM}
IMAGE_FOLDER = "(image|img|jpegimage|original)s?|imagest[rs]"
MASK_WORD = "masks?|labels?|gt|ground[ _-]?truths?|annotations?|segmentation(s|class)?|segs?|manual"
MASK_FOLDER = re.compile(                       # masks, lung_masks, labelsTr, gt_val, 1st_manual
    rf"({MASK_WORD}|.+[ _-](masks?|ground[ _-]?truths?|manual))([ _-]?(tr|ts|train|val|test|\d))?",
    re.IGNORECASE)
FOLDER_OF_KIND = re.compile(f"{IMAGE_FOLDER}|{MASK_FOLDER.pattern}", re.IGNORECASE)
MASK_NAME = re.compile(                         # NAME_mask, NAME-seg, NAME_mask_2; or mask_NAME
    rf"(?P<name>.*[^/])[ _.-]({MASK_WORD}|(cp|inst)_masks?|lesion|binary|anno|[12](st|nd)ho)"
    rf"([ _.-]?\d+)?|(.*/)?({MASK_WORD})([ _.-][^/]*)?", re.IGNORECASE)
PART_FOLDER = re.compile(                       # training/x: train, x
    "(|.*?/)(train(?=/|ing/)|val(?=/|id/|idation/)|test(?=/|ing/))[^/]*/(.*)", re.IGNORECASE)
MASK_RULE = re.compile(
    r"auto|[<>]-?\d+(\.\d+)?|-?\d+(,-?\d+)*|#[\da-fA-F]{6}(,#[\da-fA-F]{6})*")
CONVERTED = {"P", "PA", "CMYK", "YCbCr", "LAB", "RGBX"}         # Pillow's modes read as RGB
TILE = 480                                      # side of a tile of a dm slide (section 3.1)

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 30     # ICC profiles, XMP
PngImagePlugin.PngStream.crc = PngImagePlugin.PngStream.crc_skip     # pixels have zlib's checksum
Image.MAX_IMAGE_PIXELS = 500_000_000            # Pillow refuses twice as many
Image.core.set_blocks_max(16)                   # Pillow keeps memory: new pages stall the threads
warnings.filterwarnings("ignore", module="PIL|pydicom")         # of files that they still read
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)     # of what it raises too


@dataclass
class DatasetInfo:
    """What we, the paper or the authors say of a data set."""
    foreground: str
    mask_foreground: str = ">0"                 # see find_foreground
    homepage: str = ""
    files: tuple = ()                           # what --download fetches


ISIC = "https://isic-challenge-data.s3.amazonaws.com/2017/ISIC-2017_"
DATASET_INFO = {
    "demo": DatasetInfo("bright"),
    "folder": DatasetInfo("auto", "auto"),
    "dm": DatasetInfo("bright", homepage="Van Buren et al. 2022, from the authors"),
    "tissuenet": DatasetInfo("bright", homepage="https://datasets.deepcell.org/data"),
    "isic": DatasetInfo(
        "dark", ">127", "https://challenge.isic-archive.com/data/#2017",
        [f"{ISIC}{part}_{file}" for part in ("Training", "Validation", "Test_v2")
         for file in ("Data.zip", "Part1_GroundTruth.zip", "Part3_GroundTruth.csv")]),
    "xray": DatasetInfo("dark", ">127", "https://www.kaggle.com/datasets/tawsifurrahman/"
                        "covid19-radiography-database"),
    "drone": DatasetInfo("bright", homepage="http://dronedataset.icg.tugraz.at, or Kaggle"),
    "dsb2018": DatasetInfo(
        "auto", ">0", "https://bbbc.broadinstitute.org/BBBC038",
        ["https://data.broadinstitute.org/bbbc/BBBC038/stage1_train.zip"]),
}


# -------------------------------------------------------------------- files, threads, command line
@contextlib.contextmanager
def new_file(path):
    """Open a binary file that takes the place of `path` if the block ends well. Raises OSError."""
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
        temporary.replace(path)
    except (OSError, RuntimeError) as error:    # torch.save raises the second on a full disk
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Delete temporary files and folders, older than a day, that killed processes left in it."""
    for path in Path(folder).glob(".[0-9]*.tmp"):
        if time.time() - path.lstat().st_mtime > 86400:
            shutil.rmtree(path, ignore_errors=True)             # which leaves a file
            path.unlink(missing_ok=True)


def read_json(path):
    """Return the dict in a JSON file, {} if there is no file. Exit if it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        sys.exit(f"{path} cannot be read: delete it, and run its command again")


def write_json(path, content):
    """Write a dict, indented."""
    with new_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_png(path, pixels):
    """Write uint8 (H, W) or (H, W, 3) RGB."""
    with new_file(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


def read_csv(path):
    """Return the rows of a CSV, dicts: UTF-8 or Windows-1252; comma, semicolon or tab."""
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", "replace")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")
    rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
    return list(rows)


def write_csv(path, rows):
    """Write a list of dicts; the columns are the keys of the last."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[-1], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with new_file(path) as file:
        file.write(text.getvalue().encode())


def write_npy(path, arrays, shape):
    """Write arrays, uint8 or bool, one after the other as one uint8 .npy of the whole shape."""
    with new_file(path) as file:                # a memory map would die by SIGBUS on a full disk
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            file.write(np.ascontiguousarray(array, np.uint8))


@contextlib.contextmanager
def new_folder(final):
    """Make a temporary folder that takes the place of `final` if the block ends well."""
    final = final.resolve()                     # a link to another disk stays one
    partial = final.with_name(f".{os.getpid()}.tmp")
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    is_new = not final.parent.exists()
    try:
        partial.mkdir(parents=True)
        yield partial
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # not empty
                final.parent.rmdir()


def map_threads(function, items):
    """Yield function(item) for each, in order, on all cores: Pillow and OpenCV release the GIL."""
    items = iter(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(itertools.islice(items, 256)):      # pool.map submits all it is given
            yield from pool.map(function, batch)


def print_count(items, message):
    """Print how many items there are, if any, with the message and the first of them."""
    if items:
        print(f"{len(items)} {message} (the first: {items[0]})")


def dataset_name(text):
    """Return the name of a folder under --data, without a last slash. Raises ArgumentTypeError."""
    name = text.rstrip("/")
    if "/" in name or name in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"{text} is no name: its folder goes to --data or --out")
    return name


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help of every script: the docstring as it is written, and each flag's default."""

    def _get_help_string(self, action):
        if action.default is None or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)


def check_numbers(parser, args, **minimum):
    """Exit if a number of `args` is below its minimum, infinite or nan."""
    for name, low in minimum.items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value} is not a number from {low} up")


def drop_unused(parser, args, flags):
    """Return args with the defaults of `flags`, not used here. Prints those that were given."""
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
    """End on SIGTERM as on Ctrl-C; torch would report each worker that ends with us."""
    signal.signal(signal.SIGCHLD, lambda *ignored: None)
    raise KeyboardInterrupt("stopped by SIGTERM")


def run_script(main, advice):
    """Run main(). Exit in one line on SIGTERM, Ctrl-C, a system's error, or too little memory."""
    script = Path(sys.argv[0]).name
    signal.signal(signal.SIGTERM, interrupt)
    if sys.stdout:                                  # for names that the terminal cannot show
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except (OSError, csv.Error, re.error, KeyboardInterrupt) as error:
        sys.exit(f"{script}: {' '.join(str(error).splitlines()[-1:]) or 'interrupted'}; {advice}")
    except (RuntimeError, MemoryError) as error:    # torch's, numpy's
        words = "(shared|out of) memory|allocate|bus error|killed by signal"
        if not re.search(words, str(error), re.IGNORECASE):
            raise
        sys.exit(f"{script}: out of memory: if the GPU's, a smaller --batch-size or --size; if "
                 f"shared, or a worker's, --workers 0 or docker run --shm-size 1g; {advice}")


# ----------------------------------------------------------------------- reading images and masks
@dataclass
class Picture:
    """One page of an image file, values as stored. read_picture undoes orientation (the number of
    EXIF and TIFF) and white_is_zero."""
    pixels: np.ndarray                          # gray (H, W), or (H, W, 2 to 4)
    pages: int = 1                              # of the file
    orientation: int = 1
    white_is_zero: bool = False
    patient: str = ""                           # DICOM: a hash of the patient's id


def read_picture(path, page=0, as_mask=False):
    """Read one page of an image file: a Picture, upright, with bright as the larger value. Raises
    ValueError, path and reason, if it cannot. as_mask keeps stored values of DICOM, and indices of
    palettes that start with black and hold colours."""
    try:
        read = read_dicom if Path(path).suffix.lower() in DICOM else read_with_pillow
        with open(path, "rb") as file:          # Pillow misreads some turned TIFFs given by path
            picture = read(file, page, as_mask)
        pixels = picture.pixels
        if pixels.dtype.kind in "fc" and not (np.isrealobj(pixels) and np.isfinite(pixels).all()):
            raise ValueError("holds values that are complex or not finite")
    except Exception as error:                  # Pillow raises OSError, SyntaxError, struct.error
        reason = " ".join(str(error).split()) or repr(error)
        place = f"page {page}, counted from 0, " * bool(page)
        raise ValueError(f"{path}: {place}cannot be read: {reason}") from None
    if picture.white_is_zero:
        pixels = max(1, pixels.max()) - pixels if pixels.dtype.kind == "f" else ~pixels
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    quarters = {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}.get(picture.orientation, 0)
    pixels = np.rot90(pixels, quarters)
    if picture.orientation in (2, 4, 5, 7):
        pixels = np.fliplr(pixels)
    picture.pixels = pixels
    return picture


def read_with_pillow(file, page, as_mask):
    """Read an open file with Pillow, 16-bit colour with OpenCV, other TIFFs with tifffile."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        return read_with_tifffile(file, page)
    pages = getattr(image, "n_frames", 1)
    image.seek(page)
    if image.format == "TIFF" and not pillow_can_read(image):
        return read_with_tifffile(file, page)
    is_deep = ";16" in str(image.tile)
    image.load()                                # which turns a TIFF, and resets its orientation
    orientation = 1
    with contextlib.suppress(Exception):        # a damaged EXIF block does not concern the pixels
        orientation = image.getexif().get(274, 1)
    mode = "RGB" if image.mode in CONVERTED else image.mode
    if image.mode == "P" and as_mask:
        palette = np.array(image.getpalette("RGB")).reshape(-1, 3)
        if not palette[0].any() and (palette != palette[:, :1]).any():
            mode = "P"
    elif "transparency" in image.info and not is_deep:          # one colour is transparent
        mode = "RGBA"
    if mode != image.mode:
        image = image.convert(mode)
    pixels = np.asarray(image)
    if is_deep and pixels.ndim == 3:
        file.seek(0)
        pixels = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
        pixels = pixels[..., [2, 1, 0, 3][:pixels.shape[2]]]        # BGR
    return Picture(pixels, pages, orientation)


def pillow_can_read(image):
    """Whether Pillow reads an open page of a TIFF as it is meant: 8 bits, not signed, of known
    channels, alpha not in planes; 16 bits or floats if gray and black is zero."""
    tags = image.tag_v2
    n = len(image.getbands())
    photometric = tags.get(262, 0)
    extra = tags.get(338, ())                   # 0: it is not said what
    bits = tags.get(258, (1,))[0]
    kind = tags.get(339, (1,))[0]               # 1 unsigned, 3 float
    if n != tags.get(277, 1) or photometric < 2 and extra == (0,):
        return False
    if bits <= 8:
        return kind == 1 and not (extra and tags.get(284) == 2)
    is_whole = bits == 16 and kind == 1
    is_float = bits == 32 and kind == 3 and tags.prefix == b"II"
    return (is_whole or is_float) and n == 1 and photometric == 1


def read_with_tifffile(file, page):
    """Read an open TIFF with tifffile. Raises ValueError for what is not gray or RGB."""
    file.seek(0)
    if file.peek(2)[:2] not in (b"II", b"MM"):
        raise ValueError("empty, or not an image of a known kind")
    try:
        import tifffile
    except ImportError:
        raise ValueError("a TIFF that Pillow misreads: pip install tifffile") from None
    with tifffile.TiffFile(file) as tiff:
        found = tiff.pages[page]
        n = found.samplesperpixel
        has_alpha = n == 4 and found.photometric == 2 or found.extrasamples in ((1,), (2,))
        if found.photometric > 2 or n not in (1, 3) and not has_alpha or found.ndim > 3:
            raise ValueError(f"a TIFF of {n} channels, neither gray nor RGB")
        pixels = found.asarray()
        if found.axes == "SYX":                 # separate planes
            pixels = np.moveaxis(pixels, 0, -1)
        orientation = found.tags.valueof(274, 1)
        return Picture(pixels, len(tiff.pages), orientation, found.photometric == 0)


def read_dicom(file, page, as_mask):
    """Read one frame of an open DICOM file with pydicom. Lookup tables and, but for masks, the
    first VOI table or window are applied. Raises ValueError."""
    try:
        import pydicom
        from pydicom import pixels as dicom
    except ImportError:
        raise ValueError("a DICOM file: pip install pydicom (3 or newer) to read it") from None
    ds = pydicom.dcmread(file, force=True)      # some lack the mark DICM
    pixels = dicom.pixel_array(ds, index=page)
    pages = int(ds.get("NumberOfFrames") or 1)
    photometric = ds.PhotometricInterpretation
    white_is_zero = photometric == "MONOCHROME1"
    if as_mask:
        if white_is_zero:
            raise ValueError("a MONOCHROME1 mask, of unclear foreground: save it as png")
        return Picture(pixels, pages)
    if photometric == "PALETTE COLOR":
        pixels = dicom.apply_color_lut(pixels, ds)
        pixels = to_eight_bits(pixels, (0, np.iinfo(pixels.dtype).max))
    elif photometric.startswith("MONOCHROME"):
        padding = np.zeros(pixels.shape, bool)  # what lies outside of the picture proper
        if ds.get("PixelPaddingValue") is not None:
            ends = ds.PixelPaddingValue, ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue)
            padding = (pixels >= min(ends)) & (pixels <= max(ends))
        pixels = dicom.apply_modality_lut(pixels, ds)
        ends = None
        if ds.get("VOILUTSequence"):
            ends = 0, 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
        elif ds.get("WindowWidth"):
            ends = dicom.apply_voi_lut(np.array([-1e9, 1e9]), ds)       # its black and white
        elif padding.any() and not padding.all():
            ends = np.percentile(pixels[~padding], (0.1, 99.9))
        if ends is not None:
            pixels = to_eight_bits(dicom.apply_voi_lut(pixels, ds), ends)
            pixels[padding] = 255 * white_is_zero       # the darkest
    patient = str(ds.get("PatientID") or "").strip()
    if patient:
        patient = hashlib.sha256(patient.encode()).hexdigest()[:12]
    return Picture(pixels, pages, white_is_zero=white_is_zero, patient=patient)


def to_eight_bits(pixels, ends=None):
    """Scale numbers of any type to uint8: the two values `ends` (default: the 0.1 and 99.9
    percentiles; if equal, the smallest and the largest value) become 0 and 255."""
    pixels = pixels.astype(np.float64)
    low, high = np.percentile(pixels, (0.1, 99.9)) if ends is None else ends
    if high == low:
        low = pixels.min()
        high = max(pixels.max(), low + 1)
    return ((pixels - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)


def to_rgb(picture):
    """Picture -> uint8 (H, W, 3). Gray is repeated, what is transparent is shown on white, and
    other types than uint8 are scaled by to_eight_bits, all channels alike."""
    pixels = np.atleast_3d(picture.pixels)
    opacity = None
    if pixels.shape[2] in (2, 4):
        opacity = pixels[..., -1:] / (1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max)
        pixels = pixels[..., :-1]
    if pixels.dtype != np.uint8:
        pixels = to_eight_bits(pixels)
    if opacity is not None:
        pixels = (255 + (pixels - 255.0) * opacity).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def read_image(path, page=0):
    """Read an image file as uint8 (H, W, 3) RGB, as a viewer shows it; see read_picture."""
    return to_rgb(read_picture(path, page))


def resize(picture, size):
    """(H, W[, 3]) -> (size, size[, 3]): a side that shrinks by area, one that grows bilinearly."""
    height, width = picture.shape[:2]
    smaller = (min(width, size), min(height, size))
    picture = cv2.resize(picture, smaller, interpolation=cv2.INTER_AREA)
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_LINEAR)


def find_foreground(path, rule="auto", page=0):
    """Return the foreground of a mask file, bool (H, W), and how it was found, in words. Raises
    ValueError. RGB with equal channels is gray; alpha counts if it alone varies; one page serves
    any `page`. rule: ">N" or "<N", of colours the largest channel; a list, of values "1,255" or of
    colours "#ff0000"; or "auto": of one value what is above 0, of two the larger, of two colours
    that which is not black or white, and soft edges are cut at half of the largest value."""
    as_mask = "#" not in rule                   # a palette's colours are meant then
    picture = read_picture(path, as_mask=as_mask)
    if page and picture.pages > 1:
        picture = read_picture(path, page, as_mask)
    pixels = np.atleast_3d(picture.pixels)      # (H, W, 1 to 4)
    if pixels.shape[2] in (2, 4):
        alpha = pixels[..., -1:]
        pixels = pixels[..., :-1]
        is_flat = (pixels == pixels[0, 0]).all()
        if is_flat and (alpha.min() < alpha.max() or not alpha.any()):
            pixels = alpha
    values = pixels.max(axis=2)
    is_colour = (pixels != values[..., None]).any()
    if rule[0] in "<>":
        limit = float(rule[1:])
        return values > limit if rule[0] == ">" else values < limit, rule
    if is_colour or not as_mask:
        values = to_rgb(Picture(pixels)) @ np.array([0x10000, 0x100, 1])        # 0xRRGGBB
    if rule != "auto":
        if is_colour and as_mask:
            raise ValueError(f"{path}: has colours, not numbers: --mask-foreground '#ff0000'")
        base = 10 if as_mask else 16
        listed = [int(item.strip("#"), base) for item in rule.split(",")]
        return np.isin(values, listed), rule
    found = np.unique(values)
    top = found[-1]
    shown = ", ".join(map(("#{:06x}" if is_colour else "{:g}").format, found[:5]))
    if is_colour:
        colours = np.setdiff1d(found, [0, 0xffffff])
        if len(found) <= 2 and len(colours) == 1:
            return values == colours[0], f"#{colours[0]:06x}"
    elif len(found) <= 2 and found[0] >= 0:
        return (values == top) & (top > 0), f"{top:g} of {shown}"
    elif has_soft_edges(values, found):
        return values > top / 2, "above half, of soft edges"
    advice = f"'>0', '>{top // 2 or .5}' (above half), '<128', 1 or 1,2 (255: ignore value?)"
    if is_colour:
        advice = "'#ff0000' or '#ff0000,#00ff00'"
    raise ValueError(f"{path}: a mask with values such as {shown}: say which are "
                     f"foreground, with --mask-foreground {advice}")


def has_soft_edges(values, found):
    """Whether a mask (H, W) of the sorted values `found` has two levels and, between, slopes."""
    top = found[-1]
    is_whole = (found == np.rint(found)).all()
    if found[0] < 0 or len(found) <= 16 or is_whole and top < 64:
        return False
    values = values.astype(np.float32)
    between = (values > 0.2 * top) & (values < 0.8 * top)
    on_slope = (cv2.erode(values, None) < values) & (values < cv2.dilate(values, None))     # 3 x 3
    # Of masks of nuclei, histology, skin and X-rays: .58 to 1 in soft masks, 0 to .07 of instances.
    n = between.sum()
    return 3 * n < np.count_nonzero(values) and 2 * (on_slope & between).sum() >= n


def otsu_mask(image, foreground):
    """uint8 (H, W, 3) RGB -> uint8 {0, 1} (H, W): above Otsu's threshold if "bright", or not."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    side = cv2.THRESH_BINARY if foreground == "bright" else cv2.THRESH_BINARY_INV
    return cv2.threshold(gray, 0, 1, side | cv2.THRESH_OTSU)[1]


def decide_foreground(images):
    """Return "bright" or "dark" for a data set: the side of Otsu's threshold with more area in
    components that do not touch the border; the background usually does. images: those of the
    training part, uint8 (S, S, 3)."""
    def enclosed(image):
        fractions = []
        for foreground in ("bright", "dark"):
            mask = np.pad(otsu_mask(image, foreground), 1, constant_values=1)
            cv2.floodFill(mask, None, (0, 0), 0)        # the border, and all that touches it
            fractions.append(mask[1:-1, 1:-1].mean())
        return fractions

    bright, dark = np.mean([*map_threads(enclosed, images)], axis=0)
    return "dark" if dark > bright else "bright"


# ------------------------------------------------------------------------------- finding the files
@dataclass
class Pair:
    """An image with its masks, where it belongs, and what load found."""
    name: str
    image: Path                                 # or a name, if it is no file of its own
    masks: list = field(default_factory=list)   # paths; their union is the mask
    group: str = ""                             # patient, or what else must stay in one part
    folder: str = ""                            # the group, if nothing else says one
    label: str = ""
    part: str = ""
    source: tuple = ()                          # tissuenet: folder, number; demo: of default_rng
    split_group: str = ""                       # what stays in one part, see join_duplicates
    pages: int = 1
    row: int = 0                                # of the scratch file
    mask_rule: str = ""                         # how the foreground was found, in words
    digest: str = ""                            # digest_of


def find_files(raw, match=True):
    """Find all image files below the folder `raw`, but hidden ones: {name: path}; {name: [paths]},
    the masks of some of them, which lie in mask folders or are called NAME_mask; and a line for
    each file that cannot be used. Exit if there are none, no mask has the name of an image, or one
    has two. match=False takes all that is not in a mask folder as images."""
    if not raw.is_dir():
        sys.exit(f"{raw}: no such folder")
    images = {}
    candidates = []
    bad = []
    unsupported = collections.Counter()
    visited = set()
    folders = [raw]
    for folder in folders:                      # which grows
        files = sorted(os.listdir(folder))
        if "train_images.npy" in files or folder.resolve() in visited:      # a link in a circle
            continue
        visited.add(folder.resolve())
        in_mask_folder = any(map(MASK_FOLDER.fullmatch, folder.relative_to(raw).parts))
        for file in files:
            path = folder / file
            suffix = path.suffix.lower()
            name = name_of(path.relative_to(raw))
            if file.startswith((".", "__MACOSX", "labels.csv")):
                continue
            if file == "SegmentationObject" and "SegmentationClass" in files:
                print(f"{path} is left out: SegmentationClass has the masks")
            elif path.is_dir():
                folders.append(path)
            elif suffix not in EXTENSIONS:
                unsupported[suffix or "without suffix"] += 1
            elif name.encode(errors="ignore").decode() != name:
                bad.append(f"{path}: its name is not UTF-8 (of a Windows zip?): rename it")
            elif in_mask_folder:
                candidates.append((name, path))
            elif name in images and match:
                bad.append(f"{path}: the name {name} is used twice, see {images[name]}")
            else:
                if name in images:              # q.png, q.jpg, images/q.png
                    while name in images:
                        name += suffix
                    print(f"{path}: its name is used twice: its mask is {name}.png")
                images[name] = path
    if unsupported:
        print("files of kinds that are not read:", dict(unsupported),
              "(DICOM needs .dcm; cut volumes into slices, a file each)")
    if not images:
        bad.append(f"{raw}: no images here (none is looked for in folders named like masks)")
        sys.exit("\n".join(bad))
    if not match:
        print_count([path for _, path in candidates], "files lie in mask folders: left out")
        return images, {}, bad
    like_masks = list(filter(MASK_NAME.fullmatch, images))
    if len(like_masks) < len(images):           # else they are images, for all their names
        candidates += [(name, images.pop(name)) for name in like_masks]
    masks = collections.defaultdict(list)
    orphans = []
    for name, path in candidates:
        found = MASK_NAME.fullmatch(name)
        if found and name not in images:
            name = found["name"] or name
        if name in images:
            masks[name].append(path)
        else:
            orphans.append(path)
    if orphans and not masks:
        sys.exit(f"{orphans[0]}: a mask by its name or folder, but no mask has the name of an "
                 f"image (such as {min(images)}). Use images/ and masks/ with matching names")
    print_count(orphans, "masks have no image and are not used")
    used = {path.parent for paths in masks.values() for path in paths}
    for folder in {path.parent for path in orphans} - used:     # one may be of fields of view
        for other in used:
            if other.parent == folder.parent:
                sys.exit(f"{other} and {folder}: which has the masks? Move the other away, and "
                         "give masks the names of their images")
    for name, paths in masks.items():           # NAME_mask, NAME_mask_1, NAME_mask_2: one kind
        stems = {str(path.with_suffix("")) for path in paths}
        kinds = {re.sub(r"[ _.-]?\d+$", "", stem) for stem in stems}
        if len(stems) < len(paths) or len(kinds) > 1:
            sys.exit(f"{images[name]}: has two masks, {paths[0]} and {paths[1]}: keep one, or "
                     "number them in one folder")
    return images, masks, bad


def name_of(path):
    """Return the name of an image or mask file: its path below --raw without suffix, in Unicode
    NFC, and without folders called images or as MASK_FOLDER."""
    *folders, file = path.parts
    if path.suffix.lower() in EXTENSIONS:
        file = path.stem
    if {"imagesTr", "imagesTs"} & {*folders}:
        file = re.sub(r"_\d{4}$", "", file)     # nnU-Net's channel
    names = itertools.filterfalse(FOLDER_OF_KIND.fullmatch, folders)
    return unicodedata.normalize("NFC", "/".join([*names, file]))


def find_folder(raw, args, bad):
    """Find all images below --raw: Pairs with masks, the parts of train/, val/ and test/, groups of
    folders, --group-regex (its first group, or all) or labels.csv, and its labels. Of a given val
    or test part with masks, all need them. Exit if folders or labels.csv are unclear."""
    images, masks, unusable = find_files(raw)
    bad += unusable
    print(f"{raw}: {len(images)} images, {len(masks)} of them with masks")
    pairs = []
    good = []
    for name, path in sorted(images.items()):
        pair = Pair(name, path, masks.get(name, []))
        match = PART_FOLDER.fullmatch(name)
        if match:
            pair.part = match[2].lower()
            pair.name = match[1] + match[3]
        pairs.append(pair)
    found = {pair.part for pair in pairs}
    if found == {"train", "val"}:               # a challenge keeps its test masks
        print(f"{raw}: has no test part: the given val is the test part")
        for pair in pairs:
            pair.part = pair.part.replace("val", "test")
    elif found not in ({""}, {"train", "test"}, {*PARTS}):
        sys.exit(f"{raw}: give train and test, optionally val, with all images inside")
    masked = {pair.part for pair in pairs if pair.masks} - {"", "train"}
    if args.group_regex:
        for pair in pairs:
            match = re.search(args.group_regex, pair.name)
            pair.group = match and match[match.re.groups and 1] or ""
    else:                                       # the topmost folder that not all share
        folders = [pair.name.split("/")[:-1] for pair in pairs]
        depth = len(os.path.commonprefix(folders))
        for pair, names in zip(pairs, folders, strict=True):
            pair.folder = "".join(names[depth:depth + 1])
        names = sorted({pair.folder for pair in pairs} - {""})
        n = len({pair.folder or pair.name for pair in pairs})
        is_dicom = pairs[0].image.suffix.lower() in DICOM           # which has an id
        if names and not is_dicom:
            if n < 5 and len(pairs) >= 8 * n:
                sys.exit(f"{raw}: are {', '.join(names)} patients, who stay in one part? Then give "
                         "--group-regex '^([^/]+)/'; if they are classes, '.+'")
            print_count(names, "folders are taken as patients, and each stays in one part: "
                        "--group-regex '.+' splits image by image")
    for pair in pairs:
        if not pair.masks and pair.part in masked:
            bad.append(f"{pair.image}: has no mask, as others in {pair.part} have")
        elif args.group_regex and not pair.group:
            bad.append(f"{pair.image}: {pair.name} does not match --group-regex")
        else:
            good.append(pair)
            if args.group_regex == ".+":        # each image by itself, in whatever part
                pair.group = ""
    path = raw / "labels.csv"
    if not good or not path.is_file():
        return good
    table = {}
    used = set()
    columns = ("label", "group", "patient", "patient_id", "case")
    for row in read_csv(path):
        name = name_of(Path(row.get("name", "").strip() or "?"))
        content = [row.get(column, "").strip() for column in columns]
        if table.setdefault(name, content) != content and name != "?":
            sys.exit(f"{path}: {name} stands there twice, with two labels or groups")
    for pair in good:
        file = name_of(pair.image.relative_to(raw))
        for name in (os.path.basename(file), file, pair.name):      # the last of them counts
            if name in table:
                used.add(name)
                pair.label, *groups = table[name]
                pair.group = next(filter(None, groups), pair.group)
    if not used:
        sys.exit(f"{path}: has no column 'name', or not the names of images, such as "
                 f"'{good[0].name}'")
    print_count(sorted(table.keys() - used), f"rows of {path} have no image")
    return good


# -------------------------------------------------------------------------------------- splitting
def join_duplicates(pairs):
    """Set Pair.split_group: groups that share a picture (Pair.digest) become one."""
    groups = np.array([pair.group or f"{pair.part}/{pair.name}" for pair in pairs])
    first = {}
    again = []
    for k, pair in enumerate(pairs):
        other = first.setdefault(pair.digest or k, k)
        if other != k:
            again.append(pair.image)
            groups[groups == groups[k]] = groups[other]
    for pair, group in zip(pairs, groups.tolist(), strict=True):
        pair.split_group = group
    print_count(again, "pictures are there twice")
    n = len(np.unique(groups))
    if n < len(pairs):
        print(f"{len(pairs)} images of {n} patients or other groups")


def split_pairs(pairs, seed, stratified=False, shares=(0.7, 0.8)):
    """Set the part of every pair: shuffle the split groups and cut them at int(share n) images, or
    slides, into train, val and, by a second share, test; of groups each part gets one at least.
    stratified: 20 % test, then 13 % of the rest validation, both rounded up, of each label."""
    images = collections.defaultdict(set)       # of each group; the tiles of a slide are one
    classes = collections.defaultdict(list)
    for pair in pairs:
        images[pair.split_group].add(pair.image)
        classes[pair.label].append(pair.split_group)
    total = sum(map(len, images.values()))
    parts = PARTS[:len(shares) + 1]
    cuts = [int(share * total) for share in shares]
    if stratified:
        test = math.ceil(0.2 * total)
        parts = ("test", "val", "train")
        cuts = [test, test + math.ceil(0.13 * (total - test))]
    else:
        classes = {"": sorted(images)}
    generator = np.random.default_rng(seed)
    ranked = []                                 # each label in an order of its own, evenly merged
    for label, groups in sorted(classes.items()):
        for k, group in enumerate(generator.permutation(groups).tolist()):
            ranked.append(((k + 0.5) / len(groups), label, group))
    order = list(dict.fromkeys(group for *_, group in sorted(ranked)))
    n = len(order)
    starts = np.cumsum([0] + [len(images[group]) for group in order])
    ends = [0, *np.searchsorted(starts, cuts), n]           # the groups that begin at or after it
    if len(parts) <= n < total:
        for i in range(1, len(parts)):
            ends[i] = np.clip(ends[i], ends[i - 1] + 1, n - len(parts) + i)
    part_of = dict(zip(order, np.repeat(parts, np.diff(ends)).tolist(), strict=True))
    for pair in pairs:
        pair.part = part_of[pair.split_group]


def assign_parts(pairs, args):
    """Return {part: Pairs, those with masks first}, split if need be; exit if one is empty."""
    pairs = sorted(pairs, key=lambda pair: (not pair.masks, pair.name))
    join_duplicates(pairs)
    labelled = [pair for pair in pairs if pair.masks] or pairs
    given = {pair.part for pair in pairs}
    if given == {""}:
        split_pairs(labelled, args.seed, stratified=args.dataset == "xray")
    elif "val" not in given:
        training = [pair for pair in pairs if pair.part == "train"]
        masked = [pair for pair in training if pair.masks] or training
        for pair in training:                   # without a mask: follow their group
            pair.part = ""
        split_pairs(masked, args.seed, shares=[0.875])
        print(f"no validation part is given: an eighth of {len(masked)} training images is it now")
    part_of = {pair.split_group: pair.part for pair in pairs if pair.part}
    parts = {part: [] for part in PARTS}
    joined = []
    left_out = []
    elsewhere = []
    for pair in pairs:
        part = part_of.get(pair.split_group, "train")
        if pair.part:
            parts[pair.part].append(pair)
            if pair.part != part:
                elsewhere.append(pair.image)
        elif part == "train":
            parts["train"].append(pair)
            joined.append(pair.image)
        else:
            left_out.append(pair.image)
    print_count(joined, "images without a mask join the part train")
    print_count(left_out, "images without a mask are left out: of groups of the part val or test")
    print_count(elsewhere, "images leak: their group, or an equal picture, is in another part, too")
    counts = tuple(map(len, parts.values()))
    if 0 in counts:
        sys.exit(f"{args.raw}: {len(labelled)} usable images are too few, or of too few groups "
                 f"(see --group-regex), to fill train, val and test: {counts}")
    return parts


# ---------------------------------------------------------------------- the data sets as published
def find_all(raw, *patterns):
    """Return the paths below `raw` that match patterns such as COVID/images/*, sorted for each."""
    found = []
    for pattern in patterns:
        found += sorted(glob.glob(f"**/{pattern}", root_dir=raw, recursive=True))
    if not found:
        print(f"{raw}: nothing here is called {' or '.join(patterns)}")
    return [raw / path for path in found]


def pairs_in(raw, images, masks, **more):
    """Return Pairs of the image files that match these patterns, with the masks of equal names;
    more: fields. A name is the stem up to _segmentation or _component; the first file counts."""
    pairs = {}
    for path in find_all(raw, *images):
        name = re.sub("_component_.*", "", path.stem)
        if path.suffix.lower() in EXTENSIONS:
            pairs.setdefault(name, Pair(name, path, **more))
    for path in find_all(raw, *masks):
        name = re.sub("_segmentation$|_component_.*", "", path.stem)
        if name in pairs and not pairs[name].masks:
            pairs[name].masks.append(path)
    return [pair for _, pair in sorted(pairs.items())]


def find_published(raw, args, bad):
    """Find the Pairs of a published data set, extracting archives; exit if a part is missing."""
    source = DATASET_INFO[args.dataset].homepage
    if not raw.is_dir():
        sys.exit(f"{raw}: no such folder. {source}")
    remove_leftovers(raw)
    for archive in sorted(raw.glob("[!.]*")):
        folder = archive.with_suffix("")
        if archive.suffix.lower() not in (".zip", ".npz") or folder.exists():
            continue
        with new_folder(folder) as partial:
            try:
                shutil.unpack_archive(archive, partial, "zip")
            except Exception as error:          # of zipfile, zlib, lzma, shutil
                sys.exit(f"{archive}: cannot be extracted ({error}): get it again")
    pairs = []
    if args.dataset == "isic":                  # nevus, if neither column says 1
        labels = {}
        for part, official in zip(PARTS, ("Training", "Validation", "Test_v2"), strict=True):
            stem = f"ISIC-2017_{official}_"
            for table in find_all(raw, stem + "Part3_GroundTruth.csv"):
                for row in read_csv(table):
                    if "melanoma" not in row:
                        sys.exit(f"{table}: lacks the columns of ISIC-2017: get it again")
                    labels[row["image_id"]] = "nevus"
                    for disease in ("seborrheic_keratosis", "melanoma"):
                        if row[disease].startswith("1"):
                            labels[row["image_id"]] = disease
            pairs += pairs_in(raw, [stem + "Data/*[0-9].*"],        # not *_superpixels.png
                              [stem + "Part1_GroundTruth/*_segmentation.*"], part=part)
        for pair in pairs:
            pair.label = labels.get(pair.name, "")
    elif args.dataset == "xray":
        for label in ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"):
            pairs += pairs_in(raw, [f"{label}/images/*"], [f"{label}/masks/*"], label=label)
    elif args.dataset == "drone":               # from Kaggle, or its own page
        pairs = pairs_in(raw, ["original_images/*", "training_set/images/*"],
                         ["label_images_semantic/*", "training_set/gt/semantic/label_images/*"])
    elif args.dataset == "dsb2018":             # one folder per image, one mask per nucleus
        pairs = pairs_in(raw, ["images/*"], ["masks/*"])
        for pair in pairs:
            pair.masks = sorted(pair.image.parent.parent.glob("masks/[!.]*.*"))
    elif args.dataset == "dm":                  # masks as in either publication
        pairs = pairs_in(raw, ["*_component_data.tif", "*_component_data.tiff"],
                         ["*_component_mask_labels.tif*", "*_component_data.tif[mM]ask.tif*"])
        for pair in pairs:
            pair.group = pair.name
            if args.split_by == "patient":
                pair.group = "_".join(pair.name.split("_")[:2])
    else:                                       # tissuenet, the latest version
        for part in PARTS:
            for path in find_all(raw, f"tissuenet_v*_{part}/X.npy")[-1:]:
                for i in range(len(np.load(path, mmap_mode="r"))):
                    name = f"{path.parent}[{i}]"
                    pairs.append(Pair(f"{part}_{i:05d}", name, [name], part=part,
                                      source=(path.parent, i)))
    bad += [f"{pair.image}: has no mask" for pair in pairs if not pair.masks]
    pairs = [pair for pair in pairs if pair.masks]
    if {pair.part for pair in pairs} not in ({""}, {*PARTS}):
        sys.exit(f"{raw}: files of train, val or test are missing: it needs all of {source}")
    return pairs


def fetch(args):
    """Fetch the published files into --raw, with curl; exit if one cannot be had."""
    info = DATASET_INFO[args.dataset]
    if not info.files:
        sys.exit(f"--download is for isic and dsb2018. Give --raw DIR. {info.homepage}")
    for url in info.files:
        path = Path(args.raw) / os.path.basename(url)
        if path.exists() or path.with_suffix("").is_dir():
            continue
        partial = f"{path}.part"
        command = "curl --fail --location --continue-at - --retry 5 --create-dirs --speed-limit 1"
        if subprocess.run([*command.split(), "--output", partial, url]).returncode:
            sys.exit(f"{url}: not fetched, see curl's words above. The same command goes on from "
                     f"{partial}, unless you delete it")
        os.replace(partial, path)


# ------------------------------------------------------------------------------- reading them back
def read_meta(folder):
    """Read the meta.json of a prepared data set, a dict. Exit if there is none."""
    meta = read_json(Path(folder) / "meta.json")
    if not meta:
        sys.exit(f"{folder} is not prepared: run python prepare_data.py --dataset NAME --raw DIR")
    return meta


def open_part(folder, part):
    """Map the arrays of a part: images uint8 (N, S, S, 3), masks uint8 {0, 1} (N, S, S) or None.
    Exit if they cannot be read."""
    folder = Path(folder)
    path = folder / f"{part}_masks.npy"
    try:
        images = np.load(folder / f"{part}_images.npy", mmap_mode="r")
        masks = np.load(path, mmap_mode="r") if path.exists() else None
        return images, masks
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"{folder}: cannot be mapped: {error}. Is it on a disk that maps files? If it is "
                 "damaged, prepare it again with --overwrite")


def fingerprint_of(folder):
    """Return the sha256 of the arrays of a prepared data set. Exit if they cannot be read."""
    digest = hashlib.sha256()
    for part in PARTS:
        for array in open_part(folder, part):
            if array is not None:
                digest.update(array)
    return digest.hexdigest()


def digest_of(image):
    """Return a hash of a picture's pixels; "" if all are alike, as two blank pictures may be."""
    if (image == image[0, 0]).all():
        return ""
    return hashlib.sha256(image.tobytes()).hexdigest()


def check(folder):
    """Read a prepared data set back. Exit with a line for each problem found."""
    meta = read_meta(folder)
    problems = []
    first = {}                                  # {a group or picture: where it was first}
    for part, n in meta["counts"].items():
        rows = read_csv(folder / f"{part}.csv")
        if len(rows) != n:
            problems.append(f"{part}.csv has {len(rows)} rows, meta.json says {n}")
        for row, image in zip(rows, open_part(folder, part)[0], strict=False):
            here = f"{row['name']} of {part}"
            for what, value in dict(group=row["group"], picture=digest_of(image)).items():
                other_part, other = first.setdefault((what, value), (part, here))
                if value and other_part != part:
                    problems.append(f"the same {what} in two parts: {other} and {here}")
    if fingerprint_of(folder) != meta["fingerprint"]:
        problems.append("not the arrays that were written: their fingerprint is another")
    if problems:
        lines = "\n".join(problems[:20])
        sys.exit(f"{lines}\n{folder}: {len(problems)} problems found")
    print(f"{folder}: {meta['counts']}, all is well; fingerprint {meta['fingerprint']}")


def contact_sheet(rows, titles, captions=None):
    """Return a table of pictures, uint8 (H, W, 3) RGB, with a title over each column and a caption
    under each row. rows: lists of uint8 (S, S, 3), masks or logits (S, S), or None (empty)."""
    cell, width, line = 112, 116, 18            # pixels
    height = width + line * bool(captions)
    sheet = Image.new("RGB", (len(titles) * width, line + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        draw.text((i * width + 2, 2), title, "black")
    for k, row in enumerate(rows):
        top = line + k * height
        for i, tile in enumerate(row):
            if tile is not None:
                if tile.ndim == 2:
                    tile = (tile > 0) * np.uint8(255)
                tile = resize(to_rgb(Picture(tile)), cell)
                sheet.paste(Image.fromarray(tile), (i * width, top))
        if captions:
            draw.text((2, top + width), captions[k], "black")
    return np.array(sheet)


# -------------------------------------------------------------------------------------- preparing
def draw_nuclei(size, rng):
    """Draw a picture like stained nuclei, uint8 (S, S, 3), and its true mask, bool (S, S)."""
    fine = 4 * size                             # drawn four times as fine, then averaged down
    glow = rng.uniform(10, 60, (3, 3)).astype(np.float32)
    glow = cv2.resize(glow, (size, size), interpolation=cv2.INTER_CUBIC)
    light = np.zeros((size, size), np.float32)
    mask = np.zeros((size, size), bool)
    centres = rng.uniform(0, fine, (rng.integers(2, 6), 2))
    for _ in range(rng.integers(6, 16)):
        centre = centres[rng.integers(len(centres))] + rng.normal(0, 0.13 * fine, 2)    # clumped
        axes = rng.uniform(0.04, 0.085, 2) * fine
        disc = np.zeros((fine, fine), np.float32)
        angle = rng.uniform(0, 180)
        cv2.ellipse(disc, centre.astype(int), axes.astype(int), angle, 0, 360, 1, -1)
        disc = resize(disc, size)
        light = np.maximum(light, disc * rng.uniform(50, 140))
        mask |= disc >= 0.5
    picture = cv2.GaussianBlur(glow + light, (0, 0), size / 90) + rng.normal(0, 7, (size, size))
    gray = picture.round().clip(0, 255).astype(np.uint8)
    return cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), mask


def load(pair, args):
    """Read an image and its masks: [(Pair, uint8 (S, S, 4))], one for each tile of a dm slide, or
    one in all; the fourth channel is the mask {0, 1}. Raises ValueError, path and reason."""
    if args.dataset == "demo":
        image, mask = draw_nuclei(args.size, np.random.default_rng(pair.source))
    elif args.dataset == "tissuenet":           # nuclei green, membranes blue, as DeepCell shows it
        folder, i = pair.source
        x = np.load(folder / "X.npy", mmap_mode="r")[i]         # (H, W, 2)
        image = np.zeros((*x.shape[:2], 3), np.uint8)
        for channel in (0, 1):
            values = x[..., channel]
            if values.any():
                ends = np.percentile(values[values > 0], (5, 95))
                image[..., channel + 1] = to_eight_bits(values, ends)
        mask = np.load(folder / "y.npy", mmap_mode="r")[i, ..., 0] > 0
    else:
        picture = read_picture(pair.image, args.page)
        image = to_rgb(picture)
        mask = np.zeros(image.shape[:2], bool)
        pair.pages = picture.pages
        if not args.group_regex:                # which says more
            pair.group = pair.group or picture.patient or pair.folder
        for path in pair.masks:
            found, pair.mask_rule = find_foreground(path, args.mask_foreground, args.page)
            if args.dataset == "xray":
                mask = found                    # of another size, as published
            elif found.shape == mask.shape:
                mask |= found
            else:
                raise ValueError(f"{path}: mask of {found.shape}, but image of {mask.shape} pixels")
    tiles = [(pair.name, image, mask)]
    if args.dataset == "dm":                    # what lies outside of the slide is 0
        tiles = []
        padded = np.pad(np.dstack([image, mask]), ((0, TILE), (0, TILE), (0, 0)))
        height, width = mask.shape
        for y, x in itertools.product(range(0, height, TILE), range(0, width, TILE)):
            tile = padded[y:y + TILE, x:x + TILE]
            name = f"{pair.name}_{y // TILE}_{x // TILE}"
            tiles.append((name, tile[..., :3], tile[..., 3]))
    rows = []
    for name, image, mask in tiles:
        image = resize(image, args.size)
        mask = resize(mask.astype(np.float32), args.size) >= 0.5        # where half the area is
        tile = replace(pair, name=name, digest=digest_of(image))
        rows.append((tile, np.dstack([image, mask])))
    return rows


def prepare(args, final):
    """Find, read, split and write a data set; exit, with nothing written, if files are bad."""
    raw = Path(args.raw)
    size = args.size
    bad = []
    if args.dataset == "folder":
        pairs = find_folder(raw, args, bad)
    elif args.dataset != "demo":
        pairs = find_published(raw, args, bad)
    else:
        pairs = []
        for p, n in enumerate((64, 16, 32)):
            for i in range(n):                  # every picture has a generator of its own
                name = f"{PARTS[p]}_{i:03d}"
                pairs.append(Pair(name, name, [name], part=PARTS[p], source=(args.seed, p, i)))

    def attempt(pair):
        try:
            return load(pair, args)
        except ValueError as error:
            bad.append(str(error))
            return []

    with new_folder(final) as folder:
        scratch = folder / "scratch"
        good = []
        with open(scratch, "wb") as file:
            for rows in tqdm(map_threads(attempt, pairs), "images", len(pairs), unit=" images"):
                for tile, row in rows:
                    tile.row = len(good)
                    good.append(tile)
                    file.write(row)
        if bad:
            print(*sorted(bad)[:20], sep="\n", file=sys.stderr)
            if not args.skip_bad:
                sys.exit(f"{len(bad)} bad file(s), the first are named above, and nothing was "
                         "written: mend them, or leave them out with --skip-bad")
        print_count([pair.image for pair in good if pair.pages > 1], "images are of several pages "
                    f"or frames: page {args.page} is taken, counted from 0 (--page)")
        parts = assign_parts(good, args)
        read = np.memmap(scratch, np.uint8, "r").reshape(-1, size, size, 4)
        foreground = args.foreground
        if foreground == "auto":
            foreground = decide_foreground(read[pair.row, ..., :3] for pair in parts["train"])
        print(f"foreground: {foreground}; if preview.png shows other objects, set --foreground")
        rules = collections.Counter()
        fractions = []
        for part, pairs in parts.items():
            rows = [dict(name=pair.name, group=pair.group, label=pair.label) for pair in pairs]
            write_csv(folder / f"{part}.csv", rows)
            images = [read[pair.row, ..., :3] for pair in pairs]
            write_npy(folder / f"{part}_images.npy", images, (len(images), size, size, 3))
            masked = [pair for pair in pairs if pair.masks]
            masks = [read[pair.row, ..., 3] for pair in masked]
            if masks:
                write_npy(folder / f"{part}_masks.npy", masks, (len(masks), size, size))
            rules.update(pair.mask_rule or "known" for pair in masked)
            fractions += [mask.mean() for mask in masks]
            if part == "train":
                otsu = [otsu_mask(image, foreground) for image in images[:8]]
                preview = list(itertools.zip_longest(images[:8], otsu, masks[:8]))
        scratch.unlink()
        titles = ["training image", "Otsu", "truth"]
        write_png(folder / "preview.png", contact_sheet(preview, titles))
        rules = dict(rules.most_common(9))
        if fractions:
            print(f"mask foreground, by number of masks: {rules}, {np.mean(fractions):.1%} of the "
                  "pixels. If it is the background, give the other values to --mask-foreground")
        counts = {part: len(pairs) for part, pairs in parts.items()}
        write_json(folder / "meta.json", vars(args) | dict(
            source=args.raw,
            foreground=foreground,
            mask_foreground=rules,
            skipped=sorted(bad),
            counts=counts,
            fingerprint=fingerprint_of(folder)))
    print(f"{final}: {counts} of {size} px; look at preview.png in it")


def parse_args(argv=None):
    parser = argparse.ArgumentParser("prepare_data.py", description=__doc__, allow_abbrev=False,
                                     usage=argparse.SUPPRESS, formatter_class=Help)
    add = parser.add_argument
    add("--dataset", required=True, choices=[*DATASET_INFO], help="what to prepare")
    add("--raw", metavar="DIR", help="the images, or the published files or archives (default: "
        "raw/ and the published name)")
    add("--name", type=dataset_name, help="of the data set (default: the raw folder's, or the "
        "published one)")
    add("--out", default="data", metavar="DIR", help="where data sets are kept")
    add("--size", type=int, help="side of the pictures in pixels (default: 224, demo 64)")
    add("--seed", type=int, default=0, help="of the split, and of the demo's drawing")
    add("--foreground", choices=["bright", "dark", "auto"], help="what objects are against their "
        "background (default: auto, label-free, for folder and dsb2018, else known)")
    add("--mask-foreground", metavar="RULE", help="which mask values are foreground: '>127', "
        "'<128', a list such as 1 or 1,255 or '#ff0000', or auto: of two values the larger "
        "(default: auto for folder, else as published)")
    add("--group-regex", metavar="REGEX", help="folder: finds the patient, whose images stay in "
        "one part, in a path: first group, or whole match (default: topmost folder, or DICOM's id)")
    add("--split-by", default="slide", choices=["slide", "patient"],
        help="dm: what stays in one part; in the paper slides")
    add("--page", type=int, default=0, help="page or frame of multi-page files; dm: stain")
    add("--download", action="store_true", help="isic, dsb2018: first fetch the files into --raw")
    add("--check", action="store_true", help="read a prepared data set back; exit code 1: problems")
    add("--skip-bad", action="store_true", help="leave bad files out and record them")
    add("--overwrite", action="store_true", help="replace a data set that is already there")
    args = parser.parse_args(argv)
    check_numbers(parser, args, size=16, page=0, seed=0)
    args.raw = args.raw or f"raw/{args.dataset}"
    if not args.name:
        args.name = args.dataset
        if args.dataset == "folder":
            args.name = os.path.basename(os.path.abspath(args.raw))
    args.size = args.size or (64 if args.dataset == "demo" else 224)
    info = DATASET_INFO[args.dataset]
    args.foreground = args.foreground or info.foreground
    args.mask_foreground = args.mask_foreground or info.mask_foreground
    if not MASK_RULE.fullmatch(args.mask_foreground):
        sys.exit("--mask-foreground is auto, '>127', '<128', or a list such as 1,255 or '#ff0000'")
    return args


def main(argv=None):
    args = parse_args(argv)
    final = Path(args.out) / args.name
    place = final.resolve()
    with contextlib.suppress(OSError):          # killed between new_folder's two renames
        place.with_name(f".{place.name}.old").rename(place)
    if args.check:
        return check(final)
    remove_leftovers(args.out)
    if final.exists() and not (final / "meta.json").exists():
        sys.exit(f"{final} is no data set of this script: give another --name, or --out")
    if final.exists() and not args.overwrite:
        sys.exit(f"{final} is already there: nothing done; --overwrite replaces it")
    if args.download:
        fetch(args)
    prepare(args, final)


if __name__ == "__main__":
    run_script(main, "no half-written data set is left")
