"""Train a segmentor: `python tools/train.py configs/lit/lit_s_fpn_r50_512x512_80k_ade20k.py`."""

import sys

try:
    from lit_backbone.mm.commands import train
except ImportError as error:
    sys.exit(f"{error}: run `bash setup_env.sh --mm` and activate its environment")

if __name__ == "__main__":
    train(__doc__)
