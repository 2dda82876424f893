"""Backbone of the detection and segmentation demos: the small LIT of experiments/cifar10 with its weights."""

# The configs add norms on its outputs.
small_lit = dict(
    type="LITBackbone",
    arch=dict(embed_dims=(24, 48, 96, 192), depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    img_size=128,
    drop_path_rate=0.05,
    init_cfg=dict(type="Pretrained", checkpoint="{{ fileDirname }}/../experiments/cifar10/lit.pth"),
)
