"""Commands, options, keys and files of the original implementation: each is translated, or answered."""

import functools
import http.server
import json
import threading
from pathlib import Path

import pytest
import timm
import torch
import yaml

import main
from lit_backbone import read_checkpoint
from lit_classification.config import Config, ConfigError, flatten
from lit_classification.config_reader import load_config

CONFIGS = Path(main.__file__).parent / "configs"
LIT_KEYS = {
    **{"PATCH_SIZE": 4, "IN_CHANS": 3, "EMBED_DIM": 128, "DEPTHS": [2, 2, 18, 2], "NUM_HEADS": [4, 8, 16, 32]},
    **{"WINDOW_SIZE": 7, "MLP_RATIO": 4.0, "QKV_BIAS": True, "QK_SCALE": None, "APE": False, "PATCH_NORM": True},
    "HAS_MSA": [0, 0, 1, 1],
}
DUMP = {  # all keys but LOCAL_RANK, as in config.json of a run on 8 GPUs
    "AMP_OPT_LEVEL": "O1",
    "AUG": {
        **{"AUTO_AUGMENT": "rand-m9-mstd0.5-inc1", "COLOR_JITTER": 0.4, "CUTMIX": 1.0, "CUTMIX_MINMAX": None},
        **{"MIXUP": 0.8, "MIXUP_MODE": "batch", "MIXUP_PROB": 1.0, "MIXUP_SWITCH_PROB": 0.5, "RECOUNT": 1},
        **{"REMODE": "pixel", "REPROB": 0.25},
    },
    "BASE": [""],
    "DATA": {
        **{"BATCH_SIZE": 128, "CACHE_MODE": "part", "DATASET": "imagenet", "DATA_PATH": "/data/imagenet"},
        **{"IMG_SIZE": 224, "INTERPOLATION": "bicubic", "NUM_WORKERS": 10, "PIN_MEMORY": True, "ZIP_MODE": False},
    },
    **{"EVAL_MODE": False, "OUTPUT": "output/lit_base/default", "PRINT_FREQ": 10, "SAVE_FREQ": 1},
    "MODEL": {
        **{"DROP_PATH_RATE": 0.5, "DROP_RATE": 0.0, "LABEL_SMOOTHING": 0.1, "NAME": "lit_base", "NUM_CLASSES": 1000},
        "LIT": LIT_KEYS,
        **{"OFFSET_LR_MULTI": 0.01, "RESUME": "", "TYPE": "lit"},
    },
    **{"SEED": 0, "TAG": "default", "TEST": {"CROP": True}, "THROUGHPUT_MODE": False},
    "TRAIN": {
        **{"ACCUMULATION_STEPS": 0, "AUTO_RESUME": True, "BASE_LR": 0.001, "CLIP_GRAD": 5.0, "EPOCHS": 300},
        "LR_SCHEDULER": {"DECAY_EPOCHS": 30, "DECAY_RATE": 0.1, "NAME": "cosine"},
        **{"MIN_LR": 1e-5, "START_EPOCH": 0, "USE_CHECKPOINT": False, "WARMUP_EPOCHS": 20, "WARMUP_LR": 1e-6},
        "OPTIMIZER": {"BETAS": [0.9, 0.999], "EPS": 1e-8, "MOMENTUM": 0.9, "NAME": "adamw"},
        "WEIGHT_DECAY": 0.05,
    },
}
LIT_TI = {  # lit-ti.json
    **{"model": "lit_ti", "batch_size": 128, "num_workers": 10, "epochs": 300, "data_path": "/data/imagenet"},
    **{"exp_name": "lit_ti", "data_set": "IMNET", "dconv_lr_ratio": 0.01},
}


def write(path: Path, tree: dict) -> Path:
    path.write_text(json.dumps(tree) if path.suffix == ".json" else yaml.safe_dump(tree))
    return path


def results(config: Config) -> dict:
    """Return the settings that affect results, and the model. The optimizer is AdamW in all of them."""
    values = flatten(config.model_dump())
    names = ("DATA.DATA_PATH", "DATA.DATASET", "DATA.NUM_WORKERS", "TAG", "OUTPUT", "BASE", "TRAIN.USE_CHECKPOINT")
    values = {k: v for k, v in values.items() if k not in names and not k.startswith(("TRAIN.OPTIMIZER.", "MODEL.LIT"))}
    with torch.device("meta"):
        model = timm.create_model(**config.model_keywords)
    return values | {"layers": str(model), "shapes": {k: v.shape for k, v in model.state_dict().items()}}


