import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "classification" / "scripts"
MODELS = ("lit-ti", "lit-s", "lit-m", "lit-b")
TINY = [
    *("--data-path", "data", "--batch-size", "4", "--opts", "DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0"),
    *("MODEL.NUM_CLASSES", "3", "MODEL.LIT.embed_dims", "[8, 16, 24, 32]", "MODEL.LIT.depths", "[1, 1, 1, 1]"),
    *("MODEL.LIT.num_heads", "[1, 1, 1, 1]"),
]
ONE_EPOCH = ["TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.GLOBAL_BATCH", "8"]


def begin(command, cwd, *paths, **variables) -> subprocess.Popen:
    """Start a command in `cwd`, without GPUs, with the tests' interpreter first on the PATH but for `paths`."""
    path = os.pathsep.join(map(str, (*paths, Path(sys.executable).parent, os.environ["PATH"])))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": path, **variables}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([str(part) for part in command], cwd=cwd, env=env, **pipes)


def shell(*args, **variables) -> subprocess.CompletedProcess:
    """Run a command as :func:`begin` starts it."""
    process = begin(*args, **variables)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run(script, *args, cwd) -> str:
    """Return the standard output of a script that must succeed."""
    done = shell(["bash", SCRIPTS / script, *args], cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def workplace(image_folder, tmp_path_factory) -> Path:
    """Create a folder outside of the repository with `data/`, which lacks one validation image."""
    root = tmp_path_factory.mktemp("workplace")
    shutil.copytree(image_folder, root / "data")
    next((root / "data" / "val").rglob("*.jpg")).unlink()
    return root


@pytest.fixture(scope="module")
def trained(workplace):
    """Return what training with one process prints. It writes output/lit-s/default/."""
    return run("lit-s.sh", "1", *TINY, *ONE_EPOCH, cwd=workplace)


def test_training_with_one_process(trained, workplace):
    assert "batch 4 x 1 processes x 2 accumulated = 8 images per update" in trained
    assert (workplace / "output/lit-s/default/latest.pth").is_file()


@pytest.mark.slow  # the two nodes below are not
def test_training_with_two_processes(workplace):
    out = run("lit-s.sh", "2", *TINY, *ONE_EPOCH, "--tag", "two", cwd=workplace)
    assert "batch 4 x 2 processes x 1 accumulated = 8 images per update" in out
    assert (workplace / "output/lit-s/two/latest.pth").is_file()


def test_two_nodes_of_one_gpu_each_are_one_run(workplace):
    """Both launchers on this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = dict(NNODES="2", MASTER_ADDR="localhost", PORT=str(free.getsockname()[1]))
    command = ["bash", SCRIPTS / "lit-s.sh", "1", *TINY, *ONE_EPOCH, "--tag", "nodes"]
    nodes = [begin(command, workplace, NODE_RANK=str(rank), **meeting) for rank in range(2)]
    (first, errors), (second, others) = (node.communicate() for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0], first + errors + second + others
    assert "batch 4 x 2 processes x 1 accumulated = 8 images per update" in first and second == ""
    (start,) = (workplace / "output/lit-s/nodes/starts.jsonl").read_text().splitlines()
    assert json.loads(start)["processes"] == 2
    assert len((workplace / "output/lit-s/nodes/log.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_evaluation_prints_the_published_lines_whatever_the_number_of_processes(trained, workplace):
    images = len(list((workplace / "data" / "val").rglob("*.jpg")))
    assert images % 2
    printed = []
    for processes in ([], ["2"]):  # without a number and without GPUs: one
        out = run("lit-s-eval.sh", *processes, "output/lit-s/default/latest.pth", *TINY, cwd=workplace)
        logged = re.compile(r"\d\d-\d\d \d\d:\d\d:\d\d ")
        printed.append([line.strip() for line in out.splitlines() if not logged.match(line)])
    one, two = printed
    assert one == two
    accuracy = re.fullmatch(r"\* Acc@1 (\d+\.\d{3}) Acc@5 100\.000", one[0])
    assert one[1:] == [f"Accuracy of the network on the {images} test images: {float(accuracy[1]):.1f}%"]
    right = float(accuracy[1]) / 100 * images
    assert right == pytest.approx(round(right), abs=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_scripts_name_their_model(model, tmp_path):
    """Run the scripts with a `python` that prints its arguments."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\n[ "$1" = -I ] || echo "$@"\n')
    fake.chmod(0o755)

    def told(script, *args, **variables):
        done = shell(["bash", SCRIPTS / script, *args], tmp_path, fake.parent, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    start = [f"{SCRIPTS.parent}/main.py", "--cfg", f"{SCRIPTS.parent}/configs/{model}.yaml"]
    assert Path(start[2]).is_file()
    assert told(f"{model}.sh", "1", "--tag", "x") == [*start, "--tag", "x"]
    assert told(f"{model}-eval.sh", "1", "a.pth", "--tag", "x") == [*start, "--eval", "--resume", "a.pth", "--tag", "x"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]
    assert told(f"{model}.sh", "8") == [*torchrun, *start]
    assert told(f"{model}-eval.sh", "8", "a.pth") == [*torchrun, *start, "--eval", "--resume", "a.pth"]
    nodes = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="node1")
    torchrun[2:3] = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "node1", "--master-port", "29500"]
    for gpus in ("1", "8"):
        assert told(f"{model}.sh", gpus, **nodes) == [*torchrun[:-1], gpus, *start]


