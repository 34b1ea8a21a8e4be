"""Uploads to a registry that loses connections, chunks and its memory."""

import tracemalloc
from pathlib import Path

import pytest
import trio

from backend.contract import BackendError
from backend.http import RegistryProtocolError
from backend.ocidigest import digest_of
from backend.retry import RetryPolicy
from backend.status import ServerFailed
from tests.contract.fault_server import Asked, Reply, fault_server, ranged
from tests.unit.registry_faults import CONTENT, DIGEST, connected


class UploadServer:
    """A registry of one upload that can lose connections, and keeps what it got."""

    def __init__(self, faults: dict[int, str]) -> None:
        self.data = bytearray()
        self.done = False
        self._faults = faults
        self._patches = 0

    def __call__(self, asked: Asked) -> Reply:
        location = ("Location", f"/upload/1?_state={len(self.data)}")
        range_ = ("Range", f"0-{max(0, len(self.data) - 1)}")
        if asked.method == "POST":
            self.data.clear()
            return Reply(202, (("Location", "/upload/1?_state=0"),))
        if asked.method == "GET":
            return Reply(204, (location, range_))
        if asked.method == "PATCH":
            return self._patch(asked)
        if asked.method == "PUT":
            self.data += asked.body
            good = asked.query.endswith(f"digest=sha256%3A{digest_of(bytes(self.data))[7:]}")
            self.done = good
            return Reply(201) if good else Reply(400, body=b'{"errors":[{"code":"DIGEST_INVALID"}]}')
        return Reply(204 if asked.method == "DELETE" else 404)

    def _patch(self, asked: Asked) -> Reply:
        assert asked.headers["content-range"].startswith(f"{len(self.data)}-")
        assert f"_state={len(self.data)}" in asked.query
        self._patches += 1
        fault = self._faults.get(self._patches)
        if fault == "half":  # took a part of the chunk and hung up
            self.data += asked.body[: len(asked.body) // 2]
            return Reply(then="drop")
        if fault == "lost":  # took it all, and the answer was lost
            self.data += asked.body
            return Reply(then="drop")
        if fault == "500":
            return Reply(500)
        self.data += asked.body
        head = (("Location", f"/upload/1?_state={len(self.data)}"), ("Range", f"0-{len(self.data) - 1}"))
        return Reply(202, head)


LARGE = bytes(range(251)) * 100_000  # 25 MB: four chunks


@pytest.mark.parametrize("fault", ["half", "lost", "500"])
async def test_an_upload_goes_on_where_the_registry_says(tmp_path: Path, fault: str) -> None:
    (tmp_path / "blob").write_bytes(LARGE)
    registry = UploadServer({2: fault, 3: "half", 5: "half"})
    counts: list[int] = []
    retry = RetryPolicy(attempts=3, first_delay_s=0)
    async with fault_server(registry) as server, connected(server, retry=retry) as client:
        await client.upload_blob(tmp_path / "blob", digest_of(LARGE), len(LARGE), counts.append)
    assert registry.done
    assert bytes(registry.data) == LARGE
    assert sum(counts) == len(LARGE)
    assert server.requests().count("POST /v2/a/b/blobs/uploads/") == 1


async def test_an_upload_that_never_gets_further_ends(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(LARGE)
    registry = UploadServer(dict.fromkeys(range(2, 100), "500"))
    retry = RetryPolicy(attempts=3, first_delay_s=0)
    async with fault_server(registry) as server, connected(server, retry=retry) as client:
        with pytest.raises(ServerFailed):
            await client.upload_blob(tmp_path / "blob", digest_of(LARGE), len(LARGE))
    assert server.requests()[-1] == "DELETE /upload/1"


async def test_a_registry_that_forgets_uploads_ends(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(LARGE)

    def answer(asked: Asked) -> Reply:
        return Reply(202, (("Location", "/upload/1"),)) if asked.method == "POST" else Reply(404)

    retry = RetryPolicy(attempts=3, first_delay_s=0)
    async with fault_server(answer) as server, connected(server, retry=retry) as client:
        with pytest.raises(ServerFailed, match="out of step"):
            await client.upload_blob(tmp_path / "blob", digest_of(LARGE), len(LARGE))
    assert server.requests().count("POST /v2/a/b/blobs/uploads/") == 3


async def test_a_file_that_is_shorter_or_gone(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"12")
    async with fault_server(UploadServer({})) as server, connected(server) as client:
        with pytest.raises(BackendError, match="shorter"):
            await client.upload_blob(tmp_path / "blob", DIGEST, 3)
        with pytest.raises(BackendError, match="no such file"):
            await client.upload_blob(tmp_path / "gone", DIGEST, 3)


@pytest.mark.parametrize("status", [401, 403, 404, 405])
async def test_a_mount_that_is_not_possible_is_no_error(status: int) -> None:
    async with fault_server(lambda asked: Reply(status)) as server, connected(server) as client:
        if status == 401:
            with pytest.raises(RegistryProtocolError):
                await client.mount_blob(DIGEST, "c/d")
        else:
            assert not await client.mount_blob(DIGEST, "c/d")


async def test_what_travelled_is_counted(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(LARGE)
    async with fault_server(UploadServer({})) as server, connected(server) as client:
        await client.upload_blob(tmp_path / "blob", digest_of(LARGE), len(LARGE))
        assert client.statistics().sent_bytes == len(LARGE)


async def test_from_one_registry_into_another() -> None:
    registry = UploadServer({2: "half"})
    retry = RetryPolicy(attempts=3, first_delay_s=0)
    async with (
        fault_server(lambda asked: ranged(asked, LARGE)) as first,
        fault_server(registry) as second,
        connected(first) as source,
        connected(second, retry=retry) as target,
    ):
        digest = digest_of(LARGE)
        await target.upload_from(source.open_blob(digest, len(LARGE)), digest, len(LARGE))
    assert registry.done
    assert bytes(registry.data) == LARGE


async def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    size_bytes = 200 << 20
    with (tmp_path / "blob").open("wb") as file:
        file.truncate(size_bytes)

    def answer(asked: Asked) -> Reply:
        return Reply({"POST": 202, "PATCH": 202, "PUT": 201}[asked.method], (("Location", "/upload/1"),))

    async with fault_server(answer) as server, connected(server) as client:
        server.asked = Forgetful()
        tracemalloc.start()
        try:
            await client.upload_blob(tmp_path / "blob", DIGEST, size_bytes)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak_bytes < 64 << 20  # a few chunks, the server's own among them


class Forgetful(list[Asked]):
    """A list of requests that does not keep them."""

    def append(self, asked: Asked) -> None:
        return


async def test_a_cancelled_upload_is_given_up(tmp_path: Path) -> None:
    reached = trio.Event()

    async def reach() -> None:
        reached.set()

    def answer(asked: Asked) -> Reply:
        if asked.method == "POST":
            return Reply(202, (("Location", "/v2/a/b/blobs/uploads/1"),))
        if asked.method == "PUT":
            return Reply(201, length=10, then="stall", before=reach)
        return Reply(204)

    (tmp_path / "blob").write_bytes(CONTENT)
    async with fault_server(answer) as server, connected(server) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.upload_blob, tmp_path / "blob", DIGEST, len(CONTENT))
        await reached.wait()
        nursery.cancel_scope.cancel()
    assert server.requests()[-1] == "DELETE /v2/a/b/blobs/uploads/1"
