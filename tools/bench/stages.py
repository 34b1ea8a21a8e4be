"""The stages of a run, and what each of them needs from the others."""

import enum
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.bench import ledger as q
from tools.bench import observe
from tools.bench.building import compare_builds, make_missing
from tools.bench.contestants import (
    EROFS_LZ4,
    EROFS_PLAIN,
    Contestant,
    file_builders,
    layer_builders,
    tree_builders,
)
from tools.bench.converting import converters, make_image, push_image
from tools.bench.drivers import DriverContest, compare_large, compare_tree
from tools.bench.goals import (
    BUILD_TEXT,
    BUILD_TREE,
    BUILD_WEIGHTS,
    CONVERT,
    DRIVERS_LARGE,
    DRIVERS_TREE,
    EXT4,
    INDEX_LAYER,
    METADATA,
    MOUNT_TREE,
    MOUNT_WEIGHTS,
    READ,
    SQUASHFS_3,
)
from tools.bench.inputs import Inputs
from tools.bench.ledger import NYDUS, Ledger
from tools.bench.mounting import compare_mounts, count_bytes
from tools.bench.nydus import Nydus
from tools.bench.origin import Origin, running_registry
from tools.bench.page_cache import PageCache
from tools.bench.process import CommandFailed, run_measured
from tools.bench.profile import Profile
from tools.bench.reading import Reading, compare_metadata, compare_reads
from tools.bench.rounds import why
from tools.bench.volumes import Volume, kernel_volume, lacking, make_ext4, nydus_volume

Tell = Callable[[str], None]
KERNEL_IMAGES = ((SQUASHFS_3, "squashfs"), (EROFS_LZ4, "erofs"), (EROFS_PLAIN, "erofs"))


class Stage(enum.StrEnum):
    """A part of the run that can be left out."""

    BUILD = "build"
    CONVERT = "convert"
    MOUNT = "mount"
    READ = "read"
    METADATA = "metadata"
    DRIVERS = "drivers"


