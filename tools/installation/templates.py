"""The files of deploy/, which are the source of everything that is installed.

In a checkout they are beside the packages; a wheel has a copy among the package data of `tools`.
"""

from pathlib import Path

PLACES = (Path(__file__).parents[2] / "deploy", Path(__file__).parents[1] / "deploy")
PROGRAM = "/usr/local/bin/nydus-py"
"""Where the units look for the program, unless it is elsewhere."""
MIRROR = "http://127.0.0.1:8771"
"""Where hosts.toml looks for the upload server: the default of `peer_listen`."""


def template(name: str) -> str:
    """The text of a file, by its path below deploy/. `FileNotFoundError` means a broken installation."""
    for place in PLACES:
        if (place / name).is_file():
            return (place / name).read_text()
    raise FileNotFoundError(f"deploy/{name} is not part of this installation")
