"""Train a segmentor: `python tools/train.py configs/lit/lit_s_fpn_r50_512x512_80k_ade20k.py`."""

from lit_backbone.mm.cli import train

if __name__ == "__main__":
    train(__doc__)
