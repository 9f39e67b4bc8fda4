"""The training loop without Ray: reports, restarts, late and leaving SAEs, failures."""

import json
import logging
import threading
import time

import fsspec
import pytest
import torch

from raysae.config import UserError
from raysae.sae.files import load_sae
from raysae.stream.state import StreamError, SupersededError
from raysae.train.checkpoint import CheckpointStore
from raysae.train.evaluation import reconstruction_metrics
from raysae.train.loop import Loop
from raysae.train.progress import Cadence
from tests.train.synthetic import EVALUATION, SPEC, TRAIN, ArraySource, D, config

A, B = config(seed=0), config("relu", width=40, seed=1)


def loop_on(folder, source=None, train=TRAIN, **changes) -> Loop:
    return Loop(str(folder), D, SPEC, train, EVALUATION, source or ArraySource(train), **changes)


def trained(folder, *configs, **changes) -> Loop:
    loop = loop_on(folder, **changes)
    for c in configs:
        loop.add(c)
    loop.run()
    return loop


def saved_bits(folder, name: str) -> dict[str, torch.Tensor]:
    return load_sae(folder / "saes" / name).state_dict()


def assert_same_sae(one, other, name: str) -> None:
    bits, bits_ = saved_bits(one, name), saved_bits(other, name)
    assert bits.keys() == bits_.keys()
    for key in bits:
        assert torch.equal(bits[key], bits_[key]), key


def lasting(reports: list[dict]) -> list[dict]:
    """Reports without their measurements of time."""
    return [
        {
            k: v
            for k, v in r.items()
            if k not in ("time", "tokens_per_second", "waited_share", "step_seconds", "evaluation_seconds")
        }
        for r in reports
    ]


class KilledError(Exception):
    pass


def killed_at(row: int, error: Exception | type[Exception] = KilledError) -> ArraySource:
    """A source whose reader fails with `error` at `row`, by default as if the process died there."""
    source = ArraySource()
    open_ = source.open

    def open_and_fail(start: int):
        reader = open_(start)
        next_ = reader.next

        def next_or_die():
            if reader.row == row:
                raise error
            return next_()

        reader.next = next_or_die
        return reader

    source.open = open_and_fail
    return source


def test_reports_come_at_even_steps_and_the_sae_is_saved(tmp_path):
    loop = trained(tmp_path, A, B)
    assert loop.source.opened == [0]
    assert loop.source.served == list(range(0, TRAIN.tokens, TRAIN.batch))
    for c in (A, B):
        reports, ended = loop.reports(c.name)
        assert ended
        assert [r["step"] for r in reports] == [5, 10, 15, 20]
        assert [r["tokens"] for r in reports] == [320, 640, 960, 1280]
        assert [r["evaluation_rows"] for r in reports] == [250, 250, 250, 600]
        assert [r["final"] for r in reports] == [False, False, False, True]
        assert sum(reports[-1]["density"]) == round(c.width * (1 - reports[-1]["dead_fraction"]))
        assert {
            "name",
            "loss",
            "squared_error",
            "gradient_norm",
            "fvu",
            "l0",
            "cosine",
            "norm_ratio",
            "learning_rate",
            "time",
        } <= reports[0].keys()
        metrics = reconstruction_metrics(load_sae(tmp_path / "saes" / c.name), [loop.source.held_out])
        assert metrics.fvu == pytest.approx(reports[-1]["fvu"], rel=1e-5)
        assert loop.reports(c.name, 3) == (reports[3:], True)
    assert reports[-1]["fvu"] < reports[0]["fvu"]
    status = loop.status()
    assert [(s["name"], s["state"], s["tokens"]) for s in status] == [(A.name, "done", 1280), (B.name, "done", 1280)]
    assert status[0]["fvu"] == loop.reports(A.name)[0][-1]["fvu"]
    assert status[0]["tokens_per_second"] > 0
    assert not list((tmp_path / "checkpoints").rglob("*.safetensors"))
    assert loop.mean(A.name) == pytest.approx(loop.source.data.double().mean(0).tolist(), rel=1e-12)


