"""Reading configs from YAML files, command line options and checkpoints, with messages that name the key."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from reprlib import repr as shorten
from typing import Any

import timm
import timm.optim
import torch
import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lit_backbone import CheckpointError, read_checkpoint
from lit_backbone.safe_reader import printable
from lit_classification.config import Config, ConfigError, Lit, flatten, import_modules, is_imported, is_lit, key_fields
from lit_classification.original import REPLACED_KEYS, is_lit_ti_json, translate_original

_logger = logging.getLogger(__name__)

LIT_TI_CONFIG = Path(__file__).parents[1] / "configs" / "lit-ti.yaml"

Layer = tuple[str, dict[str, Any]]  # where keys are set, and their values by dotted key


class _Loader(yaml.SafeLoader):
    """YAML 1.2 as far as configs need it: `1e-3` is a float, `on` and `off` are strings, keys are unique."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in names[:i]:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


for _tag, _pattern in {  # the first match counts
    "null": r"~|null|",
    "bool": r"true|True|false|False",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^({_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))  # PyYAML reads 010 as octal


class _Dumper(yaml.SafeDumper):
    """Quotes whatever :class:`_Loader` would not read back as a string."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def dump_config(config: Config) -> str:
    """Write a config as YAML that :func:`load_config` reads back."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def load_config(path: str | Path, opts: Sequence[str] = (), *, training: bool = True, **shortcuts: Any) -> Config:
    """Read a YAML file and the files it inherits from, override keys, and validate the result, or raise ConfigError.

    `opts` alternates keys and values, as after `--opts`. `shortcuts` are keys by the last part of their name in lower
    case, such as `batch_size`; None is ignored. `training` adds checks of what only a training needs.
    """
    layers = list(_read_files(Path(path)))
    if run_dir := find_run(path):  # continue it, also if it was moved
        place = {"OUTPUT": str(run_dir.parents[1]), "TAG": run_dir.name, "TRAIN.RESUME_CHANGED": False}
        layers.append((str(path), place))
    return _build([*layers, *_read_options(opts, shortcuts)], training)


def config_from_checkpoint(
    content: dict[str, Any], path: str | Path, opts: Sequence[str] = (), **shortcuts: Any
) -> Config | None:
    """Return the config that `main.py` stored in a checkpoint, or None if there is none for a LIT.

    Unknown keys are ignored with a warning, missing ones take their defaults. `RUNTIME` and `IMPORTS` never come from a
    checkpoint, `MODEL.KEYWORDS` only for models of `--import`. `opts` and `shortcuts` override the stored config, see
    :func:`load_config`. Raise CheckpointError if the stored config is invalid, ConfigError if an option is.
    """
    if "classes" not in content or not isinstance(content.get("config"), dict):
        return None
    stored = flatten(content["config"])
    if not (isinstance(name := stored.get("MODEL.NAME", "lit_s"), str) and (is_lit(name) or is_imported(name))):
        return None
    skipped = ("RUNTIME", "IMPORTS") if is_imported(name) else ("RUNTIME", "IMPORTS", "MODEL.KEYWORDS")
    fields = key_fields()
    stored = {key: value for key, value in stored.items() if not key.startswith(skipped)}
    known = {key: value for key, value in stored.items() if key in fields}
    if unknown := [key for key in stored if key not in known and key not in REPLACED_KEYS]:
        _logger.warning(printable(f"{path}: config: ignoring unknown keys {', '.join(unknown)}", 500))
    layers = [(f"{path}: config", known), *_read_options(opts, shortcuts)]
    try:
        config = _build(layers[:1], training=False)
    except ConfigError as error:
        raise CheckpointError(error.args[0]) from error
    return _build(layers, training=False) if layers[1:] else config


def adopt_keywords(config: Config, run_dir: Path) -> Config:
    """Take MODEL.LIT from a started run or from MODEL.PRETRAINED, if that is the same LIT and this config sets none."""
    source, started = config.MODEL.PRETRAINED, run_dir / "config.yaml"
    if not is_lit(config.MODEL.NAME) or config.MODEL.LIT != Lit():
        return config
    stored = None
    if started.exists() and any(run_dir.glob("*.pth")):  # a start without a checkpoint does not count
        source, stored = str(started), load_config(started, training=False)
    elif source:
        stored = config_from_checkpoint(read_checkpoint(source), source)
    if not stored or stored.MODEL.NAME != config.MODEL.NAME or stored.MODEL.LIT == Lit():
        return config
    _logger.info(f"{source}: taking its MODEL.LIT {stored.MODEL.LIT.model_dump(exclude_none=True)}")
    return config.model_copy(update={"MODEL": config.MODEL.model_copy(update={"LIT": stored.MODEL.LIT})})


def find_run(path: str | Path) -> Path | None:
    """Return the run directory that a file lies in, or None for other files."""
    run_dir = Path(os.path.abspath(path)).parent
    return run_dir if (run_dir / "starts.jsonl").is_file() else None


def _read_yaml(text: str | bytes, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            problem = f"line {error.problem_mark.line + 1}: {error.problem}"
        raise ConfigError(f"{origin}: not YAML: {problem}") from None


def _read_files(path: Path, heirs: tuple[Path, ...] = ()) -> Iterator[Layer]:
    """Yield the files that `path` inherits from, ancestors first, and `path`."""
    name = f"{heirs[-1]}: BASE: {path}" if heirs else str(path)
    if not path.is_file():
        siblings = ", ".join(sorted(file.name for file in path.parent.glob("*.y*ml"))) or "no YAML file"
        raise ConfigError(f"{name}: no such file; {path.parent} holds {siblings}")
    if any(path.samefile(heir) for heir in heirs):
        raise ConfigError(f"{name}: inherits from itself: {' -> '.join(map(str, (*heirs, path)))}; remove one BASE")
    tree = _read_yaml(path.read_bytes(), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections such as DATA and TRAIN at the top level, got {shorten(tree)}")
    bases = tree.pop("BASE", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: BASE: expected a list of YAML files, got {bases!r}")
    for base in filter(None, bases):  # the original writes ['']
        yield from _read_files(path.parent / os.path.expanduser(base), (*heirs, path))
    if is_lit_ti_json(tree):
        yield from _read_files(LIT_TI_CONFIG)
    yield str(path), translate_original(flatten(tree), str(path))


def _read_options(opts: Sequence[str], shortcuts: dict[str, Any]) -> Iterator[Layer]:
    if len(opts) % 2:
        raise ConfigError(f"--opts: {opts[-1]}: has no value; give pairs of KEY VALUE")
    for key, text in zip(opts[::2], opts[1::2]):
        if key == "BASE":
            raise ConfigError("--opts: BASE: works in a file only; write a file that inherits, or override single keys")
        layer = flatten({key: _read_yaml(text, f"--opts: {key}") if text else ""})
        yield "--opts", translate_original(layer, "--opts")
    for name, value in shortcuts.items():
        if value is not None:
            key = next(key for key in key_fields() if key.rpartition(".")[2] == name.upper())
            yield f"--{name.replace('_', '-')}", {key: value}


def _build(layers: Sequence[Layer], training: bool) -> Config:
    """Merge layers, of which later ones win, and validate the result."""
    tree: dict[str, Any] = {}
    for key, value in (item for _, layer in layers for item in layer.items()):
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section[part] = dict(section[part]) if isinstance(section.get(part), dict) else {}
            section = section[part]
        section[name] = value
    modules = tree["IMPORTS"] if isinstance(tree.get("IMPORTS"), list) else []
    import_modules([name for name in modules if isinstance(name, str)])
    config = None
    try:
        config = Config.model_validate(tree)
        problems = [*_model_problems(config), *(_training_problems(config) if training else ())]
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors(include_url=False)]
    if config is None or problems:
        lines = [": ".join(filter(None, (_origin(keys, layers), keys[0], text))) for keys, text in problems]
        raise ConfigError(*dict.fromkeys(lines))
    return config


def _origin(keys: list[str], layers: Sequence[Layer]) -> str:
    """Return the name of the last layer that sets one of the keys, or of the first layer."""
    names = [name for name, layer in layers for k in layer for key in keys if f"{k}.".startswith(f"{key}.")]
    return names[-1] if names else layers[0][0]


def _explain(error: ErrorDetails) -> tuple[list[str], str]:
    """Return the key of a pydantic error and a description of the problem."""
    key, fields = ".".join(part for part in error["loc"] if isinstance(part, str)), key_fields()
    if error["type"] == "extra_forbidden":
        siblings = [name for name in fields if name.rpartition(".")[0] == key.rpartition(".")[0]]
        others = [name for name in fields if not key.startswith(f"{name}.")]
        return [key], REPLACED_KEYS.get(key) or f"unknown key; {_suggest(key, others, siblings)}"
    expected = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    meaning = f" ({fields[key].description})" if key in fields else ""
    value = list(error["input"]) if isinstance(error["input"], tuple) else error["input"]  # YAML has lists
    return [key], f"{expected}, got {shorten(value)}{meaning}"


def _suggest(name: str, names: list[str], choices: list[str]) -> str:
    folded = {name.lower(): name for name in names}
    near = get_close_matches(name.lower(), folded, n=1)
    return f"did you mean {folded[near[0]]}?" if near else f"choose from {', '.join(choices or names)}"


def _model_problems(config: Config) -> Iterator[tuple[list[str], str]]:
    """Check the keys of the model together, by building it without memory."""
    model, lit = config.MODEL, is_lit(config.MODEL.NAME)
    right, wrong = ("LIT", "KEYWORDS") if lit else ("KEYWORDS", "LIT")
    is_set = {"LIT": model.LIT != Lit(), "KEYWORDS": bool(model.KEYWORDS)}
    if not timm.is_model(model.NAME):  # timm would also read a directory or a hub address
        variants = timm.list_models(module="lit")
        yield ["MODEL.NAME"], f"timm knows no model {shorten(model.NAME)}; {_suggest(model.NAME, variants, variants)}"
    elif "pretrained" in model.KEYWORDS:
        yield ["MODEL.KEYWORDS"], "pretrained cannot be set here; name a checkpoint in MODEL.PRETRAINED"
    elif is_set[wrong]:
        yield [f"MODEL.{wrong}"], f"has no effect on {model.NAME}; use MODEL.{right}"
    else:
        try:
            with torch.device("meta"):
                cfg: Any = timm.create_model(**config.model_keywords).pretrained_cfg
            is_fixed = not lit and cfg.get("fixed_input_size") and "img_size" not in model.KEYWORDS
            if is_fixed and cfg["input_size"][1:] != config.DATA.IMG_SIZE:
                fix = f"set MODEL.KEYWORDS {{img_size: {list(config.DATA.IMG_SIZE)}}}, or change DATA.IMG_SIZE"
                problem = "{} takes images of {} x {} pixels".format(model.NAME, *cfg["input_size"][1:])
                yield ["DATA.IMG_SIZE", "MODEL.NAME"], f"{problem}; {fix}"
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            # some timm models cannot be built on the meta device
            if lit or isinstance(error, TypeError) or "pretrained tag" in str(error):
                yield [f"MODEL.{right if is_set[right] else 'NAME'}"], f"makes no model: {str(error).splitlines()[0]}"


def _training_problems(config: Config) -> Iterator[tuple[list[str], str]]:
    """Check what only a training needs."""
    train, aug, model, lit = config.TRAIN, config.AUG, config.MODEL, is_lit(config.MODEL.NAME)
    try:
        timm.data.create_transform(config.DATA.IMG_SIZE, is_training=True, auto_augment=aug.AUTO_AUGMENT or None)
    except (AssertionError, KeyError, ValueError):
        yield ["AUG.AUTO_AUGMENT"], f"timm knows no policy {aug.AUTO_AUGMENT!r}; such as rand-m9-mstd0.5-inc1"
    if model.FREEZE not in (0, "backbone") and not lit:
        yield ["MODEL.FREEZE"], f"{model.NAME} has no stages of LIT; use backbone"
    if model.DROP_RATE and lit:
        yield ["MODEL.DROP_RATE"], "is not implemented for LIT, which is regularized by MODEL.DROP_PATH_RATE"
    optimizers = [str(name) for name in timm.optim.list_optimizers()]
    if train.OPTIMIZER.NAME not in optimizers:
        yield ["TRAIN.OPTIMIZER.NAME"], f"timm has no such optimizer; {_suggest(train.OPTIMIZER.NAME, optimizers, [])}"
    if train.LR_SCHEDULER.NAME == "multistep" and not train.LR_SCHEDULER.MILESTONES:
        yield ["TRAIN.LR_SCHEDULER.MILESTONES"], "multistep needs the epochs of its decays, such as [150, 225]"
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        problem = f"{train.WARMUP_EPOCHS} must be less than TRAIN.EPOCHS, which is {train.EPOCHS}"
        yield ["TRAIN.WARMUP_EPOCHS", "TRAIN.EPOCHS"], problem
    if lit and config.DATA.BATCH_SIZE == 1 and config.DATA.IMG_SIZE == (32, 32) and not aug.mixing:
        yield ["DATA.BATCH_SIZE"], "BatchNorm needs several values, and the last feature map has one pixel; use 2"
    for key, size in {"DATA.BATCH_SIZE": config.DATA.BATCH_SIZE, "TRAIN.GLOBAL_BATCH": train.GLOBAL_BATCH}.items():
        if aug.mixing and size % 2:
            problem = f"mixup and cutmix pair images, but {size} is odd; use {size + 1}"
            yield [key, "AUG.MIXUP", "AUG.CUTMIX", "AUG.CUTMIX_MINMAX"], problem
