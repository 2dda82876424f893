#!/usr/bin/env bash
# Trains LIT-S: bash scripts/lit-s.sh [GPUs] [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run train lit-s "$@"
