"""Draw where one token of each stage attends, in one image or averaged over validation images.

python visualize_attention.py --model pvt_small_full_msa --resume pvt_full_msa.pth --data-path /data/imagenet
"""

import argparse
import random
from pathlib import Path

import numpy as np
import torch

from lit_backbone import LIT, CheckpointError
from lit_backbone.attention_maps import PAPER_TOKENS, average_attention, choose_tokens, draw_attention_maps
from lit_backbone.datasets import image_loader
from lit_backbone.images import find_images
from lit_backbone.original import parse_args
from lit_backbone.safe_reader import printable
from lit_backbone.visualize import add_model_arguments, positive
from lit_classification.config import import_modules, one_line_errors
from lit_classification.model import load_classifier


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data-path", metavar="DIR", help="dataset with images in val/")
    source.add_argument("--vis_image", metavar="IMAGE", help="a single image instead of a dataset")
    help = "number of validation images to average over, a random sample (%(default)s)"
    parser.add_argument("--num-images", type=positive, default=100, metavar="N", help=help)
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the random sample (%(default)s)")
    help = f"query token of each stage, row by row (default: {PAPER_TOKENS}, or the same place on other feature maps)"
    parser.add_argument("--tokens", type=int, nargs=4, metavar="T", help=help)
    parser.add_argument("--output", type=Path, default=Path("attention_map"), metavar="DIR", help="(%(default)s)")
    add_model_arguments(parser)
    args = parse_args(parser, argv, "visualize")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    import_modules(args.imports)
    classifier = load_classifier(args.resume, device, args.model, args.img_size)
    model = classifier.model
    if not isinstance(model, LIT):
        raise CheckpointError(f"{args.resume}: holds {classifier.config.MODEL.NAME}. Use a checkpoint of a LIT.")
    paths = find_images([args.vis_image or str(Path(args.data_path, "val"))])
    paths = random.Random(args.seed).sample(paths, min(len(paths), args.num_images))
    queries = choose_tokens(args.tokens, model.map_sizes(classifier.config.DATA.IMG_SIZE, len(model.stages)))
    maps = average_attention(model, image_loader(paths, classifier.transform), queries, device)
    for stage, stage_maps in maps.items():
        draw_attention_maps(stage_maps, queries[stage], args.output / f"stage-{stage + 1}")
        np.save(args.output / f"stage-{stage + 1}.npy", stage_maps.float().cpu())  # (blocks, heads, h, w)
    stages = ", ".join(str(stage + 1) for stage in maps)
    print(f"{printable(args.output)}: stages {stages}, averaged over {len(paths)} image(s)")


if __name__ == "__main__":
    main()
