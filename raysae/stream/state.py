"""Which shard to produce next, what to hold and who may read it: the queue's decisions, as plain deterministic code.

No clock, no threads, no Ray: `queue.StreamQueue` is a shell around this class and passes the time in. The only facts are the consumers'
positions (shards completely consumed) and the shards held or being produced; everything else is derived from them. Hundreds of consumers stand at a
few positions only: they are kept by position, so that most decisions need not look at each of them.

A *pass* is a group of consumers that read together. Its *base* is the smallest position in it, its *window* the shards [base, base + window);
only these are produced for it. Under `lag="stall"` a chain of consumers no more than a window apart is one pass, so that a consumer far ahead
waits at the end of the window. Under `lag="detach"` a pass reaches to the end of the window of its slowest member, and whoever is beyond it
goes on in a pass of its own; the window is then half of the cap, so that there is room for it. A late joiner is a pass of its own until its
window touches another pass's: then they are one pass, by the same rule.

A shard is held while a consumer is at most a window below it, and serves everyone who comes to it meanwhile. Shards held and in production,
over all passes, never exceed the cap. The cap may be 1: then production and consumption alternate; from 2 on they overlap.

Progress: a pass whose slowest consumer lacks its shard is *starving* and comes first for a free place. Where no place is free, it takes that of the
furthest shard that no consumer stands at, to be produced again later: that happens once when a late joiner begins, and after a consumer went back. So
every pass has a place, as long as there are no more passes than places, whether or not the others' consumers live; if there are more, the passes that
lack one wait until another has consumed its shard. Within a pass, all goes on as long as its slowest consumer does.

A shard that fails too often is *bad*: a consumer that asks for it gets an error. It may be *skipped* instead: then it is ready at once for everyone,
holds nothing, and each consumer passes over it: `position` never stands at one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal


class StreamError(RuntimeError):
    """The stream cannot give what a consumer asks for; the sentence says which shard and why."""


class NotJoinedError(StreamError):
    """A consumer that the stream does not know (any more), for instance after the queue's restart: join again and go on."""


@dataclass(eq=False)
class Consumer:
    """A reader of the stream. `position` counts the shards it has completely consumed; it needs the shards [position, until)."""

    position: int
    until: int
    expected_until: float | None = None  # set: a placeholder, given up at this time
    turn: int = 0  # when a shard was last leased for its pass

    @property
    def real(self) -> bool:
        return self.expected_until is None

    def needs(self, shard: int) -> bool:
        return self.position <= shard < self.until


