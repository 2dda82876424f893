from pathlib import Path

import pytest
import timm
import torch
from lit_classification.config_file import dump, load_config, locate_run
from pydantic import ValidationError

from lit_backbone import DeformableTokenMerging
from lit_backbone.layers import AttentionBlock
from lit_classification.config import Config, ConfigError, Lit, Section
from lit_classification.sampler import accumulation_steps

CONFIGS = Path(__file__).parents[2] / "classification" / "configs"
RECIPES = ("lit-ti", "lit-s", "lit-m", "lit-b")


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def complaint(path, opts=(), **shortcuts) -> str:
    """The message of a configuration that must be refused, in one line."""
    with pytest.raises(ConfigError) as info:
        load_config(path, opts, **shortcuts)
    assert "\n" not in str(info.value)
    return str(info.value)


def in_yaml(key: str, value: str) -> str:
    for part in reversed(key.split(".")):
        value = f"{{{part}: {value}}}"
    return value


def leaves(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def settings(config: Config) -> dict:
    return leaves(config.model_dump())


# Key, value, the key that is named (if another one), what the message must say.
MISTAKES = [
    # unknown keys and sections
    ("TRAIN.EPOCH", "5", None, "unknown key; did you mean TRAIN.EPOCHS?"),
    ("TRIAN.EPOCHS", "5", "TRIAN", "unknown key; did you mean TRAIN?"),
    ("train.EPOCHS", "5", "train", "unknown key; did you mean TRAIN?"),
    ("EPOCHS", "5", None, "unknown key; did you mean TRAIN.EPOCHS?"),
    ("TRAIN.BATCH_SIZE", "5", None, "unknown key; did you mean DATA.BATCH_SIZE?"),
    ("TRAIN.OPTIMIZER.BETA", "5", None, "unknown key; did you mean TRAIN.OPTIMIZER.BETAS?"),
    ("TEST.XYZ", "5", None, "unknown key; choose from TEST.CROP, TEST.AMP_DTYPE"),
    ("TRAIN.7", "5", None, "unknown key"),
    # wrong types
    ("TRAIN.EPOCHS", "abc", None, "expected a valid integer, got 'abc' (length of the training, epochs"),
    ("TRAIN.EPOCHS", "'128'", None, "expected a valid integer, got '128'"),
    ("TRAIN.EPOCHS", "3.0", None, "expected a valid integer, got 3.0"),
    ("TRAIN.EPOCHS", "true", None, "expected a valid integer, got True"),
    ("TRAIN.EPOCHS", "null", None, "expected a valid integer, got None"),
    ("TRAIN.BASE_LR", "true", None, "expected a valid number, got True"),
    ("TRAIN.BASE_LR", "'5e-4'", None, "expected a valid number, got '5e-4'"),
    ("TRAIN.BASE_LR", "1e999", None, "expected a finite number, got inf"),
    ("TRAIN.CLIP_GRAD", "off", None, "expected a valid number, got 'off' (largest gradient norm of an update; null ="),
    ("TRAIN.AUTO_RESUME", "1", None, "expected a valid boolean, got 1"),
    ("TRAIN.AUTO_RESUME", "yes", None, "expected a valid boolean, got 'yes'"),
    ("TAG", "5", None, "expected a valid string, got 5"),
    ("TRAIN", "5", None, "expected a valid dictionary or instance of Train, got 5"),
    ("TRAIN.OPTIMIZER", "adamw", None, "expected a valid dictionary or instance of Optimizer, got 'adamw'"),
    ("MODEL.LIT", "[depths]", None, "expected a valid dictionary or instance of Lit, got ['depths']"),
    ("AUG.SCALE", "0.5", None, "expected a valid tuple, got 0.5"),
    ("AUG.SCALE", "[0.5]", None, "Field required, got [0.5] ([low, high] area"),
    ("AUG.SCALE", "[0.1, 0.5, 0.7]", None, "Tuple should have at most 2 items"),
    ("DATA.IMG_SIZE", "large", None, "expected a valid tuple, got 'large' (pixels, one integer or [height, width]"),
    ("DATA.IMG_SIZE", "[224, true]", None, "expected a valid integer, got True"),
    # out of range
    ("DATA.BATCH_SIZE", "0", None, "expected greater than or equal to 1, got 0"),
    ("DATA.IMG_SIZE", "100", None, "expected a multiple of 32, got 100"),
    ("DATA.IMG_SIZE", "[224, 100]", None, "expected a multiple of 32, got 100"),
    ("DATA.INTERPOLATION", "cubic", None, "expected 'bicubic', 'bilinear', 'nearest' or 'random', got 'cubic'"),
    ("MODEL.DROP_PATH_RATE", "1", None, "expected less than 1, got 1"),
    ("TRAIN.CLIP_GRAD", "0", None, "expected greater than 0, got 0"),
    ("TRAIN.OPTIMIZER.BETAS", "[0.9, 1.0]", None, "expected less than 1, got 1.0"),
    ("TRAIN.OPTIMIZER.NAME", "sgd", None, "expected 'adamw', got 'sgd'"),
    ("AUG.SCALE", "[1.0, 0.08]", None, "expected [low, high], got [1.0, 0.08]"),
    ("AUG.AUTO_AUGMENT", "randaug", None, "timm knows no policy 'randaug'; such as rand-m9"),
    ("RUNTIME.AMP_DTYPE", "float16", None, "expected 'bf16', 'fp16' or 'off', got 'float16'"),
    # keys of the original that are gone
    ("AMP_OPT_LEVEL", "O1", None, "is now RUNTIME.AMP_DTYPE"),
    ("EVAL_MODE", "true", None, "is now the flag --eval"),
    ("THROUGHPUT_MODE", "true", None, "is now the flag --throughput"),
    ("LOCAL_RANK", "0", None, "is set by torchrun"),
    ("DATA.CACHE_MODE", "part", None, "the operating system caches what is read, delete the key"),
    ("DATA.ZIP_MODE", "true", None, "use image folders, or a timm data set in DATA.DATASET"),
    ("MODEL.TYPE", "lit", None, "MODEL.NAME alone chooses the model"),
    ("TRAIN.ACCUMULATION_STEPS", "2", None, "TRAIN.GLOBAL_BATCH states the batch"),
    ("TRAIN.START_EPOCH", "0", None, "a resumed checkpoint knows its epoch"),
    ("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", "30", None, "the schedule is a cosine, delete the key"),
    ("TRAIN.LR_SCHEDULER.DECAY_RATE", "0.1", None, "the schedule is a cosine, delete the key"),
    ("TRAIN.OPTIMIZER.MOMENTUM", "0.9", None, "is the first of TRAIN.OPTIMIZER.BETAS"),
    # the model and its keywords
    ("MODEL.NAME", "lit-small", None, "timm knows no model 'lit-small'; choose from lit_b, lit_m, lit_s, lit_ti"),
    ("MODEL.NAME", "LIT-Ti", None, "timm knows no model 'LIT-Ti'; did you mean lit_ti?"),
    ("MODEL.LIT.EMBED_DIM", "96", None, "unknown key; did you mean MODEL.LIT.embed_dims?"),
    ("MODEL.LIT.NUM_HEADS", "4", None, "unknown key; did you mean MODEL.LIT.num_heads?"),
    ("MODEL.LIT.HAS_MSA", "[0, 0, 1, 1]", None, "unknown key; did you mean MODEL.LIT.depths?"),
    ("MODEL.LIT.img_size", "64", None, "is set by DATA.IMG_SIZE"),
    ("MODEL.LIT.drop_path_rate", "0.1", None, "unknown key; did you mean MODEL.DROP_PATH_RATE?"),
    # impossible combinations
    ("TRAIN.EPOCHS", "20", "TRAIN.WARMUP_EPOCHS", "20 must be less than TRAIN.EPOCHS, which is 20"),
    ("TRAIN.WARMUP_EPOCHS", "300", None, "300 must be less than TRAIN.EPOCHS, which is 300"),
    ("MODEL.LIT.merging", "dtmm", None, "expected 'dtm', 'conv' or 'conv_bn', got 'dtmm'"),
    ("MODEL.LIT.depths", "[2, 2, 2]", None, "Field required, got [2, 2, 2] (blocks of each stage)"),
    ("MODEL.LIT.num_heads", "[3, 6, 7, 24]", "MODEL.LIT", "7 heads do not divide 384 channels"),
    ("MODEL.LIT.depths", "hello", None, "expected a valid tuple, got 'hello'"),
    ("MODEL.LIT.pretrained", "true", None, "unknown key"),
    ("MODEL.LIT.class_token", "true", "MODEL.LIT", "makes no model: class_token=True: it has no place on the map"),
    (
        "MODEL.LIT",
        "{class_token: true, pos_embed: none, attention: false}",
        None,
        "makes no model: class_token=True: without attention in the last stage, it would see no image",
    ),
    # values that no machine has room for
    ("MODEL.LIT.depths", "1000000", None, "expected less than or equal to 64, got 1000000"),
    ("MODEL.LIT.embed_dims", "[4096, 4096, 4096, 4096]", "MODEL.LIT", "heads do not divide"),
    (
        "MODEL.LIT",
        "{embed_dims: 4096, num_heads: 8, depths: 64}",
        None,
        "makes a model of 4.3e+10 parameters; at most",
    ),
    ("DATA.IMG_SIZE", "64000", None, "expected less than or equal to 2048, got 64000"),
    ("MODEL.NUM_CLASSES", "1000000000", None, "expected less than or equal to 100000, got 1000000000"),
    ("DATA.BATCH_SIZE", "9" * 4000, None, "expected less than or equal to 1000000, got 9999"),
    ("TRAIN.BASE_LR", "9" * 4000, None, "BASE_LR"),
    ("SEED", "0x" + "f" * 6000, None, "expected less than 9223372036854775808, got a number of thousands of digits"),
    # names that no file can have
    ("OUTPUT", '"a\\0b"', None, "expected UTF-8 text without NUL"),
    ("DATA.DATA_PATH", '"\\ud800"', None, "expected UTF-8 text without NUL"),
    # names of folders that lie elsewhere
    ("TAG", "../../x", None, "got '../../x' (name of the run, a folder within OUTPUT; holds no /"),
    ("TAG", "/tmp", None, "got '/tmp'"),
    ("TAG", "..", None, "got '..'"),
    ("MODEL.NAME", "hf-hub:timm/resnet18.a1_in1k", None, "timm knows no model 'hf-hub:timm/resnet18.a1_in1k'"),
    ("AUG.AUTO_AUGMENT", "rand-zz9", None, "timm knows no policy 'rand-zz9'"),
    ("TRAIN.GLOBAL_BATCH", "999", None, "mixup and cutmix pair images, but 999 is odd; use 1000"),
    (
        "MODEL",
        "{NAME: vgg11, NUM_CLASSES: 2}",
        "MODEL.NAME",
        "makes no model: VGG.__init__() got an unexpected",
    ),
    (
        "MODEL",
        "{NAME: resnet18, LIT: {depths: 1}}",
        "MODEL.LIT",
        "has no meaning for resnet18; give",
    ),
    ("MODEL.NAME", "lit_s.no:such", None, "makes no model: "),
    ("MODEL", "{NAME: resnet18.foo}", "MODEL.NAME", "makes no model: Invalid pretrained tag (foo)"),
    ("MODEL.OFFSET_LR_MULTI", "0", None, "expected greater than 0, got 0 (factor on BASE_LR, not on"),
    ("DATA.DATASET", "cifar10", None, "a timm data set such as torch/cifar10; empty or imagenet = folders"),
    ("MODEL.KEYWORDS", "{depths: 1}", None, "has no meaning for lit_s; give its keywords by MODEL.LIT"),
    ("MODEL", "{NAME: resnet18, KEYWORDS: {pretrained: true}}", "MODEL.KEYWORDS.pretrained", "cannot be set here"),
    ("MODEL", "{NAME: pvt_v2_b0, KEYWORDS: {depth: 2}}", "MODEL.KEYWORDS", "makes no model: "),
]


@pytest.mark.parametrize(("key", "value", "named", "words"), MISTAKES, ids=lambda part: str(part)[:30])
def test_a_mistake_names_place_key_and_remedy_alike_in_file_and_opts(write, key, value, named, words):
    path = write(in_yaml(key, value))
    message = complaint(path)
    assert message.startswith(f"{path}: {named or key}: ")
    assert words in message
    assert complaint(CONFIGS / "lit-s.yaml", [key, value]) == message.replace(str(path), "--opts", 1)


def test_several_mistakes_are_all_reported_one_line_each(write):
    path = write("TRAIN: {EPOCHS: abc}\nAUG: {MIXUPS: 1}\nDATA: {IMG_SIZE: 100}")
    with pytest.raises(ConfigError) as info:
        load_config(path, ["TEST.CROP", "1", "MODEL.NAMES", "x"])
    places = [line.rsplit(": ", 1)[0] for line in str(info.value).splitlines()]
    assert sorted(places) == sorted(
        [f"{path}: TRAIN.EPOCHS", f"{path}: AUG.MIXUPS", f"{path}: DATA.IMG_SIZE"]
        + ["--opts: TEST.CROP", "--opts: MODEL.NAMES"]
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("DATA: {BATCH_SIZE: 8\nTRAIN: {}\n", "not YAML: line 2: expected ',' or '}', but got ':'"),
        ("DATA:\n\tBATCH_SIZE: 8\n", "not YAML: line 2: found character '\\t' that cannot start any token"),
        ("DATA: {}\nTRAIN: {}\nDATA: {}\n", 'not YAML: line 3: found duplicate key "DATA"'),
        ("AUG: {MIXUP: 0, MIXUP: 1}", 'not YAML: line 1: found duplicate key "MIXUP"'),
        (b"TAG: \xff\xfe", "not YAML: "),
        ("- DATA\n- TRAIN\n", "expected sections such as DATA and TRAIN at the top level, got list"),
        ("only words", "expected sections such as DATA and TRAIN at the top level, got str"),
        ("", "expected sections such as DATA and TRAIN at the top level, got an empty file"),
        ("BASE: lit-s.yaml", "BASE: expected a list of YAML files, got 'lit-s.yaml'"),
        ("DATA: {NUM_WORKERS: " + "9" * 5000 + "}", "not YAML: Exceeds the limit (4300 digits)"),
        ("TAG: &a [*a]", "not YAML: line 1: *a is an alias; write out what it stands for"),
        ("DATA: &a {DATA: *a}", "not YAML: line 1: *a is an alias"),
        ("[" * 5000 + "]" * 5000, "not YAML: line 1: more than 20 levels deep"),
        ("BASE: [1]", "BASE: expected a list of YAML files, got [1]"),
        ('"\\e[31mX": 1\n"\\e[31mX": 2\n', 'not YAML: line 2: found duplicate key "\\x1b[31mX"'),
    ],
)
def test_a_broken_file_names_file_and_line(write, text, words):
    path = write(text)
    assert complaint(path).startswith(f"{path}: {words}")


