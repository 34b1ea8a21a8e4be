"""The root of every error that a user may see."""

import errno as errno_codes
from typing import ClassVar


class NydusError(Exception):
    """Anything that nydus-py reports in one line instead of a traceback.

    Subclasses stand beside the code that raises them and set:

    - `message`: the template of the line; the constructor's arguments fill it by position or name.
    - `exit_code`: of the process, one per class (`docs/errors.md` is the table).
    - `errno`: what a reader of a mount gets.
    - `retryable`: whether the same call may succeed later.
    """

    message: ClassVar[str] = "{0}"
    exit_code: ClassVar[int] = 1
    errno: ClassVar[int] = errno_codes.EIO
    retryable: ClassVar[bool] = False

    def __init__(self, *args: object, **fields: object) -> None:
        super().__init__(*args)
        self.fields = fields

    def __str__(self) -> str:
        return self.message.format(*self.args, **self.fields)
