"""What is multithreading vs multiprocessing?

Short answer: threads share memory and one lock, processes share nothing. Threads make *waiting* faster, and
work in compiled code that releases the lock (NumPy, numba with ``nogil``); pure Python only gets faster in
processes, once a task is long enough to pay for being sent (some 0.1 to 1 ms) and carries few enough bytes.

The formula (``labs/concurrency/model.py``):

    time = start-up + tasks x cost of a task + bytes x cost of a byte + work / workers that can run

where Python work in threads is divided by 1 and not by the workers. Setting two ways equal gives the
crossovers: processes win from the task length L* = (p - t) / (1 - 1/P), with p and t the cost of a task in
a process and in a thread and P the processes that run at once; and up to the payload
B* = (L (1 - 1/P) - (p - t)) / (2 c), with c the cost of a byte through pickle and pipe.

Sources: CPython documentation of concurrent.futures, multiprocessing and sys.setswitchinterval; PEP 703
(free threading); G. M. Amdahl, AFIPS 1967; Ray's paper (Moritz et al., OSDI 2018).

Importing this package is cheap, because each worker process imports it too: ``LAB`` is made when asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labs.lab import Lab

    LAB: Lab


def __getattr__(name: str) -> Any:
    if name == "LAB":
        from labs.concurrency.lab import LAB

        return LAB
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