def test_yaml_that_would_run_code_is_refused(write, tmp_path):
    path = write(f"TAG: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert "python/object/apply" in complaint(path)
    assert not (tmp_path / "made").exists()


def test_a_missing_file_lists_its_neighbours(write, tmp_path):
    write("{}", "lit-s.yaml"), write("{}", "lit-m.yml"), write("{}", "notes.txt")
    path = tmp_path / "lit-x.yaml"
    assert complaint(path) == f"{path}: no such file; {tmp_path} holds lit-m.yml, lit-s.yaml"
    path = tmp_path / "nowhere" / "lit-s.yaml"
    assert complaint(path) == f"{path}: no such file; {path.parent} holds no YAML file"


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.EPOCHS"], "--opts: TRAIN.EPOCHS: has no value; give pairs of KEY VALUE"),
        (["SEED", "1", "TAG=x"], "--opts: TAG=x: has no value; give pairs of KEY VALUE"),
        (["AUG.SCALE", "[0.1"], "--opts: AUG.SCALE: not YAML: line 1: expected ',' or ']', but got '<stream end>'"),
        (["BASE", "[a.yaml]"], "--opts: BASE: works in a file only; write one that inherits, or override single keys"),
    ],
)
def test_opts_that_are_no_pairs_or_no_yaml(opts, message):
    assert complaint(CONFIGS / "lit-s.yaml", opts) == message


