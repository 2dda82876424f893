#!/usr/bin/env bash
# Builds the environment of this project and installs the package in it, in editable mode. Run it again after an
# update: it does nothing while the requirements are unchanged.
#
#   bash setup_env.sh [--dev] [--mm] [--browser] [conda_install_path] [env_name]
#
#   bash setup_env.sh                        a virtual environment, .venv beside this script
#   bash setup_env.sh /home/anaconda3 lit    the conda environment "lit", created if missing
#   --dev                                    also what tests and demos need
#   --mm                                     also mmcv, mmdetection and mmsegmentation, for detection and segmentation;
#                                            mmcv is compiled, which takes a C++ compiler and 5 to 30 minutes once
#   --browser                                Chromium, in which tests open the pages that are drawn
#
# PYTHON=/path/to/python chooses the interpreter that .venv is made from (3.10 or later).
set -euo pipefail

say() { printf 'setup_env: %s\n' "$*"; }
die() {
    printf 'setup_env: error: %s\n' "$*" >&2
    exit 1
}
help() { sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
minor() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
as_root() { if ((EUID)); then sudo -n "$@"; else "$@"; fi; }

# An interpreter for .venv, the version of the tested set first.
find_python() {
    local candidate candidates=(python3.11 python3.12 python3.13 python3 python3.14 python3.10)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if recent "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python 3.10 or later (tried ${candidates[*]}); name one: PYTHON=/path/to/python bash setup_env.sh"
}

# system_packages REMEDY PACKAGE...
system_packages() {
    local remedy=$1
    shift
    if ! command -v apt-get >/dev/null || ! as_root true 2>/dev/null; then die "$remedy"; fi
    say "installing $*"
    as_root apt-get update -qq || true
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null || die "$remedy"
}

# Debian and Ubuntu ship venv's pip apart from the interpreter.
need_venv_module() {
    local package remedy
    if "$1" -c 'import ensurepip, venv' 2>/dev/null; then return; fi
    package=python$(minor "$1")-venv
    remedy="$1 cannot make virtual environments; install $package or give a conda installation"
    system_packages "$remedy" "$package"
    "$1" -c 'import ensurepip, venv' 2>/dev/null || die "$remedy"
}

# What mmcv is compiled with, and the libraries that OpenCV's wheel expects of the system.
need_compiler() {
    local python=$prefix/bin/python headers
    headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    if ! command -v c++ >/dev/null; then system_packages "no C++ compiler; install g++" g++; fi
    if [[ ! -f $headers/Python.h ]]; then
        system_packages "no Python.h in $headers; install the headers of $python" "python$(minor "$python")-dev"
    fi
    if ! "$python" -c 'import ctypes; ctypes.CDLL("libGL.so.1"); ctypes.CDLL("libglib-2.0.so.0")' 2>/dev/null; then
        system_packages "libGL or glib is missing; install libgl1 and libglib2.0-0" libgl1 libglib2.0-0
    fi
    if ! "$python" -c 'import sys, torch; from torch.utils.cpp_extension import CUDA_HOME
sys.exit(torch.cuda.is_available() and CUDA_HOME is None)'; then
        die "mmcv needs nvcc to be compiled for this machine's GPUs; install the CUDA toolkit of torch's version, or set CUDA_HOME"
    fi
}

need_browser() {
    if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then return; fi
    if ! (system_packages "no Chromium; install chromium or google-chrome" chromium); then
        say "going on: tests that need it are skipped"
    fi
}

# The maintained line and the original one write into the same folders; whichever comes last breaks the other.
need_one_mmcv() {
    local others remedy
    others=$("$prefix/bin/python" -m pip list --format freeze --disable-pip-version-check 2>/dev/null |
        grep -oE '^(mmcv|mmcv-full|mmcv-lite|mmengine|mmengine-lite|mmdet|mmsegmentation)==' | tr -d '=' | tr '\n' ' ') || true
    if [[ -n $others ]]; then
        remedy="$prefix/bin/python -m pip uninstall -y ${others% } onedl-mmcv onedl-mmengine onedl-mmdetection onedl-mmsegmentation"
        die "$prefix holds ${others% } beside the maintained line, and both write into one folder; run \`$remedy\`, then this script again"
    fi
}
mm_works() { "$prefix/bin/python" -I -c "import mmcv._ext, mmdet, mmengine, mmseg"; }

use_venv() {
    local base
    prefix=$root/.venv
    activate="source .venv/bin/activate"
    if recent "$prefix/bin/python" && "$prefix/bin/python" -c 'import pip' 2>/dev/null; then return; fi
    base=$(find_python)
    need_venv_module "$base"
    say "creating $prefix with $("$base" --version)"
    "$base" -m venv --clear "$prefix" || die "could not create $prefix; see above"
}

use_conda() {
    local conda=$1/bin/conda name=$2
    [[ -x $conda ]] || die "no conda at $conda; name the folder that it is installed in, such as /home/anaconda3"
    activate="conda activate $name"
    if ! prefix=$("$conda" run --name "$name" printenv CONDA_PREFIX 2>/dev/null); then
        say "creating the conda environment $name"
        "$conda" create --yes --quiet --name "$name" python=3.11 pip || die "conda could not create $name; see above"
        prefix=$("$conda" run --name "$name" printenv CONDA_PREFIX)
    fi
    recent "$prefix/bin/python" || die "the conda environment $name lacks Python 3.10 or later; choose another name"
}

# A group is a set of requirements: base or the name of a file in requirements/, which is an extra of the package too.
fingerprint() {
    {
        echo "$root"
        "$prefix/bin/python" --version
        cat pyproject.toml requirements.txt requirements/constraints.txt
        if [[ $1 != base ]]; then cat "requirements/$1.txt"; fi
    } | cksum
}
stamp() { echo "$prefix/.lit-backbone-$1"; }
current() { [[ "$(cat "$(stamp "$1")" 2>/dev/null)" == "$(fingerprint "$1")" ]]; }

install() {
    local output=--quiet constraints=/dev/null
    if [[ -t 1 ]]; then output=--progress-bar=on; fi
    case $(minor "$prefix/bin/python") in
        3.11 | 3.12 | 3.13) constraints=requirements/constraints.txt ;;
        *) say "constraints.txt is for Python 3.11 to 3.13: installing what requirements.txt allows" ;;
    esac
    say "installing ${*: -1} into $prefix"
    "$prefix/bin/python" -m pip install "$output" --no-input --disable-pip-version-check \
        --constraint "$constraints" "$@" || die "pip failed, see above; run this script again to go on"
}

