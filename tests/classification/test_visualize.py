"""The visualizers: sampling points of DTM, and attention maps."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import visualize_attention
import visualize_offset
from lit_backbone import read_checkpoint
from lit_backbone.attention_maps import choose_tokens, query_attention
from lit_backbone.visualize import sampling_chains
from lit_classification.config_reader import config_from_checkpoint
from lit_classification.model import load_classifier
from tests.classification.conftest import refusal
from tests.programs import Program

CLASSIFICATION = Path(__file__).parents[2] / "classification"
DEMO = CLASSIFICATION / "visualization" / "demo.JPEG"
SMALL = CLASSIFICATION.parent / "experiments" / "cifar10" / "lit.pth"  # for 64 x 64 pixels
pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def long_offsets(tmp_path: Path) -> Path:
    """Write the weights of a small LIT with offsets of which some lead out of the feature map."""
    torch.manual_seed(0)
    content = read_checkpoint(SMALL)
    for key, value in content["model"].items():
        if ".offset." in key:
            content["model"][key] = torch.randn_like(value) * (2 if key.endswith("bias") else 0.05)
    torch.save(content, tmp_path / "long.pth")
    return tmp_path / "long.pth"


def usage_error(capsys, program, *args) -> str:
    with pytest.raises(SystemExit):
        program.main(list(map(str, args)))
    return capsys.readouterr().err


# Offsets


def test_published_command(long_offsets, tmp_path):
    """Run it in a new directory, with relative paths and the default output."""
    (tmp_path / "visualization").mkdir()
    shutil.copy(DEMO, tmp_path / "visualization")
    command = [CLASSIFICATION / "visualize_offset.py", "--model", "lit_s", "--resume", long_offsets]
    command += ["--vis_image", "visualization/demo.JPEG"]
    output = Program(*command, prepare=lambda: os.chdir(tmp_path)).finish()
    drawn = {path.name: np.array(Image.open(path)) for path in (tmp_path / "visualization" / "demo").iterdir()}
    assert drawn.keys() == {"0-0.png", "0-1.png", "1-0.png", "1-1.png"}

    classifier = load_classifier(long_offsets, torch.device("cpu"))
    chains = sampling_chains(classifier.model, classifier.transform(Image.open(DEMO).convert("RGB")))
    kept = sum(len(chains.of(row, column)) for row in range(2) for column in range(2))
    assert 0 < kept < 2 * 2 * 64 and len(chains.of(1, 0))
    assert f"visualization/demo: 2 x 2 tokens, {kept} sampling points, {2 * 2 * 64 - kept} dropped" in output
    scale = len(drawn["1-0.png"]) // 64
    for y, x in (scale * chains.of(1, 0)).tolist():
        near = drawn["1-0.png"][max(0, int(y) - 1) : int(y) + 2, max(0, int(x) - 1) : int(x) + 2].reshape(-1, 3)
        assert (255, 0, 0) in map(tuple, near.tolist())


def test_grid_html_and_other_sizes(tmp_path, capsys):
    arguments = ["--resume", str(SMALL), "--vis_image", str(DEMO), "--output", str(tmp_path)]
    visualize_offset.main([*arguments, "--grid", "--img_size", "64", "160", "--at-most", "3"])
    output = capsys.readouterr().out
    assert "2 x 5 tokens" in output and "; 6 tokens drawn" in output
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["grid.png"]
    size = Image.open(tmp_path / "demo" / "grid.png").size
    visualize_offset.main([*arguments, "--grid", "--plain", "--at-most", "1"])
    assert Image.open(tmp_path / "demo" / "grid.png").size == (2 * 448 + 4, 448) != size
    visualize_offset.main([*arguments, "--html", str(tmp_path / "html" / "demo.html"), "--img_size", "96"])
    assert "demo.html: 3 x 3 tokens" in capsys.readouterr().out
    assert "data:image/jpeg;base64," in (tmp_path / "html" / "demo.html").read_text()


def test_errors_of_visualize_offset(tmp_path, capsys):
    content = read_checkpoint(SMALL)
    content["config"]["MODEL"]["LIT"]["merging"] = "conv"
    content["model"] = timm.create_model(**config_from_checkpoint(content, "lit.pth").model_keywords).state_dict()
    torch.save(content, tmp_path / "conv.pth")
    small = ["--resume", SMALL, "--vis_image"]
    for args, problem in (
        (["--vis_image", DEMO], "--resume"),
        ([*small, DEMO, "--img_size", 16], "--img_size: expected 32"),
        ([*small, DEMO, "--img_size", 100_000], "--img_size: expected 32"),
        ([*small, DEMO, "--at-most", 0], "--at-most: expected 1 or more"),
    ):
        assert problem in usage_error(capsys, visualize_offset, *args)
    for args, problem in (
        (["--model", "lit_ti", *small, DEMO], "lit.pth: holds lit_s, not lit_ti"),
        (["--resume", "none.pth", "--vis_image", DEMO], "none.pth: no such file"),
        ([*small, "none.jpg"], "none.jpg: unreadable image"),
        (["--resume", tmp_path / "conv.pth", "--vis_image", DEMO], "no deformable token merging"),
    ):
        assert problem in refusal(visualize_offset, *args)


# Attention


def test_attention_of_the_model_in_the_paper(image_folder, tmp_path, capsys):
    weights = timm.create_model("pvt_small_full_msa", img_size=32).state_dict()
    torch.save({"model": weights}, tmp_path / "pvt.pth")
    arguments = ["--model", "pvt_small_full_msa", "--resume", str(tmp_path / "pvt.pth")]
    arguments += ["--data-path", str(image_folder), "--num-images", "2", "--output", str(tmp_path)]
    visualize_attention.main(arguments)
    assert "stages 1, 2, 3, 4, averaged over 2 image(s)" in capsys.readouterr().out
    for i, (blocks, heads) in enumerate([(3, 1), (4, 2), (6, 5), (3, 8)], 1):
        names = {f"block-{j}/head-{k}.png" for j in range(1, blocks + 1) for k in range(1, heads + 1)}
        stage = tmp_path / f"stage-{i}"
        assert {str(path.relative_to(stage)) for path in stage.rglob("*.png")} == names
        assert (tmp_path / f"stage-{i}.png").is_file()
        assert np.load(tmp_path / f"stage-{i}.npy").shape == (blocks, heads, 32 >> i + 1, 32 >> i + 1)


def test_attention_of_a_single_image(tmp_path, capsys):
    visualize_attention.main(["--resume", str(SMALL), "--vis_image", str(DEMO), "--output", str(tmp_path)])
    assert "stages 3, 4, averaged over 1 image(s)\n" in capsys.readouterr().out
    classifier = load_classifier(SMALL, torch.device("cpu"))
    image = classifier.transform(Image.open(DEMO).convert("RGB"))
    queries = choose_tokens(None, classifier.model.map_sizes((64, 64), 4))
    for stage, maps in query_attention(classifier.model, image[None], queries).items():
        np.testing.assert_allclose(np.load(tmp_path / f"stage-{stage + 1}.npy"), maps[0], rtol=1e-4, atol=1e-7)


def test_errors_of_visualize_attention(image_folder, tmp_path, capsys):
    small = ["--resume", SMALL, "--output", tmp_path, "--data-path"]
    assert "--num-images: expected 1 or more" in usage_error(
        capsys, visualize_attention, *small, image_folder, "--num-images", 0
    )
    message = usage_error(capsys, visualize_attention, *small, image_folder, "--vis_image", DEMO)
    assert "--vis_image: not allowed with argument --data-path" in message
    assert "val: no such file" in refusal(visualize_attention, *small, tmp_path)
    assert "--tokens 4: " in refusal(visualize_attention, *small, image_folder, "--tokens", 0, 0, 0, 4)
