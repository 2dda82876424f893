"""Draw where deformable token merging samples an image.

python visualize_offset.py --model lit_ti --resume lit_ti.pth --vis_image visualization/demo.JPEG
"""

import argparse
import sys
from pathlib import Path

try:
    import lit_backbone  # noqa: F401, registers the models
except ModuleNotFoundError as error:
    sys.exit(f"{error}: run `bash setup_env.sh` and activate its environment")
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import normalize, to_pil_image

from config import Config
from data import DataError, build_transform, one_line
from lit_backbone import CheckpointError
from lit_backbone.visualize import add_arguments, write_offsets
from predict import Classifier, ImageFiles, load_classifier


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--vis_image", type=Path, required=True, metavar="IMAGE", help="image to look at")
    parser.add_argument("--output", type=Path, default=Path("visualization"), metavar="DIR", help="(%(default)s)")
    add_arguments(parser)
    return check_model_arguments(parser, argv)


# ---- what visualize_attention.py needs, too


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="of the model; checked if given, the checkpoint tells it")
    parser.add_argument("--resume", metavar="FILE", help="checkpoint, written by main.py or released")
    help = "input size in pixels, one number or height and width, in place of the checkpoint's"
    parser.add_argument("--img_size", type=int, nargs="+", metavar="N", help=help)


def check_model_arguments(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.resume is None:
        parser.error("--resume FILE is missing: name a checkpoint, an untrained model has nothing to show")
    if args.img_size and (len(args.img_size) > 2 or min(args.img_size) < 32):
        parser.error(f"argument --img_size: expected one or two numbers of at least 32, got {args.img_size}")
    return args


def load_model(args: argparse.Namespace, device: torch.device) -> Classifier:
    """The classifier of a command line, with the transform for the input size that it asks for.

    Raises:
        CheckpointError: the file cannot be read, or holds another model than it names.
    """
    classifier = load_classifier(args.resume, device)
    name = classifier.config.MODEL.NAME
    if args.model not in (None, name):
        raise CheckpointError(f"{args.resume}: holds {name}, not {args.model}; leave out --model, or name another file")
    if args.img_size:
        size = (args.img_size[0], args.img_size[-1])
        data = classifier.config.DATA.model_copy(update={"IMG_SIZE": size})
        config: Config = classifier.config.model_copy(update={"DATA": data})
        classifier = classifier._replace(config=config, transform=build_transform(config, is_training=False))
    return classifier


# ---- main


def to_picture(x: Tensor) -> Image.Image:
    """The picture that a normalised input `(3, H, W)` is of."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return to_pil_image(normalize(x, (-mean / std).tolist(), (1 / std).tolist()).clamp(0, 1))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        classifier = load_model(args, device)
        x, _ = ImageFiles([str(args.vis_image)], classifier.transform)[0]
        print(write_offsets(classifier.model, x.to(device), to_picture(x), args.output / args.vis_image.stem, args))
    except DataError as error:
        sys.exit(f"error: {one_line(error)}")
    except (CheckpointError, ValueError) as error:  # a model without DTM
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
