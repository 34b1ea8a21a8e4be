"""What is kept of converted layers, and for how long."""

import os
import time
from pathlib import Path

import pytest
import trio

from builder.journal import WorkDirectory
from builder.layer_cache import LayerCache
from builder.layer_eviction import EvictionLimits, evict_layers

NOW_S = time.time()
DAY_S = 86_400
KEYS = [f"{number:032x}" for number in range(5)]


@pytest.fixture
def cache(tmp_path: Path) -> LayerCache:
    return LayerCache(tmp_path / "layers")


async def used(cache: LayerCache, key: str, days_ago: float, *, size: int = 1000, work_size: int = 0) -> None:
    """A layer with that many bytes, and of a killed conversion, last used then."""
    async with cache.locked(key):
        (cache.directory / key).mkdir()
        (cache.directory / key / "image.boot").write_bytes(bytes(size))
        if work_size:
            cache.work_dir(key).mkdir()
            (cache.work_dir(key) / "0.blob").write_bytes(bytes(work_size))
    time_s = NOW_S - days_ago * DAY_S
    os.utime(cache.directory / f"{key}.lock", (time_s, time_s))


async def test_what_nobody_used_for_a_month_goes_with_all_that_belongs_to_it(cache: LayerCache) -> None:
    await used(cache, KEYS[0], 31, work_size=10)
    await used(cache, KEYS[1], 29, work_size=10)
    (cache.directory / "something else").write_text("is not ours")
    assert evict_layers(cache, NOW_S) == [KEYS[0]]
    wanted = {KEYS[1], f"{KEYS[1]}.lock", f"{KEYS[1]}.work", "something else"}
    assert set(os.listdir(cache.directory)) == wanted


async def test_the_longest_unused_go_until_the_rest_has_room(cache: LayerCache) -> None:
    for days_ago, key in enumerate(KEYS):
        await used(cache, key, days_ago, size=1000, work_size=500 if days_ago == 2 else 0)
    assert cache.size_bytes(KEYS[2]) == 1500
    assert evict_layers(cache, NOW_S, EvictionLimits(bytes_max=3500)) == [KEYS[4], KEYS[3]]
    async with cache.locked(KEYS[2]):
        pass  # a use, the last of all
    assert evict_layers(cache, NOW_S, EvictionLimits(bytes_max=2500)) == [KEYS[1]]


async def test_what_is_in_use_stays(cache: LayerCache) -> None:
    for key in KEYS[:3]:
        await used(cache, key, 100, work_size=10)
    work = WorkDirectory(cache.work_dir(KEYS[1]))
    async with cache.locked(KEYS[0]):
        assert evict_layers(cache, NOW_S) == [KEYS[2]]
    work.close()
    assert evict_layers(cache, NOW_S) == [KEYS[1]]
    assert cache.all_keys() == {KEYS[0]}, "it has just been used"


async def test_who_waits_for_a_lock_that_is_removed_takes_the_next_one(cache: LayerCache) -> None:
    """Of two that lock, one must not have the file that is gone."""
    await used(cache, KEYS[0], 100)
    removed = os.open(cache.directory / f"{KEYS[0]}.lock", os.O_RDWR)
    assert evict_layers(cache, NOW_S) == [KEYS[0]]
    async with cache.locked(KEYS[0]):
        assert os.fstat(removed).st_nlink == 0
        assert (cache.directory / f"{KEYS[0]}.lock").exists()
        assert not cache.discard(KEYS[0])
        with trio.move_on_after(0.05) as scope:
            async with cache.locked(KEYS[0]):
                pass
        assert scope.cancelled_caught
    os.close(removed)


async def test_there_is_nothing_yet(cache: LayerCache) -> None:
    assert evict_layers(cache, NOW_S) == []
    assert not cache.directory.exists()
