"""A short-lived helper program: fed once, read to a limit, ended by a deadline."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import trio


class OutputTooLong(Exception):
    """The program printed more than it may."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended; a negative `returncode` is the signal. Its output may be a secret."""

    returncode: int
    output: bytes = field(repr=False)


async def run_bounded(
    command: Sequence[str],
    given: bytes,
    *,
    timeout_s: float,
    output_max_bytes: int,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Runs `command` with `given` on its standard input; its standard error goes nowhere.

    Raises `OSError` when it cannot be started, `trio.TooSlowError`, and `OutputTooLong`. A program that has
    not ended by itself then is killed with its process group; what one that has ended left behind (an agent
    for its keys, say) stays.
    """
    process = await trio.lowlevel.open_process(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        with trio.fail_after(timeout_s):
            output = await _converse(process, given, output_max_bytes)
            return Finished(await process.wait(), output)
    finally:
        with trio.CancelScope(shield=True):
            await _end(process)


async def _converse(process: trio.Process, given: bytes, output_max_bytes: int) -> bytes:
    assert process.stdin is not None
    assert process.stdout is not None
    output = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_feed, process.stdin, given)
        while piece := await process.stdout.receive_some(65536):
            output += piece
            if len(output) > output_max_bytes:
                nursery.cancel_scope.cancel()
                break
    if len(output) > output_max_bytes:
        raise OutputTooLong
    return bytes(output)


async def _feed(stdin: trio.abc.SendStream, given: bytes) -> None:
    # A program need not read what it is given.
    with contextlib.suppress(trio.BrokenResourceError):
        async with stdin:
            await stdin.send_all(given)


async def _end(process: trio.Process) -> None:
    if process.returncode is None:  # not reaped: the number is still its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            await stream.aclose()
    await process.wait()
