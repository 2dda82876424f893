"""The bash scripts, on one rank and two, and under stand-ins for Slurm."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.programs import write_echo

SCRIPTS = Path(__file__).parents[2] / "classification" / "scripts"
MODELS = ("lit-ti", "lit-s", "lit-m", "lit-b")
TINY = [
    *("--data-path", "data", "--batch-size", "4", "--opts", "DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0"),
    *("MODEL.NUM_CLASSES", "3", "MODEL.LIT.embed_dims", "[8, 16, 24, 32]", "MODEL.LIT.depths", "[1, 1, 1, 1]"),
    *("MODEL.LIT.num_heads", "[1, 1, 1, 1]"),
]
ONE_EPOCH = ["TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.GLOBAL_BATCH", "8"]
TWO_RANKS = "global batch 8 = 4 images x 2 ranks x 1 accumulation steps"


def start(command, cwd, *paths, **variables) -> subprocess.Popen:
    """Start a command in `cwd` without GPUs, with `paths` and the tests' interpreter first on the PATH."""
    path = os.pathsep.join(map(str, (*paths, Path(sys.executable).parent, os.environ["PATH"])))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": path, **variables}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([str(part) for part in command], cwd=cwd, env=env, **pipes)


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """Wait for a process, check its exit status, and return its stdout and stderr."""
    stdout, stderr = process.communicate()
    assert process.returncode == status, stdout + stderr
    return stdout, stderr


def run(script, *args, cwd) -> str:
    return finish(start(["bash", SCRIPTS / script, *args], cwd))[0]


@pytest.fixture(scope="module")
def workplace(image_folder, tmp_path_factory) -> Path:
    """Create a directory that holds `data/`, with an odd number of validation images, and the runs of these tests."""
    root = tmp_path_factory.mktemp("workplace")
    shutil.copytree(image_folder, root / "data")
    next((root / "data" / "val").rglob("*.jpg")).unlink()
    return root