def test_a_study_may_lie_on_any_file_system(tmp_path):
    folder = f"memory://{tmp_path}"
    reports, _ = trained(folder, A).reports(A.name)
    files = fsspec.filesystem("memory").ls(f"{tmp_path}/saes/{A.name}", detail=False)
    assert {"cfg.json", "sae_weights.safetensors", "outcome.json"} <= {file.rpartition("/")[2] for file in files}
    assert trained(folder, A).reports(A.name) == (reports, True)


def test_ended_saes_are_recognised_and_shown(tmp_path):
    reports, _ = trained(tmp_path, A).reports(A.name)
    again = trained(tmp_path, A)
    assert again.source.opened == []
    assert again.reports(A.name) == (reports, True)
    assert again.status()[0]["state"] == "done"
    assert again.status()[0]["tokens"] == TRAIN.tokens


@pytest.mark.parametrize(("error", "written"), [(StreamError("broken"), 1), (SupersededError("started again"), 0)])
def test_a_process_in_whose_place_another_trains_writes_no_checkpoint(tmp_path, error, written):
    loop = loop_on(tmp_path, killed_at(640, error))
    loop.add(A)
    with pytest.raises(StreamError, match=str(error)):
        loop.run()
    assert len(list((tmp_path / "checkpoints").rglob("*.safetensors"))) == written


@pytest.mark.parametrize("row", [0, 64, 640, 1216])
def test_killed_and_restarted_equals_undisturbed(tmp_path, row):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = trained(whole, A, B)
    loop = loop_on(broken, killed_at(row))
    loop.add(A)
    loop.add(B)
    with pytest.raises(KilledError):
        loop.run()
    again = trained(broken, A, B)
    assert again.source.opened == [row]
    for c in (A, B):
        assert_same_sae(whole, broken, c.name)
        assert lasting(again.reports(c.name)[0]) == lasting(undisturbed.reports(c.name)[0])


