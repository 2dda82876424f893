"""Train a detector: `python tools/train.py configs/lit/retinanet_lit_s_fpn_1x_coco.py`."""

from lit_backbone.mm.cli import train

if __name__ == "__main__":
    train(__doc__)
