"""containerd's side of the snapshotter: the gRPC service over a `Snapshotter`.

Concurrency: gRPC calls each handler in a thread of its pool. Calls that wait for a registry or the agent take
a thread each while they wait, so there are many.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import empty_pb2

from fuse.snapshotter import snapshots_pb2 as pb
from fuse.snapshotter.failures import RootUnusable, SnapshotError
from fuse.snapshotter.mounts import Mount
from fuse.snapshotter.records import Snapshot
from fuse.snapshotter.snapshotter import Snapshotter
from fuse.supervisor.listener import is_served
from rafs.errors import NydusError

log = logging.getLogger(__name__)

SERVICE = "containerd.services.snapshots.v1.Snapshots"
THREADS = 128
LIST_AT_ONCE = 100
MESSAGE_MAX_BYTES = 16 << 20
"""containerd's own limit."""


class SnapshotService:
    """The methods of the protocol, by their names there."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def prepare(self, request: Any) -> Any:
        """A new active snapshot."""
        return _mounts(self._snapshotter.prepare(request.key, request.parent, dict(request.labels)))

    def view(self, request: Any) -> Any:
        """A new read-only snapshot."""
        return _mounts(self._snapshotter.view(request.key, request.parent, dict(request.labels)))

    def mounts(self, request: Any) -> Any:
        """The mounts of one of these."""
        return _mounts(self._snapshotter.mounts(request.key))

    def commit(self, request: Any) -> Any:
        """An active snapshot becomes a committed one."""
        self._snapshotter.commit(request.name, request.key, dict(request.labels))
        return empty_pb2.Empty()

    def remove(self, request: Any) -> Any:
        """A snapshot goes."""
        self._snapshotter.remove(request.key)
        return empty_pb2.Empty()

    def stat(self, request: Any) -> Any:
        """What a snapshot is."""
        return pb.InfoResponse(info=_info(self._snapshotter.stat(request.key)))

    def update(self, request: Any) -> Any:
        """Labels change."""
        labels, paths = dict(request.info.labels), list(request.update_mask.paths)
        return pb.InfoResponse(info=_info(self._snapshotter.update(request.info.name, labels, paths)))

    def list(self, request: Any) -> Iterator[Any]:
        """All snapshots that are meant, some in each message."""
        found = self._snapshotter.list(list(request.filters))
        for first in range(0, len(found), LIST_AT_ONCE):
            yield pb.ListResponse(info=map(_info, found[first : first + LIST_AT_ONCE]))

    def usage(self, request: Any) -> Any:
        """What a snapshot takes."""
        usage = self._snapshotter.usage(request.key)
        return pb.UsageResponse(size=usage.size_bytes, inodes=usage.inodes)

    def cleanup(self, request: Any) -> Any:
        """What was removed is freed."""
        self._snapshotter.cleanup()
        return empty_pb2.Empty()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a server needs to call them."""
        key, answer = pb.KeyRequest, pb.MountsResponse
        unary: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
            "Prepare": (self.prepare, pb.PrepareRequest, answer),
            "View": (self.view, pb.PrepareRequest, answer),
            "Mounts": (self.mounts, key, answer),
            "Commit": (self.commit, pb.CommitRequest, empty_pb2.Empty),
            "Remove": (self.remove, key, empty_pb2.Empty),
            "Stat": (self.stat, key, pb.InfoResponse),
            "Update": (self.update, pb.UpdateRequest, pb.InfoResponse),
            "Usage": (self.usage, key, pb.UsageResponse),
            "Cleanup": (self.cleanup, pb.CleanupRequest, empty_pb2.Empty),
        }
        methods = {
            name: grpc.unary_unary_rpc_method_handler(
                _guarded(name, method), request.FromString, answered.SerializeToString
            )
            for name, (method, request, answered) in unary.items()
        }
        methods["List"] = grpc.unary_stream_rpc_method_handler(
            _guarded_stream("List", self.list), pb.ListRequest.FromString, pb.ListResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)


def start_service(snapshotter: Snapshotter, address: Path) -> grpc.Server:
    """A server on the unix socket `address`, for root alone; one left by a dead process is replaced.

    Raises `RootUnusable` when it cannot be, or somebody listens there.
    """
    if address.exists() and is_served(address):
        raise RootUnusable(where=address, why="somebody serves this socket already")
    address.unlink(missing_ok=True)
    server = grpc.server(
        futures.ThreadPoolExecutor(THREADS, "snapshots"),
        options=[
            ("grpc.max_receive_message_length", MESSAGE_MAX_BYTES),
            ("grpc.max_send_message_length", MESSAGE_MAX_BYTES),
        ],
    )
    server.add_generic_rpc_handlers((SnapshotService(snapshotter).handlers(),))
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix://{address}")
    except RuntimeError as error:
        raise RootUnusable(
            where=address, why="cannot listen there; is the path longer than 107 bytes?"
        ) from error
    finally:
        os.umask(mask)
    server.start()
    return server


def _guarded(name: str, method: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    def call(request: Any, context: grpc.ServicerContext) -> Any:
        start = time.monotonic()
        try:
            answer = method(request)
        except Exception as error:
            _fail(name, request, error, context)
        log.debug("%s %s: %.1f ms", name, _subject(request), (time.monotonic() - start) * 1e3)
        return answer

    return call


def _guarded_stream(
    name: str, method: Callable[[Any], Iterator[Any]]
) -> Callable[[Any, grpc.ServicerContext], Iterator[Any]]:
    def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(request)
        except Exception as error:
            _fail(name, request, error, context)

    return call


def _fail(name: str, request: Any, error: Exception, context: grpc.ServicerContext) -> None:
    """Ends the call with the code that containerd acts on."""
    if isinstance(error, SnapshotError):
        log.debug("%s %s: %s", name, _subject(request), error)
        context.abort(getattr(grpc.StatusCode, error.code), str(error))
    if isinstance(error, NydusError):
        log.warning("%s %s: %s", name, _subject(request), error)
        context.abort(grpc.StatusCode.UNKNOWN, str(error))
    log.error("fault in %s %s", name, _subject(request), exc_info=error)
    context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")


def _subject(request: Any) -> str:
    return str(getattr(request, "key", "") or getattr(request, "info", ""))


def _mounts(mounts: Sequence[Mount]) -> Any:
    return pb.MountsResponse(
        mounts=[pb.Mount(type=mount.type, source=mount.source, options=mount.options) for mount in mounts]
    )


def _info(snapshot: Snapshot) -> Any:
    info = pb.Info(
        name=snapshot.name, parent=snapshot.parent, kind=snapshot.kind.name, labels=snapshot.labels
    )
    info.created_at.FromNanoseconds(snapshot.created_ns)
    info.updated_at.FromNanoseconds(snapshot.updated_ns)
    return info
