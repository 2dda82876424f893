"""The visualizers: sampling points of DTM, and attention maps."""

import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import visualize_attention
import visualize_offset
from lit_backbone.attention_maps import choose_tokens, query_attention
from lit_backbone.visualize import sampling_chains
from lit_classification.model import load_classifier
from tests.programs import Program

CLASSIFICATION = Path(__file__).parents[2] / "classification"
DEMO = CLASSIFICATION / "visualization" / "demo.JPEG"
SMALL = CLASSIFICATION.parent / "experiments" / "cifar10" / "lit.pth"  # for 64 x 64 pixels


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write weights of LIT-Ti, with long offsets, and of PVT-Small."""
    root, files = tmp_path_factory.mktemp("weights"), {}
    for name in ("lit_ti", "pvt_small_full_msa"):
        torch.manual_seed(0)
        model = timm.create_model(name)
        for module in model.modules():
            if hasattr(module, "offset"):
                torch.nn.init.normal_(module.offset.weight, std=0.05)
                torch.nn.init.normal_(module.offset.bias, std=2)
        files[name] = root / f"{name}.pth"
        torch.save({"model": model.state_dict()}, files[name])
    return files


def error(program, *args, capsys) -> str:
    with pytest.raises(SystemExit) as info:
        program.main(list(map(str, args)))
    return info.value.code if isinstance(info.value.code, str) else capsys.readouterr().err


# Offsets


def test_published_command(weights, tmp_path):
    """Run it in a new directory, with relative paths and the default output."""
    (tmp_path / "visualization").mkdir()
    (tmp_path / "visualization" / "demo.JPEG").write_bytes(DEMO.read_bytes())
    command = [CLASSIFICATION / "visualize_offset.py", "--model", "lit_ti"]
    command += ["--resume", weights["lit_ti"], "--vis_image", "visualization/demo.JPEG"]
    output = Program(*command, prepare=lambda: os.chdir(tmp_path)).finish()
    files = sorted((tmp_path / "visualization" / "demo").iterdir())
    assert [path.name for path in files] == [f"{row}-{column}.png" for row in range(7) for column in range(7)]
    assert {Image.open(path).size for path in files} == {(448, 448)}

    classifier = load_classifier(weights["lit_ti"], torch.device("cpu"))
    chains = sampling_chains(classifier.model, classifier.transform(Image.open(DEMO).convert("RGB")))
    kept = sum(len(chains.of(row, column)) for row in range(7) for column in range(7))
    assert 0 < kept < 7 * 7 * 64
    counts = f"{kept} sampling points, {7 * 7 * 64 - kept} dropped outside the feature map"
    assert output == f"visualization/demo: 7 x 7 tokens, {counts}\n"
    drawn = np.array(Image.open(tmp_path / "visualization" / "demo" / "3-4.png"))
    for y, x in (2 * chains.of(3, 4)).tolist():
        near = drawn[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].reshape(-1, 3)
        assert (255, 0, 0) in map(tuple, near.tolist())


def test_grid_html_and_other_sizes(tmp_path, capsys):
    arguments = ["--resume", str(SMALL), "--vis_image", str(DEMO), "--output", str(tmp_path)]
    visualize_offset.main([*arguments, "--grid", "--img_size", "64", "160", "--at-most", "3"])
    output = capsys.readouterr().out
    assert "2 x 5 tokens" in output and "; 6 tokens drawn" in output
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["grid.png"]
    visualize_offset.main([*arguments, "--html", str(tmp_path / "html" / "demo.html"), "--img_size", "96"])
    assert "demo.html: 3 x 3 tokens" in capsys.readouterr().out
    assert "data:image/jpeg;base64," in (tmp_path / "html" / "demo.html").read_text()


def test_drawn_image_is_the_input_of_the_model(monkeypatch):
    write_offsets = Mock(return_value="")
    monkeypatch.setattr(visualize_offset, "write_offsets", write_offsets)
    visualize_offset.main(["--resume", str(SMALL), "--vis_image", str(DEMO)])
    _, x, image, _ = write_offsets.call_args.args
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (255 * (x * std + mean)).permute(1, 2, 0).numpy()
    assert pixels.std() > 10 and np.abs(np.array(image) - pixels.clip(0, 255)).max() < 1.01


def test_errors_of_visualize_offset(weights, tmp_path, capsys):
    def fails(*args) -> str:
        return error(visualize_offset, *args, capsys=capsys)

    small = ["--resume", SMALL, "--vis_image"]
    assert "arguments are required: --resume" in fails("--model", "lit_ti", "--vis_image", DEMO)
    assert "lit.pth: holds lit_s, not lit_ti. Omit --model" in fails("--model", "lit_ti", *small, DEMO)
    assert "none.pth: no such file" in fails("--resume", "none.pth", "--vis_image", DEMO)
    assert "none.jpg: unreadable image (" in fails(*small, "none.jpg")
    for size in (16, 100_000):
        assert f"--img_size: expected 32 to 2048, got {size}" in fails(*small, DEMO, "--img_size", size)
    assert "--at-most: expected 1 or more" in fails(*small, DEMO, "--at-most", 0)
    assert "no deformable token merging" in fails("--resume", weights["pvt_small_full_msa"], "--vis_image", DEMO)


# Attention


def test_attention_of_the_model_in_the_paper(weights, image_folder, tmp_path, capsys):
    arguments = ["--model", "pvt_small_full_msa", "--resume", str(weights["pvt_small_full_msa"])]
    arguments += ["--data-path", str(image_folder), "--num-images", "2", "--output", str(tmp_path)]
    visualize_attention.main(arguments)
    assert "stages 1, 2, 3, 4, averaged over 2 image(s)" in capsys.readouterr().out
    for i, (blocks, heads) in enumerate([(3, 1), (4, 2), (6, 5), (3, 8)], 1):
        names = {f"block-{j}/head-{k}.png" for j in range(1, blocks + 1) for k in range(1, heads + 1)}
        stage = tmp_path / f"stage-{i}"
        assert {str(path.relative_to(stage)) for path in stage.rglob("*.png")} == names
        assert Image.open(tmp_path / f"stage-{i}.png").width > 224 * heads - 1
        assert np.load(tmp_path / f"stage-{i}.npy").shape == (blocks, heads, 224 >> i + 1, 224 >> i + 1)


def test_attention_of_a_single_image(tmp_path, capsys):
    visualize_attention.main(["--resume", str(SMALL), "--vis_image", str(DEMO), "--output", str(tmp_path)])
    assert "stages 3, 4, averaged over 1 image(s)\n" in capsys.readouterr().out
    classifier = load_classifier(SMALL, torch.device("cpu"))
    image = classifier.transform(Image.open(DEMO).convert("RGB"))
    queries = choose_tokens(None, classifier.model.map_sizes((64, 64), 4))
    for stage, maps in query_attention(classifier.model, image[None], queries).items():
        np.testing.assert_allclose(np.load(tmp_path / f"stage-{stage + 1}.npy"), maps[0], rtol=1e-4, atol=1e-7)


def test_validation_images_are_a_random_sample(image_folder, tmp_path, monkeypatch):
    """The first files of a dataset are of one class."""
    samples = []
    monkeypatch.setattr(visualize_attention, "image_loader", lambda paths, _: samples.append(paths) or [])
    for seed in ("0", "0", "1"):
        arguments = ["--resume", str(SMALL), "--data-path", str(image_folder), "--num-images", "4"]
        visualize_attention.main([*arguments, "--seed", seed, "--output", str(tmp_path)])
    assert samples[0] == samples[1] != samples[2]
    assert len({Path(path).parent.name for path in samples[0]}) > 1 and len(set(samples[0])) == 4


def test_errors_of_visualize_attention(image_folder, tmp_path, capsys):
    def fails(*args) -> str:
        return error(visualize_attention, *args, capsys=capsys)

    small = ["--resume", SMALL, "--output", tmp_path, "--data-path"]
    assert "val: no such file or directory" in fails(*small, tmp_path)
    assert "--vis_image: not allowed with argument --data-path" in fails(*small, tmp_path, "--vis_image", DEMO)
    assert "--num-images: expected 1 or more" in fails(*small, image_folder, "--num-images", 0)
    message = fails(*small, image_folder, "--tokens", 0, 0, 0, 4)
    assert "--tokens 4: the feature map has 2 x 2 tokens, from 0 on." in message
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "0.jpg").touch()
    assert "val/0.jpg: unreadable image (" in fails(*small, tmp_path)
