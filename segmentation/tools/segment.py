"""Paint classes over pictures: `python tools/segment.py street.jpg --config CONFIG --checkpoint sem_fpn_lit_s.pth`."""

import sys

try:
    from lit_backbone.images import DataError, enlargement, find_images, open_rgb
    from lit_backbone.mm.commands import one_line_errors
    from lit_backbone.mm.inference import build_parser, load_model, outputs
    from lit_backbone.mm.screen import quiet_imports
    from lit_backbone.text import printable

    with quiet_imports():
        from mmseg.apis import inference_model
except ImportError as error:
    sys.exit(f"{error}: run `bash setup_env.sh --mm` and activate its environment")
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

LETTER = 0.02  # height of the legend's letters, as a share of the picture's shorter side; at least 14 pixels
MIN_SHARE = 0.001  # of the area that a class covers to be in the legend


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--opacity", type=float, default=0.6, metavar="A", help="of the colours, 0 to 1 (%(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.opacity <= 1:
        parser.error(f"argument --opacity: {args.opacity} is not between 0 and 1")
    with one_line_errors():
        pictures = find_images(args.images)
        model = load_model(args.config, args.checkpoint, args.device, **args.cfg_options)
        names, palette = (model.dataset_meta[key] for key in ("classes", "palette"))
        for picture, output in outputs(pictures, args.out_dir):
            image = np.array(open_rgb(picture, upright=True))  # (H, W, 3)
            try:
                result = inference_model(model, image[..., ::-1])  # BGR, as mmcv reads files
            except DataError as error:
                raise DataError(f"{picture}: {error}") from error
            classes = result.pred_sem_seg.data[0].cpu().numpy()  # (H, W)
            draw_overlay(image, classes, names, np.array(palette, np.uint8), args.opacity).save(output)
            found = len(np.unique(classes))
            tqdm.write(printable(f"{picture}: {found} classes, drawn in {output}"))  # past the progress bar


def draw_overlay(
    image: np.ndarray, classes: np.ndarray, names: list[str], palette: np.ndarray, opacity: float
) -> Image.Image:
    """Draw the classes over an image, and at its right a legend with the colour, name and area of each.

    Args:
        image: `(H, W, 3)` uint8, RGB.
        classes: `(H, W)`, indices into `names` and `palette`.
        names: of the classes.
        palette: `(classes, 3)` uint8, RGB.
        opacity: of the colours, 0 to 1.
    """
    factor = enlargement(*classes.shape)
    blend = (1 - opacity) * image + opacity * palette[classes]
    picture = Image.fromarray(blend.round().astype(np.uint8).repeat(factor, 0).repeat(factor, 1))
    shares = np.bincount(classes.ravel(), minlength=len(names)) / classes.size
    listed = [i for i in np.argsort(-shares, kind="stable") if shares[i] >= MIN_SHARE]
    letter = max(14, round(LETTER * min(picture.size)))
    font, line = ImageFont.load_default(letter), round(1.6 * letter)
    entries = [f"{names[i]}  {shares[i]:.1%}" for i in listed]
    width, height = 3 * line + round(max(map(font.getlength, entries))), (len(entries) + 1) * line
    sheet = Image.new("RGB", (picture.width + width, max(picture.height, height)), "white")
    sheet.paste(picture)
    draw = ImageDraw.Draw(sheet)
    x = picture.width + line // 2
    for row, (i, entry) in enumerate(zip(listed, entries)):
        y = line // 2 + row * line
        draw.rectangle((x, y, x + letter, y + letter), fill=tuple(palette[i].tolist()), outline="black")
        draw.text((x + line, y + letter / 2), entry, "black", font, anchor="lm")
    return sheet


if __name__ == "__main__":
    main()
