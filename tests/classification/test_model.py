"""All readers of a run's checkpoint get the same weights, the EMA if the run kept one, and refuse unsuitable ones."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler

import main
import predict
import visualize_attention
import visualize_offset
from lit_backbone import CheckpointError, load_checkpoint, read_checkpoint
from lit_classification.checkpointing import LATEST, TrainState, save_checkpoint
from lit_classification.config_reader import load_config
from lit_classification.data import build_dataset, eval_preprocessing
from lit_classification.distributed import Ranks
from lit_classification.engine import to_device
from lit_classification.model import build_model, load_classifier
from lit_classification.optim import build_optimizer
from tests.classification.conftest import CLASSES, TINY_LIT

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
KEYWORDS = TINY_LIT | {"num_classes": len(CLASSES), "img_size": 32}


@pytest.fixture
def run(tiny_cfg, tmp_path, on_cpu) -> tuple[Path, Path, nn.Module, nn.Module]:
    """Return the config and checkpoint of a run, its raw weights, and EMA weights that differ in every tensor."""
    cfg = tiny_cfg(TEST={"CROP": False}, TRAIN={"EMA": 0.9})
    config = load_config(cfg)
    raw, average = (build_model(config, CPU).eval() for _ in range(2))
    for seed, model in enumerate((raw, average)):
        generator = torch.Generator().manual_seed(seed)
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.2 * torch.rand(value.shape, generator=generator))
    optimizer, ema = build_optimizer(raw, config), ModelEmaV3(average, decay=0.9)
    state = TrainState(raw, optimizer, GradScaler(enabled=False), ema, 4, tmp_path, list(CLASSES))
    save_checkpoint("run.pth", state, config, Ranks(0, 1, CPU))
    return cfg, tmp_path / "run.pth", raw, average


def output_of(program, *args: str | Path) -> str:
    with redirect_stdout(StringIO()) as out:
        program.main([str(arg) for arg in args])
    return out.getvalue()


def photo(cfg: Path) -> Path:
    return Path(load_config(cfg).DATA.DATA_PATH, "val", "bee", "0.jpg")


def load_into_a_model(cfg: Path, file: Path) -> nn.Module:
    model = timm.create_model("lit_s", **KEYWORDS)
    model.load_state_dict(load_checkpoint(file, model))
    return model


def load_pretrained(cfg: Path, file: Path, **kwargs) -> nn.Module:
    """Copy the file to torch.hub's cache of downloads, and create a model with `pretrained=True`."""
    cached = file.parent / "hub" / "checkpoints" / Path(timm.get_pretrained_cfg("lit_s").url).name
    cached.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, cached)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(file.parent))
        overlay = dict(num_classes=len(CLASSES))
        return timm.create_model("lit_s", **KEYWORDS | kwargs, pretrained=True, pretrained_cfg_overlay=overlay)


def fine_tune(cfg: Path, file: Path) -> dict[str, Tensor]:
    """Train at a learning rate so low that parameters stay; BatchNorm's statistics change and are left out."""
    options = ["TRAIN.BASE_LR", "1e-12", "TRAIN.WARMUP_LR", "0", "TRAIN.MIN_LR", "0", "TRAIN.EMA", "0"]
    output_of(main, "--cfg", cfg, "--pretrained", file, "--opts", *options)
    state = read_checkpoint(file.parent / "output" / "tiny" / "default" / LATEST)["model"]
    return {key: value for key, value in state.items() if not re.search("running|tracked", key)}


def load_dense_backbone(cfg: Path, file: Path) -> nn.Module:
    LITBackbone = pytest.importorskip("lit_backbone.mm").LITBackbone
    model = LITBackbone(TINY_LIT, img_size=32, init_cfg=dict(type="Pretrained", checkpoint=str(file)))
    model.init_weights()
    return model


def export_safetensors(cfg: Path, file: Path) -> dict[str, Tensor]:
    from tools import export

    output_of(export, file, "--format", "safetensors")
    return load_file(file.with_suffix(".safetensors"))


