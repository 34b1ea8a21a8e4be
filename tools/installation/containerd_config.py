"""containerd's config.toml: what makes it use the snapshotter, put in and taken out.

containerd takes each plugin's section from one file alone, the last one that has it (seen with 1.6.20): a
section for CRI in a drop-in hides all of the one in config.toml. So only the proxy plugin goes into a
drop-in, and the settings of CRI into the file whose section counts.
"""

import fnmatch
import glob
import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import tomlkit
import tomlkit.exceptions

from rafs.errors import NydusError
from tools.installation.ledger import Setting, below

CONFIG_PATH = "/etc/containerd/config.toml"
DROPIN_NAME = "nydus-py.toml"
DROPIN_DIRECTORY = "/etc/containerd/conf.d"
CERTS_DIRECTORY = "/etc/containerd/certs.d"
SNAPSHOTTER = "nydus-py"
_CRI = ["plugins", "io.containerd.grpc.v1.cri"]
_IMAGES = ["plugins", "io.containerd.cri.v1.images"]
_CONTAINERD_SECTION = {2: [*_CRI, "containerd"], 3: _IMAGES}
_REGISTRY_SECTION = {2: [*_CRI, "registry"], 3: [*_IMAGES, "registry"]}
_PLUGIN = {2: _CRI, 3: _IMAGES}


class ContainerdConfigUnusable(NydusError):
    """The configuration of containerd cannot be changed safely."""

    message = "{path}: {why}"
    exit_code: ClassVar[int] = 227


@dataclass(frozen=True, slots=True)
class ContainerdPlan:
    """What to change. Paths are those of the host.

    `edits` are the files of others with their settings; `certs_directory` is where hosts.toml goes, None
    where CRI is configured in another way, and `remark` says why.
    """

    version: int
    dropin: str
    edits: dict[str, list[Setting]]
    certs_directory: str | None
    remark: str = ""


def plan_containerd(root: Path, *, with_mirror: bool) -> ContainerdPlan:
    """Reads the configuration below `root`. Raises `ContainerdConfigUnusable`."""
    main = _load(root, CONFIG_PATH)
    version = main.get("version", 2 if not main else 1)
    if not isinstance(version, int) or version not in _PLUGIN:
        why = f"version {_plain(version)} of the configuration is not known; see `containerd config migrate`"
        raise ContainerdConfigUnusable(path=CONFIG_PATH, why=why)
    imports = _plain(main.get("imports", []))
    if not isinstance(imports, list) or not all(isinstance(each, str) for each in imports):
        raise ContainerdConfigUnusable(path=CONFIG_PATH, why="'imports' in it is not a list of paths")
    dropin = _dropin(imports)
    edits: dict[str, list[Setting]] = {}
    if not _is_imported(dropin, imports):
        edits[CONFIG_PATH] = [Setting(["imports"], [*imports, dropin], imports or None)]
    counts, document = _section_that_counts(root, main, imports, dropin, version)
    wanted: list[tuple[list[str], str | bool]] = [
        ([*_CONTAINERD_SECTION[version], "snapshotter"], SNAPSHOTTER),
        ([*_CONTAINERD_SECTION[version], "disable_snapshot_annotations"], False),
    ]
    certs, remark = _certs(document, version) if with_mirror else (None, "")
    if certs is not None:
        wanted.append(([*_REGISTRY_SECTION[version], "config_path"], certs))
    settings = [
        Setting(keys, value, before)
        for keys, value in wanted
        if (before := _plain(_find(document, keys))) != value
    ]
    if settings:
        edits[counts] = [*edits.get(counts, []), *settings]
    return ContainerdPlan(version, dropin, edits, certs, remark)


def put(data: bytes, settings: Sequence[Setting], path: str) -> bytes:
    """The file with the settings; everything else, comments too, stays as it is."""
    data = data if data.strip() else b"version = 2\n"
    present = _parse(data, path)
    for setting in settings:
        if len(setting.keys) == 1 and setting.keys[0] not in present:
            # At the top: behind the first table it would belong to that one.
            line = f"{setting.keys[0]} = {tomlkit.item(setting.value).as_string()}\n"
            data = line.encode() + data
    document = _parse(data, path)
    for setting in settings:
        table: Any = document
        for key in setting.keys[:-1]:
            if key not in table:
                table[key] = tomlkit.table(is_super_table=key != setting.keys[-2])
            table = table[key]
            if not isinstance(table, MutableMapping):
                raise ContainerdConfigUnusable(path=path, why=f"{key!r} in it is not a table")
        if _plain(table.get(setting.keys[-1])) != setting.value:
            table[setting.keys[-1]] = setting.value
    return tomlkit.dumps(document).encode()


