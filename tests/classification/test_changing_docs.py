"""The examples of docs/changing.md are valid."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

import main
from lit_classification.config_reader import dump_config, load_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/changing.md").read_text()
YAML, PYTHON = (re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL) for kind in ("yaml", "python"))
COMMANDS = re.findall(r"^.*?python main\.py ([^;\n]+)", TEXT.replace("\\\n", " ").replace("$seed", "1"), re.MULTILINE)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a working directory with the files of the page, and return the config of its first example."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(ROOT / "classification/configs", "classification/configs")
    Path("configs").symlink_to("classification/configs")
    path = Path("configs/flowers.yaml")
    path.write_text(YAML[0])
    (source,) = [source for source in PYTHON if "register_merging" in source]
    Path("my_merging.py").write_text(source)
    Path("output/flowers/default").mkdir(parents=True)
    Path("output/flowers/default/config.yaml").write_text(dump_config(load_config(path)))
    return path


@pytest.mark.parametrize("example", YAML[1:])
def test_keys(config: Path, example: str) -> None:
    path = config.with_name("example.yaml")
    path.write_text(f"BASE: [{config.name}]\n{example}")
    assert load_config(path) != load_config(config)


def test_examples_are_found() -> None:
    assert len(YAML) > 7 and len(PYTHON) == 3 and len(COMMANDS) > 6


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(config: Path, command: str) -> None:
    args = vars(main.parse_args(shlex.split(command)))
    cfg, _, opts = args.pop("cfg") or config, args.pop("mode"), args.pop("opts")
    assert load_config(cfg, opts, **args) != load_config(config, resume="") or command == f"--cfg {config}"


def test_mergings_and_multiply_adds(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = [source for source in PYTHON if "multiply_adds" in source]
    exec(source, {})
    assert capsys.readouterr().out == "27.3 M parameters, 4.08 G multiply-adds\n"


def test_wrapper_compiles() -> None:
    (source,) = [source for source in PYTHON if "wandb" in source]
    compile(source, "train_wandb.py", "exec")
