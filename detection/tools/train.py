"""Train a detector: `python tools/train.py configs/lit/retinanet_lit_s_fpn_1x_coco.py`."""

import sys

try:
    from lit_backbone.mm.commands import train
except ImportError as error:
    sys.exit(f"{error}: run `bash setup_env.sh --mm` and activate its environment")

if __name__ == "__main__":
    train(__doc__)
