"""The program as it is used: training, evaluation, timing, fine-tuning, several processes, and what goes wrong."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from traceback import walk_stack

import lit_classification.run
import pytest
import timm
import torch
from lit_classification.config_file import load_config
from lit_classification.loaders import build_val_loader
from lit_classification.resume import BEST, FAILED, LATEST
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.amp import GradScaler
from torch.overrides import TorchFunctionMode

import main
import predict
from lit_backbone import lit, load_checkpoint, read_checkpoint
from lit_classification import sampler, training
from lit_classification.config import Config
from lit_classification.distributed import Processes, to_device
from lit_classification.model import build_model
from tests.classification.conftest import CLASSES
from tests.crafted import shared
from tests.programs import Program, start_pair
from tools import export

MAIN = Path(main.__file__)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "output" / "tiny" / "default"


def test_a_run_leaves_what_is_promised(tiny_cfg, folder):
    cfg = tiny_cfg()
    printed = subprocess.check_output([sys.executable, MAIN, "--cfg", cfg, "--opts", "TRAIN.EPOCHS", "3"], text=True)
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {
        "config", "starts", "log", "log_rank0", "latest", "previous", "best", "events",
    }  # fmt: skip
    assert load_config(folder / "config.yaml") == load_config(cfg, ["TRAIN.EPOCHS", "3"])
    start = json.loads((folder / "starts.jsonl").read_text())
    assert "TRAIN.EPOCHS 3" in start["command"] and start["torch"] == torch.__version__
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert all(record["val/images"] == 12 for record in records)

    console = (folder / "log_rank0.txt").read_text()
    assert console.count("\n") >= 9 and all(line in printed for line in console.splitlines())
    assert "batch 4 x 1 processes x 2 accumulated = 8 images per update, 4 updates per epoch" in console
    assert re.search(
        r"epoch 2 \[4/4\] eta 0:00:00 lr \S+ loss \S+ \(\S+\) grad norm \S+ \S+ img/s mem \S+ GiB", console
    )

    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "lr/decay", "lr/no_decay", "lr/offset", "val/acc1", "val/acc5"} <= tags
    for stage in (1, 2, 3):
        lengths = [event.value for event in events.Scalars(f"dtm/stages.{stage}.merge/length")]
        assert len(lengths) == 3 and all(length > 0 for length in lengths)  # they start at zero and learn
        assert all(0 <= event.value < 0.5 for event in events.Scalars(f"dtm/stages.{stage}.merge/outside"))
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]


def accuracy_by_hand(cfg: Path, checkpoint: Path) -> float:
    config = load_config(cfg)
    model = build_model(config, torch.device("cpu")).eval()
    model.load_state_dict(load_checkpoint(checkpoint))
    images = build_val_loader(config, Processes(0, 1, torch.device("cpu"))).dataset.dataset
    with torch.no_grad():
        hits = [model(image[None]).argmax().item() == target for image, target in map(images.__getitem__, range(12))]
    return 100 * sum(hits) / len(hits)


def test_evaluation_prints_the_published_lines(tiny_cfg, folder):
    cfg = tiny_cfg()
    main.main(["--cfg", str(cfg)])
    before = sorted(folder.iterdir())
    printed = Program(MAIN, "--cfg", cfg, "--eval", "--resume", folder / BEST).finish()
    accuracy = accuracy_by_hand(cfg, folder / BEST)
    expected = (
        f"\n * Acc@1 {accuracy:.3f} Acc@5 100.000\nAccuracy of the network on the 12 test images: {accuracy:.1f}%\n"
    )
    assert expected in printed
    assert accuracy == pytest.approx(read_checkpoint(folder / BEST)["best"])
    assert sorted(folder.iterdir()) == before  # evaluation writes nothing


def test_an_export_is_the_classifier_that_it_was_made_of(own_folder, tiny_cfg, folder, tmp_path, capsys):
    """Where ImageNet's folders are called n01440764, they are shown as tench, and stay what data are compared with."""
    for split in ("train", "val"):
        for name, synset in zip(CLASSES, ("n01440764", "n01443537", "n01484850")):
            (own_folder / split / name).rename(own_folder / split / synset)
    cfg = tiny_cfg(DATA={"DATA_PATH": str(own_folder)}, TRAIN={"EPOCHS": 1, "WARMUP_EPOCHS": 0}, TEST={"CROP": False})
    main.main(["--cfg", str(cfg)])
    exported = tmp_path / "exported.safetensors"
    export.main([str(folder / LATEST), "--format", "safetensors", "--output", str(exported)])
    said = []
    for file in (folder / LATEST, exported):
        capsys.readouterr()
        main.main(["--cfg", str(cfg), "--eval", "--resume", str(file)])
        predict.main([str(own_folder / "val"), "--checkpoint", str(file)])
        said.append([line for line in capsys.readouterr().out.splitlines() if str(file) not in line])
    assert [line[15:] for line in said[0]] == [line[15:] for line in said[1]] and "tench" in "".join(said[1])
    main.main(["--cfg", str(cfg), "--pretrained", str(exported), "--tag", "tuned"])
    assert "anew" not in capsys.readouterr().out.replace("all but what is said to be anew", "")


