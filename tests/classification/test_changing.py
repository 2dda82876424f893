"""Changes of the method by YAML keys, each in a short training (docs/changing.md)."""

import csv
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import main
import predict
import visualize_attention
import visualize_offset
from lit_backbone import precision, read_checkpoint
from lit_backbone.images import open_rgb
from lit_classification import distributed
from lit_classification import engine as main_engine
from lit_classification.checkpointing import LATEST
from lit_classification.config import ConfigError
from lit_classification.config_reader import adopt_keywords, dump_config, load_config
from lit_classification.distributed import STOPPED
from lit_classification.logs import write_evaluation
from lit_classification.model import build_model, freeze, load_classifier, load_teacher
from lit_classification.optim import Schedule, build_optimizer
from tests.classification.conftest import CLASSES, TINY_LIT
from tests.programs import Program
from tools import export

MAIN, PREDICT = Path(main.__file__), Path(predict.__file__)


@pytest.fixture
def train(tiny_cfg, tmp_path):
    """Return a function that trains with the given sections and returns the content of the last checkpoint."""

    def run(*args: str, tag: str = "default", **sections) -> dict:
        main.main(["--cfg", str(tiny_cfg(**sections)), "--tag", tag, *args])
        return read_checkpoint(tmp_path / "output" / "tiny" / tag / LATEST)

    return run


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.items())


OPTIMIZERS = {"momentum": 0.05, "lion": 0.01, "muon": 0.05, "adafactor": 0.05}  # base learning rates


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_learns_and_resumes_exactly(train, tiny_cfg, monkeypatch, name):
    keys = {"OPTIMIZER": {"NAME": name}, "BASE_LR": OPTIMIZERS[name], "SAVE_STEPS": 1}
    whole = train(tag="whole", TRAIN=keys)
    stops = iter([False, True])  # the second of the three steps at which a run asks for signals
    with monkeypatch.context() as patch:
        patch.setattr(main.Ranks, "stop_signal", lambda ranks: "SIGTERM" if next(stops, False) else "")
        with pytest.raises(SystemExit) as stopped:
            train(TRAIN=keys)
        assert stopped.value.code == STOPPED
    resumed = train(TRAIN=keys)
    assert same(whole["model"], resumed["model"]) and whole["update"] == resumed["update"] == 8
    start = build_model(load_config(tiny_cfg()), torch.device("cpu")).state_dict()
    assert not any(torch.equal(whole["model"][key], start[key]) for key in start if key.endswith("fc1.weight"))


