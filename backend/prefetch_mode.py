"""What a mount fetches without being asked for."""

import enum


class PrefetchMode(enum.StrEnum):
    """What is fetched without being asked for."""

    NONE = "none"
    HINTS = "hints"
    ALL = "all"
