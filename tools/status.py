"""`nydus-py status`: what is mounted and how much was fetched."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fuse.mountpoint import find_mount, is_dead, real_path, unmount
from tools.mount_record import MountFiles, MountRecord, NotMounted, known_mounts
from tools.output import JsonOption, emit
from tools.settings import settings_of
from tools.sizes import format_size
from tools.status_client import Answer, Fetched, ask


@dataclass(frozen=True, slots=True)
class MountStatus:
    """One mount. `state` is mounted, hanging or dead; sizes in bytes, those fetched as they travelled."""

    mountpoint: str
    state: str
    reference: str
    digest: str
    driver: str
    pid: int
    since: str
    image_size_bytes: int
    decoded_size_bytes: int
    cached_bytes: int
    fetched_bytes: int
    fetched_requests: int
    fetch_errors: int
    log: str


def run(
    ctx: typer.Context,
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Only the mount at DIR.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is mounted and how much was fetched.

    A mount whose process has died is shown once as dead, detached and forgotten.
    """
    found = read_statuses(settings_of(ctx).run_dir, directory and real_path(directory))
    if directory is not None and not found:
        raise NotMounted(directory=directory)
    emit(found, as_json=as_json, render=_lines)


def read_statuses(run_dir: Path, mountpoint: Path | None) -> list[MountStatus]:
    """What every known mount says, or the one at `mountpoint`."""
    return [
        _ask(files, record)
        for files, record in known_mounts(run_dir)
        if mountpoint is None or record.mountpoint == str(mountpoint)
    ]


def _ask(files: MountFiles, record: MountRecord) -> MountStatus:
    try:
        return _status(ask(files.socket), "mounted", files)
    except TimeoutError:
        return _status(_silent(record), "hanging", files)
    except OSError:
        _forget(files, Path(record.mountpoint))
        return _status(_silent(record), "dead", files)


def _forget(files: MountFiles, mountpoint: Path) -> None:
    """Removes what a mount whose process is gone has left."""
    files.remove()
    mount = find_mount(mountpoint)
    if mount is not None and mount.is_ours and is_dead(mountpoint):
        unmount(mountpoint, lazy=True)


def _silent(record: MountRecord) -> Answer:
    return Answer(record.mountpoint, record.reference, record.digest, record.driver, record.pid)


def _status(answer: Answer, state: str, files: MountFiles) -> MountStatus:
    fetched: Fetched = answer.fetched
    return MountStatus(
        mountpoint=answer.mountpoint,
        state=state,
        reference=answer.reference,
        digest=answer.digest,
        driver=answer.driver,
        pid=answer.pid,
        since=answer.since,
        image_size_bytes=answer.image_size_bytes,
        decoded_size_bytes=answer.decoded_size_bytes,
        cached_bytes=answer.cached_bytes,
        fetched_bytes=fetched.bytes_fetched,
        fetched_requests=fetched.requests,
        fetch_errors=fetched.errors,
        log=str(files.log),
    )


def _lines(statuses: list[MountStatus]) -> Iterator[str]:
    if not statuses:
        yield "nothing is mounted"
    for status in statuses:
        yield status.mountpoint
        yield f"  image    {status.reference} ({status.digest})"
        yield f"  state    {status.state}, driver {status.driver}, process {status.pid}"
        if status.state == "mounted":
            share = status.fetched_bytes / status.image_size_bytes if status.image_size_bytes else 0.0
            fetched, size = format_size(status.fetched_bytes), format_size(status.image_size_bytes)
            yield f"  fetched  {fetched} of {size} ({share:.1%}) in {status.fetched_requests} requests"
            yield f"  cached   {format_size(status.cached_bytes)} of {format_size(status.decoded_size_bytes)}"
            if status.fetch_errors:
                yield f"  errors   {status.fetch_errors}, see {status.log}"
