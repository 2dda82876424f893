"""Draw detections into pictures: `python tools/detect.py street.jpg --config CONFIG --checkpoint retina_lit_s.pth`."""

import sys

try:
    from lit_backbone.images import enlargement, find_images, open_rgb
    from lit_backbone.mm.commands import one_line_errors
    from lit_backbone.mm.inference import build_parser, load_model, outputs
    from lit_backbone.mm.screen import quiet_imports
    from lit_backbone.text import printable

    with quiet_imports():
        from mmdet.apis import inference_detector
        from mmdet.structures import DetDataSample
        from mmdet.visualization import DetLocalVisualizer
except ImportError as error:
    sys.exit(f"{error}: run `bash setup_env.sh --mm` and activate its environment")
import numpy as np
from mmengine.structures import InstanceData
from torchvision.ops import nms
from tqdm import tqdm


def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--score-thr", type=float, default=0.3, metavar="P", help="least score to draw (%(default)s)")
    args = parser.parse_args(argv)
    with one_line_errors():
        pictures = find_images(args.images)
        model = load_model(args.config, args.checkpoint, args.device, **args.cfg_options)
        test_cfg = model.test_cfg.get("rcnn", model.test_cfg)
        threshold = test_cfg.get("nms", {}).get("iou_threshold", 0.5)
        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = model.dataset_meta
        for picture, output in outputs(pictures, args.out_dir):
            image = np.array(open_rgb(picture, upright=True))  # (H, W, 3)
            result = inference_detector(model, image[..., ::-1]).cpu()  # BGR, as mmcv reads files
            found = result.pred_instances[result.pred_instances.scores >= args.score_thr]
            found = one_per_thing(found, threshold)
            image, found = enlarge(image, found, factor=enlargement(*image.shape[:2]))
            sample = DetDataSample(pred_instances=found)
            visualizer.add_datasample(picture, image, sample, draw_gt=False, pred_score_thr=0, out_file=str(output))
            tqdm.write(printable(f"{picture}: {len(found)} detections, drawn in {output}"))  # past the progress bar


def one_per_thing(instances: InstanceData, iou_threshold: float) -> InstanceData:
    """The likeliest of the instances that overlap, whatever their classes; the likeliest of all last, to be on top."""
    return instances[nms(instances.bboxes, instances.scores, iou_threshold).flip(0)]


def enlarge(image: np.ndarray, instances: InstanceData, factor: int) -> tuple[np.ndarray, InstanceData]:
    """An image `(H, W, 3)` and the instances found in it, `factor` times as large."""
    instances.bboxes = instances.bboxes * factor  # (N, 4)
    if "masks" in instances:
        instances.masks = instances.masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)  # (N, H, W)
    return image.repeat(factor, 0).repeat(factor, 1), instances


if __name__ == "__main__":
    main()
