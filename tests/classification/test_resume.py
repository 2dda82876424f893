"""Tests that an interrupted run resumes exactly, and that a checkpoint of another run is refused."""

import errno
import math
import os
import re
import shutil
import signal
import time
import zipfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.amp import GradScaler
from torch.utils._pytree import tree_flatten

import main
from lit_backbone import CheckpointError, read_checkpoint
from lit_classification.checkpointing import (
    BEST,
    LATEST,
    PREVIOUS,
    TrainState,
    atomic_save,
    find_resumable,
    restore_checkpoint,
)
from lit_classification.config import Config, result_settings
from lit_classification.config_reader import load_config
from lit_classification.logs import RunLog
from lit_classification.model import build_model
from lit_classification.optim import Schedule, build_optimizer
from tests.classification.conftest import CLASSES, read_log, refusal

STEPS = 2 * 4  # epochs x steps per epoch of a tiny run: 33 images in batches of 8
EVERYTHING = {  # all settings that draw random numbers or carry state from step to step
    "MODEL": {"DROP_PATH_RATE": 0.2},
    "TRAIN": {"EMA": 0.9, "SAVE_STEPS": 1},
    "AUG": {"REPEATED": 3},
}


class Interrupted(Exception):
    pass


def train(cfg: Path, *opts: str, stop_at: int | None = None) -> dict:
    """Train with `main.py`, interrupted at the start of step `stop_at`, and return the checkpoint that is left."""
    config, set_rates = load_config(cfg, opts), Schedule.set

    def interrupt(schedule: Schedule, step: int) -> None:
        if step == stop_at:
            raise Interrupted
        set_rates(schedule, step)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Schedule, "set", interrupt)
            main.main(["--cfg", str(cfg), *(["--opts", *opts] if opts else [])])
        assert stop_at is None
    except Interrupted:
        pass
    latest = Path(config.OUTPUT, cfg.stem, config.TAG, LATEST)
    return read_checkpoint(latest) if latest.exists() else {}


def assert_same(a: Any, b: Any) -> None:
    """Check that nested dictionaries, lists and tensors are equal bit for bit."""
    (a_leaves, a_tree), (b_leaves, b_tree) = tree_flatten(a), tree_flatten(b)
    assert a_tree == b_tree and list(map(type, a_leaves)) == list(map(type, b_leaves))
    for x, y in zip(a_leaves, b_leaves):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def without_config(checkpoint: dict) -> dict:
    return {key: value for key, value in checkpoint.items() if key != "config"}


@pytest.fixture(scope="module")
def uninterrupted() -> dict:
    """Hold the final checkpoint and the losses of the uninterrupted run."""
    return {}


@pytest.fixture
def reference(uninterrupted, tiny_cfg, tmp_path) -> dict:
    """Return the final checkpoint of the uninterrupted run, trained by the first test that needs it."""
    if not uninterrupted:
        uninterrupted["checkpoint"] = without_config(train(tiny_cfg("whole", **EVERYTHING)))
        uninterrupted["losses"] = read_log(tmp_path / "output" / "whole" / "default", "train/loss_epoch")
    assert uninterrupted["checkpoint"]["update"] == STEPS
    return uninterrupted["checkpoint"]


