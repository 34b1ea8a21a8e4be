"""Limits as those who wait see them, on a clock that jumps."""

from dataclasses import dataclass

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from backend.peers.intake import Intake
from backend.peers.leases import OriginShare
from backend.peers.limit_settings import LIMIT_MAX, LimitInvalid, LimitSettings, read_limits
from backend.peers.limit_tree import TASKS_KEPT, LimitTree
from backend.peers.limits import HostLimits, open_limits
from backend.priority import FetchClass, Ticket

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class PeerRequest:
    """What an upload server knows of a request."""

    blob_id: str = "blob"
    fetch_class: FetchClass = FetchClass.BACKGROUND


class Counter:
    """Bytes by when they passed."""

    def __init__(self) -> None:
        self.passed: list[tuple[float, int]] = []

    def add(self, n_bytes: int) -> None:
        self.passed.append((trio.current_time(), n_bytes))

    def between(self, start: float, end: float) -> int:
        return sum(n_bytes for at, n_bytes in self.passed if start <= at < end)


async def test_what_would_take_too_long_is_paid_before_it_is_asked_for(autojump_clock: MockClock) -> None:
    """Who sends it would lose patience with a client that takes it so slowly."""
    settings = LimitSettings(host_down_bps=10_000, origin_bps=1000)
    async with open_limits(settings) as limits:
        ticket = Ticket(FetchClass.PREFETCH)
        peer, origin = (Intake(limits, ticket, "blob", from_origin=each) for each in (False, True))
        began = trio.current_time()
        assert await peer.pay_first(100_000) is peer
        assert trio.current_time() == began
        assert await peer.pay_first(200_000) is None
        assert 19.0 < trio.current_time() - began < 21.0
        began = trio.current_time()
        assert await origin.pay_first(20_000) is None
        assert 18.0 < trio.current_time() - began < 22.0
        assert limits.request_bytes == 20_000
        assert limits.waits["download"].count > 0
        assert limits.waits["download"].total_s > 30.0


async def test_receiving_that_is_paused_goes_on_when_it_may(autojump_clock: MockClock) -> None:
    async with open_limits(LimitSettings(task_down_bps=0)) as limits, trio.open_nursery() as nursery:
        assert limits.settings.receives_nothing
        intake, ended = Intake(limits, Ticket(FetchClass.ON_DEMAND), "blob"), list[float]()

        async def receive() -> None:
            assert await intake.pay_first(1000) is None
            ended.append(trio.current_time())

        nursery.start_soon(receive)
        await trio.sleep(1000)
        assert not ended
        limits.change(LimitSettings())
        await wait_all_tasks_blocked()
        assert ended


async def download_forever(
    limits: HostLimits, counter: Counter, fetch_class: FetchClass = FetchClass.PREFETCH, task: str = "blob"
) -> None:
    while True:
        part = min(limits.part_bytes, 64 << 10)
        await limits.take(part, fetch_class, task)
        counter.add(part)


async def upload_forever(limits: HostLimits, counter: Counter) -> None:
    while True:
        await limits.pace(64 << 10, PeerRequest())
        counter.add(64 << 10)


@pytest.mark.parametrize("users", [1, 2, 16])
@pytest.mark.parametrize("rate", [100_000, MIB, 50 * MIB])
async def test_a_limit_holds_for_any_number_of_users(
    users: int, rate: int, autojump_clock: MockClock
) -> None:
    counter = Counter()
    async with open_limits(LimitSettings(host_down_bps=rate)) as limits, trio.open_nursery() as nursery:
        for _ in range(users):
            nursery.start_soon(download_forever, limits, counter)
        await trio.sleep(1)
        start = trio.current_time()
        await trio.sleep(5)
        passed = counter.between(start, start + 5)
        nursery.cancel_scope.cancel()
    assert 0.95 * 5 * rate <= passed <= 1.05 * 5 * rate


async def test_limits_change_for_those_who_wait(autojump_clock: MockClock) -> None:
    counter = Counter()
    async with open_limits(LimitSettings(host_down_bps=0)) as limits, trio.open_nursery() as nursery:
        nursery.start_soon(download_forever, limits, counter)
        await trio.sleep(100)
        assert counter.passed == []
        start = trio.current_time()
        limits.change(LimitSettings(host_down_bps=MIB))
        await trio.sleep(5)
        assert 0.95 * 5 * MIB <= counter.between(start, start + 5) <= 1.05 * 5 * MIB
        limits.change(LimitSettings(host_down_bps=10 * MIB))
        await trio.sleep(5)
        assert 0.95 * 50 * MIB <= counter.between(start + 5, start + 10) <= 1.05 * 50 * MIB
        limits.change(LimitSettings(host_down_bps=0))
        await trio.sleep(0.2)
        stopped_at = len(counter.passed)
        await trio.sleep(5)
        assert len(counter.passed) == stopped_at
        nursery.cancel_scope.cancel()


