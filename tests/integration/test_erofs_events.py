"""The events of EROFS mounts: what becomes of one that is taken, lost, refused, or cannot be held."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fuse.erofs.driver import ErofsMount
from fuse.erofs.events import EventOptions, EventServer, EventsLost
from fuse.erofs.fanotify import Event, deny
from fuse.erofs.journal import Journal, Pending, create_memory
from fuse.supervisor.aftermath import METADATA, deny_forgotten
from fuse.supervisor.holdings import KIND_EVENTS
from tests.integration.kernel_drivers import driven, need_erofs_events
from tests.integration.test_kernel_drivers import outside
from tests.integration.test_mount_pyfuse3 import noise
from tests.mount_rig import make_store
from tests.rafs_image import Options, directory, file

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_fuse]


async def test_an_event_in_the_hand_of_a_dead_agent_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was read and not yet noted was denied; when its retry was lost as well, its reader got EIO."""
    need_erofs_events()
    tree = directory({b"f": file(noise(100_000)), b"g": file(noise(100_000, 1))})
    store = make_store(tmp_path / "made", tree, Options(blob_count=2))
    adopted: list[Pending] = []
    async with driven(tmp_path, store, "erofs") as live:
        (held,) = (entry for entry in live.keeper.entries.values() if entry.kind == KIND_EVENTS)
        group, memory = held.descriptors

        def die(self: EventServer, token: trio.lowlevel.TrioToken, event: Event) -> None:
            """The death and what follows it; the descriptor stays open, so its number stays occupied."""
            assert deny_forgotten(group, memory) == 0
            with contextlib.closing(Journal(memory)) as successor:
                successor.adopt_hand()
                (pending,) = (noted for noted in successor.pending() if noted.number == event.descriptor)
            adopted.append(pending)
            assert self._nursery is not None
            token.run_sync_soon(self._nursery.start_soon, self._serve_adopted, pending)

        monkeypatch.setattr(EventServer, "_begin", die)
        assert await outside((live.path / "f").read_bytes) == noise(100_000)
        assert await outside((live.path / "g").read_bytes) == noise(100_000, 1)
    assert {pending.inode for pending in adopted} == {0}


async def test_truncating_a_device_is_refused_also_by_a_successor(tmp_path: Path) -> None:
    """Its event has no range, and must not be taken for a read of nothing, which is always ready."""
    need_erofs_events()
    answers, memory = os.memfd_create("answers"), create_memory()
    server = EventServer(answers, Journal(memory), EventOptions())
    number = os.dup(answers)
    server._journal.note(number, 1, 2, 0, 0)
    (pending,) = server._journal.pending()
    await server._serve_adopted(pending)
    assert os.pread(answers, 8, 0) == deny(number)
    for descriptor in (answers, memory):
        os.close(descriptor)


async def test_a_lost_event_ends_the_agent_instead_of_a_hang(tmp_path: Path) -> None:
    """An overflow has no descriptor to answer: the successor denies what was lost."""
    overflow = METADATA.pack(24, 3, 0, 24, 0x4000, -1, 0)
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    memory = create_memory()
    os.write(write_end, overflow)
    server = EventServer(read_end, Journal(memory), EventOptions())
    with pytest.raises(ExceptionGroup) as caught:
        await server.serve()
    assert isinstance(caught.value.exceptions[0], EventsLost)
    for descriptor in (read_end, write_end, memory):
        os.close(descriptor)


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """No descriptor can be opened here: only 0, 1 and 2 are allowed, which are open.

    Not fewer, because poll(2) refuses to wait for more descriptors than the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.logs_warning
async def test_a_descriptor_limit_is_an_error_and_no_zeros(tmp_path: Path) -> None:
    need_erofs_events()
    store = make_store(tmp_path / "made", directory({b"f": file(noise(10_000))}))
    async with driven(tmp_path, store, "erofs") as live:
        assert isinstance(live.mount, ErofsMount)
        stream = await outside(lambda: (live.path / "f").open("rb", buffering=0))
        with stream, no_descriptor_left():
            live.mount.host.watch._tell()  # another mount comes: this one looks at the table
            with pytest.raises(OSError):
                await outside(stream.read)
        assert await outside((live.path / "f").read_bytes) == noise(10_000)
