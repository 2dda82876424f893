"""bfloat16 on a CPU in training, testing and inference of both dense tasks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_backbone import precision
from lit_backbone.mm import cli, load_file
from tests import dense
from tests.dense import derive, error_of, output_of
from tests.detection.conftest import DEMO, DETECTION

SEGMENTATION = DETECTION.parent / "segmentation"
CONFIGS = {
    "detection": DEMO / "retinanet_lit_digit_scenes.py",
    "segmentation": SEGMENTATION / "configs" / "demo" / "fpn_lit_digit_scenes.py",
}
STEPS = """
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=2, val_interval=2)
param_scheduler = [dict(type="LinearLR", start_factor=0.5, by_epoch=False, begin=0, end=2)]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1))
model = dict(backbone=dict(drop_path_rate=0.0))
randomness = dict(seed=0)
train_dataloader = dict(batch_size=2)
"""


def has_bf16(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    monkeypatch.setattr(cli, "cpu_has_bf16", lambda: value)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.slow
@pytest.mark.parametrize("task", CONFIGS)
def test_bf16_on_a_cpu(task: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has_bf16(monkeypatch, True)
    config = derive(tmp_path / "short.py", CONFIGS[task], STEPS)
    changes: dict[str, Any] = {}
    if task == "detection":
        changes |= {f"{split}_evaluator__ann_file": f"{scenes}/annotations/val.json" for split in ("val", "test")}
        changes |= dict(model__test_cfg__score_thr=0.0)

    def train(name: str, *args: str) -> Any:
        cli.train("", [str(config), *dense.build_options(scenes, tmp_path / name, **changes), *args])
        return load_file(str(tmp_path / name / "iter_2.pth"))["state_dict"]

    whole = train("whole", "optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.dtype=bfloat16", "--amp")
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "whole" / "iter_1.pth", tmp_path / "again")
    resumed = train("again", "--amp", "--resume", str(tmp_path / "again" / "iter_1.pth"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    recipe = train("recipe", "optim_wrapper.type=AmpOptimWrapper")  # in float32 unless --amp asks for bfloat16
    float32 = train("float32")
    assert all(torch.equal(recipe[key], float32[key]) for key in float32)
    assert not all(torch.equal(float32[key], whole[key]) for key in whole)

    checkpoint = str(tmp_path / "whole" / "iter_2.pth")
    metrics = [
        cli.test("", [str(config), checkpoint, *dense.build_options(scenes, tmp_path / "test", **changes), *flag])
        for flag in ([], ["--amp"])
    ]
    assert metrics[0].keys() == metrics[1].keys()

    tool = [DETECTION.parent / task / "tools" / ("detect.py" if task == "detection" else "segment.py")]
    tool += [next((scenes / "images" / "val").iterdir()), "--config", tmp_path / "whole" / "short.py"]
    tool += ["--checkpoint", checkpoint, *(["--json", "--score-thr", "0"] if task == "detection" else ["--masks"])]
    folders = [tmp_path / amp for amp in ("off", "bf16")]
    for folder in folders:
        output_of(*tool, "--amp", folder.name, "--out-dir", folder)
    if task == "detection":
        texts = [next(folder.glob("*.json")).read_text() for folder in folders]
        first, second = ([x["score"] for x in json.loads(text)["detections"][:5]] for text in texts)
        assert first == pytest.approx(second, abs=0.05) and first != second
    else:
        masks = [np.array(Image.open(next((folder / "masks").iterdir()))) for folder in folders]
        assert 0.8 < (masks[0] == masks[1]).mean()


def test_missing_bf16_is_an_error(monkeypatch: pytest.MonkeyPatch, scenes: Path, tmp_path: Path) -> None:
    has_bf16(monkeypatch, False)
    config, out = str(CONFIGS["detection"]), dense.build_options(scenes, tmp_path)
    for tool, arguments in ((cli.train, [config]), (cli.test, [config, "x.pth"])):
        assert "--amp: cpu has no bfloat16 arithmetic" in error_of(tool, "", [*arguments, *out, "--amp"])
