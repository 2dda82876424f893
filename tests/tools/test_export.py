"""What is exported computes what the checkpoint computes, read by the program that it is meant for."""

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

from lit_backbone import load_checkpoint
from lit_backbone.lit import ARCHS
from lit_backbone.released import to_released
from lit_classification.model import load_classifier
from lit_classification.model_card import model_card
from tests.lit_backbone.small import small_lit
from tests.programs import Program
from tools.export import main, write_onnx

ROOT = Path(__file__).parents[2]
KEYWORDS = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4], mlp_ratios=2)
CLASSES = ["ant", "bee", "cat"]
SIZE = (64, 96)
SHAPES = [(2, 3, 64, 96), (1, 3, 32, 32), (3, 3, 75, 130)]
RUN = dict(model_ema=None, optimizer={}, scaler={}, updates_per_epoch=10, update=25, best=97.5)
RUN |= dict(recipe={})


def build(name: str) -> nn.Module:
    """A small model in evaluation mode, none of whose parameters is zero."""
    return randomize(timm.create_model(name, num_classes=len(CLASSES), img_size=SIZE, **KEYWORDS))


def randomize(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_((0.05 if ".offset." in key else 0.1) * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=["lit_s", "lit_ti"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A file as the trainer writes it, and its model."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    config = {"MODEL": {"NAME": name, "NUM_CLASSES": len(CLASSES), "LIT": KEYWORDS}}
    config |= {"DATA": {"IMG_SIZE": SIZE, "INTERPOLATION": "random", "DATA_PATH": "/home/me/insects"}}
    config |= {"TEST": {"CROP": name == "lit_ti"}, "TRAIN": {}}
    model = build(name)
    torch.save({"model": model.state_dict(), "config": config, "classes": CLASSES} | RUN, folder / "digits.pth")
    return folder / "digits.pth", model


def export(*args: str | Path) -> str:
    run = Program(ROOT / "tools" / "export.py", *args, prepare=partial(os.umask, 0o027))
    return run.finish().splitlines()[-1]


def run_onnx(path: Path, x: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]


def maps_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    return model.forward_intermediates(x, intermediates_only=True)


def check_description(metadata: dict[str, str], path: Path, model: nn.Module) -> None:
    """By it alone, a picture becomes the input that the checkpoint's own transform makes of it."""
    classifier = load_classifier(path, torch.device("cpu"))
    assert metadata["architecture"] == model.pretrained_cfg["architecture"]
    assert json.loads(metadata["classes"]) == CLASSES
    transform = timm.data.create_transform(**json.loads(metadata["preprocessing"]))
    assert torch.equal(transform(photo()), classifier.transform(photo()))


def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(90, 200, 3), dtype=np.uint8))


def mode(path: Path) -> int:
    return os.stat(path).st_mode & 0o777


@pytest.mark.parametrize("operator", ["DeformConv", pytest.param("GridSample", marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpoint", ["lit_ti"], indirect=True)
@torch.no_grad()
def test_onnx(checkpoint: tuple[Path, nn.Module], operator: str) -> None:
    path, model = checkpoint
    file = path.with_suffix(".onnx")
    options = ["--grid-sample"] if operator == "GridSample" else []
    assert export(path, "--format", "onnx", *options).endswith(str(file))
    for shape in SHAPES:
        x = torch.randn(shape)
        torch.testing.assert_close(run_onnx(file, x), [model(x)], rtol=1e-4, atol=1e-4)
    graph = onnx.load(file, load_external_data=False).graph
    operators = {node.op_type for node in graph.node}
    assert operators & {"DeformConv", "GridSample"} == {operator}
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    check_description(session.get_modelmeta().custom_metadata_map, path, model)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["lit_s"], indirect=True)
@torch.no_grad()
def test_dense_onnx(checkpoint: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path, model = checkpoint
    export(path, "--format", "onnx", "--dense", "--output", tmp_path / "maps.onnx")
    for shape in SHAPES:
        x = torch.randn(shape)
        torch.testing.assert_close(run_onnx(tmp_path / "maps.onnx", x), maps_of(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["lit_ti"], indirect=True)
@torch.no_grad()
def test_onnx_of_the_dense_backbone(checkpoint: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """That of detectors and segmentors: no class token, norms on the outputs, some stages only."""
    LITBackbone = pytest.importorskip("lit_backbone.mm").LITBackbone

    backbone = randomize(
        LITBackbone(ARCHS["lit_ti"] | KEYWORDS, img_size=SIZE, out_indices=(1, 2, 3), out_norms=(1, 3))
    )
    images = [torch.randn(shape) for shape in SHAPES]
    maps = [list(backbone(x)) for x in images]
    write_onnx(load_classifier(checkpoint[0], torch.device("cpu"))._replace(model=backbone), tmp_path / "backbone.onnx")
    for x, expected in zip(images, maps):
        torch.testing.assert_close(run_onnx(tmp_path / "backbone.onnx", x), expected, rtol=1e-4, atol=1e-4)


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
    export(path, "--format", "safetensors")
    keywords = dict(KEYWORDS, num_classes=len(CLASSES), img_size=SIZE)
    name = model.pretrained_cfg["architecture"]
    file = path.with_suffix(".safetensors")
    read = timm.create_model(name, checkpoint_path=file, **keywords).eval()
    x = torch.randn(SHAPES[0])
    assert torch.equal(read(x), model(x))
    with safetensors.safe_open(file, "pt") as opened:
        check_description(opened.metadata(), path, model)
        assert "insects" not in str(opened.metadata())
    assert mode(file) == 0o640  # what the umask leaves
    check_same_classifier(file, path)
    export(file, "--format", "hf", "--output", path.with_name("again-hf"))
    check_same_classifier(path.with_name("again-hf") / "model.safetensors", path)
    assert "digits.safetensors does not say" in (path.with_name("again-hf") / "README.md").read_text()


def check_same_classifier(file: Path, checkpoint: Path) -> None:
    read, own = (load_classifier(path, torch.device("cpu")) for path in (file, checkpoint))
    x = own.transform(photo())[None]
    assert read.classes == own.classes and torch.equal(read.transform(photo())[None], x)
    assert torch.equal(read.model(x), own.model(x))


@torch.no_grad()
def test_hf_folder(checkpoint: tuple[Path, nn.Module]) -> None:
    path, model = checkpoint
    folder = path.with_name("digits-hf")
    export(path, "--format", "hf")
    read = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(SHAPES[0])
    assert torch.equal(read(x), model(x))
    assert json.loads((folder / "config.json").read_text())["label_names"] == CLASSES
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(read))
    assert torch.equal(transform(photo()), load_classifier(path, torch.device("cpu")).transform(photo()))
    assert {mode(file) for file in folder.iterdir()} == {0o640}


@pytest.mark.parametrize("checkpoint", ["lit_s"], indirect=True)
def test_model_card(
    checkpoint: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It tells what the checkpoint knows and no more, and its example runs as it stands there."""
    path = checkpoint[0]
    export(path, "--format", "hf")
    monkeypatch.chdir(path.parent)
    card = Path("digits-hf/README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["library_name"], header["pipeline_tag"]) == (
        "apache-2.0", "timm", "image-classification"
    )  # fmt: skip
    for fact in ("**Data:** insects\n", "97.50 % top-1", "2.5 of 300 epochs", "3, named in"):
        assert fact in card
    assert "TRAIN.WEIGHT_DECAY: 0.05\n" in card and "/home/me" not in card
    photo().save("photo.jpg")
    example = card.split("```python\n")[1].split("```")[0]
    exec(example.replace("FOLDER", "digits-hf"), {})
    assert capsys.readouterr().out.strip() in CLASSES

    weights = {"model": timm.create_model("lit_s").state_dict()}
    torch.save(weights, "bare.pth")
    card = model_card(load_classifier("bare.pth", torch.device("cpu")), weights, Path("bare.pth"))
    assert card.count("bare.pth does not say") == 4 and "WEIGHT_DECAY" not in card


def test_released_layout_is_the_authors(goldens: dict) -> None:
    """All names and shapes that the original code has, LIT-S's index of biases included, and back again."""
    for name in ("lit_s", "lit_m", "lit_b", "lit_ti", "pvt_small_full_msa"):
        model = timm.create_model(name)
        released = to_released(model.state_dict())
        layout = goldens["state_dicts"][name]["keys"]
        assert {key: list(value.shape) for key, value in released.items()} == layout
    without = timm.create_model("lit_s", attention=(False,) * 4)  # nor biases, by which one could tell it from LIT-Ti
    assert "layers.0.blocks.0.mlp.fc1.weight" in to_released(without.state_dict())
    with pytest.raises(ValueError, match="stages.3.cls_token: no model of the authors"):
        to_released(timm.create_model("lit_ti", pos_embed="none").state_dict())
    index = released_index(14)
    ours = to_released(timm.create_model("lit_s").state_dict())["layers.2.blocks.3.attn.relative_position_index"]
    assert torch.equal(ours, index)


def released_index(side: int) -> Tensor:
    """Swin's definition: rows and columns of the displacement, counted from zero."""
    places = [(row, column) for row in range(side) for column in range(side)]
    width = 2 * side - 1
    index = [[(a - c + side - 1) * width + b - d + side - 1 for c, d in places] for a, b in places]
    return torch.tensor(index)


def test_released_file(tmp_path: Path) -> None:
    config = {"MODEL": {"NUM_CLASSES": len(CLASSES), "LIT": KEYWORDS}, "DATA": {"IMG_SIZE": 64}}
    for name in ("lit_s", "lit_ti"):
        model = randomize(timm.create_model(name, num_classes=len(CLASSES), img_size=64, **KEYWORDS))
        config["MODEL"]["NAME"] = name
        torch.save({"model": model.state_dict(), "config": config, "classes": CLASSES}, tmp_path / "own.pth")
        export(tmp_path / "own.pth", "--format", "released")
        released = torch.load(tmp_path / "own-released.pth")["model"]
        assert not any(key.startswith("stages.") for key in released)
        read = load_checkpoint(tmp_path / "own-released.pth", model)
        torch.testing.assert_close(read, dict(model.state_dict()), rtol=0, atol=0)


@torch.no_grad()
def test_class_names_stay_with_released_files(tmp_path: Path) -> None:
    """A thousand classes without names would be ImageNet's."""
    names = [f"plant {i}" for i in range(1000)]
    config = {"MODEL": {"NAME": "lit_s", "NUM_CLASSES": 1000}, "DATA": {"IMG_SIZE": 64}}
    weights = timm.create_model("lit_s", img_size=64).state_dict()
    torch.save({"model": weights, "config": config, "classes": names}, tmp_path / "own.pth")
    main([str(tmp_path / "own.pth"), "--format", "released"])
    assert load_classifier(tmp_path / "own-released.pth", torch.device("cpu")).classes == names


@pytest.mark.parametrize("checkpoint", ["lit_s"], indirect=True)
def test_what_cannot_be_exported(
    checkpoint: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def export(*args: str | Path, status: int) -> str:
        with pytest.raises(SystemExit) as caught:
            main(list(map(str, args)))
        return capsys.readouterr().err if status == 2 else str(caught.value)

    path = checkpoint[0]
    assert "is not square" in export(path, "--format", "released", status=1)
    for merging, pos_embed in (("conv", "relative"), ("conv_bn", "absolute")):
        with pytest.raises(ValueError, match="stages.1.merge.*no model of the authors has it"):
            to_released(small_lit(merging=merging, pos_embed=pos_embed).state_dict())
    assert "--dense" in export(path, "--format", "hf", "--dense", status=2)
    assert "--grid-sample" in export(path, "--format", "hf", "--grid-sample", status=2)
    for form, name in (("safetensors", "a.pth"), ("released", "a.safetensors")):
        said = export(path, "--format", form, "--output", tmp_path / name, status=2)
        assert f"{name}: .safetensors is the suffix" in said
    assert "is the checkpoint itself" in export(path, "--format", "released", "--output", path, status=1)
    assert "none.pth: no such file" in export(tmp_path / "none.pth", "--format", "onnx", status=1)
    torch.save({"model": small_lit().state_dict()}, tmp_path / "other.pth")
    assert "weights of no known classifier" in export(tmp_path / "other.pth", "--format", "onnx", status=1)
    (tmp_path / "file").touch()
    message = export(path, "--format", "safetensors", "--output", tmp_path / "file" / "a.safetensors", status=1)
    assert "a.safetensors: not written" in message and "Traceback" not in message


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["lit_ti", "lit_s"])  # LIT-M and LIT-B repeat LIT-S's blocks; maps: see above
def test_onnx_at_full_size(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for key, parameter in model.named_parameters():
        if ".offset." in key:  # zero at first, which would prove little
            parameter.normal_(std=0.02)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    export(tmp_path / "model.pth", "--format", "onnx")
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32))
    torch.testing.assert_close(run_onnx(tmp_path / "model.onnx", x), [model(x)], rtol=1e-4, atol=1e-4)
