"""Export a classifier's checkpoint for other programs.

    python tools/export.py lit_s.pth --format onnx

onnx          lit_s.onnx, a graph for onnxruntime and other engines; needs `bash setup_env.sh --dev`
torch-export  lit_s.pt2, a graph for torch.export.load
safetensors   lit_s.safetensors, the weights, which this repository reads like a checkpoint
hf            lit_s-hf, a directory for the Hugging Face Hub or timm.create_model("local-dir:lit_s-hf", pretrained=True)

Graphs take normalized images `(B, 3, H, W)` of any number and size from 32 x 32 pixels (torch-export: 64 x 64). They
return logits `(B, classes)` or, with --dense, feature maps `(B, C, H / s, W / s)` for s = 4, 8, 16, 32. The metadata of
onnx, torch-export (extra_files) and safetensors files hold the architecture and, in JSON, classes and preprocessing.
"""

import json
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from timm.data import resolve_data_config
from timm.models import save_for_hf
from timm.models._features import FeatureGetterNet
from timm.models._hub import generate_readme
from torch import Tensor

from lit_backbone import LIT, CheckpointError, __version__, read_checkpoint
from lit_backbone.visualize import add_import_argument
from lit_classification.checkpointing import BEST
from lit_classification.config import ConfigError, import_modules, result_settings
from lit_classification.data import eval_preprocessing
from lit_classification.model import Classifier, load_classifier

# settings that a checkpoint needs to be read, beside weights and classes
SETTINGS = {"DATA": {"IMG_SIZE", "INTERPOLATION"}, "MODEL": {"NAME", "LIT", "NUM_CLASSES"}, "TEST": {"CROP"}}
EXAMPLE_SHAPE = (2, 3, 96, 160)  # A side of 1, of the image or of a feature map, would be traced as a constant.
USAGE = """
```python
import lit_backbone, timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # from the Hub: "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0))  # (1, classes)
print(model.pretrained_cfg["label_names"][logits.argmax()])
```
"""


def describe(classifier: Classifier) -> dict[str, str]:
    """Return the metadata of an exported file."""
    metadata = {
        "architecture": classifier.config.MODEL.NAME,
        "classes": json.dumps(classifier.classes),
        "preprocessing": json.dumps(resolve_data_config(eval_preprocessing(classifier.config), pretrained_cfg={})),
    }
    if classifier.class_names:
        config = classifier.config.model_dump(mode="json", include=SETTINGS)
        metadata["lit_backbone"] = json.dumps({"classes": classifier.class_names, "config": config})
    return metadata


def model_card(classifier: Classifier, content: dict[str, Any], checkpoint: Path) -> str:
    """Return the README.md of the Hub, with the training as far as the checkpoint's content describes it."""
    config = classifier.config
    parameters = sum(p.numel() for p in classifier.model.parameters())
    details: dict[str, Any] = {"Model": f"{config.MODEL.NAME}, {parameters:,} parameters"}
    details["Input"] = "{} x {} pixels, {} classes".format(*config.DATA.IMG_SIZE, len(classifier.classes))
    if "updates_per_epoch" in content:  # written by main.py
        details["Training"] = f"{content['update'] / content['updates_per_epoch']:g} of {config.TRAIN.EPOCHS} epochs"
        if content["best"] >= 0 and checkpoint.name == BEST:  # other files have weights of another epoch
            details["Accuracy"] = f"{content['best']:.2f} % top-1 on the validation images, best epoch"
        details["Data"] = config.DATA.DATASET or Path(config.DATA.DATA_PATH).name
        details["Initial weights"] = Path(config.MODEL.PRETRAINED).name or "random"
        details["Settings"] = result_settings(config)
    text = f"LIT, Less Attention in Vision Transformers. Exported from `{checkpoint.name}`, lit_backbone {__version__}."
    card = {"tags": ["image-classification", "timm", "lit"], "description": text, "details": details, "usage": USAGE}
    return generate_readme(card, config.MODEL.NAME)


