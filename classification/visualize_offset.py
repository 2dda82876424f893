"""Draw where deformable token merging samples an image.

python visualize_offset.py --model lit_ti --resume lit_ti.pth --vis_image visualization/demo.JPEG
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    import lit_classification.interrupts  # noqa: F401, before what takes long to import

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms.functional import normalize, to_pil_image

from lit_backbone import CheckpointError
from lit_backbone.checkpoints import printable
from lit_backbone.images import DataError, open_rgb
from lit_backbone.visualize import add_offset_arguments, write_offsets
from lit_classification.model import load_model, parse_model_args


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vis_image", type=Path, required=True, metavar="IMAGE", help="image to look at")
    parser.add_argument("--output", type=Path, default=Path("visualization"), metavar="DIR", help="(%(default)s)")
    add_offset_arguments(parser)
    return parse_model_args(parser, argv)


def to_picture(x: Tensor) -> Image.Image:
    """The picture that a normalised input `(3, H, W)` is of."""
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    return to_pil_image(normalize(x, (-mean / std).tolist(), (1 / std).tolist()).clamp(0, 1))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        image = open_rgb(args.vis_image)  # before the model: what is wrong with it is said at once
        classifier = load_model(args, device)
        x = classifier.transform(image)
        folder, flags = args.output / args.vis_image.stem, dict(grid=args.grid, html=args.html, at_most=args.at_most)
        print(printable(write_offsets(classifier.model, x.to(device), to_picture(x), folder, **flags)))
    except (CheckpointError, DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
