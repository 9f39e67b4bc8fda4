"""The sweep's progress: a live table in a terminal, a line every ten seconds elsewhere (job logs, CI).

`progress` and `line` are pure functions of status dicts. What is unknown may be None or missing there.

- An SAE's has name, state (a key of `STATES`), tokens, tokens_per_second, fvu, l0, and waited_share: the share of its
  time that it waited for activations. `LiveTable` alone takes SAEs of unknown tokens.
- The stream's has contexts_forwarded, bytes_in_flight, producers.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

STATES = {  # State: colour. The states of most interest come first.
    "working": "green",
    "evaluating": "cyan",
    "failed": "bold red",
    "waiting": "yellow",
    "stopped": "dim",
    "done": "dim",
}
LINE_SECONDS = 10.0  # Time between two lines
BAR = 12  # Characters of a progress bar
OTHER_COLUMNS = 58  # Characters of all columns beside the name
FRAME_LINES = 7  # Lines without SAEs: header, table head, rules, number of hidden rows
NAME = re.compile(
    r"(?P<architecture>[a-z]+)_(?P<width>w\d+)_(?P<level>[kc][^_]+)_(?P<hook>.+)_(?P<rate>lr[^_]+)_(?P<seed>s\d+)$"
)

Status = Mapping[str, Any]


def progress(
    saes: Sequence[Status],
    stream: Status,
    tokens: int,
    elapsed: float,
    title: str = "",
    height: int | None = None,
    width: int = 110,
) -> RenderableType:
    """A header with totals, and a row per SAE. Each SAE is to see `tokens`.

    Where the rows do not fit into `height` lines, the SAEs at work stay, and a last line counts the others.
    """
    shown = list(saes) if height is None else _most_interesting(saes, max(1, height - FRAME_LINES))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("SAE", no_wrap=True, overflow="ellipsis", max_width=max(12, width - OTHER_COLUMNS))
    table.add_column("tokens", no_wrap=True, min_width=BAR + 5)
    for column, least in (("tokens/s", 8), ("FVU", 6), ("L0", 5), ("waited", 6)):
        table.add_column(column, justify="right", no_wrap=True, min_width=least)
    table.add_column("state", no_wrap=True, min_width=max(map(len, STATES)))
    names, common = short_names([sae["name"] for sae in saes])
    for sae in shown:
        state = sae["state"]
        dim = "dim" if state in ("done", "stopped", "waiting") else ""
        table.add_row(
            Text(names[sae["name"]], style=dim),
            _bar(sae["tokens"] / tokens),
            _number(sae, "tokens_per_second", ",.0f"),
            _number(sae, "fvu", ".4f"),
            _number(sae, "l0", ".1f"),
            _number(sae, "waited_share", ".0%"),
            Text(state, style=STATES.get(state, "")),
        )
    parts: list[RenderableType] = [Text(header(saes, stream, tokens, elapsed), style="bold")]
    if title or common:
        parts.append(Text(" · ".join(part for part in (title, common and f"all SAEs: {common}") if part), style="dim"))
    hidden = Counter(sae["state"] for sae in saes) - Counter(sae["state"] for sae in shown)
    more = (
        [Text("and " + ", ".join(f"{count} more {state}" for state, count in hidden.items()), style="dim")]
        if hidden
        else []
    )
    return Group(*parts, "", table, *more)


def header(saes: Sequence[Status], stream: Status, tokens: int, elapsed: float) -> str:
    """The totals in one line."""
    done = sum(sae["state"] in ("done", "stopped") for sae in saes)
    failed = sum(sae["state"] == "failed" for sae in saes)
    left = remaining(saes, tokens, elapsed)
    parts = [
        f"{done}/{len(saes)} SAEs done" + (f", {failed} failed" if failed else ""),
        f"{duration(elapsed)} elapsed",
        ""
        if done + failed == len(saes)
        else f"about {duration(left)} left"
        if left is not None
        else "time left unknown",
    ]
    parts += [f"{stream['contexts_forwarded']:,} LM contexts"] if stream.get("contexts_forwarded") is not None else []
    parts += (
        [f"{stream['bytes_in_flight'] / 2**20:,.0f} MiB in flight"] if stream.get("bytes_in_flight") is not None else []
    )
    parts += (
        [f"{stream['producers']} producer{'s' * (stream['producers'] != 1)}"]
        if stream.get("producers") is not None
        else []
    )
    return " · ".join(part for part in parts if part)


def line(saes: Sequence[Status], stream: Status, tokens: int, elapsed: float) -> str:
    """The progress in one line of plain text."""
    share = sum(min(1.0, sae["tokens"] / tokens) for sae in saes) / max(1, len(saes))
    rate = sum(sae.get("tokens_per_second") or 0 for sae in saes if sae["state"] == "working")
    states = Counter(sae["state"] for sae in saes)
    counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
    fvus = [sae["fvu"] for sae in saes if sae.get("fvu") is not None]
    best = f" · best FVU {min(fvus):.4f}" if fvus else ""
    return f"{share:4.0%} · {header(saes, stream, tokens, elapsed)} · {counts} · {rate:,.0f} SAE-tokens/s{best}"


def remaining(saes: Sequence[Status], tokens: int, elapsed: float) -> float | None:
    """Seconds until all SAEs have seen their tokens, at the mean pace since the start. None while nothing has moved.

    SAEs that stream together end with the slowest. While some have not begun, the pace of all together counts. What a
    resumed SAE had seen at the start is in `tokens_before`.
    """
    active = [sae for sae in saes if sae["state"] not in ("done", "stopped", "failed")]
    if not active:
        return 0.0
    seen = [sae["tokens"] - sae.get("tokens_before", 0) for sae in active]
    left = [max(0, tokens - sae["tokens"]) for sae in active]
    if all(seen):
        return max(elapsed * rest / moved for moved, rest in zip(seen, left, strict=True))
    everything = sum(sae["tokens"] - sae.get("tokens_before", 0) for sae in saes)
    return elapsed * sum(left) / everything if everything else None


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 07 min`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def short_names(names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Each SAE's name without the fields that all share, and those fields.

    Such as `{"topk_w256_k8_resid_post.2_…": "w256 k8"}, "topk resid_post.2 …"`.
    """
    parts = [match.groups() if (match := NAME.match(name)) else None for name in names]
    if not names or None in parts:
        return {name: name for name in names}, ""
    differs = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    if not any(differs):
        differs = [part in ("width", "level") for part in NAME.groupindex]
    widest = [max(map(len, column)) for column in zip(*parts, strict=True)]
    short = [
        " ".join(part.ljust(size) for part, keep, size in zip(name, differs, widest, strict=True) if keep).rstrip()
        for name in parts
    ]
    common = " ".join(part for part, differing in zip(parts[0], differs, strict=True) if not differing)
    return dict(zip(names, short, strict=True)), common


