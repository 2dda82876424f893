"""Writes a classifier's checkpoint in the forms in which other programs use it.

    python tools/export.py lit_s.pth --format onnx

  onnx          lit_s.onnx, a graph for onnxruntime and other engines
  torch-export  lit_s.pt2, a graph for torch.export.load
  safetensors   lit_s.safetensors, the weights, e.g. for timm.create_model("lit_s", checkpoint_path=...)
  hf            lit_s-hf, a folder for timm.create_model("local-dir:lit_s-hf", pretrained=True), once lit_backbone is
                imported, or for the Hub, with a model card, README.md
  released      lit_s-released.pth, the weights in the layout of the authors' code

Graphs take any number of images `(B, 3, H, W)`, normalised, of any size from 32 x 32 pixels (torch-export: 64 x 64, for
PyTorch tells maps of a single token apart), and give logits `(B, classes)`; with --dense, the four stages' feature maps
`(B, C, H / s, W / s)` for s = 4, 8, 16, 32, as timm's features_only gives them (the class token of LIT-Ti takes part).
The files of onnx (as metadata), torch-export (as extra_files) and safetensors (as metadata) tell the architecture, and
in JSON the classes, how timm prepares an image, and main.py's keys of model and input: whatever reads a checkpoint here
reads safetensors files likewise. In an ONNX file, DTM is the operator DeformConv, which onnxruntime runs from 1.25 on;
with --grid-sample, GridSample and Conv, slower, but known to more runtimes.
onnx needs the packages onnx and onnxscript: `bash setup_env.sh --dev` installs them.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import save_for_hf
from timm.models._features import FeatureGetterNet
from torch import Tensor

from lit_backbone import LIT, CheckpointError, read_checkpoint
from lit_backbone.dtm import use_deform_conv
from lit_backbone.released import to_released
from lit_classification.augmentation import evaluation_input
from lit_classification.model import BROUGHT, Classifier, load_classifier
from lit_classification.model_card import model_card

EXAMPLE_SHAPE = (2, 3, 96, 160)  # to trace; no side, and no map's side, of 1, which would be taken for a constant


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="written by main.py, or released")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", type=Path, metavar="PATH", help="(beside the checkpoint, named after it)")
    parser.add_argument("--dense", action="store_true", help="feature maps instead of logits (onnx, torch-export)")
    parser.add_argument("--grid-sample", action="store_true", help="onnx for runtimes without DeformConv; slower")
    args = parser.parse_args(argv)
    if args.output and (args.output.suffix == ".safetensors") != (args.format == "safetensors"):
        parser.error(f"argument --output: {args.output}: .safetensors is the suffix of that format, and of no other")
    if args.grid_sample and args.format != "onnx":
        parser.error(f"argument --grid-sample: no choice of the {args.format} format; use it with onnx")
    if args.dense and args.format not in ("onnx", "torch-export"):
        parser.error(f"argument --dense: a {args.format} export has no graph; use it with onnx or torch-export")
    return args


def description(classifier: Classifier) -> dict[str, str]:
    """What one must know to use the model: its architecture, and in JSON its classes and its way to prepare images, and
    what `read_checkpoint` gives beside the weights, where the checkpoint names its classes."""
    preprocessing = resolve_data_config(evaluation_input(classifier.config), pretrained_cfg={})
    brought = classifier.config.model_dump(mode="json", include=BROUGHT)
    own = {"lit_backbone": json.dumps({"classes": classifier.folders, "config": brought})} if classifier.folders else {}
    return own | {
        "architecture": classifier.config.MODEL.NAME,
        "classes": json.dumps(classifier.classes),
        "preprocessing": json.dumps(preprocessing),
    }


def write_onnx(classifier: Classifier, path: Path, grid_sample: bool = False) -> None:
    model = deepcopy(classifier.model)
    if not grid_sample:
        use_deform_conv(model)  # in runtimes the faster way (docs/performance.md)
    free = {0: "batch", 2: "height", 3: "width"}
    with torch.no_grad():  # with gradients, attention's bias would not be a constant
        example = torch.zeros(EXAMPLE_SHAPE)
        outputs = model(example)
        names = ["logits"] if isinstance(outputs, Tensor) else [f"map{i}" for i in range(len(outputs))]
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["images"],
            output_names=names,
            opset_version=20,  # DeformConv's is 19
            dynamic_shapes=(free,),
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props.update(description(classifier))
    program.save(path)


def write_torch_export(classifier: Classifier, path: Path) -> None:
    free = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    with torch.no_grad():
        program = torch.export.export(classifier.model, (torch.zeros(EXAMPLE_SHAPE),), dynamic_shapes=(free,))
    torch.export.save(program, path, extra_files=description(classifier))


def write_safetensors(classifier: Classifier, path: Path) -> None:
    save_file(classifier.model.state_dict(), path, metadata={"format": "pt"} | description(classifier))


def write_hf(classifier: Classifier, path: Path) -> None:
    labels = {"label_names": classifier.classes}
    save_for_hf(
        classifier.model, path, labels, safe_serialization=True, data_config=evaluation_input(classifier.config)
    )
    write_safetensors(classifier, path / "model.safetensors")  # the same weights, and their description


def write_released(classifier: Classifier, path: Path) -> None:
    torch.save({"model": to_released(classifier.model.state_dict()), "classes": classifier.folders}, path)


FORMATS: dict[str, tuple[str, Callable[[Classifier, Path], None]]] = {
    "onnx": (".onnx", write_onnx),
    "torch-export": (".pt2", write_torch_export),
    "safetensors": (".safetensors", write_safetensors),
    "hf": ("-hf", write_hf),
    "released": ("-released.pth", write_released),
}


def export(checkpoint: Path, output: Path, write: Callable[[Classifier, Path], None], dense: bool) -> None:
    """Write a checkpoint in another form; files appear when they are whole.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is not a LIT's.
        ImportError, OSError, RuntimeError, SafetensorError, ValueError: it cannot be written in this form, or here.
    """
    classifier = load_classifier(checkpoint, torch.device("cpu"))
    if not isinstance(classifier.model, LIT):
        raise CheckpointError(f"{checkpoint}: holds a {type(classifier.model).__name__}; expected a LIT")
    if dense:
        classifier = classifier._replace(model=FeatureGetterNet(classifier.model, out_indices=(0, 1, 2, 3)).eval())
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.tmp{output.suffix}")  # PyTorch wants the suffix of its graphs
    try:
        write(classifier, unfinished)
        if unfinished.is_dir():  # for the Hub
            (unfinished / "README.md").write_text(model_card(classifier, read_checkpoint(checkpoint), checkpoint))
            output.mkdir(exist_ok=True)
            for file in unfinished.iterdir():
                publish(file, output / file.name)
        else:
            publish(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.unlink(missing_ok=True)


def publish(file: Path, output: Path) -> None:
    """Give a whole file its name, and the mode that the user's files have: safetensors' is their owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
    os.replace(file, output)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    ending, write = FORMATS[args.format]
    if args.grid_sample:
        write = partial(write_onnx, grid_sample=True)
    output = args.output or args.checkpoint.with_name(args.checkpoint.stem + ending)
    if output.resolve() == args.checkpoint.resolve():
        sys.exit(f"error: {output}: is the checkpoint itself; name another --output")
    try:
        export(args.checkpoint, output, write, args.dense)
    except CheckpointError as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}; install it by bash setup_env.sh --dev")
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        sys.exit(f"error: {output}: not written ({(str(error) or repr(error)).splitlines()[0]})")
    print(f"{args.checkpoint} as {args.format}: {output}")


if __name__ == "__main__":
    main()
