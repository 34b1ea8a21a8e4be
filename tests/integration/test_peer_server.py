"""The upload server as its clients see it: curl, skopeo and bare sockets."""

import email
import email.policy
import hashlib
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from backend.peers.served import Busy, Redirect
from tests.contract.fault_server import Asked, Reply, fault_server
from tests.peer_host import (
    BLOB_ID,
    DECODED,
    ENCODED,
    FillingFile,
    Serving,
    TestAdmission,
    client_of,
    random_file,
    request,
    serving,
)

SIZE = (3 << 20) + 12345
MIB = 1 << 20
KIB = 1 << 10


@pytest.fixture
def whole(tmp_path: Path) -> tuple[FillingFile, bytes]:
    return random_file(tmp_path / "blob", SIZE)


@pytest.fixture
def empty(tmp_path: Path) -> tuple[FillingFile, bytes]:
    """A file of which nothing is there yet."""
    return random_file(tmp_path / "blob", SIZE, whole=False)


async def curl(*arguments: str) -> bytes:
    done = await trio.run_process(["curl", "-sS", "--max-time", "20", *arguments], capture_stdout=True)
    return bytes(done.stdout)


# ---- curl


async def test_curl_gets_all_and_each_kind_of_range(whole: tuple[FillingFile, bytes]) -> None:
    file, content = whole
    async with serving(file) as server:
        assert await curl(server.url(DECODED)) == content
        assert await curl("-r", "0-0", server.url(DECODED)) == content[:1]
        assert await curl("-r", "1000000-2999999", server.url(DECODED)) == content[1000000:3000000]
        assert await curl("-r", "3000000-", server.url(DECODED)) == content[3000000:]
        assert await curl("-r", "-77", server.url(DECODED)) == content[-77:]
        assert server.counters.bytes_sent == SIZE + 1 + 2000000 + SIZE - 3000000 + 77
        assert max(server.paced) == 256 * KIB
        assert sum(server.paced) == server.counters.bytes_sent


async def test_curl_resumes(whole: tuple[FillingFile, bytes], tmp_path: Path) -> None:
    file, content = whole
    target = tmp_path / "target"
    target.write_bytes(content[:2000001])
    async with serving(file) as server:
        await curl("-C", "-", "-o", str(target), server.url(DECODED))
        assert target.read_bytes() == content
        assert server.counters.bytes_sent == SIZE - 2000001


async def test_curl_reads_a_multipart_answer(whole: tuple[FillingFile, bytes]) -> None:
    file, content = whole
    async with serving(file) as server:
        answer = await curl("-i", "-r", "0-4095,8192-12287,1048576-2097151,-10", server.url(DECODED))
    message = email.message_from_bytes(answer.partition(b"\r\n")[2], policy=email.policy.HTTP)
    parts = list(message.iter_parts())
    assert [part["Content-Range"] for part in parts] == [
        f"bytes 0-4095/{SIZE}",
        f"bytes 8192-12287/{SIZE}",
        f"bytes 1048576-2097151/{SIZE}",
        f"bytes {SIZE - 10}-{SIZE - 1}/{SIZE}",
    ]
    boundary = message.get_boundary()
    assert boundary is not None
    pieces = answer.split(b"--" + boundary.encode())
    bodies = [piece.partition(b"\r\n\r\n")[2][:-2] for piece in pieces[1:-1]]
    assert bodies == [content[:4096], content[8192:12288], content[MIB : 2 * MIB], content[-10:]]


async def test_head_says_what_get_would_send(whole: tuple[FillingFile, bytes]) -> None:
    file, _ = whole
    async with serving(file) as server:
        head = (await curl("-I", server.url(ENCODED))).decode().lower()
    assert head.startswith("http/1.1 200")
    for line in (
        f"content-length: {SIZE}",
        "accept-ranges: bytes",
        f'etag: "sha256:{BLOB_ID}"',
        f"docker-content-digest: sha256:{BLOB_ID}",
    ):
        assert f"\r\n{line}\r\n" in head
    assert server.counters.bytes_sent == 0


async def test_a_registry_blob_by_its_digest(tmp_path: Path, whole: tuple[FillingFile, bytes]) -> None:
    _, content = whole
    digest = hashlib.sha256(content).hexdigest()
    encoded = FillingFile(tmp_path / "encoded", content)
    async with serving(FillingFile(tmp_path / "other", b"x"), encoded=encoded, encoded_id=digest) as server:
        url = server.url(f"/v2/library/app/blobs/sha256:{digest}?ns=docker.io")
        assert hashlib.sha256(await curl(url)).hexdigest() == digest
        assert (server.shelf.asked[0].repository, server.shelf.asked[0].namespace) == (
            "library/app",
            "docker.io",
        )
        probe = (await curl("-i", server.url("/v2/"))).decode().lower()
        assert probe.startswith("http/1.1 200")
        assert "docker-distribution-api-version: registry/2.0" in probe
        assert (await curl(server.url("/healthy"))) == b"ok\n"


