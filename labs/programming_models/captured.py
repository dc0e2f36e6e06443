"""Captured programs as a reader wants to see them: without the places of files, without compilers' tables."""

from __future__ import annotations

import re

_FOLDERS = re.compile(r"(?:/[\w.+-]+)+/(?=[\w.+-]+\.py\b)")
# XLA lists files, functions and lines before the program: a heading, then rows until an empty line.
_TABLES = re.compile(r"^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*\n*", re.MULTILINE)
_METADATA = re.compile(r", metadata=\{[^}]*\}|, backend_config=\{.*\}$", re.MULTILINE)


def without_folders(text: str) -> str:
    """``File: /some/where/model.py:12`` as ``File: model.py:12``."""
    return _FOLDERS.sub("", text).strip()


def hlo(text: str) -> str:
    """XLA's optimized program without its tables of sources and what only the compiler reads."""
    return without_folders(_METADATA.sub("", _TABLES.sub("", text)))


def kernel(text: str) -> str:
    """Inductor's C++ from the kernel on: what is before it includes files by their path."""
    begin = text.find('extern "C"')
    return text[max(begin, 0) :].strip()
