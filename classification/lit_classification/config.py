"""Configuration of a run: its keys, with LIT-S's recipe as defaults, and how YAML and --opts are read and checked."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError


class ConfigError(ValueError):
    """A configuration that cannot run; each line names the file or option, the key, the problem and a remedy."""


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise PydanticCustomError("descending", "Input should be [low, high]")
    return pair


SIDES = (32, 2048)  # of an input in pixels; at more, attention's bias alone takes gigabytes for each block
MAX_PARAMETERS = 2 * 10**9

Count = Annotated[int, Field(ge=1, le=10**6)]
Side = Annotated[int, Field(gt=0, multiple_of=SIDES[0], le=SIDES[1])]
Size = Annotated[tuple[Side, Side], BeforeValidator(lambda x: (x, x) if isinstance(x, int) else x), Field(strict=False)]
T = TypeVar("T")
Stages = Annotated[  # one value for each stage, or one for all
    tuple[T, T, T, T], BeforeValidator(lambda x: (x,) * 4 if isinstance(x, (int, float)) else x), Field(strict=False)
]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Decays = Annotated[tuple[Decay, Decay], Field(strict=False)]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ascending), Field(strict=False)]
FractionRange = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending), Field(strict=False)]
Precision = Literal["bf16", "fp16", "off"]
Interpolation = Literal["bicubic", "bilinear", "nearest", "random"]


Free = partial(Field, json_schema_extra={"free": True})  # of a key that changes nothing that is computed


class Section(BaseModel):
    """What every section has in common: no unknown key, no conversion of types ("128" is no integer), no change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    BATCH_SIZE: Count = Field(128, description="images per process in one forward pass")
    DATA_PATH: str = Free("", description="root folder of the data set")
    DATASET: str = Field("", description="a timm create_dataset name; empty = folders train/ and val/")
    IMG_SIZE: Size = Field((224, 224), description="pixels, one integer or [height, width], multiples of 32")
    INTERPOLATION: Interpolation = Field("bicubic", description="how images are resized")
    ON_BAD_IMAGE: Literal["error", "skip"] = Free(
        "error", description="what an unreadable training image does; skip = another one takes its place"
    )
    PIN_MEMORY: bool = Free(True, description="page-locked host memory, for faster copies to a GPU")
    NUM_WORKERS: int = Free(
        8, ge=0, le=1024, description="loader processes per process; 0 = none, load in the process itself"
    )


class Lit(Section):
    """Keywords of LIT's constructor that override those of the variant; what is not set is left out of a dump."""

    embed_dims: Stages[Annotated[int, Field(ge=1, le=4096)]] | None = Field(None, description="channels of each stage")
    depths: Stages[Annotated[int, Field(ge=1, le=64)]] | None = Field(None, description="blocks of each stage")
    num_heads: Stages[Annotated[int, Field(ge=1, le=256)]] | None = Field(None, description="heads, where it attends")
    mlp_ratios: Stages[Annotated[float, Field(gt=0, le=16)]] | None = Field(None, description="hidden width over width")
    attention: Stages[bool] | None = Field(None, description="which of the four stages attend")
    merging: Literal["dtm", "conv", "conv_bn"] | None = Field(None, description="how stages 2 to 4 are entered")
    pos_embed: Literal["relative", "absolute", "none"] | None = Field(None, description="position embedding")
    class_token: bool | None = Field(None, description="whether a class token joins at the last stage")
    global_pool: Literal["avg", "token"] | None = Field(None, description="what the head reads")
    norm_eps: float | None = Field(None, gt=0, le=1, description="epsilon of the LayerNorms in blocks and the last one")
    pad_input: bool | None = Field(None, description="pad the input to a multiple of 4 instead of cutting it")

    @model_serializer(mode="wrap")
    def _set_ones(self, serialize: Callable[[BaseModel], dict[str, Any]]) -> dict[str, Any]:
        return {keyword: value for keyword, value in serialize(self).items() if value is not None}


class Model(Section):
    NAME: str = Field("lit_s", description="a model that timm knows, lit_backbone's included")
    RESUME: str = Free("", description="checkpoint to evaluate, or to continue training from")
    PRETRAINED: str = Free("", description="checkpoint to start from, with its averaged weights where it has them")
    NUM_CLASSES: int = Field(1000, ge=1, le=10**5, description="outputs of the head")
    DROP_RATE: float = Field(0.0, ge=0, lt=1, description="dropout, probability")
    DROP_PATH_RATE: float = Field(0.2, ge=0, lt=1, description="stochastic depth of the last block, probability")
    LABEL_SMOOTHING: float = Field(0.1, ge=0, lt=1, description="share of the target spread over all classes")
    OFFSET_LR_MULTI: float = Field(0.01, ge=0, description="factor on the base rate of DTM's offset convolutions")
    LIT: Lit = Field(Lit(), description="keywords of LIT's constructor to override")