# ---- skopeo


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with one layer of a few MiB."""
    directory = tmp_path_factory.mktemp("image")
    (directory / "data").write_bytes(b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(100000)))
    layout = directory / "layout"
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    subprocess.run(["tar", "-C", str(directory), "-cf", str(directory / "layer"), "data"], check=True)

    def put(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    prefix = "application/vnd.oci.image"
    layer = put((directory / "layer").read_bytes(), f"{prefix}.layer.v1.tar")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{prefix}.manifest.v1+json",
        "config": put(json.dumps(config).encode(), f"{prefix}.config.v1+json"),
        "layers": [layer],
    }
    index = put(json.dumps(manifest).encode(), f"{prefix}.manifest.v1+json")
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [index]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return layout


@pytest.mark.needs_skopeo
async def test_skopeo_copies_an_image_whose_layer_comes_from_here(image: Path, tmp_path: Path) -> None:
    """A registry that sends its clients here for the layer, as a busy one would."""
    blobs = image / "blobs" / "sha256"
    manifest = json.loads((image / "index.json").read_text())["manifests"][0]
    layer = json.loads((blobs / manifest["digest"][7:]).read_text())["layers"][0]["digest"]
    encoded = FillingFile(tmp_path / "layer", (blobs / layer[7:]).read_bytes())

    @asynccontextmanager
    async def front(server: Serving) -> AsyncIterator[str]:
        def answer(asked: Asked) -> Reply:
            if asked.path == "/v2/":
                return Reply()
            if asked.path.endswith(layer):
                return Reply(307, (("Location", server.url(asked.path)),))
            digest = manifest["digest"] if "/manifests/" in asked.path else asked.path.rpartition("/")[2]
            kind = manifest["mediaType"] if "/manifests/" in asked.path else "application/octet-stream"
            return Reply(200, (("Content-Type", kind),), (blobs / digest[7:]).read_bytes())

        async with fault_server(answer) as registry:
            yield registry.host

    async with (
        serving(FillingFile(tmp_path / "other", b"x"), encoded=encoded, encoded_id=layer[7:]) as server,
        front(server) as host,
    ):
        source, target = f"docker://{host}/library/app:v1", f"dir:{tmp_path / 'copied'}"
        command = ["skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", source, target]
        await trio.run_process(command, capture_stdout=True)
        assert server.counters.bytes_sent == encoded.size_bytes
    assert (tmp_path / "copied" / layer[7:]).read_bytes() == (blobs / layer[7:]).read_bytes()


# ---- HTTP


async def test_small_adjacent_ranges_are_answered_as_one(whole: tuple[FillingFile, bytes]) -> None:
    file, content = whole
    async with serving(file) as server, client_of(server) as client:
        wanted = ",".join(f"{n * 4096}-{n * 4096 + 4095}" for n in range(64))
        reply = await client.get(DECODED, f"Range: bytes={wanted}")
        assert (reply.status, reply.headers["content-range"]) == (206, f"bytes 0-262143/{SIZE}")
        assert reply.body == content[: 256 * KIB]


async def test_a_connection_is_kept_and_pipelined_requests_answered_in_order(
    whole: tuple[FillingFile, bytes],
) -> None:
    file, content = whole
    async with serving(file) as server, client_of(server) as client:
        places = [(5, 9), (0, MIB), (7, 7), (2 * MIB, 2 * MIB + 4095)]
        await client.send(b"".join(request(DECODED, f"Range: bytes={a}-{b}") for a, b in places))
        for first, last in places:
            assert (await client.reply()).body == content[first : last + 1]
        assert (await client.get("/healthy")).body == b"ok\n"
        assert (server.counters.requests, server.counters.connections_made) == (5, 1)


async def test_answers_of_http_1_0_end_with_the_connection(whole: tuple[FillingFile, bytes]) -> None:
    file, content = whole
    async with serving(file) as server, client_of(server) as client:
        await client.send(f"GET {DECODED} HTTP/1.0\r\n\r\n".encode())
        assert (await client.rest()).endswith(b"\r\n\r\n" + content)


async def test_conditions_on_the_digest(whole: tuple[FillingFile, bytes]) -> None:
    file, content = whole
    etag = f'"sha256:{BLOB_ID}"'
    async with serving(file) as server, client_of(server) as client:
        reply = await client.get(DECODED, f"If-None-Match: {etag}")
        assert (reply.status, reply.body, reply.headers["etag"]) == (304, b"", etag)
        assert (await client.get(DECODED, 'If-None-Match: "other"')).status == 200
        assert (await client.get(DECODED, "Range: bytes=0-0", f"If-Range: {etag}")).body == content[:1]
        assert (await client.get(DECODED, "Range: bytes=0-0", 'If-Range: "other"')).body == content


@pytest.mark.parametrize(
    "wanted", [f"{SIZE}-", f"{SIZE}-{SIZE + 5},{SIZE + 10}-", "-0", "x", "9" * 400 + "-"]
)
async def test_ranges_out_of_bounds(whole: tuple[FillingFile, bytes], wanted: str) -> None:
    file, _ = whole
    async with serving(file) as server, client_of(server) as client:
        reply = await client.get(DECODED, f"Range: bytes={wanted}")
        assert (reply.status, reply.headers["content-range"]) == (416, f"bytes */{SIZE}")
        assert server.refused == {"range refused": 1}
        assert (await client.get("/healthy")).status == 200


async def test_an_empty_blob(tmp_path: Path) -> None:
    async with serving(FillingFile(tmp_path / "none", b"")) as server, client_of(server) as client:
        assert (await client.get(DECODED)).body == b""
        assert (await client.get(DECODED, "Range: bytes=0-")).status == 416


async def test_requests_for_what_is_not_here(whole: tuple[FillingFile, bytes]) -> None:
    file, _ = whole
    async with serving(file) as server, client_of(server) as client:
        assert (await client.get(f"/v1/blobs/{'00' * 32}/decoded")).status == 404
        assert (await client.get("/v2/app/manifests/latest")).status == 404
        reply = await client.get(DECODED, method="DELETE")
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
        assert (await client.get(DECODED, "Nydus-Class: 9")).status == 400
        assert server.refused == {
            "not here": 1,
            "no such resource": 1,
            "method not allowed": 1,
            "header malformed": 1,
        }


async def test_a_file_that_is_not_in_memory(whole: tuple[FillingFile, bytes]) -> None:
    file, content = whole
    async with serving(file) as server, client_of(server) as client:
        for wanted, body in [("0-", content), ("5-4999", content[5:5000])]:
            os.fsync(file.descriptor)
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            assert (await client.get(DECODED, f"Range: bytes={wanted}")).body == body


async def test_an_upgrade_is_not_taken_and_the_request_answered(whole: tuple[FillingFile, bytes]) -> None:
    file, content = whole
    async with serving(file) as server:
        assert await curl("--http2", server.url(DECODED), server.url(DECODED)) == content * 2


# ---- presence and arrival


async def test_what_is_missing_is_refused_by_kind(empty: tuple[FillingFile, bytes]) -> None:
    file, content = empty
    file.land(0, MIB)
    admission = TestAdmission()
    async with serving(file, admission=admission) as server, client_of(server) as client:
        assert (await client.get(DECODED)).status == 409
        assert (await client.get(ENCODED)).status == 404
        assert (await client.get(ENCODED, method="HEAD")).status == 404
        assert (await client.get(DECODED, f"Range: bytes=0-99,{MIB}-{MIB}")).status == 409
        assert (await client.get(DECODED, f"Range: bytes=0-{MIB - 1}")).body == content[:MIB]
        assert server.refused == {"not here": 4}
    assert admission.over == [(0, MIB, MIB)]


async def test_what_still_arrives_is_forwarded_as_it_comes(empty: tuple[FillingFile, bytes]) -> None:
    file, content = empty
    file.land(0, 100)
    file.arriving.append((0, SIZE))
    async with serving(file) as server, client_of(server) as client:
        await client.send(request(DECODED))
        assert (await client.head())[0] == 200
        assert await client.take(100) == content[:100]
        for offset, end in [(100, 101), (101, MIB), (MIB, SIZE)]:
            file.land(offset, end)
            assert await client.take(end - offset) == content[offset:end]


async def test_an_owner_fetches_what_it_lacks(empty: tuple[FillingFile, bytes]) -> None:
    file, content = empty
    async with serving(file) as server, client_of(server) as client:
        await client.send(request(DECODED, f"Range: bytes={MIB}-{2 * MIB - 1}", "Nydus-Fetch: 1"))
        while not file.waits:
            await trio.lowlevel.checkpoint()
        file.land(MIB, MIB + 10)
        assert (await client.head())[0] == 206
        assert await client.take(10) == content[MIB : MIB + 10]
        file.land(MIB, 2 * MIB)
        assert await client.take(MIB - 10) == content[MIB + 10 : 2 * MIB]
        assert server.shelf.asked[0].may_fetch


async def test_an_owner_fetches_all_ranges_of_a_request_at_once(empty: tuple[FillingFile, bytes]) -> None:
    file, _ = empty
    places = [n * 8192 for n in range(10)]
    async with serving(file) as server, client_of(server) as client:
        wanted = ",".join(f"{place}-{place + 4095}" for place in places)
        await client.send(request(DECODED, f"Range: bytes={wanted}", "Nydus-Fetch: 1"))
        while file.waits < len(places):
            await trio.lowlevel.checkpoint()
        for place in reversed(places):
            file.land(place, place + 4096)
        assert (await client.reply()).status == 206
        assert server.counters.bytes_sent == 10 * 4096


async def test_small_parts_are_sent_without_waiting_for_one_that_is_late(
    empty: tuple[FillingFile, bytes],
) -> None:
    file, content = empty
    file.land(0, 4096)
    file.arriving.append((8192, 12288))
    async with serving(file) as server, client_of(server) as client:
        await client.send(request(DECODED, "Range: bytes=0-4095,8192-12287"))
        _, headers = await client.head()
        early = await client.take(4200)
        assert content[:4000] in early
        file.land(8192, 12288)
        late = await client.take(int(headers["content-length"]) - len(early))
        assert content[8192:12288] in late


async def test_what_will_not_come_is_said_before_the_head(empty: tuple[FillingFile, bytes]) -> None:
    file, _ = empty
    file.die()
    admission = TestAdmission()
    async with serving(file, admission=admission) as server, client_of(server) as client:
        reply = await client.get(DECODED, "Nydus-Fetch: 1")
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert server.refused == {"would not come here": 1}
        assert (await client.get("/healthy")).status == 200
    assert admission.over == [(0, SIZE, 0)]


async def test_what_turns_out_not_to_be_on_its_way_is_not_here(empty: tuple[FillingFile, bytes]) -> None:
    """An upload server has to ask the agent first; a range that is not here is none all the same."""
    file, _ = empty
    file.arriving.append((0, SIZE))
    file.die()
    async with serving(file) as server, client_of(server) as client:
        assert (await client.get(DECODED)).status == 409
        assert (await client.get(ENCODED)).status == 404
        assert server.refused == {"not here": 2}


async def test_a_body_that_will_not_come_is_never_complete(empty: tuple[FillingFile, bytes]) -> None:
    file, content = empty
    file.land(0, MIB)
    admission = TestAdmission()
    async with serving(file, admission=admission) as server, client_of(server) as client:
        await client.send(request(DECODED, "Nydus-Fetch: 1"))
        assert (await client.head())[0] == 200
        assert await client.take(MIB) == content[:MIB]
        file.die()
        with pytest.raises(trio.BrokenResourceError):
            await client.rest()
        assert server.refused == {"body torn": 1}
    assert admission.over == [(0, SIZE, MIB)]


async def test_what_vanishes_while_it_is_sent_tears_the_body(whole: tuple[FillingFile, bytes]) -> None:
    file, _ = whole

    async def pace() -> None:
        await trio.lowlevel.checkpoint()
        if len(server.paced) == 2:
            file.lose()
            file.die()

    async with serving(file, pace=pace) as server, client_of(server) as client:
        await client.send(request(DECODED))
        with pytest.raises((trio.BrokenResourceError, EOFError)):
            await client.reply()
        assert server.refused == {"body torn": 1}


# ---- admission


async def test_redirected_and_busy(whole: tuple[FillingFile, bytes]) -> None:
    file, content = whole
    admission = TestAdmission(Redirect("http://10.0.0.2:8771/v1/blobs/x/decoded"))
    async with serving(file, admission=admission) as server, client_of(server) as client:
        reply = await client.get(DECODED, "Range: bytes=10-19,30-39")
        assert (reply.status, reply.headers["location"]) == (307, "http://10.0.0.2:8771/v1/blobs/x/decoded")
        admission.answer = Busy(2.3)
        reply = await client.get(DECODED)
        assert (reply.status, reply.headers["retry-after"]) == (429, "3")
        assert server.refused == {"redirected": 1, "busy": 1}
    assert (admission.asked, admission.over) == ([(10, 40), (0, SIZE)], [])
    assert content


async def test_curl_follows_a_redirect(tmp_path: Path, whole: tuple[FillingFile, bytes]) -> None:
    file, content = whole
    async with serving(file) as other:
        admission = TestAdmission(Redirect(other.url(DECODED)))
        async with serving(FillingFile(tmp_path / "busy", content), admission=admission) as server:
            assert await curl("-L", "-r", "5-9", server.url(DECODED)) == content[5:10]
            assert server.counters.bytes_sent == 0