def test_another_model_of_timm_takes_its_keywords_from_yaml(tiny_cfg, folder, image_folder, capsys):
    """A checkpoint may not bring them: nobody bounds what they make timm do."""
    keywords = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]}
    cfg = tiny_cfg(
        MODEL={"NAME": "pvt_v2_b0", "LIT": {}, "KEYWORDS": keywords}, TRAIN={"EPOCHS": 1, "WARMUP_EPOCHS": 0}
    )
    main.main(["--cfg", str(cfg)])
    main.main(["--cfg", str(cfg), "--eval", "--resume", str(folder / LATEST)])
    accuracy = json.loads((folder / "log.jsonl").read_text())["val/acc1"]
    printed = capsys.readouterr()
    assert f" * Acc@1 {accuracy:.3f}" in printed.out and "KEYWORDS" not in printed.out + printed.err
    other = ["--opts", "MODEL.KEYWORDS.num_heads", "[1, 1, 3, 4]"]  # of the same shapes
    main.main(["--cfg", str(cfg), "--eval", "--resume", str(folder / LATEST), *other])
    printed = capsys.readouterr()
    assert re.search(
        r"MODEL.KEYWORDS is .*num_heads': \[1, 1.*trained with .*num_heads': \[1, 2", printed.out + printed.err
    )
    content = read_checkpoint(folder / LATEST)
    content["config"]["MODEL"]["KEYWORDS"] = shared()  # of which a message must not tell all
    torch.save(content, folder / "crafted.pth")
    main.main(["--cfg", str(cfg), "--eval", "--resume", str(folder / "crafted.pth")])
    with pytest.raises(SystemExit, match="latest.pth: has MODEL.KEYWORDS, which count in YAML only"):
        predict.main([str(image_folder), "--checkpoint", str(folder / LATEST)])


def test_evaluation_of_the_moving_average(tiny_cfg, folder, capsys):
    cfg = tiny_cfg(TRAIN={"EMA": 0.999})  # so slow that it has hardly left the initial weights
    main.main(["--cfg", str(cfg)])
    assert "TRAIN.EMA 0.999: 99% of the last average are initial weights; lower it" in capsys.readouterr().out
    main.main(["--cfg", str(cfg), "--eval", "--resume", str(folder / LATEST)])
    accuracy = accuracy_by_hand(cfg, folder / LATEST)
    assert f" * Acc@1 {accuracy:.3f} " in capsys.readouterr().out
    content = read_checkpoint(folder / LATEST)
    assert not torch.equal(content["model"]["head.weight"], content["model_ema"]["head.weight"])


def test_the_average_counts_whatever_the_evaluating_configuration_says(tiny_cfg, folder, capsys):
    main.main(["--cfg", str(tiny_cfg(TRAIN={"EMA": 0.999}))])
    capsys.readouterr()
    main.main(["--cfg", str(tiny_cfg()), "--eval", "--resume", str(folder / LATEST), "--batch-size", "5"])
    assert f" * Acc@1 {accuracy_by_hand(tiny_cfg(), folder / LATEST):.3f} " in capsys.readouterr().out


