"""Whoever reads a run's checkpoint gets the same weights: the moving average, where the run kept one."""

import json
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import timm
import torch
from lit_classification.config_file import load_config
from lit_classification.loaders import build_val_loader
from lit_classification.resume import LATEST, TrainState, save_checkpoint
from PIL import Image
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.amp import GradScaler

import main
import predict
import visualize_attention
import visualize_offset
from lit_backbone import load_checkpoint, read_checkpoint
from lit_classification.distributed import Processes
from lit_classification.model import build_model, load_classifier, load_model
from lit_classification.optim import build_optimizer
from tests.classification.conftest import CLASSES, TINY_LIT
from tools import export

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
KEYWORDS = TINY_LIT | {"num_classes": len(CLASSES), "img_size": 32}
URL = timm.get_pretrained_cfg("lit_s").url


@pytest.fixture
def run(tiny_cfg, tmp_path, monkeypatch) -> tuple[Path, Path, nn.Module, nn.Module]:
    """Configuration and file of a run, its raw weights and their average, which have nothing in common."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = tiny_cfg(TEST={"CROP": False}, TRAIN={"EMA": 0.9, "EPOCHS": 2})
    config = load_config(cfg)
    models = [build_model(config, CPU).eval() for _ in range(2)]
    for seed, model in enumerate(models):
        generator = torch.Generator().manual_seed(seed)
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.2 * torch.rand(value.shape, generator=generator))
    raw, average = models
    ema = ModelEmaV3(average, decay=0.9)
    state = TrainState(raw, build_optimizer(raw, config), GradScaler(enabled=False), ema, 4, list(CLASSES))
    save_checkpoint(tmp_path / "run.pth", state, config)
    return cfg, tmp_path / "run.pth", raw, average


def output_of(program, *args: str | Path) -> str:
    with redirect_stdout(StringIO()) as out:
        program.main([str(arg) for arg in args])
    return out.getvalue()


def photos(cfg: Path) -> Path:
    return Path(load_config(cfg).DATA.DATA_PATH, "val")


def into_a_model(cfg: Path, file: Path) -> nn.Module:
    model = timm.create_model("lit_s", **KEYWORDS)
    model.load_state_dict(load_checkpoint(file, model))
    return model


def pretrained_from_the_hub_cache(cfg: Path, file: Path) -> nn.Module:
    cache = file.parent / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    shutil.copy(file, cache / URL.rpartition("/")[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(file.parent))
        overlay = dict(num_classes=len(CLASSES))
        return timm.create_model("lit_s", **KEYWORDS, pretrained=True, pretrained_cfg_overlay=overlay)


def fine_tuning(cfg: Path, file: Path) -> dict[str, Tensor]:
    """Trains so little that nothing but BatchNorm's statistics, which are no parameters, can be told from the start."""
    still = ["TRAIN.BASE_LR", "1e-12", "TRAIN.WARMUP_LR", "0", "TRAIN.MIN_LR", "0", "TRAIN.EMA", "0"]
    output_of(main, "--cfg", cfg, "--pretrained", file, "--opts", *still)
    state = read_checkpoint(file.parent / "output" / "tiny" / "default" / LATEST)["model"]
    return {key: value for key, value in state.items() if not re.search("running|tracked", key)}


def dense_backbone(cfg: Path, file: Path) -> nn.Module:
    LITBackbone = pytest.importorskip("lit_backbone.mm").LITBackbone
    model = LITBackbone(TINY_LIT, img_size=32, init_cfg=dict(type="Pretrained", checkpoint=str(file)))
    model.init_weights()
    return model


def exported(cfg: Path, file: Path) -> dict[str, Tensor]:
    output_of(export, file, "--format", "safetensors")
    return load_file(file.with_suffix(".safetensors"))


def visualizer(program, *args: str):
    def door(cfg: Path, file: Path) -> nn.Module:
        return load_model(program.parse_args(["--resume", str(file), *args]), CPU).model

    return door


def evaluation_loss(cfg: Path, file: Path) -> float:
    return float(re.search(r"loss (\S+)", output_of(main, "--cfg", cfg, "--eval", "--resume", file))[1])


def predictions(cfg: Path, file: Path) -> dict[str, float]:
    line = json.loads(output_of(predict, photos(cfg) / "bee" / "0.jpg", "--checkpoint", file, "--json"))
    return {entry["class"]: entry["probability"] for entry in line["predictions"]}


DOORS = {
    "load_checkpoint": into_a_model,
    "checkpoint_path": lambda cfg, file: timm.create_model("lit_s", **KEYWORDS, checkpoint_path=str(file)),
    "pretrained": pretrained_from_the_hub_cache,
    "torch.hub": lambda cfg, file: torch.hub.load(str(ROOT), "lit_s", source="local", checkpoint=file, **KEYWORDS),
    "init_cfg": dense_backbone,
    "load_classifier": lambda cfg, file: load_classifier(file, CPU).model,
    "visualize_offset": visualizer(visualize_offset, "--vis_image", "x"),
    "visualize_attention": visualizer(visualize_attention, "--data-path", "x"),
    "export": exported,
    "--pretrained": fine_tuning,
    "--eval": evaluation_loss,
    "predict": predictions,
}


@torch.no_grad()
def by_hand(model: nn.Module, cfg: Path, found: nn.Module | dict | float) -> dict | float:
    """What a door has to give for the weights of `model`, in the form of `found`."""
    images = build_val_loader(load_config(cfg), Processes(0, 1, CPU)).dataset.dataset
    if isinstance(found, float):
        logits = torch.stack([model(images[i][0][None])[0] for i in range(len(images))])
        return nn.functional.cross_entropy(logits, torch.tensor([images[i][1] for i in range(len(images))])).item()
    if set(found) == set(CLASSES):
        with Image.open(photos(cfg) / "bee" / "0.jpg") as image:
            return dict(zip(CLASSES, model(images.transform(image)[None]).softmax(-1)[0].tolist()))
    return {key: value for key, value in model.state_dict().items() if key in found}


@pytest.mark.parametrize("door", DOORS)
def test_the_average_comes_through_every_door(door, run):
    cfg, file, raw, average = run
    found = DOORS[door](cfg, file)
    found = dict(found.state_dict()) if isinstance(found, nn.Module) else found
    expected, other = (by_hand(model, cfg, found) for model in (average, raw))
    close = dict(rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, expected, **close)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, other, **close)
