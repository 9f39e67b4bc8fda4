"""What a job hears when no Ray cluster answers, and where a Ray of its own starts."""

import os
import socket
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from raysae.cluster import connect as connect_module
from raysae.cluster.connect import connect, folder_of_sockets
from raysae.config import UserError


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=f"resources.address is {address}, where no Ray cluster answers"):
        connect(address, 0)


def test_ray_gets_a_short_folder_where_the_usual_one_is_too_deep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("x" * 40)
    deep.mkdir()
    for variable, value, expected in (
        ("TMPDIR", str(deep), "/tmp/ray"),
        ("TMPDIR", "/nowhere", "/tmp/ray"),
        ("TMPDIR", "/var/tmp", "/var/tmp/ray"),
        ("RAY_TMPDIR", "/dev/shm", "/dev/shm/ray"),
    ):
        monkeypatch.setenv(variable, value)
        assert folder_of_sockets() == expected
    monkeypatch.setattr(connect_module, "LONGEST_TMPDIR", 0)
    with pytest.raises(UserError, match=r"^RAY_TMPDIR is /dev/shm, where Ray cannot make its sockets: set it to"):
        folder_of_sockets()


ELSEWHERE = """
import os, sys, ray
from raysae.cluster.connect import connect
connect(None, 80 * 2**20)
@ray.remote
class Actor:
    def about(self):
        return sys.executable, os.environ["OMP_WAIT_POLICY"]
from raysae.processes import ENVIRONMENT
print(*ray.get(Actor.options(num_cpus=0.1, runtime_env=ENVIRONMENT).remote().about.remote(), timeout=90), sep="\\n")
"""


def test_workers_start_with_an_interpreter_and_temporary_files_in_awkward_folders(tmp_path: Path) -> None:
    folder = tmp_path / "it's my (new) environment"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "all.pth").write_text("\n".join([sysconfig.get_path("purelib"), str(Path(__file__).parents[2])]))
    temporary = tmp_path / ("deep" * 10)
    temporary.mkdir()
    done = subprocess.run(
        [folder / "bin" / "python", "-c", ELSEWHERE], capture_output=True, text=True, timeout=200,
        env=os.environ | {"TMPDIR": str(temporary)}, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == f"{folder}/bin/python\nPASSIVE\n", done.stderr


def test_an_error_of_ray_at_its_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments, **options):
        raise RuntimeError("Version mismatch: 2.1 and 2.2\nmore")

    monkeypatch.setattr(connect_module.ray, "init", broken)
    monkeypatch.setattr(connect_module, "_check_reachable", lambda address: None)
    monkeypatch.setattr(connect_module, "stay_on_loopback", lambda: None)  # It is for the whole process
    with pytest.raises(UserError, match=r"address is there:1, where no Ray cluster answers \(Version mismatch: 2\.1"):
        connect("there:1", 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"address is unset, and Ray does not start on this machine \(Version mismatch"):
        connect(None, 0)
