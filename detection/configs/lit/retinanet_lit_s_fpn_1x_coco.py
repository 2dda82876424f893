# RetinaNet with LIT-S, 1x schedule (12 epochs) on COCO 2017
#
#   command       bash tools/dist_train.sh configs/lit/retinanet_lit_s_fpn_1x_coco.py 8
#   GPUs          8, fp16 with loss scaling, activation checkpointing
#   global batch  16 (8 x 2)
#   published     41.6 box AP
#   obtained      not run here

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        _delete_=True,
        type="LITBackbone",
        arch="lit_s",
        img_size=800,
        out_norms=(1, 2, 3),
        drop_path_rate=0.2,
        with_cp=True,
        init_cfg=dict(type="Pretrained", checkpoint="https://github.com/ziplab/LIT/releases/download/v1.0/lit_s.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"rel_pos_bias": dict(decay_mult=0.0)}),
)
