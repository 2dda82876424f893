#!/usr/bin/env bash
# Evaluates LIT-M: bash scripts/lit-m-eval.sh [GPUs] CHECKPOINT [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run evaluate lit-m "$@"
