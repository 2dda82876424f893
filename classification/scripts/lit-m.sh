#!/usr/bin/env bash
# Train LIT-M: bash scripts/lit-m.sh [GPUS] [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run train lit-m "$@"
