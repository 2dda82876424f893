"""Writes a classifier's checkpoint in the forms in which other programs use it.

    python tools/export.py lit_s.pth --format onnx

  onnx          lit_s.onnx, a graph for onnxruntime and other engines
  torch-export  lit_s.pt2, a graph for torch.export.load
  safetensors   lit_s.safetensors, the weights alone, e.g. for timm.create_model("lit_s", checkpoint_path=...)
  hf            lit_s-hf, a folder for timm.create_model("local-dir:lit_s-hf"), once lit_backbone is imported
  released      lit_s-released.pth, the weights in the layout of the authors' code

Graphs take any number of images `(B, 3, H, W)`, normalised, of any size from 32 x 32 pixels, and give logits
`(B, classes)`; with --dense, the four stages' feature maps `(B, C, H / s, W / s)` for s = 4, 8, 16, 32.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "classification")]

from lit_backbone import CheckpointError  # noqa: E402
from lit_backbone.checkpoints import to_released  # noqa: E402
from predict import Classifier, load_classifier  # noqa: E402

INPUT, EXAMPLE_BATCH = "images", 2  # one image would make the batch a constant


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="written by main.py, or released")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", type=Path, metavar="PATH", help="(beside the checkpoint, named after it)")
    parser.add_argument("--dense", action="store_true", help="feature maps instead of logits (onnx, torch-export)")
    args = parser.parse_args(argv)
    if args.dense and args.format not in ("onnx", "torch-export"):
        parser.error(f"argument --dense: a {args.format} export has no graph; use it with onnx or torch-export")
    return args


def write_onnx(classifier: Classifier, path: Path) -> None:
    model, free = classifier.model, {0: "batch", 2: "height", 3: "width"}
    outputs = ["logits"] if not isinstance(model, FeatureGetterNet) else [f"stage{i}" for i in range(4)]
    names = dict(input_names=[INPUT], output_names=outputs)
    with torch.no_grad():  # with gradients, attention's bias would not be a constant
        program = torch.onnx.export(model, example(classifier), dynamo=True, dynamic_shapes=(free,), **names)
    program.save(path)


def write_torch_export(classifier: Classifier, path: Path) -> None:
    torch.export.save(trace(classifier), path)


def trace(classifier: Classifier) -> torch.export.ExportedProgram:
    """The model as a graph for any number of images of any size."""
    free = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    with torch.no_grad():
        return torch.export.export(classifier.model, example(classifier), dynamic_shapes=(free,))


def example(classifier: Classifier) -> tuple[Tensor]:
    height, width = classifier.config.DATA.IMG_SIZE
    return (torch.zeros(EXAMPLE_BATCH, 3, height, width),)


def write_safetensors(classifier: Classifier, path: Path) -> None:
    name = classifier.model.pretrained_cfg["architecture"]
    save_file(classifier.model.state_dict(), path, metadata={"format": "pt", "architecture": name})


def write_hf(classifier: Classifier, path: Path) -> None:
    config = classifier.config
    preprocessing = {"input_size": (3, *config.DATA.IMG_SIZE), "interpolation": config.DATA.INTERPOLATION}
    labels = {"label_names": classifier.classes}
    save_for_hf(classifier.model, path, labels, safe_serialization=True, data_config=preprocessing)


def write_released(classifier: Classifier, path: Path) -> None:
    torch.save({"model": to_released(classifier.model.state_dict())}, path)


FORMATS: dict[str, tuple[str, Callable[[Classifier, Path], None]]] = {
    "onnx": (".onnx", write_onnx),
    "torch-export": (".pt2", write_torch_export),
    "safetensors": (".safetensors", write_safetensors),
    "hf": ("-hf", write_hf),
    "released": ("-released.pth", write_released),
}


def dense(model: nn.Module) -> nn.Module:
    """The backbone alone, returning its stages' maps `(B, C, H / s, W / s)`."""
    return FeatureGetterNet(model, out_indices=(0, 1, 2, 3)).eval()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    ending, write = FORMATS[args.format]
    output = args.output or args.checkpoint.with_name(args.checkpoint.stem + ending)
    if output.exists() and output.samefile(args.checkpoint):
        sys.exit(f"error: {output}: is the checkpoint itself; name another --output")
    try:
        classifier = load_classifier(args.checkpoint, torch.device("cpu"))
        if args.dense:
            classifier = classifier._replace(model=dense(classifier.model))
        output.parent.mkdir(parents=True, exist_ok=True)
        write(classifier, output)
    except ImportError as error:
        sys.exit(f"error: {error}; pip install onnx onnxscript")
    except (CheckpointError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.checkpoint} as {args.format}: {output}")


if __name__ == "__main__":
    main()
