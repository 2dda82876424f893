"""Configs of the original implementation, translated: its YAML files and LIT-Ti's JSON file."""

import inspect
from pathlib import Path
from typing import Any

import yaml

from lit_backbone.lit import ARCHS, LIT
from lit_backbone.original import report

_TABLES = yaml.safe_load(Path(__file__).with_name("original_keys.yaml").read_text())
REPLACED_KEYS: dict[str, str] = _TABLES["replaced"]  # the answer to keys that are errors
NEUTRAL_VALUES: dict[str, list | None] = _TABLES["neutral"]  # values that change nothing here; None = any value
RENAMED_KEYS: dict[str, str] = _TABLES["renamed"]
LIT_TI_JSON: dict[str, str] = _TABLES["lit_ti_json"]
RENAMED_VALUES: dict[str, dict[str, str]] = _TABLES["values"]  # old and new values of each new key


def is_lit_ti_json(tree: dict[str, Any]) -> bool:
    """Tell if a file has the flat keys of the original's lit-ti.json."""
    return isinstance(tree.get("model"), str)


def translate_original(layer: dict[str, Any], origin: str) -> dict[str, Any]:
    """Replace keys and values of the original in a layer of dotted keys, with one log line for each.

    Keys without a replacement stay, and are reported with the other unknown keys. Keywords of LIT that the variant has
    anyway are left out, so that another variant can inherit from the file.
    """
    result: dict[str, Any] = {}
    renamed = RENAMED_KEYS | (LIT_TI_JSON if is_lit_ti_json(layer) else {})
    variant = RENAMED_VALUES["MODEL.NAME"].get(str(layer.get("MODEL.NAME")), layer.get("MODEL.NAME"))
    for key, value in layer.items():
        new = _translate_item(key, value, renamed)
        new = {name: x for name, x in new.items() if name in layer or not _is_default(name, x, variant)}
        result |= new
        if new != {key: value}:
            text = ", ".join(f"{name} {value}" for name, value in new.items())
            report(f"{origin}: {key} {value}: {f'read as {text}' if text else 'needs no key here'}")
    return result


def _translate_item(key: str, value: Any, renamed: dict[str, str]) -> dict[str, Any]:
    neutral = NEUTRAL_VALUES.get(key, ())
    if neutral is None or value in neutral:
        return {}
    if key == "AMP_OPT_LEVEL" and value == "O0":
        return {"RUNTIME.AMP_DTYPE": "off"}
    if key == "MODEL.LIT.EMBED_DIM" and isinstance(value, int):
        value = [value * 2**i for i in range(4)]
    if key == "MODEL.LIT.HAS_MSA" and isinstance(value, list):
        value = [bool(x) for x in value]
    new = renamed.get(key, key)
    return {new: RENAMED_VALUES.get(new, {}).get(str(value), value)}


def _is_default(key: str, value: Any, variant: Any) -> bool:
    """Tell if a variant has this value of a key of MODEL.LIT anyway."""
    section, _, keyword = key.rpartition(".")
    if section != "MODEL.LIT" or variant not in ARCHS:
        return False
    default = ARCHS[variant].get(keyword, inspect.signature(LIT).parameters[keyword].default)
    return value == (list(default) if isinstance(default, tuple) else default)
