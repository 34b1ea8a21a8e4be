"""Virtual time: a heap of what is going to happen. What is due at the same time keeps its order."""

import heapq
from collections.abc import Callable


class Events:
    """`now` is in seconds and moves when `run` takes the next event."""

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0
        """Events that have happened."""
        self._heap: list[tuple[float, int, Callable[..., object], tuple[object, ...]]] = []
        self._number = 0

    def after(self, delay_s: float, action: Callable[..., object], *arguments: object) -> None:
        """Has `action(*arguments)` called `delay_s` from now."""
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._number, action, arguments))

    def run(self, is_over: Callable[[], bool], until_s: float) -> None:
        """Until `is_over`, nothing is left to happen, or `until_s` has come."""
        heap, pop = self._heap, heapq.heappop
        while heap and not is_over():
            self.now, _, action, arguments = pop(heap)
            if self.now > until_s:
                return
            self.count += 1
            action(*arguments)
