#!/usr/bin/env bash
# Evaluates LIT-B: bash scripts/lit-b-eval.sh [GPUs] CHECKPOINT [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run evaluate lit-b "$@"