def test_files_inherit_in_order_and_relative_to_themselves(write, tmp_path):
    (tmp_path / "sub").mkdir()
    write("{TRAIN: {EPOCHS: 31, EMA: 0.5}, SEED: 1, TAG: a}", "a.yaml")
    write("{TRAIN: {EPOCHS: 32, MIN_LR: 1e-7}, SEED: 2}", "b.yaml")
    write("{BASE: [../a.yaml, ../b.yaml], SEED: 3, MODEL: {LIT: {norm_eps: 1e-6}}}", "sub/c.yaml")
    path = write("{BASE: [sub/c.yaml], MODEL: {LIT: {depths: [1, 1, 1, 1]}}}", "d.yaml")
    defaults, found = settings(Config()), settings(load_config(path, ["TRAIN.EMA", "0.75"], tag="mine"))
    assert {key: value for key, value in found.items() if key not in defaults or value != defaults[key]} == {
        "TRAIN.EPOCHS": 32,
        "TRAIN.MIN_LR": 1e-7,
        "TRAIN.EMA": 0.75,
        "SEED": 3,
        "TAG": "mine",
        "MODEL.LIT.norm_eps": 1e-6,
        "MODEL.LIT.depths": (1, 1, 1, 1),
    }


def test_a_mistake_is_charged_to_the_file_that_made_it(write):
    a = write("{TRAIN: {EPOCHS: 30}, MODEL: {LIT: {merging: conv, embed_dims: 97}}}", "a.yaml")
    b = write("{BASE: [a.yaml], SEED: 1}", "b.yaml")
    assert complaint(b).startswith(f"{a}: MODEL.LIT: ")
    assert complaint(b, ["TRAIN.EPOCHS", "abc"]).startswith("--opts: TRAIN.EPOCHS: ")
    c = write("{BASE: [b.yaml], TRAIN: {EPOCHS: 0}}", "c.yaml")
    assert complaint(c).startswith(f"{c}: TRAIN.EPOCHS: ")


