"""Draw where one token of each stage attends, averaged over validation images.

python visualize_attention.py --model pvt_small_full_msa --resume pvt_full_msa.pth --data-path /data/imagenet
"""

import argparse
import sys
from pathlib import Path

import torch

from lit_backbone import CheckpointError
from lit_backbone.attention_maps import PAPER_TOKENS, average_attention, choose_tokens, draw_attention_maps
from lit_backbone.datasets import image_loader
from lit_backbone.images import DataError, find_images
from lit_backbone.original import parse_args
from lit_backbone.safe_reader import printable
from lit_backbone.visualize import add_model_arguments, positive
from lit_classification.model import load_classifier


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="dataset with images in val/")
    help = "number of validation images to average over, from the first one on (%(default)s)"
    parser.add_argument("--num-images", type=positive, default=100, metavar="N", help=help)
    help = f"query token of each stage, row by row (default: {PAPER_TOKENS}, or the same place on other feature maps)"
    parser.add_argument("--tokens", type=int, nargs=4, metavar="T", help=help)
    parser.add_argument("--output", type=Path, default=Path("attention_map"), metavar="DIR", help="(%(default)s)")
    add_model_arguments(parser)
    args = parse_args(parser, argv, "visualize")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        classifier = load_classifier(args.resume, device, args.model, args.img_size)
        paths = find_images([str(Path(args.data_path, "val"))])[: args.num_images]
        model = classifier.model
        queries = choose_tokens(args.tokens, model.map_sizes(classifier.config.DATA.IMG_SIZE, len(model.stages)))
        maps = average_attention(model, image_loader(paths, classifier.transform), queries, device)
    except (CheckpointError, DataError) as error:
        sys.exit(f"error: {error}")
    for stage, stage_maps in maps.items():
        draw_attention_maps(stage_maps, queries[stage], args.output / f"stage-{stage + 1}")
    stages = ", ".join(str(stage + 1) for stage in maps)
    print(f"{printable(args.output)}: stages {stages}, averaged over {len(paths)} images")


if __name__ == "__main__":
    main()
