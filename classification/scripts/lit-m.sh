#!/usr/bin/env bash
# Trains LIT-M: bash scripts/lit-m.sh [GPUs] [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run train lit-m "$@"
