"""Parameter groups and learning rates against those of the reference."""

from pathlib import Path

import pytest
import timm
import torch

from lit_backbone.released import convert_released
from lit_classification.config import Config
from lit_classification.config_reader import load_config
from lit_classification.optim import Schedule, build_optimizer, param_groups

CONFIGS = Path(__file__).parents[2] / "classification" / "configs"
STEPS_PER_EPOCH = 1251  # for ImageNet's 1,281,167 images in batches of 1024


def recipe(name: str) -> Config:
    return load_config(CONFIGS / f"{name.replace('_', '-')}.yaml")


@pytest.mark.parametrize("name", ["lit_s", "lit_ti"])
def test_groups_are_those_of_the_reference(goldens, name):
    released, model = goldens["state_dicts"][name]["keys"], timm.create_model(name)
    names = {id(param): key for key, param in model.named_parameters()}
    groups = param_groups(model, recipe(name))
    actual = {group["name"]: {names[id(param)] for param in group["params"]} for group in groups}
    for group, keys in zip(("decay", "no_decay", "offset"), goldens["train_step"][name]["groups"], strict=True):
        layout = {key: torch.empty(released[key]) for key in keys}
        if "pos_embed4" in layout:  # its conversion needs the class token, which is in another group
            layout["cls_token"] = torch.empty(released["cls_token"])
        assert actual[group] == set(convert_released(layout)) - ({"stages.3.cls_token"} if group == "decay" else set())


def test_group_settings_are_those_of_the_reference(goldens):
    groups = param_groups(timm.create_model("lit_s"), recipe("lit_s"))
    settings = [{key: value for key, value in group.items() if key not in ("params", "name")} for group in groups]
    assert settings == goldens["train_step"]["lit_s"]["group_opts"]


@pytest.mark.parametrize("name", ["lit_s", "lit_ti"])
def test_learning_rates_are_those_of_the_reference(goldens, name):
    """Compare all groups at each recorded step (LIT-S) or epoch (LIT-Ti)."""
    golden, config = goldens["schedule"][name], recipe(name)
    model = timm.create_model(name, embed_dims=(8, 16, 24, 32), num_heads=1, depths=(1, 1, 1, 1))
    optimizer = build_optimizer(model, config)
    schedule = Schedule(optimizer, config, STEPS_PER_EPOCH)
    steps_per_point = STEPS_PER_EPOCH if name == "lit_ti" else 1
    assert len(golden["lr"]) >= 14
    for point, rates in golden["lr"].items():
        for step in (int(point) * steps_per_point, (int(point) + 1) * steps_per_point - 1):
            schedule.set(step)
            assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates, rel=1e-9)
