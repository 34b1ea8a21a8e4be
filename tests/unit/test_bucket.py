"""Buckets and the queue before them, in virtual time that the test sets."""

import math

import pytest

from backend.peers.bucket import QUANTUM_BYTES, Gate, Places, TokenBucket
from backend.peers.claims import Claim, ClaimQueue
from backend.priority import FetchClass

MIB = 1 << 20


def pump_until(queue: ClaimQueue, end: float, now: float = 0.0) -> list[tuple[float, Claim]]:
    """Runs a queue from `now` until nothing can pass before `end`; each claim with the time of its grant."""
    granted = [(now, claim) for claim in queue.pump(now)]
    while (now := queue.next_at(now)) <= end:
        granted += [(now, claim) for claim in queue.pump(now)]
    return granted


def claim_of(
    queue: ClaimQueue, amount: float, *gates: Gate, fetch_class: FetchClass = FetchClass.PREFETCH
) -> Claim:
    claim = Claim(amount, fetch_class, gates)
    queue.add(claim)
    return claim


def test_a_part_may_put_a_bucket_in_debt_by_a_quantum() -> None:
    bucket = TokenBucket(10 * MIB, 0.0)
    bucket.take(MIB, 0.0)  # what a full bucket holds
    bucket.take(QUANTUM_BYTES, 0.0)
    assert bucket.ready_in(0.0) == pytest.approx(QUANTUM_BYTES / (10 * MIB))
    assert bucket.ready_in(1.0) == 0.0


@pytest.mark.parametrize(
    ("rate", "quantum"),
    [(None, math.inf), (100 * MIB, QUANTUM_BYTES), (1000, 100), (1, 1), (0, 1)],
)
def test_a_quantum_is_no_more_than_flows_in_a_burst(rate: float | None, quantum: float) -> None:
    assert TokenBucket(rate, 0.0).quantum == quantum


def test_a_stopped_bucket_is_never_ready_and_goes_on_after_a_change() -> None:
    bucket = TokenBucket(0, 0.0)
    bucket.take(0, 0.0)
    bucket.change(None, 1.0)
    assert bucket.ready_in(1.0) == 0.0
    bucket.change(0, 2.0)
    assert bucket.ready_in(2.0) == math.inf
    bucket.change(MIB, 3.0)
    assert bucket.ready_in(3.0) == 0.0


def test_a_lower_rate_does_not_keep_the_debt_of_the_higher_one() -> None:
    bucket = TokenBucket(100 * MIB, 0.0)
    bucket.take(10 * MIB, 0.0)
    bucket.take(QUANTUM_BYTES, 0.0)
    bucket.change(1000, 0.0)
    assert bucket.ready_in(0.0) == pytest.approx(0.1)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(1000, 10.0)
    bucket.take(100, 10.0)
    bucket.take(100, 5.0)
    assert bucket.ready_in(5.0) == pytest.approx(0.1)


def test_what_is_given_back_can_be_taken_again() -> None:
    bucket = TokenBucket(1000, 0.0)
    bucket.take(200, 0.0)
    assert not bucket.is_rested(0.0)
    bucket.give_back(200, 0.0)
    assert bucket.is_rested(0.0)
    assert bucket.passed == 0


def test_places_become_free_by_leaving_only() -> None:
    places, queue = Places(2), ClaimQueue()
    first, second, third = (claim_of(queue, 1, places) for _ in range(3))
    assert queue.pump(0.0) == [first, second]
    assert queue.next_at(0.0) == math.inf
    places.give_back(1, 1.0)
    assert queue.pump(1.0) == [third]
    places.limit = 0
    claim_of(queue, 1, places)
    places.give_back(2, 1.0)
    assert queue.pump(2.0) == []
    places.limit = None
    assert len(queue.pump(2.0)) == 1


def test_classes_go_in_strict_order_and_by_age() -> None:
    bucket, queue = TokenBucket(MIB, 0.0), ClaimQueue()
    claims = {
        fetch_class: [claim_of(queue, MIB, bucket, fetch_class=fetch_class) for _ in range(2)]
        for fetch_class in reversed(FetchClass)
    }
    granted = pump_until(queue, 20.0)
    assert [claim for _, claim in granted] == [
        claim for fetch_class in FetchClass for claim in claims[fetch_class]
    ]


def test_a_late_urgent_claim_waits_for_one_quantum_at_most() -> None:
    bucket, queue = TokenBucket(MIB, 0.0), ClaimQueue()
    claim_of(queue, 100 * MIB, bucket, fetch_class=FetchClass.BACKGROUND)
    pump_until(queue, 3.0)
    urgent = claim_of(queue, 1000, bucket, fetch_class=FetchClass.ON_DEMAND)
    ((at, first),) = pump_until(queue, 10.0, now=3.0)
    assert first is urgent
    assert at <= 3.0 + bucket.quantum / MIB + 1e-6


def test_who_waits_for_a_gate_of_its_own_holds_up_nobody_else() -> None:
    host, stopped, queue = TokenBucket(MIB, 0.0), TokenBucket(0, 0.0), ClaimQueue()
    stuck = claim_of(queue, 1000, host, stopped, fetch_class=FetchClass.ON_DEMAND)
    other = claim_of(queue, 1000, host, fetch_class=FetchClass.BACKGROUND)
    assert queue.pump(0.0) == [other]
    assert not stuck.is_granted


def test_a_raised_claim_overtakes() -> None:
    bucket, queue = TokenBucket(MIB, 0.0), ClaimQueue()
    before = claim_of(queue, MIB, bucket, fetch_class=FetchClass.READAHEAD)
    raised = claim_of(queue, MIB, bucket, fetch_class=FetchClass.PREFETCH)
    queue.raise_to(raised, FetchClass.ON_DEMAND)
    queue.raise_to(raised, FetchClass.BACKGROUND)  # never down
    assert [claim for _, claim in pump_until(queue, 5.0)] == [raised, before]


def test_a_withdrawn_claim_gives_back_what_it_paid_in_every_gate() -> None:
    host, task, queue = TokenBucket(MIB, 0.0), TokenBucket(MIB // 2, 0.0), ClaimQueue()
    claim = claim_of(queue, MIB, host, task)
    pump_until(queue, 0.5)
    assert 0 < claim.paid < MIB
    queue.withdraw(claim, 0.5)
    assert (host.passed, task.passed, len(queue)) == (0, 0, 0)
    done = claim_of(queue, 100, host)
    queue.pump(0.5)
    queue.withdraw(done, 0.5)
    assert host.passed == 0


def test_a_negative_amount_is_a_callers_mistake() -> None:
    with pytest.raises(ValueError, match="-1"):
        Claim(-1, FetchClass.ON_DEMAND, (Places(1),))


@pytest.mark.parametrize("rate_rps", [0.5, 3.0, 40.0])
def test_requests_pass_at_their_rate_give_or_take_one(rate_rps: float) -> None:
    requests, queue = TokenBucket(rate_rps, 0.0, largest=1), ClaimQueue()
    for _ in range(500):
        claim_of(queue, 1, requests)
    passed = len(pump_until(queue, 10.0))
    assert abs(passed - 10 * rate_rps) <= 1 + 0.1 * rate_rps
