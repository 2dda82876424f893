"""Parameter groups and learning rates against those of the reference."""

from pathlib import Path

import pytest
import timm
import torch
from lit_classification.config_file import load_config
from torch import nn

from lit_backbone.released import convert_released
from lit_classification.config import Config
from lit_classification.optim import Schedule, build_optimizer, parameter_groups

CONFIGS = Path(__file__).parents[2] / "classification" / "configs"
UPDATES_PER_EPOCH = 1251  # of ImageNet's 1,281,167 images in batches of 1024


def recipe(name: str) -> Config:
    return load_config(CONFIGS / f"{name.replace('_', '-')}.yaml")


def groups_by_name(model: nn.Module, config: Config) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(model, config)}


@pytest.mark.parametrize("name", ["lit_s", "lit_ti"])
def test_groups_are_the_references(goldens, name):
    released = goldens["state_dicts"][name]["keys"]
    ours = groups_by_name(timm.create_model(name), recipe(name))
    for group, keys in zip(("decay", "no_decay", "offset"), goldens["train_step"][name]["groups"], strict=True):
        layout = {key: torch.empty(released[key]) for key in keys}
        if "pos_embed4" in layout:  # the class token, of another group, tells that its slot is used
            layout["cls_token"] = torch.empty(released["cls_token"])
        expected = set(convert_released(layout)) - ({"stages.3.cls_token"} if group == "decay" else set())
        assert ours[group] == expected


def test_group_settings_are_the_references(goldens):
    groups = parameter_groups(timm.create_model("lit_s"), recipe("lit_s"))
    settings = [{k: v for k, v in group.items() if k not in ("params", "name")} for group in groups]
    assert settings == goldens["train_step"]["lit_s"]["group_opts"]


@pytest.mark.parametrize("name", ["lit_s", "lit_ti"])
def test_every_learning_rate_is_the_references(goldens, name):
    """At each recorded update (LIT-S) or epoch (LIT-Ti), for all three groups."""
    golden = goldens["schedule"][name]
    config = recipe(name)
    model = timm.create_model(name, embed_dims=(8, 16, 24, 32), num_heads=1, depths=(1, 1, 1, 1))
    optimizer = build_optimizer(model, config)
    schedule = Schedule(optimizer, config, UPDATES_PER_EPOCH)
    updates_per_point = UPDATES_PER_EPOCH if name == "lit_ti" else 1
    assert len(golden["lr"]) >= 14
    for point, rates in golden["lr"].items():
        for update in (int(point) * updates_per_point, (int(point) + 1) * updates_per_point - 1):
            schedule.set(update)
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates, rel=1e-9)
