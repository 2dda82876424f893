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
die() { say "error: $*" >&2 && exit 1; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
minor() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
missing() { ! "$python" -c "$1" 2>/dev/null; }

# What pip cannot bring: root gets it on Debian and Ubuntu, others are told.
system_packages() {
    if ((EUID)) || ! command -v apt-get >/dev/null; then
        die "$* is missing: install it, or load the module that has it, and run this script again"
    fi
    say "installing $*"
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null || die "no $*, see above"
}

use_venv() {
    local base='' candidate candidates=(python3.11 python3.12 python3.13 python3 python3.14 python3.10)
    prefix=$root/.venv
    activate="source .venv/bin/activate"
    if recent "$prefix/bin/python" && "$prefix/bin/python" -c 'import pip' 2>/dev/null; then return; fi
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do # the version of the tested set first
        if recent "$candidate"; then base=$candidate && break; fi
    done
    [[ -n $base ]] ||
        die "no Python 3.10 or later (tried ${candidates[*]}); name one: PYTHON=/path/to/python bash setup_env.sh"
    "$base" -c 'import ensurepip, venv' 2>/dev/null || system_packages "python$(minor "$base")-venv"
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

install() {
    local output=--quiet constraints=requirements/constraints.txt
    if [[ -t 1 ]]; then output=--progress-bar=on; fi
    if [[ $(minor "$python") != 3.1[123] ]]; then
        say "constraints.txt is for Python 3.11 to 3.13: installing what requirements.txt allows"
        constraints=/dev/null
    fi
    say "installing ${*: -1} into $prefix"
    "$python" -m pip install "$output" --no-input --disable-pip-version-check --constraint "$constraints" "$@" ||
        die "pip failed, see above; run this script again to go on"
}

# mmcv finds torch where it is built without isolation; with it, pip would build mmcv without operators, silently.
install_mm() {
    install "numpy<2.3" "setuptools<82" "packaging>=24.2" wheel ninja psutil # what mmcv is compiled with
    command -v c++ >/dev/null || system_packages g++
    if missing 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'; then
        system_packages "python$(minor "$python")-dev"
    fi
    if missing 'import ctypes; ctypes.CDLL("libGL.so.1"); ctypes.CDLL("libglib-2.0.so.0")'; then # OpenCV loads them
        system_packages libgl1 libglib2.0-0
    fi
    if missing 'import torch.utils.cpp_extension as cpp; assert cpp.CUDA_HOME or not cpp.torch.cuda.is_available()'; then
        die "mmcv needs nvcc, for this machine's GPUs: install the CUDA toolkit of torch's version, or load its module"
    fi
    say "compiling mmcv (5 to 30 minutes, once)"
    CFLAGS="${CFLAGS:-} -g0" install --no-build-isolation --requirement requirements/mm.txt # no debug symbols: faster
    mm_works || die "mmcv was built without its operators, or mixed with the original packages, see above; start anew:
    $python -m pip uninstall -y mmcv mmcv-full mmengine mmdet mmsegmentation onedl-mmcv onedl-mmengine
    $python -m pip cache remove 'onedl_mmcv*'"
}
mm_works() { "$python" -I -c "import mmcv._ext, mmdet, mmengine, mmseg"; }

# Of what an environment was built from. A group is an extra of the package, which is a file in requirements/.
fingerprint() { (echo "$root" && "$python" --version && cat pyproject.toml requirements.txt requirements/*.txt) | cksum; }
stamp() { echo "$prefix/.lit-backbone-$1"; }
current() {
    local group
    for group in "${groups[@]}"; do
        [[ "$(cat "$(stamp "$group")" 2>/dev/null)" == "$(fingerprint)" ]] || return
    done
    if [[ ${groups[*]} == *mm* ]]; then mm_works; fi # another pip command may have broken it since
}

groups=(train)
browser=
positional=()
for argument; do
    case $argument in
        --dev | --mm) groups+=("${argument#--}") ;;
        --browser) browser=yes ;;
        -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
        -*) die "unknown option $argument; --help lists them" ;;
        *) positional+=("$argument") ;;
    esac
done
if ((${#positional[@]} > 2)); then die "one argument too many: ${positional[2]}"; fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -n $browser ]] && ! command -v chromium google-chrome >/dev/null; then
    (system_packages chromium) || say "going on: tests that need it are skipped"
fi
if ((${#positional[@]})); then use_conda "${positional[0]}" "${positional[1]:-lit}"; else use_venv; fi
python=$prefix/bin/python
cd "$root"

if ! current; then
    for group in "${groups[@]}"; do rm -f "$(stamp "$group")"; done
    say "the first time takes minutes and some 5 GB, most of it torch"
    if [[ ${groups[*]} == *dev* ]]; then install --editable ".[train,dev]"; else install --editable ".[train]"; fi
    if [[ ${groups[*]} == *mm* ]]; then install_mm; fi
    "$python" -I - <<'END' || die "the environment in $prefix is broken, see above; remove it and run this script again"
import lit_backbone, timm, torch, torchvision

versions = [f"{module.__name__} {module.__version__}" for module in (torch, torchvision, timm)]
print("setup_env:", ", ".join([*versions, f"{torch.cuda.device_count()} GPUs"]))
END
    for group in "${groups[@]}"; do fingerprint >"$(stamp "$group")"; done
fi
say "ready: $activate"
