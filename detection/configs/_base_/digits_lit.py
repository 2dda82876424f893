# LIT as in ../classification/configs/lit-digits.yaml, with the weights that `make demo` has trained.
digits_lit = dict(
    type="LITBackbone",
    arch=dict(embed_dims=(24, 48, 96, 192), depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    img_size=128,
    out_norms=(1, 2, 3),
    drop_path_rate=0.05,
    init_cfg=dict(type="Pretrained", checkpoint="../classification/output/lit-digits/default/latest.pth"),
)
