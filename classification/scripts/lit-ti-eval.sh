#!/usr/bin/env bash
# Evaluate LIT-Ti: bash scripts/lit-ti-eval.sh [GPUS] CHECKPOINT [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run evaluate lit-ti "$@"
