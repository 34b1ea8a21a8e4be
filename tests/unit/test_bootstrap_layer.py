"""The bootstrap layer: deterministic when written, hostile when read."""

import gzip
import io
import random
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import backend.bootstrap_layer as layer_module
from backend.bootstrap_layer import LayerBroken, LayerFile, LayerUnpacker, PackedLayer, pack_layer
from backend.ocidigest import DigestMismatch, digest_of
from backend.publishing import CannotWrite, DiskFull

BLOB_ID = "ab" * 32
TABLE_NAME = f"{BLOB_ID}.blob.meta"


def pack(directory: Path, boot: bytes, table: bytes) -> tuple[PackedLayer, bytes]:
    (directory / "boot").write_bytes(boot)
    (directory / "table").write_bytes(table)
    files = [LayerFile("image.boot", directory / "boot"), LayerFile(TABLE_NAME, directory / "table")]
    packed = pack_layer(files, directory / "layer")
    return packed, (directory / "layer").read_bytes()


def unpack(data: bytes, directory: Path, digest: str | None = None, piece_bytes: int = 1 << 20) -> Path:
    target = directory / "unpacked"
    target.mkdir()
    unpacker = LayerUnpacker(target, "an image")
    try:
        for at in range(0, len(data), piece_bytes):
            unpacker.feed(data[at : at + piece_bytes])
        unpacker.finish(digest or digest_of(data))
    finally:
        unpacker.close()
    return target


def tar_of(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = kind, len(data)
            archive.addfile(entry, io.BytesIO(data))
    return output.getvalue()


@pytest.mark.parametrize("size_bytes", [0, 1, 511, 512, 513, (1 << 20) + 1])
def test_round_trip(tmp_path: Path, size_bytes: int) -> None:
    boot, table = random.Random(1).randbytes(size_bytes), b"table"
    packed, data = pack(tmp_path, boot, table)
    assert (packed.digest, packed.size_bytes) == (digest_of(data), len(data))
    assert packed.diff_id == digest_of(gzip.decompress(data))
    target = unpack(data, tmp_path)
    assert (target / "image.boot").read_bytes() == boot
    assert (target / TABLE_NAME).read_bytes() == table
    assert len(list(target.iterdir())) == 2


def test_same_files_give_the_same_bytes_whatever_their_times(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    first = pack(tmp_path / "1", b"boot", b"table")
    (tmp_path / "2" / "boot").touch(mode=0o600)
    assert pack(tmp_path / "2", b"boot", b"table") == first


def test_any_tar_program_reads_it(tmp_path: Path) -> None:
    _, data = pack(tmp_path, b"boot", b"table")
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        assert archive.getnames() == ["image", "image/image.boot", f"image/{TABLE_NAME}"]
        assert [(member.mtime, member.uid, member.gid) for member in archive] == [(0, 0, 0)] * 3
        assert archive.getmember("image").isdir()


@pytest.mark.parametrize("piece_bytes", [1, 7, 512])
def test_pieces_may_be_cut_anywhere(tmp_path: Path, piece_bytes: int) -> None:
    _, data = pack(tmp_path, b"b" * 2000, b"t" * 700)
    target = unpack(data, tmp_path, piece_bytes=piece_bytes)
    assert (target / "image.boot").read_bytes() == b"b" * 2000


def test_layer_of_other_tools_is_read(tmp_path: Path) -> None:
    data = tar_of(
        ("./image/image.boot", b"boot"), ("image/backend.json", b"{}"), ("image/" + "x" * 150, b"y")
    )
    assert [path.name for path in unpack(data, tmp_path).iterdir()] == ["image.boot"]


def test_several_gzip_members_are_one_layer(tmp_path: Path) -> None:
    plain = gzip.decompress(tar_of(("image/image.boot", b"boot" * 1000)))
    data = gzip.compress(plain[:700]) + gzip.compress(plain[700:])
    assert (unpack(data, tmp_path) / "image.boot").read_bytes() == b"boot" * 1000


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "ends early"),
        (b"no gzip at all", "[Ii]nvalid|header|gzip"),
        (gzip.compress(b"x" * 512), "header|checksum"),
        (gzip.compress(b"x" * 100), "the tar ends early"),
        (tar_of(("image/other", b"x")), "no image/image.boot"),
        (tar_of(("image/image.boot", b"x"))[:-9], "ends early"),
        (
            gzip.compress(gzip.decompress(tar_of(("image/image.boot", b"x" * 900)))[:1024]),
            "the tar ends early",
        ),
        (tar_of(("image/image.boot", b"x"), ("image/image.boot", b"y")), "twice"),
        (tar_of(("image/../../image.boot", b"x")), "leaves the folder"),
        (tar_of(("/image/image.boot", b"x")), "leaves the folder"),
        (tar_of(("image/image.boot", b""), kind=tarfile.SYMTYPE), "not a regular file"),
        (tar_of(("image/image.boot", b""), kind=tarfile.LNKTYPE), "not a regular file"),
        (tar_of(("image/image.boot", b""), kind=tarfile.FIFOTYPE), "not a regular file"),
        (tar_of(*[(f"m{i}", b"") for i in range(1025)]), "more than 1024 members"),
    ],
)
def test_layer_that_is_none(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(LayerBroken, match=why):
        unpack(data, tmp_path)


def test_altered_layer_is_told_from_a_badly_made_one(tmp_path: Path) -> None:
    _, data = pack(tmp_path, b"boot", b"table")
    with pytest.raises(DigestMismatch):
        unpack(data[:-1], tmp_path, digest=digest_of(data))


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tar_of(("image/image.boot", bytes(5000)))
    monkeypatch.setattr(layer_module, "BOOTSTRAP_SIZE_MAX_BYTES", 4999)
    with pytest.raises(LayerBroken, match="5000 bytes, more than 4999"):
        unpack(data, tmp_path)


def test_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_module, "LAYER_SIZE_MAX_BYTES", 1 << 20)
    with pytest.raises(LayerBroken, match="unpacks to more than"):
        unpack(tar_of(("image/other", bytes(1 << 20)), ("image/image.boot", b"x")), tmp_path)


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_flipped_bits_never_pass_as_the_layer(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    data = bytearray(tar_of(("image/image.boot", b"boot" * 300), (f"image/{TABLE_NAME}", b"t")))
    digest = digest_of(bytes(data))
    data[at % len(data)] ^= 1 << bit
    directory = tmp_path_factory.mktemp("flip")
    with pytest.raises(DigestMismatch):
        unpack(bytes(data), directory, digest)
    (directory / "unpacked").rename(directory / "first")
    with suppress(LayerBroken):
        unpack(bytes(data), directory)  # a layer that was published like this


def test_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "boot").write_bytes(b"boot")
    with pytest.raises(DiskFull, match="No space left on device; free some space") as caught:
        pack_layer([LayerFile("image.boot", tmp_path / "boot")], Path("/dev/full"))
    assert caught.value.exit_code == 45


def test_target_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="missing/layer: cannot write: No such file or directory"):
        pack_layer([], tmp_path / "missing" / "layer")
