#!/usr/bin/env bash
# Train LIT-S: bash scripts/lit-s.sh [GPUS] [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run train lit-s "$@"
