"""The command line: what it reads, and the one sentence that every mistake gets."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from raysae.commands.help import help_text
from raysae.commands.parse import main, parse
from raysae.config import ARCHITECTURES, AnalysisConfig, SweepConfig, UserError
from raysae.knobs import fields

ROOT = Path(__file__).parents[2]
JOB = """
import sys
from raysae.commands.parse import main, parse
from raysae.config import SweepConfig
def job(argv):
    parse(SweepConfig, argv, "Trains SAEs.")
    assert not {"torch", "ray", "mlflow"} & set(sys.modules), "slow import"
main(job)
"""


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", JOB, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)


def config(*argv: str) -> SweepConfig:
    return parse(SweepConfig, argv, "")[0]


def test_no_arguments_give_the_defaults():
    assert config() == SweepConfig()


def test_overrides_of_every_kind():
    read = config(
        "--train.tokens", "2e6", "--train.batch=1_024", "--widths", "256,512", "--k", "8", "16",
        "--stream.cache", "off", "--text.max-documents", "7", "--model.trust_remote_code",
        "--model.modules", "blocks=transformer.h,attn=attn", "--sparsities", "1e-3", "--text.separator", "",
        "--hook_points", "resid_post.1", "--hook_points", "mlp_out.2", "--study", "none", "--train.warmup", "1e-2",
    )  # fmt: skip
    assert (read.train.tokens, read.train.batch, read.train.warmup) == (2_000_000, 1024, 0.01)
    assert (read.widths, read.k, read.sparsities, read.hook_points) == (
        [256, 512],
        [8, 16],
        [1e-3],
        ["resid_post.1", "mlp_out.2"],
    )
    assert read.model.trust_remote_code
    assert read.model.modules == {"blocks": "transformer.h", "attn": "attn"}
    assert (read.stream.cache, read.text.max_documents, read.text.separator, read.study) == ("off", 7, "", None)


def test_yaml_lies_between_defaults_and_command_line(tmp_path: Path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "widths: 128, 256\nk: [4]\ntrain:\n  tokens: 1e5\n  batch: 64\nstream.seed: 3\nstream: {cache: off}\nmodel:\n"
    )
    read, flags = parse(
        SweepConfig,
        ["--config", str(file), "--train.batch", "32", "--resume", "x"],
        "",
        {"--resume": {"metavar": "STUDY"}},
    )
    assert (read.widths, read.k, read.stream.seed, read.stream.cache) == ([128, 256], [4], 3, "off")
    assert (read.train.tokens, read.train.batch) == (100_000, 32)
    assert flags.resume == "x"
    assert flags.given == {
        "widths": [128, 256],
        "k": [4],
        "train.tokens": 100_000,
        "train.batch": 32,
        "stream.seed": 3,
        "stream.cache": "off",
    }


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--train.tokns", "5"], "unknown option --train.tokns: did you mean --train.tokens?"),
        (["--tokens", "5"], "unknown option --tokens: did you mean --train.tokens?"),
        (["--learning_rate=1"], "unknown option --learning_rate: did you mean --learning_rates?"),
        (["--xyzzy"], "unknown option --xyzzy: --help lists every knob"),
        (["--train.tokens", "many"], "train.tokens is many: it must be a whole number"),
        (["--train.tokens", "1.5"], "train.tokens is 1.5: it must be a whole number"),
        (["--train.tokens", "0"], "train.tokens is 0: it must be greater than 0"),
        (["--train.tokens", "-5"], "train.tokens is -5: it must be greater than 0"),
        (
            ["--train.tokens"],
            "--train.tokens: a value is missing. One that begins with - is given as --train.tokens=VALUE",
        ),
        (["--train.warmup", "2"], "train.warmup is 2: it must be at most 1"),
        (["--widths", "256,0"], "widths contains 0: each must be greater than 0"),
        (["--widths", "big"], "widths contains big: each must be a whole number"),
        (["--widths"], "widths is empty: give at least one value, or leave the flag out"),
        (["--stream.lag", "wait"], "stream.lag is wait: it must be one of stall, detach"),
        (
            ["--architectures", "topp"],
            f"architectures contains topp: each must be one of {', '.join(ARCHITECTURES)}",
        ),
        (["--stream.block_mib", "inf"], "stream.block_mib is inf: it must be a finite number"),
        (["--model.trust_remote_code", "maybe"], "model.trust_remote_code is maybe: it must be true or false"),
        (["--model.modules", "x"], "model.modules is x: it must be pairs such as blocks=transformer.h,attn=attn"),
        (["--k", "600"], "k is 600, more than the width 256: every k must be at most every width"),
        (["--stream.producers_min", "5"], "stream: producers_max is 1: it must be at least producers_min, 5"),
        (["sweep"], "unexpected 'sweep' on the command line: knobs are set as --train.tokens 2000000"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: the file cannot be read (No such file or directory)"),
    ],
)
def test_one_sentence_per_mistake(argv: list[str], sentence: str):
    with pytest.raises(UserError) as error:
        config(*argv)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("yaml", "sentence"),
    [
        ("train:\n  tokns: 5", "unknown key train.tokns in FILE: did you mean train.tokens?"),
        ("width: [5]", "unknown key width in FILE: did you mean widths?"),
        ("train: 5", "train in FILE is 5: it must be a section with keys of its own"),
        ("train: {tokens: {a: 1}}", 'train.tokens is {"a": 1}: it must be a whole number'),
        ("train: {tokens: yes}", "train.tokens is true: it must be a whole number"),
        ("study: 5", "study is 5: it must be text"),
        ("- 1", "--config FILE: it must hold keys and values, e.g. 'widths: [256, 512]'"),
        ("a: [1", "--config FILE: this is not valid YAML (line 1: expected ',' or ']', but got '<stream end>')"),
    ],
)
def test_one_sentence_per_mistake_in_yaml(tmp_path: Path, yaml: str, sentence: str):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml)
    with pytest.raises(UserError) as error:
        config("--config", str(file))
    assert str(error.value) == sentence.replace("FILE", str(file))


def test_mistake_exits_with_2_and_one_line_on_stderr():
    process = run("--train.tokens", "none")
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "error: train.tokens is none: it must be a whole number\n"


def test_help_is_instant_and_tells_every_knob():
    start = time.perf_counter()
    process = run("--help")
    seconds = time.perf_counter() - start
    assert process.returncode == 0, process.stderr
    assert max(map(len, process.stdout.splitlines())) <= 120
    for name, field in fields(SweepConfig):
        assert f"--{name} " in process.stdout
        assert " ".join(field.description.split()[:3]) in process.stdout
    assert "[default 1_000_000; > 0]" in process.stdout
    assert seconds < 5  # An idle machine takes 0.4 s


def test_parsing_imports_nothing_slow():
    assert run().returncode == 0, run().stderr


def test_main_returns_the_jobs_code_and_tells_mistakes(capsys: pytest.CaptureFixture):
    def wrong(argv: list[str]) -> int:
        raise UserError("hook point is x:\n it must be y")

    def invalid(argv: list[str]) -> int:
        SweepConfig(seeds=[-1])

    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    for job, code, told in (
        (lambda argv: None, 0, ""),
        (lambda argv: 1, 1, ""),
        (wrong, 2, "error: hook point is x: it must be y\n"),
        (invalid, 2, "error: seeds contains -1: each must be at least 0\n"),
        (interrupted, 130, "interrupted\n"),
    ):
        with pytest.raises(SystemExit) as end:
            main(job)
        assert (end.value.code, capsys.readouterr().err) == (code, told)


def test_a_required_knob():
    class Job(BaseModel):
        model_config = ConfigDict(extra="forbid")
        sae: str = Field(description="folder of an SAE")

    assert parse(Job, ["--sae", "x"], "")[0].sae == "x"
    with pytest.raises(UserError, match=r"^sae is missing$"):
        parse(Job, [], "")
    assert "none: it must be given" in help_text(Job, "")


@pytest.mark.parametrize("argv", [["--hook_points", ""], ["--widths", ",", "--k", "8"], ["--widths"]])
def test_an_empty_list_is_told(argv: list[str]) -> None:
    with pytest.raises(UserError, match=f"{argv[0][2:]} is empty"):
        parse(SweepConfig, argv, "")


def test_numbers_below_zero_are_values_in_lists_too():
    refused = {"-0.25,1": "sparsities contains -0.25", "-1e-3": "sparsities contains -1e-3"}
    for word, sentence in refused.items():
        with pytest.raises(UserError, match=sentence):
            parse(SweepConfig, ["--sparsities", word], "")


def test_a_text_that_begins_with_dashes_follows_an_equals_sign():
    assert parse(SweepConfig, ["--text.delimiter=---"], "")[0].text.delimiter == "---"
    with pytest.raises(UserError, match=r"One that begins with - is given as --text\.delimiter=VALUE"):
        parse(SweepConfig, ["--text.delimiter", "---"], "")


def test_a_file_whose_name_has_a_comma_is_one_item_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b[1]").mkdir()
    assert parse(AnalysisConfig, ["--sae", "a,b[1]", "c,d"], "")[0].sae == ["a,b[1]", "c", "d"]


@pytest.mark.parametrize("value", ["2026-99-99", "[" * 5000])
def test_yaml_whose_values_cannot_be_read_is_told_in_one_sentence(value: str, tmp_path: Path):
    (tmp_path / "sweep.yaml").write_text(f"widths: {value}\n")
    with pytest.raises(UserError, match=f"--config {tmp_path}/sweep.yaml: this is not valid YAML"):
        parse(SweepConfig, ["--config", str(tmp_path / "sweep.yaml")], "")
