"""What `make bench` makes of its scripts' numbers, and the processes whose steps it compares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SPREAD = {"median": 3.2, "least": 3.0, "greatest": 3.5}
ONCE = {"median": 4.1, "least": 4.1, "greatest": 4.1}


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def side(tokens_per_second: float) -> dict:
    return {
        "tokens_per_second": tokens_per_second,
        "spread": 0.1,
        "share_of_bound": 0.45,
        "extra_mib": 100.0,
        "allocator": "default",
    }


def test_the_table_has_what_was_measured_and_is_written_as_text_and_json(tmp_path: Path):
    import bench

    steps = [
        {
            "name": "topk-d256-n4096",
            "sides": {"raysae": side(64), "sparsify": side(20)},
            "best_peer": "sparsify",
            "ratio": SPREAD,
        },
        {"name": "tied-d256-n4096", "sides": {"raysae": side(30)}},
    ]
    whole = {
        name: {"gib": ONCE, "fvu": 0.1, "seconds_ratio": ONCE, "own_seconds_ratio": ONCE}
        for name in ("raysae", "saelens", "sparsify")
    }
    state = [{"consumers": 512, "blocks": blocks, "share_of_core": 0.1} for blocks in (8, 32)]
    queue = [{"consumers": 64, "blocks": blocks, "relays": 4, "limit_consumers": 70.0} for blocks in (8, 32)]
    point = {"ratio_least": 0.97, "ratio_most": 1.04, "ratio_best_least": 1.1, "ratio_best_most": 1.2}
    for part, found in {
        "many": {"1": point, "16": point},
        "steps": steps,
        "whole_job": whole,
        "control_plane": {"state": state, "queue": queue, "relayed": queue, "relay": queue, "crowd": queue},
    }.items():
        (tmp_path / f"{part}.json").write_text(json.dumps(found))
    text = bench.write_table(tmp_path)
    assert "| topk-d256-n4096: step against sparsify | ≥ 3 × | 3.20 × (3.00 to 3.50) |" in text
    assert "| topk-d256-n4096: share of the least-work bound | ≥ 40% | 45% |" in text
    assert "N = 1: 0.97 to 1.04, N = 16: 0.97 to 1.04 |" in text
    assert "| whole job of 8 SAEs against saelens | ≥ 4 × | 4.10 × |" in text
    assert "| whole job of 8 SAEs against sparsify | ≥ 4 × | 4.10 ×; against its training alone 4.10 × |" in text
    assert "8 blocks a shard | < 100 % | 10% |" in text
    assert "32 blocks a shard | – | 70 |" in text
    assert "32 blocks a shard | ≥ 64 | 70; 70 at that rate |\n| of these a relay serves | ≥ 16 | 70 |" in text
    assert "make sweep" not in text  # Nobody has measured it yet
    sweep = {
        "wall": 390,
        "waited_share": 0.004,
        "evaluation_share": 0.17,
        "start_up": 22.4,
        "ratio_least": 0.9,
        "ratio_most": 0.95,
    } | point
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    with_sweep = bench.write_table(tmp_path)
    for row in (
        "| make sweep | ≤ 8 min | 6.5 min |",
        "| ≤ 10 % | 17% |",
        "waited | ≤ 3 % | 0.4% |",
        "step | ≤ 25 s | 22 s |",
        "| ≤ 1.10 | 0.97 to 1.04 |",
    ):
        assert row in with_sweep
    (tmp_path / "sweep.json").unlink()
    assert bench.write_table(tmp_path) == text
    assert (tmp_path / "table.md").read_text() == text + "\n"
    rows = json.loads((tmp_path / "table.json").read_text())
    assert len(rows) == len(text.splitlines()) - 2
    assert rows[0] == {
        "what": "topk-d256-n4096: step against sparsify",
        "goal": "≥ 3 ×",
        "found": "3.20 × (3.00 to 3.50)",
    }


def test_every_goal_of_a_step_is_of_a_row_that_is_measured():
    import bench
    import steps

    assert bench.BOUND_GOALS.keys() <= bench.STEP_GOALS.keys() <= steps.ROWS.keys()


def test_a_side_answers_line_by_line(tmp_path: Path):
    import steps

    worker = steps.Worker([sys.executable, str(steps.WORKER), "raysae", "topk", "16", "64", "4", "32"], {}, threads=1)
    assert worker.ask(3)["seconds"] > 0
    assert worker.ask("memory").keys() == {"bytes"}
    with pytest.raises(SystemExit, match="has ended"):
        worker.ask("nothing that it knows")
    worker.errors.close()


def test_environments_with_different_torches_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import steps

    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 1.0\n")
    other.chmod(0o755)
    with pytest.raises(SystemExit, match=r"raysae has torch \d.* and the peers have 1\.0"):
        steps.refuse_other_torch(str(other))
    monkeypatch.setattr(sys, "executable", str(other))
    steps.refuse_other_torch(str(other))
    with pytest.raises(SystemExit, match="has no torch"):
        steps.refuse_other_torch(str(tmp_path / "absent"))


def test_a_whole_job_wants_to_know_the_allocators(tmp_path: Path):
    import whole_job

    path = tmp_path / "steps.json"
    with pytest.raises(SystemExit, match="which says each side's best allocator"):
        whole_job.best_allocators(path)
    sides = {
        name: {"allocator": name} for name in ("raysae", "sparsify", "saelens", "saelens_sparse", "dictionary_learning")
    }
    path.write_text(json.dumps([{"name": "topk-d256-n4096", "sides": sides}]))
    assert whole_job.best_allocators(path) == {"raysae": "raysae", "saelens": "saelens_sparse", "sparsify": "sparsify"}


def test_a_sweep_of_few_steps_is_refused():
    command = [sys.executable, str(BENCHMARKS / "one_pass.py"), "--train.tokens", "2000"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert done.stderr == "error: the sweep has 2 steps, but 33 are measured. Raise train.tokens.\n"


def test_a_part_that_fails_leaves_its_earlier_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import bench

    script = tmp_path / "part.py"
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "PARTS", {part: (bench.of_help, str(script)) for part in ("help", "steps")})
    monkeypatch.setattr(sys, "argv", ["bench.py", "help"])
    script.write_text(f"import sys\nopen(sys.argv[2], 'w').write({json.dumps(SPREAD)!r})")
    bench.main()
    script.write_text("import sys\nopen(sys.argv[2], 'w').write('half of it')\nsys.exit(1)")
    monkeypatch.setattr(sys, "argv", ["bench.py", "help", "steps"])
    with pytest.raises(
        SystemExit, match="help failed, the table has its earlier numbers; steps failed, the table lacks it"
    ):
        bench.main()
    assert json.loads((tmp_path / "help.json").read_text()) == SPREAD
    assert "3.20 s (3.00 to 3.50)" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("bench", "stepz", "'stepz' is none of help, steps, producer"),
        ("help", "--json absent/x.json", "'absent/x.json' cannot be written, there is no folder 'absent'"),
        ("help", "--json .", "'.' is a folder: name a file"),
        ("steps", "--batch 0", "--batch: '0' is not a whole number of at least 1"),
        ("steps", "--repeats 2", "--repeats: '2' is not a whole number of at least 3"),
        ("steps", "--k 5000", "--k: 5000 is more than the 4096 latents"),
        (
            "steps",
            "--only topk-d256-n4096 --peers absent",
            'absent has no torch: `make bench ARGS="steps"` has the peers\' environment made',
        ),
        ("many", "--numbers 1,two", "--numbers: in '1,two', 'two' is not a whole number of at least 1"),
        ("many", "--numbers 1,1", "--numbers: '1,1' has a number twice"),
        ("many", "--width 8", "--width: '8' is not a whole number of at least 16"),
        ("many", "--shards 9", "--shards: '9' is not a whole number of at least 10"),
        ("many", "--figure x.doc", "--figure: 'x.doc' is no figure that can be drawn"),
        ("whole_job", "--tokens 1e3", "--tokens: '1e3' is not a whole number of at least 4096"),
        ("whole_job", "--tokens 1e5 --json absent/x.json", "there is no folder 'absent'"),
        ("one_pass", "--widths 256 --json", "--json: expected one argument"),
        ("one_pass", "--widths 256 --json absent/x.json", "there is no folder 'absent'"),
        ("one_pass", "--wdths 256", "error: unknown option --wdths: did you mean --widths?"),
        ("one_pass", "--parts --model.name /absent", "error: model.name is '/absent': neither a model's folder nor"),
        ("producer", "--model /absent", "error: model.name is '/absent': neither a model's folder nor"),
        ("producer", "--threads 0", "--threads: '0' is not a whole number of at least 1"),
        ("control_plane", "--blocks 8,0", "--blocks: in '8,0', '0' is not a whole number of at least 1"),
        ("control_plane", "--seconds nan", "--seconds: 'nan' is not a number above 0"),
        ("recovery", "hung", "'hung' is none of producer, hung producer"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(script: str, arguments: str, sentence: str):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments.split()], capture_output=True, text=True
    )
    assert done.returncode in (1, 2)
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("script", ["bench", "recovery"])
def test_help_is_the_docstring(script: str):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{script}.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert f"python benchmarks/{script}.py" in done.stdout


def test_only_rows_that_peers_have_need_their_environment(monkeypatch: pytest.MonkeyPatch):
    import steps

    measured = []
    monkeypatch.setattr(steps, "measure", lambda row, options: measured.append(row))
    monkeypatch.setattr(steps, "show", lambda result: None)
    monkeypatch.setattr(sys, "argv", ["steps.py", "--only", "tied-d256-n4096", "--peers", "absent"])
    steps.main()
    assert measured == ["tied-d256-n4096"]


def test_a_run_that_breaks_off_keeps_the_numbers_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import many

    def measure(number: int, options: object) -> dict[str, float]:
        if number == 4:
            raise SystemExit("broken")
        names = ("steady_state", "ideal", "ideal_best", "start_up", "waited_share")
        return dict.fromkeys((*names, "ratio_least", "ratio_most", "ratio_best_least", "ratio_best_most"), 1.0)

    monkeypatch.setattr(many, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["many.py", "--numbers", "1,2,4", "--json", str(tmp_path / "many.json")])
    with pytest.raises(SystemExit, match="broken"):
        many.main()
    assert json.loads((tmp_path / "many.json").read_text()).keys() == {"1", "2"}
