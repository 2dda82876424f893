"""The trainer on a GPU: options, non-finite values, synchronization, resuming and NCCL."""

import copy
import json
import math
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lit_classification.config_file import load_config
from lit_classification.loaders import build_train_loader, build_val_loader
from lit_classification.resume import FAILED, LATEST
from lit_classification.training import Trainer
from torch.amp import GradScaler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import main
from lit_backbone import read_checkpoint
from lit_classification import run
from lit_classification.distributed import Processes
from tests.classification.conftest import TINY_LIT
from tests.classification.test_resume import EVERYTHING, assert_same, train, without_config
from tests.gpu.conftest import DEVICE, ON_GPU, needs_gpu, relative_error
from tests.lit_backbone.small import small_lit

Write = Callable[..., Path]
SAME_EVERYWHERE = {"MODEL": {"DROP_PATH_RATE": 0.0}, "TRAIN": {"BASE_LR": 0.1}}  # a GPU draws other random numbers
OPTIONS = {
    "float32": {"RUNTIME": {"AMP_DTYPE": "off"}},
    "bf16": {"RUNTIME": {"AMP_DTYPE": "bf16"}},
    "fp16": {"RUNTIME": {"AMP_DTYPE": "fp16"}},
    "average": {"TRAIN": {"EMA": 0.9}},
    "checkpointing": {"TRAIN": {"USE_CHECKPOINT": True}},
    "compiled": {"RUNTIME": {"COMPILE": True}},
    "no accumulation": {"DATA": {"BATCH_SIZE": 8}},
    "channels last": {"RUNTIME": {"CHANNELS_LAST": True, "AMP_DTYPE": "off"}},
}


def merge(first: Mapping, second: Mapping) -> dict:
    """Merge two nested dictionaries of settings. The second takes precedence."""
    return {key: {**first.get(key, {}), **second.get(key, {})} for key in {**first, **second}}


def train_file(cfg: Path, *options: str) -> tuple[Path, list[float]]:
    """Train and return the run directory and the loss of each epoch."""
    main.main(["--cfg", str(cfg), *(["--opts", *options] if options else [])])
    folder = cfg.parent / "output" / cfg.stem / "default"
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return folder, [record["train/loss_epoch"] for record in records]


@pytest.mark.parametrize("name", [*OPTIONS, "together"])
def test_every_option_trains_as_a_cpu_does(name: str, tiny_cfg: Write) -> None:
    """The run on a CPU is in float32, with the same random numbers and the same accumulation."""
    together = [OPTIONS[name] for name in ("bf16", "average", "checkpointing", "compiled")]
    options = reduce(merge, together if name == "together" else [OPTIONS[name]], SAME_EVERYWHERE)
    batch = {"DATA": options.get("DATA", {}), "RUNTIME": {"DEVICE": "cpu"}}
    _, expected = train_file(tiny_cfg("cpu", **merge(SAME_EVERYWHERE, batch)))
    folder, losses = train_file(tiny_cfg("gpu", **merge(options, {"RUNTIME": {"DEVICE": DEVICE}})))
    assert losses == pytest.approx(expected, rel=1e-3 if name in ("float32", "channels last") else 3e-2)
    left = read_checkpoint(folder / LATEST)
    assert left["update"] == 8 and (left["model_ema"] is not None) == (name in ("average", "together"))
    assert all(value.isfinite().all() for value in left["model"].values())


