"""`nydus-py pki`: the certificate authority of a cluster whose hosts give each other what they have."""

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from backend.peers.certificate import (
    AUTHORITY_DAYS,
    HOST_DAYS,
    CertificateFacts,
    HostWish,
    facts_of,
    utc_now,
)
from backend.peers.pki import (
    AUTHORITY_KEY_NAME,
    HOST_NAME,
    create_authority,
    issue_certificate,
    read_certificate,
)
from tools.output import JsonOption, emit, talk

DEFAULT_DIR = Path("pki")

DirOption = Annotated[Path, typer.Option("--dir", help="Where the authority is kept.")]


def init(
    directory: DirOption = DEFAULT_DIR,
    days: Annotated[int, typer.Option(help="How long the authority is valid.")] = AUTHORITY_DAYS,
    name: Annotated[str, typer.Option(help="Name of the cluster.")] = "nydus-py",
    as_json: JsonOption = False,
) -> None:
    """Make a certificate authority for a cluster. Never replaces one."""
    facts = create_authority(directory, name, days, utc_now())
    talk(f"keep {directory / AUTHORITY_KEY_NAME} secret: who has it can join the cluster")
    emit(facts, as_json=as_json, render=_lines)


def issue(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the host.")],
    directory: DirOption = DEFAULT_DIR,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for what the host needs.  [default: hosts/NAME in that of --dir]"),
    ] = None,
    days: Annotated[int, typer.Option(help="How long the certificate is valid.")] = HOST_DAYS,
    scope: Annotated[
        list[str] | None, typer.Option(help="A scope that the host belongs to; repeat for several.")
    ] = None,
    address: Annotated[
        list[str] | None,
        typer.Option(help="IP address or DNS name at which others reach it; repeat for several."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Issue a certificate to a host; again to renew it. The host takes a new one over without a restart."""
    wish = HostWish(name, scope or (), address or (), days)
    target = out or directory / "hosts" / name
    facts = issue_certificate(directory, wish, target, utc_now())
    if not facts.addresses:
        talk("without --address the host can fetch from others and not serve them")
    talk(f"copy {target} to the host; {HOST_NAME} in it holds its key")
    emit(facts, as_json=as_json, render=_lines)


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A certificate in PEM form.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a certificate says, of an authority or a host."""
    emit(facts_of(read_certificate(file)), as_json=as_json, render=_lines)


ACTIONS = {"init": init, "issue": issue, "show": show}


def _lines(facts: CertificateFacts) -> Iterable[str]:
    yield f"{'authority' if facts.is_authority else 'host'}: {facts.name}"
    yield f"cluster: {facts.cluster}"
    if not facts.is_authority:
        yield f"scopes: {', '.join(facts.scopes) or 'none'}"
        yield f"addresses: {', '.join(facts.addresses) or 'none'}"
    yield f"valid from: {_shown(facts.valid_from)}"
    yield f"valid until: {_shown(facts.valid_until)}{_remark(facts)}"
    yield f"sha256: {facts.fingerprint}"


def _shown(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _remark(facts: CertificateFacts) -> str:
    now = utc_now()
    if now >= facts.valid_until:
        return " (expired)"
    return " (not valid yet)" if now < facts.valid_from else ""
