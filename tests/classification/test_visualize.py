import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import visualize_attention
import visualize_offset
from lit_backbone.visualize import sampling_chains
from lit_classification.model import load_classifier
from tests.classification.conftest import TINY_LIT
from tests.programs import Program

CLASSIFICATION = Path(__file__).parents[2] / "classification"
DEMO = CLASSIFICATION / "visualization" / "demo.JPEG"
SMALL = CLASSIFICATION.parent / "docs" / "paper" / "lit.pth"  # for 64 x 64 pixels


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of LIT-Ti's and PVT-Small's weights, of which LIT-Ti's make its offsets reach far."""
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


def error(main, *args, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, args)))
    return ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err


# ---- offsets


def test_the_published_command(weights: dict[str, Path], tmp_path: Path) -> None:
    """In a folder of its own, with relative paths and the default output."""
    (tmp_path / "visualization").mkdir()
    (tmp_path / "visualization" / "demo.JPEG").write_bytes(DEMO.read_bytes())
    command = [CLASSIFICATION / "visualize_offset.py", "--model", "lit_ti"]
    command += ["--resume", weights["lit_ti"], "--vis_image", "visualization/demo.JPEG"]
    printed = Program(*command, prepare=lambda: os.chdir(tmp_path)).finish()
    pictures = sorted((tmp_path / "visualization" / "demo").iterdir())
    assert [path.name for path in pictures] == [f"{row}-{column}.png" for row in range(7) for column in range(7)]
    assert {Image.open(path).size for path in pictures} == {(448, 448)}

    classifier = load_classifier(weights["lit_ti"], torch.device("cpu"))
    x = classifier.transform(Image.open(DEMO).convert("RGB"))  # normalised, as in evaluation
    chains = sampling_chains(classifier.model, x)
    kept = sum(len(chains.of(row, column)) for row in range(7) for column in range(7))
    assert 0 < kept < 7 * 7 * 64
    assert printed == (
        f"visualization/demo: 7 x 7 tokens, {kept} sampling points, {7 * 7 * 64 - kept} dropped outside the map\n"
    )
    picture = np.array(Image.open(tmp_path / "visualization" / "demo" / "3-4.png"))
    for y, x in (2 * chains.of(3, 4)).tolist():
        near = picture[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].reshape(-1, 3)
        assert (255, 0, 0) in map(tuple, near.tolist())


def test_grid_page_and_other_sizes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--resume", str(SMALL), "--vis_image", str(DEMO), "--output", str(tmp_path)]
    visualize_offset.main([*arguments, "--grid", "--img_size", "64", "160", "--at-most", "3"])
    said = capsys.readouterr().out
    assert "2 x 5 tokens" in said and "; 6 tokens drawn" in said
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["grid.png"]
    visualize_offset.main([*arguments, "--html", str(tmp_path / "pages" / "demo.html"), "--img_size", "96"])
    assert "demo.html: 3 x 3 tokens" in capsys.readouterr().out
    assert "data:image/jpeg;base64," in (tmp_path / "pages" / "demo.html").read_text()


def test_picture_is_what_the_model_sees() -> None:
    pixels = torch.rand(3, 40, 60)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    picture = np.array(visualize_offset.to_picture((pixels - mean) / std))
    assert np.abs(picture - 255 * pixels.permute(1, 2, 0).numpy()).max() <= 1


def test_errors_of_visualize_offset(weights: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def fails(*args) -> str:
        return error(visualize_offset.main, *args, capsys=capsys)

    small = ["--resume", SMALL, "--vis_image"]
    assert "arguments are required: --resume" in fails("--model", "lit_ti", "--vis_image", DEMO)
    assert "lit.pth: holds lit_s, not lit_ti; leave out --model" in fails("--model", "lit_ti", *small, DEMO)
    assert "none.pth: no such file" in fails("--resume", "none.pth", "--vis_image", DEMO)
    assert "none.jpg" in fails(*small, "none.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    assert "text.jpg: no readable image" in fails(*small, tmp_path / "text.jpg")
    for size in (16, 100_000):
        assert f"from 32 to 2048, got [{size}]" in fails(*small, DEMO, "--img_size", size)
    assert "--at-most: expected 1 or more" in fails(*small, DEMO, "--at-most", 0)
    (tmp_path / "file").touch()
    assert "/file" in fails(*small, DEMO, "--output", tmp_path / "file")
    assert "no deformable token merging" in fails("--resume", weights["pvt_small_full_msa"], "--vis_image", DEMO)


# ---- attention


def test_attention_of_the_papers_model(
    weights: dict[str, Path], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--model", "pvt_small_full_msa", "--resume", str(weights["pvt_small_full_msa"])]
    arguments += ["--data-path", str(image_folder), "--num-images", "2", "--output", str(tmp_path)]
    visualize_attention.main(arguments)
    assert "stages 1, 2, 3, 4, averaged over 2 images" in capsys.readouterr().out
    for i, (blocks, heads) in enumerate([(3, 1), (4, 2), (6, 5), (3, 8)], 1):
        names = {f"block-{j}/head-{k}.png" for j in range(1, blocks + 1) for k in range(1, heads + 1)}
        stage = tmp_path / f"stage-{i}"
        assert {str(path.relative_to(stage)) for path in stage.rglob("*.png")} == names
        assert Image.open(tmp_path / f"stage-{i}.png").width > 224 * heads - 1


def test_attention_is_averaged_over_the_images(image_folder: Path) -> None:
    model = timm.create_model("lit_s", **TINY_LIT, img_size=64, num_classes=3).eval()
    classes = load_images(image_folder)
    loader = torch.utils.data.DataLoader(classes, batch_size=2, collate_fn=list)
    queries = [5, 5, 5, 1]
    average = visualize_attention.average_attention(model, loader, queries, torch.device("cpu"))
    alone = [visualize_attention.query_attention(model, x[None], queries) for _, x in classes]
    for stage, maps in average.items():
        torch.testing.assert_close(maps.float(), torch.stack([one[stage][0] for one in alone]).mean(0))


def load_images(folder: Path) -> list[tuple[str, torch.Tensor]]:
    paths = sorted((folder / "val").rglob("*.jpg"))[:5]
    images = [np.array(Image.open(path).resize((64, 64)), dtype=np.float32) for path in paths]
    return [(str(path), torch.from_numpy(image / 255).permute(2, 0, 1)) for image, path in zip(images, paths)]


def test_tokens_are_those_of_the_paper_or_at_their_places() -> None:
    sizes = [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert visualize_attention.choose_tokens(None, sizes) == [1260, 294, 92, 17]
    assert visualize_attention.choose_tokens(None, [(2 * h, 2 * w) for h, w in sizes]) == [
        2 * (token // side) * 2 * side + 2 * (token % side) for token, side in zip((1260, 294, 92, 17), (56, 28, 14, 7))
    ]
    assert visualize_attention.choose_tokens([0, 1, 2, 3], sizes) == [0, 1, 2, 3]


def test_errors_of_visualize_attention(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def fails(*args) -> str:
        return error(visualize_attention.main, *args, capsys=capsys)

    small = ["--resume", SMALL, "--output", tmp_path, "--data-path"]
    assert "val: no such file or folder" in fails(*small, tmp_path)
    assert "--num-images: expected 1 or more" in fails(*small, image_folder, "--num-images", 0)
    message = fails(*small, image_folder, "--tokens", 0, 0, 0, 4)
    assert "--tokens 4: the map has 2 x 2 tokens, 0 to 3" in message
