"""Evaluate a detector: `python tools/test.py configs/lit/retinanet_lit_s_fpn_1x_coco.py retina_lit_s.pth`."""

from lit_backbone.mm.cli import test

if __name__ == "__main__":
    test(__doc__)
