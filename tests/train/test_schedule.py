"""Schedules of learning rate, sparsity, dead latents and reports."""

from raysae.config import TrainConfig
from raysae.train.schedule import dead_after, learning_rate_factor, report_steps, sparsity_factor


def test_learning_rate_rises_stays_and_falls_linearly():
    factors = [learning_rate_factor(step, 100, warmup=0.1, decay=0.2) for step in range(100)]
    assert factors[:10] == [(i + 1) / 10 for i in range(10)]
    assert factors[10:81] == [1.0] * 71
    assert factors[81:] == [(100 - i) / 20 for i in range(81, 100)]
    assert min(factors) > 0


def test_learning_rate_without_warmup_and_decay_is_constant():
    assert {learning_rate_factor(step, 7, 0, 0) for step in range(7)} == {1.0}


def test_learning_rate_where_warmup_and_decay_overlap_takes_the_smaller():
    factors = [learning_rate_factor(step, 10, 1.0, 1.0) for step in range(10)]
    assert factors == [min((i + 1) / 10, (10 - i) / 10) for i in range(10)]


def test_sparsity_rises_from_zero():
    assert [sparsity_factor(step, 100, 0.04) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert sparsity_factor(0, 100, 0) == 1


def test_dead_after_ten_million_tokens_or_a_tenth_of_the_run():
    assert dead_after(1_000_000) == 100_000
    assert dead_after(10**9) == 10_000_000
    assert dead_after(3) == 1


def test_report_steps_are_even_and_end_with_the_run():
    assert report_steps(TrainConfig(tokens=1000, batch=10, reports=4)) == [25, 50, 75, 100]
    assert report_steps(TrainConfig(tokens=1_000_000, batch=1024, reports=1)) == [977]
    assert report_steps(TrainConfig(tokens=30, batch=10, reports=10)) == [1, 2, 3]
