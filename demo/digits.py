"""Write scikit-learn's 1,797 scanned handwritten digits as an image folder.

    python demo/digits.py --output data/digits

creates `OUTPUT/{train,val}/{0..9}/NNNN.png`, where NNNN is the number of the scan: 1,437 training and 360 validation
images. Both splits have the same proportion of every digit. Needs `bash setup_env.sh --dev`.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

MAX_INTENSITY = 16  # maximum value of the 8 x 8 scans
NUM_VAL = 360
SIZE = 64  # side of the images, pixels


def split_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the numbers of the scans in each split."""
    scans = np.arange(len(labels))
    train, val = train_test_split(scans, test_size=NUM_VAL, stratify=labels, random_state=0)
    return {"train": np.sort(train), "val": np.sort(val)}


def draw_digit(scan: np.ndarray, size: int) -> Image.Image:
    """Convert an 8 x 8 scan into a gray image with bright strokes on black."""
    image = Image.fromarray(np.round(scan * (255 / MAX_INTENSITY)).astype(np.uint8))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def write_digits(root: Path) -> bool:
    """Write the image folder `root` and return True, or return False if it is complete."""
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
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("data/digits"), help="directory (%(default)s)")
    args = parser.parse_args()
    status = "written" if write_digits(args.output) else "complete"
    counts = ", ".join(f"{sum(1 for _ in (args.output / split).rglob('*.png'))} {split}" for split in ("train", "val"))
    print(f"{args.output}: {counts} images of {SIZE} x {SIZE} pixels, {status}")


if __name__ == "__main__":
    main()
