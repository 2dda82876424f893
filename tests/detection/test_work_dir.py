"""Work directory, schedule and the offsets of DTM."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope

from lit_backbone.mm import OffsetHook, cli
from lit_backbone.mm.runner import StrictRunner
from tests.dense import error_of
from tests.detection.conftest import DEMO, read_config

CONFIG = DEMO / "retinanet_lit_digit_scenes.py"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """Work directory with a checkpoint that `last_checkpoint` does not list."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "epoch_9.pth").touch()
    return tmp_path / "run"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "holds checkpoints of another run (epoch_9.pth)"),
        (["--resume"], "last_checkpoint is missing. Pass --resume FILE to choose one (epoch_9.pth)"),
        (["--resume", "--overwrite"], "--overwrite: starts a new run"),
    ],
)
def test_work_dir_with_checkpoints_is_refused(flags: list[str], expected: str, old_run: Path, options: Any) -> None:
    assert expected in error_of(cli.train, "", [str(CONFIG), *options(), *flags])
    assert {path.name for path in old_run.iterdir()} <= {"epoch_9.pth", "run.lock"}


@pytest.mark.parametrize("flags", [["--resume"], ["--overwrite"]])
def test_locked_work_dir_is_refused(flags: list[str], options: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / "run.lock"):
        message = error_of(cli.train, "", [str(CONFIG), *options(), *flags])
    assert f"{tmp_path}/run: another training runs there." in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


@pytest.mark.parametrize("launcher, variable", cli.RANK_VARIABLES.items())
def test_only_rank_0_locks(launcher: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    with cli.run_lock(str(tmp_path), "none"), cli.run_lock(str(tmp_path), launcher):
        pass


def test_overwrite_forgets_the_last_checkpoint(options: Any, old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed before its first checkpoint must not resume from the old run."""
    (old_run / "last_checkpoint").write_text(str(old_run / "epoch_9.pth"))
    monkeypatch.setattr(cli, "build_runner", lambda cfg: exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        cli.train("", [str(CONFIG), *options(), "--overwrite"])
    assert not (old_run / "last_checkpoint").exists()


# ---- schedule and offsets


class Lengths(StrictRunner):
    """Runner of four epochs with ten steps."""

    max_epochs, max_iters, logger = 4, 40, logging.getLogger("schedule")

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize(
    "scheduler, ends_with_training",
    [
        (dict(type="CosineAnnealingLR", by_epoch=True), True),
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
def test_schedule_of_another_length_warns(
    scheduler: dict[str, Any], ends_with_training: bool, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("mmengine.runner.Runner.build_param_scheduler", lambda self, schedulers: schedulers)
    Lengths().build_param_scheduler([scheduler])
    assert ("param_scheduler.0: ends at" in caplog.text) != ends_with_training


class Runner:
    """Stands for a runner with a model, at the first step."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.iter, self.scalars = model, 0, {}
        self.message_hub, self.logger = self, MMLogger.get_instance("offsets")

    def update_scalar(self, name: str, value: float) -> None:
        self.scalars[name] = value


@pytest.mark.parametrize("bias, share", [(0.0, 0.0), (1000.0, 1.0)])
def test_offset_hook_warns_once(bias: float, share: float, caplog: pytest.LogCaptureFixture) -> None:
    init_default_scope("mmdet")
    model = MODELS.build(read_config(CONFIG).model.backbone | dict(init_cfg=None))
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
    assert len(warnings) == int(share > 0.5) and all("offset.lr_mult" in text for text in warnings)
