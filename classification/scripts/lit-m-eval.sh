#!/usr/bin/env bash
# Evaluate LIT-M: bash scripts/lit-m-eval.sh [GPUS] CHECKPOINT [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run evaluate lit-m "$@"
