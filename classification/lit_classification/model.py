"""From a configuration to a model, and from a checkpoint to a model with its classes and its way to read images."""

import argparse
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any, NamedTuple, TypeVar

import timm
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from lit_backbone import LIT, CheckpointError, read_checkpoint
from lit_backbone.checkpoints import (
    infer_img_size_and_num_classes,
    load_checkpoint,
    printable,
    stored_classes,
    unwrap_state_dict,
)
from lit_backbone.released import convert_released
from lit_classification.augmentation import build_transform
from lit_classification.config import SIDES, Config, ConfigError, differences, settings
from lit_classification.config_file import checked
from lit_classification.sampler import seed_everything

_logger = logging.getLogger(__name__)

# What a checkpoint that is evaluated knows better than a configuration.
BROUGHT = {"DATA": {"IMG_SIZE", "INTERPOLATION"}, "MODEL": {"NAME", "LIT", "NUM_CLASSES"}, "TEST": {"CROP"}}


def build_model(config: Config, device: torch.device) -> nn.Module:
    """The configured model, its weights drawn from the seed alone."""
    seed_everything("weights", config.SEED)
    model = timm.create_model(**config.model_keywords)
    model.to(device)
    if config.RUNTIME.COMPILE:
        model.compile()
    return model


class Classifier(NamedTuple):
    """A model in evaluation mode, its configuration, the names of its classes, what makes its input of a PIL image."""

    model: nn.Module
    config: Config
    classes: list[str]  # in words
    transform: Callable[[Image.Image], Tensor]
    folders: list[str]  # the classes' names as the checkpoint has them, if it does


def load_classifier(path: str | Path, device: torch.device) -> Classifier:
    """The classifier in a checkpoint of `main.py`, in a released one, or in any file of a registered variant's weights.

    `main.py` stores configuration and classes beside the weights. Other files are recognised by names and shapes.

    Raises:
        CheckpointError: the file cannot be read, or holds no classifier of this package.
    """
    content = read_checkpoint(path)
    with suppress(KeyError, TypeError):
        if content["config"]["MODEL"]["KEYWORDS"]:
            raise CheckpointError(
                f"{path}: has MODEL.KEYWORDS, which count in YAML only; use main.py --cfg FILE --eval"
            )
    config = stored_config(content, path) or recognize(convert_released(unwrap_state_dict(content)), path)
    config = config.model_copy(update={"RUNTIME": Config().RUNTIME})  # its run may have had another machine
    count = config.MODEL.NUM_CLASSES
    folders = stored_classes(content)
    classes = in_words(folders) or usual_classes(count)
    if len(classes) != count:
        raise CheckpointError(f"{path}: names {len(classes)} classes, but its model has {count}; it cannot be used")
    model = model_of(content, path, config, device)
    return Classifier(model.eval(), config, classes, build_transform(config, is_training=False), folders)


def model_of(
    content: dict[str, Any], path: str | Path, config: Config, device: torch.device, classes: Sequence[str] = ()
) -> nn.Module:
    """The configured model with a checkpoint's weights; it takes no more room than these, for they are compared first.

    Raises:
        CheckpointError: they are another model's, or of other `classes`.
    """
    if timm.models.is_model_in_modules(config.MODEL.NAME, ["lit"]):  # timm's may not be made without memory
        with torch.device("meta"):
            outline = timm.create_model(**config.model_keywords)
        load_checkpoint(path, outline, new_head=False, content=content)
    model = build_model(config, device)
    model.load_state_dict(load_checkpoint(path, model, classes=classes, new_head=False, content=content))
    return model


class Records(BaseModel):
    """What `main.py` stores beside the weights, for those who use these."""

    model_config = ConfigDict(strict=True, frozen=True, arbitrary_types_allowed=True)

    classes: Annotated[list[Annotated[str, Field(max_length=1000)]], Field(min_length=1)]
    config: dict[str, Any]
    model_ema: dict[str, Any] | None = None


R = TypeVar("R", bound=Records)


