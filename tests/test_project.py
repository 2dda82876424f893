"""Examples of README.md and docs/faq.md, the entry points of torch.hub, and the installation of the backbone alone."""

import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import hubconf
import lit_backbone

ROOT = Path(__file__).parents[1]
MARKDOWN = (ROOT / "README.md").read_text() + (ROOT / "docs/faq.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", MARKDOWN, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a working directory with the files of the examples, and with a cached download of lit_s.pth."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(0)
    torch.save({"model": timm.create_model("lit_s").state_dict()}, "lit_s.pth")
    Path("checkpoints").mkdir()
    Path("checkpoints/lit_s.pth").symlink_to(tmp_path / "lit_s.pth")  # torch.hub's cache of downloads
    pixels = np.random.default_rng(0).integers(256, size=(240, 300, 3), dtype=np.uint8)
    for path in ("photo.jpg", "photos/cat/1.jpg", "photos/dog/1.jpg"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path


def run_example(part: str) -> dict:
    (source,) = [example for example in EXAMPLES if part in example]
    names: dict = {}
    exec(source, names)
    return names


def test_features(folder: Path) -> None:
    assert run_example("photo.jpg")["features"].shape == (1, 768)


@pytest.mark.slow
def test_fine_tuning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = run_example("ImageFolder")
    assert "its head has 1000 classes, the model 2" in caplog.text
    start = torch.load("lit_s.pth")["model"]
    now = names["model"].state_dict()
    assert now["head.weight"].shape == (2, 768) and names["loss"].isfinite()
    assert not torch.equal(now["stages.2.blocks.0.mlp.fc1.weight"], start["stages.2.blocks.0.mlp.fc1.weight"])


def test_torchvision_detector() -> None:
    detector = run_example("FasterRCNN")["detector"]
    target = dict(boxes=torch.tensor([[10.0, 20.0, 90.0, 110.0]]), labels=torch.tensor([3]))
    detector.transform.min_size = (160,)
    losses = detector([torch.rand(3, 160, 200)], [target])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.backbone.body.model.stages[0].parameters())
    detector.eval()
    assert detector([torch.rand(3, 160, 200)])[0].keys() == {"boxes", "labels", "scores"}


def test_memory_of_an_image() -> None:
    names = run_example("kept_bytes")
    assert names["fixed"] > 16 * 27_973_720
    names["model"].set_grad_checkpointing()
    assert names["kept_bytes"](names["model"], torch.zeros(2, 3, 224, 224)) < names["two"] / 2


def test_torch_hub(folder: Path) -> None:
    model = torch.hub.load(str(ROOT), "lit_s", source="local", checkpoint="lit_s.pth", drop_path_rate=0.1)
    assert torch.equal(model.head.weight, torch.load("lit_s.pth")["model"]["head.weight"])
    entries = [name for name in vars(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")]
    assert sorted(entries) == sorted(timm.list_models(module="lit"))  # the list of torch.hub.list
    with pytest.raises(lit_backbone.CheckpointError, match="keys missing"):
        hubconf.lit_s(features_only=True, checkpoint="lit_s.pth")


def test_torch_hub_takes_classes_and_input_size_from_the_file(tmp_path: Path) -> None:
    trained = timm.create_model("lit_s", num_classes=7, img_size=(64, 112)).eval()
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    model = hubconf.lit_s(checkpoint=tmp_path / "trained.pth").eval()
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 64, 112)
    images = torch.rand(1, 3, 64, 112)
    assert torch.equal(model(images), trained(images))
    model = hubconf.lit_s(checkpoint=tmp_path / "trained.pth", num_classes=3, img_size=224)
    assert (model.num_classes, timm.data.resolve_model_data_config(model)["input_size"]) == (3, (3, 224, 224))
    lit = {"norm_eps": 0.1, "depths": None}  # keywords that change no shape
    torch.save({"model": trained.state_dict(), "config": {"MODEL": {"LIT": lit}}}, tmp_path / "trained.pth")
    with pytest.raises(lit_backbone.CheckpointError, match="other keywords .norm_eps."):
        hubconf.lit_s(checkpoint=tmp_path / "trained.pth")
    assert hubconf.lit_s(checkpoint=tmp_path / "trained.pth", norm_eps=0.1).norm.eps == 0.1


def test_versions_agree() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lit_backbone.__version__
    assert f"\n## {lit_backbone.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    pins = set((ROOT / "requirements/constraints.txt").read_text().splitlines())
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    used = {pin for hook in hooks for pin in hook.get("additional_dependencies", []) if re.match("ruff|codespell", pin)}
    assert len(used) == 2 and used <= pins


@pytest.mark.slow
def test_the_backbone_installs_alone(tmp_path: Path) -> None:
    """Without the packages of the trainer, and outside of the repository."""
    source, target = tmp_path / "source", tmp_path / "target"
    for package in ("lit_backbone", "classification/lit_classification", "requirements"):
        shutil.copytree(ROOT / package, source / package)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    subprocess.run([*install, target, source], check=True, capture_output=True)

    (distribution,) = Distribution.discover(name="lit-backbone", path=[str(target)])
    assert distribution.version == lit_backbone.__version__
    required = {line for line in distribution.requires if "extra ==" not in line}
    assert {re.split("[<>=,]", line)[0] for line in required} == {
        "torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "tqdm"
    }  # fmt: skip

    use = """
import sys
sys.modules.update(dict.fromkeys(("pydantic", "ruamel", "tensorboard")))
sys.path.insert(0, ".")
import timm, torch
import lit_backbone, lit_backbone.visualize
print(lit_backbone.__file__, timm.create_model("lit_s", num_classes=0)(torch.zeros(1, 3, 64, 64)).shape)"""
    run = subprocess.run([sys.executable, "-I", "-c", use], cwd=target, capture_output=True, text=True)
    assert run.stdout == f"{target / 'lit_backbone/__init__.py'} torch.Size([1, 768])\n", run.stderr
