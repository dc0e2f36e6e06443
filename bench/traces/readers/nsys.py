"""Nsight Systems, exported with ``nsys export --type sqlite``.

The file is opened unchangeable, only plain tables of its are read, and a query that works without end is
stopped. Times are nanoseconds from the start of the session.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import numpy as np

from bench.traces.classify import classify
from bench.traces.events import Lane, Memory, Trace, distinct
from bench.traces.readers.columns import LONGEST_NS, Codes, Columns, integer
from bench.traces.readers.nsys_tables import TABLES, Table

_ROWS = 20_000
_PATIENCE_S = 60.0  # for one part of a table
_PROCESS = 1 << 24  # globalTid holds the process above its 24 bits of thread
_IN_PROCESS = 1 << 40  # correlation ids count from 1 in each process
_MEMORY = "CUDA_GPU_MEMORY_USAGE_EVENTS"
_DEVICE_MEMORY, _FREED = 2, 1  # ENUM_CUDA_MEM_KIND, ENUM_CUDA_DEV_MEM_EVENT_OPER
_Gpus = dict[tuple[int, int], int]  # (process, its number of a device) -> number of the GPU in the machine


class _Export:
    """The database: the plain tables in it, and rows of them as dictionaries."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)
        self.connection.text_factory = lambda text: text.decode("utf-8", "replace")
        self.connection.row_factory = sqlite3.Row
        self.connection.execute("PRAGMA trusted_schema = OFF")
        self._deadline = 0.0
        self.connection.set_progress_handler(lambda: time.monotonic() > self._deadline, 100_000)
        self._deadline = time.monotonic() + _PATIENCE_S
        rows = self.connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
        plain = [
            str(row["name"]) for row in rows if re.match(r"CREATE TABLE\b", str(row["sql"]), re.IGNORECASE)
        ]
        self.tables = {name: self._columns(name) for name in plain}

    def _columns(self, table: str) -> set[str]:
        return {str(row["name"]) for row in self.connection.execute(f"PRAGMA table_info({_quoted(table)})")}

    def parts(self, table: str, columns: tuple[str, ...]) -> Iterator[list[sqlite3.Row]]:
        """Lists of rows; a column that the table lacks is empty in them."""
        has = self.tables.get(table)
        if has is None:
            return
        wanted = ", ".join(_quoted(c) if c in has else f"NULL AS {_quoted(c)}" for c in columns)
        self._deadline = time.monotonic() + _PATIENCE_S
        cursor = self.connection.execute(f"SELECT {wanted} FROM {_quoted(table)}")
        while part := cursor.fetchmany(_ROWS):
            yield part
            self._deadline = time.monotonic() + _PATIENCE_S  # the time that the reader took does not count

    def count(self, table: str) -> int:
        self._deadline = time.monotonic() + _PATIENCE_S
        return int(self.connection.execute(f"SELECT count(*) FROM {_quoted(table)}").fetchone()[0])


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def read(path: str | Path) -> Trace:
    """ValueError: damaged, or a database of something else."""
    try:
        export = _Export(path)
        with closing(export.connection):
            return _trace(export)
    except sqlite3.OperationalError as error:
        why = f"a table took more than {_PATIENCE_S:.0f} s to read" if "interrupted" in str(error) else error
        raise ValueError(f"{path} cannot be read as nsys's SQLite export: {why}") from None
    except (sqlite3.Error, OverflowError, UnicodeError, MemoryError) as error:
        raise ValueError(f"{path} is a damaged SQLite file: {error}") from None


def _trace(export: _Export) -> Trace:
    found = [name for name in TABLES if name in export.tables]
    if not found or "StringIds" not in export.tables:
        there = ", ".join(sorted(export.tables)[:5]) or "no table"
        raise ValueError(
            f"{export.path} is an SQLite file, but no export of nsys: it has {there}; StringIds and tables "
            "such as CUPTI_ACTIVITY_KIND_KERNEL or NVTX_EVENTS were expected"
        )
    strings = {
        integer(row["id"]): str(row["value"])
        for part in export.parts("StringIds", ("id", "value"))
        for row in part
    }
    columns, lanes, processes = Columns(export.path), Codes(), Codes()
    for name in found:
        for part in export.parts(name, ("start", "end", *TABLES[name].columns)):
            _add(columns, TABLES[name], name, part, strings, lanes, processes)
    for name in sorted(set(export.tables) - {*found, _MEMORY}):
        if export.tables[name] & {"start", "timestamp", "rawTimestamp"} and (count := export.count(name)):
            columns.dropped[f"rows of {name}"] += count
    gpus = _gpus(export)
    memory, dropped = _memory(export, gpus)
    events, origin = columns.finish(classify)
    session = next(iter(export.parts("TARGET_INFO_SESSION_START_TIME", ("utcEpochNs",))), [])
    epoch = integer(session[0]["utcEpochNs"], 0) if session else 0
    models = [str(row["name"]) for part in export.parts("TARGET_INFO_GPU", ("name",)) for row in part]
    return Trace(
        source=export.path,
        format="nsys",
        events=events,
        names=columns.used_names,
        lanes=_labels(export, strings, lanes, processes, gpus),
        memory=Memory(memory.time - origin, memory.allocated, memory.device),
        origin_ns=epoch + origin if epoch > 0 else 0,
        dropped=columns.dropped + dropped,
        unclassified=columns.unclassified,
        facts={"device": models[0], "devices": str(len(models))} if models else {},
    )


