"""Runs a fuzz target under atheris: `python tests/fuzz/fuzz_NAME.py -max_total_time=60`.

A target module has `SEEDS`, inputs that a parser takes whole, and `exercise(data)`, which returns for any
bytes that it is given; `tests/property/test_fuzz_targets.py` replays each without atheris.
"""

import importlib
import sys
import tempfile
from pathlib import Path

_INSTRUMENTED = ("rafs", "backend", "builder")


def run(target: str) -> None:
    """Fuzzes the module `tests.fuzz.<target>` with the options of the command line; never returns."""
    import atheris  # an extra of its own, which the tests do without

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    # The parsers were imported with the script; only what is imported now reports its branches.
    for name in [name for name in sys.modules if name.partition(".")[0] in (*_INSTRUMENTED, "tests")]:
        del sys.modules[name]
    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        module = importlib.import_module(f"tests.fuzz.{target}")
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(module.SEEDS):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        atheris.Setup([*sys.argv, "-max_len=65536", corpus], module.exercise)
        atheris.Fuzz()
