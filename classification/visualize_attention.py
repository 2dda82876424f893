"""Draw where one token of each stage attends, averaged over validation images.

python visualize_attention.py --model pvt_small_full_msa --resume pvt_full_msa.pth --data-path /data/imagenet
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    import lit_classification.interrupts  # noqa: F401, before what takes long to import

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_backbone import LIT, CheckpointError
from lit_backbone.checkpoints import printable
from lit_backbone.images import DataError, find_images
from lit_backbone.visualize import draw_attention, draw_sheet, positive, query_attention
from lit_classification.evaluation import progress
from lit_classification.loaders import image_loader
from lit_classification.model import load_model, parse_model_args

TOKENS = (1260, 294, 92, 17)  # the paper's, on the four maps of an image of 224 x 224 pixels
PAPER_SIDES = (56, 28, 14, 7)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="data set with images in val/")
    help = "how many validation images to average over, from the first on (%(default)s)"
    parser.add_argument("--num-images", type=positive, default=100, metavar="N", help=help)
    paper = " ".join(map(str, TOKENS))
    help = f"query token of each stage, counted row by row ({paper}, or the same place on other maps)"
    parser.add_argument("--tokens", type=int, nargs=4, metavar="T", help=help)
    parser.add_argument("--output", type=Path, default=Path("attention_map"), metavar="DIR", help="(%(default)s)")
    return parse_model_args(parser, argv)


def choose_tokens(wanted: list[int] | None, map_sizes: list[tuple[int, int]]) -> list[int]:
    """The query token of each stage: those asked for, else those at the places of the paper's.

    Raises:
        DataError: a token is not on its map.
    """
    if wanted is None:
        places = [(token // side / side, token % side / side) for token, side in zip(TOKENS, PAPER_SIDES)]
        return [int(y * height) * width + int(x * width) for (y, x), (height, width) in zip(places, map_sizes)]
    for token, (height, width) in zip(wanted, map_sizes):
        if not 0 <= token < height * width:
            raise DataError(f"--tokens {token}: the map has {height} x {width} tokens, 0 to {height * width - 1}")
    return wanted


def average_attention(model: LIT, loader: DataLoader, queries: list[int], device: torch.device) -> dict[int, Tensor]:
    """:func:`query_attention` averaged over images: for each stage that attends, `(blocks, heads, h, w)`."""
    total: dict[int, Tensor] = {}
    for batch in progress(loader, enable=len(loader) > 1, desc="attend", unit="batch"):
        images = [image for _, image in batch]
        if odd := [error for error in images if isinstance(error, DataError)]:
            raise odd[0]
        for stage, maps in query_attention(model, torch.stack(images).to(device), queries).items():
            total[stage] = total.get(stage, 0) + maps.double().sum(dim=0)
    return {stage: maps / len(loader.dataset) for stage, maps in total.items()}


def draw(maps: Tensor, query: int, folder: Path) -> None:
    """Draw the maps `(blocks, heads, h, w)` of a stage, one by one below `folder`, and side by side beside it."""
    pictures = []
    for i, block in enumerate(maps, 1):
        (folder / f"block-{i}").mkdir(parents=True, exist_ok=True)
        for j, heat in enumerate(block, 1):
            caption = f"block {i}, head {j}: up to {heat.max():.2g}"
            pictures.append(draw_attention(heat.float(), query, caption))
            pictures[-1].save(folder / f"block-{i}" / f"head-{j}.png")
    draw_sheet(pictures, len(pictures), columns=maps.shape[1]).save(folder.with_suffix(".png"))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, config, _, transform, _ = load_model(args, device)
        paths = find_images([str(Path(args.data_path, "val"))])[: args.num_images]
        queries = choose_tokens(args.tokens, model.map_sizes(config.DATA.IMG_SIZE, len(model.stages)))
        maps = average_attention(model, image_loader(paths, transform), queries, device)
        for stage, stage_maps in maps.items():
            draw(stage_maps, queries[stage], args.output / f"stage-{stage + 1}")
    except (CheckpointError, DataError, OSError) as error:
        sys.exit(f"error: {error}")
    stages = ", ".join(str(stage + 1) for stage in maps)
    print(f"{printable(args.output)}: stages {stages}, averaged over {len(paths)} images")


if __name__ == "__main__":
    main()
