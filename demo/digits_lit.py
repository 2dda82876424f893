# The LIT of ../classification/configs/lit-digits.yaml with the weights that `make demo` trains, as a backbone for the
# configs of detection and segmentation, which give it norms on its outputs.
digits_lit = dict(
    type="LITBackbone",
    arch=dict(embed_dims=(24, 48, 96, 192), depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    img_size=128,
    drop_path_rate=0.05,
    init_cfg=dict(type="Pretrained", checkpoint="../classification/output/lit-digits/default/latest.pth"),
)
