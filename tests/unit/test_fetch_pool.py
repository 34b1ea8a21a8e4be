"""What the fetchers of a mount share."""

import trio
import trio.testing

from backend.fetch_pool import open_fetch_pool
from backend.peers.origin_window import PATIENCE, OriginWindow
from backend.priority import FetchClass, Ticket

MIB = 1 << 20


async def test_a_request_that_starves_does_not_keep_the_next_one_waiting(
    autojump_clock: trio.testing.MockClock,
) -> None:
    in_hand: list[str] = []

    async def fetch(name: str, lasts_s: float) -> None:
        async with pool.owned(Ticket(FetchClass.PREFETCH), MIB):
            in_hand.append(name)
            await trio.sleep(lasts_s)
            in_hand.remove(name)

    async with open_fetch_pool() as pool, trio.open_nursery() as nursery:
        assert pool.origin_window.slots == 1
        nursery.start_soon(fetch, "usual", 0.9)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(fetch, "starving", 30.0)
        await trio.testing.wait_all_tasks_blocked()
        assert in_hand == ["usual"]
        await trio.sleep(1.0)
        nursery.start_soon(fetch, "next", 0.9)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(fetch, "after it", 0.9)
        await trio.testing.wait_all_tasks_blocked()
        assert in_hand == ["starving"]
        await trio.sleep(PATIENCE)
        assert in_hand == ["starving", "next"]
        await trio.sleep(1.0)
        assert in_hand == ["starving", "after it"]
        nursery.cancel_scope.cancel()


def test_the_window_follows_how_long_requests_take() -> None:
    window = OriginWindow()
    for _ in range(100):
        window.note(MIB, 0.05)
    assert window.slots > 8
    assert window.patience_s(MIB) < 0.5
    for _ in range(100):
        window.note(MIB, 2.0)
    assert window.slots == 1
    assert window.patience_s(4 * MIB) > 8.0
