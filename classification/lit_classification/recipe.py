"""What a run computes from: settings, classes and files, to be the same in all its processes and after every start.

Of files the names are compared, not sizes or contents: to ask a network's disk for a million sizes takes minutes.
"""

import json
import logging
import os
from collections import defaultdict
from hashlib import sha256
from pathlib import Path

from lit_backbone import CheckpointError
from lit_backbone.checkpoints import printable
from lit_classification.config import Config, ConfigError, differences, settings
from lit_classification.datasets import Images
from lit_classification.distributed import Processes

_logger = logging.getLogger(__name__)

MOST = 10  # changes that are logged one by one


def describe_settings(config: Config) -> dict[str, str]:
    """Each setting that results depend on, in words, by its key."""
    return {key: json.dumps(value) for key, value in settings(config.model_dump(mode="json")).items()}


def describe_recipe(config: Config, images: dict[str, Images]) -> dict[str, str]:
    """Each setting, class and folder of images in words, by its name.

    Args:
        config: of the run.
        images: the data sets by name.
    """
    recipe = describe_settings(config)
    recipe |= {f"class {i}": name for i, name in enumerate(images["train"].classes)}
    for split, dataset in images.items():
        recipe |= {f"{split}/{folder}": files for folder, files in _digests(dataset).items()}
    return recipe


def _folder(name: str) -> str:
    """The first folder in a file's name; empty for what is not in one."""
    return name.partition("/")[0] if "/" in name else ""


def _digests(images: Images) -> dict[str, str]:
    """Number and checksum of the names in each folder at the root of a data set."""
    counts, digests = defaultdict(int), defaultdict(sha256)
    for name in images.names():
        folder = _folder(name)
        counts[folder] += 1
        digests[folder].update(os.fsencode(name) + b"\0")
    return {folder: f"{count} files {digests[folder].hexdigest()[:16]}" for folder, count in counts.items()}


def check_processes(recipe: dict[str, str], images: dict[str, Images], processes: Processes) -> None:
    """Raise ConfigError, which names the first thing that differs, unless all processes have the same recipe."""
    first, *others = processes.gather(recipe)
    found = [(rank, *change) for rank, other in enumerate(others, 1) for change in differences(first, other)[:1]]
    if not found:
        return
    rank, item, ours, theirs = found[0]
    split, _, folder = item.partition("/")
    odd = ""
    if split in images:
        files = processes.gather({name for name in images[split].names() if _folder(name) == folder})
        odd = f" ({min(files[0] ^ files[rank], default='their order')} is not the same)"
    with processes.together():
        problem = f"{item} is {theirs} on process {rank}, {ours} on process 0{odd}"
        raise ConfigError(f"{printable(problem)}; give all processes the same configuration and the same data")


def check_unchanged(path: str | Path, old: dict[str, str], recipe: dict[str, str], allowed: bool) -> None:
    """Compare the recipe in a checkpoint with that of the run which is to continue it.

    Args:
        path: of the checkpoint.
        old: its recipe.
        recipe: of this run.
        allowed: whether to go on with another one.

    Raises:
        CheckpointError: names the first change.
    """
    changes = [
        printable(f"{key} {before or 'absent'}, this run has {now or 'none'}")[:300]
        for key, before, now in differences(old, recipe)
    ]
    if changes and not allowed:
        more = f" (and {len(changes) - 1} more changes)" if changes[1:] else ""
        remedy = "to go on in spite of it, add --opts TRAIN.RESUME_CHANGED true; --tag NAME begins a new run"
        raise CheckpointError(f"{path}: was written with {changes[0]}{more}; {remedy}")
    for change in changes[:MOST]:
        _logger.warning(f"{path} was written with {change}")
    if changes[MOST:]:
        _logger.warning(f"and with {len(changes) - MOST} more changes")
