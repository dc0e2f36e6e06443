"""Which tables of Nsight Systems' SQLite export hold slices, and how each names them.

From "SQLite Schema Reference" in the user guide of Nsight Systems. Tables and columns come and go with what
was traced and with the version; a column that a file lacks counts as empty.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_COPIES = {1: "HtoD", 2: "DtoH", 3: "HtoA", 4: "AtoH", 5: "AtoA", 6: "AtoD", 7: "DtoA", 8: "DtoD", 9: "HtoH"}
_COPIES |= {10: "PtoP", 11: "managed HtoD", 12: "managed DtoH", 13: "managed DtoD"}
_WAITS = {1: "Event Sync", 2: "Stream Wait Event", 3: "Stream Sync", 4: "Context Sync"}
_VERSION = re.compile(r"(_v\d+)?(_ptsz|_ptds)?$")  # cudaLaunchKernel_v7000

Name = Callable[[sqlite3.Row, Mapping[int, str]], str]


@dataclass(frozen=True)
class Table:
    """category: as in ``classify``. on_device: its slices lie on a stream, else on a thread."""

    category: str
    name: Name
    columns: tuple[str, ...]
    on_device: bool = False


def _string(*columns: str) -> Name:
    return lambda row, strings: next((strings[row[c]] for c in columns if row[c] in strings), "(no name)")


def _call(row: sqlite3.Row, strings: Mapping[int, str]) -> str:
    """Of a call into a library: without the version of its interface. A kernel's _v2 is another kernel."""
    return _VERSION.sub("", strings.get(row["nameId"], "(no name)"), count=1)


def _range(row: sqlite3.Row, strings: Mapping[int, str]) -> str:
    return str(row["text"] or strings.get(row["textId"]) or "(no text)")


def _kind(prefix: str, column: str, kinds: Mapping[int, str]) -> Name:
    return lambda row, strings: f"{prefix} {kinds.get(row[column], '(other)')}".strip()


_CALL = ("globalTid", "correlationId", "nameId")
_WORK = ("deviceId", "streamId", "globalPid", "correlationId")
_LIBRARY = Table("cpu_op", _call, _CALL)
_MPI = Table("mpi", _string("textId"), ("globalTid", "textId", "size"))

TABLES = {
    "CUPTI_ACTIVITY_KIND_KERNEL": Table(
        "kernel", _string("demangledName", "shortName"), (*_WORK, "demangledName", "shortName"), True
    ),
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": Table(
        "kernel", lambda row, strings: f"CUDA graph {row['graphId']}", (*_WORK, "graphId"), True
    ),
    "CUPTI_ACTIVITY_KIND_MEMCPY": Table(
        "gpu_memcpy", _kind("Memcpy", "copyKind", _COPIES), (*_WORK, "copyKind", "bytes"), True
    ),
    "CUPTI_ACTIVITY_KIND_MEMSET": Table("gpu_memset", _kind("Memset", "", {}), (*_WORK, "bytes"), True),
    "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION": Table(
        "cuda_sync", _kind("", "syncType", _WAITS), (*_WORK, "syncType"), True
    ),
    "CUPTI_ACTIVITY_KIND_RUNTIME": Table("cuda_runtime", _call, _CALL),
    "PROFILER_OVERHEAD": Table("overhead", _string("nameId"), _CALL),
    "NVTX_EVENTS": Table("user_annotation", _range, ("globalTid", "text", "textId")),
    "CUBLAS_EVENTS": _LIBRARY,
    "CUDNN_EVENTS": _LIBRARY,
    "OSRT_API": Table("python_function", _string("nameId"), _CALL),
    "MPI_COLLECTIVES_EVENTS": _MPI,
    "MPI_P2P_EVENTS": _MPI,
    "MPI_START_WAIT_EVENTS": _MPI,
    "MPI_OTHER_EVENTS": Table("runtime", _string("textId"), ("globalTid", "textId")),
}
