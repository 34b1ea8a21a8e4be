"""The limits of a host on the command line and in the configuration file."""

from collections.abc import Iterator, Mapping
from typing import Annotated

import typer

from backend.peers.limit_settings import LimitInvalid, LimitSettings, read_limits
from tools.sizes import format_size

FIELDS = {
    "up": "host_up_bps",
    "down": "host_down_bps",
    "origin": "origin_bps",
    "origin-requests": "origin_rps",
    "origin-concurrency": "origin_concurrency",
    "task-up": "task_up_bps",
    "task-down": "task_down_bps",
}
"""`--limit-NAME`, and `NAME` in `[limits]` of the file, to the fields of `LimitSettings`."""

LimitUp = Annotated[
    str | None, typer.Option(help="What this host sends to others, 50MiB/s for example, or none.")
]
LimitDown = Annotated[str | None, typer.Option(help="What this host receives, from others and the registry.")]
LimitOrigin = Annotated[str | None, typer.Option(help="What this host receives from the registry.")]
LimitOriginRequests = Annotated[str | None, typer.Option(help="Requests to the registry in a second.")]
LimitOriginConcurrency = Annotated[str | None, typer.Option(help="Requests to the registry at once.")]
LimitTaskUp = Annotated[str | None, typer.Option(help="What this host sends of each blob.")]
LimitTaskDown = Annotated[str | None, typer.Option(help="What this host receives of each blob.")]

ClusterOrigin = Annotated[
    str | None, typer.Option(help="What all hosts together receive from the registry: 500MiB/s.")
]
ClusterOriginRequests = Annotated[
    str | None, typer.Option(help="Requests to the registry in a second, of all hosts together.")
]
ClusterOriginConcurrency = Annotated[
    str | None, typer.Option(help="Requests to the registry at once, of all hosts together.")
]


def flag_values(parameters: Mapping[str, object], prefix: str = "limit") -> dict[str, int | None]:
    """The limits among the parameters of a verb (`limit_up`), by field; a usage error names the flag."""
    values: dict[str, int | None] = {}
    for name, field in FIELDS.items():
        flag = f"{prefix}-{name}"
        text = parameters.get(flag.replace("-", "_"))
        if text is not None:
            try:
                values[field] = read_limit(field, text)
            except LimitInvalid as error:
                raise typer.BadParameter(str(error.fields["why"]), param_hint=f"--{flag}") from error
    return values


def read_limit(field: str, value: object) -> int | None:
    """One limit, numbers also as text. Raises `LimitInvalid`."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    return getattr(read_limits({field: value}), field)  # type: ignore[no-any-return] # int | None


def section_limits(section: Mapping[str, object]) -> LimitSettings:
    """What `[limits]` of the file says; `_` and `-` are the same. Raises `LimitInvalid`."""
    values: dict[str, int | None] = {}
    for key, value in section.items():
        name = key.replace("_", "-")
        if name not in FIELDS:
            raise LimitInvalid(name=key, why=f"there is no such limit; there are {', '.join(FIELDS)}")
        values[FIELDS[name]] = read_limit(FIELDS[name], value)
    return LimitSettings(**values)


def limit_lines(values: Mapping[str, int | float | None]) -> Iterator[str]:
    """Limits that are set, as people write them: `up 50 MiB/s`."""
    for name, field in FIELDS.items():
        value = values.get(field)
        if value is not None:
            yield _shown(name, field, value)


def _shown(name: str, field: str, value: float) -> str:
    if not value:
        return f"{name} paused"
    return f"{name} {format_size(value)}/s" if field.endswith("_bps") else f"{name} {value:g}"
