#!/usr/bin/env bash
# Evaluate on several GPUs: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$tools/../../tools/launch.sh"
dist_test "$tools" mmdet "$@"
