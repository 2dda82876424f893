"""Draw class overlays: `python tools/segment.py street.jpg --config CONFIG --checkpoint sem_fpn_lit_s.pth`."""

from pathlib import Path

import numpy as np
from mmseg.apis import inference_model
from PIL import Image, ImageDraw, ImageFont

from lit_backbone.images import find_images, open_rgb
from lit_backbone.mm.cli import one_line_errors
from lit_backbone.mm.inference import build_parser, load_model, process_images
from lit_backbone.mm.labels import Labels, drawable_labels
from lit_backbone.visualize import enlargement

FONT_SIZE = 0.02  # size of the legend, relative to the shorter side of the image; at least 14 pixels
MIN_AREA = 0.001  # minimum share of the image for a class to appear in the legend


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--opacity", type=float, default=0.6, metavar="A", help="of the overlay, 0 to 1 (%(default)s)")
    parser.add_argument("--masks", action="store_true", help="also write class indices to DIR/masks, as PNG")
    args = parser.parse_args(argv)
    if not 0 <= args.opacity <= 1:
        parser.error(f"argument --opacity: {args.opacity} is not between 0 and 1")
    with one_line_errors():
        images = find_images(args.images)
        model = load_model(args.config, args.checkpoint, args.device, **args.cfg_options)
        labels, palette = (
            drawable_labels(model.dataset_meta["classes"]),
            np.array(model.dataset_meta["palette"], np.uint8),
        )
        first_class = int(model.dataset_meta.get("reduce_zero_label", False))  # in the masks of the data

        def segment(path: str, output: Path) -> str:
            image = np.array(open_rgb(path, upright=True))  # (H, W, 3)
            result = inference_model(model, image[..., ::-1])  # RGB -> BGR
            classes = result.pred_sem_seg.data[0].cpu().numpy()  # (H, W)
            draw_overlay(image, classes, labels, palette, args.opacity).save(output)
            if args.masks:
                (args.out_dir / "masks").mkdir(exist_ok=True)
                Image.fromarray((classes + first_class).astype(np.uint8)).save(args.out_dir / "masks" / output.name)
            return f"{path}: {len(np.unique(classes))} classes, drawn in {output}"

        process_images(images, args.out_dir, segment)


def draw_overlay(
    image: np.ndarray, classes: np.ndarray, labels: Labels, palette: np.ndarray, opacity: float
) -> Image.Image:
    """Blend an image with the colors of its classes, and draw a legend with the area of each class.

    Args:
        image: `(H, W, 3)` uint8, RGB.
        classes: `(H, W)`, indices into the labels and the palette.
        labels: class names and their font.
        palette: `(classes, 3)` uint8, RGB.
        opacity: opacity of the colors, 0 to 1.
    """
    factor = enlargement(*classes.shape)
    blend = (1 - opacity) * image + opacity * palette[classes]
    overlay = Image.fromarray(blend.round().astype(np.uint8).repeat(factor, 0).repeat(factor, 1))
    areas = np.bincount(classes.ravel(), minlength=len(labels.names)) / classes.size
    listed = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= MIN_AREA]
    size = max(14, round(FONT_SIZE * min(overlay.size)))
    font, line = ImageFont.truetype(labels.font.fname, size), round(1.6 * size)
    entries = [f"{labels.names[i]}  {areas[i]:.1%}" for i in listed]
    width, height = 3 * line + round(max(map(font.getlength, entries))), (len(entries) + 1) * line
    canvas = Image.new("RGB", (overlay.width + width, max(overlay.height, height)), "white")
    canvas.paste(overlay)
    draw = ImageDraw.Draw(canvas)
    x = overlay.width + line // 2
    for row, (i, entry) in enumerate(zip(listed, entries)):
        y = line // 2 + row * line
        draw.rectangle((x, y, x + size, y + size), fill=tuple(palette[i].tolist()), outline="black")
        draw.text((x + line, y + size / 2), entry, "black", font, anchor="lm")
    return canvas


if __name__ == "__main__":
    main()
