"""A run that is interrupted anywhere and resumed ends as if it had not been; a bad checkpoint is refused."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import torch
from lit_classification.config_file import load_config
from lit_classification.resume import BEST, LATEST, TrainState, restore_checkpoint
from lit_classification.run_folder import write_atomically
from lit_classification.training import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from lit_backbone import CheckpointError, read_checkpoint
from lit_classification.config import Config
from lit_classification.logs import RunLog
from lit_classification.model import build_model
from lit_classification.optim import build_optimizer
from tests.classification.conftest import CLASSES

UPDATES = 2 * 4  # epochs x updates per epoch of a tiny run: 33 images in batches of 8
EVERYTHING = {  # all that draws random numbers or carries state from update to update
    "MODEL": {"DROP_PATH_RATE": 0.2, "DROP_RATE": 0.1},
    "TRAIN": {"EMA": 0.9, "SAVE_STEPS": 1},
    "AUG": {"REPEATED": 3},
}


class Interrupted(Exception):
    pass


def train(cfg: Path, *opts: str, stop_after: int | None = None, monkeypatch=None) -> dict:
    """Run `main.py` on a file, killing it after so many updates in all; the checkpoint that it leaves."""
    config = load_config(cfg, opts)
    folder = Path(config.OUTPUT) / cfg.stem / config.TAG
    with monkeypatch.context() as patch:
        run_update = Trainer.run_update

        def run_and_count(self, batches):
            if self.state.update == stop_after:
                raise Interrupted
            return run_update(self, batches)

        patch.setattr(Trainer, "run_update", run_and_count)
        try:
            main.main(["--cfg", str(cfg), *(["--opts", *opts] if opts else [])])
            assert stop_after is None
        except Interrupted:
            pass
    return read_checkpoint(folder / LATEST) if (folder / LATEST).exists() else {}


def assert_same(a, b, path: str = "") -> None:
    """Bit for bit equality of nested dictionaries, lists and tensors."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def without_config(checkpoint: dict) -> dict:
    return {key: value for key, value in checkpoint.items() if key != "config"}


@pytest.fixture(scope="module")
def uninterrupted() -> dict:
    """The final checkpoint of the run with everything on; filled by the first test that needs it."""
    return {}


@pytest.fixture
def reference(uninterrupted, tiny_cfg, monkeypatch) -> dict:
    if not uninterrupted:
        uninterrupted.update(train(tiny_cfg("whole", **EVERYTHING), monkeypatch=monkeypatch))
        assert uninterrupted["update"] == UPDATES
    return without_config(uninterrupted)


