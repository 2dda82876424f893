"""Write docs/config.md, the table of every key of the classification configs, from their schema.

python -m tools.config_docs
"""

from pathlib import Path

import yaml

from lit_classification.config import Config, Section, flatten, key_fields

PAGE = Path(__file__).parents[1] / "docs" / "config.md"

INTRODUCTION = """# Configuration

Every key of the YAML files in [classification/configs](../classification/configs), with its default and meaning.
The defaults are the recipe of LIT-S. [Changing the method](changing.md) shows what to set for common experiments.

A file inherits from those in `BASE`. `--opts KEY VALUE` overrides single keys. Keys marked with * may change when a run
resumes. All others must match the checkpoint. `python -m tools.config_docs`, in the root, writes this page.
"""


def render() -> str:
    """Return the page as Markdown."""
    sections: dict[str, list[str]] = {"General": []}
    titles: dict[str, str] = {}
    values = flatten(Config().model_dump(mode="json"))
    for key, field in key_fields().items():
        if isinstance(field.default, Section):
            sections[key], titles[key] = [], field.description or ""
            continue
        value = yaml.dump(values.get(key, {}), default_flow_style=True, width=1000).removesuffix("...\n").strip()
        mark = "*" if field.json_schema_extra else ""
        section = key.rpartition(".")[0] or "General"
        sections[section].append(f"| `{key.rpartition('.')[2]}`{mark} | `{value}` | {field.description} |")
    parts = [INTRODUCTION]
    for name, rows in sections.items():
        title = f": {titles[name]}" if name in titles else ""
        table = ["| key | default | meaning |", "|---|---|---|", *rows]
        parts.append("\n".join([f"## {name}{title}", "", *table, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
