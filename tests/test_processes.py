import math
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from raysae.config import UserError
from raysae.processes import apart, command, job_script


def bad(value: str) -> None:
    raise UserError(f"text.source is {value!r}")


def test_it_returns_and_raises_what_the_function_does_from_another_process():
    assert apart(math.sqrt, 4.0) == 2.0
    assert apart(os.getpid) != os.getpid()
    with pytest.raises(UserError, match=r"text\.source is 'none'"):
        apart(bad, "none")


def test_a_process_that_dies_is_told():
    with pytest.raises(BrokenProcessPool):
        apart(os._exit, 3)


INTERRUPTED = """
import sys, time
from pathlib import Path
from raysae.processes import apart, command, job_script

def work(folder):
    try:
        Path(folder, "begun").touch()
        time.sleep(60)
    finally:
        Path(folder, "tidied").touch()

if __name__ == "__main__":
    apart(work, sys.argv[1])
"""


def test_when_interrupted_the_function_tidies_up(tmp_path):
    (tmp_path / "job.py").write_text(INTERRUPTED)
    job = subprocess.Popen(
        [sys.executable, tmp_path / "job.py", str(tmp_path)], start_new_session=True, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "begun").exists():
        assert job.poll() is None
    os.killpg(job.pid, signal.SIGINT)  # Ctrl-C sends the same
    assert job.wait(30) != 0
    assert (tmp_path / "tidied").exists()


def test_a_line_to_paste_is_one_that_the_shell_reads_back(tmp_path, monkeypatch):
    folder = tmp_path / "it's my $project; (1)"
    folder.mkdir()
    monkeypatch.chdir(folder)
    line = command("-c", "import sys; print(sys.argv[1:])", "--output", f"{folder}/a b", "*", "%20")
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{['--output', f'{folder}/a b', '*', '%20']}\n", done.stderr


def test_a_job_is_told_by_the_path_of_its_script(tmp_path, monkeypatch):
    repository = Path(__file__).parents[1]
    monkeypatch.chdir(repository)
    assert job_script("scaling_sweep.py") == "jobs/scaling_sweep.py"
    monkeypatch.chdir(tmp_path)
    assert job_script("scaling_sweep.py") == str(repository / "jobs" / "scaling_sweep.py")
