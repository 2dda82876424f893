#!/usr/bin/env bash
# Train LIT-B: bash scripts/lit-b.sh [GPUS] [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run train lit-b "$@"
