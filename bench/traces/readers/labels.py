"""What processes and threads are called, and which of them are devices."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from bench.traces.events import Lane

_DEVICE_LABEL = re.compile(r"(?:GPU|MTIA|XPU|HPU|NPU|TPU|PRIVATEUSEONE)[ :]?(\d+)", re.IGNORECASE)
_DEVICE_PROCESS = re.compile(r"/device:(?:GPU|TPU|CUSTOM)[^:]*:(\d+)", re.IGNORECASE)


class Labels:
    """Collects the metadata of a file; process and thread are numbers or words, "5" is 5."""

    def __init__(self) -> None:
        self._process: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self._labelled: Counter[str] = Counter()  # processes by their label
        self._thread: dict[tuple[str, str], str] = {}

    def add(self, what: str, process: Any, thread: Any, text: str) -> None:
        """``what`` as in a Chrome trace: process_name, process_labels or thread_name."""
        if what == "process_name":
            self._process[str(process)] = text.strip()
        elif what == "process_labels":
            self._labelled[self._labels.get(str(process), "")] -= 1
            self._labels[str(process)] = text.strip()
            self._labelled[text.strip()] += 1
        elif what == "thread_name":
            self._thread[str(process), str(thread)] = text.strip()

    def of_jax(self) -> bool:
        """XLA's profiler calls its processes /host:CPU, /device:GPU:0 ..."""
        return any(name.startswith(("/host:", "/device:")) for name in self._process.values())

    def lane(self, process: str, thread: str, device: int | None = None) -> Lane:
        """``device`` where its slices say so (-1 the host); else the label of its process may."""
        label, name = self._labels.get(process, ""), self._process.get(process, "")
        found = _DEVICE_LABEL.fullmatch(label) or _DEVICE_PROCESS.match(name)
        if device is None:
            device = min(int(found[1]), 1 << 20) if found else -1
        of_device = device >= 0
        if of_device and label:
            # In a trace merged from ranks each rank may have a GPU 0 of its own.
            alone = self._labelled[label] == 1
            name = label if alone else f"{name or 'process'} {process}, {label}"
        elif not name.startswith("/"):
            name = f"{name or 'process'} {process}"
        word = "stream" if of_device else "thread"
        return Lane(name, self._thread.get((process, thread)) or f"{word} {thread}", device)
