"""What the plan refuses before anything starts, and how much object store it asks for."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import AddedToken

from raysae.commands.parse import parse
from raysae.config import SweepConfig, UserError
from raysae.lm.tokenizer import load_tokenizer
from raysae.stream.spec import ActivationSpec
from raysae.study.plan import MIB, Plan, _token_ids, check_enough, plan, store_bytes


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"stream": {"cache_dir": "nosuch://x"}}, "stream.cache_dir is 'nosuch://x', which cannot be opened"),
        (
            {"train": {"precision": "bfloat16"}},
            r"train.precision is bfloat16 but trainers run on CPUs \(resources.trainer_gpus is 0\)",
        ),
        (
            {"model": {"device_map": "auto"}},
            r"model.device_map is auto, which needs the package accelerate: pip install 'raysae\[multi-gpu\]'",
        ),
    ],
)
def test_what_would_fail_in_a_producer_is_refused_before_anything_starts(
    settings: dict, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raysae.study.plan.find_spec", lambda name: None)
    with pytest.raises(UserError, match=sentence):
        plan(SweepConfig.model_validate(settings))


def test_the_object_store_holds_what_is_in_flight_and_the_held_out_rows() -> None:
    """An analysis asks for other hook points than the sweep, and for more copies of the contexts."""
    config = SweepConfig.model_validate({"stream": {"mib_in_flight": 100}})
    settled = SimpleNamespace(
        config=config, streamed_widths={"resid_post.1": 64, "mlp_out.1": 32}, evaluation_shards=3,
        evaluation=SimpleNamespace(rows_per_shard=1000, dtype="float32"),
        contexts={"train": SimpleNamespace(tokens=np.zeros(500, np.int32))},
    )  # fmt: skip
    assert store_bytes(settled) == int((100 + 256) * MIB + 1.2 * 3 * 1000 * 4 * (64 + 32) + 2000)
    assert store_bytes(settled, 4 * 64, token_copies=4) == int((100 + 256) * MIB + 1.2 * 3 * 1000 * 4 * 4 * 64 + 8000)


def spec_of(contexts: int, epochs: int) -> ActivationSpec:
    return ActivationSpec(
        model="m", text="t", contexts=contexts, context_length=16, skip_positions=8, dtype="float32", seed=0,
        epochs=epochs, shard_contexts=256, batch_contexts=32,
    )  # fmt: skip


def test_check_enough_names_the_epochs_that_do():
    rows = 256 * 8  # Rows of a shard. 700 contexts are 2 shards.
    check_enough(spec_of(700, 1), 2 * rows, "train.tokens", "stream.epochs")
    with pytest.raises(
        UserError, match=r"4,096 tokens per epoch, but train.tokens needs 12,289: set stream.epochs to 4 or more"
    ):
        check_enough(spec_of(700, 3), 6 * rows + 1, "train.tokens", "stream.epochs")
    check_enough(spec_of(700, 4), 6 * rows + 1, "train.tokens", "stream.epochs")
    with pytest.raises(UserError, match="fewer than the 256 contexts of 16 tokens"):
        check_enough(spec_of(255, 9), 1, "train.tokens", "stream.epochs")
    with pytest.raises(
        UserError, match=r"held-out text .* lower evaluation.rows, raise text.evaluation_fraction"
    ) as error:
        check_enough(spec_of(256, 1), rows + 1, "evaluation.rows", None)
    assert "epochs" not in str(error.value)


def test_the_readmes_commands_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans the commands that need no hub, no files and no study of the reader's own."""
    readme = (Path(__file__).parents[2] / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^\.venv/bin/python jobs/scaling_sweep\.py (.*)$", readme, re.MULTILINE)
    assert len(commands) >= 4
    offline = [words for words in commands if not re.search(r"hf:|books/|--resume", words)]
    assert len(offline) >= 3
    for words in offline:
        assert plan(parse(SweepConfig, shlex.split(words, comments=True), "")[0]).saes


def planned(tmp_path: Path, **stream: object) -> Plan:
    knobs = {
        "text": {"cache": str(tmp_path), "source": "tests/*.py", "evaluation_fraction": 0.5}, "stream": stream,
        "evaluation": {"rows": 1}, "train": {"tokens": 1, "batch": 1}, "hook_points": ["resid_post.2", "mlp_out.1"],
    }  # fmt: skip
    return plan(SweepConfig.model_validate(knobs))


def test_special_tokens_without_a_role_are_left_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat model marks turns with special tokens that are no BOS, EOS or the like."""
    tokenizer = load_tokenizer(SweepConfig().model)
    with_roles = tuple(sorted(tokenizer.all_special_ids))
    new = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    monkeypatch.setattr("raysae.study.plan.load_tokenizer", lambda model: tokenizer)
    assert _token_ids(SweepConfig().model, ["special"]) == with_roles, "the model has no such id"
    monkeypatch.setattr("raysae.study.plan.load_vocabulary", lambda model: (new + 1, None))
    assert _token_ids(SweepConfig().model, ["special"]) == (*with_roles, new)


def test_ids_to_leave_out_need_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysae.study.plan.load_tokenizer", None)
    assert _token_ids(SweepConfig().model, ["5", 3]) == (3, 5)


def test_what_is_left_out_is_settled_and_goes_into_both_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("raysae.study.plan.apart", lambda function, *arguments: function(*arguments))
    tokenizer = load_tokenizer(SweepConfig().model)
    word = tokenizer.convert_ids_to_tokens(300)
    settled = planned(tmp_path, context_length=16, leave_out_tokens=["special", 77, "78", word], leave_out_norm=10)
    for spec in (settled.training, settled.evaluation):
        assert spec.leave_out_tokens == tuple(sorted({*tokenizer.all_special_ids, 77, 78, 300}))
        assert (spec.leave_out_norm, spec.leave_out_hook_point) == (10, "resid_post.2")
    assert settled.config.stream.leave_out_hook_point == "resid_post.2"
    other = planned(tmp_path, context_length=16, leave_out_norm=10, leave_out_hook_point="attn_out.0")
    assert other.training.leave_out_hook_point == "attn_out.0"
    plain = planned(tmp_path, context_length=16)
    assert plain.config.stream.leave_out_hook_point is None
    with pytest.raises(
        UserError, match=r"leave_out_tokens has 'nosuchtoken', which is no token of embedded: give 'spe"
    ):
        planned(tmp_path, context_length=16, leave_out_tokens=["nosuchtoken"])
    with pytest.raises(UserError, match="leave_out_tokens has '99999999'"):
        planned(tmp_path, context_length=16, leave_out_tokens=["99999999"])
    with pytest.raises(UserError, match=r"attn_out\.99"):
        planned(tmp_path, context_length=16, leave_out_norm=10, leave_out_hook_point="attn_out.99")


def test_a_hook_point_for_norms_needs_a_norm() -> None:
    with pytest.raises(UserError, match=r"leave_out_hook_point is resid_post\.1, but leave_out_norm is unset"):
        parse(SweepConfig, ["--stream.leave_out_hook_point", "resid_post.1"], "")


def test_ids_and_tokens_are_told_apart_on_the_command_line() -> None:
    config = parse(SweepConfig, ["--stream.leave_out_tokens", "special,198,Ġthe"], "")[0]
    assert config.stream.leave_out_tokens == ["special", "198", "Ġthe"]
