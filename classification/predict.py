"""Classify images: `python predict.py photos/*.jpg --checkpoint lit_s.pth`."""

import argparse
import json
import sys
from collections.abc import Iterator

if __name__ == "__main__":
    import lit_classification.interrupts  # noqa: F401, before what takes long to import

import torch
from tqdm import tqdm

from lit_backbone import CheckpointError
from lit_backbone.checkpoints import printable
from lit_backbone.images import DataError, find_images
from lit_backbone.visualize import positive
from lit_classification.evaluation import progress
from lit_classification.loaders import image_loader
from lit_classification.model import Classifier, load_classifier


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    help = "images, and folders with images at any depth"
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help=help)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="written by main.py, or released")
    help = "classes to name for an image (%(default)s)"
    parser.add_argument("--topk", type=positive, default=5, metavar="K", help=help)
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line, nothing else")
    return parser.parse_args(argv)


def predict(
    classifier: Classifier, paths: list[str], topk: int, device: torch.device
) -> Iterator[tuple[str, list[tuple[str, float]] | DataError]]:
    """Yield each path with the `topk` likeliest classes, as pairs of name and probability, likeliest first.

    An image that cannot be read has the reason in their place.
    """
    model, _, classes, transform, _ = classifier
    loader = image_loader(paths, transform)
    for batch in progress(loader, enable=len(loader) > 1, desc="predict", unit="batch"):
        found = dict(batch)
        if sound := [path for path, image in batch if not isinstance(image, DataError)]:
            images = torch.stack([found[path] for path in sound]).to(device)  # (B, 3, H, W)
            with torch.inference_mode():
                probabilities = model(images).softmax(dim=1)  # (B, classes)
            values, indices = probabilities.topk(min(topk, len(classes)))  # (B, topk)
            for path, row, numbers in zip(sound, values.tolist(), indices.tolist()):
                found[path] = [(classes[number], value) for number, value in zip(numbers, row)]
        for path, _ in batch:
            yield path, found[path]


def as_json(path: str, predictions: list[tuple[str, float]]) -> str:
    pairs = [{"class": name, "probability": probability} for name, probability in predictions]
    return json.dumps({"image": path, "predictions": pairs})


def as_text(path: str, predictions: list[tuple[str, float]]) -> str:
    return "\n".join(
        [printable(path), *(f"{probability:8.2%}  {printable(name)}" for name, probability in predictions)]
    )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write, failed = as_json if args.json else as_text, False
    try:
        paths = find_images(args.images)
        classifier = load_classifier(args.checkpoint, device)
        for path, predictions in predict(classifier, paths, args.topk, device):
            if isinstance(predictions, DataError):
                failed = True
                tqdm.write(f"error: {predictions}", file=sys.stderr)
            else:
                tqdm.write(write(path, predictions))  # past the progress bar
    except (CheckpointError, DataError) as error:
        sys.exit(f"error: {error}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