@pytest.mark.parametrize("stop_after", [1, UPDATES // 2, UPDATES - 1])  # within an epoch, between two, before the last
def test_interrupted_after_any_update(reference, tiny_cfg, monkeypatch, stop_after):
    """With repeated augmentation, accumulation, mixup, cutmix, drop path, EMA: weights, averages, optimiser, best."""
    cfg = tiny_cfg(**EVERYTHING)
    left = train(cfg, stop_after=stop_after, monkeypatch=monkeypatch)
    assert left.get("update", 0) == stop_after
    assert_same(without_config(train(cfg, monkeypatch=monkeypatch)), reference)


def test_interrupted_twice_with_other_numbers_of_workers(reference, tiny_cfg, monkeypatch):
    cfg = tiny_cfg(**EVERYTHING)
    train(cfg, "DATA.NUM_WORKERS", "2", stop_after=3, monkeypatch=monkeypatch)
    train(cfg, "DATA.NUM_WORKERS", "1", stop_after=6, monkeypatch=monkeypatch)
    assert_same(without_config(train(cfg, monkeypatch=monkeypatch)), reference)


def test_checkpoints_at_epoch_ends_alone_are_enough(reference, tiny_cfg, monkeypatch):
    cfg = tiny_cfg(**EVERYTHING)
    left = train(cfg, "TRAIN.SAVE_STEPS", "0", stop_after=6, monkeypatch=monkeypatch)
    assert left["update"] == 4
    final = train(cfg, "TRAIN.SAVE_STEPS", "0", monkeypatch=monkeypatch)
    assert_same(without_config(final), reference)


def test_another_seed_is_another_run(reference, tiny_cfg, monkeypatch):
    other = train(tiny_cfg(**EVERYTHING), "SEED", "1", monkeypatch=monkeypatch)
    assert not torch.equal(other["model"]["head.weight"], reference["model"]["head.weight"])


def test_integer_buffers_are_not_averaged(reference):
    counts = {key: value for key, value in reference["model_ema"].items() if key.endswith("num_batches_tracked")}
    assert counts and all(value == UPDATES * 2 for value in counts.values())  # two micro-batches an update
    assert not torch.equal(reference["model_ema"]["head.weight"], reference["model"]["head.weight"])


def test_the_log_has_one_line_per_epoch(tiny_cfg, monkeypatch, tmp_path):
    """An epoch that is run again, because its end was not saved, replaces its record."""
    cfg = tiny_cfg(SAVE_FREQ=3)
    train(cfg, "TRAIN.EPOCHS", "5", stop_after=4 * 4 + 1, monkeypatch=monkeypatch)
    with open(tmp_path / "output" / "tiny" / "default" / "log.jsonl", "a") as file:
        file.write('{"epoch": 4, "train/l')  # killed while writing
    train(cfg, "TRAIN.EPOCHS", "5", monkeypatch=monkeypatch)
    lines = (tmp_path / "output" / "tiny" / "default" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2, 3, 4]


def test_the_log_is_whole_until_its_successor_is(tmp_path, monkeypatch):
    log, lines = tmp_path / "log.jsonl", '{"epoch": 0}\n{"epoch": 1}\n'
    log.write_text(lines)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(Interrupted))
        RunLog(tmp_path, epoch=1)
    assert log.read_text() == lines
    RunLog(tmp_path, epoch=1)
    assert log.read_text() == '{"epoch": 0}\n'


def test_tensorboard_shows_the_last_point_of_each_update(tmp_path, monkeypatch):
    began = time.time()
    for start, (first, last) in enumerate([(0, 6), (3, 5), (4, 8)]):
        monkeypatch.setattr(time, "time", lambda now=began + start * 3600: now)
        log = RunLog(tmp_path, epoch=0, update=first)
        for update in range(first + 1, last + 1):
            log.scalars({"loss": 100 * start + update}, update)
        log.writer.close()
    points = [(event.step, event.value) for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")]
    assert points == [(1, 1), (2, 2), (3, 3), (4, 104), (5, 205), (6, 206), (7, 207), (8, 208)]


def test_the_best_of_another_folder_or_other_images_is_not_this_runs(own_folder, tiny_cfg, monkeypatch, tmp_path):
    folder, anew = tmp_path / "output" / "tiny", ["TRAIN.RESUME_CHANGED", "true", "TRAIN.EPOCHS"]
    cfg = tiny_cfg(DATA={"DATA_PATH": str(own_folder)})
    train(cfg, monkeypatch=monkeypatch)
    content = read_checkpoint(folder / "default" / LATEST) | {"best": 100.0}
    torch.save(content, folder / "default" / LATEST)
    assert train(cfg, *anew, "3", monkeypatch=monkeypatch)["best"] == 100  # is in best.pth
    main.main(["--cfg", str(cfg), "--resume", str(folder / "default" / LATEST), "--tag", "b", "--opts", *anew, "4"])
    assert read_checkpoint(folder / "b" / BEST)["best"] < 100
    (own_folder / "val" / "bee" / "1.jpg").unlink()
    assert train(cfg, *anew, "4", monkeypatch=monkeypatch)["best"] < 100


def test_automatic_resume_can_be_off(tiny_cfg, monkeypatch):
    cfg = tiny_cfg()
    train(cfg, monkeypatch=monkeypatch)
    left = train(cfg, "TRAIN.AUTO_RESUME", "false", "TRAIN.SAVE_STEPS", "1", stop_after=1, monkeypatch=monkeypatch)
    assert left["update"] == 1


def test_best_is_the_highest_accuracy(tiny_cfg, monkeypatch, tmp_path):
    train(tiny_cfg(), "TRAIN.EPOCHS", "6", monkeypatch=monkeypatch)
    folder = tmp_path / "output" / "tiny" / "default"
    records = [line.split('"val/acc1": ')[1] for line in (folder / "log.jsonl").read_text().splitlines()]
    accuracies = [float(record.split(",")[0]) for record in records]
    best = read_checkpoint(folder / BEST)
    assert len(accuracies) == 6 and best["best"] == max(accuracies)
    assert best["update"] == (accuracies.index(max(accuracies)) + 1) * 4


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / LATEST
    write_atomically(path, {"update": 1})
    (tmp_path / f".{LATEST}.tmp").write_bytes(b"left by a killed run")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="cannot be written .No space left on device"):
        write_atomically(path, {"update": 2})
    assert read_checkpoint(path) == {"update": 1} and list(tmp_path.iterdir()) == [path]


# ---- checkpoints that cannot be resumed


def state_of(config: Config) -> TrainState:
    model = build_model(config, torch.device("cpu"))
    optimizer = build_optimizer(model, config)
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, 4, list(CLASSES))


