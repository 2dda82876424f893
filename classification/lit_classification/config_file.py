"""Reading a run's configuration from YAML files, options and checkpoints, and saying what is wrong with it."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent

from lit_classification.config import MIXING_ODD, Config, ConfigError, Lit, key_fields

MAX_PARAMETERS = 2 * 10**9
MAX_DEPTH = 20  # of lists and sections in each other
RESERVED_KEYWORDS = {  # of timm.create_model, beside those that other keys set
    *("cache_dir", "checkpoint_path", "features_only", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("drop_path_rate", "drop_rate", "in_chans", "model_name", "num_classes"),
}
RENAMED_KEYS = {  # keys of the original that are gone, and a keyword of LIT unlike the key that sets it
    "AMP_OPT_LEVEL": "is now RUNTIME.AMP_DTYPE: bf16, fp16 or off",
    "EVAL_MODE": "is now the flag --eval",
    "THROUGHPUT_MODE": "is now the flag --throughput",
    "LOCAL_RANK": "is set by torchrun; delete the key",
    "DATA.CACHE_MODE": "is gone; the operating system caches what is read, delete the key",
    "DATA.ZIP_MODE": "is gone; use image folders, or a timm data set in DATA.DATASET",
    "MODEL.TYPE": "is gone; MODEL.NAME alone chooses the model",
    "MODEL.LIT.img_size": "is set by DATA.IMG_SIZE",
    "TRAIN.ACCUMULATION_STEPS": "is gone; TRAIN.GLOBAL_BATCH states the batch and the steps follow from it",
    "TRAIN.START_EPOCH": "is gone; a resumed checkpoint knows its epoch, delete the key",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": "is gone; the schedule is a cosine, delete the key",
    "TRAIN.LR_SCHEDULER.DECAY_RATE": "is gone; the schedule is a cosine, delete the key",
    "TRAIN.OPTIMIZER.MOMENTUM": "is gone; AdamW's is the first of TRAIN.OPTIMIZER.BETAS",
}


def locate_run(cfg: str) -> tuple[str, list[str]]:
    """Name of the run that a file configures, and options that come before the command's.

    The `config.yaml` that a run has left continues this run, wherever it lies. A relative DATA_PATH in it counts from
    the command's folder, as in any file.
    """
    folder = Path(os.path.abspath(cfg)).parent
    if Path(cfg).name != "config.yaml" or not (folder / "starts.jsonl").is_file():
        return Path(cfg).stem, []
    own = {"OUTPUT": str(folder.parent.parent), "TAG": folder.name, "TRAIN.AUTO_RESUME": True}
    own["TRAIN.RESUME_CHANGED"] = False  # was said of one start
    options = [text for key, value in own.items() for text in (key, json.dumps(value, ensure_ascii=False))]
    return folder.parent.name, options


def load_config(
    path: str | Path,
    opts: Sequence[str] = (),
    *,
    checkpoint: tuple[str, dict] | None = None,
    training: bool = True,
    **shortcuts: Any,
) -> Config:
    """Read a YAML file and what it inherits, override keys by `opts` (KEY VALUE ...) and `shortcuts`, check the result.

    Args:
        path: of the YAML file.
        opts: keys and values in turn.
        checkpoint: a file and settings from it, which count over those of the YAML files.
        training: whether to check what only a training needs.
        shortcuts: by the last part of a key in lower case, such as batch_size; None leaves the key as it is.
    """
    tree, origins = {}, []
    layers = list(_files(Path(path)))
    if checkpoint:
        unset = {"MODEL": {"LIT": dict.fromkeys(Lit.model_fields)}}  # its keywords replace all others
        layers += [(checkpoint[0], unset), checkpoint]
    for origin, layer in (*layers, *_options(opts), *_shortcuts(shortcuts)):
        _merge(tree, layer, origin, origins)
    return checked(tree, training, lambda keys: next((o for key, o in reversed(origins) if key in keys), str(path)))


def checked(tree: dict[str, Any], training: bool, origin: Callable[[Sequence[str]], str]) -> Config:
    """The configuration that nested settings make, wherever they come from.

    Args:
        tree: plain data of any structure.
        training: whether to check what only a training needs.
        origin: names the place that the first of some keys was set in.

    Raises:
        ConfigError: a key, value or combination of them that cannot run.
    """
    try:
        config = Config.model_validate(tree)
        problems = [*_model_errors(config), *(_training_errors(config) if training else ())]
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors(include_url=False)[:100]]
    if problems:
        lines = [": ".join(filter(None, (origin(keys), keys[0], text))) for keys, text in problems]
        raise ConfigError(*dict.fromkeys(lines))
    return config


def dump(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back."""
    text, yaml = StringIO(), _yaml()
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = None, False, 120
    yaml.dump(config.model_dump(mode="json"), text)
    return text.getvalue()


