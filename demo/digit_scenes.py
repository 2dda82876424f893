"""Compose scenes of scanned digits over dimmed photos, with boxes, instance masks and semantic masks.

    python -m demo.digit_scenes --output data/digit_scenes

creates `OUTPUT/images/{train,val}/NNNNN.jpg`, `OUTPUT/semantic/{train,val}/NNNNN.png` with the category of every pixel
(0 for background) and `OUTPUT/annotations/{train,val}.json` with COCO instances. The digits 0 to 9 are categories 1 to
10. The val scans of digits.py and the right half of each photo occur only in val. A scene depends only on its split,
size and number. Each COCO image also names its part of the photo, each instance its scan and its visible share. Scans
and photos come with scikit-learn (`bash setup_env.sh --dev`). Photos: danielbuechele and vultilion, CC BY 2.0.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from tqdm import tqdm

from demo.digits import draw_digit, split_digits
from lit_backbone.visualize import positive

SPLITS = ("train", "val")
NUM_DIGITS = (4, 6)  # per scene
BACKGROUND_SIDE = (128, 256)  # side of the square cut from a photo, pixels
BRIGHTNESS = 0.3  # brightness of the photos; the digits are brighter
DIGIT_SIDE = (0.25, 0.42)  # relative to the side of the scene
MAX_ANGLE = 20  # degrees
INK_LEVEL = 100  # threshold between stroke and background in an enlarged scan
SUPERSAMPLING = 4
NUM_INKS = 12  # random colors, the brightest is used
LUMINANCE = (0.299, 0.587, 0.114)
MAX_OVERLAP = 0.1  # shared area of two boxes, relative to the smaller one
MIN_VISIBLE = 0.6  # share of the strokes
PALETTE = "000000 e6194b 3cb44b ffe119 0082c8 f58230 911eb4 46f0f0 f032e6 d2f53c fabed4"  # colors of the semantic masks


@dataclass
class Digit:
    """A digit of a scene. Later digits reduce the mask."""

    scan: int
    category: int
    area: int  # number of stroke pixels before occlusion
    mask: np.ndarray  # (size, size), visible stroke pixels

    @property
    def box(self) -> list[int]:
        """Return x, y, width and height of the mask."""
        left, top, right, bottom = Image.fromarray(self.mask).getbbox()
        return [left, top, right - left, bottom - top]


class Composer:
    """Composes the scenes of a split."""

    def __init__(self, split: str, size: int = 128) -> None:
        self.split, self.size = SPLITS.index(split), size
        digits, photos = load_digits(), load_sample_images()
        self.images, self.labels = digits.images, digits.target
        self.scans = split_digits(digits.target)[split]
        self.photos = {Path(name).name: image for name, image in zip(photos.filenames, photos.images)}

    def compose(self, number: int) -> tuple[np.ndarray, list[Digit], dict[str, Any]]:
        """Return the pixels `(size, size, 3)`, the digits and the origin of the background of a scene."""
        rng, digits = np.random.default_rng((0, self.split, number)), []
        pixels, origin = self.cut_background(rng)
        count = rng.integers(*NUM_DIGITS, endpoint=True)
        while len(digits) < count:
            self.try_digit(pixels, digits, rng)
        return pixels, digits, origin

    def cut_background(self, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
        """Cut a dimmed square from the split's half of a photo."""
        name = str(rng.choice(list(self.photos)))
        height, width, _ = self.photos[name].shape
        side = int(rng.integers(*BACKGROUND_SIDE, endpoint=True))
        x = int(rng.integers(width // 2 - side, endpoint=True)) + self.split * (width // 2)
        y = int(rng.integers(height - side, endpoint=True))
        square = Image.fromarray(self.photos[name][y : y + side, x : x + side])
        square = square.resize((self.size, self.size), Image.Resampling.BICUBIC)
        dimmed = square.point(lambda level: round(BRIGHTNESS * level))
        return np.array(dimmed), {"photo": name, "photo_box": [x, y, side, side]}

    def try_digit(self, pixels: np.ndarray, digits: list[Digit], rng: np.random.Generator) -> None:
        """Draw a random digit at a random position unless it hides too much of another one."""
        scan = int(rng.choice(self.scans))
        side = round(self.size * rng.uniform(*DIGIT_SIDE))
        glyph = draw_glyph(self.images[scan], side, rng.uniform(-MAX_ANGLE, MAX_ANGLE))
        height, width = glyph.shape
        y, x = rng.integers((self.size - height, self.size - width), endpoint=True)
        window = np.s_[y : y + height, x : x + width]
        mask = np.zeros((self.size, self.size), dtype=bool)
        mask[window] = glyph >= 0.5
        digit = Digit(scan, int(self.labels[scan]) + 1, int(mask.sum()), mask)
        if not all(is_legible(lower, digit) for lower in digits):
            return
        for lower in digits:
            lower.mask &= ~mask
        digits.append(digit)
        alpha = glyph[..., None]
        pixels[window] = np.round((1 - alpha) * pixels[window] + alpha * choose_ink(rng))


def draw_glyph(scan: np.ndarray, side: int, angle: float) -> np.ndarray:
    """Return the coverage (0 to 1) of each pixel by the strokes of a rotated scan, cropped to the strokes."""
    image = draw_digit(np.pad(scan, 1), side * SUPERSAMPLING)  # the margin smooths strokes at the border
    image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    image = image.point(lambda level: 255 * (level > INK_LEVEL)).reduce(SUPERSAMPLING)
    return np.asarray(image.crop(image.getbbox())) / 255


def is_legible(lower: Digit, upper: Digit) -> bool:
    """Check that a digit stays legible when another one is drawn over it."""
    (x0, y0, w0, h0), (x1, y1, w1, h1) = lower.box, upper.box
    width = max(min(x0 + w0, x1 + w1) - max(x0, x1), 0)
    height = max(min(y0 + h0, y1 + h1) - max(y0, y1), 0)
    visible = np.count_nonzero(lower.mask & ~upper.mask)
    return width * height <= MAX_OVERLAP * min(w0 * h0, w1 * h1) and visible >= MIN_VISIBLE * lower.area


def choose_ink(rng: np.random.Generator) -> np.ndarray:
    """Return the brightest of several random colors."""
    inks = rng.integers(256, size=(NUM_INKS, 3))
    return inks[(inks @ LUMINANCE).argmax()]


def encode_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Encode a mask as COCO's uncompressed run lengths, column by column, starting with background."""
    changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=mask.size).tolist()}


