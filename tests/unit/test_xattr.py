"""Extended attributes: the bytes of the format page, limits and misfits."""

import pytest

from rafs.record import FormatError
from rafs.xattr import XattrUnsupported, is_storable, pack_xattrs, unpack_xattrs
from tests.golden import golden

CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def test_attributes_of_the_format_page() -> None:
    attributes = {b"user.key": b"value", b"security.capability": CAPABILITY}
    data = golden("xattrs")
    assert pack_xattrs(attributes, "file") == data
    assert unpack_xattrs(data, 0, len(data)) == attributes
    assert unpack_xattrs(b"before" + data + b"after", 6, len(data)) == attributes


def test_none_at_all() -> None:
    assert pack_xattrs({}, "file") == b""
    assert unpack_xattrs(b"", 0, 0) == {}


def test_largest_value_and_suffix() -> None:
    attributes = {b"user." + b"s" * 255: b"\xff" * 0xFFFF}
    data = pack_xattrs(attributes, "file")
    assert unpack_xattrs(data, 0, len(data)) == attributes


@pytest.mark.parametrize(
    "attributes",
    [
        {b"lustre.x": b""},
        {b"system.other": b""},
        {b"user." + b"s" * 256: b""},
        {b"user.x": bytes(0x10000)},
        {b"user.%d" % n: bytes(0xFFFF) for n in range(5)},
    ],
)
def test_what_cannot_be_stored_names_the_file(attributes: dict[bytes, bytes]) -> None:
    with pytest.raises(XattrUnsupported, match="the/file"):
        pack_xattrs(attributes, "the/file")


def test_which_names_can_be_stored() -> None:
    assert is_storable(b"user.x")
    assert is_storable(b"system.posix_acl_access")
    assert not is_storable(b"system.nfs4_acl")
    assert not is_storable(b"btrfs.compression")


@pytest.mark.parametrize(
    ("offset", "wrong", "expectation"),
    [
        (4, b"\1", "no shared xattrs"),
        (12, b"\xff", "an attribute before byte 60"),
        (13, b"\5", "known name prefix"),
        (13, b"\0", "known name prefix"),
        (14, b"\xff\xff", "an attribute before byte 60"),
    ],
)
def test_each_wrong_field_is_named(offset: int, wrong: bytes, expectation: str) -> None:
    data = bytearray(golden("xattrs"))
    data[offset : offset + len(wrong)] = wrong
    with pytest.raises(FormatError) as caught:
        unpack_xattrs(data, 0, len(data))
    assert expectation in caught.value.expectation
    assert caught.value.offset_bytes in (4, 12, 13)


def test_same_attribute_twice() -> None:
    one = pack_xattrs({b"user.key": b"value"}, "file")
    data = one + one[12:]
    with pytest.raises(FormatError, match="each attribute once"):
        unpack_xattrs(data, 0, len(data))


@pytest.mark.parametrize("size", range(1, 60))
def test_area_cut_anywhere(size: int) -> None:
    data = golden("xattrs")
    if size == 12:
        assert unpack_xattrs(data, 0, size) == {}
    elif not 46 <= size <= 48:  # the whole first attribute, with its padding or without
        with pytest.raises(FormatError):
            unpack_xattrs(data[:size], 0, size)
