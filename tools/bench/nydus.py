"""nydus-py as a user runs it: command lines, with a cache and a run directory of the benchmark's own."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tools.bench.process import CommandFailed, run_measured

MOUNT_TIMEOUT_S = 120.0


class _Mount(msgspec.Struct):
    """The part of a status that is of interest here."""

    pid: int


@dataclass(frozen=True, slots=True)
class Nydus:
    """The command line with a place for its cache and for its run directory."""

    cache_dir: Path
    run_dir: Path

    def command(self, *arguments: str | Path) -> list[str]:
        """The whole command line: the installed program, or the module beside this one."""
        script = Path(sys.executable).with_name("nydus-py")
        program = [str(script)] if script.exists() else [sys.executable, "-m", "tools.main"]
        return [*program, f"--cache-dir={self.cache_dir}", *map(str, arguments)]

    def environment(self) -> dict[str, str]:
        """The environment to run it in."""
        return {**os.environ, "NYDUS_PY_RUN_DIR": str(self.run_dir)}

    def forget(self) -> None:
        """Empties the cache; nothing may be mounted."""
        shutil.rmtree(self.cache_dir, ignore_errors=True)

    @contextlib.contextmanager
    def mounted(
        self, reference: str, mountpoint: Path, prefix: Sequence[str] = (), options: Sequence[str] = ()
    ) -> Iterator[Path]:
        """Mounts an image; unmounts it whatever happens. Raises `CommandFailed`."""
        mountpoint.mkdir(parents=True, exist_ok=True)
        try:
            run_measured(
                [*prefix, *self.command("mount", *options, reference, mountpoint)],
                environment=self.environment(),
                timeout_s=MOUNT_TIMEOUT_S,
            )
            yield mountpoint
        finally:
            self._unmount(mountpoint)

    def memory_bytes(self, mountpoint: Path) -> int | None:
        """What the process of a mount has in memory of its own; None when it cannot be told.

        Mapped files (the cache, the bootstrap) do not count: the kernel takes their pages back at will.
        """
        status = run_measured(self.command("status", mountpoint, "--json"), environment=self.environment())
        (mount,) = msgspec.json.decode(status.output, type=list[_Mount])
        for line in Path(f"/proc/{mount.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return None

    def _unmount(self, mountpoint: Path) -> None:
        if not os.path.ismount(mountpoint):
            return
        try:
            command = self.command("umount", mountpoint)
            run_measured(command, environment=self.environment(), timeout_s=MOUNT_TIMEOUT_S)
        except CommandFailed:
            # Detaching it ends the process of the mount as soon as nobody uses it any more.
            subprocess.run(["umount", "-l", str(mountpoint)], check=False)
            raise