def test_optimizer_keywords(tiny_cfg):
    def defaults(*opts: str) -> dict:
        config = load_config(tiny_cfg(), opts)
        return build_optimizer(timm.create_model(**config.model_keywords), config).defaults

    recipe = defaults()
    assert (recipe["betas"], recipe["eps"], recipe["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.05)
    assert defaults("TRAIN.OPTIMIZER.NAME", "lion")["betas"] == (0.9, 0.99)
    assert defaults("TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.MOMENTUM", "0.8")["momentum"] == 0.8
    assert defaults("TRAIN.OPTIMIZER.KEYWORDS", "{amsgrad: true}")["amsgrad"]


@pytest.mark.parametrize(
    "opts, problem",
    [
        (["TRAIN.OPTIMIZER.NAME", "adamv"], "TRAIN.OPTIMIZER.NAME: timm has no such optimizer; did you mean adam"),
        (["TRAIN.LR_SCHEDULER.NAME", "multistep"], "MILESTONES: multistep needs"),
        (["MODEL.FREEZE", "1", "MODEL.NAME", "resnet18", "MODEL.LIT", "{}"], "FREEZE: resnet18 has no stages of LIT"),
    ],
)
def test_wrong_keys_are_named(tiny_cfg, opts, problem):
    sections = {"MODEL": {"LIT": {}}} if "resnet18" in opts else {}
    with pytest.raises(ConfigError, match=problem):
        load_config(tiny_cfg(**sections), opts)


def test_unusable_optimizer_is_refused(tiny_cfg):
    keys = {"TRAIN.OPTIMIZER.NAME": "adahessian", "TRAIN.OPTIMIZER.KEYWORDS": "{amsgard: true}"}
    for key, value in keys.items():
        with pytest.raises(SystemExit, match="second derivatives" if "NAME" in key else "cannot be built: .*amsgard"):
            main.main(["--cfg", str(tiny_cfg()), "--opts", key, value])


RATES = {  # in the epochs 0 to 9 after a warm-up of one epoch; rates are in force one epoch late
    "constant": [1, 1, 1, 1, 1, 1, 1, 1],
    "linear": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
    "poly": [0.81, 0.64, 0.49, 0.36, 0.25, 0.16, 0.09, 0.04],
    "step": [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25],
    "multistep": [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25],
}


@pytest.mark.parametrize("unit", ["epoch", "update"])
@pytest.mark.parametrize("name", RATES)
def test_schedule(tiny_cfg, name, unit):
    keys = {"NAME": name, "STEP": unit, "SCALE_BOUNDS": False, "DECAY_EPOCHS": 3, "DECAY_RATE": 0.5, "POWER": 2}
    train = {"EPOCHS": 10, "WARMUP_EPOCHS": 1, "BASE_LR": 64, "WARMUP_LR": 0.5, "MIN_LR": 0, "GLOBAL_BATCH": 8}
    config = load_config(tiny_cfg(TRAIN=train | {"LR_SCHEDULER": keys | {"MILESTONES": [5, 9]}}))
    assert config.learning_rates == (1, 0.5, 0)
    optimizer = build_optimizer(timm.create_model(**config.model_keywords), config)
    schedule, rates = Schedule(optimizer, config, 4), []
    for epoch in range(10):
        # with STEP update, step 4 * epoch - 3 reads the rate of 4 * (epoch - 1); multistep compares the next one
        is_early = unit == "update" and name != "multistep" or epoch < 2
        schedule.set(max(4 * epoch - 3, 0) if is_early else 4 * epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:2] == [0.5, 0.5] and rates[2:] == pytest.approx(RATES[name])


def test_layer_decay(train, tiny_cfg):
    config = load_config(tiny_cfg(TRAIN={"LAYER_DECAY": 0.5}))
    model = timm.create_model(**config.model_keywords)
    groups = build_optimizer(model, config).param_groups
    scales = {id(param): group["lr"] * group["lr_scale"] for group in groups for param in group["params"]}
    assert scales.keys() == {id(param) for param in model.parameters()}
    peak = config.learning_rates[0]
    assert scales[id(model.head.weight)] == peak
    first, last = model.stages[0].merge.proj.weight, model.stages[3].blocks[0].mlp.fc1.weight
    assert scales[id(first)] < scales[id(last)] < peak
    merge = model.stages[2].merge
    assert scales[id(merge.offset.weight)] == pytest.approx(0.01 * scales[id(merge.offset.bias)])
    assert train(TRAIN={"LAYER_DECAY": 0.5})["update"] == 8


@pytest.mark.parametrize("freeze", [2, "backbone"])
def test_frozen_part_does_not_change(train, finished, freeze):
    start = read_checkpoint(finished / LATEST)["model"]
    end = train("--pretrained", str(finished / LATEST), MODEL={"FREEZE": freeze})["model"]
    frozen = {k for k in start if torch.equal(start[k], end[k])}
    if freeze == "backbone":
        assert frozen == {key for key in start if not key.startswith("head.")}
    else:
        assert frozen >= {key for key in start if key.startswith(("stages.0.", "stages.1."))}
        assert not any("fc1" in key for key in frozen if key.startswith(("stages.2.", "stages.3.")))


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "vit_tiny_patch16_224"])
def test_all_but_the_head_is_frozen(tiny_cfg, name):
    config = load_config(tiny_cfg(MODEL={"FREEZE": "backbone"}))
    model = timm.create_model(name, num_classes=3)
    frozen = {id(module) for module in freeze(model, config)}
    trained = {key for key, param in model.named_parameters() if param.requires_grad}
    head = next(key for key, module in model.named_modules() if module is model.get_classifier())
    assert trained == {f"{head}.weight", f"{head}.bias"}
    assert not any(id(module) in frozen for module in (model, model.get_classifier()))
    normalizations = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))]
    assert normalizations and all(id(module) in frozen for module in normalizations)


def test_batch_norm_keeps_its_statistics(train, capsys):
    statistics = {k: v for k, v in train(MODEL={"FREEZE_BN": True})["model"].items() if "running_mean" in k}
    assert "the frozen layers are random" in capsys.readouterr().out
    assert len(statistics) == 3 and not any(value.any() for value in statistics.values())


