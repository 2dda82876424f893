"""Evaluate a detector: `python tools/test.py configs/lit/retinanet_lit_s_fpn_1x_coco.py retina_lit_s.pth`."""

import sys

try:
    from lit_backbone.mm.commands import test
except ImportError as error:
    sys.exit(f"{error}: run `bash setup_env.sh --mm` and activate its environment")

if __name__ == "__main__":
    test(__doc__)
