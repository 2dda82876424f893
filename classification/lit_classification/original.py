"""Configs of the original implementation, translated: its YAML files and LIT-Ti's JSON file."""

from pathlib import Path
from typing import Any

import yaml

from lit_backbone.original import report

_TABLES = yaml.safe_load(Path(__file__).with_name("original_keys.yaml").read_text())
REPLACED_KEYS: dict[str, str] = _TABLES["replaced"]  # the answer to keys that are errors
NEUTRAL_VALUES: dict[str, list | None] = _TABLES["neutral"]  # values that change nothing here; None = any value
RENAMED_KEYS: dict[str, str] = _TABLES["renamed"]
RENAMED_VALUES: dict[str, dict[str, str]] = _TABLES["values"]  # old and new values of each new key


def translate_original(layer: dict[str, Any], origin: str) -> dict[str, Any]:
    """Replace keys and values of the original in a layer of dotted keys, with one log line for each.

    Keys without a replacement stay, and are reported with the other unknown keys.
    """
    result: dict[str, Any] = {}
    for key, value in layer.items():
        new = _translate_item(key, value)
        result |= new
        if new != {key: value}:
            text = ", ".join(f"{name} {value}" for name, value in new.items())
            report(f"{origin}: {key} {value}: {f'read as {text}' if text else 'needs no key here'}")
    return result


def _translate_item(key: str, value: Any) -> dict[str, Any]:
    neutral = NEUTRAL_VALUES.get(key, ())
    if neutral is None or value in neutral:
        return {}
    if key == "AMP_OPT_LEVEL" and value == "O0":
        return {"RUNTIME.AMP_DTYPE": "off"}
    if key == "MODEL.LIT.EMBED_DIM" and isinstance(value, int):
        value = [value * 2**i for i in range(4)]
    if key == "MODEL.LIT.HAS_MSA" and isinstance(value, list):
        value = [bool(x) for x in value]
    new = RENAMED_KEYS.get(key, key)
    return {new: RENAMED_VALUES.get(new, {}).get(str(value), value)}