def _yaml() -> YAML:
    """A reader or writer of YAML 1.2, in which 1e-3 is a number and `off` is text; it constructs plain data only."""
    return YAML(typ="safe", pure=True)


def _parse(text: str | bytes, origin: str) -> Any:
    try:
        _refuse_bombs(text)
        return _yaml().load(text)
    except (YAMLError, ValueError) as error:  # the latter: a number too long
        mark = getattr(error, "problem_mark", None)
        problem = f"line {mark.line + 1}: {error.problem}" if mark else " ".join(str(error).split())
        raise ConfigError(f"{origin}: not YAML: {problem:.300}") from None


def _refuse_bombs(text: str | bytes) -> None:
    """Raise YAMLError for what makes a small file endless, of any size, or slow to read."""
    depth = 0
    for event in _yaml().parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if isinstance(event, AliasEvent):
            problem = f"*{event.anchor} is an alias; write out what it stands for"
            raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if depth > MAX_DEPTH:
            raise MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels deep", problem_mark=event.start_mark)


def _files(path: Path, heirs: tuple[Path, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Yield (name, mapping) of every file that `path` inherits from, ancestors first, and of `path`."""
    wanted = f"{heirs[-1]}: BASE: {path}" if heirs else path
    if not os.path.isfile(path):  # nor a name that no file can have
        beside = ", ".join(sorted(file.name for file in path.parent.glob("*.y*ml"))) or "no YAML file"
        raise ConfigError(f"{wanted}: no such file; {path.parent} holds {beside}")
    if any(path.samefile(heir) for heir in heirs):
        raise ConfigError(f"{wanted}: inherits from itself: {' -> '.join(map(str, (*heirs, path)))}; remove one BASE")
    mapping = _parse(path.read_bytes(), str(path))
    if not isinstance(mapping, dict):
        found = "an empty file" if mapping is None else type(mapping).__name__
        raise ConfigError(f"{path}: expected sections such as DATA and TRAIN at the top level, got {found}")
    bases = mapping.pop("BASE", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: BASE: expected a list of YAML files, got {bases!r}")
    for base in bases:
        yield from _files(path.parent / os.path.expanduser(base), (*heirs, path))
    yield str(path), mapping


def _options(opts: Sequence[str]) -> Iterator[tuple[str, dict]]:
    if len(opts) % 2:
        raise ConfigError(f"--opts: {opts[-1]}: has no value; give pairs of KEY VALUE")
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        if key == "BASE":
            raise ConfigError("--opts: BASE: works in a file only; write one that inherits, or override single keys")
        yield "--opts", _nest(key, _parse(text, f"--opts: {key}") if text else "")


def _shortcuts(values: dict[str, Any]) -> Iterator[tuple[str, dict]]:
    for name, value in values.items():
        if value is not None:
            key = next(key for key in key_fields() if key.split(".")[-1] == name.upper())
            yield f"--{name.replace('_', '-')}", _nest(key, value)


def _nest(dotted: str, value: Any) -> dict:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _merge(tree: dict, layer: dict, origin: str, origins: list[tuple[str, str]], prefix: str = "") -> None:
    """Lay `layer` over `tree`, noting in `origins` which dotted key it sets."""
    for key, value in layer.items():
        name = str(key)
        origins.append((prefix + name, origin))
        if isinstance(value, dict):
            tree[name] = tree[name] if isinstance(tree.get(name), dict) else {}
            _merge(tree[name], value, origin, origins, f"{prefix}{name}.")
        else:
            tree[name] = value


def _explain(error: ErrorDetails) -> tuple[list[str], str]:
    """Key and problem of one of pydantic's errors."""
    key, fields = ".".join(part for part in error["loc"] if isinstance(part, str)), key_fields()
    if error["type"] == "extra_forbidden":
        valid = [name for name in fields if not key.startswith(f"{name}.")]
        siblings = [name for name in valid if name.rpartition(".")[0] == key.rpartition(".")[0]]
        return [key], RENAMED_KEYS.get(key) or f"unknown key; {_nearest(key, valid, siblings)}"
    expected = error["msg"].replace("Input should be", "expected")
    meaning = f" ({fields[key].description})" if key in fields else ""
    return [key], f"{expected}, got {_shown(error['input'])}{meaning}"


def _shown(value: Any) -> str:
    try:
        return shortened(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        return "a number of thousands of digits"


def _nearest(name: str, valid: Iterable[str], choices: Iterable[str] = ()) -> str:
    """A remedy for a name that is not valid: the nearest one that is, else all choices."""
    folded = {known.lower(): known for known in valid}
    near = get_close_matches(name.lower(), folded, n=1)
    return f"did you mean {folded[near[0]]}?" if near else f"choose from {', '.join(choices or valid)}"


def _model_errors(config: Config) -> Iterator[tuple[list[str], str]]:
    """Keys and problem where the keys of the model, each valid by itself, make none, or too large a one."""
    import timm  # here, because naming and reading keys needs neither torch nor the models
    import torch

    import lit_backbone  # noqa: F401, registers the models

    model = config.MODEL
    is_lit = timm.models.is_model_in_modules(model.NAME, ["lit"])
    keys = [key for key, is_set in {"LIT": model.LIT != Lit(), "KEYWORDS": model.KEYWORDS}.items() if is_set]
    own, other = ("LIT", "KEYWORDS") if is_lit else ("KEYWORDS", "LIT")
    if not timm.is_model(model.NAME):  # nor an address or a folder, which timm would read
        nearest = _nearest(model.NAME, timm.list_models(module="lit"))
        yield ["MODEL.NAME"], f"timm knows no model {shortened(model.NAME)}; {nearest}"
    elif other in keys:
        yield [f"MODEL.{other}"], f"has no meaning for {model.NAME}; give its keywords by MODEL.{own}"
    elif reserved := sorted(RESERVED_KEYWORDS & model.KEYWORDS.keys()):
        yield [f"MODEL.KEYWORDS.{reserved[0]}"], "cannot be set here; see the other keys of MODEL"
    else:
        key, size = f"MODEL.{(*keys, 'NAME')[0]}", 0
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in timm.create_model(**config.model_keywords).parameters())
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            # some of timm's are made of real tensors only
            if is_lit or isinstance(error, TypeError) or "pretrained tag" in str(error):
                yield [key], f"makes no model: {str(error).splitlines()[0]}"
        if size > MAX_PARAMETERS:
            yield [key], f"makes a model of {size:.1e} parameters; at most {MAX_PARAMETERS:.0e} are allowed"


def _training_errors(config: Config) -> Iterator[tuple[list[str], str]]:
    """Keys and problem of what training alone does not allow."""
    import timm

    train, aug = config.TRAIN, config.AUG
    try:
        timm.data.create_transform(config.DATA.IMG_SIZE, is_training=True, auto_augment=aug.AUTO_AUGMENT or None)
    except (AssertionError, KeyError, ValueError):
        yield ["AUG.AUTO_AUGMENT"], f"timm knows no policy {aug.AUTO_AUGMENT!r}; such as rand-m9-mstd0.5-inc1"
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        problem = f"{train.WARMUP_EPOCHS} must be less than TRAIN.EPOCHS, which is {train.EPOCHS}"
        yield ["TRAIN.WARMUP_EPOCHS", "TRAIN.EPOCHS"], problem
    if aug.mixing and train.GLOBAL_BATCH % 2:
        keys = ["TRAIN.GLOBAL_BATCH", "AUG.MIXUP", "AUG.CUTMIX", "AUG.CUTMIX_MINMAX"]
        yield keys, MIXING_ODD.format(train.GLOBAL_BATCH, train.GLOBAL_BATCH + 1)
