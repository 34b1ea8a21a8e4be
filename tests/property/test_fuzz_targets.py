"""Replays the fuzz targets without atheris: their seeds, damaged in ways that a fuzzer would find."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

TARGETS = tuple(sorted(path.stem for path in Path(__file__).parents[1].glob("fuzz/fuzz_*.py")))
INTERESTING = (b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff" * 8, b"\0" * 8)


@pytest.fixture(params=TARGETS, scope="module")
def target(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"tests.fuzz.{request.param}")


@st.composite
def damaged(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A seed with up to four places overwritten, or cut short."""
    data = bytearray(draw(st.sampled_from(seeds)))
    # Most bytes of a metadata block are zero and say nothing: half of the hits go to others.
    telling = [index for index, byte in enumerate(data) if byte]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.sampled_from(telling) | st.integers(0, len(data) - 1))
        patch = draw(st.sampled_from(INTERESTING) | st.binary(min_size=1, max_size=8))
        if draw(st.booleans()):
            patch = bytes([data[at] ^ (1 << draw(st.integers(0, 7)))])
        data[at : at + len(patch)] = patch
    if draw(st.integers(0, 9)) == 0:
        del data[draw(st.integers(0, len(data) - 1)) :]
    return bytes(data)


def test_seeds_are_taken(target: ModuleType) -> None:
    for seed in target.SEEDS:
        target.exercise(seed)


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_seeds_do_no_harm(target: ModuleType, data: st.DataObject) -> None:
    target.exercise(data.draw(damaged(target.SEEDS)))


@given(noise=st.binary(max_size=2000))
def test_noise_does_no_harm(target: ModuleType, noise: bytes) -> None:
    target.exercise(noise)
