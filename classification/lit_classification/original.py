"""Configs of the original implementation, translated: its YAML files, its dumped config.json and LIT-Ti's JSON file."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lit_backbone.lit import ARCHS, LIT
from lit_backbone.original import OPTIONS, report
from lit_classification.config import ConfigError, Train, key_fields

_TABLES = yaml.safe_load(Path(__file__).with_name("original_keys.yaml").read_text())
REPLACED_KEYS: dict[str, str] = _TABLES["replaced"]  # the answer to keys that are errors
NEUTRAL_VALUES: dict[str, list | None] = _TABLES["neutral"]  # values that change nothing here; None = any value
VARIANTS: dict[str, str] = _TABLES["variants"]
LIT_KEYWORDS: dict[str, str] = _TABLES["lit_keywords"]
LIT_TI_CONFIG = Path(__file__).parents[1] / "configs" / "lit-ti.yaml"
RATES = ("TRAIN.BASE_LR", "TRAIN.WARMUP_LR", "TRAIN.MIN_LR")


def is_lit_ti_json(tree: dict[str, Any]) -> bool:
    """Tell if a file has the flat keys of the original's lit-ti.json, which adds to the recipe of LIT-Ti."""
    return isinstance(tree.get("model"), str)


def translate_original(layer: dict[str, Any], origin: str) -> dict[str, Any]:
    """Replace keys and values of the original in a layer of dotted keys, with one log line for each.

    Keys without a replacement stay, and are reported with the other unknown keys. Raise ConfigError for a dump of
    which the global batch is unknown.
    """
    result: dict[str, Any] = {}
    is_dump = "LOCAL_RANK" in layer and all(isinstance(layer.get(key), float) for key in RATES)
    variant = VARIANTS.get(str(layer.get("MODEL.NAME")), layer.get("MODEL.NAME"))
    for key, value in layer.items():
        new = dict(_translate_item(key, value, variant, is_flat=is_lit_ti_json(layer)))
        if is_dump and key in ("OUTPUT", "TRAIN.ACCUMULATION_STEPS", *RATES):
            new = {}  # OUTPUT names a run directory, the others follow from the global batch
        result |= new
        if new != {key: value}:
            text = ", ".join(f"{name} {value}" for name, value in new.items())
            report(f"{origin}: {key} {value}: {f'read as {text}' if text else 'needs no key here'}")
    if is_dump:
        result["TRAIN.GLOBAL_BATCH"] = _global_batch(layer, origin)
        report(f"{origin}: learning rates: read as TRAIN.GLOBAL_BATCH {result['TRAIN.GLOBAL_BATCH']}")
    return result


def _translate_item(key: str, value: Any, variant: Any, is_flat: bool) -> Iterator[tuple[str, Any]]:
    section, _, name = key.rpartition(".")
    neutral = NEUTRAL_VALUES.get(key, ())
    if neutral is None or value in neutral:
        return
    if key == "MODEL.NAME":
        yield key, variant
    elif key == "AMP_OPT_LEVEL" and value == "O0":
        yield "RUNTIME.AMP_DTYPE", "off"
    elif key == "AUG.AUTO_AUGMENT" and value == "none":
        yield key, ""
    elif section == "MODEL.LIT" and name in LIT_KEYWORDS:
        keyword = LIT_KEYWORDS[name]
        if name == "EMBED_DIM" and isinstance(value, int):
            value = [value * 2**i for i in range(4)]
        elif name == "HAS_MSA" and isinstance(value, list):
            value = [bool(x) for x in value]
        default = inspect.signature(LIT).parameters[keyword].default
        default = ARCHS.get(str(variant), {}).get(keyword, default) if variant else None
        if value != (list(default) if isinstance(default, tuple) else default):
            yield f"MODEL.LIT.{keyword}", value
    elif is_flat and (new_key := _key_of_option(key)):
        yield new_key, value
    else:
        yield key, value


def _key_of_option(name: str) -> str | None:
    """Return the key that an option of LIT-Ti's trainer sets, such as `drop_path` or `num_workers`."""
    for option, replacement in OPTIONS["main"].items():
        if option.split()[0][2:].replace("-", "_") == name and replacement.startswith("--opts"):
            return replacement.split()[1]
    names = {key.rpartition(".")[2]: key for key in key_fields()}
    return {"exp_name": "TAG", "output_dir": "OUTPUT"}.get(name, names.get(name.upper()))


def _global_batch(layer: dict[str, Any], origin: str) -> int:
    """Infer the global batch of a dump. Its learning rates are the defaults times global batch / 512."""
    scales = {round(layer[key] / Train().model_dump()[key.rpartition(".")[2]], 6) for key in RATES}
    if len(scales) > 1 or not 0 < min(scales) < 1000:
        problem = "is scaled by the global batch of that run, which the file does not state"
        raise ConfigError(f"{origin}: TRAIN.BASE_LR: {problem}; start from the YAML file of the run instead")
    return round(512 * scales.pop())