# Without build isolation mmcv finds torch while it is built; with it, pip would build mmcv without operators, silently.
install_mm() {
    local python=$prefix/bin/python
    need_one_mmcv
    install "numpy<2.3" "setuptools<82" "packaging>=24.2" wheel ninja psutil # what mmcv is compiled with
    need_compiler
    compile_mm
    need_one_mmcv
    if mm_works; then return; fi
    say "mmcv has no operators: it came from a wheel that was built without; building it again"
    "$python" -m pip cache remove "onedl_mmcv*" &>/dev/null || true
    "$python" -m pip uninstall --quiet --yes onedl-mmcv
    compile_mm
    mm_works || die "mmcv was built without its operators; to see why, run
    $python -m pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps --verbose onedl-mmcv"
}

compile_mm() {
    say "compiling mmcv (5 to 30 minutes, once)"
    CFLAGS="${CFLAGS:-} -g0" install --no-build-isolation --requirement requirements/mm.txt # no debug symbols: faster
}

check() {
    local remedy="the environment in $prefix is broken, see above; remove it and run this script again"
    "$prefix/bin/python" -I - <<'END' || die "$remedy"
import platform

import lit_backbone
import timm
import torch
import torchvision

versions = [f"{module.__name__} {module.__version__}" for module in (torch, torchvision, timm)]
print("setup_env:", ", ".join([f"Python {platform.python_version()}", *versions, f"{torch.cuda.device_count()} GPUs"]))
END
}

groups=(base)
browser=
conda_path=
env_name=
while (($#)); do
    case $1 in
        --dev | --mm) groups+=("${1#--}") ;;
        --browser) browser=yes ;;
        -h | --help) help && exit ;;
        -*) die "unknown option $1; --help lists them" ;;
        *)
            if [[ -n $env_name ]]; then die "one argument too many: $1"; fi
            if [[ -n $conda_path ]]; then env_name=$1; else conda_path=$1; fi
            ;;
    esac
    shift
done

if [[ -n $browser ]]; then need_browser; fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -n $conda_path ]]; then use_conda "$conda_path" "${env_name:-lit}"; else use_venv; fi
cd "$root"

stale=
for group in "${groups[@]}"; do current "$group" || stale=yes; done
if [[ -z $stale && ${groups[*]} == *mm* ]]; then # another pip command may have broken it since
    need_one_mmcv
    mm_works || stale=yes
fi
if [[ -n $stale ]]; then
    for group in "${groups[@]}"; do rm -f "$(stamp "$group")"; done
    say "the first time takes minutes and some 5 GB, most of it torch"
    if [[ ${groups[*]} == *dev* ]]; then install --editable ".[dev]"; else install --editable .; fi
    if [[ ${groups[*]} == *mm* ]]; then install_mm; fi
    check
    for group in "${groups[@]}"; do fingerprint "$group" >"$(stamp "$group")"; done
fi
say "ready: $activate"
