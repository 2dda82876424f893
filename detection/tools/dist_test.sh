#!/usr/bin/env bash
# Evaluates on several GPUs: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$tools/../../tools/launch.sh"
if [[ ! ${3:-} =~ ^[1-9][0-9]*$ ]]; then die "usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]"; fi
find_python mmdet
launch "$3" "$tools/test.py" "$1" "$2" --launcher pytorch "${@:4}"
