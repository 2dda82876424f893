"""Tests of main.py as it is used: training, evaluation, throughput, fine-tuning, two ranks, and bad input."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.overrides import TorchFunctionMode

import main
import predict
from lit_backbone import lit, load_checkpoint, read_checkpoint
from lit_classification import sampler
from lit_classification.checkpointing import BEST, LATEST
from lit_classification.config_reader import load_config
from lit_classification.data import build_dataset
from lit_classification.distributed import Ranks
from lit_classification.engine import to_device
from lit_classification.model import build_model
from lit_classification.optim import Schedule
from tests.classification.conftest import CLASSES, read_log, refusal
from tests.programs import Program, start_pair

MAIN = Path(main.__file__)
CPU = torch.device("cpu")
SHORT = {"EPOCHS": 1, "WARMUP_EPOCHS": 0}


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Return a function that runs `main.py` and returns what it prints and logs."""

    def call(*args: str | Path) -> str:
        capsys.readouterr()
        main.main(list(map(str, args)))
        return capsys.readouterr().out

    return call


def assert_fails(args: list, *parts: str) -> None:
    """Check that main.py ends with one line that holds the parts."""
    message = refusal(main, *args)
    assert all(part in message for part in parts), message


# ---- run directory


def test_run_directory(tiny_cfg, run_dir):
    cfg = tiny_cfg()
    printed = Program(MAIN, "--cfg", cfg, "--opts", "TRAIN.EPOCHS", "3").finish()
    names = {"config", "starts", "log", "log_rank0", "latest", "previous", "best", "events", "run"}
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == names
    assert load_config(run_dir / "config.yaml") == load_config(cfg, ["TRAIN.EPOCHS", "3"])
    start = json.loads((run_dir / "starts.jsonl").read_text())
    assert "TRAIN.EPOCHS 3" in start["command"] and start["torch"] == torch.__version__
    assert read_log(run_dir, "epoch") == [0, 1, 2] and read_log(run_dir, "val/images") == [12] * 3

    console = (run_dir / "log_rank0.txt").read_text()
    assert console.count("\n") >= 9 and all(line in printed for line in console.splitlines())
    assert "global batch 8 = 4 images x 1 ranks x 2 accumulation steps, 4 steps per epoch" in console
    assert re.search(r"epoch 2 \[4/4\] .*lr \S+ loss \S+ .*grad norm \S+ \S+ img/s", console)

    events = EventAccumulator(str(run_dir)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/grad_norm", "lr/decay", "lr/no_decay", "lr/offset", "val/acc1", "val/acc5"} <= tags
    for stage in (1, 2, 3):
        lengths = [event.value for event in events.Scalars(f"dtm/stages.{stage}.merge/length")]
        assert len(lengths) == 3 and all(length > 0 for length in lengths)  # offsets start at zero and learn
        assert all(0 <= event.value < 0.5 for event in events.Scalars(f"dtm/stages.{stage}.merge/outside"))
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]


def test_finished_run_is_kept(tiny_cfg, run, finished_run):
    """Other weights are ignored with a warning. More epochs are trained on demand."""
    before = [(finished_run / name).read_bytes() for name in (LATEST, "starts.jsonl", "log.jsonl")]
    out = run("--cfg", tiny_cfg(), "--pretrained", "other.pth")
    assert f"{finished_run / LATEST}, not other.pth" in out and "finished already, after 2 epochs" in out
    assert [(finished_run / name).read_bytes() for name in (LATEST, "starts.jsonl", "log.jsonl")] == before
    run("--cfg", tiny_cfg(), "--opts", "TRAIN.EPOCHS", "3", "TRAIN.RESUME_CHANGED", "true")
    assert read_checkpoint(finished_run / LATEST)["update"] == 12


