"""`nydus-py status`: what is mounted and how much was fetched."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fuse.mount_table import find_mount
from fuse.mountpoint import is_dead, real_path, unmount
from fuse.supervisor.main import LOG_NAME, SOCKET_NAME
from tools.agent_client import Fetched, MountAnswer, ask, ask_agent
from tools.mount_record import MountFiles, MountRecord, NotMounted, known_mounts
from tools.output import JsonOption, emit
from tools.peer_status import peer_lines, read_peers
from tools.settings import settings_of
from tools.sizes import format_size

PYFUSE3, EROFS = "pyfuse3", "erofs"


@dataclass(frozen=True, slots=True)
class MountStatus:
    """One mount. Sizes in bytes, those fetched as they travelled.

    `copied_bytes`, decoded, were not fetched: the cache had them, of other images.

    `state` is mounted, detached (unmounted, in use), unattended (the kernel serves it alone), hanging, dead.
    """

    mountpoint: str
    state: str
    reference: str
    digest: str
    driver: str
    driver_remark: str
    pid: int
    since: str
    image_size_bytes: int
    decoded_size_bytes: int
    cached_bytes: int
    fetched_bytes: int
    fetched_requests: int
    copied_bytes: int
    from_peers_bytes: int
    fetch_errors: int
    log: str


def run(
    ctx: typer.Context,
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Only the mount at DIR.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Show this host's part in the peer cache instead.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what is mounted and how much was fetched.

    A mount whose process has died is shown once as dead, detached and forgotten.
    """
    if peers:
        emit(read_peers(settings_of(ctx).run_dir), as_json=as_json, render=peer_lines)
        return
    found = read_statuses(settings_of(ctx).run_dir, directory and real_path(directory))
    if directory is not None and not found:
        raise NotMounted(directory=directory)
    emit(found, as_json=as_json, render=_lines)


def read_statuses(run_dir: Path, mountpoint: Path | None) -> list[MountStatus]:
    """What every known mount says, or the one at `mountpoint`."""
    try:
        agent = ask_agent(run_dir / SOCKET_NAME)
        state = "dead"
    except TimeoutError:
        agent, state = None, "hanging"
    answers = {answer.mountpoint: answer for answer in agent.mounts} if agent else {}
    log = run_dir / LOG_NAME
    found = {path: _status(answer, answer.state, log) for path, answer in answers.items()}
    for files, record in known_mounts(run_dir):
        if record.mountpoint in found:
            continue
        if record.driver == PYFUSE3:
            found[record.mountpoint] = _ask(files, record)
        else:
            found[record.mountpoint] = _status(_silent(record), _unserved(files, record, state), log)
    shown = [status for path, status in sorted(found.items()) if mountpoint in (None, Path(path))]
    return shown


def _ask(files: MountFiles, record: MountRecord) -> MountStatus:
    try:
        return _status(ask(files.socket), "mounted", files.log)
    except TimeoutError:
        return _status(_silent(record), "hanging", files.log)
    except OSError:
        _forget(files, Path(record.mountpoint))
        return _status(_silent(record), "dead", files.log)


def _unserved(files: MountFiles, record: MountRecord, state: str) -> str:
    """The state of a mount that the agent does not know, or whose agent does not answer."""
    mount = find_mount(Path(record.mountpoint))
    if record.driver == EROFS and record.is_complete and mount is not None and mount.filesystem == EROFS:
        return "unattended"
    if state == "dead":
        _forget(files, Path(record.mountpoint))
    return state


def _forget(files: MountFiles, mountpoint: Path) -> None:
    """Removes what a mount that nobody serves has left.

    One of EROFS would give zeros for what was not fetched: it must not stay.
    """
    files.remove()
    mount = find_mount(mountpoint)
    if mount is not None and mount.is_ours and (mount.filesystem == EROFS or is_dead(mountpoint)):
        unmount(mountpoint, lazy=True)


def _silent(record: MountRecord) -> MountAnswer:
    return MountAnswer(record.mountpoint, record.reference, record.digest, record.driver, record.pid)


def _status(answer: MountAnswer, state: str, log: Path) -> MountStatus:
    fetched: Fetched = answer.fetched
    return MountStatus(
        mountpoint=answer.mountpoint,
        state=state,
        reference=answer.reference,
        digest=answer.digest,
        driver=answer.driver,
        driver_remark=answer.driver_remark,
        pid=answer.pid,
        since=answer.since,
        image_size_bytes=answer.image_size_bytes,
        decoded_size_bytes=answer.decoded_size_bytes,
        cached_bytes=answer.cached_bytes,
        fetched_bytes=fetched.bytes_fetched,
        fetched_requests=fetched.requests,
        copied_bytes=fetched.bytes_copied,
        from_peers_bytes=fetched.bytes_from_peers,
        fetch_errors=fetched.errors,
        log=str(log),
    )


def _lines(statuses: list[MountStatus]) -> Iterator[str]:
    if not statuses:
        yield "nothing is mounted"
    for status in statuses:
        yield status.mountpoint
        yield f"  image    {status.reference} ({status.digest})"
        remark = f" ({status.driver_remark})" if status.driver_remark else ""
        yield f"  state    {status.state}, driver {status.driver}{remark}, process {status.pid}"
        if status.state in ("mounted", "detached"):
            share = status.fetched_bytes / status.image_size_bytes if status.image_size_bytes else 0.0
            fetched, size = format_size(status.fetched_bytes), format_size(status.image_size_bytes)
            yield f"  fetched  {fetched} of {size} ({share:.1%}) in {status.fetched_requests} requests"
            if status.copied_bytes:
                yield f"  copied   {format_size(status.copied_bytes)} of other images in the cache"
            if status.from_peers_bytes:
                yield f"  peers    {format_size(status.from_peers_bytes)} from other hosts"
            yield f"  cached   {format_size(status.cached_bytes)} of {format_size(status.decoded_size_bytes)}"
            if status.fetch_errors:
                yield f"  errors   {status.fetch_errors}, see {status.log}"
