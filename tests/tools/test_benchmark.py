"""The benchmark runs and reports every comparison. No test asserts a time."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from tests.programs import Program
from tools import benchmark

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_results(tmp_path: Path) -> None:
    options = "--device cpu --sections operator input --repeats 1 --batch-size 2".split()
    printed = Program(ROOT / "tools/benchmark.py", *options, "--output", tmp_path).finish()
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert results["machine"]["torch"] == torch.__version__
    operator = {(row["what"], row["name"]): row for row in results["rows"] if row["section"] == "operator"}
    assert len(operator) == 2 * 3 * 3  # forward and backward, shapes of LIT-S, implementations
    for (what, name), row in operator.items():
        assert row["ms"] > 0 and f"{what} " in printed
        assert row["ratio"] == row["ms"] / operator[what, "lit_backbone"]["ms"], name
    assert results["rows"][-1]["images_per_s"] > 0
    assert Image.open(tmp_path / "cpu.png").size[0] == 1500


def test_torchvision_operator_gives_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    deform_conv2d = benchmark.deform_conv2d
    monkeypatch.setattr(benchmark, "deform_conv2d", lambda *args, **kw: calls.append(1) or deform_conv2d(*args, **kw))
    bench = benchmark.Bench(benchmark.parse_args(["--device", "cpu"]))
    small = dict(embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), img_size=64, num_classes=5)
    actual = benchmark.build_model(benchmark.DEFORM_CONV, bench, **small).eval()
    expected = timm.create_model("lit_s", **small).eval()
    for module in expected.modules():
        if hasattr(module, "offset"):
            torch.nn.init.normal_(module.offset.weight, std=0.1)
    actual.load_state_dict(expected.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(actual(images), expected(images), rtol=1e-4, atol=1e-5)
    assert len(calls) == 3
