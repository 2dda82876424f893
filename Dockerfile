# Image for all three tasks and the tests. It needs NVIDIA GPUs and the NVIDIA Container Toolkit:
#
#   docker build --tag lit .
#   docker run --rm --gpus all --shm-size 16g lit make test
#   docker run --rm --gpus all --shm-size 16g --volume /data:/data --volume "$PWD/output:/lit/output" \
#       lit bash classification/scripts/lit-s.sh 8 --data-path /data/imagenet
#
# No image has been built from this file yet. Of its commands, setup_env.sh was run in a fresh clone, without --mm.

# CUDA version of torch in requirements/constraints.txt, with the compiler that mmcv needs
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update && apt-get install --yes --no-install-recommends g++ git libgl1 libglib2.0-0 make python3-dev \
    python3-venv && rm -rf /var/lib/apt/lists/*

WORKDIR /lit
COPY . .

# Compile mmcv's CUDA operators for A100, H100 and later, although no GPU is visible during the build.
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX"
RUN FORCE_CUDA=1 PIP_NO_CACHE_DIR=1 bash setup_env.sh --dev --mm
ENV PATH=/lit/.venv/bin:$PATH
