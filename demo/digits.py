"""Writes scikit-learn's 1,797 scanned handwritten digits as an image folder.

    python demo/digits.py --output data/digits

makes data/digits/{train,val}/{0..9}/NNNN.png, where NNNN is the number of the scan: 1,437 images to train on and 360
to hold out, every digit in the same proportion, always the same split. (`setup_env.sh --dev` brings scikit-learn.)
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

MAX_INTENSITY = 16  # of the 8 x 8 scans
NUM_VAL = 360
SIZE = 64  # of the images written, height and width


def split_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the numbers of the scans in each split."""
    scans = np.arange(len(labels))
    train, val = train_test_split(scans, test_size=NUM_VAL, stratify=labels, random_state=0)
    return {"train": np.sort(train), "val": np.sort(val)}


def draw_digit(scan: np.ndarray, size: int) -> Image.Image:
    """Turns an 8 x 8 scan into a grey image, bright strokes on black."""
    image = Image.fromarray(np.round(scan * (255 / MAX_INTENSITY)).astype(np.uint8))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def write_digits(root: Path) -> bool:
    """Writes the image folder `root`, unless it is already there; returns whether it has written."""
    digits = load_digits()
    scans = [(split, i) for split, members in split_digits(digits.target).items() for i in members]
    paths = [root / split / str(digits.target[i]) / f"{i:04d}.png" for split, i in scans]
    if all(path.is_file() for path in paths):
        return False
    for path, (_, i) in zip(tqdm(paths, "writing digits", delay=1, disable=None), scans):
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_digit(digits.images[i], SIZE).save(path)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Write scikit-learn's handwritten digits as an image folder.")
    parser.add_argument("--output", type=Path, default=Path("data/digits"), help="folder to write to (%(default)s)")
    args = parser.parse_args()

    written = write_digits(args.output)
    counts = ", ".join(f"{sum(1 for _ in (args.output / split).rglob('*.png'))} {split}" for split in ("train", "val"))
    print(f"{args.output}: {counts} images of {SIZE} x {SIZE}{'' if written else ', already there'}")


if __name__ == "__main__":
    main()
