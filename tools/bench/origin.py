"""A docker-registry that tells how much it has sent."""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.demo import registry

# One line of its access log, in Apache's format: the request line, the status, the bytes of the body.
GET_LINE = re.compile(r'"GET (\S+) HTTP/1\.[01]" \d{3} (\d+) ')
QUIET_S = 0.5
QUIET_WITHIN_S = 30.0


@dataclass(frozen=True, slots=True)
class Origin:
    """A running registry: HOST:PORT and its log."""

    address: str
    log: Path

    def sent_bytes(self) -> int:
        """Bytes of all bodies sent so far, see `sent`."""
        return self.sent().total()

    def sent(self) -> Counter[str]:
        """Bytes of bodies sent so far for each path, once nothing has been added for a while.

        An answer is in the log when it has ended: unmount first.
        """
        end = time.monotonic() + QUIET_WITHIN_S
        last: Counter[str] | None = None
        while (sent := sent_by_path(self.log.read_text(errors="replace"))) != last and time.monotonic() < end:
            last = sent
            time.sleep(QUIET_S)
        return sent


def sent_by_path(log: str) -> Counter[str]:
    """The sums over the access log of a registry."""
    sent: Counter[str] = Counter()
    for path, size in GET_LINE.findall(log):
        sent[path] += int(size)
    return sent


@contextlib.contextmanager
def running_registry(
    directory: Path, listen: str = "127.0.0.1:0", prefix: Sequence[str] = ()
) -> Iterator[Origin]:
    """Runs docker-registry with its data in `directory`; the other arguments as those of `registry`."""
    with registry(directory, listen, prefix) as address:
        yield Origin(address, directory / "log")
