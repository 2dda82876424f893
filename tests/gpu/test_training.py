"""Tests of training on a GPU: each option, resuming, NCCL."""

import copy
import json
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import main
from lit_backbone import read_checkpoint
from lit_classification.checkpointing import LATEST
from tests.classification.conftest import TINY_LIT
from tests.classification.test_resume import EVERYTHING, assert_same, train, without_config
from tests.gpu.conftest import DEVICE, ON_GPU, relative_error
from tests.lit_backbone.small import small_lit

Write = Callable[..., Path]
SAME_EVERYWHERE = {"MODEL": {"DROP_PATH_RATE": 0.0}, "TRAIN": {"BASE_LR": 0.1}}  # a GPU draws other drop paths
OPTIONS = {
    "float32": {"RUNTIME": {"AMP_DTYPE": "off"}},
    "bf16": {"RUNTIME": {"AMP_DTYPE": "bf16"}},
    "fp16": {"RUNTIME": {"AMP_DTYPE": "fp16"}},
    "ema": {"TRAIN": {"EMA": 0.9}},
    "checkpointing": {"TRAIN": {"USE_CHECKPOINT": True}},
    "compiled": {"RUNTIME": {"COMPILE": True}},
    "no accumulation": {"DATA": {"BATCH_SIZE": 8}},
    "channels last": {"RUNTIME": {"CHANNELS_LAST": True, "AMP_DTYPE": "off"}},
}


def merge(first: Mapping, second: Mapping) -> dict:
    """Merge two levels of settings; those of the second win."""
    return {key: {**first.get(key, {}), **second.get(key, {})} for key in {**first, **second}}


def train_file(cfg: Path) -> tuple[dict, list[float]]:
    """Train, and return the last checkpoint and the loss of each epoch."""
    main.main(["--cfg", str(cfg)])
    run_dir = cfg.parent / "output" / cfg.stem / "default"
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    return read_checkpoint(run_dir / LATEST), [line["train/loss_epoch"] for line in lines]


@pytest.mark.parametrize("name", [*OPTIONS, "combined"])
def test_options_train_as_on_a_cpu(name: str, tiny_cfg: Write) -> None:
    """Compare the losses with those of float32 on a CPU."""
    combined = [OPTIONS[name] for name in ("bf16", "ema", "checkpointing", "compiled")]
    options = reduce(merge, combined if name == "combined" else [OPTIONS[name]], SAME_EVERYWHERE)
    on_cpu = {"DATA": options.get("DATA", {}), "RUNTIME": {"DEVICE": "cpu"}}
    _, expected = train_file(tiny_cfg("cpu", **merge(SAME_EVERYWHERE, on_cpu)))
    saved, losses = train_file(tiny_cfg("gpu", **merge(options, {"RUNTIME": {"DEVICE": DEVICE}})))
    assert losses == pytest.approx(expected, rel=1e-3 if name in ("float32", "channels last") else 3e-2)
    assert saved["update"] == 8 and (saved["model_ema"] is not None) == (name in ("ema", "combined"))
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_interrupted_run_ends_the_same(tiny_cfg: Write) -> None:
    """Compare bit for bit, with deterministic algorithms and, on a GPU, without DTM: its gradients have none there."""
    model = {"LIT": TINY_LIT | {"merging": "conv"}} if ON_GPU else {}
    settings = merge(EVERYTHING, {"MODEL": model, "RUNTIME": {"DEVICE": DEVICE, "AMP_DTYPE": "off"}})
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            whole = train(tiny_cfg("whole", **settings))
            assert train(tiny_cfg("parts", **settings), stop_at=3)["update"] == 3
            parts = train(tiny_cfg("parts", **settings))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(without_config(parts), without_config(whole))


def test_group_of_one_rank(tmp_path: Path) -> None:
    """Gradients that pass through NCCL, or gloo on a CPU, are those of the model alone."""
    single = small_lit().to(DEVICE)
    images = torch.randn(4, 3, 64, 64, device=DEVICE)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if ON_GPU else "gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(single), broadcast_buffers=False)
        for model in (single, wrapped):
            model(images).square().mean().backward()
    finally:
        dist.destroy_process_group()
    for (name, a), b in zip(single.named_parameters(), wrapped.module.parameters(), strict=True):
        assert relative_error(b.grad, a.grad) < 1e-3 or a.grad.norm() < 1e-5, name
