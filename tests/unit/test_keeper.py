"""An agent's side of the channel: holds are acknowledged, and survive the death of the supervisor."""

import os
import socket
from collections.abc import Sequence

import pytest
import trio

from fuse.keeper import HeldEntry, MemoryKeeper, NotHeld, SupervisedKeeper, take_over
from fuse.supervisor.channel import Packet, channel_pair, receive, send


async def from_agent(end: socket.socket) -> Packet:
    """The next packet of the agent."""
    packet = await trio.to_thread.run_sync(receive, end)
    assert packet is not None
    return packet


async def never() -> socket.socket:
    raise AssertionError("no supervisor has died")


def taken(packets: Sequence[Packet]) -> tuple[socket.socket, socket.socket]:
    ours, theirs = channel_pair()
    for packet in packets:
        send(theirs, packet)
    return ours, theirs


def test_a_beginning_takes_what_is_held_in_order() -> None:
    entry = {"name": "m", "kind": "fuse", "values": {"a": 1}}
    ours, theirs = taken([Packet("take", entry, (0,)), Packet("go", {"restarts": 4})])
    seen: list[str] = []
    takeover = take_over(ours, lambda held: seen.append(held.name))
    assert (takeover.restarts, seen) == (4, ["m"])
    (held,) = takeover.entries
    assert (held.kind, dict(held.values), len(held.descriptors)) == ("fuse", {"a": 1}, 1)
    ready = receive(theirs)
    assert ready is not None
    assert (ready.do, ready.values) == ("ready", {"pid": os.getpid()})
    os.close(held.descriptors[0])
    ours.close()
    theirs.close()


async def test_hold_waits_for_the_answer_and_tells_of_a_refusal() -> None:
    ours, theirs = channel_pair()
    keeper = SupervisedKeeper(ours, [], never)
    commands: list[str] = []
    with ours, theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.listen, lambda packet: commands.append(packet.do))
            done = trio.Event()

            async def hold() -> None:
                await keeper.hold("m", "fuse", {"n": 1}, [0])
                done.set()

            nursery.start_soon(hold)
            packet = await from_agent(theirs)
            assert (packet.do, packet.values["name"], len(packet.descriptors)) == ("hold", "m", 1)
            os.close(packet.descriptors[0])
            assert not done.is_set()
            send(theirs, Packet("stop"))
            send(theirs, Packet("held", {"sequence": packet.values["sequence"]}))
            await done.wait()
            assert commands == ["stop"]

            async def refused() -> None:
                with pytest.raises(NotHeld, match="too many open files"):
                    await keeper.hold("n", "fuse", {})
                nursery.cancel_scope.cancel()

            nursery.start_soon(refused)
            await from_agent(theirs)
            send(theirs, Packet("refused", {"why": "too many open files"}))


@pytest.mark.logs_warning
async def test_a_new_supervisor_gets_everything_again() -> None:
    ours, theirs = channel_pair()
    successors: list[socket.socket] = []

    async def respawn() -> socket.socket:
        await trio.lowlevel.checkpoint()
        mine, other = channel_pair()
        successors.append(other)
        return mine

    entries = [HeldEntry("a", "fanotify", {}, (0, 1)), HeldEntry("b", "erofs", {"x": 1}, ())]
    keeper = SupervisedKeeper(ours, entries, respawn)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.listen, lambda packet: None)
        await trio.testing.wait_all_tasks_blocked()
        theirs.close()
        while not successors:
            await trio.testing.wait_all_tasks_blocked(0.01)
        got = [await from_agent(successors[0]) for _ in range(3)]
        assert [(packet.do, packet.values.get("name")) for packet in got] == [
            ("hold", "a"),
            ("hold", "b"),
            ("serving", None),
        ]
        assert [len(packet.descriptors) for packet in got] == [2, 0, 0]
        for descriptor in got[0].descriptors:
            os.close(descriptor)
        nursery.cancel_scope.cancel()
    keeper.channel.close()
    successors[0].close()


async def test_a_keeper_in_memory_keeps_descriptors_of_an_entry() -> None:
    keeper = MemoryKeeper()
    await keeper.hold("a", "fuse", {"n": 1}, [7])
    await keeper.hold("a", "fuse", {"n": 2})
    assert keeper.entries["a"] == HeldEntry("a", "fuse", {"n": 2}, (7,))
    await keeper.release("a")
    await keeper.release("a")
    assert keeper.entries == {}
