"""Every shell block of the README, run as it stands (the make targets apart, which CI runs; the submission to a cluster
stands in test_submit.py, where there is one)."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT
from server import serving
from test_submit import BLOCKS, CLUSTER, TEXT, copy_of_tree

pytestmark = pytest.mark.cluster
MAKE, JOBS, SEARCH, DESCRIBE, HTTP, REGISTRY = range(6)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the tree as a user has it after `make`: with a .venv."""
    folder = copy_of_tree(tmp_path_factory.mktemp("readme"))
    (folder / ".venv").symlink_to(Path(sys.prefix), target_is_directory=True)
    yield folder
    (folder / ".venv").unlink()


def run(block: str, checkout: Path) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        env=ENVIRONMENT | {"PYTHONPATH": f"{checkout / 'platform'}{os.pathsep}{checkout}"},
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, block + done.stdout + done.stderr
    return done.stdout


def test_there_are_these_blocks_and_no_others() -> None:
    assert len(BLOCKS) == 7
    assert "ray job submit" in BLOCKS[CLUSTER]
    assert BLOCKS[MAKE].split() == ["make", "demo", "make", "test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)`?", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_that_the_readme_names_exist() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_jobs_then_http_then_registry(checkout: Path) -> None:
    said = run(BLOCKS[JOBS], checkout)
    assert "operating point" in said
    assert "meanet champion is version 1" in said
    searched = run(BLOCKS[SEARCH], checkout)
    assert "on test: accuracy" in searched
    assert "jobs.register outputs/digits --operating-point lte.json" in searched
    described = run(BLOCKS[DESCRIBE], checkout)
    assert "69.13 M" in described
    assert "modelled:horowitz_45nm+lte" in described
    store = f"sqlite:///{checkout / 'outputs/mlflow/mlflow.db'}"
    with serving(checkout, store) as url:
        block = BLOCKS[HTTP].replace("http://127.0.0.1:8000", url)
        assert url in block
        answers = run(block, checkout)
    assert answers.count('"class_name"') == 4
    assert '"exit"' in answers
    assert "class_id" in run(BLOCKS[REGISTRY], checkout)
