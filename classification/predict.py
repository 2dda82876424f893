"""Classify images: `python predict.py photo.jpg --checkpoint lit_s.pth`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

try:
    import lit_backbone  # noqa: F401, registers the models
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run `bash setup_env.sh` and activate its environment")
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from timm.data import ImageNetInfo, get_img_extensions, infer_imagenet_subset
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from config import Config
from data import DataError, build_transform, one_line
from engine import progress
from lit_backbone import CheckpointError, read_checkpoint
from lit_backbone.checkpoints import convert_released, fit_state_dict, unwrap_state_dict
from main import build_model

BATCH_SIZE = 32
MAX_WORKERS = 8


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", help="an image, or a folder with images at any depth")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="written by main.py, or released")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes to name for an image (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line, nothing else")
    args = parser.parse_args(argv)
    if args.topk < 1:
        parser.error(f"argument --topk: expected 1 or more, got {args.topk}")
    return args


# ---- model


class Classifier(NamedTuple):
    """A model in evaluation mode, its configuration, the names of its classes, what makes its input of a PIL image."""

    model: nn.Module
    config: Config
    classes: list[str]
    transform: Callable[[Image.Image], Tensor]


def load_classifier(path: str | Path, device: torch.device) -> Classifier:
    """The classifier in a checkpoint of `main.py`, in a released one, or in any file of a registered variant's weights.

    `main.py` stores configuration and classes beside the weights, and their moving average where the run kept one,
    which is then what classifies. Other files are recognised by the names and shapes in them.

    Raises:
        CheckpointError: the file cannot be read, or holds no classifier of this package.
    """
    content = read_checkpoint(path)
    if "classes" in content:
        config = stored_config(content, path)
        state_dict = unwrap_state_dict(content, use_ema=config.TRAIN.EMA > 0)
        classes = in_words(content["classes"])
    else:
        state_dict = convert_released(unwrap_state_dict(content))
        config = recognize(state_dict, path)
        classes = usual_classes(config.MODEL.NUM_CLASSES)
    model = build_model(config, device)
    model.load_state_dict(fit_state_dict(state_dict, model, path, new_head=False))
    return Classifier(model.eval(), config, classes, build_transform(config, is_training=False))


def stored_config(content: dict[str, Any], path: str | Path) -> Config:
    """The configuration in a checkpoint, less what tells where its run started and what it ran on."""
    try:
        config = Config.model_validate_json(json.dumps(content.get("config")))
    except (ValidationError, TypeError) as error:
        raise CheckpointError(f"{path}: its configuration is not one of this version of main.py") from error
    model = config.MODEL.model_copy(update={"PRETRAINED": ""})
    return config.model_copy(update={"MODEL": model, "RUNTIME": Config().RUNTIME})


def recognize(state_dict: dict[str, Tensor], path: str | Path) -> Config:
    """The recipe's configuration for the variant whose weights, in this package's layout, these are."""
    classes = len(state_dict.get("head.bias", range(1000)))
    size = input_size(state_dict)
    variants = timm.list_models(module="lit")
    for name in variants:
        model = timm.create_model(name, num_classes=classes, img_size=size, device="meta")
        if layout(model.state_dict()) == layout(state_dict):
            return Config.model_validate({"MODEL": {"NAME": name, "NUM_CLASSES": classes}, "DATA": {"IMG_SIZE": size}})
    raise CheckpointError(
        f"{path}: weights of no known classifier; expected those of {', '.join(variants)}, or a checkpoint of main.py"
    )


def input_size(state_dict: dict[str, Tensor]) -> tuple[int, int]:
    """(height, width) in pixels that position tables are made for; the last stage has one token per 32 pixels."""
    if "stages.3.pos_embed" in state_dict:
        height, width = state_dict["stages.3.pos_embed"].shape[2:]
        return 32 * height, 32 * width
    if "stages.3.blocks.0.attn.rel_pos_bias" in state_dict:
        height, width = state_dict["stages.3.blocks.0.attn.rel_pos_bias"].shape[2:]  # 2 * tokens - 1
        return 16 * (height + 1), 16 * (width + 1)
    return 224, 224


def layout(state_dict: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes by name, without BatchNorm's counters, which early releases of PyTorch did not keep."""
    return {key: value.shape for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}


def in_words(classes: list[str]) -> list[str]:
    """Class names, those that are ImageNet's (n01440764) in words (tench, Tinca tinca)."""
    words = ImageNetInfo().label_descriptions(as_dict=True)
    return [words.get(name, name) for name in classes]


