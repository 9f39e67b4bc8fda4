"""Nothing that is read is executed, and nobody but this machine reaches what is started. See docs/security.md."""

from __future__ import annotations

import ast
import hashlib
import ipaddress
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysae.config import ModelConfig, TrainConfig, UserError
from raysae.lm.facts import EMBEDDED
from raysae.lm.model import LanguageModel
from raysae.sae.base import SAE
from raysae.sae.files import load_sae, save_sae
from raysae.stream.cache import BlockCache
from raysae.sweep.place import saved_config
from raysae.tracking import ui
from raysae.train.checkpoint import CheckpointStore
from raysae.train.outcome import Outcomes
from tests.stream.fakes import WIDTHS, fake_contexts, fake_spec
from tests.train.synthetic import D, config

ROOT = Path(__file__).parents[1]
CODE = sorted(path for folder in ("raysae", "jobs", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

# What executes what it reads, and the argument that must be there, with its value, to make it safe (None: nothing does).
DANGEROUS = {
    "pickle.load": None, "pickle.loads": None, "pickle.Unpickler": None, "dill.load": None, "dill.loads": None, "joblib.load": None,
    "cloudpickle.load": None, "cloudpickle.loads": None, "ray.cloudpickle.load": None, "pd.read_pickle": None, "pandas.read_pickle": None,
    "yaml.load": None, "yaml.unsafe_load": None, "yaml.full_load": None, "eval": None, "exec": None, "os.system": None, "shelve.open": None,
    "torch.load": ("weights_only", True),
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"allow_pickle": True, "trust_remote_code": True, "shell": True, "weights_only": False}
EXCEPTIONS = {
    ("raysae/stream/producer.py", "ray.cloudpickle.loads"),  # a reference that came through Ray, which runs whatever code it is sent anyway
    ("raysae/analysis/lab.py", "pickle.loads"),  # an analysis's own unfinished work, in its own folder
}


def calls(path: Path) -> Iterator[tuple[str, dict[str, ast.expr], int]]:
    """Every call in a file: dotted name, keyword arguments, line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}, node.lineno


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_executes_what_it_reads(path: Path) -> None:
    name_in_repository = str(path.relative_to(ROOT))
    for name, arguments, line in calls(path):
        place = f"{name_in_repository}:{line}: {name}"
        if name in DANGEROUS and (name_in_repository, name) not in EXCEPTIONS:
            assert DANGEROUS[name], f"{place} executes what it reads"
            argument, value = DANGEROUS[name]
            assert isinstance(arguments.get(argument), ast.Constant), f"{place} without {argument}"
            assert arguments[argument].value is value, place
        for argument, value in FORBIDDEN_ARGUMENTS.items():
            given = arguments.get(argument)
            assert not (isinstance(given, ast.Constant) and given.value is value), f"{place} with {argument}={value}"


class Bomb:
    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that makes a folder when it is loaded, and the check that nothing has loaded it."""
    flag = tmp_path / "it went off"
    content = pickle.dumps(Bomb(flag))
    pickle.loads(content)
    assert flag.exists(), "it works"
    flag.rmdir()
    yield content
    assert not flag.exists()


def test_a_pickle_in_place_of_a_checkpoint_is_refused_even_with_a_right_checksum(bomb: bytes, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / f"000000001.{hashlib.sha256(bomb).hexdigest()}.safetensors").write_bytes(bomb)
    assert CheckpointStore(str(folder)).load({}) is None
    assert "is no checkpoint" in caplog.text


def test_a_pickle_in_place_of_an_saes_files_is_refused_even_with_right_checksums(bomb: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    save_sae(SAE.build(config(), D, TrainConfig()), folder)
    (folder / "sae_weights.safetensors").write_bytes(bomb)
    own = json.loads((folder / "raysae.json").read_text())
    own["sha256"]["sae_weights.safetensors"] = hashlib.sha256(bomb).hexdigest()
    (folder / "raysae.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"sae_weights\.safetensors is damaged"):
        load_sae(folder)
    (folder / "raysae.json").write_bytes(bomb)
    with pytest.raises(UserError, match=r"raysae\.json is damaged"):
        load_sae(folder)


def test_a_pickle_in_place_of_an_outcome_or_of_cached_activations_is_not_loaded(bomb: bytes, tmp_path: Path, caplog) -> None:
    outcome = tmp_path / "saes" / "a" / "outcome.json"
    outcome.parent.mkdir(parents=True)
    outcome.write_bytes(bomb)
    assert Outcomes(str(tmp_path / "saes")).load("a") is None
    assert f"{outcome} is damaged" in caplog.text
    cache = BlockCache(str(tmp_path / "cache"), fake_spec(fake_contexts()), WIDTHS, 10**9)
    path = Path(cache.path("resid_post.0", 0))
    path.parent.mkdir(parents=True)
    path.write_bytes(bomb)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert cache.load("resid_post.0", 0) is None


def test_a_studys_config_is_only_data(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    flag = tmp_path / "it went off"
    (tmp_path / "s" / "config.yaml").write_text(f"study: !!python/object/apply:os.mkdir ['{flag}']\n")
    with pytest.raises(UserError, match=r"config\.yaml is damaged"):
        saved_config(str(tmp_path), "s")
    assert not flag.exists()


def test_code_that_a_model_brings_is_not_run_unless_the_user_asks(tmp_path: Path) -> None:
    model, flag = tmp_path / "model", tmp_path / "it went off"
    shutil.copytree(EMBEDDED, model)
    described = json.loads((model / "config.json").read_text())
    described["auto_map"] = {"AutoModelForCausalLM": "brought.Brought", "AutoConfig": "brought.Brought"}
    (model / "config.json").write_text(json.dumps(described))
    (model / "brought.py").write_text(f"import os\nos.mkdir({str(flag)!r})\nclass Brought: pass\n")
    assert not ModelConfig().trust_remote_code
    LanguageModel.load(ModelConfig(name=str(model)))
    assert not flag.exists()


def test_the_ui_is_for_this_machine() -> None:
    assert ipaddress.ip_address(ui.HOST).is_loopback


LISTENING = """
import json, os
import psutil, ray
from raysae.sweep.cluster import _stay_on_loopback
_stay_on_loopback()
ray.init("local", include_dashboard=False, num_cpus=1, object_store_memory=80 * 2**20, log_to_driver=False, logging_level="error")
@ray.remote
class Actor:
    def pid(self):
        return os.getpid()
actor = Actor.remote()
pid = ray.get(actor.pid.remote())
me = psutil.Process()
processes = [me, *me.children(recursive=True)]
assert pid in [process.pid for process in processes]
print(json.dumps(sorted({(p.name(), c.laddr.ip) for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN})))
"""


def test_a_local_ray_listens_on_the_loopback_address_alone() -> None:
    done = subprocess.run([sys.executable, "-c", LISTENING], cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    listening = json.loads(done.stdout.splitlines()[-1])
    assert any(name.startswith("gcs_server") for name, _ in listening)
    assert any(name.startswith("raylet") for name, _ in listening)
    outside = [(name, ip) for name, ip in listening if ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    assert not outside
