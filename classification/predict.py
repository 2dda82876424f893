"""Classify images: `python predict.py photos/*.jpg --checkpoint lit_s.pth`."""

import argparse
import json
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm

from lit_backbone.datasets import image_loader
from lit_backbone.images import DataError, find_images
from lit_backbone.precision import PRECISIONS, amp_dtype, autocast
from lit_backbone.safe_reader import printable
from lit_backbone.visualize import add_import_argument, positive
from lit_classification.config import import_modules, one_line_errors
from lit_classification.model import Classifier, load_classifier

Prediction = tuple[str, float]  # class description and probability


@torch.inference_mode()
def predict(
    classifier: Classifier, paths: list[str], topk: int, device: torch.device, amp: str = "off"
) -> Iterator[tuple[str, list[Prediction] | DataError]]:
    """Yield each path with its `topk` most probable classes, or with the reason why it cannot be read."""
    for batch in tqdm(image_loader(paths, classifier.transform), "predict", disable=None, leave=False, unit="batch"):
        predictions: list[list[Prediction]] = []
        if readable := [image for _, image in batch if not isinstance(image, DataError)]:
            with autocast(amp, device):
                logits = classifier.model(torch.stack(readable).to(device))
            probabilities = logits.float().softmax(dim=1)  # (B, classes)
            values, labels = probabilities.topk(min(topk, len(classifier.classes)))  # (B, topk)
            rows = zip(labels.tolist(), values.tolist())
            predictions = [[(classifier.classes[j], p) for j, p in zip(*row)] for row in rows]
        for path, image in batch:
            yield path, image if isinstance(image, DataError) else predictions.pop(0)


def describe(path: str, predictions: list[Prediction], as_json: bool) -> str:
    if as_json:
        pairs = [{"class": name, "probability": probability} for name, probability in predictions]
        return json.dumps({"image": path, "predictions": pairs})
    return "\n".join([printable(path), *(f"{value:8.2%}  {printable(name)}" for name, value in predictions)])


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="images, and folders that hold images")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="checkpoint of main.py, or released one")
    parser.add_argument("--topk", type=positive, default=5, metavar="K", help="classes per image (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line, nothing else")
    help = "precision; auto = bf16 on a GPU (%(default)s)"
    parser.add_argument("--amp", choices=PRECISIONS, default="off", help=help)
    add_import_argument(parser)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_errors = 0
    amp_dtype(args.amp, device)  # raises DataError if the device lacks it
    import_modules(args.imports)
    paths = find_images(args.images)
    classifier = load_classifier(args.checkpoint, device)
    for path, result in predict(classifier, paths, args.topk, device, args.amp):
        if isinstance(result, DataError):
            num_errors += 1
            tqdm.write(f"error: {result}", file=sys.stderr)
        else:
            tqdm.write(describe(path, result, args.json))
    if num_errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
