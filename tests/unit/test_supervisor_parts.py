"""The supervisor's parts on their own: channel, holdings, what it does for the kernel after a death."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuse.erofs.fanotify import FAN_PRE_ACCESS, RANGE
from fuse.erofs.journal import Journal, create_memory
from fuse.supervisor.aftermath import EVENT_NUMBERS, METADATA, RESEND, RESPONSE, deny_forgotten
from fuse.supervisor.channel import (
    DESCRIPTORS_MAX,
    PACKET_MAX_BYTES,
    Packet,
    channel_pair,
    receive,
    send,
)
from fuse.supervisor.holdings import INDEX_NAME, Holdings
from fuse.supervisor.listener import is_served, listen
from fuse.supervisor.systemd import FIRST_PASSED, ServiceManager, passed_descriptors


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    first, second = channel_pair()
    with first, second:
        yield first, second


def open_pipe() -> tuple[int, int]:
    return os.pipe2(os.O_CLOEXEC)


def test_a_packet_carries_values_and_descriptors(ends: tuple[socket.socket, socket.socket]) -> None:
    read_end, write_end = open_pipe()
    send(ends[0], Packet("hold", {"name": "x", "values": {"a": [1]}}, (write_end,)))
    os.close(write_end)
    packet = receive(ends[1])
    assert packet is not None
    assert (packet.do, packet.values) == ("hold", {"name": "x", "values": {"a": [1]}})
    (descriptor,) = packet.descriptors
    assert not os.get_inheritable(descriptor)
    os.write(descriptor, b"still open")
    assert os.read(read_end, 100) == b"still open"
    os.close(descriptor)
    os.close(read_end)


def test_descriptors_outlive_a_sender_that_closes_its_end() -> None:
    first, second = channel_pair()
    read_end, write_end = open_pipe()
    send(first, Packet("hold", {}, (write_end,)))
    os.close(write_end)
    first.close()
    packet = receive(second)
    assert packet is not None
    os.write(packet.descriptors[0], b"x")
    assert receive(second) is None
    os.close(packet.descriptors[0])
    os.close(read_end)
    second.close()


def test_an_empty_channel_does_not_block(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(BlockingIOError):
        receive(ends[0], wait=False)


def test_a_packet_that_is_too_large_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(OSError, match="at most"):
        send(ends[0], Packet("hold", {"values": "x" * PACKET_MAX_BYTES}))


def test_all_descriptors_that_are_allowed_arrive(ends: tuple[socket.socket, socket.socket]) -> None:
    read_end, write_end = open_pipe()
    send(ends[0], Packet("hold", {}, (read_end,) * DESCRIPTORS_MAX))
    packet = receive(ends[1])
    assert packet is not None
    assert len(packet.descriptors) == DESCRIPTORS_MAX
    for descriptor in (*packet.descriptors, read_end, write_end):
        os.close(descriptor)


def test_an_entry_is_replaced_as_a_whole_or_keeps_its_descriptors() -> None:
    holdings = Holdings()
    first, second = open_pipe()
    holdings.put("m", "fuse", {"n": 1}, [first])
    holdings.put("m", "fuse", {"n": 2}, [])
    (entry,) = holdings
    assert (entry.values, entry.descriptors) == ({"n": 2}, (first,))
    holdings.put("m", "fuse", {"n": 3}, [second])
    assert is_closed(first)
    holdings.release("m")
    assert is_closed(second)
    assert len(holdings) == 0
    holdings.release("m")


def is_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


def test_a_service_manager_gives_everything_back() -> None:
    stored: dict[str, int] = {}

    def store(name: str, descriptor: int | None) -> None:
        if descriptor is None:
            os.close(stored.pop(name))
        else:
            stored[name] = os.dup(descriptor)

    holdings = Holdings(store)
    read_end, write_end = open_pipe()
    holdings.put("events", "fanotify", {}, [read_end, write_end])
    holdings.put("mount:/a", "erofs", {"superblock": "erofs-1"}, [])
    holdings.put("gone", "fuse", {}, [os.dup(0)])
    holdings.release("gone")

    index = stored.pop(INDEX_NAME)
    successor = Holdings(index=os.dup(index))
    successor.restore(stored)
    assert [(entry.name, entry.kind, dict(entry.values)) for entry in successor] == [
        ("events", "fanotify", {}),
        ("mount:/a", "erofs", {"superblock": "erofs-1"}),
    ]
    assert len(stored) == 2

    lost = Holdings(index=index)
    lost.restore({name: fd for name, fd in stored.items() if name.endswith("-0")})
    assert [entry.name for entry in lost] == ["mount:/a"]


def test_notifications_are_those_of_sd_notify(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        manager = ServiceManager(str(tmp_path / "notify"))
        read_end, write_end = open_pipe()
        manager.store("nydus-py-1-0", read_end)
        data, descriptors, _, _ = socket.recv_fds(systemd, 1000, 4)
        assert data == b"FDSTORE=1\nFDNAME=nydus-py-1-0\nFDPOLL=0"
        assert len(descriptors) == 1
        manager.store("nydus-py-1-0", None)
        assert systemd.recv(1000) == b"FDSTOREREMOVE=1\nFDNAME=nydus-py-1-0"
        manager.close()
        for descriptor in (read_end, write_end, *descriptors):
            os.close(descriptor)
    assert not ServiceManager(None).is_there


def test_descriptors_for_another_process_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "a")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert passed_descriptors(os.environ) == {}
    assert FIRST_PASSED == 3
    assert "LISTEN_FDS" not in os.environ


def test_the_resend_notification_has_the_bytes_of_the_protocol() -> None:
    # <linux/fuse.h>: FUSE_NOTIFY_RESEND is 7; a notification has the unique 0.
    assert bytes.fromhex("10000000070000000000000000000000") == RESEND


def test_events_that_are_not_in_the_journal_are_denied() -> None:
    """A pipe stands for the group: it takes every answer, as the kernel takes those of events it has."""
    memory = create_memory()
    journal = Journal(memory)
    journal.note(70, 1, 2, 4096, 8192)
    journal.note(71, 1, 2, 0, 1)
    journal.clear(71)
    read_end, write_end = os.pipe()
    event = METADATA.pack(48, 3, 0, 24, FAN_PRE_ACCESS, 72, 1) + RANGE.pack(6, 0, 24, 0, 512, 4096)
    os.write(write_end, event)
    assert journal.take(read_end).descriptor == 72
    answers = os.memfd_create("answers")
    assert deny_forgotten(answers, memory) == EVENT_NUMBERS - 2
    size = os.lseek(answers, 0, os.SEEK_END)
    denied = [number for number, _ in RESPONSE.iter_unpack(os.pread(answers, size, 0))]
    assert denied == [number for number in range(EVENT_NUMBERS) if number not in (70, 72)]
    journal.adopt_hand()
    pending, from_hand = journal.pending()
    assert (from_hand.number, from_hand.inode, from_hand.offset, from_hand.size) == (72, 0, 512, 4096)
    assert (pending.number, pending.device, pending.inode) == (70, 1, 2)
    assert (pending.offset, pending.size, pending.attempts) == (4096, 8192, 0)
    journal.note(70, 1, 2, 0, 1)
    journal.adopt_hand()  # the hand is empty
    journal.count_attempt(70)
    assert [(pending.number, pending.attempts) for pending in journal.pending()] == [(70, 1), (72, 0)]
    journal.close()
    for descriptor in (memory, answers, read_end, write_end):
        os.close(descriptor)


def test_a_half_written_note_does_not_count() -> None:
    memory = create_memory()
    journal = Journal(memory)
    struct.pack_into("<I", journal._slots, 40 * 9 + 4, 3)  # attempts, but not the mark of use
    assert list(journal.pending()) == []
    journal.close()
    os.close(memory)


def test_a_listener_is_for_its_owner_and_replaces_what_was_left(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 120) / "s.sock"
    path.parent.mkdir()
    path.touch()
    assert not is_served(path)
    with listen(path):
        assert path.stat().st_mode & 0o777 == 0o600
        assert is_served(path)
    assert not is_served(path)
