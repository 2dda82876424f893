"""Draws what tools/benchmark.py measured: `python tools/plot_benchmark.py FILE.json ...` writes FILE.png."""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(rows: list[dict[str, Any]]) -> Figure:
    """A panel of bars for each comparison of operators and models, and one of curves against image size."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["section"] == "growth" and row["what"].startswith("1 x"):
            panels.setdefault("inference of one image", []).append(row)
        elif row["what"].startswith(("forward + backward", "inference", "training step at")):
            panels.setdefault(row["what"], []).append(row)
    columns = max(1, min(3, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(5 * columns, 3 * lines), layout="constrained")
    for i, (title, panel) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, i)
        axes.set_title(title, fontsize="medium", loc="right")
        curves(axes, panel) if panel[0]["section"] == "growth" else bars(axes, panel)
    return figure


def bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    speed = rows[0]["images_per_s"] is not None
    names = [row["name"] for row in rows]
    ours = [name.startswith(("ours", "lit")) and "torchvision" not in name for name in names]
    values = [row["images_per_s"] if speed else row["ms"] for row in rows]
    drawn = axes.barh(names, values, color=["C0" if own else "0.7" for own in ours])
    axes.bar_label(drawn, fmt=lambda value: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", padding=2)
    axes.margins(x=0.35)
    axes.invert_yaxis()
    axes.set_xlabel("images/s, more is better" if speed else "ms, less is better")


def curves(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["name"] for row in rows):
        own = {int(row["what"].split()[-1]): row["ms"] for row in rows if row["name"] == name}
        axes.loglog(own.keys(), own.values(), "o-", label=name)
        axes.set_xticks([*own], labels=[*own], fontsize="small")
    axes.minorticks_off()
    axes.set(xlabel="side in pixels", ylabel="ms")
    axes.legend()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        draw(json.loads(path.read_text())["rows"]).savefig(path.with_suffix(".png"), dpi=100)
