"""What a parser may do with bytes that nobody vouches for."""

from collections.abc import Iterator
from contextlib import contextmanager

from rafs.errors import NydusError


@contextmanager
def value_or_error() -> Iterator[None]:
    """The block runs through or raises an error of this project that has something to say.

    Anything else, an `IndexError` say, is a bug and passes.
    """
    try:
        yield
    except NydusError as error:
        if not str(error):
            raise AssertionError(f"{type(error).__name__} says nothing") from error