def test_config_of_a_run_continues_it(finished_run, run, tmp_path, monkeypatch):
    """`--tag` and `--output` start other runs, and a copy of the file is an ordinary config."""
    monkeypatch.chdir(finished_run)
    run("--cfg", "config.yaml", "--opts", "TRAIN.RESUME_CHANGED", "true", "TRAIN.EPOCHS", "3")
    starts = [json.loads(line) for line in (finished_run / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 8]
    shutil.copy("config.yaml", tmp_path / "copy.yaml")
    short = ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    run("--cfg", "config.yaml", "--tag", "1", *short)
    run("--cfg", "config.yaml", "--output", tmp_path / "new", *short)
    run("--cfg", tmp_path / "copy.yaml", "--output", tmp_path / "new", *short)
    runs = ["new/copy/default", "new/tiny/default", "output/tiny/1", "output/tiny/default"]
    assert sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(LATEST)) == runs


# ---- evaluation


def test_evaluation_prints_the_published_lines(tiny_cfg, finished, run):
    cfg, before = tiny_cfg(), set(finished.iterdir())
    config = load_config(cfg)
    model = build_model(config, CPU).eval()
    model.load_state_dict(load_checkpoint(finished / BEST))
    images = build_dataset(config, is_training=False)
    batch = torch.stack([images[i][0] for i in range(12)]), torch.tensor([images[i][1] for i in range(12)])
    x, labels = to_device(batch, config, Ranks(0, 1, CPU))
    with torch.no_grad():
        accuracy = 100 * (model(x).argmax(dim=1) == labels).float().mean().item()
    lines = f" * Acc@1 {accuracy:.3f} Acc@5 100.000\nAccuracy of the network on the 12 test images: {accuracy:.1f}%\n"
    assert f"\n{lines}" in Program(MAIN, "--cfg", cfg, "--eval", "--resume", finished / BEST).finish()
    assert f"\n{lines}" in run("--eval", "--resume", finished / BEST)
    assert accuracy == pytest.approx(read_checkpoint(finished / BEST)["best"])
    created = {path.name for path in set(finished.iterdir()) - before}
    assert created <= {"eval.json", "predictions.csv", "confusion.png"}


def test_stored_config_replaces_the_file(tiny_cfg, run_dir, run):
    """Train at 96 x 160, and evaluate with a config of another size, number of classes and merging."""
    run("--cfg", tiny_cfg(DATA={"IMG_SIZE": [96, 160], "INTERPOLATION": "bilinear"}, TEST={"CROP": False}))
    acc1, loss = (read_log(run_dir, f"val/{name}")[-1] for name in ("acc1", "loss"))
    other = {"DATA": {"IMG_SIZE": 224}, "MODEL": {"NUM_CLASSES": 9, "LIT": {"merging": "conv"}}}
    cfg = tiny_cfg("other", **other, TRAIN={"WARMUP_EPOCHS": 5, "GLOBAL_BATCH": 7})  # invalid in training
    for options in ([], ["--cfg", cfg]):
        out = run("--eval", "--resume", run_dir / LATEST, *options)
        assert f" * Acc@1 {acc1:.3f} " in out and f"loss {loss:.3f}\n" in out
        assert ("stores its config" in out) == bool(options)
    out = run("--eval", "--resume", run_dir / LATEST, "--opts", "DATA.IMG_SIZE", "64")
    assert "Acc@1" in out and f"loss {loss:.3f}\n" not in out


def test_another_timm_model_takes_its_keywords_from_yaml(tiny_cfg, run_dir, run):
    """A checkpoint brings no keywords, because nothing bounds what they make timm do."""
    keywords = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]}
    cfg = tiny_cfg(MODEL={"NAME": "pvt_v2_b0", "LIT": {}, "KEYWORDS": keywords}, TRAIN=SHORT)
    run("--cfg", cfg)
    evaluate = ["--cfg", cfg, "--eval", "--resume", run_dir / LATEST]
    loss = f"loss {read_log(run_dir, 'val/loss')[0]:.3f}\n"
    assert loss in run(*evaluate)
    assert "was written with DATA.IMG_SIZE [32, 32]" in run(*evaluate, "--opts", "DATA.IMG_SIZE", "64")
    assert_fails([*evaluate, "--opts", "MODEL.KEYWORDS.depths", "[1, 1, 1, 2]"], "latest.pth", "missing")


