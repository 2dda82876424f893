"""Commands in the documentation: bash runs each block with stand-ins for programs; their calls are checked or run."""

import argparse
import ast
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from torch.distributed.run import parse_args as parse_torchrun

from lit_classification.config_reader import load_config
from lit_classification.model import build_model
from tests.classification.conftest import CLASSES, TINY_LIT, write_images
from tests.dense import TINY_BACKBONE, draw_shapes, quick_configs  # noqa: F401, fixture
from tests.programs import Program, single_thread  # noqa: F401, a fixture

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TASKS = ("classification", "detection", "segmentation")
REAL_PROGRAMS = ("bash", "dirname", "mkdir", "tar")
STAND_INS = ("python", "torchrun", "sbatch", "make", "pip", "wget")  # any other program fails the test
RECORD = '#!/bin/bash\n[[ ${1:-} == -I ]] || { printf "%s\\0" "${0##*/}" "$PWD" "$@"; printf "\\1"; } >>"$CALLS"\n'
RELEASED = {"lit_ti": "lit-ti", "lit_s": "lit-s", "lit_b": "lit-b", "pvt_full_msa": "lit-ti"}  # checkpoint: recipe
DENSE = {  # checkpoint: its config
    "detection/mask_rcnn_lit_s.pth": "mask_rcnn_lit_s_fpn_1x_coco.py",
    "segmentation/sem_fpn_lit_s.pth": "lit_s_fpn_r50_512x512_80k_ade20k.py",
}
has_mm = bool(os.environ.get("CI")) or importlib.util.find_spec("mmengine") is not None

SMALL = ["DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0", "DATA.BATCH_SIZE", "4", "MODEL.NUM_CLASSES", "3"]
SMALL += ["TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.GLOBAL_BATCH", "8"]
SMALL += [word for key, value in TINY_LIT.items() for word in (f"MODEL.LIT.{key}", str(value))]


class Parsed(BaseException):
    """Ends a script after its arguments have been parsed."""


def record_calls(block: str, folder: Path, root: Path) -> list[tuple[str, Path, list[str]]]:
    """Run a block in bash and return the calls of the stand-ins."""
    (log := root / "calls").write_text("")
    command = ["bash", "-euo", "pipefail", "-c", block.replace("/data/", f"{root}/data/")]
    env = {"PATH": str(root / "bin"), "CALLS": str(log)}
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert not result.returncode and not result.stderr, f"{block}{result.stderr}"
    calls = [record.split("\0")[:-1] for record in log.read_text().split("\1")[:-1]]
    return [(program, Path(cwd), args) for program, cwd, *args in calls]