def test_distillation(train, finished):
    """Runs with each type of loss and without distillation, as the fixture, end with different weights."""
    models = [read_checkpoint(finished / LATEST)["model"]]
    for kind in ("soft", "hard"):
        models += [train(tag=kind, DISTILL={"TEACHER": str(finished / LATEST), "TYPE": kind, "ALPHA": 1.0})["model"]]
    assert not any(same(models[i], models[i - 1]) for i in range(3))
    assert not any(key.startswith("teacher") for key in models[2])


def test_distillation_loss_is_that_of_deit():
    logits, target = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    config = load_config(
        Path(main.__file__).parent / "configs/lit-s.yaml", ["DISTILL.TAU", "3", "DISTILL.ALPHA", "0.25"]
    )
    p, q = (logits / 3).softmax(1), (target / 3).softmax(1)
    expected = 0.75 * 7 + 0.25 * 9 * (q * (q.log() - p.log())).sum() / logits.numel()
    mixed = main_engine.mix_distillation(torch.tensor(7.0), logits, torch.zeros(()), lambda _: target, config)
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-5)


def test_teacher_must_fit(tiny_cfg, finished):
    config = load_config(tiny_cfg(DISTILL={"TEACHER": str(finished / LATEST)}))
    assert not load_teacher(config, torch.device("cpu"), list(CLASSES)).training
    with pytest.raises(ConfigError, match="DISTILL.TEACHER: .*class names differ"):
        load_teacher(config, torch.device("cpu"), ["ant", "bee", "dog"])


def test_teacher_may_be_a_file_with_the_name_of_a_model(tiny_cfg, finished, tmp_path, monkeypatch):
    shutil.copy(finished / LATEST, tmp_path / "lit_s.pth")
    monkeypatch.chdir(tmp_path)
    config = load_config(tiny_cfg(DISTILL={"TEACHER": "lit_s.pth"}))
    assert load_teacher(config, torch.device("cpu"), list(CLASSES)).num_classes == 3


def test_keywords_of_a_start_without_checkpoint_are_not_taken(tiny_cfg, finished, tmp_path):
    config = load_config(tiny_cfg(MODEL={"LIT": {}}), ["MODEL.PRETRAINED", str(finished / LATEST)])
    other = load_config(tiny_cfg(MODEL={"LIT": {"num_heads": 1}}))
    (tmp_path / "config.yaml").write_text(dump_config(other))
    assert adopt_keywords(config, tmp_path).MODEL.LIT == load_config(tiny_cfg()).MODEL.LIT
    (tmp_path / "config.yaml").rename(tmp_path / LATEST)  # a checkpoint that was copied to a new run directory
    assert adopt_keywords(config, tmp_path).MODEL.LIT == load_config(tiny_cfg()).MODEL.LIT


def test_pretrained_brings_its_keywords(train, finished, tmp_path, capsys):
    start, model = str(shutil.copy(finished / LATEST, tmp_path)), {"LIT": {}}
    end = train("--pretrained", start, MODEL=model)
    assert f"{start}: taking its MODEL.LIT" in capsys.readouterr().out
    assert end["config"]["MODEL"]["LIT"]["embed_dims"] == [8, 16, 24, 32]
    Path(start).unlink()  # the run knows them by now
    train("--pretrained", start, "--opts", "TRAIN.EPOCHS", "3", "TRAIN.RESUME_CHANGED", "true", MODEL=model)
    assert train("--opts", "TRAIN.EPOCHS", "4", "TRAIN.RESUME_CHANGED", "true", MODEL=model)["update"] == 16


