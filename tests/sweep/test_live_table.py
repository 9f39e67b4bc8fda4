"""The progress table is a pure function of status dicts."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from raysae.config import SweepConfig
from raysae.sweep import live_table
from raysae.sweep.live_table import LiveTable, duration, header, line, progress, remaining, short_names

STREAM = {"contexts_forwarded": 4123, "bytes_in_flight": 123 << 20, "producers": 2}


def status(name: str, state: str = "working", tokens: int = 500, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "state": state,
        "tokens": tokens,
        "tokens_per_second": 1234.5,
        "fvu": 0.12345,
        "l0": 16.0,
        "waited_share": 0.25,
        **more,
    }


def text(renderable: RenderableType, width: int = 110) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


def names(*hook_points: str) -> list[str]:
    return [sae.name for sae in SweepConfig(hook_points=list(hook_points)).saes()]


def test_the_table_tells_every_sae_and_the_totals():
    saes = [status(name) for name in names("resid_post.2")]
    saes[3] |= {"state": "waiting", "tokens": 0, "tokens_per_second": None, "fvu": None, "l0": None}
    saes[4] |= {"state": "failed"}
    shown = text(progress(saes, STREAM, 1000, 75, "embedded"))
    rows = {row.split()[0] + row.split()[1]: row for row in shown.splitlines() if row.startswith("w")}
    assert len(rows) == 18
    assert "0/18 SAEs done, 1 failed · 1 min 15 s elapsed" in shown
    for total in (
        "4,123 LM contexts",
        "123 MiB in flight",
        "2 producers",
        "all SAEs: topk resid_post.2 lr0.001 s0",
        "embedded",
    ):
        assert total in shown
    assert rows["w256k8"].split() == ["w256", "k8", "━━━━━━━━━━━━", "50%", "1,234", "0.1235", "16.0", "25%", "working"]
    assert rows["w512k8"].split()[3:] == ["0%", "–", "–", "–", "25%", "waiting"]


@pytest.mark.parametrize(
    ("count", "height", "width"), [(1, 24, 80), (18, 24, 80), (36, 24, 80), (36, 60, 200), (40, 30, 100)]
)
def test_it_fits_the_terminal(count: int, height: int, width: int):
    saes = [status(name) for name in names("resid_post.2", "mlp_out.1", "attn_out.2")[:count]]
    shown = text(progress(saes, STREAM, 1000, 75, "embedded", height, width), width)
    assert len(shown.splitlines()) <= height
    assert max(map(len, shown.splitlines())) <= width
    assert "working" in shown
    assert "…" not in shown


def test_a_long_name_is_cut_not_the_numbers():
    shown = text(progress([status("x" * 100), status("y")], STREAM, 1000, 75, width=80), 80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "xxx…" in shown
    assert shown.count("25% working") == 2


def test_with_little_room_those_at_work_are_shown_and_the_others_counted():
    saes = [status(f"s{i}", "done" if i < 30 else "working") for i in range(36)]
    shown = text(progress(saes, STREAM, 1000, 75, height=16))
    assert all(f"s{i} " in shown for i in range(30, 36))
    assert "and 27 more done" in shown


def test_names_lose_what_all_share():
    short, common = short_names(["topk_w256_k8_resid_post.2_lr0.001_s0", "topk_w1024_k8_mlp_out.1_lr0.001_s0"])
    assert list(short.values()) == ["w256  resid_post.2", "w1024 mlp_out.1"]
    assert common == "topk k8 lr0.001 s0"
    assert short_names(["relu_w8_c1e-05_attn_z.0_lr3e-05_s12", "other"])[0]["other"] == "other"
    assert short_names(["topk_w256_k8_resid_post.2_lr0.001_s0"]) == (
        {"topk_w256_k8_resid_post.2_lr0.001_s0": "w256 k8"},
        "topk resid_post.2 lr0.001 s0",
    )
    assert short_names([]) == ({}, "")
    every = names("resid_post.2", "mlp_out.1")
    assert len(set(short_names(every)[0].values())) == len(every)


def test_time_left():
    # The slowest SAE decides
    assert remaining([status("a", tokens=250), status("b", tokens=500)], 1000, 60) == pytest.approx(180)
    # The SAE resumed at 500 tokens
    assert remaining([status("a", tokens=750, tokens_before=500)], 1000, 60) == pytest.approx(60)
    # The turn of b is still to come
    assert remaining([status("a", tokens=1000), status("b", tokens=0)], 1000, 60) == pytest.approx(60)
    assert remaining([status("a", tokens=0)], 1000, 60) is None
    assert remaining([status("a", "done"), status("b", "failed")], 1000, 60) == 0
    assert "left" not in header([status("a", "done", 1000)], STREAM, 1000, 60)
    assert header([status("a", tokens=0)], {}, 1000, 0) == "0/1 SAEs done · 0 s elapsed · time left unknown"


def test_durations():
    assert [duration(s) for s in (0, 59.6, 185, 7620)] == ["0 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]


def test_the_line():
    told = line([status("a"), status("b", "waiting", 0, fvu=None)], STREAM, 1000, 60)
    assert told.startswith(" 25% · 0/2 SAEs done · 1 min 00 s elapsed")
    assert told.endswith("1 working, 1 waiting · 1,234 SAE-tokens/s · best FVU 0.1235")


def test_without_a_terminal_a_line_comes_every_ten_seconds(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(live_table.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with LiveTable(1000, console=console) as show:
        for second in range(25):
            now[0] = second
            show([status("a", tokens=second * 10)], STREAM)
        show([status("a", "done", 1000)], STREAM, last=True)
    lines = console.file.getvalue().splitlines()
    assert [row.split("·")[0].strip() for row in lines] == ["0%", "10%", "20%", "100%"]


@pytest.mark.parametrize("before", [0, 500])
def test_saes_that_no_trainer_has_told_of_yet_are_counted(monkeypatch: pytest.MonkeyPatch, before: int):
    """Nor do their unknown tokens count as those that they had seen at the start."""
    now = [0.0]
    monkeypatch.setattr(live_table.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with LiveTable(1000, console=console) as show:
        for second, tokens in ((0, None), (10, before), (20, before + 100)):
            now[0] = second
            show([status("a", "waiting", tokens), status("b", "waiting", tokens)], STREAM)
    first, _, last = console.file.getvalue().splitlines()
    assert first.startswith("  0% · 0/2 SAEs done")
    assert f"about {duration(20 * (900 - before) / 100)} left" in last


def test_in_a_terminal_the_table_is_redrawn_in_place():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    with LiveTable(1000, "embedded", console) as show:
        for tokens in (0, 1000):
            show([status("a", tokens=tokens)], STREAM)
    written = console.file.getvalue()
    assert "\x1b[1A" in written  # The cursor moved up to draw over the former table
    assert "100%" in written
