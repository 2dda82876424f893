"""LIT backbone for dense prediction, registered for mmdetection and mmsegmentation."""

import re
from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from ..checkpoints import fit_state_dict, unwrap_state_dict
from ..images import DataError
from ..lit import ARCHS, LIT
from ..released import convert_released
from .checkpoints import load_file

# Weights of a classifier that the backbone does not use. The final norm is not reused as an output norm.
CLASSIFIER_ONLY = re.compile(r"(norm|head)\.|stages\.\d+\.cls_(token|pos_embed)$")


@MODELS.register_module()
class LITBackbone(LIT):
    """LIT backbone that returns the feature maps of its stages, without class token, final norm and head.

    It maps images `(B, 3, H, W)` to a tuple of feature maps `(B, C, H / stride, W / stride)`. The strides are 4, 8, 16
    and 32.

    Args:
        arch: `lit_ti`, `lit_s`, `lit_m` or `lit_b`, or a dictionary of :class:`LIT` keywords.
        img_size: input size in pixels of the stored position tables, one number or (height, width). The tables are
            interpolated for other input sizes.
        out_indices: stages to return, in ascending order. Later stages are not built.
        out_norms: stages whose output passes a LayerNorm (`norm0` to `norm3`), a subset of `out_indices`.
        drop_path_rate: stochastic depth rate of the last block.
        frozen_stages: number of leading stages to freeze: no gradients, BatchNorm in evaluation mode.
        with_cp: use activation checkpointing in the blocks.
        init_cfg: `dict(type="Pretrained", checkpoint=...)` with a file or URL. The checkpoint is a classifier in the
            released layout or in the layout of this package. Add `prefix="backbone."` for a detector or segmentor.
    """

    init_cfg: dict[str, Any] | None = None  # LIT's constructor calls `init_weights` before the attribute is set

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
            raise ValueError(f"arch={arch!r}: unknown. Use {', '.join(ARCHS)}, or a dictionary of LIT keywords.")
        if list(out_indices) != sorted(set(out_indices) & set(range(4))) or not out_indices:
            raise ValueError(f"out_indices={out_indices}: invalid. Use stages out of 0, 1, 2, 3 in ascending order.")
        if not set(out_norms) <= set(out_indices):
            raise ValueError(f"out_norms={out_norms}: invalid. Use stages out of out_indices={out_indices}.")
        keywords = dict(ARCHS[arch] if isinstance(arch, str) else arch)
        if keywords.pop("class_token", False):
            keywords["global_pool"] = "avg"
        super().__init__(img_size=img_size, num_classes=0, drop_path_rate=drop_path_rate, **keywords)
        self.pretrained_cfg = {"architecture": arch if isinstance(arch, str) else f"LIT({arch})"}  # for messages
        self.out_indices = self.prune_intermediate_layers(list(out_indices), prune_norm=True)
        for i in out_norms:
            self.add_module(f"norm{i}", nn.LayerNorm(self.feature_info[i]["num_chs"]))
        self.frozen_stages = frozen_stages
        self.stages[: max(frozen_stages, 0)].requires_grad_(False)
        self.set_grad_checkpointing(with_cp)
        self.init_cfg = init_cfg

    def init_weights(self) -> None:
        """Initialize the weights. Raise CheckpointError if the checkpoint in `init_cfg` does not match."""
        super().init_weights()
        if self.init_cfg is None:
            return
        cfg = dict(self.init_cfg)
        kind, path, prefix = cfg.pop("type", None), cfg.pop("checkpoint", None), cfg.pop("prefix", "")
        if kind != "Pretrained" or path is None or cfg:
            raise ValueError(f'init_cfg={self.init_cfg}: invalid. Use dict(type="Pretrained", checkpoint=FILE).')
        weights = unwrap_state_dict(load_file(str(path)))  # without a prefix that all keys share
        weights = {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)} or weights
        state_dict = {key: value for key, value in self.state_dict().items() if key.startswith("norm")}  # output norms
        built = tuple(f"stages.{i}." for i in range(len(self.stages)))
        for key, value in convert_released(weights).items():
            if not CLASSIFIER_ONLY.match(key) and (key.startswith(built) or not key.startswith("stages.")):
                state_dict[key] = value
        self.load_state_dict(fit_state_dict(state_dict, self, path))

    def train(self, mode: bool = True) -> "LITBackbone":
        """Set the training mode. Frozen stages stay in evaluation mode."""
        super().train(mode)
        self.stages[: max(self.frozen_stages, 0)].eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # pyrefly: ignore[bad-override]
        """Compute the feature maps. Raise DataError if the input is smaller than the largest stride."""
        height, width = x.shape[2:]
        minimum = self.feature_info[len(self.stages) - 1]["reduction"]
        if min(height, width) < minimum:
            raise DataError(f"input of {height} x {width} pixels is smaller than {minimum} x {minimum}. Enlarge it.")
        features = self.forward_intermediates(x, self.out_indices, output_fmt="NHWC", intermediates_only=True)
        outputs = (getattr(self, f"norm{i}", nn.Identity())(y) for i, y in zip(self.out_indices, features, strict=True))
        return tuple(y.permute(0, 3, 1, 2).contiguous() for y in outputs)  # (B, H, W, C) -> (B, C, H, W)
