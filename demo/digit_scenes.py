"""Composes scenes of scanned digits over dimmed photographs, with boxes, instance masks and semantic masks.

    python -m demo.digit_scenes --output data/digit_scenes

makes, in the splits train and val,

    data/digit_scenes/images/{train,val}/NNNNN.jpg     the scenes
    data/digit_scenes/annotations/{train,val}.json     COCO instances; the digits 0 to 9 are the categories 1 to 10
    data/digit_scenes/semantic/{train,val}/NNNNN.png   the category of every pixel, 0 for background

Scans and photographs come with scikit-learn (`setup_env.sh --dev` brings it). The scans that digits.py holds out, and
the right half of each photograph, are in val only. A scene follows from split, size and its number, so that a
small set is the beginning of a large one. Beside COCO's fields, an image names its background, an instance its scan and
how much of it is visible. (The photographs are by danielbuechele and vultilion on Flickr, CC BY 2.0.)
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from tqdm import tqdm

from demo.digits import draw_digit, split_digits

SPLITS = ("train", "val")
NUM_DIGITS = (4, 6)  # in a scene
BACKGROUND_SIDE = (128, 256)  # of the square cut from a photograph, in its pixels
DIMMED = 0.3  # of a photograph's brightness is left, so that digits are light on dark, as the scans are
DIGIT_SIDE = (0.25, 0.42)  # of a scan with its margin, in sides of the scene
MAX_ANGLE = 20  # degrees, either way
INK_LEVEL = 100  # of 255, above which an enlarged scan is stroke
SUPERSAMPLING = 4
NUM_INKS = 12  # to choose the lightest from
LUMINANCE = (0.299, 0.587, 0.114)
MAX_OVERLAP = 0.1  # of two boxes, in areas of the smaller one
MIN_VISIBLE = 0.6  # of the strokes, by area
PALETTE = np.array(  # of the semantic masks
    [(0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48)]
    + [(145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212)],
    dtype=np.uint8,
)


@dataclass
class Digit:
    """One digit of a scene."""

    scan: int
    category: int
    area: int  # of the strokes, before others cover them
    mask: np.ndarray  # (size, size), the visible strokes

    @property
    def box(self) -> list[int]:
        """The extent of the mask: x, y, width, height."""
        left, top, right, bottom = Image.fromarray(self.mask).getbbox()
        return [left, top, right - left, bottom - top]


@dataclass
class Scene:
    """A picture, where its background is from, and its digits, of which a later one may cover part of an earlier."""

    pixels: np.ndarray  # (size, size, 3)
    photograph: str
    photograph_box: list[int]  # x, y, width, height
    digits: list[Digit] = field(default_factory=list)

    def semantic_mask(self) -> np.ndarray:
        """Returns the category of every pixel."""
        return sum(digit.category * digit.mask.astype(np.uint8) for digit in self.digits)


class Composer:
    """Composes the scenes of one split."""

    def __init__(self, split: str, size: int = 128) -> None:
        self.split, self.size = SPLITS.index(split), size
        digits, photographs = load_digits(), load_sample_images()
        self.images, self.labels = digits.images, digits.target
        self.scans = split_digits(digits.target)[split]
        self.photographs = {Path(name).name: image for name, image in zip(photographs.filenames, photographs.images)}

    def compose(self, number: int) -> Scene:
        """Returns a scene of the split by its number."""
        rng = np.random.default_rng((0, self.split, number))
        scene = self._cut_background(rng)
        count = rng.integers(*NUM_DIGITS, endpoint=True)
        while len(scene.digits) < count:
            self._try_digit(scene, rng)
        return scene

    def _cut_background(self, rng: np.random.Generator) -> Scene:
        """Starts a scene from a square of the split's half of a photograph."""
        name = str(rng.choice(list(self.photographs)))
        height, width, _ = self.photographs[name].shape
        side = int(rng.integers(*BACKGROUND_SIDE, endpoint=True))
        x = int(rng.integers(width // 2 - side, endpoint=True)) + self.split * (width // 2)
        y = int(rng.integers(height - side, endpoint=True))
        square = Image.fromarray(self.photographs[name][y : y + side, x : x + side])
        square = square.resize((self.size, self.size), Image.Resampling.BICUBIC)
        dimmed = square.point(lambda level: round(DIMMED * level))
        return Scene(np.array(dimmed), name, [x, y, side, side])

    def _try_digit(self, scene: Scene, rng: np.random.Generator) -> None:
        """Draws a random digit at a random place, unless that would hide too much of another one."""
        scan = int(rng.choice(self.scans))
        side = round(self.size * rng.uniform(*DIGIT_SIDE))
        glyph = draw_glyph(self.images[scan], side, rng.uniform(-MAX_ANGLE, MAX_ANGLE))
        height, width = glyph.shape
        y, x = rng.integers((self.size - height, self.size - width), endpoint=True)
        window = np.s_[y : y + height, x : x + width]
        mask = np.zeros((self.size, self.size), dtype=bool)
        mask[window] = glyph >= 0.5
        digit = Digit(scan, int(self.labels[scan]) + 1, int(mask.sum()), mask)
        if not all(is_legible(other, digit) for other in scene.digits):
            return
        for other in scene.digits:
            other.mask &= ~mask
        scene.digits.append(digit)
        around, share = scene.pixels[window], glyph[..., None]
        scene.pixels[window] = np.round((1 - share) * around + share * choose_ink(rng))


def draw_glyph(scan: np.ndarray, side: int, angle: float) -> np.ndarray:
    """Returns which share of each pixel the strokes of a turned scan cover, cut to their extent."""
    image = draw_digit(np.pad(scan, 1), side * SUPERSAMPLING)  # a margin, for strokes at the border to end smoothly
    image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    image = image.point(lambda level: 255 * (level > INK_LEVEL)).reduce(SUPERSAMPLING)
    return np.asarray(image.crop(image.getbbox())) / 255


def is_legible(lower: Digit, upper: Digit) -> bool:
    """Tells whether a digit can still be read once another one is drawn over it."""
    (x0, y0, w0, h0), (x1, y1, w1, h1) = lower.box, upper.box
    width = max(min(x0 + w0, x1 + w1) - max(x0, x1), 0)
    height = max(min(y0 + h0, y1 + h1) - max(y0, y1), 0)
    visible = np.count_nonzero(lower.mask & ~upper.mask)
    return width * height <= MAX_OVERLAP * min(w0 * h0, w1 * h1) and visible >= MIN_VISIBLE * lower.area


def choose_ink(rng: np.random.Generator) -> np.ndarray:
    """Returns the lightest of some random colours."""
    inks = rng.integers(256, size=(NUM_INKS, 3))
    return inks[(inks @ LUMINANCE).argmax()]


def encode_rle(mask: np.ndarray) -> dict[str, list[int]]:
    """Returns COCO's uncompressed run lengths: column by column, background and digit by turns, background first."""
    changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0, append=mask.size).tolist()}