def assert_refused(path: Path, config: Config, *parts: str) -> None:
    state = state_of(config)
    with pytest.raises(CheckpointError) as caught:
        restore_checkpoint(str(path), read_checkpoint(path), state, config)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(part in message for part in parts), message
    assert state.update == 0


@pytest.fixture
def checkpoint(tiny_cfg, tmp_path, monkeypatch) -> Path:
    train(tiny_cfg(), stop_after=None, monkeypatch=monkeypatch)
    return tmp_path / "output" / "tiny" / "default" / LATEST


def test_weights_alone_are_no_run_to_resume(checkpoint, tiny_cfg, tmp_path):
    torch.save(read_checkpoint(checkpoint)["model"], tmp_path / "weights.pth")
    assert_refused(tmp_path / "weights.pth", load_config(tiny_cfg()), "--pretrained")


def test_checkpoint_of_another_model(checkpoint, tiny_cfg):
    config = load_config(tiny_cfg(), ["MODEL.LIT.depths", "[1, 1, 2, 1]"])
    assert_refused(checkpoint, config, "stages.2.blocks.1.")


def test_checkpoint_of_another_head(checkpoint, tiny_cfg):
    assert_refused(checkpoint, load_config(tiny_cfg(), ["MODEL.NUM_CLASSES", "5"]), "3 classes", "5")


