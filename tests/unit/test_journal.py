"""The journal of an interrupted build: what is found again, and what is not trusted."""

import errno
import os
from pathlib import Path

import pytest
import xxhash

from builder.journal import BuildRunning, JournalWriter, WorkDirectory, extent_key
from builder.options import BuildOptions, CompressionPolicy

KEYS = [extent_key(bytes([number]) * 32, BuildOptions()) for number in range(100)]


def _content(number: int) -> bytes:
    return bytes([number]) * (number + 1)


def _generation(directory: Path, count: int) -> Path:
    """What a build that was killed after `count` extents leaves; returns the journal."""
    work = WorkDirectory(directory)
    journal = JournalWriter(work.journal_path)
    with work.blob_path.open("xb") as blob:
        for number in range(count):
            data = _content(number)
            checksum = xxhash.xxh3_64_intdigest(data)
            journal.append(KEYS[number], blob.tell(), len(data), 4096, checksum)
            blob.write(data)
    journal.close()
    work.close()
    return work.journal_path


def _found(directory: Path, count: int = 100) -> list[int]:
    """Numbers of the extents that the next build finds, each with the right bytes."""
    work = WorkDirectory(directory)
    numbers = []
    for number in range(count):
        data = work.find(KEYS[number])
        if data is not None:
            assert data == _content(number)
            numbers.append(number)
    work.close()
    return numbers


def test_a_new_directory_has_nothing(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "below" / "work")
    assert work.find(KEYS[0]) is None
    assert work.extents_found == 0
    work.close()


def test_finished_extents_are_found(tmp_path: Path) -> None:
    _generation(tmp_path, 50)
    assert _found(tmp_path) == list(range(50))


def test_a_torn_record_at_the_end_is_left_out(tmp_path: Path) -> None:
    journal = _generation(tmp_path, 50)
    raw = journal.read_bytes()
    for cut in (1, 20, 55):
        journal.write_bytes(raw[:-cut])
        assert _found(tmp_path) == list(range(49))


def test_records_whose_bytes_are_not_there_are_left_out(tmp_path: Path) -> None:
    blob = _generation(tmp_path, 50).with_suffix(".blob")
    blob.write_bytes(blob.read_bytes()[:-1])
    assert _found(tmp_path) == list(range(49))


def test_changed_bytes_are_noticed(tmp_path: Path) -> None:
    blob = _generation(tmp_path, 50).with_suffix(".blob")
    raw = bytearray(blob.read_bytes())
    raw[0] ^= 1
    blob.write_bytes(raw)
    assert _found(tmp_path) == list(range(1, 50))


def test_no_flipped_bit_of_the_journal_gives_wrong_bytes(tmp_path: Path) -> None:
    journal = _generation(tmp_path, 3)
    raw, blob = journal.read_bytes(), journal.with_suffix(".blob").read_bytes()
    for bit in range(0, 8 * len(raw), 5):
        broken = bytearray(raw)
        broken[bit // 8] ^= 1 << bit % 8
        journal.write_bytes(broken)
        journal.with_suffix(".blob").write_bytes(blob)
        _found(tmp_path, 3)


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 40, b"NYDJRNL1" + bytes(32), b"x" * 1000])
def test_garbage_is_no_journal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "3.journal").write_bytes(content)
    (tmp_path / "3.blob").write_bytes(b"something")
    work = WorkDirectory(tmp_path)
    assert work.extents_found == 0
    assert not list(tmp_path.glob("*.blob"))
    assert work.journal_path.name == "4.journal"
    work.close()


def test_the_richer_generation_stays(tmp_path: Path) -> None:
    _generation(tmp_path, 50)
    _generation(tmp_path, 10)
    assert _found(tmp_path) == list(range(50))
    assert len(list(tmp_path.glob("*.journal"))) == len(list(tmp_path.glob("*.blob"))) == 1
    _generation(tmp_path, 60)
    assert _found(tmp_path) == list(range(60))


def test_the_index_of_an_old_journal_is_gone_afterwards(tmp_path: Path) -> None:
    _generation(tmp_path, 20)
    work = WorkDirectory(tmp_path)
    assert (tmp_path / "0.found").exists()
    assert work.extents_found == 20
    work.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.blob", "0.journal", "lock"]


def test_a_full_disk_loses_no_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    _generation(tmp_path, 20)
    with monkeypatch.context() as patch:
        patch.setattr("builder.journal.DigestFile", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            WorkDirectory(tmp_path)
    assert _found(tmp_path) == list(range(20))


def test_one_build_at_a_time(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path)
    with pytest.raises(BuildRunning, match="another build"):
        WorkDirectory(tmp_path)
    work.close()
    WorkDirectory(tmp_path).close()


def test_records_reach_the_kernel_before_the_end(tmp_path: Path) -> None:
    """A killed build loses some records at most."""
    journal = JournalWriter(tmp_path / "0.journal")
    for number in range(40):
        journal.append(KEYS[number], 0, 1, 1, 1)
    assert (tmp_path / "0.journal").stat().st_size >= 40 + 20 * 56
    journal.close()


def test_the_key_says_how_the_bytes_were_made() -> None:
    digests = bytes(64)
    made = {
        extent_key(digests, BuildOptions()),
        extent_key(digests, BuildOptions(level=4)),
        extent_key(digests, BuildOptions(compression=CompressionPolicy.ZSTD)),
        extent_key(digests[:32], BuildOptions()),
    }
    assert len(made) == 4
    assert extent_key(digests, BuildOptions(threads=7)) in made
