"""Work directory, checkpoints of an averaged model, schedule and the offsets of DTM in short runs."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from mmengine.config import Config, DictAction
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from lit_backbone.mm import OffsetHook, cli, load_file
from lit_backbone.mm.runner import StrictRunner
from tests.dense import derive, error_of
from tests.detection.conftest import DEMO, DETECTION

CONFIG = DEMO / "retinanet_lit_digit_scenes.py"
EMA = "custom_hooks = [dict(type='EMAHook', momentum=0.5)]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """Work directory of one epoch."""
    from tests.detection.conftest import build_options

    folder = tmp_path_factory.mktemp("trained")
    config = derive(folder / "ema.py", CONFIG, EMA)
    cli.train("", [str(config), *build_options(scenes, folder / "run")])
    return folder / "run"


def test_work_dir_with_checkpoints_is_refused(trained: Path, options: Any) -> None:
    arguments = [str(CONFIG), *options(), "--work-dir", str(trained)]
    before = (trained / "epoch_1.pth").read_bytes()
    message = error_of(cli.train, "", arguments)
    assert "holds checkpoints of another run (epoch_1.pth). Add --resume" in message
    assert (trained / "epoch_1.pth").read_bytes() == before and not (trained / f"{CONFIG.stem}.py").exists()


def test_locked_work_dir_is_refused(options: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / "run.lock"):
        for flags in ([], ["--resume"], ["--overwrite"]):
            message = error_of(cli.train, "", [str(CONFIG), *options(), *flags])
            assert f"{tmp_path}/run: another training runs there." in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_resume_does_not_overwrite_unlisted_checkpoints(options: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "epoch_9.pth").touch()  # without last_checkpoint, there is nothing to resume from
    assert "holds checkpoints of another run" in error_of(cli.train, "", [str(CONFIG), *options(), "--resume"])


@pytest.mark.parametrize("launcher, variable", cli.RANK_VARIABLES.items())
def test_only_rank_0_locks(launcher: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with cli.run_lock(str(tmp_path), "none"), cli.run_lock(str(tmp_path), launcher):
        pass


def test_overwrite_forgets_the_last_checkpoint(options: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed before its first checkpoint must not resume from the old run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "epoch_9.pth").touch()
    (tmp_path / "run" / "last_checkpoint").write_text(str(tmp_path / "run" / "epoch_9.pth"))
    monkeypatch.setattr(cli, "build_runner", lambda cfg: exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        cli.train("", [str(CONFIG), *options(), "--overwrite"])
    assert cli._find_latest(str(tmp_path / "run")) is None


# ---- averaged model


def to_released(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename and reshape the relative position tables of a detector as in the authors' files."""
    result = {}
    for key, value in state_dict.items():
        if key.endswith("rel_pos_bias"):
            key = key.replace("backbone.stages.", "backbone.layers.")
            key = key.replace("rel_pos_bias", "relative_position_bias_table")
            value = value.flatten(2)[0].t()  # (1, heads, H, W) -> (H * W, heads)
        result[key] = value
    return result


def load(path: Path, options: list[str], img_size: int, **changes: Any) -> tuple[dict, dict]:
    """Load a checkpoint as a training does, and return the weights of the model and of its average."""
    cfg = Config.fromfile(derive(path.parent / "ema.py", CONFIG, EMA))
    pairs = (option.split("=", 1) for option in options[3:])
    cfg.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in pairs})
    cfg.merge_from_dict(changes)
    cfg.model.backbone.update(img_size=img_size, init_cfg=None)
    cfg.work_dir, cfg.launcher, cfg.load_from = str(path.parent / "run"), "none", str(path)
    runner = cli.build_runner(cfg)
    runner.call_hook("before_run")
    if changes:
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.load_or_resume()
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    return runner.model.state_dict(), hook.ema_model.module.state_dict()