def usual_classes(count: int) -> list[str]:
    """ImageNet's classes in words if there are as many as it has, else their numbers."""
    subset = infer_imagenet_subset({"num_classes": count})
    return ImageNetInfo(subset).label_descriptions() if subset else [str(i) for i in range(count)]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name the model of `visualize_offset.py` and `visualize_attention.py`."""
    parser.add_argument("--model", metavar="NAME", help="of the model; checked if given, the checkpoint tells it")
    parser.add_argument("--resume", metavar="FILE", help="checkpoint, written by main.py or released")
    help = "input size in pixels, one number or height and width, in place of the checkpoint's"
    parser.add_argument("--img_size", type=int, nargs="+", metavar="N", help=help)


def check_model_arguments(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line, of which :func:`add_model_arguments`'s part is sound."""
    args = parser.parse_args(argv)
    if args.resume is None:
        parser.error("--resume FILE is missing: name a checkpoint, an untrained model has nothing to show")
    if args.img_size and (len(args.img_size) > 2 or min(args.img_size) < 32):
        parser.error(f"argument --img_size: expected one or two numbers of at least 32, got {args.img_size}")
    return args


def load_model(args: argparse.Namespace, device: torch.device) -> Classifier:
    """The classifier of a command line, with the transform for the input size that it asks for.

    Raises:
        CheckpointError: the file cannot be read, or holds another model than it names.
    """
    classifier = load_classifier(args.resume, device)
    name = classifier.config.MODEL.NAME
    if args.model not in (None, name):
        raise CheckpointError(f"{args.resume}: holds {name}, not {args.model}; leave out --model, or name another file")
    if args.img_size:
        size = (args.img_size[0], args.img_size[-1])
        data = classifier.config.DATA.model_copy(update={"IMG_SIZE": size})
        config: Config = classifier.config.model_copy(update={"DATA": data})
        classifier = classifier._replace(config=config, transform=build_transform(config, is_training=False))
    return classifier


# ---- images


class ImageFiles(Dataset):
    """Image files by number, as `(image (3, H, W) float32, path)`."""

    def __init__(self, paths: list[str], transform: Callable[[Image.Image], Tensor]):
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return self.transform(image.convert("RGB")), path
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: no readable image ({error})") from error


def find_images(path: str) -> list[str]:
    """The file itself, or all images in and below a folder in natural order."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise DataError(f"{path}: no such file or folder")
    if files := [file for file, _ in find_images_and_targets(path)[0]]:
        return files
    raise DataError(f"{path}: holds no images ({', '.join(get_img_extensions())})")


def image_loader(paths: list[str], transform: Callable[[Image.Image], Tensor]) -> DataLoader:
    """Batches of :class:`ImageFiles`, read by as many processes as pay for so many images."""
    workers = min(len(paths) // BATCH_SIZE, MAX_WORKERS, os.cpu_count() or 1)
    return DataLoader(ImageFiles(paths, transform), BATCH_SIZE, num_workers=workers)


def predict(
    classifier: Classifier, paths: list[str], topk: int, device: torch.device
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Yield each path with the `topk` likeliest classes, as pairs of name and probability, likeliest first."""
    model, _, classes, transform = classifier
    loader = image_loader(paths, transform)
    for images, names in progress(loader, enable=len(loader) > 1, desc="predict", unit="batch"):
        with torch.inference_mode():
            probabilities = model(images.to(device)).softmax(dim=1)  # (B, classes)
        values, indices = probabilities.topk(min(topk, len(classes)))  # (B, topk)
        for name, row, numbers in zip(names, values.tolist(), indices.tolist()):
            yield name, [(classes[number], value) for number, value in zip(numbers, row)]


def as_json(path: str, predictions: list[tuple[str, float]]) -> str:
    pairs = [{"class": name, "probability": probability} for name, probability in predictions]
    return json.dumps({"image": path, "predictions": pairs})


def as_text(path: str, predictions: list[tuple[str, float]]) -> str:
    return "\n".join([path, *(f"{probability:8.2%}  {name}" for name, probability in predictions)])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write = as_json if args.json else as_text
    try:
        paths = find_images(args.images)
        classifier = load_classifier(args.checkpoint, device)
        for path, predictions in predict(classifier, paths, args.topk, device):
            tqdm.write(write(path, predictions))  # past the progress bar
    except DataError as error:
        sys.exit(f"error: {one_line(error)}")
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