class LRScheduler(Section):
    NAME: Literal["cosine"] = Field("cosine", description="shape after the warm-up")
    STEP: Literal["update", "epoch"] = Field("update", description="how often the rate changes")
    SCALE_BOUNDS: bool = Field(True, description="scale WARMUP_LR and MIN_LR by GLOBAL_BATCH / 512, as BASE_LR is")


class Optimizer(Section):
    NAME: Literal["adamw"] = Field("adamw", description="update rule")
    EPS: float = Field(1e-8, gt=0, description="term added to the denominator")
    BETAS: Decays = Field((0.9, 0.999), description="decays of the moving averages of gradient and square")


class Train(Section):
    EPOCHS: Count = Field(300, description="length of the training, epochs, warm-up included")
    GLOBAL_BATCH: Count = Field(1024, description="images per update, over processes and accumulation steps")
    WARMUP_EPOCHS: int = Field(20, ge=0, description="linear warm-up, epochs")
    WEIGHT_DECAY: float = Field(0.05, ge=0, description="AdamW's decoupled weight decay")
    BASE_LR: float = Field(5e-4, gt=0, description="peak learning rate per 512 images of GLOBAL_BATCH")
    WARMUP_LR: float = Field(5e-7, ge=0, description="learning rate that the warm-up starts from (see SCALE_BOUNDS)")
    MIN_LR: float = Field(5e-6, ge=0, description="learning rate that the schedule ends at (see SCALE_BOUNDS)")
    CLIP_GRAD: Positive | None = Field(5.0, description="largest gradient norm of an update; null = no clipping")
    AUTO_RESUME: bool = Free(True, description="continue from the latest checkpoint of the output folder")
    RESUME_CHANGED: bool = Free(False, description="continue though settings, classes or files are not the same")
    USE_CHECKPOINT: bool = Free(False, description="recompute the blocks' activations in backward, to save memory")
    SAVE_STEPS: int = Free(0, ge=0, description="updates between saves of the latest checkpoint; 0 = epochs only")
    EMA: float = Field(0.0, ge=0, lt=1, description="decay of the moving average of the weights, per update; 0 = off")
    LR_SCHEDULER: LRScheduler = Field(LRScheduler(), description="how the learning rate moves")
    OPTIMIZER: Optimizer = Field(Optimizer(), description="how the weights move")


class Aug(Section):
    COLOR_JITTER: float = Field(0.4, ge=0, description="strength of colour jitter, where AUTO_AUGMENT is off")
    AUTO_AUGMENT: str = Field(
        "rand-m9-mstd0.5-inc1",
        pattern=r"^((rand|augmix|original|originalr|v0|v0r|3a)(-.*)?)?$",
        description='a timm policy, e.g. rand-m9-mstd0.5-inc1; "" = off',
    )
    REPROB: float = Field(0.25, ge=0, le=1, description="random erasing, probability")
    REMODE: Literal["pixel", "rand", "const"] = Field("pixel", description="erase to noise, a colour or the mean")
    RECOUNT: int = Field(1, ge=1, le=100, description="areas to erase, at most")
    REPEATED: int = Field(1, ge=1, le=100, description="augmented copies of an image in an epoch's order; 1 = off")
    MIXUP: float = Field(0.8, ge=0, description="mixup's alpha; 0 = off")
    CUTMIX: float = Field(1.0, ge=0, description="cutmix's alpha; 0 = off")
    CUTMIX_MINMAX: FractionRange | None = Field(None, description="[low, high] side of cutmix's box, share of IMG_SIZE")
    MIXUP_PROB: float = Field(1.0, ge=0, le=1, description="mixup or cutmix, probability")
    MIXUP_SWITCH_PROB: float = Field(0.5, ge=0, le=1, description="cutmix where both are on, probability")
    MIXUP_MODE: Literal["batch", "pair", "elem"] = Field("batch", description="what shares one draw")
    HFLIP: float = Field(0.5, ge=0, le=1, description="horizontal flip, probability")
    SCALE: FractionRange = Field((0.08, 1.0), description="[low, high] area of the random crop, share of the image")
    RATIO: PositiveRange = Field((3 / 4, 4 / 3), description="[low, high] width / height of the random crop")

    @property
    def mixing(self) -> bool:
        """Whether batches go through timm's Mixup."""
        return self.MIXUP > 0 or self.CUTMIX > 0 or self.CUTMIX_MINMAX is not None