def describe(scene: Scene, number: int, first_id: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns COCO's entries for a scene: the image and its instances."""
    height, width, _ = scene.pixels.shape
    image = {"id": number, "file_name": f"{number:05d}.jpg", "height": height, "width": width}
    image |= {"photograph": scene.photograph, "photograph_box": scene.photograph_box}
    instances = []
    for i, digit in enumerate(scene.digits, first_id):
        area = np.count_nonzero(digit.mask)
        instance = {"id": i, "image_id": number, "category_id": digit.category, "iscrowd": 0, "area": area}
        instance |= {"bbox": digit.box, "segmentation": encode_rle(digit.mask)}
        instances.append(instance | {"scan": digit.scan, "visible": area / digit.area})
    return image, instances


def find_pictures(root: Path, split: str) -> list[Path]:
    """Returns the scenes and semantic masks in a folder."""
    name = 5 * "[0-9]"
    return [*(root / "images" / split).glob(f"{name}.jpg"), *(root / "semantic" / split).glob(f"{name}.png")]


def is_complete(root: Path, split: str, info: dict[str, Any]) -> bool:
    """Tells whether an earlier run with these settings got to the end: the annotations, its last file, say so."""
    annotations = root / "annotations" / f"{split}.json"
    if not annotations.is_file() or json.loads(annotations.read_text()).get("info") != info:
        return False
    stems = sorted(path.stem for path in find_pictures(root, split))
    return stems == [f"{number:05d}" for number in range(info["scenes"]) for _ in ("image", "mask")]


def write_split(root: Path, split: str, info: dict[str, Any]) -> None:
    """Writes the scenes of a split in place of those of an earlier run."""
    images, semantic, annotations = root / "images" / split, root / "semantic" / split, root / "annotations"
    for folder in (images, semantic, annotations):
        folder.mkdir(parents=True, exist_ok=True)
    for path in (annotations / f"{split}.json", *find_pictures(root, split)):
        path.unlink(missing_ok=True)

    composer = Composer(split, info["size"])
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    coco = {"info": info, "images": [], "annotations": [], "categories": categories}
    for number in tqdm(range(info["scenes"]), f"composing {split} scenes", delay=1, disable=None):
        scene = composer.compose(number)
        image, instances = describe(scene, number, first_id=len(coco["annotations"]) + 1)  # COCO's tools skip id 0
        coco["images"].append(image)
        coco["annotations"] += instances
        Image.fromarray(scene.pixels).save(images / image["file_name"], quality=95)
        colours = Image.fromarray(scene.semantic_mask())
        colours.putpalette(PALETTE.tobytes())
        colours.save(semantic / f"{number:05d}.png")

    unfinished = annotations / f"{split}.json.tmp"
    unfinished.write_text(json.dumps(coco) + "\n")
    unfinished.replace(unfinished.with_suffix(""))


def write_scenes(root: Path, size: int = 128, train: int = 4800, val: int = 200) -> bool:
    """Writes both splits, unless they are already there; returns whether it has written any."""
    written = False
    for split, scenes in zip(SPLITS, (train, val)):
        info = {"description": "light scanned digits over dimmed photographs", "size": size, "scenes": scenes}
        info |= {"digits": list(NUM_DIGITS), "sides": list(DIGIT_SIDE), "overlap": MAX_OVERLAP, "dimmed": DIMMED}
        if not is_complete(root, split, info):
            write_split(root, split, info)
            written = True
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description="Compose scenes of scanned digits over dimmed photographs.")
    parser.add_argument("--output", type=Path, default=Path("data/digit_scenes"), help="where to write (%(default)s)")
    parser.add_argument("--train", type=int, default=4800, help="number of scenes to train on (%(default)s)")
    parser.add_argument("--val", type=int, default=200, help="number of scenes to hold out (%(default)s)")
    args = parser.parse_args()
    if min(args.train, args.val) < 1:
        parser.error("--train and --val start at 1")

    written = write_scenes(args.output, train=args.train, val=args.val)
    counts = f"{args.train} train, {args.val} val scenes"
    print(f"{args.output}: {counts}{'' if written else ', already there'}")


if __name__ == "__main__":
    main()
