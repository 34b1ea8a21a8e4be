"""Which files a host gets, and their text."""

from dataclasses import dataclass
from pathlib import Path

from tools.installation.containerd_config import (
    CERTS_DIRECTORY,
    ContainerdPlan,
    plan_containerd,
)
from tools.installation.templates import MIRROR, PROGRAM, template

UNIT_DIRECTORY = "/etc/systemd/system"
CONFIG_FILE = "/etc/nydus-py/config.toml"
PARTS = ("systemd", "containerd", "mirror", "config")


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A file by its path on the host. `is_to_edit`: it is for its user to change; one that is there stays."""

    path: str
    text: str
    is_to_edit: bool = False

    @property
    def data(self) -> bytes:
        """Its bytes."""
        return self.text.encode()


@dataclass(frozen=True, slots=True)
class Wanted:
    """All of them, what to change in files of others, and what the user is to be told besides."""

    files: tuple[WantedFile, ...]
    containerd: ContainerdPlan | None
    remarks: tuple[str, ...]
    units: tuple[str, ...]


def wanted_files(
    root: Path, parts: frozenset[str], *, program: str, mirror: str, with_scheduler: bool
) -> Wanted:
    """What the host below `root` gets. Raises `ContainerdConfigUnusable`."""
    files: list[WantedFile] = []
    remarks: list[str] = []
    units: list[str] = []
    containerd: ContainerdPlan | None = None
    if "config" in parts:
        files.append(WantedFile(CONFIG_FILE, template("config.toml"), is_to_edit=True))
    if "systemd" in parts:
        units = ["nydus-py-agent.service"]
        units += (
            ["nydus-py-snapshotter.socket", "nydus-py-snapshotter.service"] if "containerd" in parts else []
        )
        units += ["nydus-py-scheduler.service"] if with_scheduler else []
        for unit in units:
            text = template(f"systemd/{unit}").replace(f"={PROGRAM} ", f"={program} ")
            files.append(WantedFile(f"{UNIT_DIRECTORY}/{unit}", text))
    if "containerd" in parts:
        containerd = plan_containerd(root, with_mirror="mirror" in parts)
        text = template("containerd/nydus-py.toml")
        text = text.replace("\nversion = 2\n", f"\nversion = {containerd.version}\n")
        files.append(WantedFile(containerd.dropin, text))
        if containerd.remark:
            remarks.append(containerd.remark)
    if "mirror" in parts:
        place = containerd.certs_directory if containerd is not None else CERTS_DIRECTORY
        if place is not None:
            text = template("containerd/certs.d/_default/hosts.toml").replace(MIRROR, mirror)
            files.append(WantedFile(f"{place}/_default/hosts.toml", text))
    return Wanted(tuple(files), containerd, tuple(remarks), tuple(units))