def test_inheritance_that_goes_wrong(write):
    a, b = write("BASE: [b.yaml]", "a.yaml"), write("BASE: [a.yaml]", "b.yaml")
    assert complaint(a) == f"{b}: BASE: {a}: inherits from itself: {a} -> {b} -> {a}; remove one BASE"
    c = write("BASE: [x.yaml]", "c.yaml")
    assert complaint(c) == f"{c}: BASE: {c.with_name('x.yaml')}: no such file; {c.parent} holds a.yaml, b.yaml, c.yaml"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("TRAIN.BASE_LR", "5e-4", 0.0005),
        ("TRAIN.BASE_LR", "1.5E-3", 0.0015),
        ("TRAIN.BASE_LR", "+.5e-1", 0.05),
        ("TRAIN.BASE_LR", "1", 1.0),
        ("TRAIN.OPTIMIZER.EPS", "1e-8", 0.00000001),
        ("TRAIN.CLIP_GRAD", "null", None),
        ("TRAIN.CLIP_GRAD", "~", None),
        ("TEST.AMP_DTYPE", "off", "off"),
        ("TEST.CROP", "False", False),
        ("TAG", "12:30", "12:30"),
        ("DATA.IMG_SIZE", "256", (256, 256)),
        ("DATA.IMG_SIZE", "[256, 320]", (256, 320)),
        ("AUG.CUTMIX_MINMAX", "[0.2, 0.8]", (0.2, 0.8)),
        ("AUG.AUTO_AUGMENT", '""', ""),
        ("AUG.AUTO_AUGMENT", "original-mstd0.5", "original-mstd0.5"),
        ("MODEL.NAME", "resnet18", "resnet18"),
    ],
)
def test_values_mean_what_they_look_like(write, key, text, value):
    found = settings(load_config(write(in_yaml(key, text))))[key]
    assert found == value and type(found) is type(value)
    assert settings(load_config(write("{}\n"), [key, text]))[key] == value


