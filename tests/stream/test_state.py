"""StreamState against a simple model of who has read what. Also what a pass of the stream costs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from raysae.stream.state import Life, NotJoinedError, StreamError, StreamState, SupersededError

SHARDS = 12
ATTEMPTS = 4
NAMES = ["a", "b", "c", "d"]


class StreamMachine(RuleBasedStateMachine):
    """The model is the list of shards that each consumer has read.

    The stream must hand out start, start + 1, … and nothing else, within its bounds.
    """

    @initialize(cap=st.integers(1, 5), lag=st.sampled_from(["stall", "detach"]))
    def start(self, cap, lag):
        self.state = StreamState(SHARDS, cap, lag, ATTEMPTS)
        self.now = 0.0
        self.read: dict[str, list[int]] = {}
        self.range: dict[str, range] = {}
        self.life: dict[str, Life] = {}  # The last life of each consumer. It stays when the consumer has left
        self.over: list[Life] = []  # Of processes that are dead or late, and of readings that have ended
        self.failures: dict[int, int] = {}
        self.processes = 0

    @rule(names=st.sets(st.sampled_from(NAMES)), seconds=st.floats(0, 3))
    def expect(self, names, seconds):
        self.state.expect(sorted(names - self.range.keys()), self.now + seconds)

    @rule(seconds=st.floats(0.1, 2))
    def wait(self, seconds):
        self.now += seconds
        self.state.expire(self.now)

    def begin(self, name, position, until, same_process=False):
        """Joins in a new life: that of a new process, or the next reading of the same one."""
        old = self.life.get(name)
        if old:
            self.over.append(old)
        if old and same_process:
            self.life[name] = old._replace(reading=old.reading + 1)
        else:
            self.over.append(Life(name, self.processes))  # A process that died before its first message came
            self.life[name] = Life(name, self.processes + 1)
            self.processes += 2
        self.state.join(self.life[name], position, until)

    @rule(
        name=st.sampled_from(NAMES),
        position=st.integers(0, SHARDS),
        length=st.integers(0, SHARDS),
        same_process=st.booleans(),
    )
    def join(self, name, position, length, same_process):
        until = min(SHARDS, position + length)
        self.begin(name, position, until, same_process)
        self.range[name], self.read[name] = range(position, until), []

    @precondition(lambda self: self.range)
    @rule(data=st.data())
    def restart_from_checkpoint(self, data):
        name = data.draw(st.sampled_from(sorted(self.range)))
        back = data.draw(st.integers(0, len(self.read[name])))
        self.begin(name, self.range[name].start + back, self.range[name].stop)
        self.read[name] = self.read[name][:back]

    @precondition(lambda self: self.range)
    @rule(data=st.data())
    def leave(self, data):
        name = data.draw(st.sampled_from(sorted(self.range)))
        self.state.leave(self.life[name])
        self.over.append(self.life[name])
        del self.range[name], self.read[name]

    @precondition(lambda self: self.range)
    @rule(data=st.data())
    def the_driver_dismisses_who_lives_and_joins_again(self, data):
        name = data.draw(st.sampled_from(sorted(self.range)))
        self.state.dismiss(name)
        with pytest.raises(NotJoinedError):
            self.state.ready(self.life[name], 0)
        self.state.join(self.life[name], self.next_of(name), self.range[name].stop)

    @precondition(lambda self: self.over)
    @rule(data=st.data(), shard=st.integers(0, SHARDS), message=st.sampled_from(["join", "advance", "ready", "leave"]))
    def an_earlier_life_says_something_late(self, data, shard, message):
        life = data.draw(st.sampled_from(self.over))
        if message == "leave":
            self.state.leave(life)
            return
        with pytest.raises(SupersededError):
            getattr(self.state, message)(life, shard)

    @precondition(lambda self: self.range)
    @rule(data=st.data(), message=st.sampled_from(["join", "advance"]))
    def a_message_of_the_present_life_comes_again(self, data, message):
        name = data.draw(st.sampled_from(sorted(self.range)))
        said = data.draw(st.integers(self.range[name].start, self.next_of(name)))
        if message == "join":
            self.state.join(self.life[name], said, self.range[name].stop)
        else:
            self.state.advance(self.life[name], said)

    @rule()
    def lease(self):
        before = set(self.state.leased | self.state.held)
        shard = self.state.lease()
        if shard is not None:
            assert shard not in before, "a shard held or in production was leased again"
            wanting = [m for m in self.state.passes() if any(c.real and c.needs(shard) for c in m)]
            assert any(m[0].position <= shard < m[0].position + self.state.window for m in wanting), (
                "leased outside every window"
            )

    @precondition(lambda self: self.state.leased)
    @rule(data=st.data())
    def produce(self, data):
        shard = data.draw(st.sampled_from(sorted(self.state.leased)))
        assert self.state.produced(shard) == (shard in self.state.held)
        self.failures.pop(shard, None)

    @precondition(lambda self: any(self.failures.get(s, 0) < ATTEMPTS - 1 for s in self.state.leased))
    @rule(data=st.data())
    def producer_dies(self, data):
        shard = data.draw(
            st.sampled_from(sorted(s for s in self.state.leased if self.failures.get(s, 0) < ATTEMPTS - 1))
        )
        assert not self.state.fail(shard, "died")
        self.failures[shard] = self.failures.get(shard, 0) + 1

    @precondition(lambda self: any(self.failures.get(s, 0) == ATTEMPTS - 1 for s in self.state.leased))
    @rule(data=st.data())
    def shard_is_skipped(self, data):
        shard = data.draw(
            st.sampled_from(sorted(s for s in self.state.leased if self.failures.get(s, 0) == ATTEMPTS - 1))
        )
        assert self.state.fail(shard, "poisoned")
        self.state.skip(shard)
        assert all(self.state.ready(self.life[name], shard) for name in self.range)

    @precondition(lambda self: self.state.held)
    @rule(data=st.data())
    def machine_dies(self, data):
        self.state.lose(data.draw(st.sampled_from(sorted(self.state.held))))

    @precondition(lambda self: self.range)
    @rule(data=st.data())
    def consume(self, data):
        self.try_read(data.draw(st.sampled_from(sorted(self.range))))

    def next_of(self, name):
        return self.range[name].start + len(self.read[name])

    def try_read(self, name) -> bool:
        shard = self.next_of(name)
        if shard >= self.range[name].stop:
            with pytest.raises(StreamError):
                self.state.ready(self.life[name], shard)
            return False
        if not self.state.ready(self.life[name], shard):
            return False
        self.read[name].append(shard)
        self.state.advance(self.life[name], shard + 1)
        self.stands_behind(name, shard + 1)
        return True

    @invariant()
    def never_more_than_the_cap(self):
        assert (
            len(self.state.leased | self.state.held) == len(self.state.leased) + len(self.state.held) <= self.state.cap
        )

    @invariant()
    def nothing_held_for_nobody(self):
        for shard in self.state.held:
            assert any(c.needs(shard) for c in self.state.consumers.values())

    @invariant()
    def nothing_lost(self):
        for name in self.range:
            self.stands_behind(name, self.next_of(name))

    def stands_behind(self, name, shard):
        """The consumer is at `shard`, or at the first later one that is not skipped."""
        while shard in self.state.skipped:
            shard += 1
        assert self.state.consumers[name].position == shard

    def teardown(self):
        """Every consumer reads to its end, in order, while all live and one producer works."""
        if not hasattr(self, "state"):
            return
        self.state.expire(float("inf"))
        for _ in range(20 * SHARDS * len(NAMES)):
            if self.state.lease() is not None or self.state.leased:
                self.state.produced(min(self.state.leased))
            for name in sorted(self.range):
                self.try_read(name)
            self.never_more_than_the_cap()
        assert all(read == list(self.range[name]) for name, read in self.read.items())


TestStream = StreamMachine.TestCase
TestStream.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@given(
    cap=st.integers(1, 6),
    consumers=st.integers(1, 4),
    producers=st.integers(1, 3),
    seed=st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_a_pass_costs_each_shard_once(cap, consumers, producers, seed):
    """Consumers that start together share every shard, at any speeds and in any order of production."""
    state = StreamState(SHARDS, cap)
    position = {f"c{i}": 0 for i in range(consumers)}
    state.expect(position, until=1.0)
    late = list(position)
    seed.shuffle(late)
    leased = []
    while any(p < SHARDS for p in position.values()):
        if late and seed.random() < 0.3:
            state.join(Life(late.pop()), 0)
        if len(state.leased) < producers and (shard := state.lease()) is not None:
            leased.append(shard)
        if state.leased and seed.random() < 0.7:
            state.produced(seed.choice(sorted(state.leased)))
        name = seed.choice(sorted(position))
        if name not in late and position[name] < SHARDS and state.ready(Life(name), position[name]):
            position[name] += 1
            state.advance(Life(name), position[name])
    assert leased == list(range(SHARDS))
    assert not state.held
    assert state.lease() is None


def produce_all(state: StreamState) -> list[int]:
    """Produces what the state leases, until it leases no more."""
    shards = []
    while (shard := state.lease()) is not None:
        shards.append(shard)
        assert len(shards) <= 100, "it gives up what it has just asked for"
        state.produced(shard)
    return shards


def test_stall_waits_for_the_slowest():
    state = StreamState(100, cap=4)
    state.join(Life("slow"), 0)
    state.join(Life("fast"), 0)
    assert produce_all(state) == [0, 1, 2, 3]
    state.advance(Life("fast"), 4)
    assert produce_all(state) == []
    assert not state.ready(Life("fast"), 4)
    state.advance(Life("slow"), 1)
    assert produce_all(state) == [4]
    assert state.ready(Life("fast"), 4)


def test_detach_goes_on_alone():
    state = StreamState(100, cap=4, lag="detach")
    state.join(Life("slow"), 0)
    state.join(Life("fast"), 0)
    assert produce_all(state) == [0, 1]
    for shard in range(2, 20):
        state.advance(Life("fast"), shard)
        assert shard in produce_all(state) + sorted(state.held)
        assert state.ready(Life("fast"), shard)
    assert state.ready(Life("slow"), 0)
    assert state.ready(Life("slow"), 1)


def test_late_joiner_merges_when_it_has_caught_up():
    state = StreamState(100, cap=4)
    state.join(Life("early"), 20)
    assert produce_all(state) == [20, 21, 22, 23]
    state.join(Life("late"), 0)
    assert produce_all(state) == [0]
    assert state.held == {0, 20, 21, 22}, "the cap holds for both passes together: the furthest shard gave way"
    for shard in range(1, 16):
        state.advance(Life("late"), shard)
        state.produced(state.lease())
    assert len(state.passes()) == 2
    state.advance(Life("late"), 17)
    assert len(state.passes()) == 1
    produced = []
    for shard in range(18, 24):
        produced += produce_all(state)
        state.advance(Life("late"), shard)
    assert 21 not in produced, "a shard still held for the early consumer serves the late one"


def test_placeholders_keep_the_first_shards_until_their_time():
    state = StreamState(100, cap=2)
    state.expect(["a", "b"], until=10)
    assert state.lease() is None, "nothing is produced for those who may never come"
    state.join(Life("a"), 0)
    assert produce_all(state) == [0, 1]
    state.advance(Life("a"), 2)
    assert state.held == {0, 1}
    assert state.lease() is None
    assert not state.expire(9.9)
    assert state.expire(10)
    assert not state.held
    assert produce_all(state) == [2, 3]


def test_only_needed_shards_are_produced():
    state = StreamState(100, cap=8)
    state.join(Life("a"), 0, until=3)
    assert produce_all(state) == [0, 1, 2]
    with pytest.raises(StreamError, match="shard 3"):
        state.ready(Life("a"), 3)


def test_a_shard_that_cannot_be_produced_is_named_to_its_consumers():
    state = StreamState(100, cap=2, attempts=ATTEMPTS)
    state.join(Life("a"), 0)
    for attempt in range(1, ATTEMPTS + 1):
        assert state.lease() == 0
        assert state.fail(0, "out of memory") == (attempt == ATTEMPTS)
    with pytest.raises(StreamError, match=r"shard 0 .* consumer a .*out of memory"):
        state.ready(Life("a"), 0)
    assert state.lease() == 1


def test_a_dead_producer_weighs_less_than_a_failure_of_its_shard():
    state = StreamState(100, cap=2, attempts=2)
    state.join(Life("a"), 0)
    for death in range(1, 7):
        assert state.lease() == 0
        assert state.last_attempt(0) == (death > 3)
        assert state.fail(0, "killed", died=True) == (death == 6)


def test_a_skipped_shard_is_passed_over_by_everyone_and_takes_no_place():
    state = StreamState(4, cap=1, skipped=[0, 2])
    for name in ("a", "b"):
        state.join(Life(name), 0)
        assert state.ready(Life(name), 0)
    # A consumer finds the first rows even before it passes over shard 0
    assert produce_all(state) == [1]
    for name in ("a", "b"):
        state.advance(Life(name), 2)
        assert state.ready(Life(name), 2)
        state.advance(Life(name), 3)
    assert produce_all(state) == [3]


def test_going_back_keeps_what_is_within_the_window():
    state = StreamState(100, cap=2)
    state.join(Life("a"), 5)
    assert produce_all(state) == [5, 6]
    state.join(Life("a", 1), 4)
    assert produce_all(state) == [4]
    assert state.held == {4, 5}


@given(
    positions=st.lists(st.integers(0, 30), min_size=2, max_size=5, unique=True),
    room=st.integers(0, 3),
    lag=st.sampled_from(["stall", "detach"]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_the_slowest_goes_on_while_the_others_are_dead(positions, room, lag, order):
    """The others fill all places before it comes. It must get as far as the next of them."""
    slowest, *others = sorted(positions)
    state = StreamState(100, len(positions) + room, lag)
    order.shuffle(others)
    for position in others:
        state.join(Life(f"at {position}"), position)
        produce_all(state)
    state.join(Life("slowest"), slowest)
    for shard in range(slowest, min(others)):
        produce_all(state)
        assert state.ready(Life("slowest"), shard)
        state.advance(Life("slowest"), shard + 1)


def test_passes_that_all_lost_their_shards_do_not_block_each_other():
    state = StreamState(100, cap=4, lag="detach")
    for i, position in enumerate((0, 10, 20, 30)):
        state.join(Life(f"c{i}"), position)
    state.held = {1, 11, 21, 31}  # The loss of a machine leaves such a state
    assert state.lease() is not None