@dataclass(frozen=True, slots=True)
class Bench:
    """One run in one work directory."""

    directory: Path
    profile: Profile
    inputs: Inputs
    page_cache: PageCache
    ledger: Ledger
    tell: Tell

    @property
    def nydus(self) -> Nydus:
        """nydus-py with its cache in the work directory."""
        return Nydus(self.directory / "cache", self.directory / "run")

    def run(self, stages: frozenset[Stage]) -> None:
        """Runs the stages; the ledger knows what failed. Raises `ContentsDiffer`."""
        if Stage.BUILD in stages:
            self._attempt("build", self._build)
        if Stage.DRIVERS in stages:
            self._attempt("drivers", self._drivers)
        if Stage.CONVERT in stages:
            self._attempt("convert", self._convert)
        if stages - {Stage.BUILD, Stage.DRIVERS, Stage.CONVERT}:
            self._attempt("mount, read and metadata", lambda: self._with_registry(stages))

    def _attempt(self, what: str, stage: Callable[[], None]) -> None:
        """One that fails must not take the others with it: what they have measured is worth having."""
        try:
            stage()
        except (CommandFailed, OSError) as error:
            self.ledger.miss(what, why(error), failed=True)

    def _build(self) -> None:
        self.tell("reading the inputs once, so that everyone finds them in memory")
        observe.tree_digest(self.inputs.tree, self.inputs.names)
        for path in (self.inputs.weights, self.inputs.text):
            observe.file_digest(path)
        rounds = self.profile.rounds
        for scene, builders, size in (
            (BUILD_TREE, self._tree_builders(), self.inputs.tree_size_bytes),
            (BUILD_WEIGHTS, self._weights_builders(), self.inputs.weights.stat().st_size),
            (BUILD_TEXT, self._text_builders(), self.inputs.text.stat().st_size),
        ):
            compare_builds(scene, builders, size, rounds, self.ledger, self.tell)
        layer = self._layer()
        builders = layer_builders(self.nydus, layer, self._results("layer"))
        compare_builds(INDEX_LAYER, builders, layer.stat().st_size, rounds, self.ledger, self.tell)

    def _layer(self) -> Path:
        """The tree as an ordinary layer of an image, made once."""
        layer = self._results("layer") / "layer.tar.gz"
        if not layer.exists():
            self.tell(f"making {layer.name}")
            part = layer.with_suffix(".part")
            run_measured(["tar", "-C", str(self.inputs.tree), "-czf", str(part), "."])
            part.rename(layer)
        return layer

    def _drivers(self) -> None:
        """The drivers side by side, on images without compression in a directory: what the drivers cost."""
        if reason := _no_mounts() or (os.geteuid() and "mounting EROFS needs root"):
            self.ledger.miss("drivers", str(reason))
            return
        place = self.directory / "drivers"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            for scene, source, compare, files in (
                (DRIVERS_LARGE, self.inputs.weights_dir, compare_large, 1),
                (DRIVERS_TREE, self.inputs.tree, compare_tree, self.profile.files),
            ):
                contest = DriverContest(scene, place, source, self.nydus, files, self.tell)
                volumes = contest.volumes()
                compare(scene, self._reading(), volumes, source, self.inputs.names)
        finally:
            self.nydus.forget()
            shutil.rmtree(place, ignore_errors=True)

    def _convert(self) -> None:
        """From a registry into the same one, which works on the same cores."""
        if reason := lacking("docker-registry", "skopeo"):
            self.ledger.miss("convert", reason)
            return
        trees = (self.inputs.tree, self.inputs.weights_dir)
        results = self._results("convert")
        self.tell("making the container image")
        make_image(results / "image", trees)
        with ExitStack() as stack:
            place = self.directory / "registry"
            remove_registry = partial(run_measured, ["rm", "-rf", str(place)])
            remove_registry()
            stack.callback(remove_registry)
            stack.callback(self.nydus.forget)
            origin = stack.enter_context(running_registry(place))
            reference = f"{origin.address}/bench/app:v1"
            push_image(results / "image", reference)
            size = self.inputs.tree_size_bytes + self.inputs.weights.stat().st_size
            contestants = converters(self.nydus, reference, results)
            compare_builds(CONVERT, contestants, size, self.profile.rounds, self.ledger, self.tell)

    def _with_registry(self, stages: frozenset[Stage]) -> None:
        if reason := _no_mounts():
            self.ledger.miss("mount, read and metadata", reason)
            return
        with ExitStack() as stack:
            place = self.directory / "registry"
            remove_registry = partial(run_measured, ["rm", "-rf", str(place)])
            remove_registry()
            stack.callback(remove_registry)
            stack.callback(self.nydus.forget)
            origin = stack.enter_context(running_registry(place))
            wants_tree = stages & {Stage.MOUNT, Stage.METADATA}
            wants_weights = stages & {Stage.MOUNT, Stage.READ}
            if wants_tree:
                self._attempt("tree", lambda: self._tree(stages, origin))
            if wants_weights:
                self._attempt("weights", lambda: self._weights(stages, origin))

    def _tree(self, stages: frozenset[Stage], origin: Origin) -> None:
        reference = self._push(origin, "tree", self.inputs.tree)
        mountpoint = self.directory / "mnt-tree"
        if Stage.MOUNT in stages:
            self.tell(MOUNT_TREE)
            compare_mounts(MOUNT_TREE, self.nydus, reference, mountpoint, self.profile.rounds, self.ledger)
            count_bytes(MOUNT_TREE, self.nydus, origin, reference, mountpoint, None, self.ledger)
        if Stage.METADATA in stages:
            kernel = self._kernel_volumes(
                METADATA, self.inputs.tree, self._tree_builders(), self.profile.files
            )
            volumes = [nydus_volume(self.nydus, reference, mountpoint), *kernel]
            compare_metadata(METADATA, self._reading(), volumes, self.inputs.tree, self.inputs.names)

    def _weights(self, stages: frozenset[Stage], origin: Origin) -> None:
        reference = self._push(origin, "weights", self.inputs.weights_dir)
        mountpoint = self.directory / "mnt-weights"
        if Stage.MOUNT in stages:
            self.tell(MOUNT_WEIGHTS)
            compare_mounts(MOUNT_WEIGHTS, self.nydus, reference, mountpoint, self.profile.rounds, self.ledger)
            name = self.inputs.weights.name
            count_bytes(MOUNT_WEIGHTS, self.nydus, origin, reference, mountpoint, name, self.ledger)
        if Stage.READ in stages:
            kernel = self._kernel_volumes(READ, self.inputs.weights_dir, self._weights_builders(), 1)
            volumes = [nydus_volume(self.nydus, reference, mountpoint), *kernel]
            compare_reads(READ, self._reading(), volumes, self.inputs.weights)

    def _push(self, origin: Origin, name: str, source: Path) -> str:
        self.tell(f"build and push: {name}")
        reference = f"{origin.address}/bench/{name}:v1"
        command = self.nydus.command("build", source, reference)
        usage = run_measured(command, environment=self.nydus.environment())
        self.ledger.add(f"build and push to a registry: {name}", NYDUS, q.WALL, usage.wall_s)
        return reference

    def _kernel_volumes(
        self, scene: str, source: Path, builders: list[Contestant], files: int
    ) -> list[Volume]:
        """The same contents in file systems of the kernel."""
        if os.geteuid():
            self.ledger.miss(f"{scene}: ext4, squashfs, erofs", "mounting them needs root")
            return []
        by_name = {builder.name: builder for builder in builders}
        wanted = [by_name[name] for name, _ in KERNEL_IMAGES]
        make_missing(wanted, self.tell)
        place = wanted[0].output.parent
        volumes = []
        if reason := lacking("mkfs.ext4"):
            self.ledger.miss(f"{scene}: {EXT4}", reason)
        else:
            self.tell(f"{scene}: making the ext4 image")
            size = sum(path.lstat().st_size for path in source.rglob("*"))
            make_ext4(source, place / "ext4.img", size, files)
            volumes.append(kernel_volume(EXT4, "ext4", place / "ext4.img", place / "mnt-ext4"))
        for builder, (name, fstype) in zip(wanted, KERNEL_IMAGES, strict=True):
            label = name.replace("mkfs.", "").replace("mk", "")
            if builder.output.exists():
                mountpoint = place / f"mnt-{label.replace(' ', '-')}"
                volumes.append(kernel_volume(label, fstype, builder.output, mountpoint))
            else:
                reason = lacking(*builder.programs) or "no image"
                self.ledger.miss(f"{scene}: {label}", reason)
        return volumes

    def _reading(self) -> Reading:
        return Reading(self.nydus, self.page_cache, self.profile, self.profile.rounds, self.ledger, self.tell)

    def _tree_builders(self) -> list[Contestant]:
        return tree_builders(self.nydus, self.inputs.tree, self._results("tree"))

    def _weights_builders(self) -> list[Contestant]:
        return file_builders(self.nydus, self.inputs.weights, self._results("weights"), images=True)

    def _text_builders(self) -> list[Contestant]:
        return file_builders(self.nydus, self.inputs.text, self._results("text"), images=False)

    def _results(self, name: str) -> Path:
        place = self.directory / f"results-{self.profile.name}-{self.profile.seed}" / name
        place.mkdir(parents=True, exist_ok=True)
        return place


def _no_mounts() -> str | None:
    """Why nydus-py cannot mount from a registry here."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no access to /dev/fuse"
    return lacking("docker-registry", "fusermount3")
