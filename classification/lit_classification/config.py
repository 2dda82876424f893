"""The keys of a run's configuration; their defaults are LIT-S's recipe. `config_file.py` reads and checks them."""

import os
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_serializer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

MIXING_ODD = "mixup and cutmix pair images, but {} is odd; use {}, or switch both off"


class ConfigError(ValueError):
    """A configuration that cannot run; each argument, a line, names file or option, key, problem and remedy."""

    def __str__(self) -> str:
        escaped = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in line[:2000]) for line in self.args)
        return "\n".join(escaped)


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise PydanticCustomError("descending", "Input should be [low, high]")
    return pair


SIDES = (32, 2048)  # of an input in pixels; at 2048, 16,384 tokens attend to each other in stage 3

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

    @field_validator("*")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        if isinstance(value, str) and ("\0" in value or value != value.encode(errors="replace").decode()):
            raise PydanticCustomError("text", "Input should be UTF-8 text without NUL")
        in_home = isinstance(value, str) and value.startswith("~/")  # which the shell replaces, YAML does not
        return os.path.expanduser(value) if in_home else value


class Data(Section):
    BATCH_SIZE: Count = Field(128, description="images per process in one forward pass")
    DATA_PATH: str = Free("", description="root folder of the data set")
    DATASET: str = Field(
        "",
        pattern="^(|imagenet|.+/.+)$",
        description="a timm data set such as torch/cifar10; empty or imagenet = folders train/ and val/",
    )
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
    OFFSET_LR_MULTI: Positive = Field(
        0.01, description="factor on BASE_LR, not on WARMUP_LR and MIN_LR, of DTM's offset convolutions"
    )
    LIT: Lit = Field(Lit(), description="keywords of LIT's constructor to override")
    KEYWORDS: dict[str, Any] = Field({}, description="keywords of another timm model's constructor")


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
    LR_SCHEDULER: LRScheduler = Field(LRScheduler(), description="the learning rate after the warm-up")
    OPTIMIZER: Optimizer = Field(Optimizer(), description="what updates the weights")


class Aug(Section):
    COLOR_JITTER: float = Field(0.4, ge=0, description="strength of colour jitter, where AUTO_AUGMENT is off")
    AUTO_AUGMENT: str = Field("rand-m9-mstd0.5-inc1", description='a timm policy; "" = off')
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
    DEVICE: Literal["auto", "cpu", "cuda", "mps"] = Free(
        "auto", description="where to run; auto = cuda where there is a GPU, else cpu; mps (macOS) is untried"
    )
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
        return {"model_name": model.NAME} | keywords | model.KEYWORDS


def key_fields(section: type[Section] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """All keys and sections by dotted name."""
    fields = {}
    for name, field in section.model_fields.items():
        fields[prefix + name] = field
        if isinstance(field.default, Section):
            fields |= key_fields(type(field.default), f"{prefix}{name}.")
    return fields


def settings(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted key, the settings in a dumped configuration on which its results depend."""
    found, fields = {}, key_fields()
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