@needs_gpu
def test_an_overflow_of_fp16_is_no_alarm(tiny_cfg: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    scalers = []

    def too_high(device: str, enabled: bool) -> GradScaler:
        scalers.append(GradScaler(device, init_scale=2.0**22, growth_interval=1000, enabled=enabled))
        return scalers[-1]

    monkeypatch.setattr(run, "GradScaler", too_high)
    folder, _ = train_file(tiny_cfg(RUNTIME={"DEVICE": DEVICE, "AMP_DTYPE": "fp16"}))
    halved = 22 - math.log2(scalers[0].get_scale())
    left = read_checkpoint(folder / LATEST)
    assert 1 <= halved < 8 and left["update"] == 8
    assert {int(state["step"]) for state in left["optimizer"]["state"].values()} == {8 - int(halved)}


@pytest.mark.parametrize("precision", ["off", "bf16", "fp16"])
def test_gradients_that_are_never_finite_stop_the_run(
    precision: str, tiny_cfg: Write, monkeypatch: pytest.MonkeyPatch, image_folder: Path
) -> None:
    """Gradients are not finite from the third step on. fp16 first lowers its scale from 4 to 1."""
    before, run_update = {}, Trainer.run_update

    def break_from_the_third(trainer: Trainer, batches) -> None:
        if trainer.state.update == 2:
            trainer.criterion = lambda logits, targets: (logits - logits.detach()).square().sum().sqrt()
            before.update((name, value.clone()) for name, value in trainer.state.model.named_parameters())
        run_update(trainer, batches)

    monkeypatch.setattr(Trainer, "run_update", break_from_the_third)
    low = {"init_scale": 4.0, "growth_interval": 1000}
    monkeypatch.setattr(run, "GradScaler", lambda device, enabled: GradScaler(device, enabled=enabled, **low))
    cfg = tiny_cfg(RUNTIME={"DEVICE": DEVICE, "AMP_DTYPE": precision}, TRAIN={"SAVE_STEPS": 0})
    with pytest.raises(SystemExit) as stopped:
        train_file(cfg)
    epoch, update = (1, 0) if precision == "fp16" and ON_GPU else (0, 2)
    assert f"gradient norm nan in epoch {epoch}, update {update};" in str(stopped.value)
    assert str(image_folder / "train") in str(stopped.value) and "learning rates" in str(stopped.value)
    left = read_checkpoint(cfg.parent / "output/tiny/default" / FAILED)
    assert left["update"] == 4 * epoch + update
    for name, value in before.items():
        assert torch.equal(left["model"][name], value.cpu()), name


@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_host_waits_only_where_it_prints(precision: str, tiny_cfg: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step may wait, because it compiles kernels and allocates memory."""
    run_update, watched = Trainer.run_update, []

    def watch(trainer: Trainer, batches) -> None:
        if trainer.state.update:
            torch.cuda.set_sync_debug_mode("error")
            watched.append(trainer.state.update)
        try:
            run_update(trainer, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "run_update", watch)
    data = {"NUM_WORKERS": 2, "PIN_MEMORY": True}
    train_file(tiny_cfg(DATA=data, TRAIN={"EMA": 0.9}, RUNTIME={"DEVICE": DEVICE, "AMP_DTYPE": precision}))
    assert watched == [*range(1, 8)]


def test_an_interrupted_run_ends_the_same(tiny_cfg: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are equal bit for bit with deterministic algorithms. On a GPU, DTM has none and is excluded."""
    model = {"LIT": TINY_LIT | {"merging": "conv"}} if ON_GPU else {}
    settings = merge(EVERYTHING, {"MODEL": model, "RUNTIME": {"DEVICE": DEVICE, "AMP_DTYPE": "off"}})
    torch.use_deterministic_algorithms(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            whole = train(tiny_cfg("whole", **settings), monkeypatch=monkeypatch)
            assert train(tiny_cfg("parts", **settings), stop_after=3, monkeypatch=monkeypatch)["update"] == 3
            parts = train(tiny_cfg("parts", **settings), monkeypatch=monkeypatch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(without_config(parts), without_config(whole))


def test_one_process_of_a_group(tmp_path: Path) -> None:
    """Gradients of DDP (NCCL on a GPU) equal those of the bare model."""
    alone = small_lit().to(DEVICE)
    images = torch.randn(4, 3, 64, 64, device=DEVICE)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if ON_GPU else "gloo", store=store, rank=0, world_size=1)
    try:
        grouped = DistributedDataParallel(copy.deepcopy(alone), broadcast_buffers=False)
        for model in (alone, grouped):
            model(images).square().mean().backward()
    finally:
        dist.destroy_process_group()
    for (name, a), b in zip(alone.named_parameters(), grouped.module.parameters(), strict=True):
        assert relative_error(b.grad, a.grad) < 1e-3 or a.grad.norm() < 1e-5, name


@pytest.mark.parametrize("build", [build_train_loader, build_val_loader])
def test_batches_come_in_pinned_memory(build: Callable, tiny_cfg: Write) -> None:
    cfg = tiny_cfg(DATA={"NUM_WORKERS": 2, "PIN_MEMORY": True}, RUNTIME={"DEVICE": DEVICE})
    loader = build(load_config(cfg), Processes(0, 1, torch.device(DEVICE)))
    assert all(tensor.is_pinned() == ON_GPU for tensor in next(iter(loader))[:2])
