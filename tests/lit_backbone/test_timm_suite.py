"""timm's model tests, run on the models of this package.

They are part of timm's source distribution only, which pip downloads once to pytest's cache.
"""

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import timm

ROOT = Path(__file__).parents[2]
CLASS_TOKEN_MODELS = {"lit_ti", "pvt_small_full_msa"}  # timm's "non-standard" models
FILTERS = {"FEAT_INTER_FILTERS": "'lit'", "NON_STD_FILTERS": "'lit_ti*', 'pvt_small_full_msa*'"}
EXCLUDED = "torchscript or inference or pretrained"  # deprecated by PyTorch; needs a network


@pytest.fixture(scope="module")
def timm_tests(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy timm's tests and add the models of this package to their filters."""
    name = f"timm-{timm.__version__}"
    archive = pytestconfig.cache.mkdir("timm") / f"{name}.tar.gz"
    if not archive.is_file():
        download = [sys.executable, *"-m pip download --no-deps --no-binary timm --dest".split(), archive.parent]
        result = subprocess.run([*download, f"timm=={timm.__version__}"], capture_output=True, text=True)
        if not archive.is_file():
            report = pytest.fail if os.environ.get("CI") else pytest.skip
            report(f"{name}: pip cannot download the source distribution ({result.stderr.strip()[-500:]})")
    scratch = tmp_path_factory.mktemp("timm")
    with tarfile.open(archive) as tar:
        for file in ("conftest.py", "test_models.py"):
            (scratch / file).write_bytes(tar.extractfile(f"{name}/tests/{file}").read())
    source = (scratch / "test_models.py").read_text()
    for filters, models in FILTERS.items():
        assert source.count(f"\n{filters} = [\n") == 1
        source = source.replace(f"\n{filters} = [\n", f"\n{filters} = [\n    {models},\n")
    (scratch / "test_models.py").write_text(f"import lit_backbone\n{source}")
    (scratch / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\nfilterwarnings = ignore\n")
    return scratch


def expected_tests(model: str) -> set[str]:
    names = "forward[1 backward[2 forward_fx[1 backward_fx[2 forward_intermediates[1 forward_intermediates_features[1"
    tests = {f"test_model_{name}-{model}]" for name in names.split()}
    tests |= {f"test_prune_intermediate_layers_contract[{model}]"}
    if model in CLASS_TOKEN_MODELS:
        return tests | {f"test_model_default_cfgs_non_std[1-{model}.in1k]"}
    return tests | {f"test_model_default_cfgs[1-{model}.in1k]", f"test_model_forward_features[1-{model}]"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_timm_model_tests(timm_tests: Path) -> None:
    models = ("lit_s", "lit_ti", "pvt_small_full_msa")  # LIT-M and LIT-B repeat LIT-S
    report = timm_tests / "report.xml"
    selection = f"({' or '.join(models)}) and not ({EXCLUDED})"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", selection, f"--junitxml={report}"],
        cwd=timm_tests,
        env=os.environ | {"TIMEOUT": "600"},  # timm's time limit of a test
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    passed = {case.get("name") for case in ElementTree.parse(report).iter("testcase") if len(case) == 0}
    assert passed >= set.union(*map(expected_tests, models))