def test_throughput_needs_no_data(tiny_cfg, run):
    cfg = tiny_cfg(TRAIN={"WARMUP_EPOCHS": 5, "GLOBAL_BATCH": 7})  # invalid in training
    out = run("--cfg", cfg, "--throughput", "--data-path", "/no/such/place")
    assert re.search(r"lit_s: [1-9][0-9.]* images/s per rank at batch size 4", out)


# ---- classes and fine-tuning


def link_classes(image_folder: Path, root: Path, **folders: str) -> Path:
    """Create a dataset of links to class folders, given the new and the old name of each class."""
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        for new, old in folders.items():
            (root / split / new).symlink_to(image_folder / split / old)
    return root


def test_exported_classifier_is_the_same(tiny_cfg, finished, image_folder, run, tmp_path, capsys):
    """ImageNet's folder n01440764 is shown as tench, and stays the name that is compared with data."""
    from tools import export

    names = dict(zip(("n01440764", "n01443537", "n01484850"), CLASSES))
    data = link_classes(image_folder, tmp_path / "synsets", **names)
    torch.save(read_checkpoint(finished / LATEST) | {"classes": [*names]}, tmp_path / "run.pth")
    export.main([str(tmp_path / "run.pth"), "--format", "safetensors"])
    outputs = []
    for file in ("run.pth", "run.safetensors"):
        out = run("--eval", "--resume", tmp_path / file, "--data-path", data)
        predict.main([str(data / "val"), "--checkpoint", str(tmp_path / file)])
        lines = (out + capsys.readouterr().out).splitlines()
        outputs.append([line for line in lines if line.startswith((" ", "Accuracy"))])
    assert outputs[0] == outputs[1] and "tench" in "".join(outputs[1])
    tuned = ["--cfg", tiny_cfg(TRAIN=SHORT), "--data-path", data, "--pretrained", tmp_path / "run.safetensors"]
    assert "head" not in run(*tuned)


def test_class_order_is_logged_for_weights_without_names(tiny_cfg, finished, image_folder, run, tmp_path):
    """Folders 9, 10 and 11 sort as numbers. torchvision, and so the original, sorts 10 and 11 before 9."""
    numbers = link_classes(image_folder, tmp_path / "numbers", **dict(zip(("9", "10", "11"), CLASSES)))
    command, weights = ["--cfg", tiny_cfg(), "--data-path", numbers], read_checkpoint(finished / LATEST)["model"]
    torch.save({"model": weights}, tmp_path / "bare.pth")
    torch.save({"model": weights, "classes": ["10", "11", "9"]}, tmp_path / "named.pth")
    assert run(*command, "--eval", "--resume", tmp_path / "bare.pth").count("9, 10, 11") == 1
    assert_fails([*command, "--eval", "--resume", tmp_path / "named.pth"], "10 / 9, 11 / 10, 9 / 11")


def test_fine_tuning_at_another_size_with_other_classes(tiny_cfg, finished, run, image_folder, tmp_path):
    two = link_classes(image_folder, tmp_path / "two", ant="ant", cat="cat")
    cfg = tiny_cfg("fine", DATA={"IMG_SIZE": [64, 96], "DATA_PATH": str(two)}, MODEL={"NUM_CLASSES": 2})
    out = run("--cfg", cfg, "--pretrained", finished / LATEST, "--opts", "TRAIN.BASE_LR", "1e-9")
    assert re.search(f"{finished / LATEST}: class names differ: 3 / 2 .*head is initialized", out)
    before, after = (read_checkpoint(path / LATEST)["model"] for path in (finished, tmp_path / "output/fine/default"))
    assert after["head.weight"].shape == (2, 32) and after["stages.2.blocks.0.attn.rel_pos_bias"].shape == (1, 3, 7, 11)
    weight = "stages.2.blocks.0.mlp.fc1.weight"
    assert torch.allclose(before[weight], after[weight], atol=1e-6)


