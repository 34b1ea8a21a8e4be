"""Limits that the scheduler tells hosts, and what a host asks for."""

import msgspec
import pytest
import trio
from trio.testing import MockClock

from backend.peers.lease_book import LeaseBook
from backend.peers.leases import LEASE_S, Lease, OriginShare
from backend.peers.limit_settings import LimitInvalid, LimitSettings
from backend.peers.limits import open_limits
from backend.peers.scheduler_state import AnnounceRefused, SchedulerState
from backend.peers.wire import Announce, Answer, ClusterLimits, HostInfo, LimitsChange
from backend.priority import FetchClass

MIB = 1 << 20


def ask(state: SchedulerState, name: str, now: float, **more: object) -> Answer:
    host = HostInfo(name, f"http://{name}:8771")
    return state.announce(Announce(host, **more), "10.0.0.1", now)  # type: ignore[arg-type]


def lease_of(answer: Answer) -> Lease:
    assert answer.lease is not None
    return answer.lease


def test_every_answer_has_the_limits_and_a_lease() -> None:
    state = SchedulerState("epoch", leases=LeaseBook(OriginShare(), -LEASE_S))
    state.change_limits(ClusterLimits(LimitSettings(host_up_bps=7), OriginShare(bps=100 * MIB)))
    wants = OriginShare(1000 * MIB, 0.0, 4)
    leases: dict[str, Lease] = {}
    for now in (1.0, 2.0, 3.0):
        for name in "abc":
            seen = leases[name].number if name in leases else 0
            answer = ask(state, name, now, origin_wants=wants, lease_seen=seen)
            assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer) == answer
            assert answer.limits == LimitSettings(host_up_bps=7)
            leases[name] = lease_of(answer)
    shares = [lease.share.bps or 0 for lease in leases.values()]
    assert 90 * MIB < sum(shares) <= 100 * MIB
    ask(state, "a", 4.0, is_leaving=True)
    assert (state.granted(4.0).bps or 0) < 100 * MIB


def test_without_a_limit_no_number_says_what_is_lent() -> None:
    """It was 0, which is a pause, when there was no host."""
    assert LeaseBook(OriginShare(), 0.0).granted(9.0) == OriginShare()
    assert LeaseBook(OriginShare(bps=7), 0.0).granted(9.0) == OriginShare(bps=0)


@pytest.mark.parametrize(
    "wants", [OriginShare(-1), OriginShare(1 << 60), OriginShare(0, 1e300), OriginShare(0, 0, -4)]
)
def test_absurd_wants_are_refused(wants: OriginShare) -> None:
    state = SchedulerState("epoch")
    with pytest.raises(AnnounceRefused):
        ask(state, "a", 0.0, origin_wants=wants)
    assert state.refused == 1


def test_a_change_leaves_what_it_does_not_name() -> None:
    before = LimitsChange({"host_up_bps": 5}, {"origin_bps": 9, "origin_rps": 3}).applied_to(ClusterLimits())
    after = LimitsChange({"task_up_bps": 1}, cluster={"origin_bps": None}).applied_to(before)
    assert after.hosts == LimitSettings(host_up_bps=5, task_up_bps=1)
    assert after.origin == OriginShare(None, 3)
    with pytest.raises(LimitInvalid):
        LimitsChange({"host_up_bps": -5}).applied_to(after)


async def test_a_host_asks_for_more_than_flows_while_it_lacks_something(autojump_clock: MockClock) -> None:
    async with open_limits(LimitSettings(origin_bps=10 * MIB)) as limits:
        assert limits.origin_demand().bps == 0
        async with limits.origin_request(FetchClass.PREFETCH, MIB):
            for _ in range(20):
                await limits.take(MIB, FetchClass.PREFETCH, "blob", from_origin=True)
            assert (limits.origin_demand().bps or 0) > 20 * MIB
        await trio.sleep(1)
        assert limits.origin_demand().bps == 0
