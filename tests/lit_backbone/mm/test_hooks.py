"""Hooks in the loops of mmengine."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

import lit_backbone.mm  # noqa: F401, registers the hooks

pytestmark = pytest.mark.slow


class Normalizer(BaseModel):
    """BatchNorm that is trained to return zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, *inputs: Tensor, mode: str = "tensor") -> Any:
        loss = self.norm(torch.stack(inputs)).square().mean()
        return {"loss": loss} if mode == "loss" else [loss]


def train_by_iterations(rank: int, folder: Path) -> None:
    """Train on one of two ranks with different data, and save the BatchNorm statistics."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(rank)) + 10 * rank
    runner = Runner(
        Normalizer(),
        str(folder / "run"),
        train_dataloader=dict(
            dataset=list(data), batch_size=4, sampler=dict(type="InfiniteSampler", shuffle=False), num_workers=0
        ),
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=3),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=2, by_epoch=False, save_last=True)),
        custom_hooks=[dict(type="EMAHook"), dict(type="AverageBuffersHook")],
    )
    runner.train()
    torch.save(runner.model.norm.running_mean, folder / f"mean{rank}.pth")
    dist.destroy_process_group()


def test_checkpoints_hold_the_average_over_ranks_and_training_continues_from_it(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_by_iterations, (tmp_path,), nprocs=2)
    for iteration in (2, 3):
        content = torch.load(tmp_path / "run" / f"iter_{iteration}.pth", weights_only=False)
        decay = 1 - 0.9**iteration
        for mean in (content["state_dict"]["norm.running_mean"], content["ema_state_dict"]["module.norm.running_mean"]):
            torch.testing.assert_close(mean, torch.full((3,), 5.0 * decay), atol=0.5 * decay, rtol=0)
    torch.testing.assert_close(*(torch.load(tmp_path / f"mean{rank}.pth") for rank in range(2)))
