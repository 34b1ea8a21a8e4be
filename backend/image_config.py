"""Configs of images that are made from other images: the same, but for the layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from backend.manifest import EPOCH, ManifestBroken

_CREATED_BY = "nydus-py convert"


@dataclass(frozen=True, slots=True)
class NewLayer:
    """A layer of the new image: its diff ID, and which layer of the old one it stands for, if one."""

    diff_id: str
    source_layer: int | None


def read_config(data: bytes, where: str) -> dict[str, Any]:
    """A config as it is, with what no specification knows. Raises `ManifestBroken`."""
    try:
        config = msgspec.json.decode(data, type=dict[str, Any])
        rootfs, history = config.get("rootfs") or {}, config.get("history") or []
        if not isinstance(rootfs, dict) or not all(isinstance(entry, dict) for entry in history):
            raise ManifestBroken(where=where, why="config: rootfs or history are no lists of layers")
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, TypeError) as error:
        raise ManifestBroken(where=where, why=f"config: {error}") from error
    return config


def converted_config(
    source: bytes, layer_count: int, layers: Sequence[NewLayer], bootstrap_diff_id: str, where: str
) -> bytes:
    """The config of the Nydus image of `source`, an image of `layer_count` layers.

    The history stays. An entry whose layer has no counterpart is marked as empty, one is added for each layer
    that has no source and for the bootstrap, so that there are as many as layers.
    """
    config = read_config(source, where)
    kept = {layer.source_layer for layer in layers}
    history, own = _numbered_history(config, layer_count)
    result = []
    for number, entry in zip(own, history, strict=True):
        result.append(entry if number in kept else entry | {"empty_layer": True})
    for layer in layers:
        if layer.source_layer is None:
            result.append(_entry("Nydus Blob Layer"))
    result.append(_entry("Nydus Bootstrap Layer"))
    diff_ids = [layer.diff_id for layer in layers] + [bootstrap_diff_id]
    return _with_layers(config, diff_ids, result)


def reversed_config(nydus: bytes, diff_id: str, where: str) -> bytes:
    """The config of an ordinary image of one layer made from that of a Nydus image."""
    config = read_config(nydus, where)
    result = [
        entry | {"empty_layer": True}
        for entry in config.get("history") or []
        if not str(entry.get("comment", "")).startswith("Nydus ")
    ]
    result.append({"created": EPOCH, "created_by": f"{_CREATED_BY} --reverse"})
    return _with_layers(config, [diff_id], result)


def merged_config(
    nydus: bytes, diff_ids: Sequence[str], where: str, created_by: str = "nydus-py merge"
) -> bytes:
    """The config of a Nydus image with these layers, the bootstrap last, made from that of another one.

    What is to run stays; the history is that of a merge, as no entry of the old one has its layer any more.
    """
    config = read_config(nydus, where)
    comments = ["Nydus Blob Layer"] * (len(diff_ids) - 1) + ["Nydus Bootstrap Layer"]
    return _with_layers(config, diff_ids, [_entry(comment, created_by) for comment in comments])


def _numbered_history(
    config: dict[str, Any], layer_count: int
) -> tuple[list[dict[str, Any]], list[int | None]]:
    """The history, and for each entry the layer that it made; one is made up where it has none that fits."""
    history = [dict(entry) for entry in config.get("history") or []]
    made = [number for number, entry in enumerate(history) if not entry.get("empty_layer")]
    if len(made) != layer_count:
        return [{"created": EPOCH, "created_by": _CREATED_BY} for _ in range(layer_count)], list(
            range(layer_count)
        )
    numbers: list[int | None] = [None] * len(history)
    for layer, number in enumerate(made):
        numbers[number] = layer
    return history, numbers


def _entry(comment: str, created_by: str = _CREATED_BY) -> dict[str, Any]:
    return {"created": EPOCH, "created_by": created_by, "comment": comment}


def says_what_runs(config: bytes, where: str) -> bool:
    """Whether a config has anything for a container: a command, an environment, labels."""
    return bool(read_config(config, where).get("config"))


def _with_layers(config: dict[str, Any], diff_ids: Sequence[str], history: Sequence[Any]) -> bytes:
    rootfs = {"type": "layers", "diff_ids": list(diff_ids)}
    return msgspec.json.encode(config | {"rootfs": rootfs, "history": list(history)})
