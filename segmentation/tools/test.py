"""Evaluate a segmentor: `python tools/test.py configs/lit/lit_s_fpn_r50_512x512_80k_ade20k.py sem_fpn_lit_s.pth`."""

import sys

try:
    from lit_backbone.mm.runner import test
except ImportError as error:
    sys.exit(f"{error}: run `bash setup_env.sh --mm` and activate its environment")
from argparse import Namespace

from mmengine.config import Config


def prepare(cfg: Config, args: Namespace) -> None:
    """Make a config show, draw and write predictions as the command line says."""
    if args.show or args.show_dir:
        cfg.default_hooks.visualization.update(draw=True, show=args.show, wait_time=args.wait_time)
    if args.show_dir:
        cfg.visualizer.save_dir = args.show_dir
    if args.out:
        cfg.test_evaluator.output_dir = args.out


if __name__ == "__main__":
    test(__doc__, prepare)
