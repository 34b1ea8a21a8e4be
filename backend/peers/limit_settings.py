"""The limits of a host as it is told them: by its configuration, and by the scheduler while it runs."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

import msgspec

from backend.contract import BackendError
from backend.sizes import parse_rate

LIMIT_MAX = 1 << 50
"""No network has a PiB/s; whatever is above is a mistake or an attack."""

Limit = Annotated[int, msgspec.Meta(ge=0, le=LIMIT_MAX)] | None
"""None is without limit, 0 stopped."""


class LimitInvalid(BackendError):
    """A limit is not a number that a limit can be."""

    message = "limit {name}: {why}"
    exit_code: ClassVar[int] = 170


class LimitSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Rates in bytes per second (`_bps`) or requests per second (`_rps`), and a number of requests at once.

    `origin_*` are what this host may ask of the origin, within `host_down_bps`. A task is a blob: the limits
    of `task_*` apply to each of them, within those of the host.
    """

    host_up_bps: Limit = None
    host_down_bps: Limit = None
    origin_bps: Limit = None
    origin_rps: Limit = None
    origin_concurrency: Limit = None
    task_up_bps: Limit = None
    task_down_bps: Limit = None

    def __post_init__(self) -> None:
        """Raises `LimitInvalid`; JSON that is out of range is msgspec's `ValidationError` before."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= LIMIT_MAX:
                raise LimitInvalid(name=name, why=f"{value} is not within 0 and {LIMIT_MAX}")

    @property
    def sends_nothing(self) -> bool:
        """Whether sending is paused."""
        return self.host_up_bps == 0 or self.task_up_bps == 0

    @property
    def receives_nothing(self) -> bool:
        """Whether receiving is paused."""
        return self.host_down_bps == 0 or self.task_down_bps == 0

    def tightened_by(self, other: "LimitSettings") -> "LimitSettings":
        """The stricter one of each limit: what a host keeps that is told limits from two sides."""
        return LimitSettings(
            **{name: stricter(getattr(self, name), getattr(other, name)) for name in self.__struct_fields__}
        )


def stricter(one: int | None, other: int | None) -> int | None:
    """The lower of two limits, of which None is the highest."""
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def read_limits(values: Mapping[str, object]) -> LimitSettings:
    """Settings from a configuration: whole numbers, or text such as `50MiB/s` and `none`.

    Raises `LimitInvalid` naming the first limit that is unknown or not understood.
    """
    return LimitSettings(**{name: _read_limit(name, value) for name, value in values.items()})


def _read_limit(name: str, value: object) -> int | None:
    if name not in LimitSettings.__struct_fields__:
        known = ", ".join(LimitSettings.__struct_fields__)
        raise LimitInvalid(name=name, why=f"there is no such limit; there are {known}")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, str):
        raise LimitInvalid(name=name, why=f"{value!r} is neither a whole number nor text")
    if not name.endswith("_bps") and value.strip().lower() != "none":
        raise LimitInvalid(name=name, why=f"{value!r} is not a whole number")
    try:
        return parse_rate(value)
    except ValueError as error:
        raise LimitInvalid(name=name, why=str(error)) from error
