"""Which labels a snapshot has after an Update."""

from collections.abc import Mapping, Sequence

from fuse.snapshotter.failures import RequestInvalid


def change_labels(old: Mapping[str, str], given: Mapping[str, str], paths: Sequence[str]) -> dict[str, str]:
    """All labels become the given ones, or only those that `paths` name; an empty one is none.

    Paths are those of a field mask: `labels` or `labels.NAME`. Raises `RequestInvalid` for another one.
    """
    if not paths:
        return dict(given)
    labels = dict(old)
    for path in paths:
        if path == "labels":
            labels = dict(given)
        elif path.startswith("labels."):
            name = path.removeprefix("labels.")
            labels[name] = given.get(name, "")
        else:
            raise RequestInvalid(why=f"field {path!r} of a snapshot cannot be changed")
    return labels
