"""The options that all verbs share which make blobs, and what follows from them."""

import enum
import os
from collections.abc import Sequence
from typing import Annotated

import typer

from backend.reference import Reference, absolute_reference
from backend.store import open_store
from builder.chunk_dict import DictionaryImage
from builder.options import BuildOptions, CompressionPolicy
from rafs.digest import Digester
from tools.runtime import run_async
from tools.settings import Settings
from tools.sizes import size_option


class DigesterName(enum.StrEnum):
    """What identifies chunks."""

    BLAKE3 = "blake3"
    SHA256 = "sha256"


CompressorOption = Annotated[
    CompressionPolicy, typer.Option(help="auto stores as it is what would not shrink by an eighth.")
]
LevelOption = Annotated[int, typer.Option(help="Level of compression, 1 to 22.")]
DigesterOption = Annotated[DigesterName, typer.Option(help="What identifies chunks.")]
ChunkSizeOption = Annotated[str, typer.Option(metavar="SIZE", help="A power of two from 4KiB to 16MiB.")]
BatchSizeOption = Annotated[
    str, typer.Option(metavar="SIZE", help="Compress small files together in units of this; 0 for not.")
]
ChunkDictOption = Annotated[
    list[str] | None,
    typer.Option(metavar="REF", help="Refer to chunks that this image has. May be repeated."),
]
PrefetchOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Files to fetch first at a mount: an absolute path in the image, with all below it, or a"
        " glob whose * crosses /. May be repeated.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="Worker processes.  [default: one per core]", show_default=False)
]


def build_options(
    compressor: CompressionPolicy,
    level: int,
    digester: DigesterName,
    chunk_size: str,
    batch_size: str,
    prefetch: Sequence[str],
    threads: int,
) -> BuildOptions:
    """The options as a build takes them. Raises `InvalidOption`."""
    chunk_size_bytes = size_option("--chunk-size", chunk_size)
    return BuildOptions(
        chunk_size=chunk_size_bytes,
        batch_size=min(size_option("--batch-size", batch_size), chunk_size_bytes),
        compression=compressor,
        level=level,
        digester=Digester[digester.name],
        prefetch=tuple(prefetch),
        threads=threads,
    )


def usable_cores(threads: int | None) -> int:
    """What `--threads` says, or the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if threads is None else threads


def fetch_dictionaries(texts: Sequence[str], settings: Settings) -> tuple[DictionaryImage, ...]:
    """The metadata of the images that --chunk-dict names."""

    async def fetch() -> tuple[DictionaryImage, ...]:
        return tuple([await _fetch_dictionary(absolute_reference(text), settings) for text in texts])

    return run_async(fetch) if texts else ()


async def _fetch_dictionary(reference: Reference, settings: Settings) -> DictionaryImage:
    async with open_store(reference, settings.registry_options()) as store:
        metadata = await store.fetch_metadata(settings.images_dir)
    metas = {file.blob_id: file.path for file in metadata.blob_meta_paths}
    return DictionaryImage(str(reference), metadata.bootstrap_path, metas)
