# shellcheck shell=bash
# Sourced by the scripts in this directory: start main.py with one process per GPU.
# For several nodes, run the same command on each with NNODES, NODE_RANK and MASTER_ADDR set. The default PORT is 29500.
# Relative paths refer to the working directory.
classification=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$classification/../tools/launch.sh"

# run train CONFIG [GPUS] [options of main.py]
# run evaluate CONFIG [GPUS] CHECKPOINT [options of main.py]
# GPUS defaults to all GPUs of this machine. A machine without GPUs runs a single process.
run() {
    local mode=$1 config=$classification/configs/$2.yaml gpus=
    shift 2
    if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
        gpus=$1
        shift
    fi
    if [[ $mode == evaluate ]]; then
        if [[ ${1:--} == -* ]]; then die "CHECKPOINT: missing. Run bash $0 [GPUS] CHECKPOINT."; fi
        set -- --eval --resume "$@"
    fi
    find_python
    if [[ -z $gpus ]]; then gpus=$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)'); fi
    if ((gpus == 1 && ${NNODES:-1} == 1)); then
        exec "$python" "$classification/main.py" --cfg "$config" "$@"
    fi
    launch "$gpus" "$classification/main.py" --cfg "$config" "$@"
}
