#!/usr/bin/env bash
# Evaluate LIT-S: bash scripts/lit-s-eval.sh [GPUS] CHECKPOINT [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run evaluate lit-s "$@"
