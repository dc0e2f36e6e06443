"""What the controller and the ranks of a world say to each other through a TCPStore, and how long they wait.

commands                  counts the commands sent
command/NUMBER            JSON: the operation and its arguments
answer/NUMBER/RANK        pickle: what the operation returned, or {"error": one line}
broken                    why the ranks that torchrun started are of no more use
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

ADDRESS = "PERFLAB_WORLD"  # in a rank's environment: host:port/size of the world's store
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells the ranks it starts. Processes that are to be no rank, or another world's, must not
find it in their environment."""

START_SECONDS, ANSWER_SECONDS = 120.0, 120.0
# Shorter than an answer's: a rank that waits in vain for another one says so before the controller gives up.
COLLECTIVE_SECONDS = 90.0
IDLE_SECONDS = 3600.0  # a rank without a command for so long ends
# For the others' answers once a rank has raised: it may have left them waiting in a collective.
GRACE_SECONDS = 10.0
BROKEN = "broken"


def joined_address() -> str:
    """Address of the world that torchrun started and this process measures with; empty without one."""
    return os.environ.get(ADDRESS, "")


def joined_size() -> int:
    """Ranks of the world that torchrun started and this process measures with; 0 without one."""
    return parse(joined_address())[2] if joined_address() else 0


def address_of(port: int, size: int) -> str:
    """The address of this machine's store at ``port``, of a world of ``size`` ranks."""
    return f"127.0.0.1:{port}/{size}"


def parse(address: str) -> tuple[str, int, int]:
    """(host, port, size)."""
    host, rest = address.rsplit(":", 1)
    port, size = rest.split("/")
    return host, int(port), int(size)


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is no rank of the launcher's that started this one."""
    return {name: value for name, value in environment.items() if name not in LAUNCHER}


def open_store() -> Any:
    """A world's store, in this process, at a free port."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=START_SECONDS), wait_for_workers=False)


def connect(host: str, port: int) -> Any:
    """A client of a store. It serves one call at a time: a thread of its own needs a client of its own."""
    from torch.distributed import TCPStore

    return TCPStore(host, port, None, False, timedelta(seconds=START_SECONDS))


def command_key(number: int) -> str:
    return f"command/{number}"


def answer_key(number: int, rank: int) -> str:
    return f"answer/{number}/{rank}"


def send(store: Any, operation: str, **content: Any) -> int:
    """Send one command to every rank; its number."""
    number = int(store.add("commands", 1))
    store.set(command_key(number), json.dumps({"operation": operation, **content}))
    return number


def received(store: Any, number: int) -> tuple[str, dict[str, Any]]:
    """Wait for a command: (operation, its arguments)."""
    key = command_key(number)
    store.wait([key], timedelta(seconds=IDLE_SECONDS))
    content = json.loads(store.get(key))
    return content.pop("operation"), content


def answer(store: Any, number: int, rank: int, content: dict[str, Any]) -> None:
    """Answer a command. What pickle refuses raises, and nothing is sent."""
    store.set(answer_key(number, rank), pickle.dumps(content))


def answered(store: Any, number: int, rank: int) -> dict[str, Any]:
    """Take a rank's answer, which is there, from the store."""
    key = answer_key(number, rank)
    content = store.get(key)
    store.delete_key(key)
    return pickle.loads(content)
