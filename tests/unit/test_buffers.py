"""Memory that is used again."""

import pytest

from backend.buffers import SIZE_MIN_BYTES, BufferPool


def test_memory_is_lent_again_and_never_twice_at_once() -> None:
    pool = BufferPool()
    with pool.lent(300_000) as first, pool.lent(300_000) as second:
        first[:], second[:] = b"1" * 300_000, b"2" * 300_000
        assert bytes(first) == b"1" * 300_000
    with pool.lent(400_000) as again:
        assert len(again) == 400_000
        assert bytes(again[:300_000]) in (b"1" * 300_000, b"2" * 300_000)


@pytest.mark.parametrize("size", [0, 1, SIZE_MIN_BYTES, SIZE_MIN_BYTES + 1, (8 << 20) + 5])
def test_any_size_can_be_had(size: int) -> None:
    with BufferPool().lent(size) as buffer:
        assert len(buffer) == size
        buffer[:] = bytes(size)


def test_what_is_kept_is_bounded_also_after_a_failure() -> None:
    pool = BufferPool(kept_max_bytes=4 << 20)
    with pytest.raises(ZeroDivisionError), pool.lent(2 << 20), pool.lent(2 << 20), pool.lent(1 << 20):
        raise ZeroDivisionError
    assert 0 < pool.kept_bytes <= 4 << 20
