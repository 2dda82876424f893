"""The benchmark runs as it is used; what it measures is no test's business."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torchvision.ops import deform_conv2d

from lit_backbone import dtm
from tests.programs import Program
from tools import benchmark, plot_benchmark

ROOT = Path(__file__).parents[2]
SHAPES = ("96 x 56 x 56", "192 x 28 x 28", "384 x 14 x 14")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a short run printed, and the file it wrote."""
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = "--device cpu --sections operator attention input --repeats 1 --batch-size 2".split()
    return run("benchmark.py", *arguments, "--output", folder), folder / "cpu.json"


def run(script: str, *arguments: str | Path) -> str:
    return Program(ROOT / "tools" / script, *arguments).finish()


@pytest.mark.slow
def test_every_comparison_has_its_ratio(results: tuple[str, Path]) -> None:
    printed, file = results
    found = json.loads(file.read_text())
    assert found["machine"]["torch"] == torch.__version__
    operator = {(row["what"], row["name"]): row for row in found["rows"] if row["section"] == "operator"}
    assert len(operator) == 2 * 3 * 3  # forward and with backward, shapes of LIT-S, ways
    assert len([row for row in found["rows"] if row["section"] == "attention"]) == 5 * 2  # sizes, ways
    assert all(row["ms"] > 0 and row["mib"] > 0 for row in operator.values())
    for (what, name), row in operator.items():
        if name != "ours":
            assert found["ratios"][f"{what}, time: {name} / ours"] == row["ms"] / operator[what, "ours"]["ms"]
    assert all(name in printed for name in found["ratios"])


@pytest.mark.slow
def test_what_was_found_is_drawn(results: tuple[str, Path]) -> None:
    rows = json.loads(results[1].read_text())["rows"]
    growth = [dict(section="growth", what=f"1 x {n} x {n}", name="lit_s", ms=n, images_per_s=1e3 / n) for n in (64, 96)]
    *bars, curves = plot_benchmark.draw(rows + growth).axes
    assert [axes.get_title("right") for axes in bars] == [f"forward + backward, {shape}" for shape in SHAPES]
    for axes in bars:
        drawn = {label.get_text(): bar.get_width() for label, bar in zip(axes.get_yticklabels(), axes.patches)}
        assert drawn == {row["name"]: row["ms"] for row in rows if row["what"] == axes.get_title("right")}
    assert curves.lines[0].get_xydata().tolist() == [[64, 64], [96, 96]]
    run("plot_benchmark.py", results[1])
    assert Image.open(results[1].with_suffix(".png")).size[0] == 1500


@pytest.mark.slow
def test_memory_is_what_a_call_holds_at_its_peak(results: tuple[str, Path]) -> None:
    """A plain convolution of two maps of 96 x 56 x 56 to 192 x 28 x 28 holds its result, and work space beside it."""
    rows = json.loads(results[1].read_text())["rows"]
    held = [row["mib"] for row in rows if (row["name"], row["what"]) == ("plain convolution", "forward, 96 x 56 x 56")]
    result = 2 * 192 * 28 * 28 * 4 / 2**20
    assert result <= held[0] < 5 * result


def test_the_original_way_gives_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dtm, "deform_conv2d", lambda *args, **kw: calls.append(1) or deform_conv2d(*args, **kw))
    bench = benchmark.Bench(benchmark.parse_args(["--device", "cpu"]))
    small = dict(embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), img_size=64, num_classes=5)
    original = benchmark.build_model(benchmark.ORIGINAL, bench, **small).eval()
    ours = timm.create_model("lit_s", **small).eval()
    for module in ours.modules():
        if hasattr(module, "offset"):
            torch.nn.init.normal_(module.offset.weight, std=0.1)
    original.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(original(images), ours(images), rtol=1e-4, atol=1e-5)
    assert len(calls) == 3
