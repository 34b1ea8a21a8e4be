"""Who is sent to next."""

import trio
import trio.testing

from backend.peers.send_turns import STALLED_S, SendTurns
from backend.peers.served import BlobRequest
from backend.priority import FetchClass

BLOB = "a" * 64


def request(fetch_class: FetchClass = FetchClass.PREFETCH) -> BlobRequest:
    return BlobRequest("decoded", BLOB, "", None, may_fetch=False, fetch_class=fetch_class, peer="10.0.0.2")


async def test_the_urgent_then_what_few_were_given(autojump_clock: trio.testing.MockClock) -> None:
    turns, order = SendTurns(1), list[str]()
    requests = {
        "often given": (request(), 3),
        "never given": (request(), 0),
        "urgent": (request(FetchClass.ON_DEMAND), 5),
    }

    async def send(name: str) -> None:
        await turns.take(requests[name][0])
        order.append(name)
        turns.end(requests[name][0])

    first = request()
    await turns.take(first)
    async with trio.open_nursery() as nursery:
        for name, (waiting, given) in requests.items():
            turns.expect(waiting, given)
            nursery.start_soon(send, name)
        await trio.testing.wait_all_tasks_blocked()
        assert len(turns) == 3
        turns.end(first)
    assert order == ["urgent", "never given", "often given"]


async def test_who_takes_nothing_keeps_nobody_waiting(autojump_clock: trio.testing.MockClock) -> None:
    turns, gone, other = SendTurns(1), request(), request()
    await turns.take(gone)
    since = trio.current_time()
    await turns.take(other)
    assert STALLED_S <= trio.current_time() - since <= 2 * STALLED_S
    turns.end(gone)
    turns.end(other)
    assert len(turns) == 0


async def test_a_cancelled_request_leaves_no_trace(autojump_clock: trio.testing.MockClock) -> None:
    turns, first, second, third = SendTurns(1), request(), request(), request()
    await turns.take(first)
    with trio.move_on_after(STALLED_S / 4):
        await turns.take(second)
    assert len(turns) == 0
    turns.end(first)
    await turns.take(third)
