"""A docker-registry on loopback that tells how much it has sent."""

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.demo import registry

# One line of its access log, in Apache's format: the request line, the status, the bytes of the body.
GET_LINE = re.compile(r'"GET \S+ HTTP/1\.[01]" \d{3} (\d+) ')
QUIET_S = 0.5
QUIET_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Origin:
    """A running registry: HOST:PORT and its log."""

    address: str
    log: Path

    def sent_bytes(self) -> int:
        """Bytes of all bodies sent so far, once nothing has been added for a while.

        An answer is in the log when it has ended: unmount first.
        """
        end = time.monotonic() + QUIET_WITHIN_S
        last = -1
        while (sent := sent_bytes(self.log.read_text(errors="replace"))) != last and time.monotonic() < end:
            last = sent
            time.sleep(QUIET_S)
        return sent


def sent_bytes(log: str) -> int:
    """The sum over the access log of a registry."""
    return sum(int(size) for size in GET_LINE.findall(log))


@contextlib.contextmanager
def running_registry(directory: Path) -> Iterator[Origin]:
    """Runs docker-registry with its data in `directory`."""
    with registry(directory) as address:
        yield Origin(address, directory / "log")
