"""Nothing that is read is executed. Only this machine reaches what is started. See docs/security.md."""

from __future__ import annotations

import ast
import hashlib
import ipaddress
import json
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from transformers import AutoTokenizer

from raysae.analysis.instruments.regression import load_linear
from raysae.analysis.lab.recording import StreamActivations
from raysae.commands import ui
from raysae.config import ErrorsConfig, ModelConfig, TextConfig, TrainConfig, UserError
from raysae.lm.facts import EMBEDDED
from raysae.lm.model import LanguageModel
from raysae.sae.architectures import build
from raysae.sae.files import load_sae, save_sae
from raysae.stream.cache import BlockCache
from raysae.stream.skipped import Skipped
from raysae.study.place import saved_config
from raysae.text.contexts import build_contexts
from raysae.tracking.outbox import Outbox
from raysae.train.checkpoint import CheckpointStore
from raysae.train.errors import ErrorOf
from raysae.train.outcome import Outcomes
from tests.stream.fakes import WIDTHS, fake_contexts, fake_spec
from tests.train.synthetic import D, config

ROOT = Path(__file__).parents[1]
CODE = sorted(path for folder in ("raysae", "jobs", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

# Calls that execute what they read. The value is the argument that must be there to make the call safe, and its value.
# None means that nothing makes it safe.
DANGEROUS = {
    "pickle.load": None, "pickle.loads": None, "pickle.Unpickler": None, "dill.load": None, "dill.loads": None,
    "joblib.load": None, "cloudpickle.load": None, "cloudpickle.loads": None, "ray.cloudpickle.load": None,
    "ray.cloudpickle.loads": None, "pandas.read_pickle": None, "yaml.load": None, "yaml.unsafe_load": None,
    "yaml.full_load": None, "eval": None, "exec": None, "os.system": None, "shelve.open": None,
    "torch.load": ("weights_only", True),
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"allow_pickle": True, "trust_remote_code": True, "shell": True, "weights_only": False}
EXCEPTIONS = {
    # The reference came through Ray, which runs whatever code it is sent anyway
    ("raysae/stream/producer.py", "ray.cloudpickle.loads"),
    # The file is the result of an analysis's task, in the study's own folder
    ("raysae/analysis/lab/tasks.py", "pickle.loads"),
}


def imported(tree: ast.AST) -> dict[str, str]:
    """What the imported names of a file stand for: `{"pd": "pandas", "loads": "pickle.loads"}`.

    Imports anywhere in the file count.
    """
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def calls(code: str) -> Iterator[tuple[str, dict[str, ast.expr], int]]:
    """Every call in some code: its dotted name as from its module, its keyword arguments, its line."""
    tree = ast.parse(code)
    names = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            yield (
                names.get(first, first) + dot + rest,
                {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg},
                node.lineno,
            )


def dangers(code: str, exceptions: set[str] = frozenset()) -> list[str]:
    """The calls in some code that execute what they read."""
    found = []
    for name, arguments, line in calls(code):
        if name in DANGEROUS and name not in exceptions:
            argument, safe = DANGEROUS[name] or (None, None)
            given = arguments.get(argument)
            if not (isinstance(given, ast.Constant) and given.value is safe):
                found.append(f"line {line}: {name}" + (f" without {argument}={safe}" if argument else ""))
        for argument, value in FORBIDDEN_ARGUMENTS.items():
            given = arguments.get(argument)
            if isinstance(given, ast.Constant) and given.value is value:
                found.append(f"line {line}: {name} with {argument}={value}")
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_executes_what_it_reads(path: Path) -> None:
    name_in_repository = str(path.relative_to(ROOT))
    assert dangers(path.read_text(), {name for file, name in EXCEPTIONS if file == name_in_repository}) == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import pickle\npickle.loads(x)", "pickle.loads"),
        ("import pickle as p\np.load(x)", "pickle.load"),
        ("from pickle import loads\nloads(x)", "pickle.loads"),
        ("def f():\n    from pickle import Unpickler as U\n    U(x).load()", "pickle.Unpickler"),
        ("from ray import cloudpickle\ncloudpickle.loads(x)", "ray.cloudpickle.loads"),
        ("import pandas as pd\npd.read_pickle(x)", "pandas.read_pickle"),
        ("from torch import load\nload(x)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(x, weights_only=False)", "torch.load without weights_only=True"),
        ("import numpy as np\nnp.load(x, allow_pickle=True)", "numpy.load with allow_pickle=True"),
        ("eval(x)", "eval"),
    ],
)
def test_whatever_a_call_is_imported_as_it_is_seen(code: str, name: str) -> None:
    assert any(danger.endswith(f": {name}") for danger in dangers(code))
    assert dangers("import torch, pickle\ntorch.load(x, weights_only=True)\npickle.dump(x, y)") == []


