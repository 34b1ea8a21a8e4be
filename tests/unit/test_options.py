"""Build options: what the format allows."""

import pytest

from builder.options import BuildOptions, CompressionPolicy, InvalidOption
from rafs.codec import Compressor


@pytest.mark.parametrize("size", [0, 2048, 4095, 4097, 12_288, 32 << 20, -4096])
def test_chunk_size_is_a_power_of_two_in_range(size: int) -> None:
    with pytest.raises(InvalidOption, match="--chunk-size"):
        BuildOptions(chunk_size=size, batch_size=0)


@pytest.mark.parametrize("size", [4096, 1 << 16, 16 << 20])
def test_chunk_sizes_of_the_format(size: int) -> None:
    assert BuildOptions(chunk_size=size, batch_size=size).batch_limit == size // 2


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("--batch-size", {"batch_size": -1}),
        ("--batch-size", {"batch_size": 2 << 20}),
        ("--level", {"level": 0}),
        ("--level", {"level": 23}),
        ("--threads", {"threads": 0}),
        ("--threads", {"threads": 257}),
    ],
)
def test_numbers_out_of_range_name_the_option(name: str, chosen: dict[str, int]) -> None:
    with pytest.raises(InvalidOption, match=name):
        BuildOptions(**chosen)  # type: ignore[arg-type]


def test_wrong_options_are_wrong_usage() -> None:
    assert InvalidOption.exit_code == 2


def test_without_batches_no_file_is_small() -> None:
    assert BuildOptions(batch_size=0).batch_limit == 0


@pytest.mark.parametrize(
    ("policy", "codec"),
    [
        (CompressionPolicy.AUTO, Compressor.ZSTD),
        (CompressionPolicy.ZSTD, Compressor.ZSTD),
        (CompressionPolicy.LZ4, Compressor.LZ4_BLOCK),
        (CompressionPolicy.NONE, Compressor.NONE),
    ],
)
def test_codec_that_the_image_names(policy: CompressionPolicy, codec: Compressor) -> None:
    assert policy.codec is codec