def test_one_class_is_not_evaluated(finished, image_folder, tmp_path):
    one = link_classes(image_folder, tmp_path / "one", ant="ant")
    assert_fails(["--eval", "--resume", finished / LATEST, "--data-path", one], "one class", "any model is right")


def test_renamed_classes(tiny_cfg, finished_run, run, image_folder, tmp_path):
    """Resuming and evaluation refuse two renamed classes of three. Fine-tuning starts with a new head."""
    renamed = link_classes(image_folder, tmp_path / "renamed", ant="ant", cow="bee", wasp="cat")
    other, latest = ["--cfg", tiny_cfg(), "--data-path", renamed], finished_run / LATEST
    mismatch, before = "(bee / cow, cat / wasp)", latest.read_bytes()
    assert_fails([*other, "--eval", "--resume", latest], f"{latest}: ", mismatch)
    assert_fails([*other, "--opts", "TRAIN.EPOCHS", "3"], f"{latest}: ", mismatch, "TRAIN.RESUME_CHANGED true")
    assert latest.read_bytes() == before
    torch.save(read_checkpoint(latest) | {"best": 100.0}, latest)
    resumed = run(*other, "--opts", "TRAIN.EPOCHS", "3", "TRAIN.RESUME_CHANGED", "true")
    assert mismatch in resumed and "best Acc@1 100" not in resumed
    latest.write_bytes(before)
    assert mismatch in run(*other, "--tag", "new", "--pretrained", latest, "--opts", "TRAIN.BASE_LR", "1e-9")
    old, new = (read_checkpoint(path / LATEST)["model"] for path in (finished_run, finished_run.with_name("new")))
    initial = build_model(load_config(tiny_cfg()), CPU).head.weight
    assert torch.allclose(new["head.weight"], initial, atol=1e-6) and not torch.allclose(old["head.weight"], initial)


# ---- training options


def test_activation_checkpointing_changes_nothing(tiny_cfg, finished, run_dir, run, monkeypatch):
    recomputed, checkpoint_seq = [], lit.checkpoint_seq
    monkeypatch.setattr(lit, "checkpoint_seq", lambda *args: recomputed.append(1) or checkpoint_seq(*args))
    run("--cfg", tiny_cfg(), "--opts", "TRAIN.USE_CHECKPOINT", "true")
    assert len(recomputed) == 8 * 2 * 4  # steps, micro-batches, stages; none in evaluation
    losses = (read_log(path, "train/loss_epoch") for path in (run_dir, finished))
    assert next(losses) == pytest.approx(next(losses), rel=1e-3)


def test_channels_last(tiny_cfg):
    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2)
    for option, memory_format in (("true", torch.channels_last), ("false", torch.contiguous_format)):
        images, _ = to_device(batch, load_config(tiny_cfg(), ["RUNTIME.CHANNELS_LAST", option]), Ranks(0, 1, CPU))
        assert images.is_contiguous(memory_format=memory_format)


def test_training_and_evaluation_are_compiled(tiny_cfg, run, monkeypatch):
    """Compile with a backend that only records if the code runs in training or in evaluation."""
    modes = set()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        return lambda *args: modes.add(torch.is_grad_enabled()) or graph(*args)

    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compile_model(model, backend=backend))
    run("--cfg", tiny_cfg(TRAIN={"EMA": 0.9, **SHORT}, RUNTIME={"COMPILE": True, "DEVICE": "cpu"}))
    assert modes == {True, False}


@pytest.mark.parametrize("cutmix, smoothing", [(0.0, 0.0), (0.0, 0.1), (1.0, 0.1)])
def test_every_criterion_learns(tiny_cfg, run_dir, run, cutmix, smoothing):
    aug = {"MIXUP": 0.0, "CUTMIX": cutmix, "AUTO_AUGMENT": "", "REPROB": 0.0, "COLOR_JITTER": 0.0, "SCALE": [0.8, 1.0]}
    cfg = tiny_cfg(AUG=aug, MODEL={"LABEL_SMOOTHING": smoothing})
    run("--cfg", cfg, "--opts", "TRAIN.EPOCHS", "8", "MODEL.DROP_PATH_RATE", "0")
    losses = read_log(run_dir, "train/loss_epoch")
    assert losses[-1] < 0.9 * losses[0]


