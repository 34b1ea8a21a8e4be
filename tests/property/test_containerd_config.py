"""Settings put into TOML files of others: nothing else changes, and they can be taken out again."""

from typing import Any

import tomlkit
from hypothesis import given
from hypothesis import strategies as st

from tools.installation.containerd_config import has, put, take_out
from tools.installation.ledger import Setting

SECTIONS = ("plugins", "io.containerd.grpc.v1.cri", "containerd", "registry")
NAMES = st.sampled_from(["imports", "root", "x", *SECTIONS])
TEXTS = st.text("ab #\"'\n", max_size=5)
VALUES = st.booleans() | st.integers(-9, 9) | TEXTS | st.lists(TEXTS, max_size=3)
TABLES: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.dictionaries(NAMES, VALUES, max_size=3),
    lambda inner: st.dictionaries(NAMES, VALUES | inner, max_size=4),
    max_leaves=12,
)
SETTINGS: list[tuple[list[str], str | bool | list[str]]] = [
    (["imports"], ["/etc/containerd/conf.d/nydus-py.toml"]),
    (["plugins", "io.containerd.grpc.v1.cri", "containerd", "snapshotter"], "nydus-py"),
    (["plugins", "io.containerd.grpc.v1.cri", "containerd", "disable_snapshot_annotations"], False),
    (["plugins", "io.containerd.grpc.v1.cri", "registry", "config_path"], "/etc/containerd/certs.d"),
]


def settings_for(document: dict[str, Any]) -> list[Setting] | None:
    """As `plan_containerd` makes them; None where a table that they are in is something else."""
    found = []
    for keys, value in SETTINGS:
        table: Any = document
        for key in keys[:-1]:
            table = table.get(key, {})
            if not isinstance(table, dict):
                return None
        before = table.get(keys[-1])
        if keys == ["imports"]:
            if not isinstance(before, list | None):
                return None
            assert isinstance(value, list)
            found.append(Setting(keys, [*(before or []), *value], before or None))
        elif before != value and isinstance(before, str | bool | None):
            found.append(Setting(keys, value, before))
    return found


def pruned(value: Any) -> Any:
    """Without empty tables and lists, which say nothing."""
    if not isinstance(value, dict):
        return value
    inner = {key: pruned(each) for key, each in value.items()}
    return {key: each for key, each in inner.items() if each not in ({}, [])}


@given(TABLES)
def test_settings_go_in_and_out(document: dict[str, Any]) -> None:
    settings = settings_for(document)
    if settings is None:
        return
    data = tomlkit.dumps(document).encode()
    if not data.strip():
        return
    edited = put(data, settings, "config.toml")
    assert has(edited, settings, "config.toml")
    assert put(edited, settings, "config.toml") == edited
    left = take_out(edited, settings, "config.toml")
    assert pruned(tomlkit.parse(left).unwrap()) == pruned(document)
    # Line by line the rest is as it was, and in its order.
    rest = iter(edited.decode().splitlines())
    changed = {"imports", *(setting.keys[-1] for setting in settings if setting.before is not None)}
    for line in data.decode().splitlines():
        if line.strip() and line.split(" = ")[0].strip() not in changed:
            assert any(line.strip() == other.strip() for other in rest), line