@pytest.mark.parametrize("layout", ["ours", "released"])
def test_average_has_resized_position_tables(layout: str, trained: Path, options: Any, tmp_path: Path) -> None:
    content = load_file(str(trained / "epoch_1.pth"))
    tables = {key: x for key, x in content["state_dict"].items() if key.endswith("rel_pos_bias")}
    if layout == "released":
        content = {"state_dict": to_released(content["state_dict"])}
    torch.save(content, tmp_path / "weights.pth")
    weights, averages = load(tmp_path / "weights.pth", options(), img_size=192)
    assert tables and all(averages[key].shape != x.shape for key, x in tables.items())
    for key, value in weights.items():
        assert torch.equal(averages[key], value), key
    for key, value in tables.items():
        center, expected = (x[..., x.shape[-2] // 2, x.shape[-1] // 2] for x in (averages[key], value))
        torch.testing.assert_close(center, expected, atol=0.02, rtol=0.2)


def test_resume_exchanges_weights_and_average(trained: Path, options: Any, tmp_path: Path) -> None:
    """EMAHook stores the average as `state_dict`, and the weights of the model in its place."""
    shutil.copy(trained / "epoch_1.pth", tmp_path)
    content = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    weights, averages = load(tmp_path / "epoch_1.pth", options(), img_size=128, resume=True)
    key = "bbox_head.retina_cls.weight"
    assert not torch.equal(weights[key], averages[key])
    for key, value in weights.items():
        assert torch.equal(value, content["ema_state_dict"][f"module.{key}"]), key
        assert torch.equal(averages[key], content["state_dict"][key]), key


# ---- schedule and offsets


@pytest.mark.parametrize("epochs", [1, 3])
def test_schedule_ends_with_the_training(epochs: int, options: Any, tmp_path: Path) -> None:
    """Inherit the demo config and change only the number of epochs."""
    derive(tmp_path / "short.py", CONFIG, f"train_cfg = dict(max_epochs={epochs}, val_interval=9)")
    arguments = [option for option in options() if not option.startswith("train_cfg")]
    cli.train("", [str(tmp_path / "short.py"), *arguments])
    content = torch.load(tmp_path / "run" / f"epoch_{epochs}.pth", weights_only=False)
    assert content["param_schedulers"][1]["T_max"] == 3 * epochs


@pytest.mark.parametrize(
    "scheduler, ends_with_training",
    [
        (dict(type="CosineAnnealingLR", by_epoch=True), True),
        (dict(type="CosineAnnealingLR", T_max=4), True),
        (dict(type="CosineAnnealingLR", begin=2, T_max=2), True),
        (dict(type="CosineAnnealingLR", T_max=3), False),
        (dict(type="PolyLR", by_epoch=False, begin=5), True),
        (dict(type="PolyLR", by_epoch=False, end=20), False),
        (dict(type="MultiStepLR", milestones=[2, 3]), True),
        (dict(type="MultiStepLR", milestones=[8, 11]), False),
        (dict(type="LinearLR", by_epoch=False, end=10), True),
        (dict(type="LinearLR", by_epoch=False, end=500), False),
    ],
)
def test_schedule_of_another_length(
    scheduler: dict[str, Any], ends_with_training: bool, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("mmengine.runner.Runner.build_param_scheduler", lambda self, schedulers: schedulers)
    Lengths().build_param_scheduler([scheduler])
    assert ("param_scheduler.0: ends at" in caplog.text) != ends_with_training


def test_schedule_begins_after_the_training(options: Any) -> None:
    options = options() + ["param_scheduler.1.by_epoch=False", "param_scheduler.1.begin=100"]
    options += ["param_scheduler.1.convert_to_iter_based=False"]
    assert "param_scheduler.1.begin=100: is not before its end (3)" in error_of(cli.train, "", [str(CONFIG), *options])


class Lengths(StrictRunner):
    """Runner of four epochs with ten steps."""

    max_epochs, max_iters, logger = 4, 40, logging.getLogger("schedule")

    def __init__(self) -> None:
        pass


class Runner:
    """Stands for a runner with a model, at the first step."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.iter, self.scalars = model, 0, {}
        self.message_hub, self.logger = self, MMLogger.get_instance("offsets")

    def update_scalar(self, name: str, value: float) -> None:
        self.scalars[name] = value


@pytest.mark.parametrize("bias, share", [(0.0, 0.0), (1000.0, 1.0)])
def test_offset_hook_warns(bias: float, share: float, caplog: pytest.LogCaptureFixture) -> None:
    from mmengine.registry import MODELS

    backbone = Config.fromfile(CONFIG).model.backbone
    init_default_scope("mmdet")
    model = MODELS.build(backbone | dict(init_cfg=None))
    for name, parameter in model.named_parameters():
        if name.endswith("offset.bias"):
            torch.nn.init.constant_(parameter, bias)
    runner, hook = Runner(model), OffsetHook(interval=1)
    runner.logger.addHandler(caplog.handler)
    for _ in range(2):
        hook.before_train_iter(runner, 0)
        model(torch.rand(1, 3, 64, 64))
        hook.after_train_iter(runner, 0)
    assert runner.scalars == {"train/dtm_outside": share}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == int(share > 0.5)
    assert all("Set optim_wrapper.paramwise_cfg.custom_keys.offset.lr_mult=0.01" in text for text in warnings)


def test_own_configs_slow_down_offsets() -> None:
    paths = list(DETECTION.parent.glob("*/configs/own/*.py"))
    assert len(paths) == 5
    for path in paths:
        cfg = Config.fromfile(path)
        assert cfg.optim_wrapper.paramwise_cfg.custom_keys.offset.lr_mult == 0.01
        assert "OffsetHook" in [hook.type for hook in cfg.custom_hooks]