def visualize(program, option: str, cfg: Path, file: Path) -> nn.Module:
    """Return the model that a visualizer loads."""
    models, load = [], program.load_classifier
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "load_classifier", lambda *args: models.append(load(*args).model) or sys.exit("loaded"))
        with pytest.raises(SystemExit) as info:
            program.main(["--resume", str(file), option, str(photo(cfg))])
    if info.value.code != "loaded":
        raise info.value
    return models[0]


def evaluate(cfg: Path, file: Path) -> float:
    return float(re.search(r"loss (\S+)", output_of(main, "--eval", "--resume", file))[1])


def classify(cfg: Path, file: Path) -> dict[str, float]:
    line = json.loads(output_of(predict, photo(cfg), "--checkpoint", file, "--json"))
    return {entry["class"]: entry["probability"] for entry in line["predictions"]}


READERS = {
    "load_checkpoint": load_into_a_model,
    "checkpoint_path": lambda cfg, file: timm.create_model("lit_s", **KEYWORDS, checkpoint_path=str(file)),
    "pretrained": load_pretrained,
    "torch.hub": lambda cfg, file: torch.hub.load(str(ROOT), "lit_s", source="local", checkpoint=file, **KEYWORDS),
    "init_cfg": load_dense_backbone,
    "load_classifier": lambda cfg, file: load_classifier(file, CPU).model,
    "visualize_offset": lambda cfg, file: visualize(visualize_offset, "--vis_image", cfg, file),
    "visualize_attention": lambda cfg, file: visualize(visualize_attention, "--data-path", cfg, file),
    "export": export_safetensors,
    "--pretrained": fine_tune,
    "--eval": evaluate,
    "predict": classify,
}


@torch.no_grad()
def expected_result(model: nn.Module, cfg: Path, actual: dict | float) -> dict | float:
    """Compute what a reader returns for the weights of `model`, in the form of `actual`."""
    config = load_config(cfg)
    images = build_dataset(config, is_training=False)
    if isinstance(actual, float):
        batch = torch.stack([images[i][0] for i in range(len(images))]), torch.zeros(())
        logits = model(to_device(batch, config, Ranks(0, 1, torch.device("cpu")))[0])
        return nn.functional.cross_entropy(logits, torch.tensor([images[i][1] for i in range(len(images))])).item()
    if set(actual) == set(CLASSES):
        with Image.open(photo(cfg)) as image:
            x = timm.data.create_transform(**eval_preprocessing(config))(image)[None]
            return dict(zip(CLASSES, model(x).softmax(-1)[0].tolist()))
    return {key: value for key, value in model.state_dict().items() if key in actual}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gets_the_ema_weights(reader, run):
    cfg, file, raw, average = run
    actual = READERS[reader](cfg, file)
    actual = dict(actual.state_dict()) if isinstance(actual, nn.Module) else actual
    expected, other = (expected_result(model, cfg, actual) for model in (average, raw))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(actual, other, rtol=1e-3, atol=1e-3)


DOORS = {name: reader for name, reader in READERS.items() if name != "checkpoint_path"}  # timm's own code
DOORS |= {
    "pretrained, other classes": lambda cfg, file: load_pretrained(cfg, file, num_classes=7),
    "pretrained, no head": lambda cfg, file: load_pretrained(cfg, file, num_classes=0),
    "pretrained, features": lambda cfg, file: load_pretrained(cfg, file, features_only=True),
}
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "half": (lambda weights: dict(list(weights.items())[::2]), "missing"),
    "deeper": (lambda weights: weights | {"stages.2.blocks.1.norm1.weight": torch.ones(24)}, "unexpected"),
    "wider": (lambda weights: weights | {"stages.2.blocks.0.norm1.weight": torch.ones(25)}, "shapes different"),
    "NaN": (lambda weights: weights | {"stages.3.blocks.0.norm1.weight": torch.full((32,), torch.nan)}, "not finite"),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_unsuitable_weights(door, run):
    cfg, file, *_ = run
    content = read_checkpoint(file)
    for change, words in FAULTS.values():
        torch.save(content | {key: change(content[key]) for key in ("model", "model_ema")}, file)
        with pytest.raises((CheckpointError, SystemExit), match=words):
            DOORS[door](cfg, file)
