"""Data, files and interruptions that once gave wrong or lost results without a message."""

import errno
import json
import logging
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

import main
from lit_backbone import CheckpointError, load_checkpoint, read_checkpoint
from lit_backbone.datasets import ImageFolder, ImageTar
from lit_backbone.images import DataError
from lit_classification import engine
from lit_classification.checkpointing import LATEST, PREVIOUS
from tests.classification.conftest import TINY_LIT

TINY = TINY_LIT | {"img_size": 32}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "output" / "tiny" / "default"


def train(cfg: Path, *options: str) -> None:
    main.main(["--cfg", str(cfg), *(["--opts", *options] if options else [])])


def refusal(cfg: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as info:
        train(cfg, *options)
    return str(info.value)


# ---- datasets


def test_one_class_is_refused(tiny_cfg, own_folder):
    for name in ("bee", "cat"):
        for split in ("train", "val"):
            shutil.rmtree(own_folder / split / name)
    cfg = tiny_cfg(DATA={"DATA_PATH": str(own_folder)}, MODEL={"NUM_CLASSES": 1})
    assert "has one class" in refusal(cfg)


@pytest.mark.parametrize("archive", [False, True])
def test_what_is_skipped_is_logged(own_folder, archive, caplog):
    train_dir = own_folder / "train"
    for name in (
        "__MACOSX/x.jpg",
        ".ipynb_checkpoints/x.jpg",
        "ant/@eaDir/0.jpg",
        "ant/._0.jpg",
        "bee/notes.txt",
        "x.jpg",
    ):
        (train_dir / name).parent.mkdir(exist_ok=True)
        shutil.copy(train_dir / "ant" / "0.jpg", train_dir / name)
    shutil.copy(train_dir / "ant" / "0.jpg", train_dir / "bee" / "new.jfif")
    if archive:
        with tarfile.open(own_folder / "train.tar", "w") as tar:
            tar.add(train_dir, "train")
    caplog.set_level(logging.INFO)
    dataset = ImageTar(own_folder / "train.tar") if archive else ImageFolder(train_dir)
    assert dataset.classes == ["ant", "bee", "cat"] and len(dataset) == 13
    assert "13 images in 3 classes" in caplog.text
    assert "1 .txt" in caplog.text and "1 in no class folder" in caplog.text and "hidden" in caplog.text


def test_an_empty_class_is_an_error_in_folders_and_archives(own_folder):
    (own_folder / "train" / "asp").mkdir()
    with tarfile.open(own_folder / "train.tar", "w") as tar:
        tar.add(own_folder / "train", "train")
    for kind, path in ((ImageFolder, own_folder / "train"), (ImageTar, own_folder / "train.tar")):
        with pytest.raises(DataError, match="no images in class folders asp"):
            kind(path)


def test_splits_may_have_other_names(tiny_cfg, own_folder, run_dir):
    (own_folder / "val").rename(own_folder / "test")
    cfg = tiny_cfg(DATA={"DATA_PATH": str(own_folder), "VAL_SPLIT": "test"})
    train(cfg, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    assert read_checkpoint(run_dir / LATEST)["evaluated"] == 1


# ---- runs


def test_an_unreadable_validation_image_does_not_cost_the_epoch(tiny_cfg, own_folder, run_dir):
    """The probe of DTM reads some images at the start, so the last image of many is damaged."""
    for i in range(40):
        shutil.copy(own_folder / "val" / "cat" / "0.jpg", own_folder / "val" / "cat" / f"x{i}.jpg")
    bad = own_folder / "val" / "cat" / "x9.jpg"
    sound = bad.read_bytes()
    bad.write_bytes(sound[:200])
    cfg = tiny_cfg(DATA={"DATA_PATH": str(own_folder)})
    assert str(bad) in refusal(cfg)
    assert read_checkpoint(run_dir / LATEST)["update"] == 12 // 8
    bad.write_bytes(sound)
    train(cfg)
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]


def test_the_mean_of_an_interrupted_epoch_covers_all_its_steps(tiny_cfg, run_dir, monkeypatch):
    cfg = tiny_cfg(TRAIN={"SAVE_STEPS": 1})
    train(cfg, "TAG", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(engine.Schedule, "set", stop_at(2, engine.Schedule.set))
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
    train(cfg)
    records = [(run_dir.parent / tag / "log.jsonl").read_text() for tag in ("whole", "default")]
    first, second = ([json.loads(line)["train/loss_epoch"] for line in text.splitlines()] for text in records)
    assert first == second


def stop_at(step: int, set_rates: Callable) -> Callable:
    def set_or_stop(schedule: engine.Schedule, current: int) -> None:
        if current == step:
            raise KeyboardInterrupt
        set_rates(schedule, current)

    return set_or_stop


def test_a_run_directory_that_holds_a_run_is_not_overwritten(tiny_cfg, run_dir):
    cfg = tiny_cfg()
    train(cfg)
    before = (run_dir / LATEST).read_bytes()
    assert "choose another --tag" in refusal(cfg, "TRAIN.AUTO_RESUME", "false")
    assert (run_dir / LATEST).read_bytes() == before


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_an_unreadable_checkpoint_is_not_a_damaged_one(tiny_cfg, run_dir, monkeypatch, number):
    cfg = tiny_cfg()
    train(cfg)
    with monkeypatch.context() as patch, pytest.raises(OSError) as info:
        patch.setattr(zipfile.ZipFile, "testzip", lambda _: (_ for _ in ()).throw(OSError(number, "no")))
        train(cfg)
    assert info.value.errno == number
    assert sorted(path.name for path in run_dir.glob("*.pth*")) == sorted({"best.pth", LATEST, PREVIOUS})


# ---- weights


def tiny_model(**kwargs) -> torch.nn.Module:
    return timm.create_model("lit_s", **TINY | kwargs)


def pretrained(file: Path, **kwargs) -> torch.nn.Module:
    return tiny_model(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs)


DOORS: dict[str, Callable[[Path], object]] = {
    "load_checkpoint": lambda file: load_checkpoint(file, tiny_model()),
    "pretrained": pretrained,
    "pretrained, other classes": lambda file: pretrained(file, num_classes=7),
    "pretrained, no head": lambda file: pretrained(file, num_classes=0),
    "pretrained, features": lambda file: pretrained(file, features_only=True),
}
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "half": (lambda weights: dict(list(weights.items())[::2]), "keys missing"),
    "another model": (
        lambda _: timm.create_model("lit_s", **TINY | {"depths": [1, 1, 2, 1]}).state_dict(),
        "unexpected",
    ),
    "another width": (lambda _: tiny_model(embed_dims=[16, 32, 48, 64]).state_dict(), "shapes different"),
    "NaN": (lambda weights: weights | {"norm.weight": weights["norm.weight"] * torch.nan}, "not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_unsuitable_weights(door, fault, tmp_path):
    change, words = FAULTS[fault]
    torch.save(tiny_model().state_dict(), tmp_path / "sound.pth")
    DOORS[door](tmp_path / "sound.pth")
    torch.save(change(tiny_model().state_dict()), tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/bad.pth: .*{words}"):
        DOORS[door](tmp_path / "bad.pth")


def test_sound_files_in_unusual_forms_are_read(tmp_path):
    """NumPy numbers beside the weights, a common prefix, safetensors under another suffix."""
    model = tiny_model()
    weights = model.state_dict()
    torch.save({"model": weights, "best_acc1": np.float64(81.5)}, tmp_path / "numpy.pth")
    torch.save({"state_dict": {f"model.{key}": value for key, value in weights.items()}}, tmp_path / "lightning.ckpt")
    save_file(weights, tmp_path / "weights.bin")
    for name in ("numpy.pth", "lightning.ckpt", "weights.bin"):
        assert torch.equal(load_checkpoint(tmp_path / name, model)["norm.weight"], weights["norm.weight"]), name
    assert read_checkpoint(tmp_path / "numpy.pth")["best_acc1"] == 81.5