def test_an_empty_opts_value_is_empty_text():
    assert load_config(CONFIGS / "lit-s.yaml", ["AUG.AUTO_AUGMENT", ""]).AUG.AUTO_AUGMENT == ""


def test_shortcuts_set_their_keys_and_none_sets_nothing():
    shortcuts = dict(resume=None, pretrained="w.pth", data_path="/a: b", batch_size=64, output="out", tag="5")
    config = load_config(CONFIGS / "lit-s.yaml", ["TAG", "x", "DATA.BATCH_SIZE", "32"], **shortcuts)
    assert (config.MODEL.RESUME, config.MODEL.PRETRAINED, config.DATA.DATA_PATH) == ("", "w.pth", "/a: b")
    assert (config.DATA.BATCH_SIZE, config.OUTPUT, config.TAG) == (64, "out", "5")
    assert complaint(CONFIGS / "lit-s.yaml", batch_size=0).startswith("--batch-size: DATA.BATCH_SIZE: ")


def test_the_home_folder_is_the_users_also_in_yaml(tiny_cfg):
    assert load_config(tiny_cfg(OUTPUT="~/runs")).OUTPUT == str(Path.home() / "runs")


def test_an_odd_batch_is_fine_without_mixing(write):
    path = write("{DATA: {BATCH_SIZE: 33}, TRAIN: {GLOBAL_BATCH: 99}, AUG: {MIXUP: 0, CUTMIX: 0}}")
    assert accumulation_steps(load_config(path), 3) == 1
    mixing = load_config(path, ["AUG.CUTMIX_MINMAX", "[0.2, 0.8]", "TRAIN.GLOBAL_BATCH", "66"])  # may be evaluated
    with pytest.raises(ConfigError, match="DATA.BATCH_SIZE: mixup and cutmix pair images, but 33 is odd; use 34"):
        accumulation_steps(mixing, 2)


