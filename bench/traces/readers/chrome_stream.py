"""The events of a Chrome trace, a piece of the file at a time.

The format (Chromium's "Trace Event Format") is one JSON object whose ``traceEvents`` is a list of events, or
that list alone. It is cut between two events wherever a piece of the file ends, and each part is decoded as a
list of its own, so that the whole document is never in memory.

Where may one cut? ``},{`` also occurs inside strings and inside nested lists. But a part that begins at an
event and is cut in one of those is no valid JSON list once it is closed with ``]``: decoding it proves the
cut right. The decoder's error also tells where the list of events ends and the rest of the object begins.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec

from bench.traces.readers.chrome_event import Event, ExactEvent, lenient
from bench.traces.readers.source import PIECE, Source

LARGEST = 1 << 26  # bytes of one event, of what precedes the events, of what follows them
_SUSPECT = 1 << 23  # bytes after which no cut was right: events hold long lists of objects
_BETWEEN = re.compile(rb"\}\s*,\s*(?=\{)")
_EVENTS_KEY = re.compile(rb'"traceEvents"\s*:\s*\[')
_BYTE = re.compile(r"\(byte (\d+)\)")
_TOO_DEEP = "brackets are nested more deeply than in any report"


class _WrongCut(Exception):
    """This part is cut inside an event."""


class _NotStrict(Exception):
    """This part is not JSON as the standard has it; perhaps as Python writes it."""


class ChromeStream:
    """Iterates lists of events; afterwards ``document`` holds the other keys of the object.

    dropped: what could not be read as an event, counted. notes: how the file departs from the format.
    ValueError, when iterated: the file is no Chrome trace, ends early, or is no JSON; it says at which byte.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.document: dict[str, Any] = {}
        self.dropped: Counter[str] = Counter()
        self.notes: list[str] = []
        self.is_array = False
        self._buffer = bytearray()  # what is taken from its front is not copied
        self._base = 0  # offset of the buffer in the (unzipped) file
        self._count = 0
        self._at_end_of_file = False
        self._done = False
        self._many, self._one = msgspec.json.Decoder(list[Event]), msgspec.json.Decoder(Event)
        self._is_exact = False
        self._structure = msgspec.json.Decoder(list[msgspec.Raw])

    def __iter__(self) -> Iterator[list[Event]]:
        self._skip_header()
        while not self._done:
            while len(self._buffer) < PIECE and not self._at_end_of_file:
                self._more("end of an event")
            try:
                events = self._next_strict()
            except _NotStrict:
                self._note_once("not strict JSON (NaN or the like)")
                events = self._next_tolerant()
            except RecursionError:
                raise self.source.broken(_TOO_DEEP, self._base) from None
            self._count += len(events)
            yield events
            del events  # before the next ones are decoded
        self._read_footer()

    def _more(self, wanted: str) -> None:
        if len(self._buffer) > LARGEST:
            raise self.source.broken(f"no {wanted} within {LARGEST >> 20} MiB from here", self._base)
        piece = self.source.read()
        self._at_end_of_file = not piece
        self._buffer += piece

    def _note_once(self, what: str) -> None:
        unit = "unzipped byte" if self.source.zipped else "byte"
        if not self.notes:
            self.notes.append(f"{what} from {unit} {self._base} on")

    def _advance(self, size: int) -> None:
        del self._buffer[:size]
        self._base += size

    def _skip_header(self) -> None:
        while not self._buffer.strip() and not self._at_end_of_file:
            self._advance(len(self._buffer))
            self._more("JSON")
        self._advance(len(self._buffer) - len(self._buffer.lstrip(b"\xef\xbb\xbf \t\r\n")))
        self.is_array = self._buffer[:1] == b"["
        if self.is_array:
            return self._advance(1)
        if self._buffer[:1] != b"{":
            raise self.source.broken("a Chrome trace begins with '{' or '['", self._base)
        seen = 0
        while True:
            for match in list(_EVENTS_KEY.finditer(self._buffer, seen)):
                header = _object(self._buffer[: match.end()] + b"]}")
                if header is not None:  # else the key stands in a string or deeper down
                    self.document = header
                    return self._advance(match.end())
            seen = max(0, len(self._buffer) - 100)
            if self._at_end_of_file:
                raise self.source.broken("the file ends before a list 'traceEvents'", self.source.offset)
            self._more("list 'traceEvents'")

    def _next_strict(self) -> list[Event]:
        """Whole events from the front of the buffer, as many as there are."""
        for tail in (1 << 16, len(self._buffer)):  # events longer than 64 KiB are rare
            begin = max(0, len(self._buffer) - tail)
            cuts = [(match.start() + 1, match.end()) for match in _BETWEEN.finditer(self._buffer, begin)]
            if cuts:
                break
        for cut, following in reversed(cuts[-4:]):
            try:
                with memoryview(self._buffer) as whole, whole[:cut] as front:
                    part = b"".join((b"[", front, b"]"))
                events, end = self._decode(part)
            except _WrongCut:
                continue
            self._done = end is not None
            self._advance(following if end is None else end)
            return events
        if not self._at_end_of_file:
            if cuts and len(self._buffer) > _SUSPECT:
                return self._next_tolerant()  # one event after the other: it needs no cut
            self._more("end of an event")
            return []
        try:
            events, end = self._decode(b"[" + self._buffer)
        except _WrongCut:
            return self._next_tolerant()  # finds out what is missing
        self._done = True
        self._advance(len(self._buffer) if end is None else end)
        return events

    def _decode(self, part: bytes) -> tuple[list[Event], int | None]:
        """Its events, and where in the buffer the list of events has ended before the part does."""
        try:
            events = self._many.decode(part)
            if not self._is_exact and _needs_exact_times(events):
                self._is_exact = True
                self._many, self._one = (
                    msgspec.json.Decoder(list[ExactEvent]),
                    msgspec.json.Decoder(ExactEvent),
                )
                events = self._many.decode(part)
            return events, None
        except msgspec.ValidationError:
            return self._decode_singly(part)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            end = _end_of_list(part, error)
        return self._decode(part[:end])[0], end - 1  # the buffer lacks the part's first bracket

    def _decode_singly(self, part: bytes) -> tuple[list[Event], int | None]:
        """Of a part in which something has a wrong type."""
        try:
            raw = self._structure.decode(part)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            end = _end_of_list(part, error)
            return self._decode_singly(part[:end])[0], end - 1
        events: list[Event] = []
        for text in raw:
            try:
                events.append(self._one.decode(text))
            except (msgspec.DecodeError, UnicodeDecodeError):
                data = json.loads(bytes(text).decode("utf-8", "replace"), strict=False)
                event = self._kept(data)
                if event is not None:
                    events.append(event)
        return events, None

    def _kept(self, data: Any) -> Event | None:
        """What is kept of an event that Python's own reader has parsed."""
        try:
            return self._one.decode(msgspec.json.encode(data))  # NaN becomes null: no number either
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError):
            return lenient(data, ExactEvent if self._is_exact else Event, self.dropped)

    def _next_tolerant(self) -> list[Event]:
        """Whole events from the front of the buffer, by Python's own reader: NaN, control characters and
        bytes that are no UTF-8 pass."""
        text = self._buffer.decode("utf-8", "surrogateescape")  # so that positions lead back to bytes
        scanner, position = json.JSONDecoder(strict=False), 0
        events: list[Event] = []
        while True:
            while position < len(text) and text[position] in " \t\r\n,":
                position += 1
            if text[position : position + 1] == "]":
                self._done, position = True, position + 1
                break
            try:
                data, position = scanner.raw_decode(text, position)
            except RecursionError:
                raise self.source.broken(_TOO_DEEP, self._base) from None
            except ValueError as error:
                if self._at_end_of_file:
                    self._stop(text, position, error, self._count + len(events))
                break
            event = self._kept(data)
            if event is not None:
                events.append(event)
        self._advance(len(text[:position].encode("utf-8", "surrogateescape")))
        if not events and not self._done:
            for _ in range(1 + len(self._buffer) // PIECE):  # doubled, as all of it is parsed again
                self._more("end of an event")
        return events

    def _stop(self, text: str, position: int, error: ValueError, whole: int) -> None:
        """At the end of a file whose list of events is not closed: the format allows that of a bare list."""
        if self.is_array and not text[position:].strip():
            self.notes.append("the list of events is not closed; the format allows that")
            self._done = True
            return
        at = error.pos if isinstance(error, json.JSONDecodeError) else position
        in_the_middle = not text[at:].strip() or "Unterminated" in str(error)
        what = "the file ends in the middle" if in_the_middle else f"no JSON ({str(error).split(':')[0]})"
        at = len(text) if in_the_middle else at
        raise self.source.broken(
            f"{what}, after {whole} whole events: profilers do not write in order of time, so what is there "
            "would give a false picture and is not reported",
            self._base + len(text[:at].encode("utf-8", "surrogateescape")),
        )

    def _read_footer(self) -> None:
        rest = bytes(self._buffer) + self.source.rest(LARGEST)
        if self.is_array:
            if rest.strip():
                raise self.source.broken("nothing was expected after the list of events", self._base)
            return
        footer = _object(b'{"traceEvents":[]' + rest)
        if footer is None:
            raise self.source.broken(
                f"what follows the {self._count} events does not close the object around them", self._base
            )
        if footer["traceEvents"]:
            self.dropped["events of a second list 'traceEvents'"] += len(footer["traceEvents"])
        self.document |= footer


def _needs_exact_times(events: list[Event]) -> bool:
    """Whether these are microseconds since 1970 with decimals, more digits than a float64 has."""
    times = [event.ts for event in events[:100] if isinstance(event.ts, float)]
    return any(abs(time) >= 1 << 43 and time % 1 for time in times)


def _end_of_list(part: bytes, error: Exception) -> int:
    """Where in the part its first list ends, by the decoder's error; else the error means something else."""
    found = _BYTE.search(str(error))
    if isinstance(error, UnicodeDecodeError):
        raise _NotStrict from None
    if "truncated" in str(error) or (
        found and int(found[1]) >= len(part) - 1 and "trailing" not in str(error)
    ):
        raise _WrongCut from None
    if "trailing characters" in str(error) and found:
        return len(part[: int(found[1]) - 1].rstrip())
    raise _NotStrict from None


def _object(text: bytes | bytearray) -> dict[str, Any] | None:
    try:
        data = json.loads(text.decode("utf-8", "replace"), strict=False)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
