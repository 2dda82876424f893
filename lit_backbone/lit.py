"""LIT, the less attention vision transformer.

`Less is More: Pay Less Attention in Vision Transformers` (Pan et al., AAAI 2022), https://arxiv.org/abs/2105.14217

The model has four stages. Each stage is a merging (patch embedding in the first stage, deformable token merging in the
others) and several blocks: pure MLP blocks in the early stages, blocks with global self-attention in the late stages.
Tokens have the shape `(B, H, W, C)`, or `(B, 1 + H*W, C)` with a class token.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import calculate_drop_path_rates, get_device_dtype, to_2tuple, to_ntuple, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from .checkpoints import checkpoint_filter_fn
from .dtm import DeformableTokenMerging
from .layers import TABLE_MODES, AttentionBlock, ConvBNMerging, ConvMerging, MlpBlock, require_size, resize_table
from .released import convert_released_hook

torch.fx.wrap("require_size")
torch.fx.wrap("resize_table")
PATCH_SIZE = 4  # for the first stage; each other stage halves height and width
MERGINGS: dict[str, Callable[..., nn.Module]] = {
    "dtm": DeformableTokenMerging,
    "conv": partial(ConvMerging, patch_size=2),
    "conv_bn": ConvBNMerging,
    "swin": PatchMerging,
}


def register_merging(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register a module for `merging=name`, as a decorator.

    The module is created with `(in_chs, out_chs, device=, dtype=)` and maps `(B, H, W, in_chs)` to
    `(B, H/2, W/2, out_chs)`, like :class:`ConvMerging`.
    """

    def register(module: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        MERGINGS[name] = module
        return module

    return register


class Stage(nn.Module):
    """One stage of LIT: merging, optional absolute position embedding and class token, then blocks."""

    def __init__(
        self,
        merge: nn.Module,
        blocks: Sequence[nn.Module],
        dim: int,
        *,
        pos_embed_size: tuple[int, int] | None,
        class_token: bool,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.merge = merge
        self.pos_embed = self.cls_token = self.cls_pos_embed = None
        if pos_embed_size is not None:
            self.pos_embed = nn.Parameter(torch.empty(1, dim, *pos_embed_size, **dd))
        if class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        if class_token and pos_embed_size is not None:
            self.cls_pos_embed = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.blocks = nn.Sequential(*blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize position embedding and class token."""
        for table in (self.pos_embed, self.cls_token, self.cls_pos_embed):
            if table is not None:
                trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `(B, H, W, C)` to `(B, H', W', C')`, or with a class token to `(B, 1 + H'*W', C')`."""
        x = self.merge(x)  # (B, H, W, C) -> (B, H', W', C')
        if self.pos_embed is not None:
            pos_embed = resize_table(self.pos_embed, x.shape[1], x.shape[2], mode="bilinear")
            x = x + pos_embed.permute(0, 2, 3, 1)  # (1, C', H', W') -> (1, H', W', C')
        if self.cls_token is not None:
            cls_token = self.cls_token if self.cls_pos_embed is None else self.cls_token + self.cls_pos_embed
            x = torch.cat((cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)), dim=1)  # -> (B, 1 + H'*W', C')
        # Merging is not recomputed, because DTM's BatchNorm would update its statistics twice.
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint_seq(self.blocks, x)  # pyrefly: ignore[bad-return]
        return self.blocks(x)


class LIT(nn.Module):
    """The less attention vision transformer.

    Position tables are stored for `img_size` and interpolated for other input sizes. The input must have at least
    32 x 32 pixels. If 4 does not divide its height or width, the input is zero-padded (`pad_input`) or cropped.

    Args:
        img_size: input size in pixels, one number or (height, width).
        in_chans: number of input channels.
        num_classes: number of classes; 0 for no head.
        global_pool: `avg` (mean of the normalized tokens), `token` (class token) or an empty string (no pooling).
        embed_dims, depths: number of channels and of blocks in each stage.
        num_heads, mlp_ratios: one value per stage, or one for all stages; heads apply to attention stages only.
        attention: True for each stage with attention; the other stages have pure MLP blocks.
        sr_ratios: reduction of the feature map that attention reads, as in PVT; one value per stage, or one for all
            stages. 1 for none.
        merging: merging of stages 2-4: `dtm`, or for ablations `conv` (2x2 stride-2 convolution and LayerNorm),
            `conv_bn` (DTM without offsets) or `swin` (patch merging of Swin).
        pos_embed: `relative` bias in attention stages, `absolute` embedding in every stage, or `none`.
        class_token: add a class token in the last stage.
        norm_eps: epsilon of the final LayerNorm and of those in blocks.
        pad_input: zero-pad the input to a multiple of 4 instead of cropping it.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth rate of the last block; the rate grows linearly from 0 over all blocks.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["avg", "token", ""] = "avg",
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: int | Sequence[int] = (3, 6, 12, 24),
        mlp_ratios: float | Sequence[float] = 4.0,
        attention: Sequence[bool] = (False, False, True, True),
        sr_ratios: int | Sequence[int] = 1,
        merging: str = "dtm",
        pos_embed: Literal["relative", "absolute", "none"] = "relative",
        class_token: bool = False,
        norm_eps: float = 1e-5,
        pad_input: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if pos_embed not in ("relative", "absolute", "none"):
            raise ValueError(f"pos_embed={pos_embed!r}: unknown. Use 'relative', 'absolute' or 'none'.")
        if merging not in MERGINGS:
            raise ValueError(f"merging={merging!r}: unknown. Use one of {', '.join(MERGINGS)}.")
        if class_token and pos_embed == "relative":
            raise ValueError("class_token=True: has no relative position. Use pos_embed='absolute' or 'none'.")
        if class_token and not attention[-1]:
            raise ValueError("class_token=True: needs attention in the last stage. Set attention[-1]=True.")
        dd = {"device": device, "dtype": dtype}
        num_stages = len(depths)
        num_heads, mlp_ratios, sr_ratios = (to_ntuple(num_stages)(x) for x in (num_heads, mlp_ratios, sr_ratios))
        if {len(embed_dims), len(num_heads), len(mlp_ratios), len(attention), len(sr_ratios)} != {num_stages}:
            raise ValueError(
                "depths, embed_dims, num_heads, mlp_ratios, attention, sr_ratios: numbers of stages differ"
            )
        if max(sr_ratios) > 1 and (pos_embed == "relative" or (class_token and sr_ratios[-1] > 1)):
            raise ValueError("sr_ratios: has no relative position and no class token. Use 1 and pos_embed='absolute'.")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.output_fmt = "NLC" if class_token else "NHWC"  # format of forward_features
        self.num_prefix_tokens = int(class_token)
        self._set_global_pool(global_pool)
        self.pad_input = pad_input
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        drop_paths = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        map_sizes = self.map_sizes(img_size, num_stages)

        stages = []
        for i, dim in enumerate(embed_dims):
            if i == 0:
                merge = ConvMerging(in_chans, dim, PATCH_SIZE, pad=pad_input, **dd)
            else:
                merge = MERGINGS[merging](embed_dims[i - 1], dim, **dd)
            block: Callable[..., MlpBlock] = MlpBlock
            if attention[i]:
                map_size = map_sizes[i] if pos_embed == "relative" else None
                block = partial(AttentionBlock, num_heads=num_heads[i], map_size=map_size, sr_ratio=sr_ratios[i])
            keywords = dict(mlp_ratio=mlp_ratios[i], norm_layer=norm_layer, **dd)
            blocks = [block(dim, drop_path=rate, **keywords) for rate in drop_paths[i]]
            pos_embed_size = map_sizes[i] if pos_embed == "absolute" else None
            has_token = class_token and i == num_stages - 1
            stages.append(Stage(merge, blocks, dim, pos_embed_size=pos_embed_size, class_token=has_token, **dd))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            dict(num_chs=dim, reduction=PATCH_SIZE * 2**i, module=f"stages.{i}") for i, dim in enumerate(embed_dims)
        ]
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.norm: nn.Module = norm_layer(self.num_features, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.register_load_state_dict_pre_hook(convert_released_hook)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialize all parameters and buffers as in the reference, for example after `to_empty()`."""
        self.apply(_reset_parameters)

    def map_sizes(self, img_size: int | tuple[int, int], num_stages: int) -> list[tuple[int, int]]:
        """Return (height, width) in tokens of each stage's feature map for an input of `img_size` pixels."""
        size = to_2tuple(img_size)
        smallest = PATCH_SIZE * 2 ** (num_stages - 1)
        if min(size) < smallest:
            raise ValueError(f"img_size={img_size}: too small. Use at least {smallest} x {smallest} pixels.")
        height, width = (-(-s // PATCH_SIZE) if self.pad_input else s // PATCH_SIZE for s in size)
        return [(height // 2**i, width // 2**i) for i in range(num_stages)]

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the stored position tables for another input size in pixels."""
        for stage, (height, width) in zip(self.stages, self.map_sizes(img_size, len(self.stages)), strict=True):
            sizes = {"pos_embed": (height, width), "rel_pos_bias": (2 * height - 1, 2 * width - 1)}
            for module in stage.modules():
                for name, mode in TABLE_MODES.items():
                    if (table := getattr(module, name, None)) is not None:
                        resized = resize_table(table.detach(), *sizes[name], mode=mode)
                        setattr(module, name, nn.Parameter(resized, requires_grad=table.requires_grad))

    def no_weight_decay(self) -> set[str]:
        """Return parameters with two or more dimensions without weight decay; absolute embeddings are decayed."""
        return {name for name, _ in self.named_parameters() if name.endswith((".cls_token", ".rel_pos_bias"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's regular expressions for layer-wise learning rates: by stage if `coarse`, else by block."""
        block = r"^stages\.(\d+)\.blocks\.(\d+)"
        entry = r"^stages\.(\d+)\.(?:merge|pos_embed|cls_token|cls_pos_embed)"  # grouped with the first block
        blocks = r"^stages\.(\d+)" if coarse else [(block, None), (entry, (0,)), (r"^norm", (99999,))]
        return dict(stem=r"^stages\.0\.(?:merge|pos_embed)", blocks=blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable activation checkpointing of the blocks."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def _set_global_pool(self, global_pool: str) -> None:
        if global_pool not in ("avg", "token", "") or (global_pool == "token" and not self.num_prefix_tokens):
            raise ValueError(f"global_pool={global_pool!r}: unknown. Use 'avg', '', or with a class token 'token'.")
        self.global_pool = global_pool

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; `global_pool=None` keeps the pooling."""
        if global_pool is not None:
            self._set_global_pool(global_pool)
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self)) if num_classes > 0 else nn.Identity()
        self.head = head.apply(_reset_parameters).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return (final tokens, feature maps of the stages without class token) of images `(B, in_chans, H, W)`.

        The arguments are those of other timm models. `indices` are the stages to return: the last n if an int, all if
        None. `norm` applies the final LayerNorm to the feature map of the last stage.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: unknown. Use 'NCHW' or 'NHWC'.")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        map_sizes, intermediates = self.map_sizes((x.shape[2], x.shape[3]), len(self.stages)), []
        x = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        for i, stage in enumerate(list(self.stages)[: max_index + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take_indices:
                y = self.norm(x) if norm and i == last else x
                y = y if y.ndim == 4 else y[:, 1:].unflatten(1, map_sizes[i])  # (B, 1 + H*W, C) -> (B, H, W, C)
                intermediates.append(y.permute(0, 3, 1, 2) if output_fmt == "NCHW" else y)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if i == last else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices` with final norm and head; returns the indices as a list."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if max_index < len(self.stages) - 1:
            prune_norm = prune_head = True
            del self.stages[max_index + 1 :]
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
            self.num_prefix_tokens, self.output_fmt = 0, "NHWC"
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute normalized tokens `(B, H/32, W/32, C)` of images, or `(B, 1 + N, C)` with a class token."""
        # padding adds up to three pixels
        x = require_size(x, PATCH_SIZE * 2 ** (len(self.stages) - 1) - self.pad_input * (PATCH_SIZE - 1))
        x = self.stages(x.permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, C), a view
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens and compute logits `(B, num_classes)`; `pre_logits` returns the pooled features `(B, C)`."""
        if self.global_pool == "token":
            x = x[:, 0]  # (B, 1 + N, C) -> (B, C)
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(dim=1) if self.num_prefix_tokens else x.mean(dim=(1, 2))  # -> (B, C)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits `(B, num_classes)` of images `(B, in_chans, H, W)`."""
        return self.forward_head(self.forward_features(x))


def _reset_parameters(module: nn.Module) -> None:
    """Initialize a module as in the reference; `Module.apply` visits children first, so DTM zeroes its offsets last."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):  # convolutions, norms, tables and offsets
        reset()


def _create_lit(variant: str, pretrained: bool, **kwargs) -> LIT:
    return build_model_with_cfg(
        LIT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **(ARCHS[variant] | kwargs),
    )


def _cfg(release: str = "") -> dict[str, Any]:
    """Return timm's configuration of a variant; `release` is the path of the authors' weights on GitHub."""
    return {
        "url": f"https://github.com/ziplab/LIT/releases/download/{release}" if release else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stages.0.merge.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2105.14217",
        "paper_name": "Less is More: Pay Less Attention in Vision Transformers",
        "origin_url": "https://github.com/ziplab/LIT",
    }


default_cfgs = generate_default_cfgs(
    {
        "lit_ti.in1k": _cfg("v1.0/lit_ti.pth"),
        "lit_s.in1k": _cfg("v1.0/lit_s.pth"),
        "lit_m.in1k": _cfg("v1.0/lit_m.pth"),
        "lit_b.in1k": _cfg("v1.0/lit_b.pth"),
        "pvt_small_full_msa.in1k": _cfg("v2.1/pvt_full_msa.pth"),
    }
)

PVT_SMALL = dict(
    embed_dims=(64, 128, 320, 512),
    depths=(3, 4, 6, 3),
    num_heads=(1, 2, 5, 8),
    mlp_ratios=(8, 8, 4, 4),
    pos_embed="absolute",
    class_token=True,
    global_pool="token",
    norm_eps=1e-6,
    pad_input=False,
)
ARCHS: dict[str, dict[str, Any]] = {  # keywords that differ from the defaults of LIT
    "lit_ti": PVT_SMALL,
    "lit_s": {},
    "lit_m": dict(depths=(2, 2, 18, 2)),
    "lit_b": dict(embed_dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "pvt_small_full_msa": dict(PVT_SMALL, attention=(True, True, True, True), merging="conv"),
}


@register_model
def lit_ti(pretrained: bool = False, **kwargs) -> LIT:
    """Build LIT-Ti: PVT-Small without attention in stages 1 and 2, with DTM."""
    return _create_lit("lit_ti", pretrained, **kwargs)


@register_model
def lit_s(pretrained: bool = False, **kwargs) -> LIT:
    """Build LIT-S: the defaults of :class:`LIT`, with the widths and depths of Swin-T."""
    return _create_lit("lit_s", pretrained, **kwargs)


@register_model
def lit_m(pretrained: bool = False, **kwargs) -> LIT:
    """Build LIT-M: LIT-S with 18 blocks in stage 3."""
    return _create_lit("lit_m", pretrained, **kwargs)


@register_model
def lit_b(pretrained: bool = False, **kwargs) -> LIT:
    """Build LIT-B: LIT-M with 128 to 1024 channels."""
    return _create_lit("lit_b", pretrained, **kwargs)


@register_model
def pvt_small_full_msa(pretrained: bool = False, **kwargs) -> LIT:
    """Build PVT-Small with full attention in all stages and convolutional merging, for the paper's attention maps."""
    return _create_lit("pvt_small_full_msa", pretrained, **kwargs)
