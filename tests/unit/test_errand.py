"""What an owner does for another host that wants encoded bytes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from backend.peers.hub import PeerBlob
from backend.peers.piece import PieceGrid
from backend.peers.presence import PiecePresence
from backend.peers.swarm import Swarm
from fuse.agent.errand import NotServed, serve_encoded
from fuse.agent.upload_protocol import FetchRequest
from tests.unit.test_encoded import Rig, rig


@asynccontextmanager
async def shared(tmp_path: Path) -> AsyncIterator[tuple[Rig, PeerBlob]]:
    async with rig(tmp_path) as r:
        grid = PieceGrid(r.blob.entry.uncompressed_size)
        presence = PiecePresence(r.blob.meta, r.fetcher.cached, grid)
        presence.watch()
        yield r, PeerBlob(r.blob.entry.blob_id, "image", tmp_path / "meta", presence, [r.fetcher])


def wants(r: Rig, first: int, last: int, *, may_fetch: bool = True) -> FetchRequest:
    """The encoded bytes of some chunks."""
    start, end = r.blob.meta.extent(first), r.blob.meta.extent(last)
    stop = end.compressed_offset + end.compressed_size
    return FetchRequest(1, r.blob.entry.blob_id, start.compressed_offset, stop, 2, may_fetch, is_encoded=True)


async def test_an_owner_brings_what_is_not_here_and_keeps_it(tmp_path: Path) -> None:
    async with shared(tmp_path) as (r, blob):
        for wanted in (wants(r, 0, 1), wants(r, 3, 3)):  # the second is in the middle of a batch
            await serve_encoded(Swarm("own"), blob, wanted)
            assert r.encoded.has(wanted.offset, wanted.offset + 1)
        await r.fetcher.ensure(0, 4)
        await serve_encoded(Swarm("own"), blob, wants(r, 0, 4, may_fetch=False))


async def test_chunks_that_are_here_decoded_only_are_refused_before_the_answer_begins(tmp_path: Path) -> None:
    """The answer broke off when it came to them, and the host was taken for dead."""
    async with shared(tmp_path) as (r, blob):
        r.fetcher.origin.encoded = None
        await r.fetcher.ensure(1, 1)
        r.fetcher.origin.encoded = r.encoded
        with pytest.raises(NotServed, match="decoded only"):
            await serve_encoded(Swarm("own"), blob, wants(r, 0, 1))
        assert not r.fetcher.cached.is_ready(0)
        await serve_encoded(Swarm("own"), blob, wants(r, 0, 0))
        assert r.encoded.has(0, 100)


async def test_what_nobody_is_to_bring_is_refused(tmp_path: Path) -> None:
    async with shared(tmp_path) as (r, blob):
        with pytest.raises(NotServed, match="another host its owner"):
            await serve_encoded(Swarm("own"), blob, wants(r, 0, 1, may_fetch=False))
        for offset, end in ((-1, 5), (5, 5), (0, len(r.blob.data) + 1)):
            wanted = FetchRequest(1, r.blob.entry.blob_id, offset, end, 2, may_fetch=True, is_encoded=True)
            with pytest.raises(NotServed, match="no such bytes"):
                await serve_encoded(Swarm("own"), blob, wanted)
