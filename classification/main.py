"""Train, evaluate or time a classifier: `python main.py --cfg configs/lit-s.yaml --data-path /data/imagenet`."""

import argparse
import sys
from functools import partial

if __name__ == "__main__":
    import lit_classification.interrupts  # noqa: F401, before what takes long to import

from lit_classification.config import ConfigError
from lit_classification.config_file import load_config, locate_run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cfg",
        required=True,
        metavar="FILE",
        help="YAML file of the run, e.g. configs/lit-s.yaml, or config.yaml of one to continue",
    )
    mode, to = parser.add_mutually_exclusive_group(), dict(dest="mode", action="store_const", default="train")
    mode.add_argument("--eval", const="eval", **to, help="evaluate the checkpoint named by --resume")
    mode.add_argument("--throughput", const="throughput", **to, help="measure images per second of inference")
    overrides = dict(nargs="+", action="extend", default=[], metavar="KEY VALUE")
    parser.add_argument("--opts", **overrides, help="override keys of the configuration, e.g. TRAIN.EPOCHS 100")
    parser.add_argument("--resume", metavar="FILE", help="MODEL.RESUME: checkpoint to continue or evaluate")
    parser.add_argument("--pretrained", metavar="FILE", help="MODEL.PRETRAINED: checkpoint to start from")
    parser.add_argument("--data-path", metavar="DIR", help="DATA.DATA_PATH: data set with train/ and val/")
    parser.add_argument("--batch-size", type=int, metavar="N", help="DATA.BATCH_SIZE: images per process")
    parser.add_argument("--output", metavar="DIR", help="OUTPUT: where runs are written")
    parser.add_argument("--tag", help="TAG: name of this run")
    args = parser.parse_args(argv)
    if args.mode == "throughput" and (args.resume or args.pretrained):
        parser.error("argument --throughput: measures the model of --cfg and reads no checkpoint")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    shortcuts = {name: value for name, value in vars(args).items() if name not in ("cfg", "mode", "opts")}
    try:
        name, own = locate_run(args.cfg)
        load = partial(load_config, args.cfg, [*own, *args.opts], training=args.mode == "train", **shortcuts)
        config = load()
    except ConfigError as error:
        sys.exit(f"error: {error}")
    from lit_classification.run import run  # only now, for it takes seconds to import PyTorch

    run(args.mode, config, load, name)


if __name__ == "__main__":
    main()