def test_pretrained_in_part(train, finished, tmp_path, capsys):
    start = str(finished / LATEST)
    ablation = {"LIT": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_heads": 1, "mlp_ratios": 2}}
    with pytest.raises(SystemExit, match="keys missing"):
        train("--pretrained", start, MODEL=ablation)
    train("--pretrained", start, MODEL=ablation | {"PRETRAINED_PARTIAL": True})
    printed = capsys.readouterr().out
    assert "tensors stay random: " in printed and "stages.2.blocks.1.norm1.weight" in printed
    content = read_checkpoint(start)
    torch.save(content | {"classes": ["ant", "cat", "bee"]}, tmp_path / "renamed.pth")
    train("--pretrained", str(tmp_path / "renamed.pth"), tag="r", MODEL=ablation | {"PRETRAINED_PARTIAL": True})
    printed = capsys.readouterr().out
    assert "class names differ" in printed and "head.weight" in printed
    assert "was trained with other keywords, MODEL.LIT {'embed_dims': [8, 16, 24, 32]" in printed
    with pytest.raises(SystemExit, match="no weights that fit"):
        torch.save({"model": {"x": torch.ones(1)}}, tmp_path / "other.pth")
        train("--pretrained", str(tmp_path / "other.pth"), tag="o", MODEL=ablation | {"PRETRAINED_PARTIAL": True})


# ---- results


def test_results_of_unusual_names(tmp_path):
    """Names that are not UTF-8, and names that Matplotlib would parse."""
    names = [os.fsdecode(b"\xe9"), "a$^$", "$5_$10"]
    images = SimpleNamespace(classes=names, name=lambda i: os.fsdecode(b"\xe9.jpg"))
    write_evaluation(tmp_path, {"acc1": 50.0, "images": 2}, torch.tensor([[0, 0, 0.9], [1, 2, 0.8]]), images)
    assert (tmp_path / "predictions.csv").read_text().splitlines()[1] == r"\udce9.jpg,\udce9,\udce9,0.9000"
    assert Image.open(tmp_path / "confusion.png").size == (1050, 900)


def test_evaluation_writes_its_results(finished_run, image_folder):
    run_dir = finished_run
    assert "worst classes" in (run_dir / "log_rank0.txt").read_text()
    main.main(["--eval", "--resume", str(run_dir / LATEST), "--data-path", str(image_folder)])
    result = json.loads((run_dir / "eval.json").read_text())
    assert result["images"] == 12 and [entry["class"] for entry in result["classes"]] == list(CLASSES)
    assert [sum(row) for row in result["confusion"]] == [entry["images"] for entry in result["classes"]] == [4, 4, 4]
    hits = [row[i] for i, row in enumerate(result["confusion"])]
    assert hits == [entry["correct"] for entry in result["classes"]]
    assert result["acc1"] == pytest.approx(100 * sum(hits) / 12)
    with open(run_dir / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["class"] == row["prediction"] for row in rows) == sum(hits) and len(rows) == 12
    assert all(f"/{row['class']}/" in row["image"] and 1 / 3 <= float(row["probability"]) <= 1 for row in rows)
    assert Image.open(run_dir / "confusion.png").width > 500
    start = json.loads((run_dir / "starts.jsonl").read_text())
    assert start["git"] == read_checkpoint(run_dir / LATEST)["git"] and len(start["git"]) >= 40


def test_part_of_the_classes(finished_run, tmp_path, image_folder, capsys):
    """Classes are matched by name, and only their logits compete, as in timm's validation on ImageNet-R."""
    checkpoint, part = str(finished_run / LATEST), tmp_path / "part"
    for name in ("cat", "bee"):
        shutil.copytree(image_folder / "val" / name, part / "some" / name)
    main.main(["--eval", "--resume", checkpoint, "--data-path", str(part), "--opts", "DATA.VAL_SPLIT", "some"])
    assert "evaluating the logits of the 2 of its 3 classes in the data" in capsys.readouterr().out
    result = json.loads((finished_run / "eval.json").read_text())
    classifier = load_classifier(checkpoint, torch.device("cpu"))
    hits = []
    for name in ("bee", "cat"):
        for path in sorted((part / "some" / name).iterdir()):
            logits = classifier.model(classifier.transform(open_rgb(path))[None])[0]
            hits.append((logits[2] > logits[1]).item() == (name == "cat"))
    assert result["acc1"] == pytest.approx(100 * sum(hits) / 8)


# ---- precision


def test_bf16_on_a_cpu(train, image_folder, monkeypatch, tmp_path, capsys):
    """A CPU computes in bfloat16 on request, resumes exactly, and by default computes in float32."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(distributed, "cpu_has_bf16", lambda: True)
    keys = {
        "RUNTIME": {"DEVICE": "cpu", "AMP_DTYPE": "bf16"},
        "TEST": {"AMP_DTYPE": "bf16"},
        "TRAIN": {"SAVE_STEPS": 1},
    }
    whole = train(tag="whole", **keys)
    assert "torch.bfloat16 autocast on cpu" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(distributed.Ranks, "stop_signal", lambda ranks: "SIGTERM")
        with pytest.raises(SystemExit):
            train(**keys)
    assert same(whole["model"], train(**keys)["model"])
    assert not same(whole["model"], train(tag="float32")["model"])
    assert "float32 on cpu, which also has bfloat16" in capsys.readouterr().out

    image, checkpoint = next((image_folder / "val").glob("*/*.jpg")), tmp_path / "output/tiny/whole" / LATEST
    results = []
    for amp in ("off", "bf16"):
        predict.main([str(image), "--checkpoint", str(checkpoint), "--json", "--amp", amp])
        results.append(json.loads(capsys.readouterr().out)["predictions"])
    a, b = ({entry["class"]: entry["probability"] for entry in result} for result in results)
    assert a == pytest.approx(b, abs=0.02) and a != b


def test_missing_precision_is_an_error(tiny_cfg, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    for keys, problem in {
        ("RUNTIME.AMP_DTYPE", "bf16"): "AMP_DTYPE, --amp: cpu has no bfloat16",
        ("TEST.AMP_DTYPE", "fp16"): "AMP_DTYPE, --amp: fp16 needs an NVIDIA GPU",
    }.items():
        with pytest.raises(SystemExit, match=problem):
            main.main(["--cfg", str(tiny_cfg()), "--opts", *keys])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--amp: cpu has no bfloat16"):
        predict.main(["image.jpg", "--checkpoint", "x.pth", "--amp", "bf16"])


# ---- custom modules

MODULE = """
from torch import nn
from lit_backbone.lit import register_merging

@register_merging("mean")
class MeanMerging(nn.Module):
    def __init__(self, in_chs, out_chs, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Linear(in_chs, out_chs, device=device, dtype=dtype)

    def forward(self, x):  # (B, H, W, C) -> (B, H/2, W/2, C')
        return self.proj(nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1))
"""


def test_own_module(tiny_cfg, tmp_path, image_folder):
    """A config may import modules. A checkpoint imports nothing by itself."""
    (tmp_path / "own_module.py").write_text(MODULE)
    image, checkpoint = next((image_folder / "val").glob("*/*.jpg")), tmp_path / "output/tiny/default" / LATEST

    def start(program: Path, *args: str | Path) -> Program:
        return Program(program, *args, prepare=partial(os.chdir, tmp_path))  # a process without the module

    model, short = {"LIT": TINY_LIT | {"merging": "mean"}}, {"EPOCHS": 1, "WARMUP_EPOCHS": 0}
    start(MAIN, "--cfg", tiny_cfg(IMPORTS=["own_module"], MODEL=model, TRAIN=short)).finish("finished 1 epochs")
    predicted = [image, "--checkpoint", checkpoint]
    start(PREDICT, *predicted).finish("error: ", status=1)
    start(PREDICT, *predicted, "--import", "own_module").finish("%  ")
    evaluation = ["--eval", "--resume", checkpoint, "--data-path", image_folder]
    start(MAIN, *evaluation, "--import", "own_module").finish(" * Acc@1")
    attention = ["--resume", checkpoint, "--vis_image", image, "--import", "own_module"]
    start(MAIN.with_name("visualize_attention.py"), *attention).finish("stages 3, 4")
    assert (tmp_path / "attention_map/stage-4.npy").exists()
    exported = [checkpoint, "--format", "safetensors", "--import", "own_module"]
    start(Path(export.__file__), *exported).finish("latest.safetensors")


@pytest.mark.parametrize(
    "program, options",
    [
        (main, ["--eval", "--resume", "x.pth"]),
        (predict, ["x.jpg", "--checkpoint", "x.pth"]),
        (visualize_attention, ["--vis_image", "x.jpg", "--resume", "x.pth"]),
        (visualize_offset, ["--vis_image", "x.jpg", "--resume", "x.pth"]),
        (export, ["x.pth", "--format", "onnx"]),
    ],
)
def test_programs_import_modules(program, options):
    with pytest.raises(SystemExit, match="error: IMPORTS: no_such_module: No module named"):
        program.main([*options, "--import", "no_such_module"])
