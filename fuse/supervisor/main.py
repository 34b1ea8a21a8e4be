"""The supervisor as a program: `RUN_DIR [--adopt PID FD] -- AGENT COMMAND`.

It is started without `site` and imports nothing but the standard library: it has to stay small, since the
kernel must never find no memory for it.
"""

import contextlib
import ctypes
import fcntl
import os
import resource
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fuse.supervisor.holdings import INDEX_NAME, KIND_LISTENER, Holdings
from fuse.supervisor.listener import is_served, listen
from fuse.supervisor.supervisor import Supervisor, log
from fuse.supervisor.systemd import ServiceManager, passed_descriptors

SOCKET_NAME = "agent.sock"
LOCK_NAME = "agent.lock"
LOG_NAME = "agent.log"
OOM_SCORE = "-900"
LOCK_PAUSE_S = 0.02
PR_SET_CHILD_SUBREAPER = 36
"""<linux/prctl.h>"""


def main(arguments: Sequence[str]) -> int:
    """Runs until the agent has nothing more to do; the exit code."""
    own, command = list(arguments[: arguments.index("--")]), list(arguments[arguments.index("--") + 1 :])
    run_dir = Path(own[0])
    lock = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not become_only_one(lock, run_dir / SOCKET_NAME):
        return 0
    raise_file_limit()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    become_reaper()
    passed = passed_descriptors(os.environ)
    manager = ServiceManager(os.environ.get("NOTIFY_SOCKET"))
    index = passed.pop(INDEX_NAME, -1)
    holdings = Holdings(manager.store if manager.is_there else None, index)
    if index >= 0:
        holdings.restore(passed)
    supervisor = Supervisor(command, holdings, manager)
    if own[1:2] == ["--adopt"]:
        supervisor.adopt(int(own[2]), socket.socket(fileno=int(own[3])))
    elif holdings.get(KIND_LISTENER) is None:
        listener = listen(run_dir / SOCKET_NAME).detach()
        holdings.put(KIND_LISTENER, KIND_LISTENER, {}, [listener])
    log(f"starts with {len(holdings)} entries held")
    code = supervisor.run()
    (run_dir / SOCKET_NAME).unlink(missing_ok=True)
    return code


def become_only_one(lock: int, path: Path) -> bool:
    """Takes the lock; False when another supervisor has it and serves. One that is ending is awaited."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if is_served(path):
                return False
            time.sleep(LOCK_PAUSE_S)


def become_reaper() -> None:
    """Makes the forks of a template our children once what has forked them is gone: we learn how they end."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def raise_file_limit() -> None:
    """As many open files as we may have: there are two for each blob, and one for each waiting reader."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
