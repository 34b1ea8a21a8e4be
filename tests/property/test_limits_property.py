"""Nested limits under random demand: they hold within 5 % over 5 s, and nothing is lost. Virtual time."""

import random
from bisect import bisect_left

from hypothesis import given, settings
from hypothesis import strategies as st

from backend.peers.claims import Claim, ClaimQueue
from backend.peers.limit_settings import LimitSettings
from backend.peers.limit_tree import LimitTree
from backend.priority import FetchClass

WINDOW_S = 5.0
KIB = 1 << 10

Passed = list[tuple[float, int]]
"""When something passed, and how many bytes."""


def heaviest_window(passed: Passed) -> int:
    """The most bytes in any `WINDOW_S`."""
    times = [at for at, _ in passed]
    sums = [0]
    for _, n_bytes in passed:
        sums.append(sums[-1] + n_bytes)
    return max(
        (sums[index + 1] - sums[bisect_left(times, at - WINDOW_S)] for index, at in enumerate(times)),
        default=0,
    )


class Users:
    """Users who each claim again as soon as they are let through."""

    def __init__(self, tree: LimitTree, seed: int, count: int, tasks: int, *, up: bool) -> None:
        self.tree = tree
        self.random = random.Random(seed)
        self.passed: Passed = []
        self.by_task: dict[str, Passed] = {f"blob{number}": [] for number in range(tasks)}
        self.up = up
        self.sizes: dict[Claim, tuple[str, int]] = {}
        for number in range(count):
            self._claim(f"blob{number % tasks}", 0.0)

    def run(self, start: float, end: float) -> None:
        now = start
        while now <= end:
            while granted := self.tree.queue.pump(now):
                for claim in granted:
                    task, size = self.sizes.pop(claim)
                    self.passed.append((now, size))
                    self.by_task[task].append((now, size))
                    self._claim(task, now)
            now = max(self.tree.queue.next_at(now), now + 0.001)

    def _claim(self, task: str, now: float) -> None:
        size = self.random.choice([1, 64 * KIB, 256 * KIB])
        fetch_class = self.random.choice(list(FetchClass))
        if self.up:
            claim = self.tree.upload(size, fetch_class, task, now)
        else:
            claim = self.tree.download(size, fetch_class, task, now, from_origin=False)
        self.sizes[claim] = (task, size)


@settings(max_examples=25)
@given(
    host=st.integers(4 << 20, 64 << 20),
    task=st.one_of(st.none(), st.integers(4 << 20, 64 << 20)),
    users=st.integers(1, 16),
    tasks=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    up=st.booleans(),
)
def test_limits_hold_within_5_percent_over_5_s(
    host: int, task: int | None, users: int, tasks: int, seed: int, up: bool
) -> None:
    limits = (
        LimitSettings(host_up_bps=host, task_up_bps=task)
        if up
        else LimitSettings(host_down_bps=host, task_down_bps=task)
    )
    tasks = min(tasks, users)
    crowd = Users(LimitTree(limits, 0.0), seed, users, tasks, up=up)
    crowd.run(0.0, 6.0)
    expected = min(host, task * tasks) if task is not None else host
    assert heaviest_window(crowd.passed) <= 1.05 * WINDOW_S * expected
    assert sum(size for at, size in crowd.passed if at > 1.0) >= 0.95 * WINDOW_S * expected
    if task is not None:
        assert max(map(heaviest_window, crowd.by_task.values())) <= 1.05 * WINDOW_S * task


@settings(max_examples=15)
@given(
    before=st.integers(4 << 20, 64 << 20),
    after=st.integers(4 << 20, 64 << 20),
    users=st.integers(1, 16),
    seed=st.integers(0, 2**32),
)
def test_a_change_holds_from_the_next_5_s_on(before: int, after: int, users: int, seed: int) -> None:
    tree = LimitTree(LimitSettings(host_down_bps=before), 0.0)
    crowd = Users(tree, seed, users, 1, up=False)
    crowd.run(0.0, 2.0)
    crowd.passed.clear()
    tree.change(LimitSettings(host_down_bps=after), 2.0)
    crowd.run(2.0, 8.0)
    assert heaviest_window(crowd.passed) <= 1.05 * WINDOW_S * after
    assert sum(size for at, size in crowd.passed if at > 3.0) >= 0.95 * WINDOW_S * after


@settings(max_examples=50)
@given(
    rate=st.integers(1 << 10, 50 << 20),
    claims=st.lists(
        st.tuples(st.sampled_from(list(FetchClass)), st.integers(0, 256 << 10), st.booleans()), max_size=30
    ),
)
def test_every_byte_is_counted_once_whatever_is_withdrawn(
    rate: int, claims: list[tuple[FetchClass, int, bool]]
) -> None:
    tree = LimitTree(LimitSettings(host_down_bps=rate, origin_bps=rate), 0.0)
    kept = 0
    now = 0.0
    for fetch_class, size, withdraws in claims:
        claim = tree.download(size, fetch_class, "blob", now, from_origin=True)
        tree.queue.pump(now)
        if withdraws:
            tree.queue.withdraw(claim, now)
        else:
            kept += size
        now += 0.01
    pump_all(tree.queue, now)
    assert tree.statistics().down_bytes == tree.statistics().origin_bytes == kept


def pump_all(queue: ClaimQueue, now: float) -> None:
    """Lets everything through that waits."""
    while len(queue):
        now = max(queue.next_at(now), now)
        queue.pump(now)
