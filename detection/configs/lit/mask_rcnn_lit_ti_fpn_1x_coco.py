# Mask R-CNN with LIT-Ti, 1x schedule (12 epochs) on COCO 2017
#
#   command       bash tools/dist_train.sh configs/lit/mask_rcnn_lit_ti_fpn_1x_coco.py 8
#   GPUs          8, float32
#   global batch  16 (8 x 2)
#   published     42.0 box AP, 39.1 mask AP
#   obtained      not run here

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "../_base_/default_runtime.py",
]
model = dict(
    backbone=dict(
        _delete_=True,
        type="LITBackbone",
        arch="lit_ti",
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="https://github.com/ziplab/LIT/releases/download/v1.0/lit_ti.pth"),
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=2e-4, weight_decay=1e-4))
