"""Installing on a host, and removing again. Everything is looked at before anything is changed."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from rafs.errors import NydusError
from tools.installation.containerd_config import has, put, take_out
from tools.installation.host import Host, changed_since
from tools.installation.ledger import BACKUP_SUFFIX, REPLACED_SUFFIX, Entry, Setting, fingerprint
from tools.installation.wanted import Wanted, WantedFile

Step = Callable[[], None]


class InstallRefused(NydusError):
    """Files of others stand where ours belong."""

    message = "nothing was changed: {why}; --force keeps a copy and replaces it, --without leaves a part out"
    exit_code: ClassVar[int] = 225


def install(host: Host, wanted: Wanted, *, force: bool) -> None:
    """Brings the host to what is wanted; `host.changes` says what was done. Raises `InstallRefused`."""
    refused: list[str] = []
    steps: list[Step] = []
    for file in wanted.files:
        steps += _install_file(host, file, refused, force=force)
    if wanted.containerd is not None:
        for path, settings in wanted.containerd.edits.items():
            steps += _edit_file(host, path, settings)
        _report_edited(host, list(wanted.containerd.edits))
    _report_superseded(host, wanted)
    if refused:
        host.changes.clear()
        raise InstallRefused(why=", ".join(refused))
    for step in steps:
        step()


def uninstall(host: Host, *, force: bool) -> None:
    """Takes everything away that was installed and nobody has changed; says what stays, and why."""
    for entry in reversed(list(host.ledger.entries.values())):
        data = host.read(entry.path)
        if entry.settings:
            _remove_settings(host, entry, data)
        elif data is None:
            host.report(entry.path, "unchanged", "it was gone")
            host.forget(entry.path)
        elif changed_since(entry, data) and not force:
            host.report(entry.path, "kept", "changed since it was written; --force removes it")
        else:
            _remove_file(host, entry)
    host.end()


def _install_file(host: Host, file: WantedFile, refused: list[str], *, force: bool) -> list[Step]:
    data = host.read(file.path)
    entry = host.ledger.entries.get(file.path)
    new = Entry(file.path, fingerprint(file.data), entry.backup if entry else None)
    if data is not None and file.is_to_edit:
        host.report(file.path, "kept", "it is there, and yours")
        return []
    if data == file.data:
        if entry is None:
            host.report(file.path, "unchanged", "it was there already, and is not ours to remove")
            return []
        host.report(file.path, "unchanged")
        return [lambda: host.write(new, file.data)] if entry != new else []
    if data is not None and (entry is None or changed_since(entry, data)):
        if not force:
            refused.append(f"{file.path} {'is not ours' if entry is None else 'was changed by somebody'}")
            return []
        return _replace(host, file, entry, data)
    host.report(file.path, "wrote" if data is None else "updated")
    return [lambda: host.write(new, file.data)]


def _replace(host: Host, file: WantedFile, entry: Entry | None, data: bytes) -> list[Step]:
    """By force. A file of others comes back with `--remove`; of a changed one of ours there is a copy."""
    if entry is not None and entry.backup and host.read(entry.backup) is None:
        entry = None  # a run before this one was killed before it kept a copy
    copy = f"{file.path}{BACKUP_SUFFIX if entry is None else REPLACED_SUFFIX}"
    backup = copy if entry is None else entry.backup
    host.report(file.path, "updated", f"what was there is in {copy}")
    new = Entry(file.path, fingerprint(file.data), backup)
    return [lambda: host.write(new, file.data, (copy, data))]


def _edit_file(host: Host, path: str, settings: Sequence[Setting]) -> list[Step]:
    data = host.read(path)
    entry = host.ledger.entries.get(path)
    edited = put(data or b"", settings, path)
    names = ", ".join(".".join(setting.keys[-2:]) for setting in settings)
    backup = f"{path}{BACKUP_SUFFIX}" if data is not None else None
    if entry is not None:
        # Put in again, or more of them: what was there before the first time is what comes back.
        old = {tuple(setting.keys): setting for setting in entry.settings}
        merged = {**{tuple(setting.keys): setting for setting in settings}, **old}
        settings = list(merged.values())
        # One that was made by us and changed by others since is no longer ours to remove.
        backup = entry.backup or (backup if changed_since(entry, data) else None)
    kept = f"; what was there is in {backup}" if backup else ""
    host.report(path, "edited" if data is not None else "wrote", f"set {names}{kept}")
    new = Entry(path, fingerprint(edited), backup, list(settings))
    copy: tuple[str, bytes] | None = None
    if data is not None and backup and (entry is None or changed_since(entry, data)):
        # What its user has changed since must come back, too.
        copy = (backup, take_out(data, entry.settings, path) if entry else data)
    return [lambda: host.write(new, edited, copy)]


def _report_edited(host: Host, edited: list[str]) -> None:
    """Those that need no change because an earlier run has made it."""
    for entry in host.ledger.entries.values():
        if entry.settings and entry.path not in edited:
            host.report(entry.path, "unchanged", "the settings are in it")


def _report_superseded(host: Host, wanted: Wanted) -> None:
    """What an earlier run wrote and this one does not want stays until `--remove`."""
    known = {file.path for file in wanted.files}
    for entry in host.ledger.entries.values():
        if entry.path not in known and not entry.settings:
            host.report(entry.path, "kept", "from an installation before, with other options")


def _remove_file(host: Host, entry: Entry) -> None:
    backup = host.read(entry.backup) if entry.backup else None
    if backup is None:
        host.report(entry.path, "removed")
        if entry.path.endswith((".service", ".socket")):
            for link in host.enabled(entry.path.rpartition("/")[2]):
                host.report(link, "removed", "it was enabled")
                host.unlink(link)
        host.remove(entry.path)
    else:
        host.report(entry.path, "restored", "to what was there before")
        host.restore(entry, backup)


def _remove_settings(host: Host, entry: Entry, data: bytes | None) -> None:
    if data is None:
        host.report(entry.path, "unchanged", "it was gone")
        host.forget(entry.path)
        return
    if not changed_since(entry, data):
        _remove_file(host, entry)
        return
    left = take_out(data, entry.settings, entry.path)
    why = "it was changed since: our settings are taken out, the rest stays"
    if not has(data, entry.settings, entry.path):
        why = "it was changed since: those of our settings that were still there are taken out"
    host.report(entry.path, "cleaned", why)
    host.restore(entry, left)
