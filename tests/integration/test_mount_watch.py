"""Every change of the table of mounts is told, however it falls between two looks."""

import subprocess
from pathlib import Path

import pytest
import trio

from fuse.mount_watch import MountWatch

pytestmark = pytest.mark.needs_root


async def test_no_change_is_missed(tmp_path: Path) -> None:
    watch = MountWatch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await trio.testing.wait_all_tasks_blocked(0.2)
        for command in (f"mount -t tmpfs tmpfs {tmp_path}", f"umount {tmp_path}") * 30:
            changed = watch.changed
            await trio.to_thread.run_sync(_run, command.split())
            with trio.fail_after(5):
                await changed.wait()
        nursery.cancel_scope.cancel()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True)
