"""Configs: the recipes that ship, and reading them from YAML files, options and checkpoints."""

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError

from lit_backbone import CheckpointError, DeformableTokenMerging
from lit_backbone.layers import AttentionBlock
from lit_classification.config import Config, ConfigError, Lit, flatten, key_fields, result_settings
from lit_classification.config_reader import config_from_checkpoint, dump_config, load_config

CONFIGS = Path(__file__).parents[2] / "classification" / "configs"


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def config_error(path: Path, opts=(), **shortcuts: Any) -> str:
    """Return the message, of one line, with which a config is refused."""
    with pytest.raises(ConfigError) as info:
        load_config(path, opts, **shortcuts)
    assert "\n" not in str(info.value)
    return str(info.value)


def nested_yaml(key: str, value: str) -> str:
    for part in reversed(key.split(".")):
        value = f"{{{part}: {value}}}"
    return value


MISTAKES = [  # key, value, beginning of the message after the place, words that it must also hold
    # Unknown keys and sections
    ("TRAIN.EPOCH", "5", "TRAIN.EPOCH: unknown key", "TRAIN.EPOCHS?"),
    ("EPOCHS", "5", "EPOCHS: unknown key", "TRAIN.EPOCHS?"),
    ("MODEL.LIT.embed_dim", "96", "MODEL.LIT.embed_dim: unknown key", "MODEL.LIT.embed_dims?"),
    # Types
    ("TRAIN.EPOCHS", "abc", "TRAIN.EPOCHS: expected a valid integer, got 'abc'", "number of epochs"),
    ("TRAIN.BASE_LR", "1e999", "TRAIN.BASE_LR: expected a finite number", "inf"),
    ("TRAIN.AUTO_RESUME", "yes", "TRAIN.AUTO_RESUME: expected a valid boolean", "'yes'"),
    ("MODEL.LIT.depths", "2", "MODEL.LIT.depths: expected a valid tuple", "got 2"),
    ("AUG.SCALE", "0.5", "AUG.SCALE: expected a valid tuple", "[low, high]"),
    # Ranges and choices
    ("DATA.BATCH_SIZE", "0", "DATA.BATCH_SIZE: expected greater than or equal to 1", ""),
    ("DATA.IMG_SIZE", "[224, 100]", "DATA.IMG_SIZE: expected a multiple of 32", "100"),
    ("DATA.DATASET", "wds/images", "DATA.DATASET: ", "torch/NAME"),
    ("DATA.INTERPOLATION", "cubic", "DATA.INTERPOLATION: ", "'bicubic'"),
    ("AUG.SCALE", "[1.0, 0.08]", "AUG.SCALE: expected [low, high]", ""),
    ("TAG", "../../x", "TAG: ", "'../../x'"),
    # Keys of the original and of earlier versions
    ("AMP_OPT_LEVEL", "O3", "AMP_OPT_LEVEL: ", "RUNTIME.AMP_DTYPE"),
    ("DATA.ON_BAD_IMAGE", "skip", "DATA.ON_BAD_IMAGE: ", "delete"),
    # Models
    ("MODEL.DROP_RATE", "0.1", "MODEL.DROP_RATE: is not implemented for LIT", "MODEL.DROP_PATH_RATE"),
    ("MODEL.NAME", "LIT-Ti", "MODEL.NAME: ", "lit_ti?"),
    ("MODEL", "{NAME: vgg11, NUM_CLASSES: 2}", "MODEL.NAME: makes no model", ""),
    (
        "MODEL",
        "{NAME: vit_tiny_patch16_384}",
        "DATA.IMG_SIZE: vit_tiny_patch16_384 takes images of 384 x 384",
        "img_size",
    ),
    ("MODEL", "{NAME: pvt_v2_b0, KEYWORDS: {depth: 2}}", "MODEL.KEYWORDS: makes no model", ""),
    ("MODEL.KEYWORDS", "{depths: 1}", "MODEL.KEYWORDS: ", "MODEL.LIT"),
    ("MODEL.LIT.num_heads", "[3, 6, 7, 24]", "MODEL.LIT: makes no model", "num_heads=7"),
    # Combinations
    ("TRAIN.EPOCHS", "20", "TRAIN.WARMUP_EPOCHS: 20", "TRAIN.EPOCHS"),
    ("TRAIN.GLOBAL_BATCH", "999", "TRAIN.GLOBAL_BATCH: ", "1000"),
    ("DATA", "{BATCH_SIZE: 1}", "DATA.BATCH_SIZE: mixup", "use 2"),
]