def test_rates_below_their_floor_are_told(tiny_cfg, folder, capsys):
    main.main(["--cfg", str(tiny_cfg()), "--opts", "TRAIN.MIN_LR", "0.01", "TRAIN.WARMUP_EPOCHS", "0"])
    out = capsys.readouterr().out
    assert "learning rates of offset rise from 7.81e-05 to MIN_LR, 0.000156" in out and "rates of decay rise" not in out


def test_classes_of_weights_without_names_are_told_where_order_counts(tiny_cfg, image_folder, folder, tmp_path, capsys):
    """torchvision's data sets, the original's among them, order 10 before 9."""
    for number, name in zip((9, 10, "x"), CLASSES):
        for split in ("train", "val"):
            shutil.copytree(image_folder / split / name, tmp_path / "numbers" / split / str(number))
    command = ["--cfg", str(tiny_cfg()), "--data-path", str(tmp_path / "numbers")]
    main.main(command)
    content = read_checkpoint(folder / LATEST)
    torch.save({"model": content["model"]}, tmp_path / "bare.pth")
    torch.save({"model": content["model"], "classes": ["10", "9", "x"]}, tmp_path / "named.pth")
    capsys.readouterr()
    main.main([*command, "--eval", "--resume", str(tmp_path / "bare.pth")])
    said = capsys.readouterr().out
    assert said.count("bare.pth: names no classes, which are taken to be in this order: 9, 10, x; if") == 1
    with pytest.raises(SystemExit, match="its classes are not those of the data: 3 with 10, 9 against 3 with 9, 10"):
        main.main([*command, "--eval", "--resume", str(tmp_path / "named.pth")])


def test_a_finished_run_says_that_it_ignores_new_weights(tiny_cfg, folder, capsys):
    main.main(["--cfg", str(tiny_cfg())])
    capsys.readouterr()
    main.main(["--cfg", str(tiny_cfg()), "--pretrained", "other.pth"])
    out = capsys.readouterr().out
    assert f"{folder / LATEST} exists and is continued, not other.pth; name another run with --tag" in out
    assert "finished already, after 2 epochs" in out


def test_a_finished_run_is_left_as_it_is(tiny_cfg, folder, capsys):
    """Whatever the command asks for, but for more epochs as the message says."""
    main.main(["--cfg", str(tiny_cfg())])
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    capsys.readouterr()
    for options in ([], ["TRAIN.BASE_LR", "0.1", "TRAIN.GLOBAL_BATCH", "4"], ["MODEL.LIT.depths", "[1, 1, 1, 2]"]):
        main.main(["--cfg", str(tiny_cfg()), *(["--opts", *options] if options else [])])
        out = capsys.readouterr().out
        assert f"{folder / LATEST}: finished already, after 2 epochs" in out and "--tag NAME" in out
        assert all(f", {key} " in out for key in options[::2]) and out.count("has no effect") == len(options) // 2
        assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    remedy = re.search("(--opts TRAIN.RESUME_CHANGED true TRAIN.EPOCHS 3) or more go on", out)[1]
    main.main(["--cfg", str(tiny_cfg()), *remedy.split()])
    assert "finished 3 epochs" in capsys.readouterr().out and read_checkpoint(folder / LATEST)["update"] == 12


