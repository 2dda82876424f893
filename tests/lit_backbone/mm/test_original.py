"""Commands and configs of the original for detection and segmentation: each is translated, or answered."""

from pathlib import Path

import pytest

from lit_backbone.images import DataError
from lit_backbone.mm import cli

ROOT = Path(__file__).parents[3]
DETECTION = str(ROOT / "detection/configs/lit/retinanet_lit_s_fpn_1x_coco.py")
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


@pytest.mark.parametrize("kind", ["LIT", "LIT_Ti"])
def test_backbones_of_the_original_are_refused(kind, tmp_path):
    text = f"_base_ = {DETECTION!r}\nmodel = dict(backbone=dict(_delete_=True, type={kind!r}, depths=[2, 2, 6, 2]))\n"
    (tmp_path / "config.py").write_text(text)
    with pytest.raises(DataError, match=f"model.backbone.type='{kind}' .*'LITBackbone'.* configs/lit"):
        cli.read_config(str(tmp_path / "config.py"))
