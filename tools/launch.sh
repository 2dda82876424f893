# shellcheck shell=bash
# Sourced by the scripts of all three tasks: finds the environment and starts one process per GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Sets `python` to that of the active environment or, where it lacks the packages, to that of .venv.
# find_python [PACKAGE], which is looked for beside torch and lit_backbone
find_python() {
    local check='import sys; from importlib.util import find_spec; assert all(map(find_spec, sys.argv[1:]))'
    for python in python "$root/.venv/bin/python"; do
        if "$python" -I -c "$check" torch lit_backbone "$@" &>/dev/null; then return; fi
    done
    die "no environment with lit_backbone${1:+ and $1}; run \`bash setup_env.sh${1:+ --mm}\` in $root"
}

# launch PROCESSES SCRIPT [arguments]; on several nodes, called on each with NNODES, NODE_RANK and MASTER_ADDR set.
launch() {
    local processes=$1 meeting=(--standalone)
    shift
    if ((${NNODES:-1} > 1)); then
        meeting=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?its number, from 0}")
        meeting+=(--master-addr "${MASTER_ADDR:?the address of node 0}" --master-port "${PORT:-29500}")
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's default, without its warning
    exec "$python" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$processes" "$@"
}

# What detection's and segmentation's tools/dist_train.sh and tools/dist_test.sh do: FOLDER is theirs, PACKAGE what they need.
# dist_train FOLDER PACKAGE CONFIG GPUS [options of train.py]
dist_train() {
    if [[ ! ${4:-} =~ ^[1-9][0-9]*$ ]]; then die "usage: bash tools/dist_train.sh CONFIG GPUS [options of train.py]"; fi
    find_python "$2"
    launch "$4" "$1/train.py" "$3" --launcher pytorch "${@:5}"
}

# dist_test FOLDER PACKAGE CONFIG CHECKPOINT GPUS [options of test.py]
dist_test() {
    if [[ ! ${5:-} =~ ^[1-9][0-9]*$ ]]; then
        die "usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]"
    fi
    find_python "$2"
    launch "$5" "$1/test.py" "$3" "$4" --launcher pytorch "${@:6}"
}
