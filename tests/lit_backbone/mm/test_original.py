"""Commands and configs of the original for detection and segmentation: each is translated, or answered."""

from pathlib import Path

import pytest
from mmengine.config import Config

from lit_backbone.images import DataError
from lit_backbone.mm import cli

ROOT = Path(__file__).parents[3]
DETECTION = str(ROOT / "detection/configs/lit/retinanet_lit_s_fpn_1x_coco.py")
SEGMENTATION = str(ROOT / "segmentation/configs/lit/lit_ti_fpn_r50_512x512_80k_ade20k.py")
LIT = dict(  # the original's configs name all of these
    **dict(type="LIT", embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, mlp_ratio=4.0),
    **dict(qkv_bias=True, qk_scale=None, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.2, ape=False),
    **dict(patch_norm=True, out_indices=(0, 1, 2, 3), use_checkpoint=True),
)
LIT_TI = dict(type="LIT_Ti", depth=50, num_stages=4, frozen_stages=1, norm_eval=True, style="pytorch")
TRAIN = """
--amp --auto-resume --auto-scale-lr --cfg-options=a=b --deterministic --diff-seed --diff_seed --gpu-id=0 --gpu-ids=0
--gpus=2 --launcher=none --load-from=x --local-rank=0 --local_rank=0 --no-validate --options=a=b --resume-from=x
--seed=0 --work-dir=x
""".split()
TEST = """
--aug-test --cfg-options=a=b --eval=bbox --eval-options=a=b --format-only --fuse-conv-bn --gpu-collect --gpu-id=0
--gpu-ids=0 --launcher=none --local-rank=0 --local_rank=0 --opacity=0.5 --options=a=b --out=x.pkl --show --show-dir=x
--show-score-thr=0.3 --tmpdir=x --work-dir=x
""".split()


@pytest.fixture
def parsed(monkeypatch):
    """Return a function that parses a command and returns its arguments, without running it."""

    class Parsed(Exception):
        pass

    def stop(args, *_):
        raise Parsed(args)

    def parse(command, *words):
        monkeypatch.setattr(cli, "_load_config", stop)
        with pytest.raises(Parsed) as info:
            command("", list(words))
        return info.value.args[0]

    return parse


@pytest.mark.parametrize(
    ("command", "option"), [*((cli.train, option) for option in TRAIN), *((cli.test, option) for option in TEST)]
)
def test_every_option_is_accepted_or_answered(parsed, capsys, command, option):
    positional = ["config.py"] if command is cli.train else ["config.py", "w.pth"]
    try:
        parsed(command, *positional, option)
    except SystemExit:
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {option.partition('=')[0]}: is " in message


def test_options_are_translated(parsed, capsys):
    args = parsed(cli.train, *"c.py --local_rank 0 --seed 3 --options a=1 b.c=2 --resume-from w.pth".split())
    assert args.cfg_options == {"randomness.seed": 3, "a": 1, "b.c": 2} and args.resume == "w.pth"
    args = parsed(cli.test, *"c.py w.pth --eval bbox segm --aug-test --cfg-options a=1 --opacity 0.5".split())
    assert args.tta and args.cfg_options == {"a": 1, "visualizer.alpha": 0.5}
    assert "--eval: ignored: the config sets the metrics" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.train("", ["c.py", "--auto-scale"])  # no abbreviations
    assert "unrecognized arguments: --auto-scale" in capsys.readouterr().err


def test_documented_overrides_are_translated(capsys):
    cfg = cli.read_config(DETECTION, **{"model.pretrained": "w.pth", "model.backbone.use_checkpoint": True})
    assert cfg.model.backbone.init_cfg == dict(type="Pretrained", checkpoint="w.pth")
    assert cfg.model.backbone.with_cp and "pretrained" not in cfg.model
    keys = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
    assert keys == ["model.pretrained", "model.backbone.use_checkpoint"]


@pytest.mark.parametrize(("path", "backbone"), [(DETECTION, LIT), (SEGMENTATION, LIT_TI)])
def test_backbones_are_translated(path, backbone, tmp_path):
    """Read the original's backbone as the one in this repository's config of the same model."""
    arch = "lit_s" if backbone is LIT else "lit_ti"
    released = Config.fromfile(path.replace("lit_ti", arch).replace("lit_s", arch)).model.backbone
    config = tmp_path / "config.py"
    model = dict(pretrained=released.init_cfg.checkpoint, backbone=dict(_delete_=True, **backbone))
    config.write_text(f"_base_ = {path!r}\nmodel = {model!r}\n")
    actual = cli.read_config(str(config)).model.backbone
    if actual.pop("out_indices", None) is None:
        assert backbone is LIT_TI
    assert actual == released


def test_other_backbones_are_refused(tmp_path):
    text = f"_base_ = {DETECTION!r}\nmodel = dict(backbone=dict(_delete_=True, type='LIT', embed_dim=128))\n"
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(DataError, match="embed_dim': 128.*cannot be translated"):
        cli.read_config(str(tmp_path / "config.py"))