INTERRUPTIONS = {  # options, and the step at whose start the run is interrupted
    "between epochs": [((), STEPS // 2)],
    "before the last step": [((), STEPS - 1)],
    "twice, with other numbers of workers": [(("DATA.NUM_WORKERS", "2"), 3), (("DATA.NUM_WORKERS", "1"), 6)],
    "saved at epoch ends only": [(("TRAIN.SAVE_STEPS", "0"), 6)],
}


@pytest.mark.parametrize("case", INTERRUPTIONS)
def test_interrupted_run_ends_as_if_it_were_not(reference, uninterrupted, tiny_cfg, run_dir, case):
    """Weights, EMA weights, optimizer, best accuracy and losses are the same."""
    cfg = tiny_cfg(**EVERYTHING)
    for opts, step in INTERRUPTIONS[case]:
        assert train(cfg, *opts, stop_at=step)["update"] == (STEPS // 2 if "TRAIN.SAVE_STEPS" in opts else step)
    assert_same(without_config(train(cfg)), reference)
    assert read_log(run_dir, "train/loss_epoch") == uninterrupted["losses"]


def test_seed_and_ema_change_the_weights(reference, tiny_cfg):
    other = train(tiny_cfg(**EVERYTHING), "SEED", "1")
    weights = [state["head.weight"] for state in (other["model"], reference["model"], reference["model_ema"])]
    assert not any(torch.equal(weights[i], weights[i - 1]) for i in range(3))
    counts = {key: value for key, value in reference["model_ema"].items() if key.endswith("num_batches_tracked")}
    assert counts and all(value == STEPS * 2 for value in counts.values())  # two micro-batches per step


def test_best_checkpoint_has_the_highest_accuracy(tiny_cfg, run_dir):
    train(tiny_cfg(), "TRAIN.EPOCHS", "4")
    accuracies = read_log(run_dir, "val/acc1")
    best = read_checkpoint(run_dir / BEST)
    assert len(accuracies) == 4 and best["best"] == max(accuracies)
    assert best["update"] == (accuracies.index(max(accuracies)) + 1) * 4


def test_best_accuracy_starts_again_in_another_directory_or_on_other_images(own_folder, tiny_cfg, run_dir):
    changed = ["TRAIN.RESUME_CHANGED", "true", "TRAIN.EPOCHS"]
    cfg = tiny_cfg(DATA={"DATA_PATH": str(own_folder)})
    torch.save(train(cfg) | {"best": 100.0}, run_dir / LATEST)
    assert train(cfg, *changed, "3")["best"] == 100
    main.main(["--cfg", str(cfg), "--resume", str(run_dir / LATEST), "--tag", "b", "--opts", *changed, "4"])
    assert read_checkpoint(run_dir.with_name("b") / BEST)["best"] < 100
    shutil.copytree(own_folder / "val", own_folder / "other")
    assert (latest := train(cfg, *changed, "4", "DATA.VAL_SPLIT", "other"))["best"] < 100
    torch.save(latest | {"best": 100.0}, run_dir / LATEST)
    (own_folder / "other" / "bee" / "1.jpg").unlink()
    assert train(cfg, *changed, "5", "DATA.VAL_SPLIT", "other")["best"] < 100


# ---- log files


def test_log_has_one_line_per_epoch(tiny_cfg, run_dir):
    """An epoch that was logged but not saved is trained again and replaces its line."""
    cfg = tiny_cfg(SAVE_FREQ=2)
    train(cfg, "TRAIN.EPOCHS", "4", stop_at=3 * 4 + 1)
    with open(run_dir / "log.jsonl", "a") as file:
        file.write('{"epoch"}\n{"epoch": 3, "train/l')  # broken lines, one cut short by a kill
    train(cfg, "TRAIN.EPOCHS", "4")
    assert read_log(run_dir, "epoch") == [0, 1, 2, 3]


def test_tensorboard_shows_the_last_value_of_each_step(tmp_path, monkeypatch):
    started = time.time()
    for start, (first, last) in enumerate([(0, 6), (3, 5), (4, 8)]):
        monkeypatch.setattr(time, "time", lambda now=started + start * 3600: now)
        log = RunLog(tmp_path, epoch=0, step=first)
        for step in range(first + 1, last + 1):
            log.scalars({"loss": 100 * start + step}, step)
        log.writer.close()
    values = [(event.step, event.value) for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")]
    assert values == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 205), (6, 206), (7, 207), (8, 208)]


# ---- replacing a checkpoint


@pytest.mark.parametrize("instant", ["fsync", "unlink", "link", "replace"])
def test_latest_checkpoint_exists_at_every_instant(tmp_path, instant):
    """Kill the process in each system call of a replacement. What was saved last is there under its name."""
    latest, previous = tmp_path / LATEST, tmp_path / PREVIOUS
    for step in (1, 2):
        atomic_save({"update": step}, latest, previous)

    def save_and_die() -> None:
        setattr(os, instant, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
        atomic_save({"update": 3}, latest, previous)

    child = get_context("fork").Process(target=save_and_die)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert read_checkpoint(latest)["update"] == 2 and find_resumable(tmp_path)[0] == str(latest)
    kept = {"fsync": [1], "unlink": [1], "link": [], "replace": [2]}[instant]
    assert [read_checkpoint(path)["update"] for path in (previous,) if path.exists()] == kept
    atomic_save({"update": 4}, latest, previous)
    assert [read_checkpoint(path)["update"] for path in (latest, previous)] == [4, 2]


def test_full_disk_and_no_hard_links(tmp_path, monkeypatch):
    """Without hard links, `previous.pth` is a copy. A full disk keeps both files."""

    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", fail)
    for step in (1, 2, 3):
        atomic_save({"update": step}, tmp_path / LATEST, tmp_path / PREVIOUS)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        atomic_save({"update": 4}, tmp_path / LATEST, tmp_path / PREVIOUS)
    assert [read_checkpoint(tmp_path / name)["update"] for name in (LATEST, PREVIOUS)] == [3, 2]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_unreadable_checkpoint_is_not_a_damaged_one(tiny_cfg, finished_run, monkeypatch, number):
    monkeypatch.setattr(zipfile.ZipFile, "testzip", Mock(side_effect=OSError(number, "no")))
    with pytest.raises(OSError) as info:
        train(tiny_cfg())
    assert info.value.errno == number
    assert {path.name for path in finished_run.glob("*.pth*")} == {BEST, LATEST, PREVIOUS}


# ---- checkpoints of other runs


def build_state(config: Config, scaler: GradScaler | None = None) -> TrainState:
    model = build_model(config, torch.device("cpu"))
    scaler = scaler or GradScaler("cpu", enabled=False)
    settings = result_settings(config) | {"train images": "33", "val images": "12"}
    return TrainState(model, build_optimizer(model, config), scaler, None, 4, Path(), list(CLASSES), settings)


@pytest.fixture
def content(finished) -> dict:
    """Return the content of the final checkpoint of a run."""
    return read_checkpoint(finished / LATEST)


def keep(_) -> None:
    pass


@pytest.mark.parametrize(
    "change, options, problem",
    [
        (lambda content: content.pop("optimizer"), [], "--pretrained"),
        (lambda content: content.update(updates_per_epoch=8), [], "8 steps.* 4.*GLOBAL_BATCH"),
        (lambda content: content["optimizer"]["param_groups"].pop(), [], "optimi[sz]er"),
        (keep, ["MODEL.LIT.depths", "[1, 1, 2, 1]"], r"stages\.2\.blocks\.1\."),
        (keep, ["DATA.IMG_SIZE", "64"], "start a new run"),
    ],
)
def test_checkpoint_of_another_run_is_refused(content, tiny_cfg, change, options, problem):
    config = load_config(tiny_cfg(), options)
    state = build_state(config)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    change(content)
    with pytest.raises(CheckpointError, match=f"(?i)^x.pth: .*{problem}") as error:
        restore_checkpoint("x.pth", content, state, config)
    assert "\n" not in str(error.value)
    assert state.step == 0 and not state.optimizer.state
    assert_same(dict(state.model.state_dict()), before)


@pytest.mark.parametrize("scaled_before", [False, True])
def test_loss_scale_is_restored(content, tiny_cfg, scaled_before):
    """The scale of fp16 continues. A run without one starts with the default."""
    before, after = (GradScaler("cpu", enabled=enabled, init_scale=8.0) for enabled in (scaled_before, True))
    before.scale(torch.ones(1))  # creates the scale
    before.update(32.0)
    config = load_config(tiny_cfg())
    state = build_state(config, after)
    restore_checkpoint("x.pth", content | {"scaler": before.state_dict()}, state, config)
    assert state.scaler.get_scale() == (32.0 if scaled_before else 8.0)
    if scaled_before:  # an infinite scale would skip all steps without an error
        for value in (math.inf, math.nan, -1.0, "1"):
            with pytest.raises(CheckpointError, match="'scaler' is not as main.py writes it"):
                restore_checkpoint("x.pth", content | {"scaler": before.state_dict() | {"scale": value}}, state, config)


def test_directory_of_another_run_is_not_overwritten(finished_run, tiny_cfg):
    before = (finished_run / LATEST).read_bytes()
    assert "--tag" in refusal(main, "--cfg", tiny_cfg(), "--opts", "TRAIN.AUTO_RESUME", "false")
    assert (finished_run / LATEST).read_bytes() == before


def remove_image(folder: Path) -> None:
    (folder / "train" / "bee" / "1.jpg").unlink()


@pytest.mark.parametrize(
    "change, options, problems",
    [
        (keep, ["TRAIN.WEIGHT_DECAY", "0.3", "SEED", "1"], ["SEED 0.* 1", "TRAIN.WEIGHT_DECAY 0.05.* 0.3"]),
        (keep, ["TRAIN.BASE_LR", "0.05", "TRAIN.EPOCHS", "3"], ["TRAIN.BASE_LR 0.5.* 0.05", "TRAIN.EPOCHS 2.* 3"]),
        (keep, ["TRAIN.OPTIMIZER.KEYWORDS", "{maximize: true}"], ["TRAIN.OPTIMIZER.KEYWORDS {}.* {.maximize.: true}"]),
        (remove_image, [], ["train images 12.* 11"]),
    ],
)
def test_changed_run_resumes_only_on_demand(own_folder, tiny_cfg, run_dir, tmp_path, change, options, problems):
    cfg = tiny_cfg(DATA={"DATA_PATH": str(own_folder)})
    assert train(cfg, stop_at=1)["update"] == 1
    moved = own_folder.rename(tmp_path / "moved")
    change(moved)
    free = ["DATA.DATA_PATH", str(moved), "DATA.NUM_WORKERS", "1", "PRINT_FREQ", "1"]  # settings without effect
    message = refusal(main, "--cfg", cfg, "--opts", *free, *options)
    assert all(re.match(f"{run_dir / LATEST}: .*{problem}", message) for problem in problems), message
    assert read_checkpoint(run_dir / LATEST)["update"] == 1
    fix = re.search("--opts (TRAIN.RESUME_CHANGED) (true)", message).groups()
    resumed = train(cfg, *free, *options, *fix)
    assert resumed["update"] == 2 + ("TRAIN.EPOCHS" in options)
    decay = 0.3 if "TRAIN.WEIGHT_DECAY" in options else 0.05
    groups = resumed["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [decay, 0.0, decay]  # the new values are in force
    assert groups[0]["initial_lr"] == (0.05 if "TRAIN.BASE_LR" in options else 0.5) / 512 * 8
    assert all(re.search(problem, (run_dir / "log_rank0.txt").read_text()) for problem in problems)
    train(cfg, *free, *options)  # the run that was resumed has these settings now
