"""The socket on which a mount without an agent tells of itself."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from backend.json_api import ApiRequest, serve_api
from fuse.agent.request import STATUS_TARGET
from fuse.supervisor.listener import listen


async def serve_status(
    path: Path,
    status: Callable[[], msgspec.Struct],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answers `GET /api/v1/status` on the socket `path` until cancelled, then removes it."""

    async def answer(request: ApiRequest) -> msgspec.Struct:
        await trio.lowlevel.checkpoint()
        return status()

    listener = listen(path)
    try:
        task_status.started()
        await serve_api(listener, {("GET", STATUS_TARGET): answer})
    finally:
        path.unlink(missing_ok=True)