def _most_interesting(saes: Sequence[Status], rows: int) -> list[Status]:
    """At most `rows` of the SAEs, in their own order. Those at work are kept before those that wait or are done."""
    rank = {state: i for i, state in enumerate(STATES)}
    chosen = sorted(range(len(saes)), key=lambda i: (rank.get(saes[i]["state"], 0), i))[:rows]
    return [saes[i] for i in sorted(chosen)]


def _bar(share: float) -> Text:
    share = min(1.0, share)
    full = int(share * BAR)
    return Text.assemble(("━" * full, "green"), ("━" * (BAR - full), "bright_black"), f" {int(share * 100):3d}%")


def _number(sae: Status, key: str, form: str) -> str:
    value = sae.get(key)
    return "–" if value is None else format(value, form)


class LiveTable:
    """Shows the progress while the sweep runs: `with LiveTable(tokens, title) as show: show(saes, stream)`."""

    def __init__(self, tokens: int, title: str = "", console: Console | None = None) -> None:
        self.tokens = tokens
        self.title = title
        self.console = console or Console()
        self._start = time.monotonic()  # Start of the training, if this object is made when the first SAE begins
        self._last_line = -LINE_SECONDS
        self._tokens_before: dict[str, int] = {}
        self._live = (
            Live(console=self.console, auto_refresh=False, transient=False) if self.console.is_terminal else None
        )

    def __enter__(self) -> LiveTable:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, saes: Sequence[Status], stream: Status, last: bool = False) -> None:
        """Redraw the table. Without a terminal, print a line every ten seconds, and for the `last` status."""
        elapsed = time.monotonic() - self._start
        saes = [self._since_before(sae) for sae in saes]
        if self._live:
            self._live.update(
                progress(saes, stream, self.tokens, elapsed, self.title, self.console.height, self.console.width),
                refresh=True,
            )
        elif last or elapsed - self._last_line >= LINE_SECONDS:
            self._last_line = elapsed
            self.console.print(line(saes, stream, self.tokens, elapsed), soft_wrap=True, highlight=False, markup=False)

    def _since_before(self, sae: Status) -> Status:
        """The status with the tokens that the SAE had seen when its trainer first told of it. Unknown tokens are 0."""
        if sae["tokens"] is None:
            return {**sae, "tokens": 0}
        return {**sae, "tokens_before": self._tokens_before.setdefault(sae["name"], sae["tokens"])}
