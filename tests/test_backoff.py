"""runner.supervision.backoff: a budget, then growing pauses."""

from __future__ import annotations

from runner.supervision.backoff import RestartBackoff


def test_the_budget_costs_no_pause() -> None:
    """F8: a few deaths in start-up are followed by a new start at once."""
    backoff = RestartBackoff(budget=5, window=10)
    for _ in range(4):
        backoff.failed(100.0)
        assert backoff.delay(100.0) == 0
    assert not backoff.engaged


def test_pauses_double_to_a_ceiling() -> None:
    """F8: past the budget each try costs twice the pause of the one before, up to the longest."""
    backoff = RestartBackoff(budget=2, window=10, first_pause=1, longest_pause=5)
    now = 100.0
    backoff.failed(now)
    pauses = []
    for _ in range(5):
        backoff.failed(now)
        pauses.append(backoff.delay(now))
        now += pauses[-1]
        assert backoff.delay(now) == 0
    assert pauses == [1, 2, 4, 5, 5]


def test_old_failures_are_forgotten() -> None:
    """F8: the budget is per time window."""
    backoff = RestartBackoff(budget=2, window=10)
    for now in (0.0, 11.0, 22.0, 33.0):
        backoff.failed(now)
        assert not backoff.engaged


def test_a_success_releases_the_brake() -> None:
    """F8: once a worker has started, the count begins anew."""
    backoff = RestartBackoff(budget=2)
    backoff.failed(0)
    backoff.failed(0)
    assert backoff.engaged
    backoff.succeeded()
    assert backoff.delay(0) == 0
    backoff.failed(0)
    assert not backoff.engaged
