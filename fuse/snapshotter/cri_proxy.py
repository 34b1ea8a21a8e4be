"""A proxy of the CRI services of containerd, which learns the credentials of pulls on their way.

The kubelet is pointed to it with `--image-service-endpoint`. Every call of every method passes with its bytes
unchanged, whatever version of CRI it is; of PullImage alone the request is also read.

Concurrency: gRPC calls the handler in a thread of its pool for each call in progress.
"""

import logging
import os
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from backend.credentials import Credential
from fuse.snapshotter.cri_auths import CriAuths, Key, auth_of_pull
from rafs.errors import NydusError

log = logging.getLogger(__name__)

MESSAGE_MAX_BYTES = 16 << 20
"""The kubelet's and containerd's own limit (k8s.io/cri-client, maxMsgSize)."""
THREADS = 64
LONGEST_DEADLINE_S = 1e7
PULL_METHODS = frozenset(f"/runtime.{version}.ImageService/PullImage" for version in ("v1", "v1alpha2"))
_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
    ("grpc.max_send_message_length", MESSAGE_MAX_BYTES),
]
_OWN_METADATA = ("user-agent", "content-type", "te", "host")


class CannotProxy(NydusError):
    """The socket of the CRI proxy cannot be made."""

    message = "{path}: no CRI proxy here: {why}"
    exit_code = 219


class CriProxy:
    """A running proxy. Get one from `start_cri_proxy`."""

    def __init__(self, server: grpc.Server, channel: grpc.Channel, path: Path) -> None:
        self._server = server
        self._channel = channel
        self._path = path

    def stop(self, grace_s: float) -> None:
        """Ends it; blocks for `grace_s` at most while calls are in progress."""
        self._server.stop(grace_s).wait()
        self._channel.close()
        self._path.unlink(missing_ok=True)


def start_cri_proxy(path: Path, containerd: Path, auths: CriAuths) -> CriProxy:
    """Listens on the unix socket `path`, mode 0600, and forwards to the one of `containerd`.

    containerd need not be there: calls fail with UNAVAILABLE until it is. Raises `CannotProxy`.
    """
    # containerd and the kubelet name "localhost"; without it gRPC sends the path, which Go's server refuses.
    options = [*_OPTIONS, ("grpc.default_authority", "localhost")]
    channel = grpc.insecure_channel(f"unix://{containerd.absolute()}", options=options)
    pool = futures.ThreadPoolExecutor(THREADS, thread_name_prefix="cri-proxy")
    server = grpc.server(pool, handlers=[_Forwarding(channel, auths)], options=_OPTIONS)
    before = os.umask(0o177)
    try:
        path.unlink(missing_ok=True)
        server.add_insecure_port(f"unix://{path.absolute()}")
    except (OSError, RuntimeError) as error:
        channel.close()
        why = (isinstance(error, OSError) and error.strerror) or "the socket cannot be bound"
        raise CannotProxy(path=path, why=why.lower()) from error
    finally:
        os.umask(before)
    server.start()
    return CriProxy(server, channel, path)


class _Forwarding(grpc.GenericRpcHandler):  # type: ignore[misc] # untyped base
    """Answers any method: for the wire a call of one message is a stream of one."""

    def __init__(self, channel: grpc.Channel, auths: CriAuths) -> None:
        self._channel = channel
        self._auths = auths

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """The handler of a method; see `grpc.GenericRpcHandler`."""
        method = handler_call_details.method

        def forward(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            if method in PULL_METHODS:
                return self._forward_pull(method, requests, context)
            return _forward(self._channel, method, requests, context)

        return grpc.stream_stream_rpc_method_handler(forward)

    def _forward_pull(
        self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        learned: list[tuple[Key, Credential]] = []

        def watched() -> Iterator[bytes]:
            for request in requests:
                # Remembered before the pull has ended: the snapshotter needs it in the middle.
                if (found := auth_of_pull(request)) is not None and self._auths.remember(*found):
                    learned.append(found)
                yield request

        is_done = False
        try:
            yield from _forward(self._channel, method, watched(), context)
            is_done = True
        finally:
            if not is_done:
                for found in learned:
                    self._auths.forget(*found)


def _forward(
    channel: grpc.Channel, method: str, requests: Iterator[bytes], context: grpc.ServicerContext
) -> Iterator[bytes]:
    metadata = [
        (key, value) for key, value in context.invocation_metadata() if key.lower() not in _OWN_METADATA
    ]
    call: Any = channel.stream_stream(method)(requests, timeout=_timeout_s(context), metadata=metadata)
    # Who has gone meanwhile wants no answer.
    if not context.add_callback(call.cancel):
        call.cancel()
    try:
        context.send_initial_metadata(call.initial_metadata() or ())
        yield from call
        context.set_trailing_metadata(call.trailing_metadata() or ())
    except grpc.RpcError:
        context.set_trailing_metadata(call.trailing_metadata() or ())
        context.abort(call.code() or grpc.StatusCode.UNKNOWN, call.details() or "")


def _timeout_s(context: grpc.ServicerContext) -> float | None:
    """What is left of the caller's deadline; gRPC says centuries for none, and takes those for 0 s."""
    remaining_s = context.time_remaining()
    return remaining_s if remaining_s is not None and remaining_s < LONGEST_DEADLINE_S else None
