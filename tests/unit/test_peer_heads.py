"""The heads of answers, which are written without h11; h11 reads them here as a client would."""

import h11
import pytest

from backend.peers.http_heads import render_answer


@pytest.mark.parametrize("status", [200, 206, 304, 307, 400, 404, 405, 409, 413, 416, 429, 431, 503])
def test_a_client_reads_what_was_written(status: int) -> None:
    headers = [(b"content-length", b"0"), (b"etag", b'"sha256:00"')]
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "peer")]))
    client.send(h11.EndOfMessage())
    client.receive_data(render_answer(status, headers))
    answer = client.next_event()
    assert isinstance(answer, h11.Response)
    assert (answer.status_code, list(answer.headers)) == (status, headers)
    assert answer.reason
    assert isinstance(client.next_event(), h11.EndOfMessage)


@pytest.mark.parametrize("value", [b"a\r\nSet-Cookie: b", b"a\nb", b"a\rb", b"\r\n\r\n"])
def test_a_header_cannot_become_two(value: bytes) -> None:
    with pytest.raises(ValueError, match="line break"):
        render_answer(307, [(b"location", value)])