def test_the_configuration_that_a_run_leaves_continues_it(tiny_cfg, folder, tmp_path, monkeypatch):
    """From any folder, unless the command names another run; a file of one's own may have the same name."""
    monkeypatch.chdir(tmp_path)
    longer = ["--opts", "TRAIN.RESUME_CHANGED", "true", "TRAIN.EPOCHS"]
    main.main(["--cfg", str(tiny_cfg(OUTPUT="output"))])
    main.main(["--cfg", str(folder.relative_to(tmp_path) / "config.yaml"), *longer, "3"])
    monkeypatch.chdir(folder)
    main.main(["--cfg", "config.yaml", *longer, "4"])
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [start["update"] for start in starts] == [0, 8, 12]
    main.main(["--cfg", "config.yaml", "--tag", "1", "--opts", "TRAIN.EPOCHS", "2"])
    main.main(["--cfg", "config.yaml", "--opts", "TAG", '"1"', "TRAIN.RESUME_CHANGED", "true"])
    main.main(["--cfg", "config.yaml", "--output", str(tmp_path / "new")])
    shutil.copy("config.yaml", tmp_path)
    main.main(["--cfg", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "own")])
    runs = ["new/tiny/default", "output/tiny/1", "output/tiny/default", "own/config/default"]
    assert sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(LATEST)) == runs
    assert read_checkpoint(tmp_path / "output/tiny/1" / LATEST)["update"] == 16  # continued for the epochs in the file


def test_throughput_needs_no_data(tiny_cfg, capsys):
    cfg = tiny_cfg(TRAIN={"WARMUP_EPOCHS": 5, "GLOBAL_BATCH": 7})  # nor a schedule that trains
    main.main(["--cfg", str(cfg), "--throughput", "--data-path", "/no/such/place"])
    assert re.search(r"lit_s: [1-9][0-9.]* images/s per process at batch size 4", capsys.readouterr().out)