LIT_S = {
    "BASE": (),
    "DATA.BATCH_SIZE": 128,
    "DATA.DATA_PATH": "",
    "DATA.DATASET": "",
    "DATA.IMG_SIZE": (224, 224),
    "DATA.INTERPOLATION": "bicubic",
    "DATA.PIN_MEMORY": True,
    "DATA.NUM_WORKERS": 8,
    "DATA.ON_BAD_IMAGE": "error",
    "MODEL.NAME": "lit_s",
    "MODEL.RESUME": "",
    "MODEL.PRETRAINED": "",
    "MODEL.NUM_CLASSES": 1000,
    "MODEL.DROP_RATE": 0.0,
    "MODEL.DROP_PATH_RATE": 0.2,
    "MODEL.LABEL_SMOOTHING": 0.1,
    "MODEL.KEYWORDS": {},
    "MODEL.OFFSET_LR_MULTI": 0.01,
    "MODEL.LIT": {},
    "TRAIN.EPOCHS": 300,
    "TRAIN.GLOBAL_BATCH": 1024,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.WEIGHT_DECAY": 0.05,
    "TRAIN.BASE_LR": 0.0005,
    "TRAIN.WARMUP_LR": 0.0000005,
    "TRAIN.MIN_LR": 0.000005,
    "TRAIN.CLIP_GRAD": 5.0,
    "TRAIN.AUTO_RESUME": True,
    "TRAIN.RESUME_CHANGED": False,
    "TRAIN.USE_CHECKPOINT": False,
    "TRAIN.SAVE_STEPS": 0,
    "TRAIN.EMA": 0.0,
    "TRAIN.LR_SCHEDULER.NAME": "cosine",
    "TRAIN.LR_SCHEDULER.STEP": "update",
    "TRAIN.LR_SCHEDULER.SCALE_BOUNDS": True,
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.OPTIMIZER.EPS": 0.00000001,
    "TRAIN.OPTIMIZER.BETAS": (0.9, 0.999),
    "AUG.COLOR_JITTER": 0.4,
    "AUG.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
    "AUG.REPROB": 0.25,
    "AUG.REMODE": "pixel",
    "AUG.RECOUNT": 1,
    "AUG.REPEATED": 1,
    "AUG.MIXUP": 0.8,
    "AUG.CUTMIX": 1.0,
    "AUG.CUTMIX_MINMAX": None,
    "AUG.MIXUP_PROB": 1.0,
    "AUG.MIXUP_SWITCH_PROB": 0.5,
    "AUG.MIXUP_MODE": "batch",
    "AUG.HFLIP": 0.5,
    "AUG.SCALE": (0.08, 1.0),
    "AUG.RATIO": (3 / 4, 4 / 3),
    "TEST.CROP": True,
    "TEST.AMP_DTYPE": "off",
    "RUNTIME.DEVICE": "auto",
    "RUNTIME.AMP_DTYPE": "bf16",
    "RUNTIME.COMPILE": False,
    "RUNTIME.CHANNELS_LAST": False,
    "RUNTIME.TIMEOUT": 30.0,
    "OUTPUT": "output",
    "TAG": "default",
    "SAVE_FREQ": 1,
    "PRINT_FREQ": 10,
    "SEED": 0,
}
LIT_TI = {
    "MODEL.NAME": "lit_ti",
    "MODEL.DROP_PATH_RATE": 0.1,
    "TRAIN.WARMUP_EPOCHS": 5,
    "TRAIN.WARMUP_LR": 0.000001,
    "TRAIN.MIN_LR": 0.00001,
    "TRAIN.CLIP_GRAD": None,
    "TRAIN.LR_SCHEDULER.STEP": "epoch",
    "TRAIN.LR_SCHEDULER.SCALE_BOUNDS": False,
    "AUG.REPEATED": 3,
}
LIT_M = {"MODEL.NAME": "lit_m", "MODEL.DROP_PATH_RATE": 0.3}
LIT_B = {"MODEL.NAME": "lit_b", "MODEL.DROP_PATH_RATE": 0.5, "TRAIN.USE_CHECKPOINT": True}


