"""Draw class overlays: `python tools/segment.py street.jpg --config CONFIG --checkpoint sem_fpn_lit_s.pth`."""

from pathlib import Path

import numpy as np
from mmseg.apis import inference_model
from PIL import Image, ImageDraw, ImageFont

from lit_backbone.mm.cli import one_line_errors
from lit_backbone.mm.inference import build_parser, load_inputs, process_images
from lit_backbone.mm.labels import drawable_labels
from lit_backbone.visualize import enlargement

FONT_SIZE = 0.02  # size of the legend, relative to the shorter side of the image; at least 14 pixels
MIN_AREA = 0.001  # minimum share of the image for a class to appear in the legend


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--opacity", type=float, default=0.6, metavar="A", help="of the overlay, 0 to 1 (%(default)s)")
    parser.add_argument("--masks", action="store_true", help="also write class indices to DIR/masks, as PNG")
    args = parser.parse_args(argv)
    if not 0 <= args.opacity <= 1:
        parser.error(f"argument --opacity: {args.opacity} is not between 0 and 1")
    images, model = load_inputs(args)
    folder = args.out_dir / "masks"
    if args.masks and any(Path(image).resolve().parent == folder.resolve() for image in images):
        parser.error(f"argument --masks: {folder} holds input images, which could be overwritten. Change --out-dir.")
    names, font = drawable_labels(model.dataset_meta["classes"])
    palette = np.array(model.dataset_meta["palette"], np.uint8)  # (classes, 3)
    first_class = int(model.dataset_meta.get("reduce_zero_label", False))  # in the masks of the data

    def segment(image: np.ndarray, path: str, output: Path) -> str:
        classes = inference_model(model, image[..., ::-1]).pred_sem_seg.data[0].cpu().numpy()  # RGB -> BGR; (H, W)
        blend = ((1 - args.opacity) * image + args.opacity * palette[classes]).round().astype(np.uint8)
        factor = enlargement(*classes.shape)
        overlay = Image.fromarray(blend.repeat(factor, 0).repeat(factor, 1))
        areas = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
        listed = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= MIN_AREA]
        entries = [(f"{names[i]}  {areas[i]:.1%}", tuple(palette[i].tolist())) for i in listed]
        add_legend(overlay, entries, font.fname).save(output)
        if args.masks:
            folder.mkdir(exist_ok=True)
            Image.fromarray((classes + first_class).astype(np.uint8)).save(folder / output.name)
        return f"{path}: {len(np.unique(classes))} classes, drawn in {output}"

    process_images(images, args, segment)


def add_legend(image: Image.Image, entries: list[tuple[str, tuple[int, ...]]], font_file: str) -> Image.Image:
    """Add texts with colors on the right of an image."""
    size = max(14, round(FONT_SIZE * min(image.size)))
    font, line = ImageFont.truetype(font_file, size), round(1.6 * size)
    width = 3 * line + round(max(font.getlength(text) for text, _ in entries))
    canvas = Image.new("RGB", (image.width + width, max(image.height, (len(entries) + 1) * line)), "white")
    canvas.paste(image)
    draw = ImageDraw.Draw(canvas)
    x = image.width + line // 2
    for row, (text, color) in enumerate(entries):
        y = line // 2 + row * line
        draw.rectangle((x, y, x + size, y + size), fill=color, outline="black")
        draw.text((x + line, y + size / 2), text, "black", font, anchor="lm")
    return canvas


if __name__ == "__main__":
    main()
