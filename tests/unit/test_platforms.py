"""Which image of several a host takes."""

import pytest

from backend.platforms import Platform
from tools.convert_options import parse_platform

CASES = [
    ("linux/amd64", ["linux/amd64", "linux/amd64/v1", "linux/x86_64"], ["linux/amd64/v2", "linux/arm64"]),
    ("linux/amd64/v3", ["linux/amd64/v3", "linux/amd64/v2", "linux/amd64"], ["linux/amd64/v4"]),
    ("linux/arm", ["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"], ["linux/arm/v8", "linux/arm64"]),
    ("linux/arm/v6", ["linux/armel", "linux/arm/v5"], ["linux/arm", "linux/armhf"]),
    ("linux/arm64", ["linux/arm64/v8", "linux/aarch64"], ["linux/arm64/v8.2", "linux/arm64/v9"]),
    ("linux/arm64/v9", ["linux/arm64/9", "linux/arm64/v8.2", "linux/arm64"], ["linux/arm64/v9.1"]),
    (
        "linux/mips64le/softfloat",
        ["linux/mips64le/softfloat"],
        ["linux/mips64le", "linux/mips64le/hardfloat"],
    ),
    ("linux/riscv64", ["linux/riscv64"], ["linux/riscv64/rva23", "windows/riscv64"]),
]


@pytest.mark.parametrize(("wanted", "running", "others"), CASES)
def test_best_first_and_none_of_the_others(wanted: str, running: list[str], others: list[str]) -> None:
    host = parse_platform(wanted)
    found = [host.nearness(parse_platform(text)) for text in running]
    assert None not in found
    assert found == sorted(found, key=lambda nearness: nearness or (), reverse=True)
    assert host.is_same(parse_platform(running[0]))
    assert [host.nearness(parse_platform(text)) for text in others] == [None] * len(others)


def test_names_are_those_of_the_oci() -> None:
    assert str(Platform("arm", "linux", "v7")) == "linux/arm/v7"
    assert Platform("arm64", "Linux").is_same(Platform("AArch64", "linux", "v8"))
    assert Platform("arm", "linux", "v6").runs(Platform("arm", "linux", "v8"))