def write_onnx(classifier: Classifier, path: Path) -> None:
    images = torch.zeros(EXAMPLE_SHAPE)
    with torch.no_grad():  # attention's bias becomes a constant
        outputs = classifier.model(images)
        program = torch.onnx.export(
            classifier.model,
            (images,),
            input_names=["images"],
            output_names=["logits"] if isinstance(outputs, Tensor) else [f"map{i}" for i in range(len(outputs))],
            opset_version=20,
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props.update(describe(classifier))
    program.save(path)


def write_torch_export(classifier: Classifier, path: Path) -> None:
    shapes = ({axis: torch.export.Dim.AUTO for axis in (0, 2, 3)},)
    with torch.no_grad():
        program = torch.export.export(classifier.model, (torch.zeros(EXAMPLE_SHAPE),), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files=describe(classifier))


def write_safetensors(classifier: Classifier, path: Path) -> None:
    save_file(classifier.model.state_dict(), path, metadata={"format": "pt"} | describe(classifier))


def write_hf(classifier: Classifier, path: Path) -> None:
    config: dict[str, Any] = {"label_names": classifier.classes}
    if classifier.class_names:  # trained by main.py, not by the authors
        config["pretrained_cfg"] = {"tag": "", "origin_url": ""}
    preprocessing = eval_preprocessing(classifier.config)
    save_for_hf(classifier.model, path, config, safe_serialization=True, data_config=preprocessing)
    config = json.loads((path / "config.json").read_text())
    del config["model_args"]["num_classes"]  # transformers passes its value of num_classes as well
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_safetensors(classifier, path / "model.safetensors")  # with metadata


FORMATS: dict[str, tuple[str, Callable[[Classifier, Path], None]]] = {
    "onnx": (".onnx", write_onnx),
    "torch-export": (".pt2", write_torch_export),
    "safetensors": (".safetensors", write_safetensors),
    "hf": ("-hf", write_hf),
}


def export(checkpoint: Path, output: Path, format: str, dense: bool = False) -> None:
    """Write a checkpoint in another format. Nothing is written if the export fails.

    Raises:
        CheckpointError: the checkpoint cannot be read or holds another model than LIT.
    """
    classifier = load_classifier(checkpoint, torch.device("cpu"))
    if not isinstance(classifier.model, LIT):
        raise CheckpointError(f"{checkpoint}: holds a {type(classifier.model).__name__}. Only LIT can be exported.")
    if dense:
        classifier = classifier._replace(model=FeatureGetterNet(classifier.model, out_indices=(0, 1, 2, 3)).eval())
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent) as folder:
        path = Path(folder, output.name)
        FORMATS[format][1](classifier, path)
        if path.is_dir():
            (path / "README.md").write_text(model_card(classifier, read_checkpoint(checkpoint), checkpoint))
            shutil.copytree(path, output, copy_function=shutil.copyfile, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, output)  # with default permissions: safetensors writes mode 0600


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="file of main.py, or released by the authors")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", type=Path, metavar="PATH", help="(beside the checkpoint)")
    parser.add_argument("--dense", action="store_true", help="feature maps instead of logits (onnx, torch-export)")
    add_import_argument(parser)
    args = parser.parse_args(argv)
    output = args.output or args.checkpoint.with_name(args.checkpoint.stem + FORMATS[args.format][0])
    if args.dense and args.format not in ("onnx", "torch-export"):
        parser.error(f"--dense: a {args.format} export has no graph. Use --format onnx or torch-export.")
    if output.resolve() == args.checkpoint.resolve():
        sys.exit(f"error: {output}: is the checkpoint itself. Choose another --output.")
    try:
        import_modules(args.imports)
        export(args.checkpoint, output, args.format, args.dense)
    except (CheckpointError, ConfigError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.checkpoint} as {args.format}: {output}")


if __name__ == "__main__":
    main()
