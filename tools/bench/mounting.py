"""The stage that mounts from a registry: time until usable, bytes that travelled."""

import os
import time
from pathlib import Path

from tools.bench import ledger as q
from tools.bench.ledger import NYDUS, Ledger
from tools.bench.nydus import Nydus
from tools.bench.origin import Origin

# Whatever a read sets off in the background has this long to show up in the bytes of the registry.
AFTER_READ_S = 1.0
PAGE_BYTES = 4096


def compare_mounts(
    scene: str, nydus: Nydus, reference: str, mountpoint: Path, rounds: int, ledger: Ledger
) -> None:
    """Mounts with an empty cache, and again with what the first mount has left."""
    for _ in range(rounds):
        nydus.forget()
        ledger.add(scene, NYDUS, q.USABLE, _time_until_usable_s(nydus, reference, mountpoint))
        ledger.add(scene, NYDUS, q.USABLE_AGAIN, _time_until_usable_s(nydus, reference, mountpoint))


def count_bytes(
    scene: str,
    nydus: Nydus,
    origin: Origin,
    reference: str,
    mountpoint: Path,
    file: str | None,
    ledger: Ledger,
) -> None:
    """What the registry sends for a mount, and then for one read of 4 KiB in the middle of `file`."""
    nydus.forget()
    start = origin.sent_bytes()
    with nydus.mounted(reference, mountpoint):
        pass
    mounted = origin.sent_bytes()
    ledger.add(scene, NYDUS, q.FETCHED, mounted - start)
    if file is not None:
        with nydus.mounted(reference, mountpoint) as root:
            _read_page(root / file)
            time.sleep(AFTER_READ_S)
        again = origin.sent_bytes()
        with nydus.mounted(reference, mountpoint):  # a second mount asks for the tag again; a read does not
            pass
        ledger.add(scene, NYDUS, q.FETCHED_FOR_READ, 2 * again - mounted - origin.sent_bytes())


def _time_until_usable_s(nydus: Nydus, reference: str, mountpoint: Path) -> float:
    start = time.perf_counter()
    with nydus.mounted(reference, mountpoint) as root:
        os.stat(root)
        os.listdir(root)
        return time.perf_counter() - start


def _read_page(path: Path) -> None:
    """Reads 4 KiB in the middle of a file, away from the border of a chunk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, PAGE_BYTES, os.fstat(fd).st_size // 2 // PAGE_BYTES * PAGE_BYTES + 17 * PAGE_BYTES)
    finally:
        os.close(fd)
