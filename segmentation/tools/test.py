"""Evaluate a segmentor: `python tools/test.py configs/lit/lit_s_fpn_r50_512x512_80k_ade20k.py sem_fpn_lit_s.pth`."""

from lit_backbone.mm.cli import test

if __name__ == "__main__":
    test(__doc__)