@pytest.mark.parametrize(("key", "value", "problem", "words"), MISTAKES, ids=lambda part: str(part)[:30])
def test_message_names_place_key_and_fix_in_files_and_options(write, key, value, problem, words):
    path = write(nested_yaml(key, value))
    message = config_error(path)
    assert message.startswith(f"{path}: {problem}") and words in message
    assert config_error(CONFIGS / "lit-s.yaml", [key, value]) == message.replace(str(path), "--opts", 1)


def test_all_mistakes_are_reported_one_per_line(write):
    path = write("TRAIN: {EPOCHS: abc}\nAUG: {MIXUPS: 1}\nDATA: {IMG_SIZE: 100}")
    with pytest.raises(ConfigError) as info:
        load_config(path, ["TEST.CROP", "1", "MODEL.NAMES", "x"])
    places = {line.rsplit(": ", 1)[0] for line in str(info.value).splitlines()}
    in_file = {f"{path}: {key}" for key in ("TRAIN.EPOCHS", "AUG.MIXUPS", "DATA.IMG_SIZE")}
    assert places == in_file | {"--opts: TEST.CROP", "--opts: MODEL.NAMES"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("DATA: {BATCH_SIZE: 8\nTRAIN: {}\n", "not YAML: line 2: "),
        ("DATA: {}\nTRAIN: {}\nDATA: {}\n", "not YAML: line 3: duplicate key 'DATA'"),
        ("? [a, b]\n: 1", "not YAML: line 1: "),
        (b"TAG: \xff\xfe", "not YAML: "),
        ("TAG: !!python/object/apply:os.getcwd []", "not YAML: line 1: "),
        ("- DATA\n- TRAIN\n", "expected sections such as DATA and TRAIN"),
        ("", "expected sections such as DATA and TRAIN"),
        ("BASE: lit-s.yaml", "BASE: expected a list"),
        ('"\\e[31mX": 1', "\\x1b[31mX: unknown key"),
    ],
)
def test_broken_file_is_named_with_the_line(write, text, problem):
    path = write(text)
    assert config_error(path).startswith(f"{path}: {problem}")


def test_batch_of_one_with_a_map_of_one_pixel():
    opts = ["DATA.BATCH_SIZE", "1", "DATA.IMG_SIZE", "32", "AUG.MIXUP", "0", "AUG.CUTMIX", "0"]
    assert config_error(CONFIGS / "lit-s.yaml", opts).startswith("--opts: DATA.BATCH_SIZE: BatchNorm needs several")


# Inheritance