@pytest.mark.parametrize(
    ("name", "differences", "published"),
    [("lit-ti", LIT_TI, "81.1"), ("lit-s", {}, "81.5"), ("lit-m", LIT_M, "83.0"), ("lit-b", LIT_B, "83.4")],
)
def test_a_recipe_states_the_paper_and_nothing_else(name, differences, published):
    path = CONFIGS / f"{name}.yaml"
    assert settings(load_config(path)) == LIT_S | differences
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for fact in (f"bash scripts/{name}.sh 8", "1024 (8 x 128)", f"{published} top-1", "not run here"):
        assert any(line.endswith(fact) for line in header), fact


def test_the_defaults_are_the_recipe_of_lit_s():
    assert settings(Config()) == LIT_S


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rates_of_the_recipes(name):
    assert load_config(CONFIGS / f"{name}.yaml").learning_rates == pytest.approx((0.001, 0.000001, 0.00001), rel=1e-12)


def test_learning_rates_follow_the_global_batch():
    opts = ["TRAIN.GLOBAL_BATCH", "256"]
    assert load_config(CONFIGS / "lit-s.yaml", opts).learning_rates == pytest.approx((2.5e-4, 2.5e-7, 2.5e-6))
    assert load_config(CONFIGS / "lit-ti.yaml", opts).learning_rates == pytest.approx((2.5e-4, 1e-6, 1e-5))


def test_the_digits_model_is_a_small_lit():
    config = load_config(CONFIGS / "lit-digits.yaml")
    model = timm.create_model(**config.model_keywords)
    assert config.MODEL.NUM_CLASSES == 10 and config.AUG.HFLIP == 0
    assert model(torch.zeros(2, 3, *config.DATA.IMG_SIZE)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) < 5e6


@pytest.mark.parametrize("name", [*RECIPES, "lit-digits"])
def test_a_dump_reads_back_equal(write, name):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert load_config(write(dump(config))) == config


@pytest.mark.parametrize("tag", ["1e3", "off", "10", "010", "null", "~", "", "1.5", "2024-01-01", "é: #", "a\nb"])
def test_a_dump_keeps_text_text(write, tag):
    opts = ["MODEL.LIT", "{norm_eps: 1e-6, depths: [1, 1, 2, 1], class_token: true}", "DATA.IMG_SIZE", "[64, 96]"]
    config = load_config(CONFIGS / "lit-ti.yaml", opts, tag=tag)
    assert load_config(write(dump(config))) == config
    assert config.TAG == tag


def test_accumulation_follows_from_the_global_batch():
    config = load_config(CONFIGS / "lit-s.yaml")
    assert [accumulation_steps(config, processes) for processes in (1, 2, 4, 8)] == [8, 4, 2, 1]


