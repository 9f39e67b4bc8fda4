"""Which shard to produce next, what to hold and who may read it: the queue's decisions, as plain deterministic code.

There is no clock, no thread and no Ray here. `queue.StreamQueue` is a shell around this class and passes the time in.
The only facts are the consumers' positions and the shards held or in production. A position counts the shards that a
consumer has completely consumed. Everything else is derived from these facts. Hundreds of consumers stand at a few
positions only. They are kept by position, so that most decisions need not look at each of them.

A *pass* is a group of consumers that read together. Its *base* is the smallest position in it. Its *window* is the
shards [base, base + window). Only these are produced for it.

- Under `lag="stall"` a chain of consumers no more than a window apart is one pass. A consumer far ahead waits at the
  end of the window.
- Under `lag="detach"` a pass reaches to the end of the window of its slowest member. A consumer beyond it goes on in a
  pass of its own. The window is then half of the cap, so that there is room for that pass.

A late joiner is a pass of its own until its window touches another pass's. Then they are one pass, by the same rule.

A shard is held while a consumer that needs it is less than a window below it. It serves everyone who comes to it
meanwhile. Shards held and in production, over all passes, never exceed the cap. With a cap of 1, production and
consumption alternate. From 2 on they overlap.

Progress: a pass whose slowest consumer lacks its shard is *starving* and comes first for a free place. If no place is
free, it takes the place of the furthest shard that no consumer stands at. That shard is produced again later. This
happens once when a late joiner begins, and after a consumer went back. So every pass has a place while there are no
more passes than places. That holds even if the others' consumers are dead. If there are more passes, those without a
place wait until another has consumed its shard. Within a pass, everyone goes on as long as the slowest consumer does.

Each reading of a consumer, from its joining to its leaving, is a *life* of its own. Lives are ordered. What an earlier
life says late changes nothing, however its messages are doubled or reordered: its process may be dead, and the
consumer's name has gone on to another.

A shard that fails too often is *bad*: a consumer that asks for it gets an error. It may be *skipped* instead. A skipped
shard is ready at once for everyone and holds nothing. Consumers pass over it, so `position` never stands at one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

# A producer's death counts as this share of a failed attempt, because mostly the job is not its cause.
DEATH = Fraction(1, 3)


class StreamError(RuntimeError):
    """The stream cannot give what a consumer asks for. The message says which shard and why."""


class NotJoinedError(StreamError):
    """The stream does not know the consumer, for instance after the queue's restart. It can join again and go on."""


class SupersededError(StreamError):
    """The life that asks is over: it has left the stream, or a later life of its consumer has joined."""


class Life(NamedTuple):
    """One reading of the stream by a consumer. Of two lives of one consumer, the greater is the later."""

    consumer: str
    process: int = 0  # Number of the reading process. The queue gives later processes greater ones
    reading: int = 0  # Number of this reading in its process


class Attempts:
    """How often a job may fail: `limit` times. A death of its producer weighs `DEATH`."""

    def __init__(self, limit: int):
        self.limit = limit
        self._spent = Fraction(0)

    @property
    def last(self) -> bool:
        """Whether one more failure is the last."""
        return self._spent + 1 >= self.limit

    def fail(self, died: bool) -> bool:
        """Note a failure, or that the producer `died`. Returns whether no attempt is left."""
        self._spent += DEATH if died else 1
        return self._spent >= self.limit


@dataclass(eq=False)
class Consumer:
    """A reader of the stream. It has completely consumed `position` shards and needs the shards [position, until)."""

    position: int
    until: int
    life: Life | None = None  # A placeholder has none
    expected_until: float | None = None  # A placeholder has a time here, at which it is given up
    turn: int = 0  # Number of the last lease for its pass

    @property
    def real(self) -> bool:
        return self.life is not None

    def needs(self, shard: int) -> bool:
        return self.position <= shard < self.until


