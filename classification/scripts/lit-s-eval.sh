#!/usr/bin/env bash
# Evaluates LIT-S: bash scripts/lit-s-eval.sh [GPUs] CHECKPOINT [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run evaluate lit-s "$@"
