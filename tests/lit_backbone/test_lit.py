from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn

from lit_backbone import LIT
from tests.lit_backbone.small import KINDS, SMALL, small_lit

VARIANTS = ["lit_b", "lit_m", "lit_s", "lit_ti", "pvt_small_full_msa"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


# ---- timm


def test_registration() -> None:
    assert timm.list_models(module="lit") == VARIANTS
    assert set(timm.list_pretrained("lit_*")) == {"lit_b.in1k", "lit_m.in1k", "lit_s.in1k", "lit_ti.in1k"}


@pytest.mark.parametrize("name", ["lit_s", "lit_ti"])
def test_variants_take_overrides(name: str) -> None:
    model = timm.create_model(name, device="meta", num_classes=7, in_chans=1, img_size=64, drop_rate=0.5)
    assert model(torch.empty(1, 1, 64, 64, device="meta")).shape == (1, 7)
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, device="meta", not_an_argument=1)


def test_group_matcher_orders_layers(kind: str) -> None:
    model = small_lit(kind)
    for coarse in (False, True):
        layers = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert layers.keys() == dict(model.named_parameters()).keys()
        first_blocks = [layers[f"stages.{i}.blocks.0.mlp.fc1.weight"] for i in range(4)]
        assert first_blocks == ([1, 2, 3, 4] if coarse else [1, 2, 4, 6])  # depths 1, 2, 2, 1
        assert [layers[f"stages.{i}.merge.norm.weight"] for i in range(4)] == [0, *first_blocks[1:]]
        assert layers["head.weight"] >= layers["norm.weight"] >= first_blocks[3]


def test_no_weight_decay() -> None:
    attention_blocks = ["stages.2.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"]
    assert small_lit("relative").no_weight_decay() == {f"{block}.attn.rel_pos_bias" for block in attention_blocks}
    assert small_lit("class_token").no_weight_decay() == {"stages.3.cls_token"}  # absolute embeddings decay
    assert small_lit("conv_merging").no_weight_decay() == set()


# ---- structure


def test_pvt_small_has_spatial_reduction() -> None:
    """Compare the number of parameters with the published one, 24.5 M: PVT's convolutions and norms are added."""
    with torch.device("meta"):
        models = [timm.create_model("pvt_small_full_msa", sr_ratios=ratios) for ratios in (1, (8, 4, 2, 1))]
    full, reduced = (sum(p.numel() for p in model.parameters()) for model in models)
    blocks = zip((3, 4, 6), (64, 128, 320), (8, 4, 2), strict=True)
    assert reduced - full == sum(depth * (dim * dim * ratio**2 + 3 * dim) for depth, dim, ratio in blocks)
    assert reduced == pytest.approx(24.5e6, rel=1e-3)


def test_swin_merging_concatenates_the_channels_of_four_tokens() -> None:
    merge, x = small_lit(merging="swin").stages[1].merge, torch.randn(1, 4, 6, 8)
    tokens = torch.cat([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], dim=-1)  # the order of Swin
    expected = F.layer_norm(tokens, (32,), merge.norm.weight, merge.norm.bias) @ merge.reduction.weight.T
    torch.testing.assert_close(merge(x), expected)


def test_drop_path_grows_linearly_over_all_blocks() -> None:
    model = small_lit(depths=(1, 2, 3, 1), drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 6 for i in range(7)])
    x = torch.randn(4, 3, 64, 64)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.allclose(model(x), model(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(img_size=(64, 31)), "32"),
        (dict(embed_dims=(8, 16, 32)), "stages"),
        (dict(depths=(1, 2), embed_dims=(8, 16)), "stages"),
        (dict(num_heads=5), "num_heads=5"),
        (dict(merging="pool"), "merging='pool'"),
        (dict(pos_embed="sine"), "pos_embed='sine'"),
        (dict(global_pool="token"), "global_pool='token'"),
        (dict(class_token=True), "class_token"),
        (dict(sr_ratios=2), "sr_ratios"),
    ],
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LIT(**(SMALL | arguments))


