"""What an image runs on, and which image of several is for a host: the rules of containerd.

https://github.com/containerd/platforms: names are normalized before they are compared, and a host runs what
is for its own variant or a lower one of the same architecture.
"""

import platform as host_platform
import re
import sys

import msgspec

_NAMES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "i386": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
}
"""Architectures as machines and distributions call them, and the variant that such a name says."""
_DEFAULT_VARIANTS = {"amd64": "v1", "arm": "v7", "arm64": "v8"}
_LEVEL = re.compile(r"v?(\d{1,3})(?:\.(\d{1,3}))?")
_EXACT = (sys.maxsize,)


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an image runs on, in the words of the OCI (and of Go): `linux`, `amd64`."""

    architecture: str
    os: str
    variant: str = ""
    os_features: tuple[str, ...] = msgspec.field(default=(), name="os.features")

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def runs(self, image: "Platform") -> bool:
        """Whether an image is for the same operating system and architecture, of any variant."""
        return self._family() == image._family()

    def is_same(self, image: "Platform") -> bool:
        """Whether an image is for just that platform, by whatever names."""
        return self.nearness(image) == _EXACT

    def nearness(self, image: "Platform") -> tuple[int, ...] | None:
        """How near the platform of an image comes to this one, larger is nearer; None if it does not run."""
        if not self.runs(image):
            return None
        own, theirs = self._variant(), image._variant()
        if own == theirs:
            return _EXACT
        if (own_level := _level(own)) and (level := _level(theirs)) and level < own_level:
            return level
        return None

    def _family(self) -> tuple[str, str]:
        architecture = self.architecture.lower()
        return self.os.lower(), _NAMES.get(architecture, (architecture, ""))[0]

    def _variant(self) -> str:
        _, architecture = self._family()
        named = _NAMES.get(self.architecture.lower(), ("", ""))[1]
        variant = self.variant.lower() or named or _DEFAULT_VARIANTS.get(architecture, "")
        return f"v{variant}" if variant.isdecimal() else variant


def this_platform() -> Platform:
    """The platform of this machine."""
    machine = host_platform.machine()
    architecture, variant = _NAMES.get(machine, (machine, ""))
    return Platform(architecture, host_platform.system().lower(), variant)


def _level(variant: str) -> tuple[int, int] | None:
    """Variants in numbers: v7 is above v6, v8.2 above v8."""
    found = _LEVEL.fullmatch(variant)
    return (int(found[1]), int(found[2] or 0)) if found else None
