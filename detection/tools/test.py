"""Evaluate a detector: `python tools/test.py configs/lit/retinanet_lit_s_fpn_1x_coco.py retina_lit_s.pth`."""

import os
import sys

try:
    from lit_backbone.mm.runner import test
    from lit_backbone.mm.screen import quiet_imports

    with quiet_imports():
        from mmdet.engine.hooks.utils import trigger_visualization_hook
except ImportError as error:
    sys.exit(f"{error}: run `bash setup_env.sh --mm` and activate its environment")
from argparse import Namespace

from mmengine.config import Config


def prepare(cfg: Config, args: Namespace) -> None:
    """Make a config show, draw and write predictions as the command line says."""
    if args.show or args.show_dir:
        if args.show_dir:
            args.show_dir = os.path.abspath(args.show_dir)  # mmdetection counts from the run's folder
        trigger_visualization_hook(cfg, args)
    if args.out:
        if not args.out.endswith((".pkl", ".pickle")):
            sys.exit(f"error: --out {args.out}: use a name that ends in .pkl")
        cfg.test_evaluator = [cfg.test_evaluator, dict(type="DumpDetResults", out_file_path=args.out)]


if __name__ == "__main__":
    test(__doc__, prepare)
