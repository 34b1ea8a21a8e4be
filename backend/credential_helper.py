"""Asking a docker credential helper (`docker-credential-NAME get`)."""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec
import trio

from backend.bounded_process import Finished, OutputTooLong, run_bounded
from backend.contract import BackendError

PROGRAM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
"""Of a helper or plugin: one name, which leads to no other directory."""
LONGEST_ANSWER_BYTES = 1 << 20


class CredentialsUnusable(BackendError):
    """The credential file or helper that is configured cannot be used."""

    message = "{where}: no credentials from it: {why}"
    exit_code: ClassVar[int] = 42


class HelperAnswer(msgspec.Struct):
    """What a helper prints."""

    username: str = msgspec.field(default="", name="Username")
    secret: str = msgspec.field(default="", name="Secret")

    def __repr__(self) -> str:
        return f"HelperAnswer({self.username!r}, ...)"


async def ask_helper(name: str, key: str, timeout_s: float) -> HelperAnswer | None:
    """What helper `name` knows about server `key`, None for nothing. Raises `CredentialsUnusable`."""
    program = f"docker-credential-{name}"
    if not PROGRAM_NAME.fullmatch(name):
        raise CredentialsUnusable(where=repr(program), why="not the name of a credential helper")
    return _answer(program, await ask_program([program, "get"], key.encode(), timeout_s))


async def ask_program(
    command: Sequence[str], given: bytes, timeout_s: float, environment: Mapping[str, str] | None = None
) -> Finished:
    """How a program that knows credentials ends, fed with `given`. Raises `CredentialsUnusable`."""
    program = command[0]
    try:
        return await run_bounded(
            command,
            given,
            timeout_s=timeout_s,
            output_max_bytes=LONGEST_ANSWER_BYTES,
            environment=environment,
        )
    except trio.TooSlowError:
        raise CredentialsUnusable(where=program, why=f"no answer within {timeout_s:g} s") from None
    except OutputTooLong:
        why = f"printed more than {LONGEST_ANSWER_BYTES} bytes"
        raise CredentialsUnusable(where=program, why=why) from None
    except OSError as error:
        why = f"cannot be started ({(error.strerror or 'unknown reason').lower()})"
        raise CredentialsUnusable(where=program, why=why) from error


def _answer(program: str, done: Finished) -> HelperAnswer | None:
    if done.returncode != 0:
        # The protocol of docker-credential-helpers: this text, on stdout, means "none stored".
        if b"credentials not found" in done.output:
            return None
        raise CredentialsUnusable(where=program, why=f"failed with exit code {done.returncode}")
    try:
        answer = msgspec.json.decode(done.output, type=HelperAnswer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CredentialsUnusable(where=program, why="did not print the JSON that was expected") from None
    return answer if answer.secret else None
