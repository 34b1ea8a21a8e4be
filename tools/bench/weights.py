"""A safetensors file of bf16 weights, as a trained model has them: normally distributed."""

import random
from pathlib import Path

TENSORS = 16
ROW = 1024
DEVIATION = 0.02


def write_weights(path: Path, size_bytes: int, seed: int) -> str | None:
    """Writes about `size_bytes`; returns what was done instead where the packages for it are missing."""
    rows = size_bytes // (2 * ROW * TENSORS)
    try:
        import numpy as np
        from safetensors.numpy import save_file
    except ImportError as error:
        path.write_bytes(random.Random(seed).randbytes(2 * rows * ROW * TENSORS))
        return f"{error.name} is not installed; random bytes instead"
    rng = np.random.default_rng(seed)
    tensors = {}
    for number in range(TENSORS):
        values = rng.standard_normal((rows, ROW), dtype=np.float32) * np.float32(DEVIATION)
        # The upper half of a float32 is the bf16 of the same number, rounded towards zero. numpy has no
        # name for that type: the header of the file says U16, the bytes are the same.
        tensors[f"layers.{number}.weight"] = (values.view(np.uint32) >> 16).astype(np.uint16)
    save_file(tensors, path)
    return None
