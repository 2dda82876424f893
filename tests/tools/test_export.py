"""Exported files give the outputs of the checkpoint in the programs they are meant for."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, pipeline

from lit_classification.model import load_classifier
from tests.lit_backbone.small import small_lit
from tests.programs import Program
from tools.export import main, model_card

ROOT = Path(__file__).parents[2]
KEYWORDS = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4], mlp_ratios=2)
CLASSES = ["ant", "bee", "cat"]
SIZE = (64, 96)
SHAPES = [(2, 3, 64, 96), (1, 3, 32, 32), (3, 3, 75, 130)]


def build(name: str) -> nn.Module:
    """Create a small model in evaluation mode without zero parameters."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(CLASSES), img_size=SIZE, **KEYWORDS).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_((0.05 if ".offset." in key else 0.1) * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=["lit_s", "lit_ti"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Write a checkpoint as main.py does and return it with its model."""
    name, path = request.param, tmp_path_factory.mktemp(request.param) / "best.pth"
    architecture = {"NAME": name, "NUM_CLASSES": len(CLASSES), "LIT": KEYWORDS, "PRETRAINED": "/home/me/start.pth"}
    config = {"MODEL": architecture, "TEST": {"CROP": name == "lit_ti"}, "TRAIN": {}}
    config |= {"DATA": {"IMG_SIZE": SIZE, "INTERPOLATION": "random", "DATA_PATH": "/home/me/insects"}}
    model = build(name)
    run = dict(model_ema=None, optimizer={}, scaler={}, recipe={}, updates_per_epoch=10, update=25, best=97.5)
    torch.save({"model": model.state_dict(), "config": config, "classes": CLASSES} | run, path)
    return path, model


def export(*args: str | Path) -> str:
    run = Program(ROOT / "tools" / "export.py", *args, prepare=partial(os.umask, 0o027))
    return run.finish().splitlines()[-1]


def run_onnx(path: Path, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]


def check_description(metadata: dict[str, str], path: Path, model: nn.Module) -> None:
    """Check that the metadata alone describe the checkpoint's preprocessing."""
    classifier = load_classifier(path, torch.device("cpu"))
    assert metadata["architecture"] == model.pretrained_cfg["architecture"]
    assert json.loads(metadata["classes"]) == CLASSES
    transform = timm.data.create_transform(**json.loads(metadata["preprocessing"]))
    assert torch.equal(transform(photo()), classifier.transform(photo()))


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(90, 200, 3), dtype=np.uint8))


def mode(path: Path) -> int:
    return os.stat(path).st_mode & 0o777


@pytest.mark.slow
@torch.no_grad()
def test_onnx_of_logits_and_of_feature_maps(checkpoint: tuple[Path, nn.Module]) -> None:
    (path, model), file = checkpoint, checkpoint[0].with_suffix(".onnx")
    dense = ["--dense"] if "lit_s" in str(path.parent) else []
    assert export(path, "--format", "onnx", *dense).endswith(str(file))
    for shape in SHAPES:
        x = torch.randn(shape)
        expected = model.forward_intermediates(x, intermediates_only=True) if dense else [model(x)]
        torch.testing.assert_close(run_onnx(file, x), expected, rtol=1e-4, atol=1e-4)
    assert "GridSample" in {node.op_type for node in onnx.load(file, load_external_data=False).graph.node}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    check_description(session.get_modelmeta().custom_metadata_map, path, model)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["lit_s"], indirect=True)
@torch.no_grad()
def test_torch_export(checkpoint: tuple[Path, nn.Module]) -> None:
    path, model = checkpoint
    export(path, "--format", "torch-export")
    metadata = dict.fromkeys(("architecture", "classes", "preprocessing"), "")
    graph = torch.export.load(path.with_suffix(".pt2"), extra_files=metadata).module()
    check_description(metadata, path, model)
    for shape in (SHAPES[0], (1, 3, 64, 64), SHAPES[2]):
        x = torch.randn(shape)
        torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_safetensors(checkpoint: tuple[Path, nn.Module]) -> None:
    path, model = checkpoint
    file, again = path.with_suffix(".safetensors"), path.with_name("again-hf")
    export(path, "--format", "safetensors")
    keywords = dict(KEYWORDS, num_classes=len(CLASSES), img_size=SIZE)
    read = timm.create_model(model.pretrained_cfg["architecture"], checkpoint_path=file, **keywords).eval()
    x = torch.randn(SHAPES[0])
    assert torch.equal(read(x), model(x))
    with safetensors.safe_open(file, "pt") as opened:
        check_description(opened.metadata(), path, model)
        assert "insects" not in str(opened.metadata())
    assert mode(file) == 0o640  # default permissions
    export(file, "--format", "hf", "--output", again)
    assert "**Training:**" not in (again / "README.md").read_text()
    expected = load_classifier(path, torch.device("cpu"))
    for copy in (file, again / "model.safetensors"):
        actual = load_classifier(copy, torch.device("cpu"))
        x = expected.transform(photo())[None]
        assert actual.classes == expected.classes and torch.equal(actual.transform(photo())[None], x)
        assert torch.equal(actual.model(x), expected.model(x))