class Test(Section):
    CROP: bool = Field(True, description="resize to IMG_SIZE * 256 / 224, crop the centre; false = resize only")
    AMP_DTYPE: Precision = Field("off", description="autocast in evaluation; off = float32")


class Runtime(Section):
    DEVICE: Literal["auto", "cpu", "cuda"] = Free("auto", description="where to run; auto = a GPU if there is one")
    AMP_DTYPE: Precision = Field("bf16", description="autocast in training; off = float32")
    COMPILE: bool = Free(False, description="run the model through torch.compile")
    CHANNELS_LAST: bool = Free(False, description="keep images channels-last in memory")
    TIMEOUT: float = Free(30.0, gt=0, description="minutes after which waiting for other processes or for data fails")


class Config(Section):
    """A run's configuration. A key keeps the name it has in YAML: `config.TRAIN.EPOCHS`."""

    BASE: tuple[str, ...] = Free(
        (), strict=False, max_length=100, description="YAML files to inherit from, the last wins; relative to this file"
    )
    DATA: Data = Field(Data(), description="images")
    MODEL: Model = Field(Model(), description="network and loss")
    TRAIN: Train = Field(Train(), description="schedule and optimiser")
    AUG: Aug = Field(Aug(), description="augmentation")
    TEST: Test = Field(Test(), description="evaluation")
    RUNTIME: Runtime = Field(Runtime(), description="device and precision")
    OUTPUT: str = Free("output", description="folder of all runs")
    TAG: str = Free(
        "default",
        pattern=r"^([^./\\\x00][^/\\\x00]*)?$",
        max_length=100,
        description="name of the run, a folder within OUTPUT; holds no / and begins with no dot",
    )
    SAVE_FREQ: int = Free(1, ge=1, description="epochs between checkpoints")
    PRINT_FREQ: int = Free(10, ge=1, description="updates between log lines")
    SEED: int = Field(0, ge=0, lt=2**63, description="seed of all randomness")

    @property
    def learning_rates(self) -> tuple[float, float, float]:
        """Peak rate, warm-up start and floor at this global batch; the offsets' group multiplies only the first."""
        scale = self.TRAIN.GLOBAL_BATCH / 512
        bounds = scale if self.TRAIN.LR_SCHEDULER.SCALE_BOUNDS else 1.0
        return self.TRAIN.BASE_LR * scale, self.TRAIN.WARMUP_LR * bounds, self.TRAIN.MIN_LR * bounds

    @property
    def model_keywords(self) -> dict[str, Any]:
        """What `timm.create_model` makes the model of, its name included."""
        from timm.models import is_model_in_modules

        model = self.MODEL
        keywords = dict(num_classes=model.NUM_CLASSES, drop_rate=model.DROP_RATE, drop_path_rate=model.DROP_PATH_RATE)
        if is_model_in_modules(model.NAME, ["lit"]):
            keywords |= dict(img_size=self.DATA.IMG_SIZE) | model.LIT.model_dump()
        return {"model_name": model.NAME} | keywords


