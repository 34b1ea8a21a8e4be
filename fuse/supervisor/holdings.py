"""What the supervisor holds for its agents: named entries with values and descriptors.

Values are the agent's; the supervisor looks at `kind` alone. Under systemd every descriptor is also stored
with the service manager (sd_notify(3), FDSTORE=1), together with a memory file that says which is which, so
that the supervisor itself may die.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fuse.supervisor.channel import close_all

INDEX_NAME = "nydus-py-index"
KIND_FUSE = "fuse"
"""First descriptor: /dev/fuse of a mount."""
KIND_EVENTS = "fanotify"
"""Descriptors: the fanotify group, and the journal of its events (fuse/erofs/journal.py)."""
KIND_LISTENER = "listener"
"""First descriptor: the socket that clients connect to."""
KIND_PEER_LISTENER = "peer-listener"
"""First descriptor: the socket that other hosts connect to."""
KIND_LIMITS = "limits"
"""No descriptor; the values are limits that were changed while the agent ran."""

StoreHook = Callable[[str, int | None], None]
"""Stores a descriptor under a name with the service manager; None as descriptor takes the name back."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something held. `number` names its descriptors in the store of the service manager."""

    number: int
    name: str
    kind: str
    values: Mapping[str, Any]
    descriptors: tuple[int, ...]


class Holdings:
    """The entries, by name, in the order in which they came."""

    def __init__(self, store: StoreHook | None = None, index: int = -1) -> None:
        """`store` is called for every descriptor that comes or goes; `index`: see `restore`."""
        self._entries: dict[str, Entry] = {}
        self._store = store
        self._next_number = 0
        self._index = index
        if store is not None and index < 0:
            self._index = os.memfd_create(INDEX_NAME, os.MFD_CLOEXEC)
            store(INDEX_NAME, self._index)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> Entry | None:
        """The entry of that name."""
        return self._entries.get(name)

    def put(self, name: str, kind: str, values: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        """Holds an entry; one of the same name keeps its descriptors when none are given, else they go."""
        old = self._entries.get(name)
        if old is not None and not descriptors:
            self._entries[name] = Entry(old.number, name, kind, values, old.descriptors)
        else:
            self.release(name)
            self._next_number += 1
            self._entries[name] = Entry(self._next_number, name, kind, values, tuple(descriptors))
            self._tell_store(self._entries[name], stored=True)
        self._write_index()

    def release(self, name: str) -> None:
        """Lets go of an entry. One that is not there does not matter."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._tell_store(entry, stored=False)
            close_all(entry.descriptors)
            self._write_index()

    def restore(self, stored: Mapping[str, int]) -> None:
        """Takes over what an earlier supervisor stored: descriptors by name; the index says what they are.

        An entry that has lost a descriptor is dropped, with those it has left.
        """
        size = os.fstat(self._index).st_size
        for item in json.loads(os.pread(self._index, size, 0) or b"[]"):
            number = int(item["number"])
            names = [_store_name(number, place) for place in range(int(item["count"]))]
            descriptors = [stored[name] for name in names if name in stored]
            if len(descriptors) == len(names):
                self._entries[item["name"]] = Entry(
                    number, item["name"], item["kind"], item["values"], tuple(descriptors)
                )
                self._next_number = max(self._next_number, number)
            else:
                close_all(descriptors)
        self._write_index()

    def _tell_store(self, entry: Entry, *, stored: bool) -> None:
        if self._store is not None:
            for place, descriptor in enumerate(entry.descriptors):
                self._store(_store_name(entry.number, place), descriptor if stored else None)

    def _write_index(self) -> None:
        if self._index < 0:
            return
        rows = [
            {
                "number": entry.number,
                "name": entry.name,
                "kind": entry.kind,
                "values": entry.values,
                "count": len(entry.descriptors),
            }
            for entry in self._entries.values()
        ]
        data = json.dumps(rows).encode()
        os.pwrite(self._index, data, 0)
        os.ftruncate(self._index, len(data))


def _store_name(number: int, place: int) -> str:
    return f"nydus-py-{number}-{place}"
