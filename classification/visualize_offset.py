"""Draw where deformable token merging samples an image.

python visualize_offset.py --model lit_ti --resume lit_ti.pth --vis_image visualization/demo.JPEG
"""

import argparse
from pathlib import Path

import torch
from timm.data import create_transform
from torchvision.transforms.functional import to_pil_image

from lit_backbone.images import open_rgb
from lit_backbone.original import parse_args
from lit_backbone.safe_reader import printable
from lit_backbone.visualize import add_model_arguments, add_offset_arguments, enlargement, write_offsets
from lit_classification.config import import_modules, one_line_errors
from lit_classification.data import eval_preprocessing
from lit_classification.model import load_classifier


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vis_image", type=Path, required=True, metavar="IMAGE", help="image to sample")
    parser.add_argument("--output", type=Path, default=Path("visualization"), metavar="DIR", help="(%(default)s)")
    add_model_arguments(parser)
    add_offset_arguments(parser)
    args = parse_args(parser, argv, "visualize")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    import_modules(args.imports)
    image = open_rgb(args.vis_image)
    classifier = load_classifier(args.resume, device, args.model, args.img_size)
    x = classifier.transform(image)  # (3, H, W)
    factor = enlargement(*x.shape[1:])
    size = (3, factor * x.shape[1], factor * x.shape[2])
    sharp = create_transform(**eval_preprocessing(classifier.config) | {"input_size": size}, normalize=False)(image)
    folder = args.output / args.vis_image.stem
    options = dict(grid=args.grid, plain=args.plain, html=args.html, at_most=args.at_most)
    print(printable(write_offsets(classifier.model, x.to(device), to_pil_image(sharp), folder, **options)))


if __name__ == "__main__":
    main()