@pytest.mark.parametrize(
    ("label", "recipe", "rate", "depth"), [("lit_small", "lit-s", 0.2, 6), ("lit_medium", "lit-m", 0.3, 18)]
)
def test_yaml_files_give_the_recipes(tmp_path, capsys, label, recipe, rate, depth):
    lit = {"EMBED_DIM": 96, "DEPTHS": [2, 2, depth, 2], "NUM_HEADS": [3, 6, 12, 24]}
    model = {"TYPE": "lit", "NAME": label, "DROP_PATH_RATE": rate, "OFFSET_LR_MULTI": 0.01, "LIT": lit}
    data = {"NUM_WORKERS": 10, "BATCH_SIZE": 128, "DATA_PATH": "/data1", "DATASET": "imagenet"}
    config = load_config(write(tmp_path / "lit.yaml", {"MODEL": model, "DATA": data}))
    assert results(config) == results(load_config(CONFIGS / f"{recipe}.yaml"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and f"MODEL.NAME {label}: read as MODEL.NAME {recipe.replace('-', '_')}" in "".join(lines)


def test_other_variants_can_inherit_from_a_yaml_file(tmp_path):
    lit = {"EMBED_DIM": 96, "DEPTHS": [2, 2, 6, 2], "NUM_HEADS": [3, 6, 12, 24]}
    path = write(tmp_path / "lit.yaml", {"MODEL": {"NAME": "lit_small", "LIT": lit | {"MLP_RATIO": 2.0}}})
    assert load_config(path).MODEL.LIT.embed_dims is load_config(path).MODEL.LIT.depths is None
    assert load_config(path).MODEL.LIT.mlp_ratios == (2.0,) * 4
    config = load_config(write(tmp_path / "child.yaml", {"BASE": ["lit.yaml"], "MODEL": {"NAME": "lit_b"}}))
    assert config.model_keywords.get("embed_dims") is None


def test_keys_of_the_json_file_are_unknown_elsewhere(tmp_path):
    for opts in (["lr", "5"], ["epochs", "5"], ["model.NAME", "lit_s"]):
        with pytest.raises(ConfigError, match=f"--opts: {opts[0].partition('.')[0]}"):
            load_config(CONFIGS / "lit-s.yaml", opts)


def test_dump_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="config.json: LOCAL_RANK: is in dumps of runs, .* start from the run's YAML"):
        load_config(write(tmp_path / "config.json", DUMP | {"LOCAL_RANK": 0}))


def test_json_file_of_lit_ti_gives_its_recipe(tmp_path):
    config = load_config(write(tmp_path / "lit-ti.json", LIT_TI))
    assert results(config) == results(load_config(CONFIGS / "lit-ti.yaml"))
    assert (config.DATA.DATA_PATH, config.DATA.NUM_WORKERS, config.TAG) == ("/data/imagenet", 10, "lit_ti")
    config = load_config(write(tmp_path / "lit-ti.json", LIT_TI | {"drop_path": 0.2, "lr": 1e-3, "input_size": 256}))
    assert (config.MODEL.DROP_PATH_RATE, config.TRAIN.BASE_LR, config.DATA.IMG_SIZE) == (0.2, 1e-3, (256, 256))
    with pytest.raises(ConfigError, match="data_set: is now DATA.DATASET"):
        load_config(write(tmp_path / "lit-ti.json", LIT_TI | {"data_set": "INAT"}))


REFUSED = {
    **{"MODEL.LIT.PATCH_SIZE": 2, "MODEL.LIT.IN_CHANS": 1, "MODEL.LIT.QKV_BIAS": False, "MODEL.LIT.QK_SCALE": 0.5},
    **{"MODEL.LIT.APE": True, "MODEL.LIT.PATCH_NORM": False, "MODEL.TYPE": "swin", "DATA.ZIP_MODE": True},
    **{"EVAL_MODE": True, "THROUGHPUT_MODE": True, "TRAIN.ACCUMULATION_STEPS": 2, "TRAIN.START_EPOCH": 5},
    "MODEL.DROP_RATE": 0.1,
}


@pytest.mark.parametrize("key", REFUSED)
def test_other_values_are_answered(key):
    with pytest.raises(ConfigError, match=f"^--opts: {key}: is (gone|now|always|not implemented)") as info:
        load_config(CONFIGS / "lit-s.yaml", [key, json.dumps(REFUSED[key])])
    assert "did you mean" not in str(info.value)


def test_architecture_is_translated():
    opts = "MODEL.LIT.EMBED_DIM 48 MODEL.LIT.HAS_MSA [0,0,0,1] MODEL.LIT.MLP_RATIO 2".split()
    lit = load_config(CONFIGS / "lit-s.yaml", opts).MODEL.LIT
    assert lit.embed_dims == (48, 96, 192, 384) and lit.mlp_ratios == (2, 2, 2, 2)
    assert lit.attention == (False, False, False, True)


# Options

OPTIONS = """
--accumulation-steps=2 --aa=x --amp-opt-level=O1 --auto-resume --batch-size=8 --block_type=x --cache-mode=part
--cfg=x.yaml --clip-grad=1 --color-jitter=0.4 --config=x.yaml --cooldown-epochs=10 --cutmix=1 --cutmix-minmax=0.2
--data-path=x --data-set=IMNET --dconv_lr_ratio=0.01 --decay-epochs=30 --decay-rate=0.1 --device=cuda --dist-eval
--dist_url=x --dr=0.1 --drop=0 --drop-path=0.1 --epochs=30 --eval --exp_name=x --finetune=x --fp32-resume
--inat-category=name --input-size=224 --local-rank=0 --local_rank=0 --lr=1e-3 --lr-noise=0.1 --lr-noise-pct=0.6
--lr-noise-std=1 --min-lr=1e-5 --mixup=0.8 --mixup-mode=batch --mixup-prob=1 --mixup-switch-prob=0.5 --model=lit_ti
--momentum=0.9 --no-pin-mem --no-repeated-aug --num_workers=4 --opt=adamw --opt-betas=0.9 --opt-eps=1e-8 --output=x
--output_dir=x --patch_type=x --patience-epochs=10 --pin-mem --recount=1 --remode=pixel --repeated-aug --reprob=0.25
--resplit --resume=x --sched=cosine --seed=0 --smoothing=0.1 --start_epoch=0 --tag=x --throughput
--train-interpolation=bicubic --use-checkpoint --use-mcloader --vis_image=x --warmup-epochs=5 --warmup-lr=1e-6
--weight-decay=0.05 --world_size=8 --zip
""".split()


def test_every_option_is_accepted_or_answered(capsys):
    opts = []
    for option in OPTIONS:
        try:
            args = main.parse_args(["--cfg", "a.yaml", option])
            opts += [] if "x" in args.opts else args.opts
        except SystemExit:
            message = capsys.readouterr().err.splitlines()[-1]
            assert f"argument {option.partition('=')[0]}: is " in message and "unrecognized" not in message
    assert len(opts) > 40
    load_config(CONFIGS / "lit-ti.yaml", opts)


def test_options_are_rewritten_with_one_line_each(capsys):
    command = "--local_rank 0 --config a.json --use-checkpoint --seed 3 --opts TAG a --epochs=5 --output_dir out"
    args = main.parse_args(command.split())
    assert (args.cfg, args.output) == ("a.json", "out")
    assert args.opts == "TAG a TRAIN.USE_CHECKPOINT true SEED 3 TRAIN.EPOCHS 5".split()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and lines[0] == "--local_rank: ignored: torchrun sets LOCAL_RANK"
    assert lines[2] == "--use-checkpoint: --opts TRAIN.USE_CHECKPOINT true"


# Checkpoints


def test_run_of_the_original_is_not_continued(tiny_cfg, tmp_path):
    path = tmp_path / "ckpt_epoch_1.pth"
    torch.save({"model": {}, "optimizer": {}, "lr_scheduler": {}, "epoch": 1, "max_accuracy": 1.0}, path)
    with pytest.raises(SystemExit, match="a run of the original .* cannot be continued. Start .* with --pretrained"):
        main.main(["--cfg", str(tiny_cfg()), "--resume", str(path)])


def test_checkpoint_is_downloaded_once(tiny_cfg, tmp_path, monkeypatch):
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            requests.append(self.path)

    config = load_config(cfg := tiny_cfg(TRAIN={"EPOCHS": 1, "WARMUP_EPOCHS": 0}))
    (tmp_path / "files").mkdir()
    torch.save({"model": timm.create_model(**config.model_keywords).state_dict()}, tmp_path / "files" / "w.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "files")
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        main.main(["--cfg", str(cfg), "--pretrained", f"{url}/w.pth"])
        main.main(["--cfg", str(cfg), "--eval", "--resume", f"{url}/w.pth"])
        with pytest.raises(SystemExit, match=f"{url}/absent.pth: download failed"):
            main.main(["--cfg", str(cfg), "--eval", "--resume", f"{url}/absent.pth"])
        server.shutdown()
    assert requests.count("/w.pth") == 1
    assert read_checkpoint(f"{url}/w.pth").keys() == {"model"}  # from the cache
