# Small Mask R-CNN on digit scenes. Its LIT backbone is pretrained with the classifier of experiments/cifar10.
#
#   command       python tools/train.py configs/demo/mask_rcnn_lit_digit_scenes.py
#   GPUs          not required
#   global batch  8 (1 x 8)
#   published     none
#   obtained      0.953 mask AP50 (0.953 box AP50) on the validation scenes, last checkpoint of a shorter run: one
#                 epoch of 2,400 scenes (options in detection/README.md)

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "../../../demo/small_lit.py",
    "../_base_/digit_scenes.py",
    "../_base_/demo_schedule.py",
    "../_base_/default_runtime.py",
]
norm = dict(type="GN", num_groups=8)
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(_delete_=True, out_norms=(1, 2, 3), **_base_.small_lit),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=64, num_outs=4, norm_cfg=norm),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4], ratios=[1.0, 1.5, 2.5], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=28),
        bbox_head=dict(num_classes=10, in_channels=64, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=64, finest_scale=28),
        mask_head=dict(num_classes=10, in_channels=64, conv_out_channels=64, num_convs=2),
    ),
    # a scene has up to six digits
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)
val_evaluator = dict(metric=["bbox", "segm"])
test_evaluator = val_evaluator