def semantic_mask(digits: list[Digit]) -> Image.Image:
    """Return an image of the category of every pixel, with a palette."""
    mask = Image.fromarray(sum(digit.category * digit.mask.astype(np.uint8) for digit in digits))
    mask.putpalette(bytes.fromhex(PALETTE))
    return mask


def write_split(root: Path, split: str, size: int, count: int) -> bool:
    """Write a split and return True, or return False if it is complete. The annotations are written last."""
    info = {"description": "scanned digits over dimmed photos", "size": size, "scenes": count}
    images, semantic, annotations = (root / kind / split for kind in ("images", "semantic", "annotations"))
    path = annotations.with_suffix(".json")
    if path.is_file() and json.loads(path.read_text())["info"] == info:
        return False
    for folder in (images, semantic, annotations.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for file in (path, *images.glob(5 * "[0-9]" + ".jpg"), *semantic.glob(5 * "[0-9]" + ".png")):
        file.unlink(missing_ok=True)
    composer = Composer(split, size)
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    coco: dict[str, Any] = {"info": info, "images": [], "annotations": [], "categories": categories}
    for number in tqdm(range(count), f"composing {split} scenes", delay=1, disable=None):
        pixels, digits, origin = composer.compose(number)
        stem = f"{number:05d}"
        coco["images"].append({"id": number, "file_name": f"{stem}.jpg", "height": size, "width": size} | origin)
        for digit in digits:
            area = np.count_nonzero(digit.mask)
            instance = {"id": len(coco["annotations"]) + 1, "image_id": number, "category_id": digit.category}
            instance |= {"iscrowd": 0, "area": area, "bbox": digit.box, "segmentation": encode_rle(digit.mask)}
            coco["annotations"].append(instance | {"scan": digit.scan, "visible": area / digit.area})
        Image.fromarray(pixels).save(images / f"{stem}.jpg", quality=95)
        semantic_mask(digits).save(semantic / f"{stem}.png")
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(coco) + "\n")
    unfinished.replace(path)
    return True


def write_scenes(root: Path, size: int = 128, train: int = 4800, val: int = 200) -> bool:
    """Write both splits and return True, or return False if they are complete."""
    return any([write_split(root, "train", size, train), write_split(root, "val", size, val)])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("data/digit_scenes"), help="directory (%(default)s)")
    parser.add_argument("--train", type=positive, default=4800, help="number of training scenes (%(default)s)")
    parser.add_argument("--val", type=positive, default=200, help="number of validation scenes (%(default)s)")
    args = parser.parse_args()
    status = "written" if write_scenes(args.output, train=args.train, val=args.val) else "complete"
    print(f"{args.output}: {args.train} train, {args.val} val scenes, {status}")


if __name__ == "__main__":
    main()