@pytest.fixture
def hf(checkpoint: tuple[Path, nn.Module]) -> Path:
    """Return the exported folder."""
    export(checkpoint[0], "--format", "hf")
    return checkpoint[0].with_name("best-hf")


@torch.no_grad()
def test_timm_and_transformers_load_the_hf_folder(checkpoint: tuple[Path, nn.Module], hf: Path) -> None:
    path, model = checkpoint
    read = timm.create_model(f"local-dir:{hf}", pretrained=True).eval()
    x = torch.randn(SHAPES[0])
    assert torch.equal(read(x), model(x))
    config = json.loads((hf / "config.json").read_text())
    assert config["label_names"] == CLASSES and "num_classes" not in config["model_args"]
    assert config["pretrained_cfg"]["tag"] == config["pretrained_cfg"]["origin_url"] == ""  # not the authors' weights
    preprocessed = load_classifier(path, torch.device("cpu")).transform(photo())
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(read))
    assert torch.equal(transform(photo()), preprocessed)

    torch.testing.assert_close(AutoModelForImageClassification.from_pretrained(hf)(pixel_values=x).logits, model(x))
    features = AutoModel.from_pretrained(hf)(pixel_values=x).pooler_output
    torch.testing.assert_close(features, model.forward_head(model.forward_features(x), pre_logits=True))
    scores = model(preprocessed[None])[0].softmax(0)
    result = {row["label"]: row["score"] for row in pipeline("image-classification", model=str(hf))(photo())}
    assert result == pytest.approx(dict(zip(CLASSES, scores.tolist())), abs=1e-5)


@pytest.mark.parametrize("checkpoint", ["lit_s"], indirect=True)
def test_model_card_states_the_training_and_its_example_runs(
    checkpoint: tuple[Path, nn.Module],
    hf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    card = (hf / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["library_name"]) == ("apache-2.0", "timm")
    for fact in ("**Data:** insects\n", "**Initial weights:** start.pth\n", "97.50 % top-1", "2.5 of 300 epochs"):
        assert fact in card
    assert "TRAIN.WEIGHT_DECAY: 0.05\n" in card and "/home/me" not in card
    photo().save("photo.jpg")
    exec(card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(hf)), {})
    assert capsys.readouterr().out.strip() in CLASSES

    path = checkpoint[0]
    card = model_card(load_classifier(path, torch.device("cpu")), torch.load(path), Path("latest.pth"))
    assert "2.5 of 300 epochs" in card and "top-1" not in card  # the best accuracy may be that of other weights

    weights = {"model": timm.create_model("lit_s").state_dict()}
    torch.save(weights, "bare.pth")
    card = model_card(load_classifier("bare.pth", torch.device("cpu")), weights, Path("bare.pth"))
    assert "27,973,720 parameters" in card and "WEIGHT_DECAY" not in card and "top-1" not in card


@pytest.mark.parametrize("checkpoint", ["lit_s"], indirect=True)
def test_errors(checkpoint: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def export(*args: str | Path, status: int = 1) -> str:
        with pytest.raises(SystemExit) as error:
            main(list(map(str, args)))
        return capsys.readouterr().err if status == 2 else str(error.value)

    path = checkpoint[0]
    assert "--dense" in export(path, "--format", "hf", "--dense", status=2)
    assert "is the checkpoint itself" in export(path, "--format", "onnx", "--output", path)
    assert "none.pth: no such file" in export(tmp_path / "none.pth", "--format", "onnx")
    torch.save({"model": small_lit().state_dict()}, tmp_path / "other.pth")
    assert "other.pth: holds weights of no known LIT" in export(tmp_path / "other.pth", "--format", "onnx")
