"""Draw detections: `python tools/detect.py street.jpg --config CONFIG --checkpoint retina_lit_s.pth`."""

import json
from pathlib import Path

import numpy as np
from mmdet.apis import inference_detector
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData
from torchvision.ops import nms

from lit_backbone.mm.cli import one_line_errors
from lit_backbone.mm.inference import build_parser, load_inputs, process_images
from lit_backbone.mm.labels import matplotlib_labels
from lit_backbone.visualize import enlargement


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--score-thr", type=float, default=0.3, metavar="P", help="minimum score (%(default)s)")
    parser.add_argument("--json", action="store_true", help="also write the boxes next to each drawing")
    args = parser.parse_args(argv)
    images, model = load_inputs(args)
    classes = model.dataset_meta["classes"]
    iou_threshold = model.test_cfg.get("rcnn", model.test_cfg).get("nms", {}).get("iou_threshold", 0.5)
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dict(model.dataset_meta, classes=matplotlib_labels(classes))

    def detect(image: np.ndarray, path: str, output: Path) -> str:
        instances = inference_detector(model, image[..., ::-1]).cpu().pred_instances  # RGB -> BGR
        instances = class_agnostic_nms(instances[instances.scores >= args.score_thr], iou_threshold)
        if args.json:
            output.with_suffix(".json").write_text(describe(path, instances, classes), encoding="utf-8")
        image, instances = enlarge(image, instances, factor=enlargement(*image.shape[:2]))
        sample = DetDataSample(pred_instances=instances)
        visualizer.add_datasample(path, image, sample, draw_gt=False, pred_score_thr=0, out_file=str(output))
        return f"{path}: {len(instances)} detections, drawn in {output}"

    process_images(images, args, detect)


def describe(path: str, instances: InstanceData, classes: list[str]) -> str:
    """Return the detections of an image as JSON, the highest score first. A box is [x1, y1, x2, y2] in pixels."""
    rows = zip(instances.labels.tolist(), instances.scores.tolist(), instances.bboxes.tolist())
    detections = [{"class": classes[label], "score": score, "box": box} for label, score, box in rows]
    return json.dumps({"image": path, "detections": detections[::-1]}, ensure_ascii=False) + "\n"


def class_agnostic_nms(instances: InstanceData, iou_threshold: float) -> InstanceData:
    """Keep the highest score among overlapping instances of any class. Sort by score in ascending order."""
    return instances[nms(instances.bboxes, instances.scores, iou_threshold).flip(0)]


def enlarge(image: np.ndarray, instances: InstanceData, factor: int) -> tuple[np.ndarray, InstanceData]:
    """Enlarge an image `(H, W, 3)` and its instances by an integer factor."""
    instances.bboxes = instances.bboxes * factor  # (N, 4)
    if "masks" in instances:
        instances.masks = instances.masks.repeat_interleave(factor, 1).repeat_interleave(factor, 2)  # (N, H, W)
    return image.repeat(factor, 0).repeat(factor, 1), instances


if __name__ == "__main__":
    main()