def stored_records(content: dict[str, Any], path: str | Path, kind: type[R]) -> R:
    """A checkpoint's records, each of the type that `main.py` writes.

    Raises:
        CheckpointError: one is missing, or of another type.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {place!r} is not as main.py writes it ({first['msg']})") from error


def stored_config(content: dict[str, Any], path: str | Path) -> Config | None:
    """The configuration in a checkpoint of `main.py`, checked as that of a YAML file is; None in other checkpoints.

    MODEL.KEYWORDS is left out: timm's models do not bound what a keyword makes them do.

    Raises:
        CheckpointError: it is not one of this version.
    """
    if not {"classes", "config"} <= content.keys():
        return None
    tree = stored_records(content, path, Records).config
    if isinstance(tree.get("MODEL"), dict):
        tree = tree | {"MODEL": {key: value for key, value in tree["MODEL"].items() if key != "KEYWORDS"}}
    try:
        return checked(tree, training=False, origin=lambda _: f"{path}: its configuration")
    except ConfigError as error:
        raise CheckpointError(str(error).splitlines()[0]) from error


def as_trained(config: Config, content: dict[str, Any], load: Callable[..., Config]) -> Config:
    """The configuration to evaluate MODEL.RESUME with: a checkpoint of `main.py` knows its model and input.

    Args:
        config: of YAML files and options.
        content: of the checkpoint, which counts more than files and less than options.
        load: `load_config` for the same files and options.
    """
    path = config.MODEL.RESUME
    stored = stored_config(content, path)
    if stored is None:
        return config
    brought = stored.model_dump(mode="json", include=BROUGHT)
    merged = load(checkpoint=(path, brought))
    asked, found, brought = (settings(c.model_dump(mode="json", include=BROUGHT)) for c in (config, merged, stored))
    for key, of_yaml, own in differences(asked, found):
        _logger.info(f"{key} is {own}, as {path} was trained with, not {of_yaml}")
    for key, own, option in differences(brought, found):
        _logger.info(f"{key} is {option}, as an option says; {path} was trained with {own}")
    if (own := content["config"].get("MODEL", {}).get("KEYWORDS", {})) != merged.MODEL.KEYWORDS:
        asked = merged.MODEL.KEYWORDS
        _logger.warning(printable(f"MODEL.KEYWORDS is {shortened(asked)}; {path} was trained with {shortened(own)}"))
    return merged


def recognize(state_dict: dict[str, Tensor], path: str | Path) -> Config:
    """The recipe's configuration for the variant whose weights, in this package's layout, these are."""
    shapes, variants = layout(state_dict), timm.list_models(module="lit")
    size, count = infer_img_size_and_num_classes(state_dict)
    for name in variants:
        tree = {"MODEL": {"NAME": name, "NUM_CLASSES": count}, "DATA": {"IMG_SIZE": size}}
        with suppress(ConfigError), torch.device("meta"):
            config = checked(tree, training=False, origin=lambda _: str(path))
            if layout(timm.create_model(**config.model_keywords).state_dict()) == shapes:
                return config
    raise CheckpointError(
        f"{path}: weights of no known classifier; expected those of {', '.join(variants)}, or a checkpoint of main.py"
    )


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


def parse_model_args(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line of `visualize_offset.py` or `visualize_attention.py`, with the options that name a model."""
    parser.add_argument("--model", metavar="NAME", help="of the model; checked if given, the checkpoint tells it")
    parser.add_argument("--resume", required=True, metavar="FILE", help="checkpoint, written by main.py or released")
    help = "input size in pixels, one number or height and width, in place of the checkpoint's"
    parser.add_argument("--img_size", type=int, nargs="+", metavar="N", help=help)
    args = parser.parse_args(argv)
    sides = args.img_size or [SIDES[0]]
    if len(sides) > 2 or min(sides) < SIDES[0] or max(sides) > SIDES[1]:
        parser.error(f"argument --img_size: expected one or two numbers from {SIDES[0]} to {SIDES[1]}, got {sides}")
    return args


def load_model(args: argparse.Namespace, device: torch.device) -> Classifier:
    """The classifier of a command line, with the transform for the input size that it asks for.

    Raises:
        CheckpointError: the file cannot be read, or holds another model than it names.
    """
    classifier = load_classifier(args.resume, device)
    if not isinstance(classifier.model, LIT):
        raise CheckpointError(f"{args.resume}: holds a {type(classifier.model).__name__}; expected a LIT")
    name = classifier.config.MODEL.NAME
    if args.model not in (None, name):
        raise CheckpointError(f"{args.resume}: holds {name}, not {args.model}; leave out --model, or name another file")
    if args.img_size:
        size = (args.img_size[0], args.img_size[-1])
        data = classifier.config.DATA.model_copy(update={"IMG_SIZE": size})
        config: Config = classifier.config.model_copy(update={"DATA": data})
        classifier = classifier._replace(config=config, transform=build_transform(config, is_training=False))
    return classifier
