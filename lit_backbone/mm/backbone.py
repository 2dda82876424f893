"""LIT as a backbone for dense prediction, registered once for mmdetection and mmsegmentation."""

import re
from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from ..checkpoints import CheckpointError, unwrap_state_dict
from ..fit import fit_state_dict
from ..images import DataError
from ..lit import ARCHS, LIT
from ..released import convert_released
from .loading import load_file

# What a backbone does not take from a classifier's checkpoint; the last norm does not become an output norm.
CLASSIFIER_ONLY = re.compile(r"(norm|head)\.|stages\.\d+\.cls_(token|pos_embed)$")


@MODELS.register_module()
class LITBackbone(LIT):
    """LIT that returns the outputs of its stages, without class token, final norm and head.

    Input `(B, 3, H, W)` of at least 32 x 32 pixels; output a tuple of maps `(B, C, H / stride, W / stride)`, NCHW, with
    strides 4, 8, 16 and 32 for the stages 0 to 3.

    Args:
        arch: `lit_ti`, `lit_s`, `lit_m` or `lit_b`, or a dictionary of :class:`LIT`'s keywords for another size.
        img_size: input size in pixels that the position tables are stored for, one number or (height, width); at any
            other size they are interpolated on the fly.
        out_indices: stages to return, in rising order. Stages after the last of them are not built.
        out_norms: those of them that get a LayerNorm (`norm0` to `norm3`) on their output.
        drop_path_rate: stochastic depth of the last block.
        frozen_stages: number of first stages that do not train: no gradients, BatchNorm in evaluation mode.
        with_cp: recompute the blocks' activations in the backward pass instead of keeping them.
        init_cfg: `dict(type="Pretrained", checkpoint=...)`, a file or an http(s) address: a classifier in the released
            or this package's layout. With `prefix="backbone."`, the backbone of a detector or segmentor.

    Raises:
        ValueError: an argument is not one of these.
    """

    init_cfg: dict[str, Any] | None = None  # LIT's constructor calls `init_weights` before it is set

    def __init__(
        self,
        arch: str | dict[str, Any] = "lit_s",
        img_size: int | tuple[int, int] = 224,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        out_norms: Sequence[int] = (),
        drop_path_rate: float = 0.0,
        frozen_stages: int = 0,
        with_cp: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ):
        if isinstance(arch, str) and arch not in ARCHS:
            raise ValueError(f"arch={arch!r}: use one of {', '.join(ARCHS)}, or a dictionary of LIT's keywords")
        if list(out_indices) != sorted(set(out_indices) & set(range(4))) or not out_indices:
            raise ValueError(f"out_indices={out_indices}: use some of 0, 1, 2, 3, in rising order")
        if not set(out_norms) <= set(out_indices):
            raise ValueError(f"out_norms={out_norms}: use some of out_indices={out_indices}")
        keywords = dict(ARCHS[arch] if isinstance(arch, str) else arch)
        if keywords.pop("class_token", False):
            keywords["global_pool"] = "avg"
        super().__init__(img_size=img_size, num_classes=0, drop_path_rate=drop_path_rate, **keywords)
        self.pretrained_cfg = {"architecture": arch if isinstance(arch, str) else f"LIT({arch})"}  # for messages
        self.out_indices = self.prune_intermediate_layers(list(out_indices), prune_norm=True)
        for i in out_norms:
            self.add_module(f"norm{i}", nn.LayerNorm(self.feature_info[i]["num_chs"]))  # its eps is 1e-5 everywhere
        self.frozen_stages = frozen_stages
        self.stages[: max(frozen_stages, 0)].requires_grad_(False)
        self.set_grad_checkpointing(with_cp)
        self.init_cfg = init_cfg

    def init_weights(self) -> None:
        """Draw new weights, or load those of the checkpoint that `init_cfg` names.

        Raises:
            CheckpointError: the checkpoint cannot be read safely, or is not one of this backbone.
        """
        super().init_weights()
        if self.init_cfg is None:
            return
        settings = dict(self.init_cfg)
        kind, path, prefix = settings.pop("type", None), settings.pop("checkpoint", None), settings.pop("prefix", "")
        if kind != "Pretrained" or path is None or settings:
            raise ValueError(f'init_cfg={self.init_cfg}: use dict(type="Pretrained", checkpoint=FILE)')
        weights = unwrap_state_dict(load_file(str(path)))
        weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if not weights:
            missing = f"no key that begins with {prefix!r}, the prefix in init_cfg" if prefix else "no weights"
            raise CheckpointError(f"{path}: holds {missing}")
        state_dict = {key: value for key, value in self.state_dict().items() if key.startswith("norm")}  # output norms
        built = tuple(f"stages.{i}." for i in range(len(self.stages)))
        for key, value in convert_released(weights).items():
            if not CLASSIFIER_ONLY.match(key) and (key.startswith(built) or not key.startswith("stages.")):
                state_dict[key] = value
        self.load_state_dict(fit_state_dict(state_dict, self, path))

    def train(self, mode: bool = True) -> "LITBackbone":
        super().train(mode)
        self.stages[: max(self.frozen_stages, 0)].eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Raises DataError for an input so small that its last map has no token."""
        height, width = x.shape[2:]
        if min(height, width) < (least := self.feature_info[len(self.stages) - 1]["reduction"]):
            raise DataError(f"{height} x {width} pixels: LIT needs {least} x {least} or more; enlarge the images")
        maps = self.forward_intermediates(x, self.out_indices, output_fmt="NHWC", intermediates_only=True)
        outputs = []
        for i, y in zip(self.out_indices, maps, strict=True):
            norm = getattr(self, f"norm{i}", None)
            y = y if norm is None else norm(y)
            outputs.append(y.permute(0, 3, 1, 2).contiguous())  # (B, H, W, C) -> (B, C, H, W), as mmcv's operators want
        return tuple(outputs)
