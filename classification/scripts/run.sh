# shellcheck shell=bash
# Sourced by the scripts in this folder: finds the environment and starts main.py, one process per GPU.
# On several nodes: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR and, if 29500 is taken, PORT set.
# Relative paths, in arguments as in configurations, count from the folder that a script is called in.
classification=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$classification/../tools/launch.sh"

# run train|evaluate CONFIG [GPUs] [options of main.py]; to evaluate, a checkpoint comes before the options.
# Without a number of GPUs: all of this machine, or a single process where there are none.
run() {
    local mode=$1 config=$classification/configs/$2.yaml gpus=
    shift 2
    if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
        gpus=$1
        shift
    fi
    if [[ $mode == evaluate ]]; then
        if [[ ${1:--} == -* ]]; then die "name a checkpoint: bash $0 [GPUs] CHECKPOINT"; fi
        set -- --eval --resume "$@"
    fi
    find_python
    if [[ -z $gpus ]]; then gpus=$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)'); fi
    if ((gpus == 1 && ${NNODES:-1} == 1)); then
        exec "$python" "$classification/main.py" --cfg "$config" "$@"
    fi
    launch "$gpus" "$classification/main.py" --cfg "$config" "$@"
}