class Bomb:
    def __init__(self, flag: Path):
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that makes a folder when it is loaded. Afterwards nothing may have loaded it."""
    flag = tmp_path / "it went off"
    content = pickle.dumps(Bomb(flag))
    pickle.loads(content)
    assert flag.exists(), "it works"
    flag.rmdir()
    yield content
    assert not flag.exists()


def test_a_pickle_in_place_of_a_checkpoint_is_refused_even_with_a_right_checksum(
    bomb: bytes, tmp_path: Path, caplog
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / f"000000001.{hashlib.sha256(bomb).hexdigest()}.safetensors").write_bytes(bomb)
    assert CheckpointStore(str(folder)).load({}) is None
    assert "is no checkpoint" in caplog.text


def test_a_pickle_in_place_of_an_saes_files_is_refused_even_with_right_checksums(bomb: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "sae"
    save_sae(build(config(), D, TrainConfig()), folder)
    (folder / "sae_weights.safetensors").write_bytes(bomb)
    own = json.loads((folder / "raysae.json").read_text())
    own["sha256"]["sae_weights.safetensors"] = hashlib.sha256(bomb).hexdigest()
    (folder / "raysae.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"sae_weights\.safetensors is damaged"):
        load_sae(folder)
    (folder / "raysae.json").write_bytes(bomb)
    with pytest.raises(UserError, match=r"raysae\.json is damaged"):
        load_sae(folder)


def test_a_pickle_in_place_of_an_outcome_or_of_cached_activations_is_not_loaded(
    bomb: bytes, tmp_path: Path, caplog
) -> None:
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


def test_a_pickle_in_place_of_a_note_of_the_study_is_not_loaded(bomb: bytes, tmp_path: Path, caplog) -> None:
    for path in (tmp_path / "leave.json", tmp_path / "skipped.json", tmp_path / "outbox.db"):
        path.write_bytes(bomb)
    assert CheckpointStore(str(tmp_path)).wished_leave() is None
    assert "leave.json is damaged" in caplog.text
    with pytest.raises(UserError, match=r"skipped\.json is damaged"):
        Skipped(str(tmp_path / "skipped.json"))
    with pytest.raises(sqlite3.DatabaseError):
        Outbox(tmp_path / "outbox.db")


@pytest.mark.parametrize("file", ["contexts.json", "train.tokens", "train.documents"])
def test_a_pickle_in_place_of_tokenised_text_is_not_loaded(bomb: bytes, tmp_path: Path, file: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n---\n".join(f"The {i}th document. " * 40 for i in range(60)))
    settings = TextConfig(source=str(text), delimiter="---", cache=str(tmp_path / "cache"), evaluation_fraction=0.3)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    build_contexts(settings, lambda: tokenizer, "t", 32)
    (path,) = (tmp_path / "cache").rglob(file)
    path.write_bytes(bomb)
    with pytest.warns(RuntimeWarning, match=f"{path.parent} is damaged"):
        build_contexts(settings, lambda: tokenizer, "t", 32)


def test_a_pickle_in_place_of_a_probe_or_of_recorded_activations_is_not_loaded(bomb: bytes, tmp_path: Path) -> None:
    save_sae(build(config(), D, TrainConfig()), tmp_path / "sae")
    for name in ("probe.safetensors", "context.npy", "token.npy"):
        (tmp_path / name).write_bytes(bomb)
    with pytest.raises(UserError, match="which is no probe"):
        ErrorOf(
            "resid_post.0.error", ErrorsConfig(sae=str(tmp_path / "sae"), probe=str(tmp_path / "probe.safetensors")), D
        )
    with pytest.raises(SafetensorError):
        load_linear(tmp_path / "probe.safetensors")
    with pytest.raises(ValueError, match=r"[Mm]agic|pickle"):
        StreamActivations(tmp_path, [], 1, token_loss=False)
    np.save(tmp_path / "token.npy", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"[Mm]agic|pickle"):
        StreamActivations(tmp_path, [], 1, token_loss=False)


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
from raysae.cluster.connect import stay_on_loopback
stay_on_loopback()
quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
ray.init("local", num_cpus=1, object_store_memory=80 * 2**20, **quiet)
@ray.remote
class Actor:
    def pid(self):
        return os.getpid()
actor = Actor.remote()
pid = ray.get(actor.pid.remote())
me = psutil.Process()
processes = [me, *me.children(recursive=True)]
assert pid in [process.pid for process in processes]
connections = [(p.name(), c) for p in processes for c in p.net_connections("inet")]
print(json.dumps(sorted({(name, c.laddr.ip) for name, c in connections if c.status == psutil.CONN_LISTEN})))
"""


def test_a_local_ray_listens_on_the_loopback_address_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTENING], cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    listening = json.loads(done.stdout.splitlines()[-1])
    assert any(name.startswith("gcs_server") for name, _ in listening)
    assert any(name.startswith("raylet") for name, _ in listening)
    outside = [(name, ip) for name, ip in listening if ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    assert not outside