@pytest.mark.parametrize(
    ("opts", "processes", "remedy", "size", "on"),
    [
        ([], 16, "use --batch-size 64", 64, 16),
        ([], 3, "use --batch-size 128 on 2 processes", 128, 2),
        (["DATA.BATCH_SIZE", "96"], 8, "use --batch-size 64", 64, 8),
        (["DATA.BATCH_SIZE", "100", "TRAIN.GLOBAL_BATCH", "900"], 6, "use --batch-size 50", 50, 6),  # 75 is odd
        ([], 1024, "use --batch-size 2 on 512 processes", 2, 512),
    ],
)
def test_an_indivisible_batch_proposes_one_that_works(opts, processes, remedy, size, on):
    path = CONFIGS / "lit-s.yaml"
    config = load_config(path, opts)
    with pytest.raises(ConfigError) as info:
        accumulation_steps(config, processes)
    message = str(info.value)
    assert message.startswith("DATA.BATCH_SIZE: ") and message.endswith(remedy) and "\n" not in message
    assert f"TRAIN.GLOBAL_BATCH {config.TRAIN.GLOBAL_BATCH}" in message
    accumulation_steps(load_config(path, opts, batch_size=size), on)


def test_without_mixing_the_proposal_may_be_odd():
    opts = ["AUG.MIXUP", "0", "AUG.CUTMIX", "0", "DATA.BATCH_SIZE", "100", "TRAIN.GLOBAL_BATCH", "900"]
    with pytest.raises(ConfigError, match="use --batch-size 75$"):
        accumulation_steps(load_config(CONFIGS / "lit-s.yaml", opts), 6)


def test_every_key_is_documented_in_one_line():
    def walk(section: type[Section], prefix: str = ""):
        for name, field in section.model_fields.items():
            yield prefix + name, field.description
            if isinstance(field.default, Section):
                yield from walk(type(field.default), f"{prefix}{name}.")

    documented = dict(walk(Config))
    assert documented.keys() >= LIT_S.keys()
    assert [key for key, text in documented.items() if not text or "\n" in text] == []


def test_a_configuration_does_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Config().TRAIN.EPOCHS = 3


ABLATIONS = {  # stages that attend, and how they are entered
    "pvt-small-1111": ("1111", "conv"),
    "pvt-small-0111": ("0111", "conv"),
    "pvt-small-0011": ("0011", "conv"),
    "pvt-small-0001": ("0001", "conv"),
    "pvt-small-0000": ("0000", "conv"),
    "pvt-small-1111-dtm": ("1111", "dtm"),
    "lit-s-conv": ("0011", "conv"),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_differ_from_their_recipe_in_the_model_alone(name):
    attention, merging = ABLATIONS[name]
    config = load_config(CONFIGS / "ablations" / f"{name}.yaml")
    recipe = load_config(CONFIGS / ("lit-s.yaml" if name.startswith("lit-s") else "lit-ti.yaml"))
    same = {"MODEL": recipe.MODEL, "BASE": recipe.BASE}
    assert config.model_copy(update=same) == recipe
    assert config.MODEL.model_copy(update={"NAME": recipe.MODEL.NAME, "LIT": Lit()}) == recipe.MODEL
    with torch.device("meta"):
        model = timm.create_model(**config.model_keywords)
    blocks = [stage.blocks[0] for stage in model.stages]
    assert [isinstance(block, AttentionBlock) for block in blocks] == [code == "1" for code in attention]
    assert isinstance(model.stages[1].merge, DeformableTokenMerging) == (merging == "dtm")
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1000)


def test_every_ablation_is_tested():
    assert {path.stem for path in (CONFIGS / "ablations").iterdir()} == ABLATIONS.keys()


def test_a_run_may_lie_in_a_folder_of_any_name(tmp_path):
    folder = tmp_path / "résumé 😀" / "mine" / "default"
    folder.mkdir(parents=True)
    (folder / "starts.jsonl").touch()
    (folder / "config.yaml").write_text(dump(Config()))
    name, options = locate_run(str(folder / "config.yaml"))
    config = load_config(folder / "config.yaml", options)
    assert Path(config.OUTPUT) / name / config.TAG == folder