@pytest.mark.parametrize("args", [[], ["1"], ["--tag", "x"], ["1", "--tag", "x"]])
def test_evaluation_without_a_checkpoint_is_refused(args, tmp_path):
    done = shell(["bash", SCRIPTS / "lit-b-eval.sh", *args], tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"error: CHECKPOINT: missing. Run bash {SCRIPTS}/lit-b-eval.sh [GPUS] CHECKPOINT.\n"


def test_missing_environment_names_the_setup_command(tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "classification" / "scripts")
    (tmp_path / "tools").mkdir()
    shutil.copy(SCRIPTS.parents[1] / "tools" / "launch.sh", tmp_path / "tools")
    for name in ("python", "python3"):
        (tmp_path / name).symlink_to("/bin/false")
    done = shell(["bash", tmp_path / "classification/scripts/lit-s.sh", "1"], tmp_path, tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"error: lit_backbone: not installed. Run `bash setup_env.sh` in {tmp_path}.\n"


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.iterdir()))
def test_scripts_are_sound(script):
    assert shell(["bash", "-n", SCRIPTS / script], SCRIPTS).stderr == ""
    if shutil.which("shellcheck"):
        done = shell(["shellcheck", "-x", "-S", "warning", "-P", "SCRIPTDIR:.", f"scripts/{script}"], SCRIPTS.parent)
        assert done.returncode == 0, done.stdout


@pytest.fixture
def slurm(tmp_path):
    """Start the Slurm script with stand-ins for Slurm's commands.

    Both nodes are this host. `srun` runs its command once per node and forwards SIGTERM.
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
    return lambda *args, cwd: begin(["bash", SCRIPTS / "slurm.sbatch", *args], cwd, tmp_path, **variables)


@pytest.mark.slow
def test_slurm_joins_its_nodes(slurm, workplace):
    where = ["--data-path", workplace / "data", "--output", workplace / "output", "--tag", "slurm"]
    job = slurm("configs/lit-s.yaml", *TINY[2:], *ONE_EPOCH, *where, cwd=SCRIPTS.parent)
    stdout, stderr = job.communicate()
    assert job.returncode == 0, stdout + stderr
    assert "srun --kill-on-bad-exit=1 --cpus-per-task=4 " in stdout and "requeue" not in stdout
    assert "batch 4 x 2 processes x 1 accumulated = 8 images per update" in stdout
    assert (workplace / "output/lit-s/slurm/latest.pth").is_file()


@pytest.mark.slow
def test_slurm_requeues_a_job_whose_time_is_over(slurm, workplace):
    where = ["--data-path", workplace / "data", "--output", workplace / "output", "--tag", "over"]
    options = [*ONE_EPOCH, "TRAIN.EPOCHS", "10000", "SAVE_FREQ", "10000"]
    job = slurm("configs/lit-s.yaml", *TINY[2:], *options, *where, cwd=SCRIPTS.parent)
    log = workplace / "output/lit-s/over/log.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert job.poll() is None, job.communicate()
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    stdout, stderr = job.communicate()
    assert "stopped by SIGTERM" in stdout and f"scontrol requeue {os.getpid()}\n" in stdout, stdout + stderr
    assert log.with_name("latest.pth").is_file()


def test_slurm_job_submitted_wrongly_is_refused(slurm, tmp_path):
    assert (
        slurm("configs/lit-s.yaml", cwd=tmp_path).communicate()[1]
        == "error: scripts/run.sh: not found. Submit this script in classification/.\n"
    )
    for args in ([], ["--data-path", "data"]):
        assert slurm(*args, cwd=SCRIPTS.parent).communicate()[1].startswith("error: CONFIG: no such file. ")
    refused = slurm("configs/lit-s.yaml", "--opts", "TRAIN.AUTO_RESUME", "false", cwd=SCRIPTS.parent).communicate()[1]
    assert refused.startswith("error: TRAIN.AUTO_RESUME false: a requeued job would start from scratch")
