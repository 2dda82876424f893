#!/usr/bin/env bash
# Evaluates LIT-Ti: bash scripts/lit-ti-eval.sh [GPUs] CHECKPOINT [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run evaluate lit-ti "$@"
