"""Which kind of profiler report a file is, by its first bytes; its name says nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec

from bench.traces.readers.source import PIECE, Source

KINDS = (
    "PyTorch's and other Chrome traces, JAX's xplane.pb, nsys's SQLite export, cProfile's .prof, speedscope"
)
_SEARCHED = 1 << 26  # bytes of a JSON file in which its kind must show

_CHROME = re.compile(rb'"traceEvents"\s*:\s*\[')
_BENCHMARKS = re.compile(rb'"benchmarks"\s*:\s*\[')
_SPEEDSCOPE = re.compile(rb'"https?://www\.speedscope\.app/file-format-schema\.json"')
_LONGEST_MARK = 200  # bytes that each of these may take, spaces included
_EMPTY_LIST = re.compile(rb"\[\s*\]?\s*$")
_BETWEEN_ENTRIES = re.compile(r"[\s,]*+")
_CUT = object()
_OF_EVENTS = frozenset(("ph", "ts", "pid"))
_KEY_OF_EVENTS = re.compile(rb'"(ph|ts|pid)"\s*:')
_MARSHALLED = re.compile(rb"[\x7b\xfb]([()\xa8\xa9]|0$)")  # a dictionary whose first key is a tuple

_OTHERS = {
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it first",
    b"\xfd7zXZ\x00": "compressed with xz; unpack it first",
    b"BZh": "compressed with bzip2; unpack it first",
    b"\x89PNG": "a picture",
    b"\x7fELF": "a program",
    b"%PDF": "a PDF",
}


class SomethingElse(ValueError):
    """The file is whole, and no profiler report."""


class Benchmarks(SomethingElse):
    """The file holds benchmark results, which are no profiler report but have commands of their own."""


def recognise(path: str | Path) -> str:
    """chrome, speedscope, xplane, nsys or cprofile. ValueError: none of them, with what it is instead."""
    with Source(path) as source:
        head = source.read()
        if not head.strip():
            raise ValueError(f"{path} is empty{' once unzipped' * source.zipped}; expected {KINDS}")
        if head.startswith(b"SQLite format 3\x00"):
            if source.zipped:
                raise ValueError(f"{path} is a zipped SQLite file; unzip it first")
            return "nsys"
        if _MARSHALLED.match(head):
            return "cprofile"
        if is_xplane(head):
            return "xplane"
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
        if text[:1] == b"[":
            return _kind_of_list(source, text)
        if text[:1] == b"{":
            return _kind_of_object(source, text)
        raise ValueError(f"{path} is {_guess(Path(path), head)}; expected {KINDS}")


def _kind_of_list(source: Source, text: bytes) -> str:
    """By its first entry that is not empty; where that is damaged, by the keys in it."""
    if _EMPTY_LIST.match(text):
        return "chrome"
    first = _first_entry(text)
    while first is _CUT and len(text) < _SEARCHED and (piece := source.read(max(PIECE, len(text)))):
        text += piece
        first = _first_entry(text)
    of_events = isinstance(first, dict) and bool(_OF_EVENTS & set(first))
    if of_events or (first is _CUT and _KEY_OF_EVENTS.search(text, 0, PIECE)):
        return "chrome"
    wrong = f"{source.path} is a JSON list, but not of trace events; expected {KINDS}"
    raise ValueError(wrong) if first is _CUT else SomethingElse(wrong)


def _first_entry(text: bytes) -> Any:
    """Of a JSON list, its first entry that is no empty object; an empty one where there is no other, and
    ``_CUT`` where the entry is not whole."""
    scanner, letters = json.JSONDecoder(strict=False), text.decode("utf-8", "replace")
    found: Any = {}
    position = 1
    while found == {}:
        between = _BETWEEN_ENTRIES.match(letters, position)
        position = between.end() if between else position
        if letters[position : position + 1] == "]":
            break
        try:
            found, position = scanner.raw_decode(letters, position)
        except (ValueError, RecursionError):
            return _CUT
    return found


def _kind_of_object(source: Source, text: bytes) -> str:
    pieces, seen = [text], b""
    while text:
        part = seen + text
        chrome = _CHROME.search(part)
        if _BENCHMARKS.search(part, 0, chrome.start() if chrome else len(part)):
            raise Benchmarks(
                f"{source.path} holds benchmark results, no profiler report: perflab report {source.path} "
                "shows them, perflab compare compares them"
            )
        if chrome:
            return "chrome"
        if _SPEEDSCOPE.search(part):
            return "speedscope"
        seen = part[-_LONGEST_MARK:]  # in which a mark may begin
        text = source.read() if source.offset < _SEARCHED else b""
        pieces.append(text)
    whole = b"".join(pieces)
    keys = ", ".join(dict.fromkeys(re.findall(r'"(\w{1,30})"\s*:', whole[:2000].decode("utf-8", "replace"))))
    wrong = (
        f"{source.path} is JSON, but no report known here (keys: {keys[:100] or 'none'}); a list "
        "'traceEvents' or speedscope's $schema was expected"
    )
    # Of a file that is longer than what is searched the rest is not known; nor is it worth reading.
    raise SomethingElse(wrong) if source.offset >= _SEARCHED or _is_json(whole) else ValueError(wrong)


def _is_json(data: bytes) -> bool:
    """Whether it is well formed; also as Python writes it (NaN)."""
    try:
        msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        return True
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        json.loads(data)
        return True
    except (ValueError, RecursionError):
        return False


def is_xplane(data: bytes) -> bool:
    """Whether the outermost messages are those of an XSpace, the first plane having a name or an id; ``data``
    may be only the file's beginning."""
    position = 0
    while position < len(data):
        if data[position] not in (0x0A, 0x12, 0x1A, 0x22):  # planes, errors, warnings, hostnames
            return False
        size, begin = _varint(data, position + 1)
        if size < 0:
            return position > 0
        if position == 0 and data[begin : begin + 1] not in (b"\x08", b"\x12"):  # of a plane: id, name
            return False
        position = begin + size
    return bool(data)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number and where it ends; (-1, ...) where there is none."""
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(data):
            break
        value |= (data[position] & 0x7F) << shift
        position += 1
        if data[position - 1] < 0x80:
            return value, position
    return -1, position


def _guess(path: Path, head: bytes) -> str:
    if path.suffix in (".nsys-rep", ".qdrep"):
        return "Nsight Systems' own format; export it with nsys export --type sqlite"
    if head[:1] == b"\x0a":
        return "no XSpace (perhaps a trace of Perfetto in its own format: save it as JSON)"
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            return name
    begins = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in head[:16])
    return f"no profiler report (it begins with '{begins}')"
