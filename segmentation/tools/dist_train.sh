#!/usr/bin/env bash
# Trains on several GPUs: bash tools/dist_train.sh CONFIG GPUS [options of train.py]
# On several nodes: the same on each, with NNODES, NODE_RANK, MASTER_ADDR and, if 29500 is taken, PORT set.
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$tools/../../tools/launch.sh"
dist_train "$tools" mmseg "$@"