@pytest.mark.slow
def test_evaluation_prints_the_same_on_any_number_of_ranks(workplace):
    """The lines are the published ones, and each image counts once: their number is odd."""
    assert "4 images x 1 ranks x 2 accumulation steps" in run("lit-s.sh", "1", *TINY, *ONE_EPOCH, cwd=workplace)
    images, printed = len(list((workplace / "data" / "val").rglob("*.jpg"))), []
    for ranks in ([], ["2"]):  # one by default, without GPUs
        out = run("lit-s-eval.sh", *ranks, "output/lit-s/default/latest.pth", *TINY, cwd=workplace)
        printed.append([line for line in out.splitlines() if not re.match(r"\d\d-\d\d \d\d:\d\d:\d\d ", line)])
    assert images % 2 and printed[0] == printed[1]
    first, second = printed[0]
    accuracy = float(re.fullmatch(r" \* Acc@1 (\d+\.\d{3}) Acc@5 100\.000", first)[1])
    assert second == f"Accuracy of the network on the {images} test images: {accuracy:.1f}%"
    assert accuracy / 100 * images == pytest.approx(round(accuracy / 100 * images), abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_scripts_name_their_model(model, tmp_path):
    """Run the scripts with a `python` that prints its arguments."""
    fake = write_echo(tmp_path)

    def arguments(script, *args, **variables):
        return finish(start(["bash", SCRIPTS / script, *args], tmp_path, fake.parent, **variables))[0].split()

    command = [f"{SCRIPTS.parent}/main.py", "--cfg", f"{SCRIPTS.parent}/configs/{model}.yaml"]
    evaluate = [*command, "--eval", "--resume", "a.pth"]
    assert Path(command[2]).is_file()
    assert arguments(f"{model}.sh", "1", "--tag", "x") == [*command, "--tag", "x"]
    assert arguments(f"{model}-eval.sh", "1", "a.pth", "--tag", "x") == [*evaluate, "--tag", "x"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    assert arguments(f"{model}.sh", "8") == [*torchrun, *command]
    assert arguments(f"{model}-eval.sh", "8", "a.pth") == [*torchrun, *evaluate]
    nodes = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="node1")
    torchrun[2:3] = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node1", "--master-port", "29500"]
    for gpus in ("1", "8"):
        assert arguments(f"{model}.sh", gpus, **nodes) == [*torchrun[:-1], gpus, *command]


def test_evaluation_without_a_checkpoint_is_refused(tmp_path):
    for args in ([], ["1"], ["--tag", "x"], ["1", "--tag", "x"]):
        _, stderr = finish(start(["bash", SCRIPTS / "lit-b-eval.sh", *args], tmp_path), status=1)
        assert stderr.startswith("error: CHECKPOINT: missing") and stderr.count("\n") == 1


def test_missing_environment_names_the_setup_command(tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "classification" / "scripts")
    (tmp_path / "tools").mkdir()
    shutil.copy(SCRIPTS.parents[1] / "tools" / "launch.sh", tmp_path / "tools")
    for name in ("python", "python3"):
        (tmp_path / name).symlink_to("/bin/false")
    _, stderr = finish(start(["bash", tmp_path / "classification/scripts/lit-s.sh", "1"], tmp_path, tmp_path), status=1)
    assert "bash setup_env.sh" in stderr and stderr.count("\n") == 1


@pytest.fixture
def slurm(tmp_path) -> Callable[..., subprocess.Popen]:
    """Return a function that starts the script under Slurm, with this host as two nodes.

    Its stand-in for `srun` runs the command on both nodes and forwards SIGTERM.
    """
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\nif [ "$1" = show ]; then echo localhost; echo localhost; else echo "scontrol $*"; fi\n'
    )
    (tmp_path / "srun").write_text(
        "#!/usr/bin/env bash\n"
        'echo "srun $*"\n'
        "while [[ $1 == --* ]]; do shift; done\n"
        '"$@" & first=$!\n'
        '"$@" & second=$!\n'
        "trap 'kill -TERM $first $second' TERM\n"
        "wait $first $second; wait $first && wait $second\n"
    )
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    job = dict(JOB_ID=str(os.getpid()), JOB_NODELIST="node[1-2]", NNODES="2", GPUS_ON_NODE="1", CPUS_PER_TASK="4")
    variables = {f"SLURM_{name}": value for name, value in job.items()}
    command = ["bash", SCRIPTS / "slurm.sbatch"]
    return lambda *args, cwd=SCRIPTS.parent: start([*command, *args], cwd, tmp_path, **variables)


@pytest.mark.slow
def test_slurm_joins_its_nodes_and_requeues_a_job_out_of_time(slurm, workplace):
    options = ["--data-path", workplace / "data", "--output", workplace / "output", *TINY[2:], *ONE_EPOCH]
    job = slurm("configs/lit-s.yaml", *options, "TRAIN.EPOCHS", "10000", "SAVE_FREQ", "10000", "TAG", "slurm")
    log = workplace / "output/lit-s/slurm/log.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    stdout, stderr = job.communicate()
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=4 " in stdout and TWO_RANKS in stdout
    assert "stopped by SIGTERM" in stdout and f"scontrol requeue {os.getpid()}\n" in stdout, stdout + stderr
    assert log.with_name("latest.pth").is_file()


def test_wrong_slurm_submissions_are_refused(slurm, tmp_path):
    for args, cwd, error in [
        (["configs/lit-s.yaml"], tmp_path, "scripts/run.sh: not found"),
        ([], SCRIPTS.parent, "CONFIG: "),
        (["--data-path", "data"], SCRIPTS.parent, "CONFIG: "),
        (["configs/lit-s.yaml", "--opts", "TRAIN.AUTO_RESUME", "false"], SCRIPTS.parent, "TRAIN.AUTO_RESUME false: "),
    ]:
        assert slurm(*args, cwd=cwd).communicate()[1].startswith(f"error: {error}")