def test_files_inherit_in_order_and_relative_to_themselves(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write("{TRAIN: {EPOCHS: 31, EMA: 0.5}, SEED: 1, TAG: a}", "a.yaml")
    write("{TRAIN: {EPOCHS: 32, MIN_LR: 1e-7}, SEED: 2}", "b.yaml")
    write("{BASE: [../a.yaml, ../b.yaml], SEED: 3, MODEL: {LIT: {norm_eps: 1e-6}}}", "sub/c.yaml")
    path = write("{BASE: [sub/c.yaml], MODEL: {LIT: {depths: [1, 1, 1, 1]}}}", "d.yaml")
    config, defaults = load_config(path, ["TRAIN.EMA", "0.75"], tag="mine"), flatten(Config().model_dump())
    assert {key: value for key, value in flatten(config.model_dump()).items() if defaults.get(key) != value} == {
        **{"TRAIN.EPOCHS": 32, "TRAIN.MIN_LR": 1e-7, "TRAIN.EMA": 0.75, "SEED": 3, "TAG": "mine"},
        **{"MODEL.LIT.norm_eps": 1e-6, "MODEL.LIT.depths": (1, 1, 1, 1)},
    }


def test_mistake_is_attributed_to_the_layer_that_made_it(write):
    a = write("{TRAIN: {EPOCHS: 30}, MODEL: {LIT: {merging: conv, num_heads: 97}}}", "a.yaml")
    b = write("{BASE: [a.yaml], SEED: 1}", "b.yaml")
    assert config_error(b).startswith(f"{a}: MODEL.LIT: ")
    assert config_error(b, ["TRAIN.EPOCHS", "abc"]).startswith("--opts: TRAIN.EPOCHS: ")
    assert config_error(b, batch_size=0).startswith("--batch-size: DATA.BATCH_SIZE: ")
    c = write("{BASE: [b.yaml], TRAIN: {EPOCHS: 0}}", "c.yaml")
    assert config_error(c).startswith(f"{c}: TRAIN.EPOCHS: ")
    write("BASE: [c.yaml]", "a.yaml")
    assert f"inherits from itself: {a} -> " in config_error(a)


# Values


def test_yaml_values_have_the_type_that_they_appear_to_have(write):
    opts = (
        "TRAIN.BASE_LR 1e-3 TRAIN.CLIP_GRAD null TEST.AMP_DTYPE off TEST.CROP False TAG on SEED 010 DATA.IMG_SIZE 256"
    )
    expected = [0.001, None, "off", False, "on", 10, (256, 256)]
    text = "{TRAIN: {BASE_LR: 1e-3, CLIP_GRAD: null}, TEST: {AMP_DTYPE: off, CROP: False}, TAG: on, SEED: 010}"
    for path, options in ((write(text), ["DATA.IMG_SIZE", "[256, 256]"]), (write("{}", "empty.yaml"), opts.split())):
        values = flatten(load_config(path, options).model_dump())
        actual = [values[key] for key in opts.split()[::2]]
        assert actual == expected and list(map(type, actual)) == list(map(type, expected))


def test_shortcuts_set_their_keys_and_none_is_ignored():
    shortcuts = dict(resume=None, pretrained="w.pth", data_path="/a: b", batch_size=64, output="~/runs", tag="5")
    opts = ["TAG", "x", "DATA.BATCH_SIZE", "32", "AUG.AUTO_AUGMENT", ""]
    config = load_config(CONFIGS / "lit-s.yaml", opts, **shortcuts)
    assert (config.MODEL.RESUME, config.MODEL.PRETRAINED, config.DATA.DATA_PATH) == ("", "w.pth", "/a: b")
    assert (config.DATA.BATCH_SIZE, config.OUTPUT, config.TAG) == (64, str(Path.home() / "runs"), "5")
    assert config.AUG.AUTO_AUGMENT == ""


@pytest.mark.parametrize("tag", "1e-3 off 010 null 2024-01-01 12:30".split() + ["", "é: #", "a\nb"])
def test_dumped_config_reads_back_equal(write, tag):
    opts = ["MODEL.LIT", "{norm_eps: 1e-6, depths: [1, 1, 2, 1], class_token: true}", "DATA.IMG_SIZE", "[64, 96]"]
    config = load_config(CONFIGS / "lit-ti.yaml", opts, tag=tag)
    assert config.TAG == tag and load_config(write(dump_config(config))) == config


# Configs in checkpoints


def stored_config(caplog, config: Any, opts=(), **shortcuts: Any) -> tuple[Config | None, list[str]]:
    """Read the config in a checkpoint, and return it with the warnings."""
    caplog.set_level(logging.WARNING)
    config = config_from_checkpoint({"classes": [], "config": config}, "x.pth", opts, **shortcuts)
    return config, [record.getMessage() for record in caplog.records]


def test_stored_config_ignores_unknown_keys_with_one_warning_and_fills_missing_ones(caplog):
    tree = Config(SEED=7).model_dump(mode="json") | {"NEW": 1, "SEEDS": 2}
    tree["MODEL"]["LIT"] = {"depths": [1, 1, 1, 1], "rope": True}
    tree["DATA"]["ON_BAD_IMAGE"] = "skip"  # a key of earlier versions
    del tree["AUG"], tree["TRAIN"]["EMA"]
    config, warnings = stored_config(caplog, tree)
    assert config == Config.model_validate({"SEED": 7, "MODEL": {"LIT": {"depths": [1] * 4}}})
    assert len(warnings) == 1 and warnings[0].endswith(" MODEL.LIT.rope, NEW, SEEDS")


def test_options_override_a_stored_config(caplog):
    tree = {"TEST": {"CROP": False}, "DATA": {"BATCH_SIZE": 4}, "SEED": 7}
    config, _ = stored_config(caplog, tree, ["TEST.CROP", "true"], batch_size=2)
    assert (config.TEST.CROP, config.DATA.BATCH_SIZE, config.SEED) == (True, 2, 7)
    with pytest.raises(ConfigError, match="^--opts: TEST.CROPS: unknown key"):
        stored_config(caplog, tree, ["TEST.CROPS", "true"])


def test_only_a_valid_config_of_a_lit_is_read_from_a_checkpoint(caplog):
    """Runtime settings and keywords of other models never are."""
    tree = {"RUNTIME": {"DEVICE": "gone", "COMPILE": True}, "MODEL": {"KEYWORDS": {"pretrained": True}}}
    assert stored_config(caplog, tree) == (Config(), [])
    for config in (None, 5, {"MODEL": {"NAME": "resnet18"}}, {"MODEL": {"NAME": "hf-hub:timm/x"}}):
        assert stored_config(caplog, config) == (None, [])
    assert config_from_checkpoint({"config": {"SEED": 7}}, "x.pth") is None  # not written by main.py
    with pytest.raises(CheckpointError, match="^x.pth: config: MODEL.LIT.depths: "):
        stored_config(caplog, {"MODEL": {"LIT": {"depths": [10**6] * 4}}})


# Recipes


@pytest.mark.parametrize(
    ("name", "published"), [("lit-ti", "81.1"), ("lit-s", "81.5"), ("lit-m", "83.0"), ("lit-b", "83.4")]
)
def test_recipe_is_that_of_the_paper(goldens, name, published):
    """The recipe of LIT-S is also the default. The others are stored as differences from it."""
    path, recipes = CONFIGS / f"{name}.yaml", goldens["recipes"]
    config = load_config(path)
    for actual, expected in ((config, recipes["lit-s"] | recipes[name]), (Config(), recipes["lit-s"])):
        values = flatten(actual.model_dump(mode="json"))
        assert {key: values[key] for key in expected} == expected  # other keys are off by default
    assert config.learning_rates == pytest.approx((0.001, 0.000001, 0.00001), rel=1e-12)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for fact in (f"bash scripts/{name}.sh 8", "1024 (8 x 128)", f"{published} top-1", "not run here"):
        assert any(line.endswith(fact) for line in header), fact


ATTENTION_STAGES = ("1111", "0111", "0011", "0001", "0000")
ABLATIONS = {f"pvt-small-{stages}": (stages, "conv") for stages in ATTENTION_STAGES}  # and their patch merging
ABLATIONS |= {"pvt-small-1111-dtm": ("1111", "dtm"), "lit-s-conv": ("0011", "conv")}
ABLATIONS["pvt-small-sra"] = ("1111", "conv")


@pytest.mark.parametrize("path", sorted((CONFIGS / "ablations").iterdir()), ids=lambda path: path.stem)
def test_ablations_differ_from_their_recipe_in_the_model_alone(path):
    attention, merging = ABLATIONS[path.stem]
    config = load_config(path)
    recipe = load_config(CONFIGS / ("lit-s.yaml" if path.stem.startswith("lit-s") else "lit-ti.yaml"))
    assert config.model_copy(update={"MODEL": recipe.MODEL, "BASE": recipe.BASE}) == recipe
    assert config.MODEL.model_copy(update={"NAME": recipe.MODEL.NAME, "LIT": Lit()}) == recipe.MODEL
    with torch.device("meta"):
        model = timm.create_model(**config.model_keywords)
    blocks = [stage.blocks[0] for stage in model.stages]
    assert [isinstance(block, AttentionBlock) for block in blocks] == [code == "1" for code in attention]
    assert isinstance(model.stages[1].merge, DeformableTokenMerging) == (merging == "dtm")
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1000)


# The schema


def test_schema_is_documented_and_frozen():
    assert [key for key, field in key_fields().items() if not field.description or "\n" in field.description] == []
    with pytest.raises(ValidationError, match="frozen"):
        Config().TRAIN.EPOCHS = 3


def test_result_settings_leave_out_what_affects_no_results(goldens):
    settings = result_settings(Config())
    assert settings["TRAIN.OPTIMIZER.NAME"] == '"adamw"' and settings["RUNTIME.AMP_DTYPE"] == '"auto"'
    runtime = "BASE DATA.DATA_PATH DATA.PIN_MEMORY DATA.NUM_WORKERS MODEL.RESUME MODEL.PRETRAINED TRAIN.AUTO_RESUME "
    runtime += "TRAIN.RESUME_CHANGED TRAIN.USE_CHECKPOINT TRAIN.SAVE_STEPS RUNTIME.DEVICE "
    runtime += "RUNTIME.CHANNELS_LAST RUNTIME.TIMEOUT OUTPUT TAG SAVE_FREQ PRINT_FREQ"
    assert goldens["recipes"]["lit-s"].keys() - settings.keys() == set(runtime.split())
