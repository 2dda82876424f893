"""Writes cluttered digits as an image folder: scikit-learn's scans, distorted, among pieces of others.

    python -m demo.cluttered_digits --output data/cluttered_digits

makes data/cluttered_digits/{train,val}/{0..9}/NNNNN.png, 64 x 64 grey: 10,000 images to train on and 5,000 to test
with, every digit as often. Each shows one whole digit, turned, sheared, scaled, anywhere; pieces of other digits
lie about, and all of it in noise. Both splits draw on scans of their own, those of `demo/digits.py`, and every image
follows from seed, split and number. `--preview sheet.png` draws some of them.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

from demo.digits import MAX_INTENSITY, split_digits

SPLITS = ("train", "val")
SIDE = 64  # of the images, in pixels
DIGIT_SIDE = (24, 36)  # of a digit, in pixels
MAX_ANGLE, MAX_SHEAR = math.radians(25), 0.3
NUM_PIECES = 3
PIECE_SIDE = (8, 12)  # of the window through which a piece of a digit is seen, in pixels
INK = (0.5, 1.0)  # of the faintest and the brightest strokes, where 1 is white
NOISE = 0.08  # standard deviation


class Composer:
    """Composes the images of one split."""

    def __init__(self, split: str, seed: int = 0) -> None:
        digits = load_digits()
        self.seed, self.split = seed, SPLITS.index(split)
        self.scans = split_digits(digits.target)[split]
        self.images, self.labels = digits.images / MAX_INTENSITY, digits.target

    def compose(self, number: int) -> np.ndarray:
        """Returns an image of the split by its number, `(64, 64)` uint8; its last decimal digit is what it shows."""
        rng = np.random.default_rng((self.seed, self.split, number))
        canvas = np.zeros((SIDE, SIDE))
        for _ in range(NUM_PIECES):
            piece = distort(self.images[rng.choice(self.scans)], rng)
            top, left = rng.choice(np.argwhere(piece > 0.5 * piece.max()))  # a point on a stroke
            height, width = 2 * rng.integers(PIECE_SIDE[0] // 2, PIECE_SIDE[1] // 2, size=2, endpoint=True)
            window = np.s_[max(top - height // 2, 0) : top + height // 2, max(left - width // 2, 0) : left + width // 2]
            canvas[window] = np.maximum(canvas[window], rng.uniform(*INK) * piece[window])
        shown = rng.choice(self.scans[self.labels[self.scans] == number % 10])
        canvas = np.maximum(canvas, rng.uniform(*INK) * distort(self.images[shown], rng))
        canvas += rng.normal(scale=NOISE, size=canvas.shape)
        return np.round(255 * canvas.clip(0, 1)).astype(np.uint8)


def distort(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a scan turned, sheared, scaled and placed at random, wholly within an empty image, `(64, 64)`."""
    side = rng.uniform(*DIGIT_SIDE)
    angle, shear = rng.uniform(-MAX_ANGLE, MAX_ANGLE), rng.uniform(-MAX_SHEAR, MAX_SHEAR)
    cos, sin = math.cos(angle), math.sin(angle)
    to_scan = np.array([[cos, sin], [-sin, cos]]) @ np.array([[1, shear], [0, 1]]) * (len(scan) / side)  # of (x, y)
    corners = np.linalg.inv(to_scan) @ (len(scan) / 2 * np.array([[-1, 1, 1, -1], [-1, -1, 1, 1]]))
    reach = np.abs(corners).max(axis=1)
    centre = rng.uniform(reach, SIDE - reach)
    margin = 2  # for strokes at the border to end smoothly
    origin = len(scan) / 2 + margin - to_scan @ centre
    coefficients = (*to_scan[0], origin[0], *to_scan[1], origin[1])
    padded = Image.fromarray(np.pad(scan, margin).astype(np.float32))
    placed = padded.transform((SIDE, SIDE), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return np.asarray(placed).clip(0, 1)


def write_images(root: Path, train: int = 10_000, val: int = 5_000, seed: int = 0, force: bool = False) -> bool:
    """Writes the image folder `root`, unless it is already there as it would be; returns whether it has written."""
    written = False
    for split, count in zip(SPLITS, (train, val)):
        composer = Composer(split, seed)
        paths = [root / split / str(number % 10) / f"{number:05d}.png" for number in range(count)]
        last = paths[-1]  # written when all others are whole
        if not force and all(path.is_file() for path in paths) and _shows(last, composer.compose(count - 1)):
            continue
        last.unlink(missing_ok=True)
        for number, path in enumerate(tqdm(paths, f"composing {split} images", delay=1, disable=None)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(composer.compose(number)).save(path)
        written = True
    return written


def _shows(path: Path, pixels: np.ndarray) -> bool:
    """Tells a file from one of another seed, of other settings, or cut off."""
    try:
        with Image.open(path) as image:
            return np.array_equal(np.asarray(image), pixels)
    except OSError:
        return False


def draw_sheet(split: str, rows: int = 5, seed: int = 0) -> Image.Image:
    """Draws the first images of a split, a digit in each column."""
    composer = Composer(split, seed)
    images = [[composer.compose(row * 10 + column) for column in range(10)] for row in range(rows)]
    return Image.fromarray(np.block(images)).resize((20 * SIDE, 2 * rows * SIDE), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write images of digits among pieces of others.")
    parser.add_argument("--output", type=Path, default=Path("data/cluttered_digits"), help="folder (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn at random (%(default)s)")
    parser.add_argument("--force", action="store_true", help="write again what is already there")
    parser.add_argument("--preview", type=Path, metavar="FILE", help="only draw the first images into this")
    args = parser.parse_args()
    if args.preview:
        draw_sheet("train", seed=args.seed).save(args.preview)
        return
    written = write_images(args.output, seed=args.seed, force=args.force)
    counts = " and ".join(f"{len(list((args.output / split).glob('*/*.png')))} in {split}" for split in SPLITS)
    print(f"{args.output}: {counts}{'' if written else ', already there'}")


if __name__ == "__main__":
    main()