def test_saes_with_checkpoints_at_different_rows_meet_again(tmp_path):
    """The process dies between the checkpoints of two SAEs.

    The SAE that is ahead waits for the reader. None trains on a row twice.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trained(whole, A, B)
    for c, row in ((A, 256), (B, 640)):
        loop = loop_on(broken, killed_at(row))
        loop.add(c)
        with pytest.raises(KilledError):
            loop.run()
    again = trained(broken, A, B)
    assert again.source.served == list(range(256, TRAIN.tokens, TRAIN.batch))
    for c in (A, B):
        assert_same_sae(whole, broken, c.name)


def test_a_late_sae_waits_for_the_pass_to_end_and_then_gets_its_own(tmp_path):
    alone = tmp_path / "alone"
    trained(alone, B)
    source = ArraySource()
    loop = loop_on(tmp_path / "late", source, on_change=lambda: None)
    loop.add(A)
    seen = []

    def add_late():
        if loop.progress[A.name].tokens == 640 and B.name not in loop.progress:
            loop.add(B)
        if B.name in loop.progress:
            seen.append((loop.progress[B.name].state, loop.progress[A.name].ended))

    loop.on_change = add_late
    loop.run()
    every = list(range(0, TRAIN.tokens, TRAIN.batch))
    assert source.opened == [0, 0]
    assert source.served == every + every
    assert ("waiting", False) in seen
    assert ("working", False) not in seen
    assert_same_sae(alone, tmp_path / "late", B.name)


def test_an_sae_that_leaves_early_is_evaluated_and_saved(tmp_path):
    alone, company = tmp_path / "alone", tmp_path / "company"
    trained(alone, B)
    loop = loop_on(company)
    loop.add(A)
    loop.add(B)
    loop.on_change = lambda: (
        len(loop.reports(A.name)[0]) == 2
        and not loop.progress[A.name].message
        and loop.leave(A.name, "stopped by the scheduler")
    )
    loop.run()
    reports, ended = loop.reports(A.name)
    assert ended
    assert [r["tokens"] for r in reports] == [320, 640, 704], "one report per step"
    assert reports[-1]["final"]
    assert reports[-1]["evaluation_rows"] == 600
    first = loop.status()[0]
    assert (first["state"], first["tokens"], first["message"]) == ("stopped", 704, "stopped by the scheduler")
    assert saved_bits(company, A.name)
    assert json.loads((company / "saes" / A.name / "outcome.json").read_text())["tokens"] == 704
    assert_same_sae(alone, company, B.name)
    assert trained(company, A, B).source.opened == []


def test_leaving_after_the_end_or_before_the_first_row(tmp_path):
    loop = trained(tmp_path, A)
    loop.leave(A.name, "too late")
    loop.leave("nobody", "unknown")
    loop.add(B)
    loop.leave(B.name, "at once")
    loop.run()
    assert [(s["state"], s["tokens"], s["message"]) for s in loop.status()] == [
        ("done", 1280, None),
        ("stopped", 0, "at once"),
    ]
    assert loop.reports(B.name) == ([], True)


def test_killed_while_leaving_still_leaves(tmp_path):
    source = ArraySource()
    loop = loop_on(tmp_path, source)
    loop.add(A)
    loop.on_change = lambda: loop.progress[A.name].tokens == 640 and loop.leave(A.name, "stopped by the scheduler")
    evaluation = source.evaluation

    def die_in_the_final_one(rows):
        if rows == EVALUATION.rows:
            raise KilledError
        return evaluation(rows)

    source.evaluation = die_in_the_final_one
    with pytest.raises(KilledError):
        loop.run()
    again = trained(tmp_path, A)
    assert again.source.served == []
    assert again.status()[0]["state"] == "stopped"
    assert again.status()[0]["tokens"] == 704


def test_killed_right_after_it_was_told_to_leave_it_leaves_at_the_same_row(tmp_path):
    """The process dies after `leave` has returned, before the loop has acted on it.

    The newest checkpoint is older than the wish to leave.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    loop = loop_on(whole)
    loop.add(A)
    loop.on_change = lambda: len(loop.reports(A.name)[0]) == 2 and loop.leave(A.name, "worse than others")
    loop.run()
    assert loop.status()[0]["tokens"] == 704

    loop = loop_on(broken)
    loop.add(A)
    loop._checkpoint = lambda: None  # SIGKILL leaves no time to write one

    def leave_and_die():
        if len(loop.reports(A.name)[0]) == 2:
            loop.leave(A.name, "worse than others", tokens=640)
            raise KilledError

    loop.on_change = leave_and_die
    with pytest.raises(KilledError):
        loop.run()
    again = loop_on(broken)
    again.add(A)
    again.leave(A.name, "told again, because the caller heard no answer")
    again.run()
    status = again.status()[0]
    assert (status["state"], status["tokens"], status["message"]) == ("stopped", 704, "worse than others")
    assert_same_sae(whole, broken, A.name)
    assert [r["tokens"] for r in again.reports(A.name)[0]] == [320, 640, 704]
    assert not list((broken / "checkpoints").rglob("*.json"))


def test_a_failed_sae_stops_alone_and_stays_failed(tmp_path, caplog):
    loop = loop_on(tmp_path)
    loop.add(A)
    loop.add(B)
    loop.on_change = lambda: (
        A.name in loop.bank.members and loop.progress[A.name].tokens == 640 and break_(loop.bank.members[A.name])
    )

    def break_(member):
        member.sae.loss_and_grads = lambda x, target, step: {"loss": torch.tensor(float("nan"))}

    with caplog.at_level(logging.WARNING):
        loop.run()
    message = f"{A.name}: loss is nan at step 10 (rows 640 to 703)"
    assert message in caplog.text
    assert [(s["state"], s["message"]) for s in loop.status()] == [("failed", message), ("done", None)]
    assert loop.reports(A.name)[1]
    again = trained(tmp_path, A, B)
    assert again.source.opened == []
    assert again.status()[0]["message"] == message


def test_stop_writes_checkpoints_and_ends(tmp_path):
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    trained(whole, A)
    loop = loop_on(halted, ArraySource(delay=0.02))
    loop.add(A)
    thread = threading.Thread(target=loop.run)
    thread.start()
    while loop.status()[0]["tokens"] < 128:
        time.sleep(0.005)
    assert loop.status()[0]["state"] in ("working", "evaluating")
    loop.stop()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert 0 < loop.status()[0]["tokens"] < TRAIN.tokens
    trained(halted, A)
    assert_same_sae(whole, halted, A.name)


