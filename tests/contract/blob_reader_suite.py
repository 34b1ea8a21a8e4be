"""What every `BlobReader` must do. A subclass says how to open one; pytest runs the rest.

class TestLocalReader(BlobReaderContract):
    @asynccontextmanager
    async def open_reader(self, content, tmp_path): ...
"""

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from backend.contract import BackendError, BlobNotFound, BlobReader, ShortRead

CONTENT = Random(1).randbytes(300_000)


class BlobReaderContract:
    """The conformance suite for a reader that always has a blob. Override `open_reader`."""

    def open_reader(self, content: bytes, tmp_path: Path) -> AbstractAsyncContextManager[BlobReader]:
        """A reader of a blob with this content; everything it needs lives as long as the context."""
        raise NotImplementedError

    async def test_its_size(self, tmp_path: Path) -> None:
        async with self.open_reader(CONTENT, tmp_path) as reader:
            assert await reader.size() == len(CONTENT)
            assert await reader.size() == len(CONTENT)

    @pytest.mark.parametrize(
        ("offset", "length"),
        [(0, 1), (0, 300_000), (299_999, 1), (1, 299_999), (4096, 4096), (65_535, 131_073), (150_000, 0)],
    )
    async def test_a_range_is_what_is_there(self, tmp_path: Path, offset: int, length: int) -> None:
        async with self.open_reader(CONTENT, tmp_path) as reader:
            data = await reader.read_range(offset, length)
            assert type(data) is bytes
            assert data == CONTENT[offset : offset + length]

    @pytest.mark.parametrize(("offset", "length"), [(299_999, 2), (300_000, 1), (1 << 40, 1), (0, 1 << 40)])
    async def test_a_range_past_the_end(self, tmp_path: Path, offset: int, length: int) -> None:
        async with self.open_reader(CONTENT, tmp_path) as reader:
            with pytest.raises(ShortRead):
                await reader.read_range(offset, length)
            assert await reader.read_range(0, 4) == CONTENT[:4]

    @pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (-1, 0), (-4, -4)])
    async def test_a_negative_argument(self, tmp_path: Path, offset: int, length: int) -> None:
        async with self.open_reader(CONTENT, tmp_path) as reader:
            with pytest.raises(ValueError, match="negative"):
                await reader.read_range(offset, length)

    async def test_an_empty_blob(self, tmp_path: Path) -> None:
        async with self.open_reader(b"", tmp_path) as reader:
            assert await reader.size() == 0
            assert await reader.read_range(0, 0) == b""
            with pytest.raises(ShortRead):
                await reader.read_range(0, 1)

    async def test_many_tasks_at_once(self, tmp_path: Path) -> None:
        async with self.open_reader(CONTENT, tmp_path) as reader:

            async def check(offset: int) -> None:
                assert await reader.read_range(offset, 5000) == CONTENT[offset : offset + 5000]

            async with trio.open_nursery() as nursery:
                for offset in range(0, 290_000, 5000):
                    nursery.start_soon(check, offset)

    async def test_cancelled_readers_leave_it_usable(self, tmp_path: Path) -> None:
        async with self.open_reader(CONTENT, tmp_path) as reader:
            for checkpoints in range(30):
                async with trio.open_nursery() as nursery:
                    for offset in range(0, 100_000, 10_000):
                        nursery.start_soon(reader.read_range, offset, 100_000)
                    for _ in range(checkpoints):
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()
            assert await reader.read_range(0, len(CONTENT)) == CONTENT

    async def test_every_method_is_a_checkpoint(self, tmp_path: Path) -> None:
        async with self.open_reader(CONTENT, tmp_path) as reader:
            await reader.size()
            with trio.testing.assert_checkpoints():
                await reader.size()
            with trio.testing.assert_checkpoints():
                await reader.read_range(0, 10)
            with trio.testing.assert_checkpoints():
                await reader.read_range(0, 0)
            with trio.testing.assert_checkpoints():
                await reader.aclose()

    async def test_closing_twice_and_reading_after(self, tmp_path: Path) -> None:
        async with self.open_reader(CONTENT, tmp_path) as reader:
            await reader.read_range(0, 10)
            await reader.aclose()
            await reader.aclose()
            for call in (reader.size, lambda: reader.read_range(0, 1), lambda: reader.read_range(0, 0)):
                with pytest.raises(BackendError):
                    await call()


class MissingBlobContract(BlobReaderContract):
    """The suite for a reader whose blob may be missing. Override `open_absent` too."""

    def open_absent(self, tmp_path: Path) -> AbstractAsyncContextManager[BlobReader]:
        """A reader of a blob that is not there; opening it succeeds."""
        raise NotImplementedError

    async def test_a_blob_that_is_not_there(self, tmp_path: Path) -> None:
        async with self.open_absent(tmp_path) as reader:
            with pytest.raises(BlobNotFound):
                await reader.size()
            with pytest.raises(BlobNotFound):
                await reader.read_range(0, 1)