def assert_initialized(model: LIT) -> None:
    """Check the reference's initialization: truncated normal for linear layers and tables, PyTorch's defaults else."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or module.bias.count_nonzero() == 0, name
        elif name.endswith("merge.offset"):
            assert module.weight.count_nonzero() == module.bias.count_nonzero() == 0, name
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name
            assert 0 < module.bias.abs().max() <= bound, name
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            default = type(module)(len(module.weight)).state_dict()
            torch.testing.assert_close(module.state_dict(), default, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        if name.endswith(("pos_embed", "cls_token", "rel_pos_bias")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name


def test_initialization(kind: str) -> None:
    arguments = dict(embed_dims=(16, 32, 48, 64), img_size=224)  # large enough for statistics
    assert_initialized(LIT(**(SMALL | KINDS[kind] | arguments)))

    model = LIT(**(SMALL | KINDS[kind] | arguments), device="meta").to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(77)  # init_weights must overwrite every value
    model.extra = nn.Linear(64, 64, bias=False)  # a user's layer
    model.init_weights()
    assert_initialized(model)


# ---- heads


@pytest.mark.parametrize("kind, pooling", [("relative", "avg"), ("class_token", "avg"), ("class_token", "token")])
def test_pooling_by_its_formula(kind: str, pooling: str) -> None:
    model, x = small_lit(kind, global_pool=pooling), torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    assert tokens.shape == ((2, 2, 2, 32) if kind == "relative" else (2, 1 + 2 * 2, 32))
    patches = tokens.flatten(1, 2) if kind == "relative" else tokens[:, 1:]
    pooled = tokens[:, 0] if pooling == "token" else patches.sum(1) / 4
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), tokens)


def test_reset_classifier() -> None:
    model = small_lit("class_token").double()
    model.reset_classifier(200)
    assert (model.num_classes, model.global_pool, model.head.weight.dtype) == (200, "token", torch.float64)
    assert model.get_classifier() is model.head
    assert model.head.weight.shape == (200, 32)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head.bias.count_nonzero() == 0
    model.reset_classifier(3, "avg")
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 3)
    for pooling in ("max", "token"):
        with pytest.raises(ValueError, match=f"global_pool='{pooling}'"):
            small_lit("relative").reset_classifier(3, pooling)


# ---- sizes


def test_set_input_size_equals_resizing_on_the_fly(kind: str) -> None:
    model, x = small_lit(kind), torch.randn(2, 3, 96, 160)
    model.stages[2].requires_grad_(False)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = model(x)
    model.set_input_size((96, 160))
    torch.testing.assert_close(model(x), expected)
    model.load_state_dict(small_lit(kind, img_size=(96, 160)).state_dict())  # the tables have new shapes
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    with pytest.raises(ValueError, match="32"):
        model.set_input_size(16)


@pytest.mark.parametrize("padded, smallest", [(True, 29), (False, 32)])
def test_input_remainder_is_padded_or_cropped(padded: bool, smallest: int) -> None:
    model, x = small_lit(pad_input=padded), torch.randn(1, 3, 70, 93)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 3, 0, 2)) if padded else x[:, :, :68, :92]))
    assert model(torch.randn(0, 3, smallest, smallest)).shape == (0, model.num_classes)
    with pytest.raises(ValueError, match=f"^input size 64 x {smallest - 1}: .* {smallest} x {smallest} pixels.$"):
        model(torch.randn(1, 3, 64, smallest - 1))


# ---- intermediate features


def test_forward_intermediates(kind: str) -> None:
    model = small_lit(kind)
    x = torch.randn(2, 3, 64, 96)
    final, maps = model.forward_intermediates(x)
    assert [tuple(y.shape) for y in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 24, 4, 6), (2, 32, 2, 3)]
    torch.testing.assert_close(final, model.forward_features(x))

    *_, normalized = model.forward_intermediates(x, norm=True, output_fmt="NHWC", intermediates_only=True)
    tokens = final[:, 1:] if kind == "class_token" else final  # feature maps have no class token
    torch.testing.assert_close(normalized.reshape(2, -1, 32), tokens.reshape(2, -1, 32))
    torch.testing.assert_close(model.norm(maps[3].permute(0, 2, 3, 1)), normalized)

    early, some = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
    torch.testing.assert_close(early, some[1].permute(0, 2, 3, 1))
    torch.testing.assert_close(some, [maps[0], maps[2]])
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(x, output_fmt="NLC")

    model.prune_intermediate_layers([0, 2])
    assert len(model.stages) == 3 and model.num_features == 24
    torch.testing.assert_close(model.forward_intermediates(x, [0, 2], intermediates_only=True), some)
    torch.testing.assert_close(model(x), early)
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


# ---- training, copies, compilers and exports


def test_grad_checkpointing_recomputes_blocks_only_and_keeps_results(kind: str) -> None:
    x = torch.randn(4, 3, 64, 64)
    results, calls = [], []
    for enable in (False, True):
        torch.manual_seed(1)
        model = small_lit(kind, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        calls.clear()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda module, args, output, name=name: calls.append(name))
        model(x).square().mean().backward()
        results += [({name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers()))]
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=0)
    twice = {name for name in calls if calls.count(name) == 2}
    assert not any(".merge" in name for name in twice)  # BatchNorm would update its statistics twice
    assert {f"stages.{i}.blocks.{j}.norm2" for i, depth in enumerate(SMALL["depths"]) for j in range(depth)} <= twice


@pytest.mark.usefixtures("bfloat16_attention")
def test_bfloat16_autocast(kind: str) -> None:
    model = small_lit(kind)
    x = torch.randn(4, 3, 64, 64)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert F.cosine_similarity(out.float(), expected).min() > 0.99
    assert (model.bfloat16()(x.bfloat16())).dtype == torch.bfloat16


def assert_same_step(compiled: Callable[[Tensor], Tensor], model: LIT, x: Tensor) -> None:
    """Compare outputs and gradients of a compiled model with those of the model."""
    outputs, parameters = (compiled(x), model(x)), list(model.parameters())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    actual, expected = (torch.autograd.grad(output.square().sum(), parameters) for output in outputs)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


TWO_STAGES = dict(embed_dims=(24, 48), depths=(1, 1), num_heads=(1, 2), attention=(False, True))


@pytest.mark.parametrize("kind", ["relative", pytest.param("class_token", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(kind: str) -> None:
    model, x = small_lit(kind, **TWO_STAGES), torch.randn(2, 3, 96, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(compiled, model, x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [pytest.param("relative", marks=pytest.mark.slow), "class_token"])
def test_one_graph_serves_all_batch_sizes(kind: str) -> None:
    model = small_lit(kind, depths=(1, 1, 1, 1), drop_path_rate=0.1).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for batch in (2, 5):
        x = torch.randn(batch, 3, 64, 64)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.compiler.set_stance("default" if batch == 2 else "fail_on_recompile"):
            assert compiled(x).shape == (batch, 10)


@pytest.mark.slow
def test_compiled_model_trains_at_other_sizes_and_batches() -> None:
    """Use the compiler option that docs/faq.md names."""
    model = small_lit(**TWO_STAGES).train()
    compiled = torch.compile(model, fullgraph=True, options={"layout_optimization": False})
    for shape in ((2, 3, 64, 64), (3, 3, 80, 112)):
        assert_same_step(compiled, model, torch.randn(shape))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relative", "class_token"])
def test_exports_with_free_sizes(kind: str) -> None:
    model = small_lit(kind)
    free = {axis: torch.export.Dim.AUTO for axis in (0, 2, 3)}
    program = torch.export.export(model, (torch.randn(2, 3, 128, 96),), dynamic_shapes=(free,)).module()
    for size in ((64, 64), (160, 224)):  # (64, 64) is the size of the stored tables
        x = torch.randn(3, 3, *size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
