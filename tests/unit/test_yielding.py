"""When serving gives way to fetches of the host, in virtual time."""

import math

import pytest

from backend.peers.yielding import FIRST_HOLD_S, REST_S, TRIAL_S, Phase, YieldRule

STEP_S = 0.01
UP_BPS = 1000


def fetch_for(
    rule: YieldRule, start: float, duration_s: float, *, yielding: int, serving: int, served: int = 10
) -> list[bool]:
    """Has bytes arrive at each step, `yielding` or `serving` many; whether serving gave way, by step."""
    gave_way = []
    for step in range(round(duration_s / STEP_S)):
        now = start + step * STEP_S
        gives_way = rule.yields(now)
        gave_way.append(gives_way)
        rule.received(yielding if gives_way else serving, now)
        rule.served(1 if gives_way else served, now)
    return gave_way


def test_serving_yields_at_once_and_no_longer_than_the_fetch() -> None:
    rule = YieldRule(0.0)
    assert not rule.yields(10.0)
    rule.started(10.0)
    assert rule.rate_bps(UP_BPS, 10.0) == 100
    rule.ended(10.01)
    assert rule.rate_bps(UP_BPS, 10.01) is None
    assert rule.next_at(10.01) == math.inf


def test_serving_goes_on_yielding_where_that_made_fetches_faster() -> None:
    rule = YieldRule(0.0)
    rule.started(0.0)
    gave_way = fetch_for(rule, 0.0, 2 * TRIAL_S + FIRST_HOLD_S, yielding=200, serving=100)
    assert rule.phase is Phase.YIELDING
    assert gave_way.count(False) <= TRIAL_S / STEP_S + 1


def test_serving_goes_on_where_yielding_did_not_help() -> None:
    rule = YieldRule(0.0)
    rule.started(0.0)
    gave_way = fetch_for(rule, 0.0, 10.0, yielding=100, serving=100)
    assert rule.phase is Phase.SERVING
    assert gave_way.count(True) / len(gave_way) <= 0.05


def test_hosts_that_all_yield_to_each_other_do_not_go_on_so() -> None:
    """A cluster in which everybody fetches from everybody: yielding makes all of them slower."""
    rule = YieldRule(0.0)
    rule.started(0.0)
    gave_way = fetch_for(rule, 0.0, 10.0, yielding=10, serving=100)
    assert gave_way.count(True) / len(gave_way) <= 0.05


def test_nothing_served_is_no_reason_to_yield() -> None:
    rule = YieldRule(0.0)
    rule.started(0.0)
    fetch_for(rule, 0.0, 1.0, yielding=200, serving=100, served=0)
    assert rule.phase is Phase.SERVING


def test_short_fetches_add_up_to_a_trial() -> None:
    rule, now = YieldRule(0.0), 0.0
    for _ in range(60):
        rule.started(now)
        fetch_for(rule, now, 0.02, yielding=100, serving=100)
        rule.ended(now + 0.02)
        now += 0.1
    assert rule.phase is Phase.SERVING


def test_a_rest_gives_the_next_fetch_the_benefit_of_the_doubt() -> None:
    rule = YieldRule(0.0)
    rule.started(0.0)
    fetch_for(rule, 0.0, 1.0, yielding=100, serving=100)
    rule.ended(1.0)
    rule.started(2.0)
    assert not rule.yields(2.0)
    rule.ended(2.0)
    rule.started(2.0 + REST_S)
    assert rule.yields(2.0 + REST_S)


def test_one_of_two_fetches_is_enough() -> None:
    rule = YieldRule(0.0)
    rule.started(0.0)
    rule.started(0.0)
    rule.ended(0.01)
    assert rule.yields(0.01)
    assert rule.next_at(0.01) == pytest.approx(TRIAL_S)


def test_without_a_limit_the_tenth_is_of_the_speed_measured() -> None:
    rule = YieldRule(0.0)
    for step in range(100):
        rule.served(50, step * 0.01)
    rule.started(1.0)
    assert rule.rate_bps(None, 1.0) == pytest.approx(500, rel=0.1)
    fresh = YieldRule(0.0)
    fresh.started(0.0)
    assert fresh.rate_bps(None, 0.0) is None