def test_checkpoint_of_epochs_of_another_length(checkpoint, tiny_cfg, tmp_path):
    content = read_checkpoint(checkpoint) | {"updates_per_epoch": 8}
    torch.save(content, tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", load_config(tiny_cfg()), "8 updates", "TRAIN.GLOBAL_BATCH")


def drop_a_group(optimizer: dict) -> None:
    optimizer["param_groups"].pop()


def flatten_a_moment(optimizer: dict) -> None:
    moments = next(state for state in optimizer["state"].values() if state["exp_avg"].dim() > 1)
    moments["exp_avg"] = moments["exp_avg"].flatten()


def make_it_sgd(optimizer: dict) -> None:
    for group in optimizer["param_groups"]:
        del group["betas"]
        group["momentum"] = 0.9
    optimizer["state"] = {i: {"momentum_buffer": state["exp_avg"]} for i, state in optimizer["state"].items()}


@pytest.mark.parametrize("change", [drop_a_group, flatten_a_moment, make_it_sgd])
def test_optimiser_state_of_another_model(checkpoint, tiny_cfg, tmp_path, change):
    content = read_checkpoint(checkpoint)
    change(content["optimizer"])
    torch.save(content, tmp_path / "other.pth")
    assert_refused(tmp_path / "other.pth", load_config(tiny_cfg()), "optimiser")


def test_checkpoint_of_another_image_size(checkpoint, tiny_cfg):
    assert_refused(checkpoint, load_config(tiny_cfg(), ["DATA.IMG_SIZE", "64"]), "DATA.IMG_SIZE", "--pretrained")


@pytest.mark.parametrize("scaled_before", [False, True])
def test_loss_scaling_is_restored(checkpoint, tiny_cfg, tmp_path, scaled_before):
    """fp16's scale continues where it stood; a run that had none starts with its own."""
    before, after = (torch.amp.GradScaler("cpu", enabled=enabled, init_scale=8.0) for enabled in (scaled_before, True))
    before.scale(torch.ones(1))  # which makes the scale
    before.update(32.0)
    torch.save(read_checkpoint(checkpoint) | {"scaler": before.state_dict()}, tmp_path / "other.pth")
    config = load_config(tiny_cfg())
    state = state_of(config)
    state.scaler, state.recipe = after, read_checkpoint(checkpoint)["recipe"]
    restore_checkpoint("other.pth", read_checkpoint(tmp_path / "other.pth"), state, config)
    assert state.scaler.get_scale() == (32.0 if scaled_before else 8.0)


def test_truncated_checkpoint(checkpoint, tiny_cfg, tmp_path):
    (tmp_path / "half.pth").write_bytes(checkpoint.read_bytes()[:5000])
    assert_refused(tmp_path / "half.pth", load_config(tiny_cfg()), "truncated")


def drop_nothing(folder: Path) -> None:
    """The same data."""


def rename_an_image(folder: Path) -> None:
    (folder / "train" / "bee" / "1.jpg").rename(folder / "train" / "bee" / "01.jpg")


def rename_a_class(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "bee").rename(folder / split / "bug")


@pytest.mark.parametrize(
    "change, options, complaint, change_logged",
    [
        (drop_nothing, ["TRAIN.WEIGHT_DECAY", "0.3"], "was written with TRAIN.WEIGHT_DECAY 0.05, this run has 0.3", ""),
        (drop_nothing, ["SEED", "1", "AUG.HFLIP", "0"], r"HFLIP 0.5, this run has 0.0 \(and 1 more change", "SEED 0, "),
        (drop_nothing, ["TRAIN.BASE_LR", "0.05"], "was written with TRAIN.BASE_LR 0.5, this run has 0.05", ""),
        (drop_nothing, ["TRAIN.EPOCHS", "3"], "TRAIN.EPOCHS 2, this run has 3", ""),
        (rename_an_image, [], r"train/bee 4 files \w+, this run has 4 files \w+", ""),
        (rename_a_class, [], "its classes are not those of the data", "class 1 bee, this run has bug"),
    ],
)
def test_a_run_that_is_not_the_same_goes_on_when_told_to(
    own_folder, tiny_cfg, monkeypatch, tmp_path, change, options, complaint, change_logged
):
    cfg = tiny_cfg(DATA={"DATA_PATH": str(own_folder)})
    assert train(cfg, stop_after=1, monkeypatch=monkeypatch)["update"] == 1
    moved = own_folder.rename(tmp_path / "moved")
    change(moved)
    folder = tmp_path / "output" / "tiny" / "default"
    free = ["DATA.DATA_PATH", str(moved), "DATA.NUM_WORKERS", "1", "PRINT_FREQ", "1"]  # settings without effect
    with pytest.raises(SystemExit, match=complaint) as caught:
        train(cfg, *free, *options, monkeypatch=monkeypatch)
    assert "\n" not in str(caught.value) and str(folder / LATEST) in str(caught.value)
    assert read_checkpoint(folder / LATEST)["update"] == 1
    remedy = re.search("--opts (TRAIN.RESUME_CHANGED) (true)", str(caught.value)).groups()
    left = train(cfg, *free, *options, *remedy, monkeypatch=monkeypatch)
    assert left["update"] == 2 + ("TRAIN.EPOCHS" in options)
    decay = 0.3 if "TRAIN.WEIGHT_DECAY" in options else 0.05
    groups = left["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [decay, 0.0, decay]  # is in force
    assert groups[0]["initial_lr"] == (0.05 if "TRAIN.BASE_LR" in options else 0.5) / 512 * 8
    assert re.search(change_logged or complaint, (folder / "log_rank0.txt").read_text())
    train(cfg, *free, *options, monkeypatch=monkeypatch)  # the same as before now