class StreamState:
    """See the module.

    Args:
        shards: shards in the stream; indices run from 0.
        cap: shards that may be held or in production together, ≥ 1.
        lag: what a consumer does that is a window ahead of the slowest: `stall` waits, `detach` goes on in a pass of its own.
        attempts: times a shard is tried before it is bad; see `fail`.
        skipped: shards that no consumer gets.
    """

    def __init__(self, shards: int, cap: int, lag: Literal["stall", "detach"] = "stall", attempts: int = 4, skipped: Iterable[int] = ()):
        self.shards = shards
        self.cap = cap
        self.lag = lag
        self.window = cap if lag == "stall" else max(1, cap // 2)
        self.consumers: dict[str, Consumer] = {}
        self._standing: dict[int, dict[Consumer, None]] = {}  # those that still need something, by position; the inner dicts are ordered sets
        self.leased: set[int] = set()
        self.held: set[int] = set()
        self.attempts = attempts
        self.skipped = set(skipped)
        self._failures: dict[int, Fraction | int] = {}
        self._bad: dict[int, str] = {}
        self._turn = 0

    # ---------------------------------------------------------------- consumers

    def expect(self, names: Iterable[str], until: float) -> None:
        """Keep the first shards for consumers that will join by time `until`. Nothing is produced for them before they do."""
        for name in names:
            if name not in self.consumers:
                self._place(name, Consumer(0, self.shards, expected_until=until))

    def expire(self, now: float) -> bool:
        """Give up the expected consumers that are overdue; whether there were any."""
        overdue = [name for name, c in self.consumers.items() if not c.real and c.expected_until <= now]
        for name in overdue:
            self.leave(name)
        return bool(overdue)

    def join(self, name: str, position: int, until: int | None = None) -> None:
        """`name` reads the shards from `position` up to, not including, `until` (the stream's end). Joining again replaces its position."""
        until = self.shards if until is None else until
        if not 0 <= position <= self.shards or until > self.shards:
            raise StreamError(f"consumer {name} asks for shards {position} to {until} of a stream of {self.shards} shards")
        self._place(name, Consumer(self._behind_skipped(position), until))

    def advance(self, name: str, done: int) -> bool:
        """`name` has consumed the shards below `done`; whether that was news. Never goes back: late or repeated messages do no harm."""
        consumer = self._consumer(name)
        if done <= consumer.position:
            return False
        self._move(consumer, done)
        return True

    def leave(self, name: str) -> None:
        self._place(name, None)

    def ready(self, name: str, shard: int) -> bool:
        """Whether `name` can read `shard` now, or pass over it.

        Raises:
            NotJoinedError: `name` is unknown.
            StreamError: the shard lies outside what `name` joined for, or could not be produced.
        """
        consumer = self._consumer(name)
        if shard in self.skipped:
            return True
        if not consumer.needs(shard):
            raise StreamError(f"consumer {name} asks for shard {shard}, outside its shards {consumer.position} to {consumer.until}: join again")
        if shard in self._bad:
            raise StreamError(f"shard {shard} could not be produced in {self.attempts} attempts, consumer {name} needs it: {self._bad[shard]}")
        return shard in self.held

    # ---------------------------------------------------------------- producers

    def passes(self) -> list[list[Consumer]]:
        """The consumers that still need something, in groups that read together, each by position."""
        passes: list[list[Consumer]] = []
        for position in sorted(self._standing):
            if passes and self._together(passes[-1], position):
                passes[-1].extend(self._standing[position])
            else:
                passes.append(list(self._standing[position]))
        return passes

    def lease(self) -> int | None:
        """The shard to produce next, from now on counted as in production; None where there is none or no place for it."""
        candidates = []
        for members in self.passes():
            missing = self._missing(members)
            if missing is not None:
                base = members[0].position
                occupied = sum(base <= shard < base + self.window for shard in self.leased | self.held)
                starving = missing == next(c.position for c in members if c.real)
                candidates.append((not starving, occupied, max(c.turn for c in members), missing, members))
        if not candidates:
            return None
        satisfied, *_, shard, members = min(candidates, key=lambda candidate: candidate[:4])
        if len(self.leased) + len(self.held) >= self.cap and (satisfied or not self._give_up()):
            return None
        self._turn += 1
        for consumer in members:
            consumer.turn = self._turn
        self.leased.add(shard)
        return shard

    def all_there(self) -> bool:
        """Whether nothing is left to lease unless a shard is lost or someone joins: all that is needed is held or in production, or nobody's."""
        there = self.held | self.leased | self.skipped | self._bad.keys()
        return all(shard in there for c in self.consumers.values() for shard in range(c.position, c.until))

    def produced(self, shard: int) -> bool:
        """The shard is there; False where nobody waits for it any more (then it is not held)."""
        if shard not in self.leased:
            return False
        self.leased.remove(shard)
        self._failures.pop(shard, None)
        self.held.add(shard)
        self._release(shard, shard + 1)
        return shard in self.held

    def fail(self, shard: int, reason: str, weight: Fraction | int = 1) -> bool:
        """Production of a leased shard failed: it is to be leased again, until its failures weigh `attempts`; then it is bad: True."""
        if shard not in self.leased:
            return False
        self.leased.remove(shard)
        self._failures[shard] = self._failures.get(shard, 0) + weight
        if self._failures[shard] < self.attempts:
            return False
        self._bad[shard] = reason
        return True

    def last_attempt(self, shard: int) -> bool:
        """Whether the shard is bad if it fails once more."""
        return self._failures.get(shard, 0) + 1 >= self.attempts

    def skip(self, shard: int) -> None:
        """Nobody gets this bad shard: its consumers pass over it."""
        self._bad.pop(shard, None)
        self.skipped.add(shard)
        for consumer in self.consumers.values():
            self._move(consumer, consumer.position)

    def lose(self, shard: int) -> None:
        """A held shard is gone (the machine that stored it): it is to be leased again."""
        self.held.discard(shard)

    # ---------------------------------------------------------------- derived

    def _consumer(self, name: str) -> Consumer:
        consumer = self.consumers.get(name)
        if consumer is None or not consumer.real:
            raise NotJoinedError(f"consumer {name} has not joined the stream")
        return consumer

    def _together(self, members: list[Consumer], position: int) -> bool:
        if self.lag == "stall":
            return position <= members[-1].position + self.window
        return position < members[0].position + self.window

    def _missing(self, members: list[Consumer]) -> int | None:
        """The lowest shard in the pass's window that a member needs and that is neither held nor in production."""
        base = members[0].position
        there = self.held | self.leased | self.skipped | self._bad.keys()
        for shard in range(base, base + self.window):
            if shard not in there and any(c.real and c.needs(shard) for c in members):
                return shard
        return None

    def _stuck(self, members: list[Consumer]) -> bool:
        """Whether the slowest real member lacks the shard it is at."""
        slowest = next((c for c in members if c.real), None)
        return slowest is None or slowest.position not in self.held | self.leased

    def _behind_skipped(self, position: int) -> int:
        """Nobody waits for a consumer that has only skipped shards before it."""
        while position in self.skipped:
            position += 1
        return position

    def _move(self, consumer: Consumer, position: int) -> None:
        """To `position`, or behind the skipped shards there. Only the shards that it passes can lose their last reader."""
        first = consumer.position
        self._take_away(consumer)
        consumer.position = self._behind_skipped(position)
        self._put(consumer)
        self._release(first, consumer.position)

    def _place(self, name: str, consumer: Consumer | None) -> None:
        """`name` is this consumer from now on, or none."""
        old = self.consumers.pop(name, None)
        if consumer:
            self.consumers[name] = consumer
            self._put(consumer)
        if old:
            self._take_away(old)
            self._release(old.position, old.position + self.window)

    def _put(self, consumer: Consumer) -> None:
        if consumer.position < consumer.until:
            self._standing.setdefault(consumer.position, {})[consumer] = None

    def _take_away(self, consumer: Consumer) -> None:
        if consumer.position < consumer.until:
            there = self._standing[consumer.position]
            del there[consumer]
            if not there:
                del self._standing[consumer.position]

    def _release(self, first: int, last: int) -> None:
        """Let go of the shards of [first, last) that no consumer is at most a window below of."""
        for shard in [shard for shard in self.held if first <= shard < last]:
            if not any(
                position <= shard < position + self.window and any(shard < c.until for c in there) for position, there in self._standing.items()
            ):
                self.held.remove(shard)

    def _give_up(self) -> bool:
        """Make a place for a starving pass: let go of the furthest shard held that no consumer stands at, or, where every pass is stuck, of any."""
        spare = self.held - {c.position for c in self.consumers.values() if c.real}
        if not spare and all(self._stuck(members) for members in self.passes()):
            spare = self.held
        if not spare:
            return False
        self.held.remove(max(spare))
        return True
