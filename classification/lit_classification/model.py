"""Models: from a config, and from a checkpoint with its classes and preprocessing."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo, create_transform, infer_imagenet_subset
from torch import Tensor, nn

from lit_backbone import CheckpointError, read_checkpoint
from lit_backbone.checkpoints import (
    architecture,
    class_mismatch,
    infer_img_size_and_num_classes,
    load_checkpoint,
    resize_position_tables,
    stored_classes,
    stored_keywords,
    unwrap_state_dict,
)
from lit_backbone.released import convert_released
from lit_backbone.safe_reader import printable
from lit_classification.config import Config, ConfigError, is_lit
from lit_classification.config_reader import config_from_checkpoint
from lit_classification.data import eval_preprocessing
from lit_classification.sampler import seed_everything

_logger = logging.getLogger(__name__)


def build_model(config: Config, device: torch.device) -> nn.Module:
    """Build the configured model, its weights drawn from the seed alone."""
    seed_everything("weights", config.SEED)
    model = timm.create_model(**config.model_keywords)
    model.to(device)
    if config.RUNTIME.COMPILE:
        model.compile()
    return model


def freeze(model: nn.Module, config: Config) -> list[nn.Module]:
    """Freeze the parameters of MODEL.FREEZE. Return the modules that training keeps in evaluation mode."""
    frozen: list[nn.Module] = []
    if config.MODEL.FREEZE == "backbone":
        model.requires_grad_(False).get_classifier().requires_grad_(True)  # pyrefly: ignore
        tensors = {module: [*module.parameters(), *module.buffers()] for module in model.modules()}
        frozen = [module for module, values in tensors.items() if values and not any(x.requires_grad for x in values)]
    elif config.MODEL.FREEZE:
        frozen = list(model.stages[: config.MODEL.FREEZE].requires_grad_(False))  # pyrefly: ignore
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return frozen + [m for m in model.modules() if config.MODEL.FREEZE_BN and isinstance(m, batch_norms)]


def load_teacher(config: Config, device: torch.device, classes: list[str]) -> nn.Module | None:
    """Load DISTILL.TEACHER, a timm model or a checkpoint of a LIT. Raise ConfigError if it does not fit the data."""
    name = config.DISTILL.TEACHER
    if not name:
        return None
    if timm.is_model(name) and not Path(name).is_file():  # for timm, lit_s.pth is lit_s
        teacher: Any = timm.create_model(name, pretrained=True).to(device).eval()
        mean_std = teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"]
        is_normalized = mean_std == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        problem = "" if is_normalized else f"expects other mean and std ({mean_std})"
    else:
        problem = class_mismatch(read_checkpoint(name), classes)
        teacher = load_classifier(name, device).model
    if not problem and teacher.num_classes != config.MODEL.NUM_CLASSES:
        problem = f"has {teacher.num_classes} classes, the model {config.MODEL.NUM_CLASSES}"
    if problem:
        raise ConfigError(f"DISTILL.TEACHER: {name}: {problem}. Use another teacher.")
    return teacher.requires_grad_(False)


def load_pretrained(config: Config, model: nn.Module, classes: list[str]) -> dict[str, Tensor]:
    """Return the weights of MODEL.PRETRAINED, fitted to the model.

    The head stays random if the class names of the checkpoint differ from `classes`. With PRETRAINED_PARTIAL, so do
    all tensors whose name or shape does not fit, and the log lists them.
    """
    path, expected = config.MODEL.PRETRAINED, model.state_dict()
    content = read_checkpoint(path)
    stored = stored_keywords(content)
    if stored and stored != config.MODEL.LIT.model_dump(mode="json", exclude_none=True):
        _logger.warning(printable(f"{path}: was trained with other keywords, MODEL.LIT {stored}", 500))
    if not config.MODEL.PRETRAINED_PARTIAL:
        return load_checkpoint(path, model, classes=classes, content=content)
    weights = resize_position_tables(load_checkpoint(path, content=content), model)
    fitting = {k: v for k, v in weights.items() if k in expected and v.shape == expected[k].shape}
    if mismatch := class_mismatch(content, classes):
        _logger.warning(f"{path}: {mismatch}. The head is initialized from scratch.")
        head = {id(param) for param in model.get_classifier().parameters()}  # pyrefly: ignore
        fitting = {k: v for k, v in fitting.items() if id(dict(model.named_parameters()).get(k)) not in head}
    if not fitting or not all(value.isfinite().all() for value in fitting.values()):
        raise CheckpointError(f"{path}: has no weights that fit {architecture(model)}, or some are not finite.")
    missing = [key for key in expected if key not in fitting and not key.endswith("num_batches_tracked")]
    _logger.warning(f"{path}: {len(missing)} tensors stay random: {', '.join(missing) or 'none'}")
    return expected | fitting


def load_model(
    content: dict[str, Any], path: str | Path, config: Config, device: torch.device, classes: Sequence[str] = ()
) -> nn.Module:
    """Build the configured model with a checkpoint's weights, EMA weights if it has any.

    Raise CheckpointError if they are of another model, or of other `classes` than those of the data.
    """
    if is_lit(config.MODEL.NAME):  # compare shapes before memory is allocated
        with torch.device("meta"):
            outline = timm.create_model(**config.model_keywords)
        load_checkpoint(path, outline, new_head=False, content=content)
    model = build_model(config, device)
    model.load_state_dict(load_checkpoint(path, model, classes=classes, new_head=False, content=content))
    return model.eval()


class Classifier(NamedTuple):
    """A LIT in evaluation mode with everything that inference needs."""

    model: nn.Module
    config: Config
    classes: list[str]  # descriptions by label
    transform: Callable[[Image.Image], Tensor]
    class_names: list[str]  # names stored in the checkpoint; empty if it has none


def load_classifier(
    path: str | Path, device: torch.device, name: str | None = None, img_size: Sequence[int] | None = None
) -> Classifier:
    """Load a LIT from a checkpoint of `main.py`, from a released one, or from bare weights of a registered variant.

    Raise CheckpointError if the file cannot be read, holds no LIT, or another one than `name`. `img_size`, `[side]` or
    `[height, width]`, replaces the input size of the checkpoint.
    """
    content = read_checkpoint(path)
    config = find_config(content, path)
    if name not in (None, config.MODEL.NAME):
        raise CheckpointError(f"{path}: holds {config.MODEL.NAME}, not {name}. Omit --model, or use another file.")
    class_names = stored_classes(content)
    classes = class_descriptions(class_names, config.MODEL.NUM_CLASSES)
    if len(classes) != config.MODEL.NUM_CLASSES:
        raise CheckpointError(f"{path}: has {len(classes)} classes for {config.MODEL.NUM_CLASSES} outputs.")
    model = load_model(content, path, config, device)
    if img_size:
        data = config.DATA.model_copy(update={"IMG_SIZE": (img_size[0], img_size[-1])})
        config = config.model_copy(update={"DATA": data})
    return Classifier(model, config, classes, cast(Any, create_transform(**eval_preprocessing(config))), class_names)


def find_config(content: dict[str, Any], path: str | Path, opts: Sequence[str] = (), **shortcuts: Any) -> Config:
    """Return the config in a checkpoint or, without one, that of the LIT whose weights these are, or raise."""
    config = config_from_checkpoint(content, path, opts, **shortcuts)
    if config:
        return config
    state_dict = convert_released(unwrap_state_dict(content))
    shapes, variants = _shapes(state_dict), timm.list_models(module="lit")
    size, num_classes = infer_img_size_and_num_classes(state_dict)
    for name in variants:
        with suppress(ValueError), torch.device("meta"):
            model = timm.create_model(name, num_classes=num_classes, img_size=size)
            if _shapes(model.state_dict()) == shapes:
                tree = {"MODEL": {"NAME": name, "NUM_CLASSES": num_classes}, "DATA": {"IMG_SIZE": size}}
                return cast(Config, config_from_checkpoint({"classes": [], "config": tree}, path, opts, **shortcuts))
    fix = "Use a checkpoint of main.py, or main.py --eval with --cfg for another model."
    raise CheckpointError(f"{path}: holds weights of no known LIT ({', '.join(variants)}). {fix}")


def _shapes(state_dict: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return shapes by name, without BatchNorm's counters, which early versions of PyTorch did not store."""
    return {key: value.shape for key, value in state_dict.items() if not key.endswith("num_batches_tracked")}


def class_descriptions(names: list[str], count: int) -> list[str]:
    """Describe ImageNet's classes (n01440764: tench, Tinca tinca). Unnamed classes are ImageNet's if it has `count`."""
    if not names:
        subset = infer_imagenet_subset({"num_classes": count})
        return list(ImageNetInfo(subset).label_descriptions()) if subset else [str(i) for i in range(count)]
    descriptions = cast(dict[str, str], ImageNetInfo().label_descriptions(as_dict=True))
    return [descriptions.get(name, name) for name in names]