def take_out(data: bytes, settings: Sequence[Setting], path: str) -> bytes:
    """The file with what was there before the settings, where nobody has changed those since."""
    document = _parse(data, path)
    for setting in settings:
        table = _find(document, setting.keys[:-1])
        key = setting.keys[-1]
        if not isinstance(table, MutableMapping) or key not in table:
            continue
        if key == "imports" and isinstance(setting.value, list):
            _take_import(table, setting.value[-1])
        elif _plain(table[key]) != setting.value:
            continue
        elif setting.before is None:
            del table[key]
            if not table and len(setting.keys) > 1:
                del _find(document, setting.keys[:-2])[setting.keys[-2]]
        else:
            table[key] = setting.before
    return tomlkit.dumps(document).encode()


def has(data: bytes, settings: Sequence[Setting], path: str) -> bool:
    """Whether all settings are in the file."""
    document = _parse(data, path)
    return all(_plain(_find(document, setting.keys)) == setting.value for setting in settings)


def _take_import(table: MutableMapping[str, Any], own: str) -> None:
    left = [pattern for pattern in _plain(table["imports"]) if pattern != own]
    if left:
        table["imports"] = left
    else:
        del table["imports"]


def _dropin(imports: Sequence[str]) -> str:
    """Where drop-ins are read from already, or the usual place."""
    for pattern in imports:
        directory, name = os.path.split(pattern)
        if fnmatch.fnmatchcase(DROPIN_NAME, name) and not any(sign in directory for sign in "*?["):
            return os.path.normpath(os.path.join("/etc/containerd", directory, DROPIN_NAME))
    return f"{DROPIN_DIRECTORY}/{DROPIN_NAME}"


def _is_imported(path: str, imports: Sequence[str]) -> bool:
    absolute = [os.path.normpath(os.path.join("/etc/containerd", pattern)) for pattern in imports]
    return any(PurePosixPath(path).match(pattern) for pattern in absolute)  # a star matches no slash


def _section_that_counts(
    root: Path, main: Any, imports: Sequence[str], dropin: str, version: int
) -> tuple[str, Any]:
    """Path and content of the file whose section for CRI containerd takes."""
    found = (CONFIG_PATH, main)
    for pattern in imports:
        absolute = os.path.normpath(os.path.join("/etc/containerd", pattern))
        # Not Path.glob: for Go, too, two stars are one.
        for place in sorted(glob.glob(absolute.lstrip("/"), root_dir=root, include_hidden=True)):
            name = f"/{place}"
            if name != dropin and _find(document := _load(root, name), _PLUGIN[version]) is not None:
                found = (name, document)
    return found


def _certs(document: Any, version: int) -> tuple[str | None, str]:
    section = _find(document, _REGISTRY_SECTION[version]) or {}
    if path := section.get("config_path"):
        return str(path).split(":")[0], ""
    for old in ("mirrors", "configs"):
        if section.get(old):
            why = f"CRI has registry.{old}, which excludes hosts.toml: no mirror is set up"
            return None, why
    return CERTS_DIRECTORY, ""


def _load(root: Path, path: str) -> Any:
    try:
        return _parse(below(root, path).read_bytes(), path)
    except FileNotFoundError:
        return tomlkit.document()
    except OSError as error:
        raise ContainerdConfigUnusable(path=path, why=(error.strerror or "unreadable").lower()) from error


def _parse(data: bytes, path: str) -> Any:
    try:
        return tomlkit.parse(data)
    except (tomlkit.exceptions.TOMLKitError, UnicodeDecodeError, RecursionError) as error:
        raise ContainerdConfigUnusable(path=path, why=f"not TOML: {error}") from error


def _find(document: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(document, MutableMapping) or key not in document:
            return None
        document = document[key]
    return document


def _plain(value: Any) -> Any:
    return value.unwrap() if hasattr(value, "unwrap") else value
