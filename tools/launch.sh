# shellcheck shell=bash
# Sourced by the scripts of all three tasks: find the environment and start one process per GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# find_python [PACKAGE]: set `python` to the first of the active environment and .venv that has the packages.
find_python() {
    local check='import sys; from importlib.util import find_spec; assert all(map(find_spec, sys.argv[1:]))'
    for python in python "$root/.venv/bin/python"; do
        if "$python" -I -c "$check" torch lit_backbone "$@" &>/dev/null; then return; fi
    done
    die "lit_backbone${1:+, $1}: not installed. Run \`bash setup_env.sh${1:+ --mm}\` in $root."
}

# launch PROCESSES SCRIPT [arguments]: NNODES, NODE_RANK and MASTER_ADDR select a node of several.
launch() {
    local processes=$1 rendezvous=(--standalone)
    shift
    if ((${NNODES:-1} > 1)); then
        rendezvous=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?missing. Set the number of this node, from 0.}")
        rendezvous+=(--master-addr "${MASTER_ADDR:?missing. Set the address of node 0.}" --master-port "${PORT:-29500}")
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # torchrun's default, without its warning
    exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$processes" "$@"
}

# dist_train DIRECTORY PACKAGE CONFIG GPUS [options of DIRECTORY/train.py]
dist_train() {
    if [[ ! ${4:-} =~ ^[1-9][0-9]*$ ]]; then
        die "GPUS: not a number. Run bash tools/dist_train.sh CONFIG GPUS [options of train.py]."
    fi
    find_python "$2"
    launch "$4" "$1/train.py" "$3" --launcher pytorch "${@:5}"
}

# dist_test DIRECTORY PACKAGE CONFIG CHECKPOINT GPUS [options of DIRECTORY/test.py]
dist_test() {
    if [[ ! ${5:-} =~ ^[1-9][0-9]*$ ]]; then
        die "GPUS: not a number. Run bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]."
    fi
    find_python "$2"
    launch "$5" "$1/test.py" "$3" "$4" --launcher pytorch "${@:6}"
}
