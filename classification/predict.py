"""Classify images: `python predict.py photos/*.jpg --checkpoint lit_s.pth`."""

import argparse
import json
import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm

from lit_backbone import CheckpointError
from lit_backbone.datasets import image_loader
from lit_backbone.images import DataError, find_images
from lit_backbone.precision import PRECISIONS, amp_dtype, autocast
from lit_backbone.safe_reader import printable
from lit_backbone.visualize import add_import_argument, positive
from lit_classification.config import ConfigError, import_modules
from lit_classification.model import Classifier, load_classifier

Prediction = tuple[str, float]  # class description and probability


@torch.inference_mode()
def predict(
    classifier: Classifier, paths: list[str], topk: int, device: torch.device, amp: str = "off"
) -> Iterator[tuple[str, list[Prediction] | DataError]]:
    """Yield each path with its `topk` most probable classes, or with the reason why it cannot be read."""
    for batch in tqdm(image_loader(paths, classifier.transform), "predict", disable=None, leave=False, unit="batch"):
        rows = iter(())
        if readable := [image for _, image in batch if not isinstance(image, DataError)]:
            with autocast(amp, device):
                logits = classifier.model(torch.stack(readable).to(device))
            probabilities = logits.float().softmax(dim=1)  # (B, classes)
            values, labels = probabilities.topk(min(topk, len(classifier.classes)))  # (B, topk)
            rows = zip(values.tolist(), labels.tolist())
        for path, image in batch:
            yield (
                path,
                image if isinstance(image, DataError) else [(classifier.classes[j], p) for p, j in zip(*next(rows))],
            )


def describe(path: str, predictions: list[Prediction], as_json: bool) -> str:
    if as_json:
        pairs = [{"class": name, "probability": probability} for name, probability in predictions]
        return json.dumps({"image": path, "predictions": pairs})
    return "\n".join([printable(path), *(f"{value:8.2%}  {printable(name)}" for name, value in predictions)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="images, and folders that hold images")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="checkpoint of main.py, or released one")
    parser.add_argument("--topk", type=positive, default=5, metavar="K", help="classes per image (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line, nothing else")
    parser.add_argument(
        "--amp", choices=PRECISIONS, default="off", help="precision; auto = bf16 on a GPU (%(default)s)"
    )
    add_import_argument(parser)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_errors = 0
    try:
        amp_dtype(args.amp, device)
    except ValueError as error:
        parser.error(f"argument --amp: {error}")
    try:
        import_modules(args.imports)
        paths = find_images(args.images)
        classifier = load_classifier(args.checkpoint, device)
        for path, result in predict(classifier, paths, args.topk, device, args.amp):
            if isinstance(result, DataError):
                num_errors += 1
                tqdm.write(f"error: {result}", file=sys.stderr)
            else:
                tqdm.write(describe(path, result, args.json))
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    if num_errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
