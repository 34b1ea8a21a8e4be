"""containerd's filters: which snapshots a List is about.

`labels."containerd.io/snapshot.ref"==sha256:...,parent=="..."`: selectors joined by commas must all hold, of
several filters one. A selector is a field alone (it is present), or a field with ==, != or ~= (a regular
expression, looked for anywhere) and a value. Grammar: containerd, filters/parser.go.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fuse.snapshotter.failures import RequestInvalid

Field = Callable[[tuple[str, ...]], str | None]
"""Gives the value of a field by its path; None where it is absent."""

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z0-9_]+")
_VALUE = re.compile(r"[^\s,]+")
_OPERATOR = re.compile(r"[=!~]+")
_QUOTED = re.compile(r'"((?:[^"\\\n]|\\.)*)"|\'((?:[^\'\\\n]|\\.)*)\'')
_ALTERNATIVE = re.compile(r"/((?:[^/\\\n]|\\.)*)/|\|((?:[^|\\\n]|\\.)*)\|")
"""Quotes for a regular expression only, in which a backslash is one."""
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)", re.DOTALL)
_ESCAPED = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


class Selector(NamedTuple):
    """One condition; `operator` is "" where the field has only to be there."""

    path: tuple[str, ...]
    operator: str
    value: str

    def holds(self, field: Field) -> bool:
        """Whether it is true of the object whose fields `field` gives."""
        found = field(self.path)
        if self.operator == "!=":
            return found != self.value
        if self.operator == "~=":
            return re.search(self.value, found or "") is not None
        return found is not None and (not self.operator or found == self.value)


class Filters:
    """Several filters, one of which must hold; none of them is true of everything."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises `RequestInvalid`."""
        self._any = [_Parser(text).selectors() for text in texts]

    def match(self, field: Field) -> bool:
        """Whether an object is meant."""
        return not self._any or any(all(part.holds(field) for part in parts) for parts in self._any)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def selectors(self) -> list[Selector]:
        if not self._text:
            return []
        found = [self._selector()]
        while not self._at_end():
            if not self._skip(","):
                raise self._fault("a comma is expected")
            found.append(self._selector())
        return found

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._skip("."):
            path.append(self._field())
        operator = self._take(_OPERATOR)
        if operator is None:
            return Selector(tuple(path), "", "")
        if operator not in ("==", "!=", "~="):
            raise self._fault(f"{operator} is no operator")
        value = self._value(operator)
        if operator == "~=":
            try:
                re.compile(value)
            except (re.error, OverflowError, RecursionError) as error:
                raise self._fault(f"regular expression: {error}") from None
        return Selector(tuple(path), operator, value)

    def _field(self) -> str:
        found = self._quoted()
        if found is None:
            found = self._take(_NAME)
        if found is None:
            raise self._fault("a field is expected")
        return found

    def _value(self, operator: str) -> str:
        found = self._quoted()
        if found is None and operator == "~=" and (match := self._match(_ALTERNATIVE)):
            return next(group for group in match.groups() if group is not None)
        if found is None:
            found = self._take(_VALUE)
        if found is None:
            raise self._fault("a value is expected")
        return found

    def _quoted(self) -> str | None:
        self._match(_SPACE)
        if self._text[self._at : self._at + 1] not in ('"', "'"):
            return None
        match = self._match(_QUOTED)
        if match is None:
            raise self._fault("the quote does not end")
        return _ESCAPE.sub(_unescaped, next(group for group in match.groups() if group is not None))

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        self._match(_SPACE)
        match = self._match(pattern)
        return match[0] if match else None

    def _skip(self, sign: str) -> bool:
        self._match(_SPACE)
        found = self._text.startswith(sign, self._at)
        self._at += len(sign) * found
        return found

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self._at)
        if match:
            self._at = match.end()
        return match

    def _at_end(self) -> bool:
        self._match(_SPACE)
        return self._at == len(self._text)

    def _fault(self, why: str) -> RequestInvalid:
        return RequestInvalid(why=f"filter {self._text[:200]!r}, at {self._at}: {why}")


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    if len(code) > 1:
        number = int(code, 8) if code.isdecimal() else int(code[1:], 16)
        return chr(number) if number < 0x110000 else match[0]
    return _ESCAPED.get(code, code)
