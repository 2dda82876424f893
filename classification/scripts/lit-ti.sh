#!/usr/bin/env bash
# Trains LIT-Ti: bash scripts/lit-ti.sh [GPUs] [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run train lit-ti "$@"
