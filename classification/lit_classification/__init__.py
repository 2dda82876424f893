"""Training and evaluation of LIT on images: what lies behind `main.py`, `predict.py` and the visualisers."""

from importlib.util import find_spec

for _name in ("pydantic", "ruamel.yaml", "tensorboard"):  # the extra "train", without which programs say what to do
    if find_spec(_name) is None:
        raise ModuleNotFoundError(f"No module named {_name!r}", name=_name)
