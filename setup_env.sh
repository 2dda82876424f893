#!/usr/bin/env bash
# Build the environment and install this package in editable mode. Run it again after an update. It does nothing while
# the requirements are unchanged.
#
#   bash setup_env.sh [--dev] [--mm] [--browser] [CONDA_PATH [ENV_NAME]]
#
#   --dev      add packages for tests and demos
#   --mm       add mmcv, mmdetection and mmsegmentation; compiles mmcv, which takes a C++ compiler and 5 to 30 minutes
#   --browser  add Chromium for the tests of the HTML viewer
#
# Without CONDA_PATH, the environment is .venv, made from $PYTHON or the first Python 3.10 or later on the PATH. With it
# (such as /home/anaconda3), the environment is the conda environment ENV_NAME, by default "lit".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf 'setup_env: %s\n' "$*"; }
die() { say "error: $*" >&2 && exit 1; }
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
works() { "$python" -I -c "$1" 2>/dev/null; }
mm_works() { works 'import mmcv._ext, mmdet, mmengine, mmseg'; }

apt_install() {
    if ((EUID)) || ! command -v apt-get >/dev/null; then die "$*: missing. Install it and run this script again."; fi
    say "installing $*"
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null || die "$*: apt-get failed, see above."
}

pip_install() {
    local output=--quiet
    if [[ -t 1 ]]; then output=--progress-bar=on; fi
    say "installing ${*: -1} into $prefix"
    "$python" -m pip install "$output" --no-input --disable-pip-version-check --constraint "$constraints" "$@" ||
        die "pip failed, see above. Run this script again to resume."
}

use_venv() {
    local base candidates=("${PYTHON:-python3.11}") # the Python of constraints.txt first
    if [[ -z ${PYTHON:-} ]]; then candidates+=(python3.12 python3.13 python3 python3.14 python3.10); fi
    prefix=$PWD/.venv activate="source .venv/bin/activate"
    if recent "$prefix/bin/python" && "$prefix/bin/python" -c 'import pip' 2>/dev/null; then return; fi
    for base in "${candidates[@]}" ""; do if recent "$base"; then break; fi; done
    [[ $base ]] || die "${candidates[*]}: no Python 3.10 or later. Run PYTHON=/path/to/python bash setup_env.sh."
    "$base" -c 'import ensurepip, venv' 2>/dev/null || apt_install "python$(version "$base")-venv"
    say "creating $prefix with $("$base" --version)"
    "$base" -m venv --clear "$prefix" || die "$prefix: not created, see above."
}

use_conda() {
    local conda=$1/bin/conda
    activate="conda activate $2"
    [[ -x $conda ]] || die "$conda: not found. Pass the directory of the conda installation, such as /home/anaconda3."
    if ! prefix=$("$conda" run --name "$2" printenv CONDA_PREFIX 2>/dev/null); then
        say "creating the conda environment $2"
        "$conda" create --yes --quiet --name "$2" python=3.11 pip || die "$2: conda failed, see above."
        prefix=$("$conda" run --name "$2" printenv CONDA_PREFIX)
    fi
    recent "$prefix/bin/python" || die "$2: no Python 3.10 or later in this environment. Choose another name."
}

# pip must build mmcv without isolation, so that its operators are compiled against the environment's torch.
install_mm() {
    pip_install "numpy<2.3" "setuptools<82" "packaging>=24.2" wheel ninja psutil
    command -v c++ >/dev/null || apt_install g++
    works 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' ||
        apt_install "python$(version "$python")-dev"
    works 'import ctypes; ctypes.CDLL("libGL.so.1"); ctypes.CDLL("libglib-2.0.so.0")' || # OpenCV loads them
        apt_install libgl1 libglib2.0-0
    works 'import torch.utils.cpp_extension as cpp; assert cpp.CUDA_HOME or not cpp.torch.cuda.is_available()' ||
        die "nvcc: not found. Install the CUDA toolkit of torch's version to compile mmcv for this machine's GPUs."
    say "compiling mmcv (5 to 30 minutes, once)"
    CFLAGS="${CFLAGS:-} -g0" pip_install --no-build-isolation --requirement requirements/mm.txt
    mm_works || die "mmcv: cannot be imported with its operators. Run \`$python -m pip cache remove 'onedl_mmcv*'\`," \
        "remove $prefix and run this script again."
}

groups=(train) browser='' positional=()
for argument; do
    case $argument in
        --dev | --mm) groups+=("${argument#--}") ;;
        --browser) browser=yes ;;
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' setup_env.sh && exit ;;
        -*) die "$argument: unknown option. Run bash setup_env.sh --help." ;;
        *) positional+=("$argument") ;;
    esac
done
if ((${#positional[@]} > 2)); then die "${positional[2]}: unexpected argument. Run bash setup_env.sh --help."; fi
if [[ $browser ]] && ! command -v chromium google-chrome >/dev/null; then
    (apt_install chromium) || say "Chromium is missing. Tests that need it are skipped."
fi
if ((${#positional[@]})); then use_conda "${positional[0]}" "${positional[1]:-lit}"; else use_venv; fi
python=$prefix/bin/python constraints=requirements/constraints.txt
if [[ $(version "$python") != 3.1[123] ]]; then constraints=/dev/null; fi # constraints.txt is for Python 3.11 to 3.13
fingerprint=$( (pwd && "$python" --version && cat pyproject.toml requirements.txt requirements/*.txt) | cksum)
for group in "${groups[@]}"; do
    stamp=$prefix/.lit-backbone-$group
    if [[ $(cat "$stamp" 2>/dev/null) == "$fingerprint" ]] && { [[ $group != mm ]] || mm_works; }; then continue; fi
    rm -f "$stamp"
    if [[ $group == mm ]]; then install_mm; else pip_install --editable ".[$group]"; fi
    works 'import lit_backbone' || die "$prefix: cannot import lit_backbone. Remove it and run this script again."
    echo "$fingerprint" >"$stamp"
done
say "ready: $activate"
