"""Deterministic weights and images behind the reference figures in this folder.

`fill` names every tensor by its key in the *released* (original) checkpoint layout, so a model with
other parameter names must first be filled in that layout and then converted.
"""

import zlib

import numpy as np
import torch


def fill(keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights for a state dict given as {key: shape} (see state_dicts.json).

    Integer buffers (`num_batches_tracked`, `relative_position_index`) are left out: they are not learned.
    """
    state = {}
    for key, shape in keys.items():
        if key.endswith(("num_batches_tracked", "relative_position_index")):
            continue
        noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape)).astype(np.float32)
        if key.endswith("running_var"):
            value = 0.5 + np.abs(noise)
        elif len(shape) == 1:
            value = 1 + 0.1 * noise if key.endswith("weight") else 0.1 * noise
        elif "pos_embed" in key or "cls_token" in key or "relative_position_bias_table" in key:
            value = 0.5 * noise
        else:
            value = noise / np.sqrt(np.prod(shape[1:]))
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state


def image(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A normalised input batch: standard normal noise, NCHW, float32."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def soft_target(batch: int, classes: int, seed: int) -> torch.Tensor:
    """Soft labels (rows sum to 1) for the training-step figures."""
    rows = np.random.RandomState(seed).rand(batch, classes).astype(np.float32)
    return torch.from_numpy(rows / rows.sum(1, keepdims=True))