async def test_without_limits_nothing_waits(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    async with open_limits(LimitSettings()) as limits:
        await limits.take(1 << 40, FetchClass.ON_DEMAND, "blob", from_origin=True)
        await limits.pace(1 << 40, PeerRequest())
        async with limits.origin_request(FetchClass.PREFETCH):
            assert limits.statistics().origin_busy == 1
        assert limits.statistics().down_bytes == 1 << 40
    assert trio.current_time() == start


async def test_a_task_has_its_own_limit_within_the_hosts(autojump_clock: MockClock) -> None:
    slow, fast = Counter(), Counter()
    settings = LimitSettings(host_down_bps=10 * MIB, task_down_bps=8 * MIB)
    async with open_limits(settings) as limits, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(download_forever, limits, fast, FetchClass.READAHEAD, "a")
        nursery.start_soon(download_forever, limits, slow, FetchClass.PREFETCH, "b")
        await trio.sleep(1)
        start = trio.current_time()
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert fast.between(start, start + 5) == pytest.approx(40 * MIB, rel=0.05)
    assert slow.between(start, start + 5) == pytest.approx(10 * MIB, rel=0.05)


async def test_on_demand_has_the_whole_rate_before_prefetch_has_any(autojump_clock: MockClock) -> None:
    demand, prefetch = Counter(), Counter()
    async with open_limits(LimitSettings(host_down_bps=MIB)) as limits, trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(download_forever, limits, prefetch, FetchClass.PREFETCH)
        for _ in range(2):
            nursery.start_soon(download_forever, limits, demand, FetchClass.ON_DEMAND)
        await trio.sleep(5.1)
        nursery.cancel_scope.cancel()
    assert demand.between(0.1, 5.1) == pytest.approx(5 * MIB, rel=0.05)
    assert prefetch.between(0.1, 5.1) == 0


async def test_a_waiting_take_can_be_raised(autojump_clock: MockClock) -> None:
    demand = Counter()
    async with open_limits(LimitSettings(host_down_bps=MIB)) as limits, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(download_forever, limits, demand, FetchClass.READAHEAD)
        await trio.sleep(1)
        with trio.move_on_after(5) as scope:
            await limits.take(1000, FetchClass.PREFETCH, "blob", owner="fetch")
        assert scope.cancelled_caught
        limits.raise_to("fetch", FetchClass.ON_DEMAND)  # nobody waits any more: no matter
        nursery.start_soon(raise_after_a_second, limits)
        with trio.fail_after(1.2):
            await limits.take(1000, FetchClass.PREFETCH, "blob", owner="fetch")
        nursery.cancel_scope.cancel()


async def raise_after_a_second(limits: HostLimits) -> None:
    await trio.sleep(1)
    limits.raise_to("fetch", FetchClass.ON_DEMAND)


async def test_a_cancelled_take_gives_back_and_leaves_the_queue(autojump_clock: MockClock) -> None:
    async with open_limits(LimitSettings(host_down_bps=1000)) as limits:
        with trio.move_on_after(1):
            await limits.take(100_000, FetchClass.ON_DEMAND, "blob")
        assert limits.statistics().waiting == 0
        assert limits.statistics().down_bytes == 0
        with trio.CancelScope() as scope:
            scope.cancel()
            await limits.take(1, FetchClass.ON_DEMAND, "blob")
        assert limits.statistics().down_bytes == 0


async def test_the_origin_has_places_and_requests_of_its_own(autojump_clock: MockClock) -> None:
    settings = LimitSettings(origin_concurrency=2, origin_rps=10)
    inside: list[int] = []
    started: list[float] = []

    async def ask(limits: HostLimits) -> None:
        async with limits.origin_request(FetchClass.ON_DEMAND):
            started.append(trio.current_time())
            inside.append(limits.statistics().origin_busy)
            await trio.sleep(0.01)

    async with open_limits(settings) as limits:
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(ask, limits)
            await wait_all_tasks_blocked()
            assert limits.origin_demand().concurrency == 40
        assert limits.statistics().origin_busy == 0
    assert max(inside) <= 2
    assert 3.6 <= started[-1] - started[0] <= 4.0


async def test_a_place_is_free_again_when_its_holder_fails(autojump_clock: MockClock) -> None:
    async with open_limits(LimitSettings(origin_concurrency=1)) as limits:
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with limits.origin_request(FetchClass.ON_DEMAND):
                    raise ZeroDivisionError


async def test_a_lease_holds_beside_the_limits_of_the_host(autojump_clock: MockClock) -> None:
    async with open_limits(LimitSettings(origin_bps=MIB)) as limits:
        limits.lease_origin(OriginShare(bps=1000, rps=0.0, concurrency=1))
        start = trio.current_time()
        for _ in range(20):
            await limits.take(100, FetchClass.ON_DEMAND, "blob", from_origin=True)
        assert trio.current_time() - start == pytest.approx(1.8, abs=0.05)
        with trio.move_on_after(10) as scope:
            async with limits.origin_request(FetchClass.ON_DEMAND):
                pass
        assert scope.cancelled_caught
        limits.lease_origin(None)
        async with limits.origin_request(FetchClass.ON_DEMAND):
            pass


async def test_serving_yields_where_that_helps(autojump_clock: MockClock) -> None:
    """Host whose link is shared by both directions: what is sent cannot be received."""
    sent, received = Counter(), Counter()
    link_bps = 10 * MIB

    async def fetch(limits: HostLimits) -> None:
        with limits.foreground():
            while True:
                await trio.sleep(0.01)
                now = trio.current_time()
                free = int(link_bps * 0.02 - sent.between(now - 0.02, now)) // 2
                if free > 0:
                    await limits.take(free, FetchClass.ON_DEMAND, "blob")
                    received.add(free)

    async with open_limits(LimitSettings(host_up_bps=9 * MIB)) as limits, trio.open_nursery() as nursery:
        nursery.start_soon(upload_forever, limits, sent)
        await trio.sleep(2)
        assert sent.between(1, 2) == pytest.approx(9 * MIB, rel=0.05)
        start = trio.current_time()
        with trio.CancelScope() as fetching:
            nursery.start_soon(fetch, limits)
            await trio.sleep(2)
            assert limits.yielded_bps == pytest.approx(0.9 * MIB)
            assert sent.between(start + 0.5, start + 2) == pytest.approx(1.5 * 0.9 * MIB, rel=0.1)
            fetching.cancel()
        nursery.cancel_scope.cancel()


async def test_another_process_may_be_told_to_yield(autojump_clock: MockClock) -> None:
    sent = Counter()
    async with open_limits(LimitSettings()) as limits, trio.open_nursery() as nursery:
        limits.yield_up(MIB)
        nursery.start_soon(upload_forever, limits, sent)
        await trio.sleep(5)
        assert sent.between(0, 5) == pytest.approx(5 * MIB, rel=0.05)
        nursery.cancel_scope.cancel()


async def test_an_error_of_the_body_is_not_wrapped(autojump_clock: MockClock) -> None:
    with pytest.raises(KeyError):
        async with open_limits(LimitSettings()):
            raise KeyError


def test_buckets_of_tasks_at_rest_are_dropped() -> None:
    tree = LimitTree(LimitSettings(task_down_bps=1000), 0.0)
    for number in range(3 * TASKS_KEPT):
        tree.download(10, FetchClass.PREFETCH, f"blob{number}", float(number), from_origin=False)
        tree.queue.pump(float(number))
    assert len(tree._task_down) <= TASKS_KEPT


def test_settings_are_read_from_text_and_numbers() -> None:
    settings = read_limits({"host_up_bps": "50MiB/s", "origin_rps": 20, "task_up_bps": "none"})
    assert settings == LimitSettings(host_up_bps=50 * MIB, origin_rps=20)
    assert read_limits({}) == LimitSettings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host_up", "1MiB/s"),
        ("host_up_bps", "50Mbit/s"),
        ("host_up_bps", -1),
        ("host_up_bps", LIMIT_MAX + 1),
        ("host_up_bps", True),
        ("host_up_bps", 1.5),
        ("origin_rps", "20"),
        ("origin_concurrency", [1]),
    ],
)
def test_a_limit_that_is_none_is_named(name: str, value: object) -> None:
    with pytest.raises(LimitInvalid, match=f"limit {name}: "):
        read_limits({name: value})


@pytest.mark.parametrize(
    "text", ['{"host_up_bps":-1}', '{"host_up_bps":1e99}', '{"host":1}', '{"origin_rps":"1"}']
)
def test_settings_from_json_are_checked(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=LimitSettings)


def test_the_stricter_limit_of_two_counts() -> None:
    own = LimitSettings(host_up_bps=5, host_down_bps=None, origin_rps=7)
    told = LimitSettings(host_up_bps=9, host_down_bps=0, task_up_bps=3)
    assert own.tightened_by(told) == LimitSettings(
        host_up_bps=5, host_down_bps=0, origin_rps=7, task_up_bps=3
    )


async def test_what_the_upload_server_has_sent_is_counted(autojump_clock: MockClock) -> None:
    """It is another process, whose bytes pass no gate of this one: 0 was shown."""
    async with open_limits(LimitSettings()) as limits:
        limits.note_served(MIB)
        await limits.pace(5, PeerRequest())
        assert limits.statistics().up_bytes == MIB + 5
