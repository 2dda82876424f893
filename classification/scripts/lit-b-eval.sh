#!/usr/bin/env bash
# Evaluate LIT-B: bash scripts/lit-b-eval.sh [GPUS] CHECKPOINT [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run evaluate lit-b "$@"
