"""`nydus-py install`: systemd units, containerd's settings and the registry mirror of this host."""

import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tools.installation.host import Change, Host
from tools.installation.install import install, uninstall
from tools.installation.templates import MIRROR, PROGRAM
from tools.installation.wanted import CONFIG_FILE, PARTS, Wanted, wanted_files
from tools.output import JsonOption, emit

_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._+@/-]+")
"""What needs no quotes in a unit."""
_PLAIN_URL = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?")


def run(
    remove: Annotated[
        bool, typer.Option("--remove", help="Take away what was installed, and restore what was changed.")
    ] = False,
    root: Annotated[
        Path, typer.Option(help="Directory of the host's files, for building images of hosts.")
    ] = Path("/"),
    without: Annotated[
        list[str] | None, typer.Option(help=f"A part to leave out; repeat for several: {', '.join(PARTS)}.")
    ] = None,
    scheduler: Annotated[
        bool,
        typer.Option("--scheduler", help="A unit for the scheduler as well: on one host of the cluster."),
    ] = False,
    program: Annotated[
        Path | None, typer.Option(help="The program that units start.  [default: this one]")
    ] = None,
    mirror: Annotated[
        str, typer.Option(help="URL of the upload server that containerd asks before a registry.")
    ] = MIRROR,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace (or remove) files that somebody has changed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Set this host up: units for agent and snapshotter, containerd's settings, the mirror in hosts.toml.

    Says what it did, file by file, and starts nothing. Again, it changes only what is not as it should be;
    a file that somebody else has made or changed is never replaced without --force.
    """
    if not root.is_dir():
        raise typer.BadParameter("not a directory", param_hint="--root")
    if program and not _PLAIN_PATH.fullmatch(os.path.abspath(program)):
        raise typer.BadParameter("a unit cannot name such a path", param_hint="--program")
    if not _PLAIN_URL.fullmatch(mirror):
        raise typer.BadParameter("not http(s)://HOST[:PORT]", param_hint="--mirror")
    host = Host.open(root, is_dry=dry_run)
    if remove:
        uninstall(host, force=force)
        following = _after_removal(host.changes)
    else:
        parts = _parts(without or [])
        wanted = wanted_files(
            root,
            parts,
            program=os.path.abspath(program) if program else own_program(root),
            mirror=mirror,
            with_scheduler=scheduler,
        )
        install(host, wanted, force=force)
        following = [*wanted.remarks, *_after_installation(host.changes, wanted)]
    emit(Report(dry_run, host.changes, following), as_json=as_json, render=_lines)


@dataclass(frozen=True, slots=True)
class Report:
    """What is told: `changes`, a line each, and what is left `to_do` by hand."""

    dry_run: bool
    changes: list[Change]
    to_do: list[str]


def own_program(root: Path) -> str:
    """The path of this program on the host; in another root it is taken to be in the usual place."""
    started = Path(sys.argv[0])
    is_program = started.name == "nydus-py" and root.resolve() == Path("/")
    return os.fspath(started.absolute()) if is_program and started.exists() else PROGRAM


def _parts(without: list[str]) -> frozenset[str]:
    for part in without:
        if part not in PARTS:
            raise typer.BadParameter(f"{part!r} is none of {', '.join(PARTS)}", param_hint="--without")
    return frozenset(PARTS) - frozenset(without)


def _changed(changes: list[Change]) -> set[str]:
    return {change.path for change in changes if change.did not in ("unchanged", "kept")}


def _after_installation(changes: list[Change], wanted: Wanted) -> list[str]:
    changed = _changed(changes)
    lines = []
    if CONFIG_FILE in changed:
        lines.append(f"edit {CONFIG_FILE}: the scheduler, and where credentials come from")
    if wanted.units and any(path.endswith((".service", ".socket")) for path in changed):
        lines.append(f"systemctl daemon-reload && systemctl enable --now {' '.join(wanted.units)}")
    if any("containerd" in path and not path.endswith("hosts.toml") for path in changed):
        lines.append("systemctl restart containerd, when the snapshotter listens; running containers go on")
    return lines


def _after_removal(changes: list[Change]) -> list[str]:
    changed = _changed(changes)
    units = {os.path.basename(path) for path in changed if path.endswith((".service", ".socket"))}
    lines = []
    if any("containerd" in path and not path.endswith("hosts.toml") for path in changed):
        lines.append("systemctl restart containerd; images are pulled again for the other snapshotter")
    if units:
        lines.append(f"systemctl stop {' '.join(sorted(units))} && systemctl daemon-reload")
    return lines


def _lines(report: Report) -> Iterable[str]:
    for change in report.changes:
        did = _PLANNED.get(change.did, change.did) if report.dry_run else change.did
        yield f"{did} {change.path}{f' ({change.why})' if change.why else ''}"
    if not report.changes:
        yield "nothing is installed"
    for line in report.to_do:
        yield f"next: {line}"


_PLANNED = {
    "wrote": "would write",
    "updated": "would update",
    "edited": "would edit",
    "removed": "would remove",
    "restored": "would restore",
    "cleaned": "would clean",
}
