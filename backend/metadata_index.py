"""The index of a metadata directory: which files belong to it, and what is in them.

Written last, before the directory gets its name. A file that is lost, cut or altered afterwards is found
before a mount stumbles over it. Measured: 20 MB are compared in 1 ms when they are in the page cache.
"""

import mmap
from pathlib import Path

import msgspec
import xxhash

INDEX_NAME = "files.json"
_INDEX_SIZE_MAX_BYTES = 1 << 20


class _IndexedFile(msgspec.Struct, frozen=True):
    name: str
    size_bytes: int
    xxh3: str


class _MetadataIndex(msgspec.Struct, frozen=True):
    files: tuple[_IndexedFile, ...]


def write_index(directory: Path) -> None:
    """Writes the index of the files that are in `directory` now. Raises `OSError`."""
    paths = sorted(path for path in directory.iterdir() if path.name != INDEX_NAME)
    files = tuple(_IndexedFile(path.name, path.stat().st_size, _xxh3_of(path)) for path in paths)
    (directory / INDEX_NAME).write_bytes(msgspec.json.encode(_MetadataIndex(files)))


def find_damage(directory: Path) -> str | None:
    """What is wrong with the files of `directory`, None when they are what `write_index` saw.

    The checksums find accidents; someone who may write here can also write a fitting index.
    """
    try:
        if (directory / INDEX_NAME).stat().st_size > _INDEX_SIZE_MAX_BYTES:
            return f"{INDEX_NAME}: more than {_INDEX_SIZE_MAX_BYTES} bytes"
        index = msgspec.json.decode((directory / INDEX_NAME).read_bytes(), type=_MetadataIndex)
        for file in index.files:  # sizes first: they cost nothing
            size_bytes = (directory / file.name).stat().st_size
            if size_bytes != file.size_bytes:
                return f"{file.name}: {size_bytes} bytes, not {file.size_bytes}"
        for file in index.files:
            if _xxh3_of(directory / file.name) != file.xxh3:
                return f"{file.name}: its content has changed"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"{INDEX_NAME}: {error}"
    except OSError as error:
        return f"{Path(error.filename or directory).name}: {error.strerror}"
    return None


def _xxh3_of(path: Path) -> str:
    with path.open("rb") as file:
        if path.stat().st_size == 0:  # which cannot be mapped
            return xxhash.xxh3_64_hexdigest(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            return xxhash.xxh3_64_hexdigest(mapping)