def _gpus(export: _Export) -> _Gpus:
    """Which GPU each process means by a number: CUDA_VISIBLE_DEVICES renumbers them for each."""
    return {
        (integer(row["pid"]) % _PROCESS, integer(row["cudaId"])): integer(row["gpuId"])
        for part in export.parts("TARGET_INFO_CUDA_DEVICE", ("pid", "cudaId", "gpuId"))
        for row in part
        if 0 <= integer(row["gpuId"]) < 1 << 20
    }


def _add(
    columns: Columns,
    table: Table,
    table_name: str,
    part: list[sqlite3.Row],
    strings: dict[int, str],
    lanes: Codes,
    processes: Codes,
) -> None:
    start, end = (np.array([integer(row[c], -1) for row in part], np.int64) for c in ("start", "end"))
    good = (start >= 0) & (end >= start) & (end < LONGEST_NS)
    if not good.all():
        columns.dropped[f"rows of {table_name} without a start and an end (marks)"] += int((~good).sum())
        part = [row for row, kept in zip(part, good.tolist(), strict=True) if kept]
        start, end = start[good], end[good]
    names, lane, correlation = [], [], []
    for row in part:
        names.append(columns.names[table.name(row, strings)])
        thread = integer(row["globalPid"] if table.on_device else row["globalTid"], 0)
        process = processes[thread // _PROCESS]
        place = (
            (integer(row["deviceId"]), integer(row["streamId"]))
            if table.on_device
            else (-1, thread % _PROCESS)
        )
        lane.append(lanes[process, *place])
        call = integer(row["correlationId"]) if "correlationId" in table.columns else -1
        correlation.append(process * _IN_PROCESS + call if 0 <= call < _IN_PROCESS else -1)
    size = next((c for c in ("bytes", "size") if c in table.columns), None)
    columns.add(
        start=start,
        duration=end - start,
        name=np.array(names, np.int32),
        category=np.full(len(part), columns.categories[table.category], np.int32),
        lane=np.array(lane, np.int32),
        correlation=np.array(correlation, np.int64),
        bytes=np.array([integer(row[size]) if size else -1 for row in part], np.int64),
    )


def _labels(
    export: _Export, strings: dict[int, str], lanes: Codes, processes: Codes, gpus: _Gpus
) -> list[Lane]:
    threads = {
        integer(row["globalTid"]): strings.get(integer(row["nameId"]), "")
        for part in export.parts("ThreadNames", ("globalTid", "nameId"))
        for row in part
    }
    named = {
        integer(row["globalPid"]) // _PROCESS: str(row["name"] or "")
        for part in export.parts("PROCESSES", ("globalPid", "name"))
        for row in part
    }
    serial = list(processes)
    found = []
    for process, device, place in lanes:
        number = serial[process] % _PROCESS
        if device >= 0:
            of = f", process {number}" if len(serial) > 1 else ""
            gpu = gpus.get((number, device))
            if gpu is None:
                found.append(Lane(f"GPU {device}{of}", f"stream {place}", device))
            else:  # processes that share a GPU have streams of the same numbers on it
                found.append(Lane(f"GPU {gpu}", f"stream {place}{of}", gpu))
        else:
            name = threads.get(serial[process] * _PROCESS + place, "")
            label = Path(named.get(serial[process], "")).name or "process"
            found.append(Lane(f"{label} {number}", f"thread {place} ({name})" if name else f"thread {place}"))
    return found


def _memory(export: _Export, gpus: _Gpus) -> tuple[Memory, Counter[str]]:
    """Of the devices, from what was allocated and freed, beginning with nothing."""
    rows, dropped = [], Counter[str]()
    columns = ("start", "globalPid", "deviceId", "bytes", "memKind", "memoryOperationType")
    for part in export.parts(_MEMORY, columns):
        for row in part:
            if row["memKind"] not in (None, _DEVICE_MEMORY):
                dropped["samples of memory that is no device's"] += 1
                continue
            sign = -1 if row["memoryOperationType"] == _FREED else 1
            process, number = integer(row["globalPid"], 0) // _PROCESS % _PROCESS, integer(row["deviceId"], 0)
            gpu = gpus.get((process, number), number)
            rows.append((integer(row["start"], 0), gpu, sign * integer(row["bytes"], 0)))
    if not rows:
        return Memory.empty(), dropped
    when, device, change = (np.array(column, np.int64) for column in zip(*sorted(rows), strict=True))
    allocated = np.zeros(len(when), np.int64)
    for one in distinct(device):
        allocated[device == one] = np.cumsum(change[device == one])
    return Memory(when, allocated, device.astype(np.int32)), dropped
