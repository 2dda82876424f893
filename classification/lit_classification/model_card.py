"""The page that tells what an exported model is; the Hub shows it."""

import math
import re
from pathlib import Path
from typing import Any

from timm.models._hub import generate_readme

from lit_backbone import __version__
from lit_backbone.text import printable
from lit_classification.config import Config
from lit_classification.model import Classifier, stored_config, stored_records
from lit_classification.recipe import describe_settings
from lit_classification.resume import RunRecords

USAGE = """
```python
import lit_backbone  # registers the model with timm
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # from the Hub: "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    logits = model(transform(Image.open("photo.jpg").convert("RGB")).unsqueeze(0))  # (1, classes)
print(model.pretrained_cfg["label_names"][logits.argmax()])
```
"""
CITATION = """@inproceedings{pan2022less,
  title     = {Less is More: Pay Less Attention in Vision Transformers},
  author    = {Pan, Zizheng and Zhuang, Bohan and He, Haoyu and Liu, Jing and Cai, Jianfei},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2022}
}"""
LICENCE = "Apache-2.0, as the code; change it, and this file's first lines, where the data's terms bind the weights"


def model_card(classifier: Classifier, content: dict[str, Any], checkpoint: Path) -> str:
    """Data, recipe, figures, licence and use of a model, in the Hub's Markdown.

    Args:
        classifier: the model of the checkpoint.
        content: of the checkpoint; one of `main.py` knows its data, recipe and figures, others don't.
        checkpoint: its path, of which the name is told.
    """
    config, unknown = classifier.config, f"{printable(checkpoint.name, 100)} does not say"
    stored = stored_config(content, checkpoint)
    run = stored_records(content, checkpoint, RunRecords) if "updates_per_epoch" in content else None
    height, width = config.DATA.IMG_SIZE
    parameters = sum(p.numel() for p in classifier.model.parameters())
    details = {
        "Model": f"{config.MODEL.NAME}, {parameters:,} parameters, for images of {height} x {width} pixels",
        "Classes": f"{len(classifier.classes)}, named in config.json",
        "Data": _data(stored, run) if run else unknown,
        "Accuracy": _accuracy(run) if run else unknown,
        "Training": _training(stored, run) if run else unknown,
        "License": LICENCE,
        "Paper": "[arXiv 2105.14217](https://arxiv.org/abs/2105.14217)",
        "Recipe": _recipe(stored) if stored else unknown,
    }
    card = {
        "tags": ["image-classification", "timm", "lit"],
        "description": f"A LIT, exported from `{printable(checkpoint.name, 100)}` by lit_backbone {__version__}.",
        "details": details,
        "usage": USAGE,
        "citation": CITATION,
    }
    return generate_readme(card, config.MODEL.NAME)


def _data(config: Config, run: RunRecords) -> str:
    train, val = (_count_images(run.recipe, split) for split in ("train", "val"))
    name = config.DATA.DATASET or Path(config.DATA.DATA_PATH).name
    return f"{printable(name, 100)}, {train:,} images to train on, {val:,} to validate"


def _count_images(recipe: dict[str, str], split: str) -> int:
    """The sum of what `describe_recipe` says of a split's folders."""
    folders = " ".join(value for key, value in recipe.items() if key.startswith(f"{split}/"))
    return sum(map(int, re.findall(r"(\d{1,12}) files", folders)))


def _accuracy(run: RunRecords) -> str:
    if not math.isfinite(run.best):
        return "not evaluated"
    return f"{run.best:.2f} % top-1 on the validation images, the highest of the run up to this checkpoint"


def _training(config: Config, run: RunRecords) -> str:
    start = f"the weights of {printable(Path(config.MODEL.PRETRAINED).name, 100)}" if config.MODEL.PRETRAINED else ""
    epochs = f"{run.update / run.updates_per_epoch:g} of {config.TRAIN.EPOCHS} epochs"
    return f"{epochs} from {start or 'random weights'}, peak learning rate {config.learning_rates[0]:.3g}"


def _recipe(config: Config) -> dict[str, str]:
    """Every setting on which the result depends."""
    return {key: printable(value, 200) for key, value in describe_settings(config).items()}
