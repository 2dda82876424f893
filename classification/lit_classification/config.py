"""Configuration of a run: every YAML key with its default, which is the recipe of LIT-S."""

import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo
from timm.models import is_model, is_model_in_modules, model_entrypoint

from lit_backbone.images import DataError
from lit_backbone.safe_reader import CheckpointError, printable


class ConfigError(ValueError):
    """An invalid config. Each argument is one line that names the file or option, the key and the problem."""

    def __str__(self) -> str:
        return "\n".join(map(printable, self.args))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with the message of an error in the user's files or settings. Other exceptions propagate."""
    try:
        yield
    except (CheckpointError, ConfigError, DataError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("Input should be [low, high]")
    return pair


T = TypeVar("T")
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(gt=0, multiple_of=32, le=2048)]  # at 2048, stage 3 attends over 16,384 tokens
Size = Annotated[tuple[Side, Side], BeforeValidator(lambda x: (x, x) if isinstance(x, int) else x)]
_repeat = BeforeValidator(lambda x: (x,) * 4 if isinstance(x, (int, float)) else x)
FourStages = tuple[T, T, T, T]  # one value per stage
Stages = Annotated[FourStages[T], _repeat]  # one value per stage, or one for all
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Decays = tuple[Decay, Decay]
PositiveRange = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
FractionRange = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]
Precision = Literal["auto", "bf16", "fp16", "off"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Shape = Literal["cosine", "linear", "step", "multistep", "poly", "constant"]
Freeze = Annotated[int, Field(ge=0, le=4)] | Literal["backbone"]
Interpolation = Literal["bicubic", "bilinear", "nearest", "random"]
RuntimeField = partial(Field, json_schema_extra={"runtime": True})  # a key that does not affect results


class Section(BaseModel):
    """Base class of all sections: unknown keys are errors, types are not coerced, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, value: Any) -> Any:
        """Convert lists of YAML to tuples, and expand the home directory."""
        if isinstance(value, str) and value.startswith("~/"):
            return os.path.expanduser(value)
        return tuple(value) if isinstance(value, list) else value


class Data(Section):
    BATCH_SIZE: Count = Field(128, description="images per rank in one forward pass")
    DATA_PATH: str = RuntimeField("", description="root directory of the dataset")
    DATASET: str = Field(
        "", pattern="^(|imagenet|(torch|hfds)/.+)$", description="torch/NAME, hfds/NAME; empty = folders"
    )
    TRAIN_SPLIT: str = Field("train", description="folder in DATA_PATH, or split of DATASET, to train on")
    VAL_SPLIT: str = Field("val", description="folder in DATA_PATH, or split of DATASET, to evaluate on")
    IMG_SIZE: Size = Field((224, 224), description="pixels, one integer or [height, width], multiples of 32")
    INTERPOLATION: Interpolation = Field("bicubic", description="how images are resized")
    PIN_MEMORY: bool = RuntimeField(True, description="page-locked host memory, for faster copies to a GPU")
    NUM_WORKERS: int = RuntimeField(8, ge=0, description="DataLoader workers per rank; 0 = load in the main process")


class Lit(Section):
    """Keywords of LIT's constructor that override those of the variant. Bounds limit what a checkpoint can ask for."""

    embed_dims: FourStages[Annotated[int, Field(ge=1, le=4096)]] | None = Field(None, description="channels per stage")
    depths: FourStages[Annotated[int, Field(ge=1, le=64)]] | None = Field(None, description="blocks per stage")
    num_heads: Stages[Annotated[int, Field(ge=1, le=256)]] | None = Field(None, description="attention heads per stage")
    mlp_ratios: Stages[Annotated[float, Field(gt=0, le=16)]] | None = Field(None, description="hidden width / width")
    attention: Stages[bool] | None = Field(None, description="which of the four stages have attention")
    sr_ratios: Stages[Annotated[int, Field(ge=1, le=64)]] | None = Field(None, description="PVT's reduction of keys")
    merging: str | None = Field(None, description="of stages 2 to 4: dtm, conv, conv_bn, swin or a custom one")
    pos_embed: Literal["relative", "absolute", "none"] | None = Field(None, description="position embedding")
    class_token: bool | None = Field(None, description="add a class token in the last stage")
    global_pool: Literal["avg", "token"] | None = Field(None, description="what the head reads")
    norm_eps: float | None = Field(None, gt=0, le=1, description="epsilon of the LayerNorms in blocks and the last one")
    pad_input: bool | None = Field(None, description="pad the input to a multiple of 4 instead of cropping it")


class Model(Section):
    NAME: str = Field("lit_s", description="any timm model, including those of lit_backbone")
    RESUME: str = RuntimeField("", description="checkpoint to evaluate, or to continue training from")
    PRETRAINED: str = RuntimeField("", description="checkpoint to start from; its EMA weights if it has any")
    PRETRAINED_PARTIAL: bool = Field(False, description="load what fits by name and shape, list the rest")
    FREEZE: Freeze = Field(0, description="number of stages to freeze, or backbone = all but the head")
    FREEZE_BN: bool = Field(False, description="keep the running statistics of BatchNorm")
    NUM_CLASSES: int = Field(1000, ge=1, le=10**5, description="outputs of the head")
    DROP_RATE: float = Field(0.0, ge=0, lt=1, description="dropout of other timm models, probability; not for LIT")
    DROP_PATH_RATE: float = Field(0.2, ge=0, lt=1, description="stochastic depth of the last block, probability")
    LABEL_SMOOTHING: float = Field(0.1, ge=0, lt=1, description="share of the target spread over all classes")
    OFFSET_LR_MULTI: Positive = Field(0.01, description="factor on BASE_LR (only) for DTM's offset convolutions")
    LIT: Lit = Field(Lit(), description="keywords of LIT's constructor to override")
    KEYWORDS: dict[str, Any] = Field({}, description="keywords of another timm model's constructor")


class LRScheduler(Section):
    NAME: Shape = Field("cosine", description="shape after the warm-up")
    STEP: Literal["update", "epoch"] = Field("update", description="how often the learning rate changes")
    SCALE_BOUNDS: bool = Field(True, description="scale WARMUP_LR and MIN_LR by GLOBAL_BATCH / 512, like BASE_LR")
    DECAY_EPOCHS: Count = Field(30, description="step: epochs between two decays")
    DECAY_RATE: Fraction = Field(0.1, description="step, multistep: factor of each decay")
    MILESTONES: tuple[Count, ...] = Field((), description="multistep: epochs of the decays")
    POWER: Positive = Field(0.9, description="poly: exponent")


class Optimizer(Section):
    NAME: str = Field("adamw", description="one of timm.optim.list_optimizers()")
    EPS: Positive | None = Field(None, description="added to the denominator; null = the optimizer's default, 1e-8")
    BETAS: Decays | None = Field(None, description="decay rates of averages; null = the optimizer's, 0.9 and 0.999")
    MOMENTUM: Decay | None = Field(None, description="momentum, in optimizers that have it; null = 0.9")
    KEYWORDS: dict[str, Any] = Field({}, description="further keywords of the optimizer")


class Train(Section):
    EPOCHS: Count = Field(300, description="number of epochs, warm-up included")
    GLOBAL_BATCH: Count = Field(1024, description="images per optimizer step, over all ranks and accumulation steps")
    WARMUP_EPOCHS: int = Field(20, ge=0, description="epochs of linear warm-up")
    WEIGHT_DECAY: float = Field(0.05, ge=0, description="AdamW's decoupled weight decay")
    BASE_LR: float = Field(5e-4, gt=0, description="peak learning rate per 512 images of GLOBAL_BATCH")
    WARMUP_LR: float = Field(5e-7, ge=0, description="learning rate at the start of the warm-up (see SCALE_BOUNDS)")
    MIN_LR: float = Field(5e-6, ge=0, description="learning rate at the end of the schedule (see SCALE_BOUNDS)")
    CLIP_GRAD: Positive | None = Field(5.0, description="maximum gradient norm of a step; null = no clipping")
    AUTO_RESUME: bool = RuntimeField(True, description="continue from the latest checkpoint in the run directory")
    RESUME_CHANGED: bool = RuntimeField(False, description="resume even if settings, classes or images have changed")
    LAYER_DECAY: Fraction = Field(1.0, description="factor on the learning rate per layer below the head; 1 = off")
    USE_CHECKPOINT: bool = RuntimeField(False, description="activation checkpointing of the blocks, to save memory")
    SAVE_STEPS: int = RuntimeField(0, ge=0, description="steps between saves of the latest checkpoint; 0 = epochs only")
    EMA: float = Field(0.0, ge=0, lt=1, description="decay per step of the EMA of the weights; 0 = off")
    LR_SCHEDULER: LRScheduler = Field(LRScheduler(), description="learning rate schedule")
    OPTIMIZER: Optimizer = Field(Optimizer(), description="optimizer")


class Distill(Section):
    TEACHER: str = Field("", description="timm model with pretrained weights, or checkpoint of a LIT; empty = off")
    TYPE: Literal["soft", "hard"] = Field("soft", description="learn the teacher's probabilities, or its decision")
    ALPHA: float = Field(0.5, ge=0, le=1, description="share of the distillation loss")
    TAU: Positive = Field(1.0, description="soft: temperature of the softmax")


class Aug(Section):
    COLOR_JITTER: float = Field(0.4, ge=0, description="strength of color jitter where AUTO_AUGMENT is off")
    AUTO_AUGMENT: str = Field("rand-m9-mstd0.5-inc1", description='a timm policy; "" = off')
    REPROB: float = Field(0.25, ge=0, le=1, description="random erasing, probability")
    REMODE: Literal["pixel", "rand", "const"] = Field("pixel", description="erase to noise, one color or the mean")
    RECOUNT: int = Field(1, ge=1, le=100, description="maximum number of erased areas")
    REPEATED: int = Field(1, ge=1, le=100, description="augmented copies of an image in an epoch; 1 = off")
    MIXUP: float = Field(0.8, ge=0, description="mixup alpha; 0 = off")
    CUTMIX: float = Field(1.0, ge=0, description="cutmix alpha; 0 = off")
    CUTMIX_MINMAX: FractionRange | None = Field(None, description="[low, high] side of cutmix's box, share of IMG_SIZE")
    MIXUP_PROB: float = Field(1.0, ge=0, le=1, description="mixup or cutmix, probability")
    MIXUP_SWITCH_PROB: float = Field(0.5, ge=0, le=1, description="cutmix where both are on, probability")
    MIXUP_MODE: Literal["batch", "pair", "elem"] = Field("batch", description="what shares one random draw")
    HFLIP: float = Field(0.5, ge=0, le=1, description="horizontal flip, probability")
    SCALE: FractionRange = Field((0.08, 1.0), description="[low, high] area of the random crop, share of the image")
    RATIO: PositiveRange = Field((3 / 4, 4 / 3), description="[low, high] width / height of the random crop")

    @property
    def mixing(self) -> bool:
        """Tell if batches go through timm's Mixup."""
        return self.MIXUP > 0 or self.CUTMIX > 0 or self.CUTMIX_MINMAX is not None


class Test(Section):
    CROP: bool = Field(True, description="resize to IMG_SIZE * 256 / 224 and crop the center; false = resize only")
    AMP_DTYPE: Precision = Field("off", description="autocast in evaluation; off = float32, auto = bf16 on a GPU")


class Runtime(Section):
    DEVICE: Device = RuntimeField("auto", description="auto = cuda if there is a GPU, else cpu; mps is untested")
    AMP_DTYPE: Precision = Field("auto", description="autocast in training; auto = bf16 on a GPU, off = float32")
    COMPILE: bool = Field(False, description="run the model through torch.compile, which draws other drop paths")
    CHANNELS_LAST: bool = RuntimeField(False, description="channels-last memory format for images")
    TIMEOUT: float = RuntimeField(30.0, gt=0, description="minutes to wait for other ranks or for data")


class Config(Section):
    """Configuration of a run. Attributes have the names of the YAML keys: `config.TRAIN.EPOCHS`."""

    BASE: tuple[str, ...] = RuntimeField((), description="YAML files to inherit from; the last one wins")
    IMPORTS: tuple[str, ...] = Field((), description="modules that register models or mergings")
    DATA: Data = Field(Data(), description="images")
    MODEL: Model = Field(Model(), description="network and loss")
    TRAIN: Train = Field(Train(), description="schedule and optimizer")
    AUG: Aug = Field(Aug(), description="augmentation")
    DISTILL: Distill = Field(Distill(), description="distillation from a teacher, as in DeiT")
    TEST: Test = Field(Test(), description="evaluation")
    RUNTIME: Runtime = Field(Runtime(), description="device and precision")
    OUTPUT: str = RuntimeField("output", description="parent directory of all runs")
    TAG: str = RuntimeField("default", pattern=r"^([^./\\][^/\\]*)?$", description="name of the run, no path")
    SAVE_FREQ: int = RuntimeField(1, ge=1, description="epochs between checkpoints")
    PRINT_FREQ: int = RuntimeField(10, ge=1, description="steps between log lines")
    SEED: int = Field(0, ge=0, lt=2**63, description="seed of all random numbers")

    @property
    def learning_rates(self) -> tuple[float, float, float]:
        """Peak, warm-up start and floor at this global batch. The offsets' multiplier applies to the peak only."""
        scale = self.TRAIN.GLOBAL_BATCH / 512
        bounds = scale if self.TRAIN.LR_SCHEDULER.SCALE_BOUNDS else 1.0
        return self.TRAIN.BASE_LR * scale, self.TRAIN.WARMUP_LR * bounds, self.TRAIN.MIN_LR * bounds

    @property
    def model_keywords(self) -> dict[str, Any]:
        """Arguments of `timm.create_model`, `model_name` included."""
        model = self.MODEL
        keywords = dict(num_classes=model.NUM_CLASSES, drop_rate=model.DROP_RATE, drop_path_rate=model.DROP_PATH_RATE)
        if is_lit(model.NAME):
            keywords |= dict(img_size=self.DATA.IMG_SIZE) | model.LIT.model_dump(exclude_none=True)
        return {"model_name": model.NAME} | keywords | model.KEYWORDS


def is_lit(name: str) -> bool:
    """Tell if a model name is one of this package's variants."""
    return is_model_in_modules(name, ["lit"])


def is_imported(name: str) -> bool:
    """Tell if a model was registered with timm by a module of IMPORTS or `--import`."""
    packages = {"timm", "lit_backbone"}
    return is_model(name) and model_entrypoint(name).__module__.partition(".")[0] not in packages


def import_modules(names: Sequence[str]) -> None:
    """Import modules that register models or mergings, also from the working directory."""
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"IMPORTS: {name}: {error}; put its folder into PYTHONPATH") from error


def key_fields(section: type[Section] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Return the fields of all keys and sections by dotted name."""
    fields = {}
    for name, field in section.model_fields.items():
        fields[prefix + name] = field
        if isinstance(field.default, Section):
            fields |= key_fields(type(field.default), f"{prefix}{name}.")
    return fields


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values in nested sections by dotted key. KEYWORDS is a value as a whole."""
    flat = {}
    for name, value in tree.items():
        is_section = isinstance(value, dict) and name != "KEYWORDS"
        is_section &= prefix.count(".") < 4  # the config in a checkpoint may contain itself
        flat |= flatten(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return flat


def result_settings(config: Config) -> dict[str, str]:
    """Return the settings that affect results, as JSON text by dotted key."""
    values, fields = flatten(config.model_dump(mode="json")), key_fields()
    return {k: json.dumps(v) for k, v in values.items() if k not in fields or not fields[k].json_schema_extra}