def link_classes(image_folder: Path, root: Path, **folders: str) -> Path:
    """A data set of images that are there already, by the new name of each class."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for new, old in folders.items():
            (root / split / new).symlink_to(image_folder / split / old)
    return root


def test_fine_tuning_at_another_size_with_other_classes(tiny_cfg, folder, image_folder, tmp_path):
    main.main(["--cfg", str(tiny_cfg())])
    two = link_classes(image_folder, tmp_path / "two", ant="ant", cat="cat")
    fine_tuned = tiny_cfg("fine", DATA={"IMG_SIZE": [64, 96], "DATA_PATH": str(two)}, MODEL={"NUM_CLASSES": 2})
    main.main(["--cfg", str(fine_tuned), "--pretrained", str(folder / LATEST), "--opts", "TRAIN.BASE_LR", "1e-9"])
    message = "its classes are not those of the data: 3 with bee, cat against 2 with cat; the head is initialised anew"
    log = tmp_path / "output" / "fine" / "default" / "log_rank0.txt"
    assert f"{folder / LATEST}: {message}" in log.read_text()
    before = read_checkpoint(folder / LATEST)["model"]
    after = read_checkpoint(log.with_name(LATEST))["model"]
    assert after["head.weight"].shape == (2, 32) and after["stages.2.blocks.0.attn.rel_pos_bias"].shape == (1, 3, 7, 11)
    weight = "stages.2.blocks.0.mlp.fc1.weight"
    assert torch.allclose(before[weight], after[weight], atol=1e-6)


def test_two_of_three_classes_are_renamed(tiny_cfg, folder, image_folder, tmp_path, capsys):
    """Refused where the head goes on being used, and as many classes get a new head; a file without names passes."""
    main.main(["--cfg", str(tiny_cfg(TRAIN={"EPOCHS": 2}))])
    renamed = link_classes(image_folder, tmp_path / "renamed", ant="ant", cow="bee", wasp="cat")
    other, problem = ["--cfg", tiny_cfg(), "--data-path", renamed], "3 with bee, cat against 3 with cow, wasp"
    latest = str(folder / LATEST)
    before = (folder / LATEST).read_bytes()
    assert_fails(capsys, [*other, "--eval", "--resume", latest], f"{latest}: its classes", problem)
    assert_fails(capsys, [*other, "--opts", "TRAIN.EPOCHS", "3"], f"{latest}: its classes", problem, "--tag NAME")
    assert (folder / LATEST).read_bytes() == before
    main.main([*map(str, other), "--tag", "new", "--pretrained", latest, "--opts", "TRAIN.BASE_LR", "1e-9"])
    assert f"{problem}; the head is initialised anew" in (folder.parent / "new" / "log_rank0.txt").read_text()
    old, new = (read_checkpoint(path / LATEST)["model"] for path in (folder, folder.parent / "new"))
    drawn = build_model(load_config(tiny_cfg()), torch.device("cpu")).head.weight
    assert torch.allclose(new["head.weight"], drawn, atol=1e-6) and not torch.allclose(old["head.weight"], drawn)

    torch.save(old, tmp_path / "bare.pth")
    capsys.readouterr()
    main.main([*map(str, other), "--eval", "--resume", str(tmp_path / "bare.pth")])
    assert "Acc@1" in capsys.readouterr().out


def test_a_checkpoint_brings_its_model_and_input(tiny_cfg, folder, tmp_path, capsys):
    """Trained at 96 x 160, evaluated with a recipe for 224 x 224, which could not train."""
    cfg = tiny_cfg(DATA={"IMG_SIZE": [96, 160], "INTERPOLATION": "bilinear"}, TEST={"CROP": False})
    main.main(["--cfg", str(cfg)])
    record = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    recipe = {"DATA": {"IMG_SIZE": 224}, "MODEL": {"NUM_CLASSES": 9, "LIT": {"merging": "conv"}}}
    recipe |= {"TRAIN": {"WARMUP_EPOCHS": 5, "GLOBAL_BATCH": 7}}
    command = ["--cfg", str(tiny_cfg("recipe", **recipe)), "--eval", "--resume", str(folder / LATEST)]
    main.main(command)
    out = capsys.readouterr().out
    assert f" * Acc@1 {record['val/acc1']:.3f} " in out and f"loss {record['val/loss']:.3f}\n" in out
    for line in (
        f"DATA.IMG_SIZE is [96, 160], as {folder / LATEST} was trained with, not [224, 224]",
        f"DATA.INTERPOLATION is bilinear, as {folder / LATEST} was trained with, not bicubic",
        f"MODEL.NUM_CLASSES is 3, as {folder / LATEST} was trained with, not 9",
        f"MODEL.LIT.merging is None, as {folder / LATEST} was trained with, not conv",
        f"TEST.CROP is False, as {folder / LATEST} was trained with, not True",
    ):
        assert line in out
    main.main([*command, "--opts", "DATA.IMG_SIZE", "64", "TEST.CROP", "false"])
    out = capsys.readouterr().out
    assert f"DATA.IMG_SIZE is [64, 64], as an option says; {folder / LATEST} was trained with [96, 160]" in out
    assert "TEST.CROP" not in out and f"loss {record['val/loss']:.3f}\n" not in out


def losses(folder: Path) -> list[float]:
    """Training loss of each epoch."""
    return [json.loads(line)["train/loss_epoch"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_recomputing_activations_changes_nothing(tiny_cfg, folder, monkeypatch):
    recomputed = []
    checkpoint_seq = lit.checkpoint_seq
    monkeypatch.setattr(lit, "checkpoint_seq", lambda *args: recomputed.append(1) or checkpoint_seq(*args))
    main.main(["--cfg", str(tiny_cfg())])
    assert not recomputed
    main.main(["--cfg", str(tiny_cfg()), "--tag", "other", "--opts", "TRAIN.USE_CHECKPOINT", "true"])
    assert len(recomputed) == 8 * 2 * 4  # updates, batches, stages; none in evaluation
    assert losses(folder) == pytest.approx(losses(folder.parent / "other"), rel=1e-3)


@pytest.mark.parametrize("enabled, memory_format", [(True, torch.channels_last), (False, torch.contiguous_format)])
def test_channels_last(tiny_cfg, enabled, memory_format):
    config = load_config(tiny_cfg(), ["RUNTIME.CHANNELS_LAST", str(enabled).lower()])
    images = to_device(torch.rand(2, 3, 32, 32), torch.device("cpu"), config)
    assert images.is_contiguous(memory_format=memory_format)


@pytest.mark.slow
def test_compiled_training(tiny_cfg, folder):
    """torch.compile's kernels round differently, so the runs agree only as far as a few updates let them."""
    main.main(["--cfg", str(tiny_cfg())])
    main.main(["--cfg", str(tiny_cfg()), "--tag", "compiled", "--opts", "RUNTIME.COMPILE", "true"])
    plain, other = (losses(folder.parent / tag) for tag in ("default", "compiled"))
    assert plain == pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_a_compiled_run_evaluates_is_compiled(tiny_cfg, monkeypatch, ema):
    """With a backend that only notes whether compiled code runs in training or in evaluation."""
    training = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        return lambda *args: training.add(torch.is_grad_enabled()) or graph(*args)

    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compile_model(model, backend=backend))
    cfg = tiny_cfg(TRAIN={"EMA": ema, "WARMUP_EPOCHS": 0, "EPOCHS": 1}, RUNTIME={"COMPILE": True, "DEVICE": "cpu"})
    main.main(["--cfg", str(cfg)])
    assert training == {True, False}