def parse(script: Path, args: list[str]) -> argparse.Namespace:
    """Return what the parser of a script makes of its arguments, without running the script."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise Parsed(parse_args(parser, args))

    with patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(Parsed) as parsed:
        runpy.run_path(str(script), run_name="__main__")
    return parsed.value.args[0]


def check_keys(folder: Path, options: argparse.Namespace, ranks: int) -> None:
    """Check the config of a script and the keys that its options override."""
    if folder.name != "classification":
        from lit_backbone.mm.cli import read_config  # not installed in an environment for classification

        config = read_config(str(folder / options.config))
        for key in options.cfg_options:  # mmengine would add unknown keys
            reduce(getitem, key.split("."), config)
    elif "mode" in options and options.cfg:
        shortcuts = {key: value for key, value in vars(options).items() if key not in ("cfg", "mode", "opts")}
        training = options.mode == "train"
        config = load_config(folder / options.cfg, options.opts, training=training, **shortcuts)
        assert not training or config.TRAIN.GLOBAL_BATCH % (config.DATA.BATCH_SIZE * ranks) == 0


def check_python(folder: Path, args: list[str]) -> None:
    """Check `python [-m torch.distributed.run OPTIONS] SCRIPT ARGS` or `python -c CODE`. Run the script if quick."""
    if args[0] == "-c":
        imports = [node for node in ast.parse(args[1]).body if isinstance(node, ast.Import | ast.ImportFrom)]
        return exec(compile(ast.Module(imports, []), "<command>", "exec"), {})
    ranks = 1
    if args[0] == "-m":
        launch = parse_torchrun(args[2:])
        ranks = int(launch.nnodes.partition(":")[0]) * int(launch.nproc_per_node)
        args = [launch.training_script, *launch.training_script_args]
    script, args = folder / args[0], args[1:]
    check_keys(folder, parse(script, args), ranks)
    if ranks == 1 and script.name not in ("train.py", "test.py") and "DATA.DATASET" not in args:
        small = ["--batch-size", "4", "--opts", *SMALL] if script.name == "main.py" else []
        small = small if folder.name == "classification" else ["--cfg-options", *TINY_BACKBONE]
        Program(script, *args, *small, prepare=partial(os.chdir, folder)).finish()


def check(program: str, folder: Path, args: list[str]) -> None:
    """Check a call of a stand-in."""
    if program in ("python", "torchrun"):
        check_python(folder, ["-m", program, *args] if program == "torchrun" else args)
    elif program == "sbatch":  # [OPTIONS of Slurm] SCRIPT CONFIG [OPTIONS of main.py]
        start = args.index("scripts/slurm.sbatch")
        assert (folder / args[start]).is_file()
        check_python(folder, ["-m", "", "--nproc-per-node", "16", "main.py", "--cfg", *args[start + 1 :]])
    elif program == "make":
        subprocess.run(["make", "--dry-run", "-C", ROOT, *args], check=True, capture_output=True)
    elif program == "setup_env.sh":
        usage = (ROOT / "setup_env.sh").read_text()
        assert all(re.search(rf"^#   {option} ", usage, re.MULTILINE) for option in args)
    elif program == "wget":
        assert set(args) <= {timm.get_pretrained_cfg(name).url for name in timm.list_models(module="lit")}
    else:
        assert (program, args[0]) == ("pip", "install")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the tasks, and write the images and small checkpoints that the commands name."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("bin/python", ".venv/bin/activate"):
        (root / name).parent.mkdir(parents=True)
        (root / name).touch()
    for path in (root / "setup_env.sh", *(root / "bin" / name for name in STAND_INS)):
        path.write_text(RECORD)
        path.chmod(0o755)
    links = {name: ROOT / name for name in ("demo", "experiments", "tools")}
    for name, target in (links | {f"bin/{name}": shutil.which(name) for name in REAL_PROGRAMS}).items():
        (root / name).symlink_to(target)
    for task in TASKS:
        ignored = shutil.ignore_patterns("data", "output", "outputs", "work_dirs", "__pycache__")
        shutil.copytree(ROOT / task, root / task, ignore=ignored)
        (root / task / "photos").mkdir()
        for seed, name in enumerate(("photo.jpg", "street.jpg", "photos/1.jpg", "photos/2.jpg")):
            draw_shapes(seed)[0].save(root / task / name)
    for split in ("train", "val"):
        write_images(root / "data/imagenet" / split, 4, seed=0)
    (root / "data/flowers").symlink_to("imagenet")
    for name, recipe in RELEASED.items():
        full_msa = ["MODEL.NAME", "pvt_small_full_msa"] if name.startswith("pvt") else []
        config = load_config(ROOT / f"classification/configs/{recipe}.yaml", [*SMALL, *full_msa], training=False)
        weights = build_model(config, torch.device("cpu")).state_dict()
        content = {"model": weights, "classes": list(CLASSES), "config": config.model_dump(mode="json")}
        torch.save(content, root / f"classification/{name}.pth")
    if not has_mm:
        return root
    from mmengine.registry import MODELS, init_default_scope

    from lit_backbone.mm.cli import read_config
    from lit_backbone.mm.inference import build_parser

    for file, name in DENSE.items():
        required = ["a.jpg", "--config", "", "--checkpoint", ""]
        overrides = build_parser("").parse_args([*required, "--cfg-options", *TINY_BACKBONE]).cfg_options
        config = read_config(str((root / file).parent / "configs/lit" / name), **overrides)
        init_default_scope(config.default_scope)
        torch.save({"state_dict": MODELS.build(config.model).state_dict()}, root / file)
    return root


@pytest.mark.parametrize("page", ["README.md", "docs/cluster.md", *(f"{task}/README.md" for task in TASKS)])
def test_commands(page: str, workplace: Path) -> None:
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        in_root = block.startswith(("make ", "bash setup_env.sh", "cd "))
        task = Path(page).parent.name
        folder = workplace if in_root else workplace / (task if task in TASKS else "classification")
        for program, cwd, args in record_calls(block, folder, workplace):
            if has_mm or cwd.name in (workplace.name, "classification"):
                check(program, cwd, args)