class StreamState:
    """See the module.

    Args:
        shards: number of shards in the stream. Indices run from 0.
        cap: shards that may be held or in production together, ≥ 1.
        lag: what a consumer does that is a window ahead of the slowest. With `stall` it waits. With `detach` it goes on
            in a pass of its own.
        attempts: how often a shard is tried before it is bad, see `fail`.
        skipped: shards that no consumer gets.
    """

    def __init__(
        self,
        shards: int,
        cap: int,
        lag: Literal["stall", "detach"] = "stall",
        attempts: int = 4,
        skipped: Iterable[int] = (),
    ):
        self.shards = shards
        self.cap = cap
        self.lag = lag
        self.window = cap if lag == "stall" else max(1, cap // 2)
        self.consumers: dict[str, Consumer] = {}
        # The earliest life of each consumer that may still join. It stays when the consumer leaves.
        self._earliest: dict[str, Life] = {}
        # Consumers that still need something, by position. The inner dicts are ordered sets.
        self._standing: dict[int, dict[Consumer, None]] = {}
        self.leased: set[int] = set()
        self.held: set[int] = set()
        self.attempts = attempts
        self.skipped = set(skipped)
        self._attempts: dict[int, Attempts] = {}  # Of the shards that have failed
        self._bad: dict[int, str] = {}
        self._turn = 0

    # ---------------------------------------------------------------- consumers

    def expect(self, names: Iterable[str], until: float) -> None:
        """Keep the first shards for consumers that will join by time `until`.

        Nothing is produced for them before they join. Those that have joined before are not waited for.
        """
        for name in names:
            if name not in self.consumers and name not in self._earliest:
                self._place(name, Consumer(0, self.shards, expected_until=until))

    def expire(self, now: float) -> bool:
        """Give up the expected consumers that are overdue. Returns whether there were any."""
        overdue = [name for name, c in self.consumers.items() if not c.real and c.expected_until <= now]
        for name in overdue:
            self.dismiss(name)
        return bool(overdue)

    def join(self, life: Life, position: int, until: int | None = None) -> None:
        """Register a reader of the shards [position, until), in place of the consumer's earlier lives.

        `until` is the stream's end if unset. Joining again in the same life never moves the position back.

        Raises:
            SupersededError: the life is over.
            StreamError: the stream has no such shards.
        """
        until = self.shards if until is None else until
        self._check_current(life)
        if not 0 <= position <= self.shards or until > self.shards:
            raise StreamError(
                f"consumer {life.consumer} asks for shards {position} to {until} of a stream of {self.shards} shards"
            )
        known = self.consumers.get(life.consumer)
        if known and known.life == life:
            position = max(position, known.position)
        self._earliest[life.consumer] = life
        self._place(life.consumer, Consumer(self._behind_skipped(position), until, life))

    def advance(self, life: Life, done: int) -> bool:
        """Note that the reader has consumed the shards below `done`. Returns whether that was news.

        A position never goes back, so late or repeated messages do no harm.

        Raises:
            NotJoinedError, SupersededError: see `ready`.
        """
        consumer = self._consumer(life)
        if done <= consumer.position:
            return False
        self._move(consumer, done)
        return True

    def leave(self, life: Life) -> None:
        """End the life. From now on it is over, also if it never joined."""
        if life >= self._earliest.get(life.consumer, life):
            self._earliest[life.consumer] = life._replace(reading=life.reading + 1)
            self._place(life.consumer, None)

    def dismiss(self, name: str) -> None:
        """Wait for the consumer no more, whichever life it is in. That life may join again."""
        self._place(name, None)

    def ready(self, life: Life, shard: int) -> bool:
        """Whether the reader can read `shard` now, or pass over it.

        Raises:
            NotJoinedError: the life has not joined.
            SupersededError: the life is over.
            StreamError: the shard lies outside those that it joined for, or it could not be produced.
        """
        name, consumer = life.consumer, self._consumer(life)
        if shard in self.skipped:
            return True
        if not consumer.needs(shard):
            raise StreamError(
                f"consumer {name} asks for shard {shard}, "
                f"outside its shards {consumer.position} to {consumer.until}: join again"
            )
        if shard in self._bad:
            raise StreamError(
                f"shard {shard} could not be produced in {self.attempts} attempts, "
                f"consumer {name} needs it: {self._bad[shard]}"
            )
        return shard in self.held

    # ---------------------------------------------------------------- producers

    def passes(self) -> list[list[Consumer]]:
        """The consumers that still need something, in groups that read together. Each group is sorted by position."""
        passes: list[list[Consumer]] = []
        for position in sorted(self._standing):
            if passes and self._together(passes[-1], position):
                passes[-1].extend(self._standing[position])
            else:
                passes.append(list(self._standing[position]))
        return passes

    def lease(self) -> int | None:
        """The shard to produce next, or None if there is none or no place for it.

        From now on the shard counts as in production.
        """
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
        """Whether nothing is left to lease unless a shard is lost or someone joins.

        All shards that consumers need are then held, in production, skipped or bad.
        """
        there = self.held | self.leased | self.skipped | self._bad.keys()
        return all(shard in there for c in self.consumers.values() for shard in range(c.position, c.until))

    def produced(self, shard: int) -> bool:
        """Note that a leased shard is there. Returns whether it is held. It is not if nobody needs it any more."""
        if shard not in self.leased:
            return False
        self.leased.remove(shard)
        self._attempts.pop(shard, None)
        self.held.add(shard)
        self._release(shard, shard + 1)
        return shard in self.held

    def fail(self, shard: int, reason: str, died: bool = False) -> bool:
        """Note that the production of a leased shard failed. Returns whether the shard is bad now.

        The shard can be leased again while it has attempts left, see `Attempts`. Then it is bad.
        """
        if shard not in self.leased:
            return False
        self.leased.remove(shard)
        if not self._attempts.setdefault(shard, Attempts(self.attempts)).fail(died):
            return False
        self._bad[shard] = reason
        return True

    def last_attempt(self, shard: int) -> bool:
        """Whether the shard will be bad if it fails once more."""
        return self._attempts.get(shard, Attempts(self.attempts)).last

    def skip(self, shard: int) -> None:
        """Skip a bad shard: its consumers pass over it."""
        self._bad.pop(shard, None)
        self.skipped.add(shard)
        for consumer in self.consumers.values():
            self._move(consumer, consumer.position)

    def lose(self, shard: int) -> None:
        """Note that a held shard is gone with the machine that stored it. It can be leased again."""
        self.held.discard(shard)

    # ---------------------------------------------------------------- derived

    def _check_current(self, life: Life) -> None:
        if life < self._earliest.get(life.consumer, life):
            raise SupersededError(
                f"consumer {life.consumer} has left the stream or was started again: its earlier reading is over"
            )

    def _consumer(self, life: Life) -> Consumer:
        self._check_current(life)
        consumer = self.consumers.get(life.consumer)
        if consumer is None or consumer.life != life:
            raise NotJoinedError(f"consumer {life.consumer} has not joined the stream")
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
        """The first position from `position` on that is not skipped.

        So nobody waits for a consumer that has only skipped shards before it.
        """
        while position in self.skipped:
            position += 1
        return position

    def _move(self, consumer: Consumer, position: int) -> None:
        """Move a consumer to `position`, or behind the skipped shards there.

        Only the shards that it passes can lose their last reader.
        """
        first = consumer.position
        self._take_away(consumer)
        consumer.position = self._behind_skipped(position)
        self._put(consumer)
        self._release(first, consumer.position)

    def _place(self, name: str, consumer: Consumer | None) -> None:
        """Make `consumer` the one of this name. With None there is none from now on."""
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
        """Drop those of the shards [first, last) that no consumer less than a window below them needs."""
        for shard in [shard for shard in self.held if first <= shard < last]:
            if not any(
                position <= shard < position + self.window and any(shard < c.until for c in there)
                for position, there in self._standing.items()
            ):
                self.held.remove(shard)

    def _give_up(self) -> bool:
        """Make a place for a starving pass. Returns whether there is one now.

        This drops the furthest shard held that no consumer stands at. If all shards held have a consumer at them and
        every pass is stuck, it drops the furthest of all.
        """
        spare = self.held - {c.position for c in self.consumers.values() if c.real}
        if not spare and all(self._stuck(members) for members in self.passes()):
            spare = self.held
        if not spare:
            return False
        self.held.remove(max(spare))
        return True
