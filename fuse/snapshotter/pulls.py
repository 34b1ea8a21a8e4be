"""Decides for each layer that is pulled: lazily, or unpacked by containerd as ever. Says why in one line.

Concurrency: called from many threads; the registry is asked once for an image, whoever asks first, and the
answer is kept as long as a pull may take.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from fuse.snapshotter.failures import ImageUnavailable
from fuse.snapshotter.layer_labels import LayerLabels, PulledImage
from fuse.snapshotter.pull_plan import PlannedLayer, PullPlan
from rafs.errors import NydusError

log = logging.getLogger(__name__)

PLAN_KEPT_S = 600.0
FAILURE_KEPT_S = 60.0
"""The layers of an ordinary image get the same answer, while those before them are being downloaded."""
NYDUS_FAILURE_KEPT_S = 2.0
"""Those of a Nydus image come at once, or not at all; the next pull tries again."""
PLANS_MAX = 256


class Planning(Protocol):
    """What asks registries, for threads that may wait."""

    def plan(self, pulled: PulledImage, is_nydus: bool) -> PullPlan:
        """See `PullPlanner.plan`."""
        ...

    def verify_bootstrap(self, pulled: PulledImage, plan: PullPlan) -> None:
        """See `PullPlanner.verify_bootstrap`."""
        ...


@dataclass(frozen=True, slots=True)
class LazyLayer:
    """A layer that nobody has to unpack: `image_id` is set for the topmost one of a mounted image."""

    layer: PlannedLayer
    image_id: int | None


@dataclass(slots=True)
class _Pull:
    lock: threading.Lock = field(default_factory=threading.Lock)
    plan: PullPlan | None = None
    failure: str = ""
    told: str = ""
    is_verified: bool = False
    until: float = 0.0


class Pulls:
    """See above."""

    def __init__(self, planning: Planning, mount: Callable[[str], int], drop: Callable[[int], None]) -> None:
        """`mount` mounts the image of that exact name, and gives its number. It raises `NydusError`.

        `drop` takes it back, unless it is needed.
        """
        self._planning = planning
        self._mount = mount
        self._drop = drop
        self._pulls: dict[tuple[PulledImage, bool], _Pull] = {}
        self._lock = threading.Lock()

    def decide(self, labels: LayerLabels, ref: str, depth: int) -> LazyLayer | None:
        """What stands for the layer with chain ID `ref` over `depth` others; None: it is to be unpacked.

        Raises `ImageUnavailable` for a layer that only a mount can make sense of, where that fails.
        """
        pulled = labels.image
        if pulled is None:
            if labels.is_nydus:
                why = (
                    "containerd does not say which image this layer is of; set "
                    "disable_snapshot_annotations = false for its CRI plugin, and pull by CRI"
                )
                raise ImageUnavailable(reference=labels.layer_digest or ref, why=why)
            return None
        pull = self._pull(pulled, labels.is_nydus)
        with pull.lock:
            if pull.until < time.monotonic():
                pull.plan, pull.failure, pull.is_verified = None, "", False
            self._find_plan(pull, pulled, labels.is_nydus)
            plan = pull.plan
            if plan is None or not plan.image:
                return self._refused(pull, labels, pulled)
            layer = _expect_layer(plan, labels, ref, depth)
            if layer is None:
                why = f"layer {labels.layer_digest or ref} has no place in its manifest"
                self._note_failure(pull, pulled, why, is_nydus=plan.is_nydus)
                return self._refused(pull, labels, pulled)
            return self._lazy(pull, plan, layer, labels, pulled)

    def _lazy(
        self, pull: _Pull, plan: PullPlan, layer: PlannedLayer, labels: LayerLabels, pulled: PulledImage
    ) -> LazyLayer | None:
        if not pull.failure:
            try:
                number = self._provide(pull, plan, pulled)
                return LazyLayer(layer, number if layer is plan.layers[-1] else None)
            except NydusError as error:
                self._note_failure(pull, pulled, str(error), is_nydus=plan.is_nydus)
        return self._refused(pull, labels, pulled)

    def _provide(self, pull: _Pull, plan: PullPlan, pulled: PulledImage) -> int:
        """Mounts the image; with the first layer, so that it is known to work before any is promised."""
        number = self._mount(plan.image)
        if plan.is_nydus and not pull.is_verified:
            try:
                self._planning.verify_bootstrap(pulled, plan)
            except NydusError:
                self._drop(number)
                raise
            pull.is_verified = True
        return number

    def _find_plan(self, pull: _Pull, pulled: PulledImage, is_nydus: bool) -> None:
        if pull.plan is not None or pull.failure:
            return
        pull.until = time.monotonic() + PLAN_KEPT_S
        try:
            pull.plan = self._planning.plan(pulled, is_nydus)
        except NydusError as error:
            self._note_failure(pull, pulled, str(error), is_nydus=is_nydus)
            return
        if not pull.plan.image:
            log.info("%s: no Nydus image, unpacked as ever", pulled.name)

    def _note_failure(self, pull: _Pull, pulled: PulledImage, why: str, *, is_nydus: bool) -> None:
        pull.failure = why
        pull.until = time.monotonic() + (NYDUS_FAILURE_KEPT_S if is_nydus else FAILURE_KEPT_S)
        if pull.told != why:
            log.warning("%s: not mounted lazily: %s", pulled.name, why)
            pull.told = why

    def _refused(self, pull: _Pull, labels: LayerLabels, pulled: PulledImage) -> LazyLayer | None:
        """None, where containerd can unpack the layer. Raises `ImageUnavailable` otherwise."""
        if labels.is_nydus:
            why = f"{pull.failure or 'not a Nydus image'}; its layers can only be mounted, not unpacked"
            raise ImageUnavailable(reference=pulled.name, why=why)
        return None

    def _pull(self, pulled: PulledImage, is_nydus: bool) -> _Pull:
        with self._lock:
            if len(self._pulls) >= PLANS_MAX:
                now = time.monotonic()
                self._pulls = {key: pull for key, pull in self._pulls.items() if pull.until > now}
                if len(self._pulls) >= PLANS_MAX:  # who is in the middle of it goes on with what it has
                    del self._pulls[next(iter(self._pulls))]
            return self._pulls.setdefault((pulled, is_nydus), _Pull())


def _expect_layer(plan: PullPlan, labels: LayerLabels, ref: str, depth: int) -> PlannedLayer | None:
    """The layer at that place of the manifest, if it is the one that is asked for."""
    if depth >= len(plan.layers):
        return None
    layer = plan.layers[depth]
    is_right = layer.chain_id == ref and labels.layer_digest in ("", layer.digest)
    return layer if is_right else None
