#!/usr/bin/env bash
# Train every model of the study, then print its tables. Run the same command again to resume.
#
#   bash experiments/cifar10/run.sh [KEY VALUE ...]
#
# KEY VALUE pairs are settings of the classifiers, such as RUNTIME.DEVICE cuda. Environment variables select a part:
# MODELS, TASKS, SEEDS and EPOCHS. OUTPUT is the output directory, DATA an existing copy of CIFAR-10.
# A classifier is done once its log has the last epoch, a detector or segmentor once its log has an evaluation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/launch.sh

models=${MODELS-lit lit-1111 lit-0000 lit-conv lit-conv-bn swin pvt-v2 convnext resnet}
tasks=${TASKS-detection segmentation}
seeds=${SEEDS-0 1 2}
epochs=${EPOCHS-10}
output=$(realpath -m "${OUTPUT-outputs/cifar10}")
data=$(realpath -m "${DATA-data/cifar10}")
find_python ${tasks:+mmdet}

# classifier MODEL SEED [KEY VALUE ...]
classifier() {
    if grep -qs "\"epoch\": $((epochs - 1))," "$output/$1/seed-$2/log.jsonl"; then return; fi
    (cd classification && "$python" main.py --cfg "../experiments/cifar10/configs/$1.yaml" --data-path "$data" \
        --output "$output" --tag "seed-$2" --opts SEED "$2" TRAIN.EPOCHS "$epochs" RUNTIME.DEVICE cpu "${@:3}")
}

# dense TASK CONFIG pretrained|scratch SEED SCHEDULE...
dense() {
    local run=$output/$1/$3/seed-$4 weights=.checkpoint=$output/lit/seed-0/latest.pth
    if grep -qsE '"(coco/bbox_mAP|mIoU)":' "$run"/*/vis_data/[0-9]*.json; then return; fi
    if [[ $3 == scratch ]]; then weights="=None"; fi
    (cd "$1" && "$python" tools/train.py "configs/demo/$2.py" --work-dir "$run" --resume \
        --cfg-options "randomness.seed=$4" "model.backbone.init_cfg$weights" "${@:5}")
}

if [[ $models && ! -d $data ]]; then "$python" -m experiments.cifar10.data --output "$data"; fi
for seed in $seeds; do
    for model in $models; do classifier "$model" "$seed" "$@"; done
done
if [[ $tasks ]]; then "$python" -m demo.digit_scenes; fi
for seed in $seeds; do
    for start in pretrained scratch; do
        if [[ $tasks == *detection* ]]; then
            dense detection retinanet_lit_digit_scenes "$start" "$seed" \
                train_cfg.max_epochs=1 train_cfg.val_interval=1
        fi
        if [[ $tasks == *segmentation* ]]; then
            dense segmentation fpn_lit_digit_scenes "$start" "$seed" \
                train_cfg.max_iters=1000 train_cfg.val_interval=1000
        fi
    done
done
"$python" -m experiments.cifar10.table --runs "$output" --output "$output"