_ODD = "mixup and cutmix pair images, but {} is odd; use {}, or switch both off"
_ELSEWHERE = {  # keys of the original that are gone, and LIT keywords that have a key of their own
    "AMP_OPT_LEVEL": "is now RUNTIME.AMP_DTYPE: bf16, fp16 or off",
    "EVAL_MODE": "is now the flag --eval",
    "THROUGHPUT_MODE": "is now the flag --throughput",
    "LOCAL_RANK": "is set by torchrun; delete the key",
    "DATA.CACHE_MODE": "is gone; the operating system caches what is read, delete the key",
    "DATA.ZIP_MODE": "is gone; use image folders, or a timm data set in DATA.DATASET",
    "MODEL.TYPE": "is gone; MODEL.NAME alone chooses the model",
    "MODEL.LIT.device": "is set by RUNTIME.DEVICE",
    "MODEL.LIT.dtype": "is set by RUNTIME.AMP_DTYPE",
    "MODEL.LIT.in_chans": "cannot be set; images are read as RGB",
    "MODEL.LIT.drop_path_rate": "is set by MODEL.DROP_PATH_RATE",
    "MODEL.LIT.drop_rate": "is set by MODEL.DROP_RATE",
    "MODEL.LIT.img_size": "is set by DATA.IMG_SIZE",
    "MODEL.LIT.num_classes": "is set by MODEL.NUM_CLASSES",
    "TRAIN.ACCUMULATION_STEPS": "is gone; TRAIN.GLOBAL_BATCH states the batch and the steps follow from it",
    "TRAIN.START_EPOCH": "is gone; a resumed checkpoint knows its epoch, delete the key",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": "is gone; the schedule is a cosine, delete the key",
    "TRAIN.LR_SCHEDULER.DECAY_RATE": "is gone; the schedule is a cosine, delete the key",
    "TRAIN.OPTIMIZER.MOMENTUM": "is gone; AdamW's is the first of TRAIN.OPTIMIZER.BETAS",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars, where 1e-3 is a number and `off` is text (in YAML 1.1, pyyaml's default, neither is).

    Aliases are refused: with them, a small file can be endless or of any size.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent: yaml.Node, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"*{event.anchor} is an alias; write out what it stands for"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping, seen = super().construct_mapping(node, deep), set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)",
}.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)


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
        problems = [*_impossible(config), *(_untrainable(config) if training else ())]
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors(include_url=False)[:100]]
    if problems:
        from lit_backbone.text import printable

        lines = [printable(": ".join(filter(None, (origin(keys), keys[0], text)))) for keys, text in problems]
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return config


def dump(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, default_flow_style=None, sort_keys=False, width=120)


