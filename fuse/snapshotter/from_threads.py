"""Lets threads of the gRPC server use what runs in the trio loop."""

from collections.abc import Sequence
from pathlib import Path

import trio

from fuse.snapshotter.failures import ImageUnavailable
from fuse.snapshotter.layer_labels import PulledImage
from fuse.snapshotter.layer_restore import LayerRestorer
from fuse.snapshotter.pull_plan import PullPlan, PullPlanner
from fuse.snapshotter.records import SourceLayer

PLAN_TIMEOUT_S = 60.0
"""A registry that takes longer is one that does not answer: the image is pulled the ordinary way."""


class LoopPlanning:
    """`PullPlanner` for threads: see `fuse.snapshotter.pulls.Planning`."""

    def __init__(self, planner: PullPlanner, token: trio.lowlevel.TrioToken) -> None:
        self._planner = planner
        self._token = token

    def plan(self, pulled: PulledImage, is_nydus: bool) -> PullPlan:
        """Raises as `PullPlanner.plan`, and `ImageUnavailable` after `PLAN_TIMEOUT_S`."""

        async def plan() -> PullPlan:
            with trio.move_on_after(PLAN_TIMEOUT_S):
                return await self._planner.plan(pulled, is_nydus=is_nydus)
            raise _no_answer(pulled)

        return trio.from_thread.run(plan, trio_token=self._token)

    def verify_bootstrap(self, pulled: PulledImage, plan: PullPlan) -> None:
        """Raises as `PullPlanner.verify_bootstrap`, and `ImageUnavailable` after `PLAN_TIMEOUT_S`."""

        async def verify() -> None:
            with trio.move_on_after(PLAN_TIMEOUT_S):
                await self._planner.verify_bootstrap(pulled, plan)
                return
            raise _no_answer(pulled)

        trio.from_thread.run(verify, trio_token=self._token)


class LoopRestoring:
    """`LayerRestorer` for threads."""

    def __init__(self, restorer: LayerRestorer, token: trio.lowlevel.TrioToken) -> None:
        self._restorer = restorer
        self._token = token

    def restore(self, layer: SourceLayer, lower: Sequence[Path], place: Path) -> Path:
        """Raises as `LayerRestorer.restore`."""
        return trio.from_thread.run(self._restorer.restore, layer, lower, place, trio_token=self._token)


def _no_answer(pulled: PulledImage) -> ImageUnavailable:
    return ImageUnavailable(reference=pulled.name, why=f"no answer from its registry in {PLAN_TIMEOUT_S:g} s")