class Reads(TorchFunctionMode):
    """Counts how often values of tensors are read, for which a GPU would have to finish."""

    NAMES = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"}
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_order = sys._getframe(1).f_code.co_filename == sampler.__file__  # indices of images, on the CPU
        self.count += getattr(func, "__name__", "") in self.NAMES and not is_order
        return func(*args, **(kwargs or {}))


def test_steps_do_not_wait_for_results(tiny_cfg, run, monkeypatch):
    counts, set_rates = [], Schedule.set

    def record(schedule: Schedule, step: int) -> None:  # at the start of each step
        counts.append(reads.count)
        set_rates(schedule, step)

    monkeypatch.setattr(Schedule, "set", record)
    with Reads() as reads:  # one worker, because reading images on the CPU reads tensors
        run("--cfg", tiny_cfg(TRAIN=SHORT), "--opts", "DATA.NUM_WORKERS", "1", "PRINT_FREQ", "4")
    assert len(counts) == 4 and len(set(counts)) == 1 and reads.count > counts[0]


# ---- two ranks


def test_two_ranks_are_two_accumulated_batches(tiny_cfg, run_dir, run):
    """Train with a micro-batch on each of two ranks, and with two accumulated ones on a single rank."""
    cfg = tiny_cfg(MODEL={"DROP_PATH_RATE": 0.0}, AUG={"MIXUP": 0.0, "CUTMIX": 0.0, "REPEATED": 3})
    run("--cfg", cfg, "--tag", "single")
    command = [MAIN, "--cfg", cfg, "--tag", "pair"]
    first, _ = [program.finish() for program in start_pair(command, command)]
    assert "global batch 8 = 4 images x 2 ranks x 1 accumulation steps" in first
    single, pair = (read_checkpoint(run_dir.with_name(tag) / LATEST) for tag in ("single", "pair"))
    assert single["update"] == pair["update"] == 8
    initial = build_model(load_config(cfg), CPU)
    assert (single["model"]["head.weight"] - initial.head.weight).abs().max() > 0.01
    for name, _ in initial.named_parameters():
        torch.testing.assert_close(single["model"][name], pair["model"][name], rtol=1e-3, atol=2e-4, msg=name)
    assert (run_dir.with_name("pair") / "log_rank1.txt").exists()


# ---- bad input


@pytest.mark.parametrize(
    "args, parts",
    [
        (["--data-path", "/no/such/place"], ["/no/such/place", "--data-path"]),
        (["--opts", "MODEL.NUM_CLASSES", "7"], ["3 classes", "MODEL.NUM_CLASSES 3"]),
        (["--batch-size", "64"], ["TRAIN.GLOBAL_BATCH 8", "--batch-size 8"]),
        (["--opts", "RUNTIME.DEVICE", "cuda"], ["RUNTIME.DEVICE", "GPU"]),
        (["--resume", "/no/such/file.pth"], ["/no/such/file.pth"]),
        (["--pretrained", "/no/such/file.pth"], ["/no/such/file.pth"]),
        (["--eval"], ["--resume"]),
        (["--tag", "without RANK"], ["WORLD_SIZE", "torchrun"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_bad_input_is_one_clear_line(tiny_cfg, args, parts, monkeypatch):
    if "cuda" in args and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    if "without RANK" in args:
        monkeypatch.setenv("WORLD_SIZE", "4")
    assert_fails(["--cfg", tiny_cfg(), *args], *parts)


def test_config_is_needed_except_for_evaluation(capsys):
    for args in ([], ["--throughput"]):
        with pytest.raises(SystemExit):
            main.main(args)
        assert "required: --cfg" in capsys.readouterr().err
