"""Every mistake of a user gets one sentence and exit code 2, before anything starts.

The sentence names the field, the value and what would be right.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.job import arguments, run

CASES = {
    "unknown hook point": ({"hook_points": "resid_mid.2"}, ["resid_mid.2", "resid_post"]),
    "layer out of range": ({"hook_points": "resid_post.9"}, ["resid_post.9", "4"]),
    "k above width": ({"widths": "8", "k": "16"}, ["16", "8"]),
    "width zero": ({"widths": "0"}, ["widths", "0", "greater than 0"]),
    "tokens negative": ({"train__tokens": "-5"}, ["train.tokens", "-5", "greater than 0"]),
    "too little text": ({"train__tokens": "50000000"}, ["train.tokens", "stream.epochs"]),
    "too little held-out text": ({"evaluation__rows": "50000000"}, ["evaluation.rows", "text.evaluation_fraction"]),
    "no such file": ({"text__source": "/nowhere/*.txt"}, ["text.source", "/nowhere/*.txt"]),
    "no such model": ({"model__name": "/nowhere/model"}, ["model.name", "/nowhere/model"]),
    "no GPU": ({"resources__trainer_gpus": "1"}, ["resources.trainer_gpus", "no GPU"]),
    "more CPUs than there are": ({"resources__trainer_cpus": "4000"}, ["CPU", "4000"]),
    "unknown option": ({"trian__tokens": "5"}, ["trian.tokens", "train.tokens"]),
    "one shard too large": ({"stream__mib_in_flight": "1"}, ["stream.mib_in_flight", "1"]),
    "context too long": ({"stream__context_length": "100000"}, ["stream.context_length", "100000", "512"]),
    "an error of no SAE": ({"hook_points": "resid_post.2.nonlinear"}, ["resid_post.2.nonlinear", "errors.sae"]),
    "a probe that is not there": (
        {"hook_points": "resid_post.2.linear", "errors.sae": "/nowhere/sae"},
        ["errors.sae", "/nowhere/sae"],
    ),
    "no such study": ({"study": None, "resume": "nothing"}, ["nothing"]),
    "no such fact": ({"allow": "torch,weather"}, ["--allow weather", "device", "producer.attention"]),
}


def test_a_study_goes_on_with_its_own_config_but_for_faults(tmp_path: Path) -> None:
    words = f"--output {tmp_path} --resume s --faults.hang_seconds 5 --train.tokens 9 --k 3".split()
    sentence = "--resume s keeps the study's own config. Leave out --k, --train.tokens: only --faults.* can be changed"
    assert run(words).stderr == f"error: {sentence}\n"
    assert "there is no such study" in run(words[:6]).stderr


def test_an_output_that_is_nowhere() -> None:
    assert (
        run(["--output", "s3://"]).stderr
        == "error: output: 's3://' names no folder: give one, e.g. runs or s3://bucket/runs\n"
    )


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_exit_code_two(case: str, shared_data: Path, tmp_path: Path) -> None:
    knobs, words = CASES[case]
    given = (
        ["--output", str(tmp_path / "runs"), "--resume", "nothing"]
        if "resume" in knobs
        else arguments(shared_data, tmp_path, **knobs)
    )
    done = run(given, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists(), "nothing was started"


def test_unknown_key_in_yaml(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("train:\n  tokenz: 5\n")
    done = run(["--config", str(tmp_path / "sweep.yaml")])
    assert done.returncode == 2
    assert "train.tokenz" in done.stderr
    assert "train.tokens" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--allow torch", "--allow torch goes with --resume STUDY: a new sweep has no checkpoints to differ from"),
        ("--architectures gated --k 8", "k is given, but gated does not take it: give --sparsities, or name an"),
        ("--sparsities 0.1", "sparsities is given, but topk does not take it: give --k, or name an"),
        ("--train.p_end 0.2 --train.decay 0.9", "p_end is 0.2, but sparsity_warmup 0.1 and decay 0.9 leave no steps"),
    ],
)
def test_what_a_sweep_cannot_use_is_refused(words, sentence):
    refused = run(words.split())
    assert refused.returncode == 2
    assert sentence in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
