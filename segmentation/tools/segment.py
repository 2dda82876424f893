"""Draw class overlays: `python tools/segment.py street.jpg --config CONFIG --checkpoint sem_fpn_lit_s.pth`."""

import numpy as np
from mmseg.apis import inference_model
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from lit_backbone.images import DataError, find_images, open_rgb
from lit_backbone.mm.cli import one_line_errors
from lit_backbone.mm.inference import build_parser, load_model, output_paths
from lit_backbone.safe_reader import printable
from lit_backbone.visualize import enlargement

FONT_SIZE = 0.02  # size of the legend, relative to the shorter side of the image; at least 14 pixels
MIN_AREA = 0.001  # minimum share of the image for a class to appear in the legend


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--opacity", type=float, default=0.6, metavar="A", help="of the overlay, 0 to 1 (%(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.opacity <= 1:
        parser.error(f"argument --opacity: {args.opacity} is not between 0 and 1")
    with one_line_errors():
        images = find_images(args.images)
        model = load_model(args.config, args.checkpoint, args.device, **args.cfg_options)
        names, palette = (model.dataset_meta[key] for key in ("classes", "palette"))
        for path, output in output_paths(images, args.out_dir):
            image = np.array(open_rgb(path, upright=True))  # (H, W, 3)
            try:
                result = inference_model(model, image[..., ::-1])  # RGB -> BGR
            except DataError as error:
                raise DataError(f"{path}: {error}") from error
            labels = result.pred_sem_seg.data[0].cpu().numpy()  # (H, W)
            draw_overlay(image, labels, names, np.array(palette, np.uint8), args.opacity).save(output)
            tqdm.write(printable(f"{path}: {len(np.unique(labels))} classes, drawn in {output}"))


def draw_overlay(
    image: np.ndarray, labels: np.ndarray, names: list[str], palette: np.ndarray, opacity: float
) -> Image.Image:
    """Blend an image with the colors of its classes, and draw a legend with the area of each class.

    Args:
        image: `(H, W, 3)` uint8, RGB.
        labels: `(H, W)`, indices into `names` and `palette`.
        names: class names.
        palette: `(classes, 3)` uint8, RGB.
        opacity: opacity of the colors, 0 to 1.
    """
    factor = enlargement(*labels.shape)
    blend = (1 - opacity) * image + opacity * palette[labels]
    overlay = Image.fromarray(blend.round().astype(np.uint8).repeat(factor, 0).repeat(factor, 1))
    areas = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
    listed = [i for i in np.argsort(-areas, kind="stable") if areas[i] >= MIN_AREA]
    size = max(14, round(FONT_SIZE * min(overlay.size)))
    font, line = ImageFont.load_default(size), round(1.6 * size)
    entries = [f"{names[i]}  {areas[i]:.1%}" for i in listed]
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