def test_a_run_that_differs_is_refused(tmp_path):
    loop = loop_on(tmp_path, killed_at(640))
    loop.add(A)
    with pytest.raises(KilledError):
        loop.run()
    other = TRAIN.model_copy(update={"decay": 0.5})
    with pytest.raises(UserError, match=r"differs in train.decay \(was 0.2, is 0.5\)"):
        trained(tmp_path, A, train=other)
    assert trained(tmp_path, A, train=other, allow={"train.decay"}).status()[0]["state"] == "done"


def test_checkpoints_take_at_most_their_share_of_the_time():
    now = [0.0]
    cadence = Cadence(60, lambda: now[0])
    now[0] = 59
    assert not cadence.due()
    now[0] = 60
    assert cadence.due()
    began, now[0] = 60, 66  # Writing took 6 seconds, so at 2 % the next is due after 300
    cadence.written(began)
    now[0] = 66 + 299
    assert not cadence.due()
    now[0] = 66 + 300
    assert cadence.due()


def test_checkpoints_are_written_as_time_passes(tmp_path):
    ticks = iter(range(10**6))
    loop = loop_on(
        tmp_path,
        killed_at(640),
        train=TRAIN.model_copy(update={"checkpoint_seconds": 1}),
        clock=lambda: float(next(ticks)),
    )
    loop.add(A)
    saves = []
    save = loop._save
    loop._save = lambda progress: (saves.append(progress.member.next_row), save(progress))
    with pytest.raises(KilledError):
        loop.run()
    assert saves
    assert saves[-1] == 640
    assert saves == sorted(set(saves))


def test_a_wish_to_leave_that_comes_while_an_sae_ends_does_no_harm(tmp_path, monkeypatch):
    """A scheduler may stop an SAE at its last report, while the loop removes the SAE's checkpoints.

    The wish must not be written among files that are being removed.
    """
    loop = loop_on(tmp_path)
    clear, asked = CheckpointStore.clear, []

    def slowly(store):
        wish = threading.Thread(target=loop.leave, args=(A.name, "told by the scheduler"))
        wish.start()
        wish.join(0.2)
        asked.append(wish)
        clear(store)

    monkeypatch.setattr(CheckpointStore, "clear", slowly)
    loop.add(A)
    loop.run()
    for wish in asked:
        wish.join(10)
        assert not wish.is_alive()
    assert asked
    assert loop.status()[0]["state"] == "done"
    assert not (tmp_path / "checkpoints" / A.name).exists()


def test_the_loop_is_silent_while_it_works_and_not_while_it_waits(tmp_path, monkeypatch):
    """A watch restarts the loop for a step that does not end, and not for rows that do not come."""
    now, heard = [0.0], {"step": [], "rows": [], "held-out rows": []}

    class SlowSource(ArraySource):
        def open(self, row):
            reader = super().open(row)
            take = reader.next

            def late():
                now[0] += 1000
                heard["rows"].append(loop.silent_seconds())
                return take()

            reader.next = late
            return reader

        def evaluation(self, rows):
            for chunk in super().evaluation(rows):
                now[0] += 1000
                heard["held-out rows"].append(loop.silent_seconds())
                yield chunk

    loop = loop_on(tmp_path, SlowSource(), clock=lambda: now[0])
    step = loop.bank.step

    def slow_step(x, row):
        now[0] += 7
        heard["step"].append(loop.silent_seconds())
        return step(x, row)

    monkeypatch.setattr(loop.bank, "step", slow_step)
    loop.add(A)
    loop.run()
    assert set(heard["step"]) == {7.0}
    assert set(heard["rows"]) == set(heard["held-out rows"]) == {0.0}


def test_activations_that_are_all_zero_end_their_saes_with_the_cause(tmp_path):
    source = ArraySource()
    source.data = torch.zeros_like(source.data)
    loop = trained(tmp_path, A, B, source=source)
    for row in loop.status():
        assert row["state"] == "failed"
        assert "activations at resid_post.0 are all zero" in row["message"]
