"""Safe checkpoint reader for mmengine, which falls back to unrestricted unpickling."""

import os
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ..checkpoints import architecture, fit_state_dict, stored_classes, unwrap_state_dict
from ..released import convert_released_hook
from ..safe_reader import URL_PREFIXES, Placeholder, preview, read_checkpoint

HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"  # pickles `getattr`
FROM_WEIGHTS = "start a new run from the weights with --cfg-options load_from=FILE"
MMENGINE_OBJECTS: list[Any] = [(Placeholder, HISTORY), (Placeholder, "builtins.getattr")]


def load_file(path: str, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint from a file or URL without executing code in it, or raise CheckpointError.

    A download is cached in the hub directory of PyTorch (`TORCH_HOME`). Metadata that no run needs is dropped.
    """
    with torch.serialization.safe_globals(MMENGINE_OBJECTS):
        return _select_metadata(read_checkpoint(os.path.expanduser(path), map_location or "cpu"))


CheckpointLoader.register_scheme(("", *URL_PREFIXES), load_file, force=True)


def _select_metadata(content: dict[str, Any]) -> dict[str, Any]:
    """Drop metadata that a run does not need, such as config text, which mmengine would execute.

    Malformed values are dropped, too. Resuming then fails because they are missing.
    """
    result = {key: value for key, value in content.items() if key not in ("meta", "message_hub")}
    if isinstance(meta := content.get("meta"), dict):
        names = ("epoch", "iter", "seed", "num_images", "global_batch", "within_epoch")
        result["meta"] = {key: meta[key] for key in names if type(meta.get(key)) in (int, bool)}
        if classes := stored_classes({"meta": meta}):
            result["meta"]["dataset_meta"] = dict(classes=tuple(classes))
    hub = content.get("message_hub")
    if isinstance(hub, dict) and isinstance(info := hub.get("runtime_info"), dict):
        # CheckpointHook stores these.
        prefixes = {float: "best_score", int: "best_score", str: "best_ckpt", list: "keep_ckpt_ids"}
        info = {key: x for key, x in info.items() if str(key).startswith(prefixes.get(type(x), "-"))}
        result["message_hub"] = dict(log_scalars={}, runtime_info=info, resumed_keys=dict.fromkeys(info, True))
    return result


def check_finite(model: nn.Module, path: str, iteration: int) -> None:
    """Raise FloatingPointError if a weight or buffer is not finite. `path` is for the message."""
    state = {key.removeprefix("module."): x for key, x in model.state_dict().items() if isinstance(x, Tensor)}
    if bad := [key for key, x in state.items() if not x.isfinite().all()]:
        problem = f"no checkpoint is written: after iteration {iteration}, {len(bad)} weights are not finite"
        advice = f"Continue from the last checkpoint with --resume. To lower the learning rate, {FROM_WEIGHTS}."
        raise FloatingPointError(f"{path}: {problem} ({preview(bad)}). {advice}")


def fit_weights(
    checkpoint: dict[str, Any], model: nn.Module, path: str, allow_new_head: bool = False, reset_keys: Any = ()
) -> dict[str, Tensor]:
    """Convert a checkpoint to a state dict that loads strictly into a detector or segmentor, or raise CheckpointError.

    The backbone may be in the released layout and have position tables of another size. With `allow_new_head`,
    mismatched weights outside the backbone and those in `reset_keys` keep the initialization of `model`.
    """
    state_dict, backbone = unwrap_state_dict(checkpoint), model.get_submodule("backbone")
    convert_released_hook(backbone, state_dict, "backbone.")
    if allow_new_head:
        shapes, expected = ({key: x.shape for key, x in d.items()} for d in (state_dict, model.state_dict()))
        differing = {key for key in shapes | expected if shapes.get(key) != expected.get(key)} | {*reset_keys}
        mismatched = sorted(key for key in differing if not key.startswith("backbone."))
        if mismatched:
            print_log(f"{path}: {preview(mismatched)} do not match. They keep their initialization.", level=30)
        state_dict = {key: x for key, x in state_dict.items() if key not in mismatched}
        state_dict |= {key: x for key, x in model.state_dict().items() if key in mismatched}
    name = f"{type(model).__name__} with {architecture(backbone)}"
    return fit_state_dict(state_dict, model, path, name=name)
