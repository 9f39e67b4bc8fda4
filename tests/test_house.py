"""The contracts of `make lint` hold, and each breaks on an import that it forbids."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of the package and its contracts, for planting imports."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "raysae", folder / "raysae", ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(house: Path) -> str:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=house, capture_output=True, text=True, timeout=120).stdout


def test_contracts_hold(house):
    assert "4 kept, 0 broken" in lint(house)


@pytest.mark.parametrize(
    ("module", "planted", "contract"),
    [
        ("stream/shard.py", "from raysae.sweep import run", "Rooms import downwards only"),
        ("study/place.py", "from raysae.train import schedule", "Rooms import downwards only"),
        ("spare.py", "", "Rooms import downwards only"),
        ("analysis/report/page.py", "from raysae.analysis.dark_matter import claims", "Within the analyses too"),
        ("stream/state.py", "from raysae.stream import queue", "No circles"),
        ("sae/base.py", "from raysae.sae import architectures", "No circles"),
        ("kernels/rows.py", "import ray", "Numerics import no Ray and no MLflow"),
        ("analysis/dark_matter/measures/pursuit.py", "import mlflow", "Numerics import no Ray and no MLflow"),
    ],
)
def test_a_planted_import_breaks_its_contract(house, module, planted, contract):
    path = house / "raysae" / module
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\n{planted}\n")
    try:
        assert f"{contract} BROKEN" in lint(house)
    finally:
        path.write_text(before) if before is not None else path.unlink()


def test_imports_for_type_checkers_are_free(house):
    path = house / "raysae" / "kernels" / "rows.py"
    before = path.read_text()
    path.write_text(f"{before}\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import ray\n")
    try:
        assert "4 kept, 0 broken" in lint(house)
    finally:
        path.write_text(before)
