#!/usr/bin/env bash
# Train LIT-Ti: bash scripts/lit-ti.sh [GPUS] [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run train lit-ti "$@"
