"""The ledger of snapshots and images: one SQLite file.

Every change is one transaction that is on the disk before it is answered, so a process that is killed leaves
either all of it or nothing. Directories are made before the row that names them and removed after it is gone:
one without a row is rubbish and is swept.

Concurrency: one connection, one lock; every method is one transaction, and may be called from any thread.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from fuse.snapshotter.failures import (
    NoRoom,
    RequestInvalid,
    RootUnusable,
    SnapshotError,
    SnapshotExists,
    SnapshotMissing,
    SnapshotUnfit,
)
from fuse.snapshotter.records import ImageRecord, Kind, Snapshot, SourceLayer

SCHEMA_VERSION = 1
SNAPSHOT_REF = "containerd.io/snapshot.ref"
"""Label with the chain ID that a layer is to be found under; containerd looks for it."""

_SCHEMA = """
CREATE TABLE ids (next INTEGER NOT NULL);
INSERT INTO ids VALUES (1);
CREATE TABLE images (
    id INTEGER PRIMARY KEY,
    reference TEXT NOT NULL UNIQUE
);
CREATE TABLE released (digest TEXT PRIMARY KEY);
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    kind INTEGER NOT NULL,
    parent INTEGER REFERENCES snapshots(id),
    labels TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL DEFAULT 0,
    inodes INTEGER NOT NULL DEFAULT 0,
    blob_id TEXT NOT NULL DEFAULT '',
    source TEXT,
    image INTEGER REFERENCES images(id)
);
CREATE INDEX snapshots_parent ON snapshots(parent);
CREATE INDEX snapshots_image ON snapshots(image);
"""
_COLUMNS = """s.id, s.name, s.kind, coalesce(p.name, ''), s.labels, s.created_ns, s.updated_ns,
    s.size_bytes, s.inodes, s.blob_id, s.source, s.image"""
_FROM = "FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent"


class Ledger:
    """See above."""

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.time_ns) -> None:
        """Opens the file, or makes it. Raises `RootUnusable`."""
        self._path = path
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        try:
            # Transactions are begun here and not by the library.
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
            elif version != SCHEMA_VERSION:
                raise RootUnusable(where=path, why=f"made by another version (schema {version})")
        except sqlite3.Error as error:
            raise RootUnusable(where=path, why=str(error)) from error

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()

    def new_id(self, count: int = 1) -> int:
        """A number that no snapshot or image has had before: the first of so many in a row."""
        with self._change() as db:
            (after,) = db.execute("UPDATE ids SET next = next + ? RETURNING next", (count,)).fetchone()
        return int(after) - count

    def ids(self) -> set[int]:
        """Those of all snapshots and images."""
        with self._reading():
            rows = self._db.execute("SELECT id FROM snapshots UNION SELECT id FROM images").fetchall()
        return {int(number) for (number,) in rows}

    # -- snapshots

    def find(self, name: str) -> Snapshot | None:
        """The snapshot of that name."""
        with self._reading():
            row = self._db.execute(f"SELECT {_COLUMNS} {_FROM} WHERE s.name = ?", (name,)).fetchone()
        return _snapshot(row) if row else None

    def get(self, name: str) -> Snapshot:
        """The same; raises `SnapshotMissing`."""
        found = self.find(name)
        if found is None:
            raise SnapshotMissing(name=name)
        return found

    def chain(self, name: str) -> list[Snapshot]:
        """The snapshot and all below it, itself first. Raises `SnapshotMissing`."""
        query = f"""WITH RECURSIVE below(id, depth) AS (
                SELECT id, 0 FROM snapshots WHERE name = ?
                UNION ALL SELECT t.parent, depth + 1 FROM below JOIN snapshots t USING (id)
                WHERE t.parent IS NOT NULL)
            SELECT {_COLUMNS} {_FROM} JOIN below b ON b.id = s.id ORDER BY b.depth"""
        with self._reading():
            rows = self._db.execute(query, (name,)).fetchall()
        if not rows:
            raise SnapshotMissing(name=name)
        return [_snapshot(row) for row in rows]

    def everything(self) -> list[Snapshot]:
        """All snapshots, the oldest first."""
        with self._reading():
            rows = self._db.execute(f"SELECT {_COLUMNS} {_FROM} ORDER BY s.id").fetchall()
        return [_snapshot(row) for row in rows]

    def find_layer(self, ref: str, parent: str) -> Snapshot | None:
        """The committed snapshot that stands for the layer with chain ID `ref`, made by `add_layer`."""
        with self._reading():
            rows = self._db.execute(
                f"SELECT {_COLUMNS} {_FROM} WHERE s.name IN (?, ?)", (ref, _second_name(ref, parent))
            ).fetchall()
        return next((found for row in rows if (found := _snapshot(row)).parent == parent), None)

    def add(self, number: int, kind: Kind, name: str, parent: str, labels: Mapping[str, str]) -> None:
        """A new active snapshot, or view. Raises `SnapshotExists`, `SnapshotMissing`, `RequestInvalid`."""
        with self._change() as db:
            self._insert(db, number, kind, name, parent, labels)

    def add_layer(
        self,
        number: int,
        ref: str,
        parent: str,
        labels: Mapping[str, str],
        blob_id: str,
        source: SourceLayer | None,
        image_id: int | None,
    ) -> None:
        """A committed snapshot for a layer that nobody unpacks.

        Its name is the chain ID, unless that one has another parent here. Raises as `add`, and
        `SnapshotUnfit` when the image is not there any more.
        """
        kept = {**labels, SNAPSHOT_REF: ref}
        encoded = msgspec.json.encode(source).decode() if source else None
        with self._change() as db:
            taken = db.execute(f"SELECT coalesce(p.name, '') {_FROM} WHERE s.name = ?", (ref,)).fetchone()
            if taken and taken[0] == parent:
                raise SnapshotExists(name=ref)
            if image_id is not None and not _has_image(db, image_id):
                raise SnapshotUnfit(name=ref, why="its image has just been removed")
            self._insert(
                db, number, Kind.COMMITTED, _second_name(ref, parent) if taken else ref, parent, kept
            )
            db.execute(
                "UPDATE snapshots SET blob_id = ?, source = ?, image = ? WHERE id = ?",
                (blob_id, encoded, image_id, number),
            )

    def commit(self, key: str, name: str, labels: Mapping[str, str], size_bytes: int, inodes: int) -> None:
        """Makes an active snapshot a committed one. Raises as `add`, and `SnapshotUnfit`."""
        now = self._clock_ns()
        with self._change() as db:
            row = db.execute("SELECT id, kind FROM snapshots WHERE name = ?", (key,)).fetchone()
            if db.execute("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
                raise SnapshotExists(name=name)
            if row is None:
                raise SnapshotMissing(name=key)
            if row[1] != Kind.ACTIVE:
                raise SnapshotUnfit(name=key, why="it is not active")
            db.execute(
                """UPDATE snapshots SET name = ?, kind = ?, labels = ?, created_ns = ?, updated_ns = ?,
                   size_bytes = ?, inodes = ? WHERE id = ?""",
                (name, Kind.COMMITTED, _packed(labels), now, now, size_bytes, inodes, row[0]),
            )

    def set_restored(self, number: int, size_bytes: int, inodes: int) -> None:
        """The files of a layer that were left out are there now."""
        with self._change() as db:
            db.execute(
                "UPDATE snapshots SET source = NULL, size_bytes = ?, inodes = ? WHERE id = ?",
                (size_bytes, inodes, number),
            )

    def relabel(self, name: str, change: Callable[[dict[str, str]], Mapping[str, str]]) -> Snapshot:
        """Has `change` make new labels of the old ones. Raises `SnapshotMissing` and what `change` raises."""
        with self._change() as db:
            row = db.execute("SELECT id, labels FROM snapshots WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise SnapshotMissing(name=name)
            labels = _packed(change(msgspec.json.decode(row[1], type=dict[str, str])))
            now = self._clock_ns()
            db.execute("UPDATE snapshots SET labels = ?, updated_ns = ? WHERE id = ?", (labels, now, row[0]))
            found = db.execute(f"SELECT {_COLUMNS} {_FROM} WHERE s.id = ?", (row[0],)).fetchone()
        return _snapshot(found)

    def remove(self, name: str) -> Snapshot:
        """Forgets a snapshot; gives it. Raises `SnapshotMissing`, `SnapshotUnfit` when others need it."""
        with self._change() as db:
            row = db.execute(f"SELECT {_COLUMNS} {_FROM} WHERE s.name = ?", (name,)).fetchone()
            if row is None:
                raise SnapshotMissing(name=name)
            if db.execute("SELECT 1 FROM snapshots WHERE parent = ?", (row[0],)).fetchone():
                raise SnapshotUnfit(name=name, why="it cannot be removed, it has children")
            db.execute("DELETE FROM snapshots WHERE id = ?", (row[0],))
        return _snapshot(row)

    # -- images

    def add_image(self, number: int, reference: str) -> ImageRecord:
        """The image of that name; `number` is its number if it is new."""
        with self._change() as db:
            db.execute("INSERT OR IGNORE INTO images VALUES (?, ?)", (number, reference))
            row = db.execute("SELECT id FROM images WHERE reference = ?", (reference,)).fetchone()
        return ImageRecord(int(row[0]), reference)

    def find_image(self, reference: str) -> ImageRecord | None:
        """The image of that name."""
        with self._reading():
            row = self._db.execute("SELECT id FROM images WHERE reference = ?", (reference,)).fetchone()
        return ImageRecord(int(row[0]), reference) if row else None

    def image(self, number: int) -> ImageRecord:
        """An image that a snapshot names."""
        with self._reading():
            row = self._db.execute("SELECT id, reference FROM images WHERE id = ?", (number,)).fetchone()
        if row is None:
            raise SnapshotMissing(name=f"image {number}")
        return ImageRecord(int(row[0]), row[1])

    def images(self) -> list[ImageRecord]:
        """All of them."""
        with self._reading():
            rows = self._db.execute("SELECT id, reference FROM images ORDER BY id").fetchall()
        return [ImageRecord(int(number), reference) for number, reference in rows]

    def drop_image(self, number: int) -> bool:
        """Forgets an image that no snapshot needs; whether it was there and nobody did.

        Its digest is among the `released` ones from then on.
        """
        with self._change() as db:
            used = "SELECT 1 FROM snapshots WHERE image = ?"
            row = db.execute(
                f"DELETE FROM images WHERE id = ? AND NOT EXISTS ({used}) RETURNING reference",
                (number, number),
            ).fetchone()
            if row is not None:
                digest = ImageRecord(number, row[0]).digest
                db.execute("INSERT OR IGNORE INTO released VALUES (?)", (digest,))
        return row is not None

    def released(self) -> list[str]:
        """Digests of images that may have left something in the cache."""
        with self._reading():
            return [digest for (digest,) in self._db.execute("SELECT digest FROM released").fetchall()]

    def forget_released(self, digest: str) -> None:
        """Nothing of it is left, or it is an image again."""
        with self._change() as db:
            db.execute("DELETE FROM released WHERE digest = ?", (digest,))

    # -- inside

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise SnapshotError(why=f"{self._path}: {error}") from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.OperationalError as error:
                # A full disk; anything else that SQLite calls so needs somebody to look at the disk as well.
                raise NoRoom(where=self._path, why=str(error)) from error
            except sqlite3.Error as error:
                raise SnapshotError(why=f"{self._path}: {error}") from error

    def _insert(
        self,
        db: sqlite3.Connection,
        number: int,
        kind: Kind,
        name: str,
        parent: str,
        labels: Mapping[str, str],
    ) -> None:
        below = None
        if parent:
            row = db.execute("SELECT id, kind FROM snapshots WHERE name = ?", (parent,)).fetchone()
            if row is None:
                raise SnapshotMissing(name=parent)
            if row[1] != Kind.COMMITTED:
                raise RequestInvalid(why=f"parent {parent} is not a committed snapshot")
            below = row[0]
        now = self._clock_ns()
        try:
            db.execute(
                """INSERT INTO snapshots (id, name, kind, parent, labels, created_ns, updated_ns)
                   VALUES (?, ?, ?, ?, ?, ?, ?)""",
                (number, name, kind, below, _packed(labels), now, now),
            )
        except sqlite3.IntegrityError as error:
            raise SnapshotExists(name=name) from error


def _second_name(ref: str, parent: str) -> str:
    return f"{ref} on {parent or 'nothing'}"


def _has_image(db: sqlite3.Connection, number: int) -> bool:
    return db.execute("SELECT 1 FROM images WHERE id = ?", (number,)).fetchone() is not None


def _packed(labels: Mapping[str, str]) -> str:
    """Labels without a value are none."""
    return msgspec.json.encode({key: value for key, value in labels.items() if value}).decode()


def _snapshot(row: Sequence[Any]) -> Snapshot:
    source = msgspec.json.decode(row[10], type=SourceLayer) if row[10] else None
    labels = msgspec.json.decode(row[4], type=dict[str, str])
    number, name, kind, parent, _, created_ns, updated_ns, size_bytes, inodes, blob_id, _, image_id = row
    return Snapshot(
        number,
        name,
        Kind(kind),
        parent,
        labels,
        created_ns,
        updated_ns,
        size_bytes,
        inodes,
        blob_id,
        source,
        image_id,
    )
