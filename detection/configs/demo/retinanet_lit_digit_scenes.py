# Small RetinaNet on digit scenes. Its LIT backbone is pretrained with the classifier of experiments/cifar10.
#
#   command       make demo-detection
#   GPUs          not required
#   global batch  8 (1 x 8)
#   published     none
#   obtained      0.992 box AP50 (AP 0.881) on the validation scenes, last checkpoint, mean of seeds 0, 1 and 2

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "../../../demo/small_lit.py",
    "../_base_/digit_scenes.py",
    "../_base_/demo_schedule.py",
    "../_base_/default_runtime.py",
]
norm = dict(type="GN", num_groups=8)  # the heads train much more slowly without it
model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(_delete_=True, out_norms=(1, 2, 3), **_base_.small_lit),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=64, num_outs=3, norm_cfg=norm),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=norm,
        anchor_generator=dict(octave_base_scale=2, ratios=[1.0, 1.5, 2.5], strides=[8, 16, 32]),
    ),
)
