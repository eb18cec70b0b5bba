"""Forms: the fields and files that a browser sends, URL-encoded or multipart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from reqtable.http.head import BadRequest
from reqtable.table.errors import ConfigurationError

FIELDS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Part:
    """Holds one field of a form, or one file."""

    name: str
    data: bytes
    filename: str | None = None  # as the client names it: never use it as a path. "": no file was chosen
    content_type: str | None = None

    @property
    def text(self) -> str:
        """The data as text. Raises BadRequest if it is not UTF-8."""
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            raise BadRequest(400, f"the field {self.name!r} of the form is not UTF-8") from None


@dataclass(frozen=True, slots=True)
class Form:
    """Holds the parts of a form, in their order."""

    parts: list[Part] = field(default_factory=list)

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the text of the first field of that name."""
        part = self.part(name)
        return default if part is None else part.text

    def part(self, name: str) -> Part | None:
        """Return the first part of that name, such as a file; None: there is none."""
        return next((each for each in self.parts if each.name == name), None)

    def all(self, name: str) -> list[Part]:
        """Return all parts of that name."""
        return [each for each in self.parts if each.name == name]

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)


def parse_form(content_type: str, body: bytes) -> Form:
    """Return the form in `body`. Raises BadRequest if it is none, and ConfigurationError without the extra `http`."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded":
        try:
            pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=FIELDS_MAX)
        except ValueError:
            raise BadRequest(400, "the body is no URL-encoded form") from None
        return Form([Part(name, value.encode()) for name, value in pairs])
    if kind == "multipart/form-data":
        return Form(_multipart(content_type, body))
    raise BadRequest(415, "the body is no form: its Content-Type is neither URL-encoded nor multipart/form-data")


def _multipart(content_type: str, body: bytes) -> list[Part]:
    try:
        from python_multipart.exceptions import FormParserError
        from python_multipart.multipart import MultipartParser, parse_options_header
    except ImportError:
        raise ConfigurationError("multipart forms need python-multipart: pip install 'reqtable[http]'") from None
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise BadRequest(400, "a multipart form without a boundary")
    reader = _Reader(lambda field: parse_options_header(field)[1])
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise BadRequest(400, "the body is no multipart form") from None
    if not reader.is_whole:
        raise BadRequest(400, "a multipart form that is not complete")
    return reader.parts


class _Reader:
    """Collects the parts that a parser finds."""

    def __init__(self, parameters: Callable[[bytes], Mapping[bytes, bytes]]) -> None:
        self.parts: list[Part] = []
        self.is_whole = False
        self._parameters = parameters
        self._fields: dict[bytes, bytes] = {}
        self._name = self._value = b""
        self._data = bytearray()

    def callbacks(self) -> Any:
        return {f"on_{name}": getattr(self, name) for name in _CALLBACKS}

    def part_begin(self) -> None:
        self._fields, self._data = {}, bytearray()

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._fields[self._name.lower()] = self._value
        self._name = self._value = b""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]

    def part_end(self) -> None:
        if len(self.parts) >= FIELDS_MAX:
            raise BadRequest(413, f"a form with more than {FIELDS_MAX} parts")
        named = self._parameters(self._fields.get(b"content-disposition", b""))
        if b"name" not in named:
            raise BadRequest(400, "a part of a form without a name")
        kind = self._fields.get(b"content-type")
        filename = named.get(b"filename")
        self.parts.append(
            Part(
                named[b"name"].decode("utf-8", "replace"),
                bytes(self._data),
                None if filename is None else filename.decode("utf-8", "replace"),
                None if kind is None else kind.decode("latin-1"),
            )
        )

    def end(self) -> None:
        self.is_whole = True


_CALLBACKS = ("part_begin", "header_field", "header_value", "header_end", "part_data", "part_end", "end")
