"""The lab finds a study's SAEs, keeps what a job has finished, and answers each mistake with a sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import ray
import torch

from raysae.analysis.dark_matter import error_regression
from raysae.analysis.dark_matter.error_regression import _half_trained
from raysae.analysis.dark_matter.probes import Shown, main_hook_point, regressions
from raysae.analysis.instruments.intervals import with_intervals
from raysae.analysis.lab.lab import Lab, _told
from raysae.analysis.lab.results import Findings
from raysae.analysis.lab.subjects import Subject
from raysae.analysis.lab.tasks import Task
from raysae.config import AnalysisConfig, ErrorsConfig, EvaluationConfig, SAEConfig, SweepConfig, TrainConfig, UserError
from raysae.knobs import from_flat
from raysae.sae.architectures import build
from raysae.sae.files import load_sae, save_sae
from raysae.study.plan import plan
from raysae.tracking.runs import flatten

D, HOOK = 64, "resid_post.2"  # Width and a hook point of stories260K
TOPK = SAEConfig(hook_point=HOOK, width=96, k=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        "local",
        include_dashboard=False,
        num_cpus=2,
        object_store_memory=128 * 2**20,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


def saved(folder: Path, width: int, d: int = D, hook_point: str = HOOK) -> str:
    """Saves an untrained SAE and returns its folder."""
    sae = build(SAEConfig(hook_point=hook_point, width=width, k=8, learning_rate=1e-3), d, TrainConfig())
    save_sae(sae, folder / f"w{width}")
    return str(folder / f"w{width}")


@pytest.fixture(scope="session")
def text_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("text")


@pytest.fixture
def settings(tmp_path: Path, shared_data: Path, stories_model: Path, text_cache: Path) -> dict:
    """Settings of an analysis of SAEs of stories260K on the first 3,000 stories."""
    stories = str(shared_data / "text/tinystories/train_head.txt")
    text = {"source": stories, "delimiter": "<|endoftext|>", "max_documents": 3000, "cache": str(text_cache)}
    return {
        "model": {"name": str(stories_model)},
        "text": text,
        "stream": {"context_length": 64},
        "tokens": 12_000,
        "output": str(tmp_path / "runs"),
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "replicates": 20,
    }


def lab_of(settings: dict, **changes: object) -> Lab:
    return Lab(AnalysisConfig.model_validate(settings | changes))


# ---------------------------------------------------------------- finding


def test_saes_in_folders_take_model_and_text_from_the_settings(settings: dict, tmp_path: Path) -> None:
    folders = [saved(tmp_path, 96), saved(tmp_path, 128)]
    lab = lab_of(settings, sae=folders)
    assert [sae.width for sae in lab.saes.values()] == [96, 128]
    assert lab.hook_points == [HOOK]
    assert lab.plan.evaluation.context_length == 64
    assert lab.study == lab_of(settings, sae=folders[::-1]).study, "the same SAEs are the same study"
    assert lab.study != lab_of(settings, sae=folders[:1]).study
    loaded = next(iter(lab.saes.values())).load()
    assert (loaded.n, loaded.d_in) == (96, D)


def test_of_several_hook_points_those_named(settings: dict, tmp_path: Path) -> None:
    folders = [saved(tmp_path, 96), saved(tmp_path, 128, hook_point="mlp_out.1")]
    lab = lab_of(settings, sae=folders)
    assert lab.hook_points == [HOOK, "mlp_out.1"]
    assert main_hook_point(lab) == HOOK
    more = saved(tmp_path, 192, hook_point="mlp_out.1")
    assert main_hook_point(lab_of(settings, sae=[*folders, more])) == "mlp_out.1"


def test_of_a_dataset_as_much_text_is_read_as_is_wanted(settings: dict, tmp_path: Path, shared_data: Path) -> None:
    stories = (shared_data / "text/tinystories/train_head.txt").read_text().split("<|endoftext|>")[:2500]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    text = {"source": f"hf:json:{tmp_path}/stories.jsonl", "evaluation_fraction": 0.5, "cache": str(tmp_path / "text")}
    settings |= {"text": text, "sae": [saved(tmp_path, 96)]}
    lab = lab_of(settings, tokens=None)
    assert lab.shards == round(60_000 / lab.plan.evaluation.rows_per_shard)
    more = lab_of(settings, tokens=150_000)
    assert more.shards * more.plan.evaluation.rows_per_shard >= 150_000
    with pytest.raises(UserError, match="held-out text yields"):
        lab_of(settings, tokens=10**7).shards  # noqa: B018

    sizes = {
        "train": more.sweep.train.model_copy(update={"tokens": 20_000}),
        "evaluation": EvaluationConfig(rows=20_000),
    }
    more.sweep = more.sweep.model_copy(update=sizes)
    settled, stream = more._plan(swept=True)
    assert settled.evaluation.rows >= 150_000
    assert stream == plan(more.sweep.model_copy(update={"hook_points": [HOOK]})).training.hash != settled.training.hash


def test_fewer_rows_than_wanted_are_told_once_with_what_they_do_to_r2(
    settings: dict, tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    sae, text = saved(tmp_path, 96), settings["text"] | {"max_documents": 500, "evaluation_fraction": 0.2}
    lab = lab_of(settings, sae=[sae], text=text, tokens=None)
    recorded = lab.record([HOOK])
    lab.record([HOOK])
    rows = {split: sum(len(chunk.token) for chunk in recorded.open().chunks(split)) for split in "ABC"}
    assert {split: recorded.rows(split) for split in "ABC"} == rows
    (told,) = lab.warnings
    assert f"have {sum(rows.values()):,} of the 60,000 tokens wanted, and {rows['A']:,} of them fit 64 pred" in told
    lost = 100 * D / (rows["A"] - D - 1)
    assert f"lowers R² on other tokens by about {lost:.1f}% of 1 − R², where all would lower it by 0.3%" in told
    assert told.endswith("Raise text.evaluation_fraction or give more text.")
    assert capsys.readouterr().err.count("tokens wanted") == 1


def test_rows_that_are_left_out_are_told_and_a_few_dropped_contexts_are_not(settings: dict, tmp_path: Path) -> None:
    lab = lab_of(settings, sae=[saved(tmp_path, 96)])  # 12,000 tokens are wanted, and the text has more
    assert lab.shortage(SimpleNamespace(rows={"A": 3900, "B": 3700, "C": 3600}.get)) is None
    assert lab.shortage(SimpleNamespace(rows={"A": 3000, "B": 3000, "C": 3000}.get)).endswith("Set tokens above 12000.")


def test_outliers_are_told_once_where_rows_are_analysed(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = lab_of(settings, sae=[saved(tmp_path, 96)])
    monkeypatch.setattr(lab, "record", lambda hook_points: None)
    for share, count in ((0.1, 0), (0.97, 1), (0.97, 1)):
        monkeypatch.setattr(lab, "run", lambda tasks, at=share: [{"a": SimpleNamespace(largest_rows_share=at)}])
        regressions(lab, HOOK, lab.saes)
        assert len(lab.warnings) == count
    assert f"{HOOK}: the largest 0.1 % of the rows in C hold 97% of the variance" in lab.warnings[0]
    assert capsys.readouterr().err.count("--stream.leave_out_norm 10 ") == 1


def test_a_sweeps_parameters_give_its_config_back() -> None:
    config = SweepConfig.model_validate(
        {
            "model": {"name": "m", "modules": {"blocks": "transformer.h", "attn": "attn"}},
            "text": {"separator": "\n\n", "delimiter": "<|endoftext|>", "max_documents": 7},
            "stream": {"context_length": 128, "block_mib": 0.5},
            "hook_points": ["resid_post.1", "mlp_out.1"], "k": [8], "learning_rates": [1e-3, 3e-4],
            "train": {"tokens": 12345}, "study": "s",
        }
    )  # fmt: skip
    params = flatten(config.model_dump()) | {"a.knob.of.another.version": "5"}
    assert from_flat(SweepConfig, params) == config


def test_a_parameter_that_does_not_fit_is_told() -> None:
    with pytest.raises(UserError, match=r"train\.tokens is -5"):
        from_flat(SweepConfig, {"train.tokens": "-5"})


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sae": ["foo://x"]}, ["foo://x", "cannot be opened"]),
        ({"sae": ["/nowhere/sae"]}, ["/nowhere/sae", "neither a file or folder, nor in MLflow"]),
        ({"sweep": "nothing"}, ["tracking.uri", "no such database"]),
        ({}, ["tracking.uri", "no such database"]),
        ({"tokens": 10**9}, ["tokens is 1000000000", "held-out text yields"]),
        ({"hook_points": ["resid_post.1", "mlp_out.1"]}, ["hook_points is resid_post.1, mlp_out.1", "no SAE is of it"]),
        ({"hook_points": ["mlp_out.1"]}, ["hook_points is mlp_out.1: no SAE is of it, there are some of resid_post."]),
        ({"stream": {"context_length": 100_000}}, ["stream.context_length", "512"]),
        ({"model": {"name": "/nowhere/model"}}, ["model.name", "/nowhere/model"]),
    ],
)
def test_mistakes_are_told_in_one_sentence(settings: dict, tmp_path: Path, changes: dict, words: list[str]) -> None:
    sources = {} if "sweep" in changes or not changes else {"sae": [saved(tmp_path, 96)]}
    with pytest.raises(UserError) as caught:
        lab_of(settings, **sources | changes).shards  # noqa: B018 (the number of tokens is looked at when it is needed)
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence


def test_an_sae_of_another_width_is_refused(settings: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^topk_w96_.* takes activations 32 wide, but resid_post.2 of .* is 64 wide"):
        lab_of(settings, sae=[saved(tmp_path, 96, d=32)])


def test_an_sae_of_a_layer_that_the_model_lacks_is_refused_by_name(settings: dict, tmp_path: Path) -> None:
    folder = saved(tmp_path, 96)
    sae = load_sae(folder)
    sae.config = sae.config.model_copy(update={"hook_point": "resid_post.9"})
    save_sae(sae, folder, {})
    with pytest.raises(UserError, match=r"^topk_w96_.*resid_post.9.* does not fit model.name .*layer from 0 to 4"):
        lab_of(settings, sae=[folder])


def test_an_sae_whose_files_name_another_model_is_doubted_where_the_model_is_a_folder(
    settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = saved(tmp_path, 96)
    save_sae(load_sae(folder), folder, {"model_name": "gpt2"})
    lab_of(settings, sae=[folder])
    assert "was trained on gpt2. Check that model.name" in capsys.readouterr().err


def test_saes_of_other_weights_are_refused(settings: dict, tmp_path: Path) -> None:
    folder = saved(tmp_path, 96)
    digest = lab_of(settings, sae=[folder]).plan.facts.digest
    sae = load_sae(folder)
    save_sae(sae, folder, {"model_digest": digest})
    assert lab_of(settings, sae=[folder]).warnings == []
    save_sae(sae, folder, {"model_digest": "0123456789abcdef"})
    with pytest.raises(UserError, match=r"model\.name is .*whose weights are not those"):
        lab_of(settings, sae=[folder])


def test_saes_of_an_error_are_refused(settings: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was trained on an error, resid_post\.2\.nonlinear"):
        lab_of(settings, sae=[saved(tmp_path, 96, hook_point=f"{HOOK}.nonlinear")])


def test_a_sweep_and_saes_exclude_each_other(settings: dict) -> None:
    with pytest.raises(ValueError, match="name a sweep, or SAEs"):
        AnalysisConfig.model_validate(settings | {"sweep": "a", "sae": ["b"]})


# ---------------------------------------------------------------- SAEs that the sweep lacks


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[SweepConfig]:
    """Lists the sweeps that labs have run. A sweep only leaves untrained SAEs here."""
    configs: list[SweepConfig] = []

    def run_sweep(config: SweepConfig, resume: str | None = None, made_for: str | None = None) -> int:
        configs.append(config)
        for sae in config.saes():
            folder = Path(config.output) / config.study / "saes" / sae.name
            save_sae(build(sae, D, TrainConfig()), folder)
            (folder / "outcome.json").write_text("{}")
        return 0

    monkeypatch.setattr("raysae.sweep.run.run_sweep", run_sweep)
    monkeypatch.setattr("raysae.analysis.lab.lab.ensure_ray", lambda settled: None)
    return configs


def test_saes_on_errors_are_trained_anew_where_the_probe_is_another(
    settings: dict, tmp_path: Path, swept: list[SweepConfig]
) -> None:
    folder = saved(tmp_path, 96)
    lab, probe = lab_of(settings, sae=[folder]), tmp_path / "probe.safetensors"

    def train() -> str:
        (made,) = lab.train(
            "errors", [f"{HOOK}.linear"], [96], TOPK, 1000, ErrorsConfig(sae=folder, probe=str(probe))
        ).values()
        return made.where

    probe.write_bytes(b"one")
    first = train()
    assert train() == first
    assert len(swept) == 1
    probe.write_bytes(b"two")  # Another run with other tokens writes another probe
    assert train() != first
    save_sae(build(load_sae(folder).config.model_copy(update={"seed": 1}), D, TrainConfig()), folder)
    train()
    assert len({config.study for config in swept}) == 3


def test_seeds_count_up_and_one_sweep_trains_them_all(settings: dict, tmp_path: Path, swept: list[SweepConfig]) -> None:
    folder = saved(tmp_path, 96)
    lab, probe = lab_of(settings, sae=[folder]), tmp_path / "probe.safetensors"
    probe.write_bytes(b"one")
    hooks = [f"{HOOK}.error", f"{HOOK}.linear"]
    errors = ErrorsConfig(sae=folder, probe=str(probe))
    made = lab.train("errors", hooks, [96], TOPK.model_copy(update={"seed": 4}), 1000, errors, seeds=3)
    assert [subject.hook_point for subject in made.values()] == [hooks[0]] * 3 + [hooks[1]] * 3
    assert [name.rpartition("_s")[2] for name in made] == ["4", "5", "6"] * 2
    assert len(swept) == 1


def test_a_sweep_that_fails_is_told_in_one_sentence(
    settings: dict, tmp_path: Path, swept: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = lab_of(settings, sae=[saved(tmp_path, 96)])
    for code, error in ((1, UserError), (130, KeyboardInterrupt)):
        monkeypatch.setattr("raysae.sweep.run.run_sweep", lambda *_, code=code, **__: code)
        with pytest.raises(error):
            lab.train("earlier", ["mlp_out.2"], [96], TOPK, 1000)


def test_half_trained_controls_differ_in_tokens_alone(
    settings: dict, tmp_path: Path, swept: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = lab_of(settings, sae=[saved(tmp_path, 96)])
    relu = SAEConfig(architecture="relu", hook_point=HOOK, width=96, sparsity=1.0, learning_rate=3e-4)
    given = [
        relu,
        relu.model_copy(update={"width": 128}),
        relu.model_copy(update={"width": 192, "sparsity": 3.0, "seed": 2}),
    ]
    saes = {}
    for sae in given:
        params = {knob: str(value) for knob, value in sae.model_dump(exclude_none=True).items()}
        saes[sae.name] = Subject(sae.name, "", HOOK, sae.width, "", "run", params, {"tokens": lab.sweep.train.tokens})

    def table(lab: Lab, saes: dict, found: dict) -> pd.DataFrame:
        numbers = (
            "fvu",
            "l0",
            "nonlinear_fvu",
            "r2_error",
            "r2_error_weighted",
            "r2_error_norm",
            "r2_error_rescaled",
            "r2_error_norm_rescaled",
        )
        row = with_intervals({name: np.full(41, 0.5) for name in numbers}, 40)
        return pd.DataFrame([{"width": sae.width} | row for sae in saes.values()])

    monkeypatch.setattr(error_regression, "regressions", lambda *_: {})
    monkeypatch.setattr(error_regression, "regression_table", table)
    findings = Findings("error_regression", [], pd.DataFrame())
    both = _half_trained(lab, Shown(HOOK, table(lab, saes, {}), {}, saes), findings)
    assert sorted(both["width"]) == [96, 128, 192]
    assert {"r2_error_half", "r2_error_half_low", "r2_error_norm_half_high"} <= set(both)
    assert sorted(sae.name for config in swept for sae in config.saes()) == sorted(saes)
    assert len(swept) == 2, "one sweep trains SAEs of different widths"
    assert all(
        config.train == lab.sweep.train.model_copy(update={"tokens": lab.sweep.train.tokens // 2, "reports": 2})
        for config in swept
    )

    # The first SAE belongs to no sweep, and the second stopped early
    for changes in ({"run_id": None, "metrics": {}}, {"metrics": {"tokens": 1000}}):
        some = saes | {relu.name: replace(saes[relu.name], **changes)}
        assert _half_trained(lab, Shown(HOOK, table(lab, some, {}), {}, some), findings) is None
    assert "was left out" in findings.notes[-1]


# ---------------------------------------------------------------- what a job has finished


def noted(folder: Path, name: str, fail_unless: Path | None = None) -> str:
    """Appends `name` to a file at each call. Fails while the file `fail_unless` is missing."""
    with (folder / "worked").open("a") as file:
        file.write(f"{name}\n")
    if fail_unless and not fail_unless.exists():
        raise UserError(f"{fail_unless} is not there yet")
    return name


def test_a_job_goes_on_with_the_tasks_it_lacks(settings: dict, tmp_path: Path, cluster: None) -> None:
    folder = saved(tmp_path, 96)
    signal = tmp_path / "signal"
    tasks = [Task("test", name, noted, (tmp_path, name, signal if name == "b" else None)) for name in "ac"]
    last = Task("test", "b", noted, (tmp_path, "b", signal))
    assert lab_of(settings, sae=[folder]).run(tasks) == ["a", "c"]
    with pytest.raises(UserError, match="is not there yet"):
        lab_of(settings, sae=[folder]).run([*tasks, last])
    signal.touch()
    lab = lab_of(settings, sae=[folder])
    assert lab.run([*tasks, last]) == ["a", "c", "b"]
    assert lab.run([*tasks, last]) == ["a", "c", "b"]
    assert sorted((tmp_path / "worked").read_text().split()) == ["a", "b", "b", "c"]
    assert not list((lab.folder / "tasks").glob("*.part"))


MOVED = b"craysae.analysis.parts\nFound\n."  # A pickle of a class whose module is gone.


def test_results_that_cannot_be_read_are_worked_out_again(
    settings: dict, tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture
) -> None:
    lab = lab_of(settings, sae=[saved(tmp_path, 96)])
    tasks = [Task("test", name, noted, (tmp_path, name)) for name in "abcd"]
    stale = lab.folder / "parts" / tasks[0].file  # Where older versions kept results.
    stale.parent.mkdir(parents=True)
    stale.write_bytes(MOVED)
    assert lab.run(tasks) == ["a", "b", "c", "d"]
    assert "cannot be read" not in capsys.readouterr().err
    moved, damaged, empty, whole = (lab.folder / "tasks" / task.file for task in tasks)
    moved.write_bytes(MOVED)
    damaged.write_bytes(damaged.read_bytes()[:-3])
    empty.write_bytes(b"")
    before = whole.stat().st_mtime_ns
    assert lab.run(tasks) == ["a", "b", "c", "d"]
    told = capsys.readouterr().err
    assert all(f"{path} cannot be read" in told for path in (moved, damaged, empty))
    assert "Traceback" not in told
    assert whole.stat().st_mtime_ns == before
    assert sorted((tmp_path / "worked").read_text().split()) == sorted("abcd" + "abc")


def test_activations_are_recorded_once_and_tasks_depend_on_the_saes(
    settings: dict, tmp_path: Path, cluster: None
) -> None:
    lab = lab_of(settings, sae=[saved(tmp_path, 96)])
    recorded = lab.record([HOOK])
    file = recorded.folder / f"{HOOK}.npy"
    before = file.stat().st_mtime_ns
    assert lab.record([HOOK]) == recorded
    wider = lab.record([HOOK, "mlp_out.2"])
    assert wider.folder == recorded.folder
    assert file.stat().st_mtime_ns == before
    activations = wider.open()
    assert activations.widths == {HOOK: D, "mlp_out.2": D}
    rows = {split: activations.rows(split) for split in "ABC"}
    assert all(count > 0 for count in rows.values())
    assert rows["C"] == len(wider.contexts("C")) * (64 - 8)
    chunk = next(activations.chunks("C"))
    assert torch.equal(
        chunk.context.unique_consecutive(),
        torch.from_numpy(wider.contexts("C"))[: len(chunk.context.unique_consecutive())],
    )

    assert torch.equal(chunk.group, torch.from_numpy(wider.groups("C"))[: len(chunk.group) // 56].repeat_interleave(56))

    (first,) = regressions(lab, HOOK, lab.saes).values()
    count = len(list((lab.folder / "tasks").glob("error_regression-*")))
    again = lab_of(settings, sae=[saved(tmp_path, 96)])  # The same SAE, written anew
    (second,) = regressions(again, HOOK, again.saes).values()
    pd.testing.assert_series_equal(pd.Series(first.row()), pd.Series(second.row()))
    assert len(list((lab.folder / "tasks").glob("error_regression-*"))) == count == 1


def test_newer_knobs_at_their_earlier_value_do_not_rename_saes_that_an_analysis_has_trained():
    """SAEs that an older version trained are found under the digest of the knobs that it had."""
    told = _told(TrainConfig(tokens=1000))
    assert not set(told) & {"group_shares", "p_end"}
    assert told == {knob: value for knob, value in TrainConfig(tokens=1000).model_dump().items() if knob in told}
    assert _told(TrainConfig(p_end=0.2))["p_end"] == 0.2
