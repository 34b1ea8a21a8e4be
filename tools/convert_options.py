"""The options of `nydus-py convert` that say what is to be made of which image."""

from typing import Annotated

import typer

from backend.platforms import Platform
from builder.oci_layer import LayerCompression
from builder.options import InvalidOption

BothOption = Annotated[bool, typer.Option("--both", help="An index of the image as it is and the Nydus one.")]
WithReferrerOption = Annotated[
    bool, typer.Option("--with-referrer", help="Have the new image name the original as its subject.")
]
NoCopyOption = Annotated[
    bool,
    typer.Option("--no-copy", help="Leave gzip layers as they are: only an index of them is made."),
]
ReverseOption = Annotated[
    bool, typer.Option("--reverse", help="The other way: an ordinary image of a Nydus one.")
]
LayerCompressionOption = Annotated[
    LayerCompression, typer.Option(help="How the layer that --reverse makes is packed.")
]
PlatformOption = Annotated[
    str | None, typer.Option(metavar="OS/ARCH", help="Which image of an index.  [default: this one's]")
]
AllPlatformsOption = Annotated[
    bool, typer.Option("--all-platforms", help="All images of an index, into an index.")
]
ParallelOption = Annotated[
    int | None, typer.Option(min=1, help="Layers that are converted at a time.", show_default=False)
]
BuildCacheOption = Annotated[
    str | None,
    typer.Option(metavar="REF", help="Keep converted layers there too, for hosts that keep nothing."),
]


def parse_platform(text: str) -> Platform:
    """`OS/ARCH` or `OS/ARCH/VARIANT`. Raises `InvalidOption`."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise InvalidOption(option="--platform", why=f"write for example linux/arm64, not {text!r}")
    return Platform(parts[1], parts[0], parts[2] if len(parts) == 3 else "")