@pytest.mark.parametrize("criterion", [{"MIXUP": 0.0, "CUTMIX": 0.0}, {"MIXUP": 0.0, "CUTMIX": 1.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_criterion_learns(tiny_cfg, folder, criterion, smoothing):
    plain = {"AUTO_AUGMENT": "", "REPROB": 0.0, "COLOR_JITTER": 0.0, "SCALE": [0.8, 1.0]}
    cfg = tiny_cfg(AUG=criterion | plain, MODEL={"LABEL_SMOOTHING": smoothing})
    main.main(["--cfg", str(cfg), "--opts", "TRAIN.EPOCHS", "8", "MODEL.DROP_PATH_RATE", "0"])
    assert losses(folder)[-1] < 0.9 * losses(folder)[0]


# ---- several processes

DETERMINISTIC = {"MODEL": {"DROP_PATH_RATE": 0.0}, "AUG": {"MIXUP": 0.0, "CUTMIX": 0.0, "REPEATED": 3}}


def test_two_processes_are_two_accumulated_batches(tiny_cfg, folder):
    """Batch b on each of two processes against two accumulation steps of b: the same parameters."""
    cfg = tiny_cfg(**DETERMINISTIC)
    main.main(["--cfg", str(cfg), "--tag", "alone"])
    command = [MAIN, "--cfg", cfg, "--tag", "pair"]
    first, _ = [program.finish() for program in start_pair(command, command)]
    assert "batch 4 x 2 processes x 1 accumulated = 8 images per update" in first
    a, b = (read_checkpoint(folder.parent / tag / LATEST) for tag in ("alone", "pair"))
    assert a["update"] == b["update"] == 8
    initial = build_model(load_config(cfg), torch.device("cpu"))
    assert (a["model"]["head.weight"] - initial.head.weight).abs().max() > 0.01  # the runs went somewhere
    for name, _ in initial.named_parameters():
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=1e-3, atol=2e-4, msg=name)
    assert (folder.parent / "pair" / "log_rank1.txt").exists()


# ---- what goes wrong


def assert_fails(capsys, args: list, *parts: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(list(map(str, args)))
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    assert all(part in message for part in parts), message


def test_a_loss_that_is_not_finite_stops_the_run(tiny_cfg, folder, capsys, image_folder):
    cfg = tiny_cfg(TRAIN={"BASE_LR": 1e30, "SAVE_STEPS": 1, "CLIP_GRAD": None, "WARMUP_LR": 1e30, "WARMUP_EPOCHS": 1})
    assert_fails(
        capsys, ["--cfg", cfg], "epoch 0, update 1", "not applied", str(image_folder / "train"), "learning rates"
    )
    left = read_checkpoint(folder / LATEST)
    assert left["update"] == 1 and all(value.isfinite().all() for value in left["model"].values())


@pytest.fixture
def unattended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains as on a GPU, where the host looks at results only when it prints or saves."""
    prepare = training.Trainer.__post_init__

    def prepare_not_to_wait(trainer: training.Trainer) -> None:
        prepare(trainer)
        assert trainer.checks_every_update
        trainer.checks_every_update = False

    monkeypatch.setattr(training.Trainer, "__post_init__", prepare_not_to_wait)


@pytest.mark.usefixtures("unattended")
def test_nothing_is_applied_after_a_loss_that_is_not_finite(tiny_cfg, folder, capsys, monkeypatch):
    """The host looks after four updates; the second was not finite, so that the last two must not count, either."""
    rates = {"BASE_LR": 1e30, "CLIP_GRAD": None, "WARMUP_LR": 1e30, "WARMUP_EPOCHS": 1}
    states = []
    run_update = training.Trainer.run_update

    def watched(trainer: training.Trainer, batches) -> None:
        run_update(trainer, batches)
        optimizer = trainer.state.optimizer.state_dict()["state"]
        states.append({**dict(trainer.state.model.named_parameters()), **optimizer[0]})
        states[-1] = {name: value.detach().clone() for name, value in states[-1].items()}

    monkeypatch.setattr(training.Trainer, "run_update", watched)
    options = ["--opts", "PRINT_FREQ", "4", "TRAIN.SAVE_STEPS", "0"]
    assert_fails(capsys, ["--cfg", tiny_cfg(TRAIN=rates), *options], "epoch 0, update 1", "not applied")
    assert len(states) == 4
    for state in states[1:]:
        for name, value in states[0].items():
            assert torch.equal(state[name], value) and value.isfinite().all(), name


def test_an_overflow_of_fp16_is_no_alarm(tiny_cfg, folder, monkeypatch):
    """Loss scaling skips an update that overflows and lowers the scale; one this high overflows in float32, too."""
    scalers, build_criterion = [], training.build_criterion

    def scaler_that_starts_too_high(device: str, enabled: bool) -> GradScaler:
        scalers.append(GradScaler(device, init_scale=2.0**127, growth_interval=1000))
        return scalers[-1]

    def criterion_times_16(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
        criterion = build_criterion(config)
        return lambda *args: 16 * criterion(*args)

    monkeypatch.setattr(lit_classification.run, "GradScaler", scaler_that_starts_too_high)
    monkeypatch.setattr(training, "build_criterion", criterion_times_16)
    main.main(["--cfg", str(tiny_cfg()), "--opts", "TRAIN.EPOCHS", "2"])
    halved = 127 - math.log2(scalers[0].get_scale())
    assert 1 <= halved < 8  # of 8 updates, and those that did not overflow trained
    left = read_checkpoint(folder / LATEST)
    assert left["update"] == 8 and all(value.isfinite().all() for value in left["model"].values())
    assert {int(state["step"]) for state in left["optimizer"]["state"].values()} == {8 - int(halved)}


@pytest.mark.parametrize("attended", [True, False])
def test_gradients_that_overflow_without_scaling_stop_the_run(tiny_cfg, folder, capsys, monkeypatch, request, attended):
    """The loss stays finite, and the scale is 1 when the third update overflows: this one is named, none is applied."""
    if not attended:
        request.getfixturevalue("unattended")
    before, run_update = [], training.Trainer.run_update

    def break_the_third(trainer: training.Trainer, batches) -> None:
        if trainer.state.update == 2:
            trainer.criterion = lambda logits, targets: (logits - logits.detach()).square().sum().sqrt()
            before.extend(parameter.detach().clone() for parameter in trainer.state.model.parameters())
        run_update(trainer, batches)

    monkeypatch.setattr(training.Trainer, "run_update", break_the_third)
    unscaled = partial(GradScaler, init_scale=1.0)
    monkeypatch.setattr(lit_classification.run, "GradScaler", lambda device, enabled: unscaled(device))
    options = ["--opts", "PRINT_FREQ", "4", "TRAIN.SAVE_STEPS", "0"]
    assert_fails(capsys, ["--cfg", tiny_cfg(), *options], "loss 0.0, gradient norm nan in epoch 0, update 2;")
    assert json.loads((folder / "failed.json").read_text())["update"] == 2
    left = read_checkpoint(folder / FAILED)
    assert left["update"] == 2
    model = build_model(load_config(tiny_cfg()), torch.device("cpu"))
    for (name, _), value in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(left["model"][name], value), name


class Reads(TorchFunctionMode):
    """Counts how often values of tensors are read, for which a GPU must have come to its end."""

    NAMES = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"}
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.NAMES:  # the order of images is on the CPU
            self.count += not any(frame.f_code.co_filename == sampler.__file__ for frame, _ in walk_stack(None))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attended", [True, False])
def test_updates_wait_for_results_on_a_cpu_alone(tiny_cfg, monkeypatch, request, attended):
    if not attended:
        request.getfixturevalue("unattended")
    counts, run_update = [], training.Trainer.run_update

    def watched(*args) -> None:
        with Reads() as reads:
            run_update(*args)
        counts.append(reads.count)

    monkeypatch.setattr(training.Trainer, "run_update", watched)
    cfg = tiny_cfg(TRAIN={"EPOCHS": 1, "WARMUP_EPOCHS": 0})
    main.main(["--cfg", str(cfg), "--opts", "DATA.NUM_WORKERS", "1"])  # which reads images elsewhere
    assert len(counts) == 4 and any(counts) == attended


@pytest.mark.parametrize(
    "args, parts",
    [
        (["--data-path", "/no/such/place"], ["/no/such/place", "--data-path"]),
        (["--opts", "MODEL.NUM_CLASSES", "7"], ["3 classes", "MODEL.NUM_CLASSES 3"]),
        (["--batch-size", "64"], ["TRAIN.GLOBAL_BATCH 8", "--batch-size 8"]),
        (["--opts", "TRAIN.GLOBAL_BATCH", "400"], ["33", "TRAIN.GLOBAL_BATCH 400"]),
        (["--opts", "MODEL.NAME", "lit_xs"], ["lit_xs", "lit_s"]),
        (["--opts", "RUNTIME.DEVICE", "cuda"], ["RUNTIME.DEVICE", "GPU"]),
        (["--resume", "/no/such/file.pth"], ["/no/such/file.pth"]),
        (["--pretrained", "/no/such/file.pth"], ["/no/such/file.pth"]),
        (["--eval"], ["--resume"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_input_is_one_clear_line(tiny_cfg, capsys, args, parts):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_fails(capsys, ["--cfg", tiny_cfg(), *args], *parts)


def test_checkpoint_of_another_model(tiny_cfg, folder, capsys):
    main.main(["--cfg", str(tiny_cfg())])
    other = ["--opts", "MODEL.LIT.depths", "[1, 1, 1, 2]"]
    for args in (["--eval", "--resume", folder / LATEST], ["--pretrained", folder / LATEST, "--tag", "other"]):
        assert_fails(capsys, ["--cfg", tiny_cfg(), *args, *other], str(folder / LATEST), "stages.3.blocks.1.")


def test_corrupt_training_image_is_named(tiny_cfg, own_folder, capsys):
    bad = own_folder / "train" / "ant" / "0.jpg"
    bad.write_text("not an image")
    for workers in ("0", "2"):
        args = ["--cfg", tiny_cfg(), "--data-path", own_folder, "--opts", "DATA.NUM_WORKERS", workers]
        assert_fails(capsys, args, f"error: {bad}: no readable image")


def test_options_can_be_given_in_parts(tiny_cfg):
    args = main.parse_args(["--cfg", "x", "--opts", "SEED", "1", "--tag", "t", "--opts", "PRINT_FREQ", "2"])
    assert load_config(tiny_cfg(), args.opts).SEED == 1 and load_config(tiny_cfg(), args.opts).PRINT_FREQ == 2


def test_weights_of_a_vision_transformer_keep_their_names(tmp_path):
    """Other models of timm have names that look like LIT's released ones."""
    small = dict(embed_dim=32, depth=1, num_heads=1)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **small)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, **small)
    loaded = load_checkpoint(tmp_path / "vit.pth", model)
    model.load_state_dict(loaded)
    assert torch.equal(model.patch_embed.proj.weight, vit.patch_embed.proj.weight)
    assert model.head.out_features == 5
