"""What goes of the layers that were converted on this host: those that nobody has used for long.

A layer's directory, the work directory that a killed conversion left of it and the lock file go together,
under that lock. What is in use stays.
"""

from dataclasses import dataclass

from builder.layer_cache import LayerCache

KEPT_S = 30 * 24 * 3600
BYTES_MAX = 8 << 30
"""Most layers are a bootstrap and chunk tables here, some MB; unfinished ones are as large as their blob."""


@dataclass(frozen=True, slots=True)
class EvictionLimits:
    """How long a layer is kept after its last use, in seconds, and how many bytes all of them may take."""

    kept_s: float = KEPT_S
    bytes_max: int = BYTES_MAX


def evict_layers(cache: LayerCache, now_s: float, limits: EvictionLimits = EvictionLimits()) -> list[str]:
    """Removes what is over the limits, the longest unused first; the keys of it. Raises `CannotWrite`.

    `now_s` is the time of the clock that files have.
    """
    found = [(cache.last_use_s(key), cache.size_bytes(key), key) for key in cache.all_keys()]
    left_bytes = sum(size for _, size, _ in found)
    gone = []
    for used_s, size, key in sorted(found):
        if now_s - used_s <= limits.kept_s and left_bytes <= limits.bytes_max:
            break
        if cache.discard(key):
            left_bytes -= size
            gone.append(key)
    return gone
