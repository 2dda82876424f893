"""Checkpoints that the runner writes: sound weights only, each whole or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from torch import nn

from lit_backbone.mm import load_file
from lit_backbone.mm.runner import StrictRunner
from tests.lit_backbone.mm.test_hooks import Normalizer

ITERATIONS = dict(type="IterBasedTrainLoop", max_iters=3, val_interval=1)
EPOCHS = dict(type="EpochBasedTrainLoop", max_epochs=1)


@pytest.fixture
def build(tmp_path: Path) -> Any:
    """Return a function that builds the runner of an epoch of three iterations with a checkpoint after each."""

    def build(
        lr: float = 0.1, hooks: Any = (), train_cfg: Any = ITERATIONS, accumulation: int = 1, **checkpoint: Any
    ) -> StrictRunner:
        loader = dict(dataset=list(torch.randn(6, 3)), batch_size=2, sampler=dict(type="DefaultSampler"), num_workers=0)
        validation = dict(val_dataloader=loader, val_cfg=dict(type="ValLoop"), val_evaluator=[Score()])
        return StrictRunner(
            Normalizer(),
            str(tmp_path / "run"),
            train_dataloader=loader,
            train_cfg=train_cfg,
            auto_scale_lr=dict(enable=True, base_batch_size=2),
            **(validation if "save_best" in checkpoint else {}),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=lr), accumulative_counts=accumulation),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1, by_epoch=False, **checkpoint)),
            custom_hooks=list(hooks),
            experiment_name=tmp_path.name,
        )

    return build


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_names_and_old_checkpoints(build: Any, tmp_path: Path) -> None:
    build(max_keep_ckpts=2).train()
    assert files(tmp_path / "run") >= {"iter_2.pth", "iter_3.pth", "last_checkpoint"}
    assert not [name for name in files(tmp_path / "run") if name == "iter_1.pth" or "tmp" in name]
    assert (tmp_path / "run" / "last_checkpoint").read_text() == str(tmp_path / "run" / "iter_3.pth")
    assert torch.load(tmp_path / "run" / "iter_3.pth", weights_only=False)["meta"]["iter"] == 3


@pytest.mark.parametrize("hooks", [[dict(type="AverageBuffersHook")], []])
def test_weights_that_are_not_finite_are_not_saved(hooks: list, build: Any, tmp_path: Path) -> None:
    """Keep the last sound checkpoint, which mmengine's CheckpointHook would delete first."""
    runner = build(1e30, hooks, max_keep_ckpts=1)
    with pytest.raises(FloatingPointError, match="iter_2.pth: no checkpoint is written: after iteration 2, "):
        runner.train()
    assert {name for name in files(tmp_path / "run") if "iter" in name or "tmp" in name} == {"iter_1.pth"}
    assert (tmp_path / "run" / "last_checkpoint").read_text() == str(tmp_path / "run" / "iter_1.pth")
    with pytest.raises(FloatingPointError, match="best_mAP.pth"):
        runner.save_checkpoint(str(tmp_path / "run"), "best_mAP.pth", save_optimizer=False)


@pytest.mark.parametrize("train_cfg, within_epoch", [(ITERATIONS, {}), (EPOCHS, dict(within_epoch=True))])
def test_data_size_is_saved_and_scales_the_learning_rate(
    train_cfg: dict, within_epoch: dict, build: Any, tmp_path: Path
) -> None:
    runner = build(train_cfg=train_cfg, accumulation=2)
    runner.train()
    meta = load_file(str(tmp_path / "run" / "iter_2.pth"))["meta"]
    assert meta == dict(epoch=0, iter=2, seed=runner.seed, num_images=6, global_batch=4) | within_epoch
    assert runner.optim_wrapper.get_lr()["lr"] == [0.2]


class Score(BaseMetric):
    """Metric that increases with each validation."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        self.value = getattr(self, "value", 0) + 1
        return dict(score=self.value)


@pytest.mark.parametrize("failing, kept", [("iter_2.pth", 1), ("best_score_iter_2.pth", 2)])
def test_failed_write_keeps_old_checkpoints(
    failing: str, kept: int, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the last and the best checkpoint if the next one cannot be written."""
    put = LocalBackend.put

    def put_or_fail(self: LocalBackend, data: bytes, path: str | Path) -> None:
        if Path(path).name.startswith(failing):
            raise OSError("disk full")
        put(self, data, path)

    monkeypatch.setattr(LocalBackend, "put", put_or_fail)
    with pytest.raises(OSError, match="disk full"):
        build(max_keep_ckpts=1, save_best="score", rule="greater").train()
    saved = {name for name in files(tmp_path / "run") if ".pth" in name}
    assert saved == {f"iter_{kept}.pth", "best_score_iter_1.pth"}
    assert (tmp_path / "run" / "last_checkpoint").read_text() == str(tmp_path / "run" / f"iter_{kept}.pth")


def test_failed_write_keeps_the_old_file(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = build()
    runner.train()
    before, path = files(tmp_path / "run"), tmp_path / "run" / "iter_3.pth"
    content = path.read_bytes()

    def put(self: LocalBackend, data: bytes, path: str | Path) -> None:
        Path(path).write_bytes(data[: len(data) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(LocalBackend, "put", put)
    nn.init.zeros_(runner.model.norm.weight)
    with pytest.raises(OSError, match="disk full"):
        runner.save_checkpoint(str(tmp_path / "run"), path.name)
    assert path.read_bytes() == content and files(tmp_path / "run") == before
