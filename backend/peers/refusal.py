"""Why a request was not answered as asked, or a connection was given up: counted, and said to the client."""

import enum


class Refusal(enum.StrEnum):
    """The reasons, as they are counted."""

    CONNECTIONS = "too many connections"
    CONNECTIONS_OF_PEER = "too many connections of one peer"
    TLS = "TLS handshake failed"
    CERTIFICATE = "certificate refused"
    HEAD_TIMEOUT = "head not complete in time"
    IDLE = "idle for too long"
    HEAD_TOO_LARGE = "head too large"
    NOT_HTTP = "not HTTP"
    BODY = "request with a body"
    METHOD = "method not allowed"
    TARGET = "no such resource"
    HEADER = "header malformed"
    RANGE = "range refused"
    NOT_HERE = "not here"
    UNAVAILABLE = "would not come here"
    REDIRECTED = "redirected"
    BUSY = "busy"
    PAUSED = "paused"
    STALLED = "client stopped reading"
    GONE = "client has gone"
    TORN = "body torn"
    FAULT = "fault of ours"


class Refused(Exception):
    """Ends a request, before the head of its answer, with a short answer. The connection goes on."""

    def __init__(
        self, status: int, refusal: Refusal, text: str, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(text)
        self.status = status
        self.refusal = refusal
        self.text = text
        self.headers = headers


class Dropped(Exception):
    """Ends a connection at once. `answer` is a last word to a client that may still listen, or None."""

    def __init__(self, refusal: Refusal, answer: Refused | None = None) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal
        self.answer = answer
