#!/usr/bin/env bash
# Trains LIT-B: bash scripts/lit-b.sh [GPUs] [options of main.py]
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
run train lit-b "$@"
