#!/usr/bin/env bash
# Train on several GPUs: bash tools/dist_train.sh CONFIG GPUS [options of train.py]
# For several nodes, run it on each node with NNODES, NODE_RANK and MASTER_ADDR set. PORT overrides the port, 29500.
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$tools/../../tools/launch.sh"
dist_train "$tools" mmdet "$@"
