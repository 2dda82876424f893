"""The page that tells what an exported model is; the Hub shows it."""

import math
from pathlib import Path
from typing import Any

from timm.models._hub import generate_readme

from lit_backbone import __version__
from lit_backbone.checkpoints import printable
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
    config, name = classifier.config, printable(checkpoint.name, 100)
    height, width = config.DATA.IMG_SIZE
    parameters = sum(p.numel() for p in classifier.model.parameters())
    details: dict[str, Any] = {
        "Model": f"{config.MODEL.NAME}, {parameters:,} parameters, for images of {height} x {width} pixels",
        "Classes": f"{len(classifier.classes)}, named in config.json",
        **dict.fromkeys(("Data", "Accuracy", "Training"), f"{name} does not say"),
        "License": LICENCE,
        "Paper": "[arXiv 2105.14217](https://arxiv.org/abs/2105.14217)",
        "Recipe": f"{name} does not say",
    }
    stored = stored_config(content, checkpoint)
    if stored and "TRAIN" in content["config"]:  # every setting on which the result depends
        details["Recipe"] = {key: printable(value, 200) for key, value in describe_settings(stored).items()}
    if stored and "updates_per_epoch" in content:
        run = stored_records(content, checkpoint, RunRecords)
        accuracy = f"{run.best:.2f} % top-1 on the validation images, the highest of the run up to this checkpoint"
        details |= {
            "Data": printable(stored.DATA.DATASET or Path(stored.DATA.DATA_PATH).name, 100),
            "Accuracy": accuracy if math.isfinite(run.best) else "not evaluated",
            "Training": f"{run.update / run.updates_per_epoch:g} of {stored.TRAIN.EPOCHS} epochs",
        }
    card = {
        "tags": ["image-classification", "timm", "lit"],
        "description": f"A LIT, exported from `{name}` by lit_backbone {__version__}.",
        "details": details,
        "usage": USAGE,
        "citation": CITATION,
    }
    return generate_readme(card, config.MODEL.NAME)