def settings(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted key, the settings in a dumped configuration on which its results depend."""
    found, fields = {}, _fields()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            found |= settings(value, f"{key}.")
        elif key not in fields or not fields[key].json_schema_extra:
            found[key] = value
    return found


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of whatever is not the same in both; None where a key is missing."""
    return [(key, old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)]


def accumulation_steps(config: Config, world_size: int) -> int:
    """How many batches of each of `world_size` processes make up TRAIN.GLOBAL_BATCH."""
    batch, total = config.DATA.BATCH_SIZE, config.TRAIN.GLOBAL_BATCH
    if config.AUG.mixing and batch % 2:  # checked here, as evaluation and timing may use any batch
        raise ConfigError(f"DATA.BATCH_SIZE: {_ODD.format(batch, batch + 1)}")
    if total % (batch * world_size) == 0:
        return total // (batch * world_size)
    step = 2 if config.AUG.mixing else 1  # mixup pairs images
    processes = next(n for n in range(world_size, 0, -1) if total % (n * step) == 0)
    share = total // processes
    size = next(n for n in range(min(batch, share), 0, -1) if share % n == 0 and n % step == 0)
    problem = f"{batch} images on each of {world_size} processes do not divide TRAIN.GLOBAL_BATCH {total}"
    remedy = f"--batch-size {size}" + (f" on {processes} processes" if processes < world_size else "")
    raise ConfigError(f"DATA.BATCH_SIZE: {problem}; use {remedy}")


def _parse(text: str | bytes, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the latter: a number too long, lists too deep
        mark = getattr(error, "problem_mark", None)
        problem = f"line {mark.line + 1}: {error.problem}" if mark else " ".join(str(error).split())
        raise ConfigError(f"{origin}: not YAML: {problem}") from None


def _files(path: Path, heirs: tuple[Path, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Yield (name, mapping) of every file that `path` inherits from, ancestors first, and of `path`."""
    wanted = f"{heirs[-1]}: BASE: {path}" if heirs else path
    if not path.is_file():
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
        yield from _files(path.parent / base, (*heirs, path))
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
            key = next(key for key in _fields() if key.split(".")[-1] == name.upper())
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


def _fields(section: type[Section] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """All keys and sections by dotted name."""
    fields = {}
    for name, field in section.model_fields.items():
        fields[prefix + name] = field
        if isinstance(field.default, Section):
            fields |= _fields(type(field.default), f"{prefix}{name}.")
    return fields


_WORDING = {
    "bool_type": "expected true or false",
    "dict_type": "expected a section of keys",
    "model_type": "expected a section of keys",
    "string_type": "expected text, in quotes if it looks like something else",
    "string_pattern_mismatch": "expected other text",
    "tuple_type": "expected a list",
    "missing": "expected more values",
    "too_long": "expected fewer values",
}


def _explain(error: ErrorDetails) -> tuple[list[str], str]:
    """Key and problem of one of pydantic's errors."""
    key, fields = ".".join(part for part in error["loc"] if isinstance(part, str)), _fields()
    if error["type"] == "extra_forbidden":
        valid = [name for name in fields if not key.startswith(f"{name}.")]
        siblings = [name for name in valid if name.rpartition(".")[0] == key.rpartition(".")[0]]
        return [key], _ELSEWHERE.get(key) or f"unknown key; {_nearest(key, valid, siblings)}"
    expected = _WORDING.get(error["type"]) or error["msg"].replace("Input should be", "expected")
    meaning = f" ({fields[key].description})" if key in fields else ""
    return [key], f"{expected}, got {shortened(error['input'])}{meaning}"


def _nearest(name: str, valid: Iterable[str], choices: Iterable[str] = ()) -> str:
    """A remedy for a name that is not valid: the nearest one that is, else all choices."""
    folded = {known.lower(): known for known in valid}
    near = get_close_matches(name.lower(), folded, n=1)
    return f"did you mean {folded[near[0]]}?" if near else f"choose from {', '.join(choices or valid)}"


def _impossible(config: Config) -> Iterator[tuple[list[str], str]]:
    """Keys and problem of what each key's own declaration allows but the rest of the program does not."""
    import timm  # here, because naming and reading keys needs neither torch nor the models
    import torch

    import lit_backbone  # noqa: F401, registers the models

    model = config.MODEL
    is_lit = timm.models.is_model_in_modules(model.NAME, ["lit"])
    if not timm.is_model(model.NAME):  # nor an address or a folder, which timm would read
        nearest = _nearest(model.NAME, timm.list_models(module="lit"))
        yield ["MODEL.NAME"], f"timm knows no model {shortened(model.NAME)}; {nearest}"
    elif model.LIT != Lit() and not is_lit:
        yield ["MODEL.LIT"], f"has no meaning for {model.NAME}, which is no LIT; delete it"
    else:
        key, size = "MODEL.LIT" if model.LIT != Lit() else "MODEL.NAME", 0
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in timm.create_model(**config.model_keywords).parameters())
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            if is_lit or isinstance(error, TypeError):  # others may be made of real tensors only
                yield [key], f"makes no model: {str(error).splitlines()[0]}"
        if size > MAX_PARAMETERS:
            yield [key], f"makes a model of {size:.1e} parameters; at most {MAX_PARAMETERS:.0e} are allowed"


def _untrainable(config: Config) -> Iterator[tuple[list[str], str]]:
    """As :func:`_impossible`, of what training alone does not allow."""
    import timm

    from lit_backbone.lit import ARCHS

    data, train, aug = config.DATA, config.TRAIN, config.AUG
    try:
        timm.data.create_transform(data.IMG_SIZE, is_training=True, auto_augment=aug.AUTO_AUGMENT or None)
    except (AssertionError, KeyError, ValueError):
        yield ["AUG.AUTO_AUGMENT"], f"timm knows no policy {aug.AUTO_AUGMENT!r}; such as rand-m9-mstd0.5-inc1"
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        problem = f"{train.WARMUP_EPOCHS} must be less than TRAIN.EPOCHS, which is {train.EPOCHS}"
        yield ["TRAIN.WARMUP_EPOCHS", "TRAIN.EPOCHS"], problem
    if aug.mixing and train.GLOBAL_BATCH % 2:
        keys = ["TRAIN.GLOBAL_BATCH", "AUG.MIXUP", "AUG.CUTMIX", "AUG.CUTMIX_MINMAX"]
        yield keys, _ODD.format(train.GLOBAL_BATCH, train.GLOBAL_BATCH + 1)
    arch = ARCHS.get(config.MODEL.NAME.partition(".")[0], {"merging": "conv"}) | config.MODEL.LIT.model_dump()
    if data.BATCH_SIZE == 1 and max(data.IMG_SIZE) == SIDES[0] and arch.get("merging") != "conv":
        problem = f"BatchNorm has nothing to average over in one image of {SIDES[0]} pixels, of which one token is left"
        yield ["DATA.BATCH_SIZE", "DATA.IMG_SIZE"], f"{problem}; use 2 or more, or raise DATA.IMG_SIZE"
    low, high = aug.CUTMIX_MINMAX or (0, 1)
    if any(int(side * low) == int(side * high) for side in data.IMG_SIZE):
        problem = f"[{low}, {high}] leaves no box to draw in an image of {min(data.IMG_SIZE)} pixels; widen the range"
        yield ["AUG.CUTMIX_MINMAX", "DATA.IMG_SIZE"], problem
