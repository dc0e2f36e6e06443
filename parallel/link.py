"""A torch.distributed backend around any other, which counts what is communicated and can slow it down.

``init_process_group("link")`` is gloo, counted. ``link.wrap("gloo", latency=1e-3, seconds_per_byte=2e-8)``
names a backend whose transfers take as long as on such a link, while the processor is free: overlap shows on
two cores.

    name = link.wrap("gloo", latency=1e-3, seconds_per_byte=1 / 50e6)
    dist.init_process_group(name, ...)
    with link.counted() as traffic:
        train_step()
    traffic.payload  # {"all_reduce": 1048576}

Each rank has one link, shared by all its groups, that sends one message and receives one at a time (Thakur
2005, section 3). A message leaves when those before it have left and ``latency + bytes * seconds_per_byte``
have passed; it counts as received when it has arrived and as much time has passed on the receiving side,
counted from the posted receive: receives that arrive together queue up. A collective is the inner backend's
own, so its messages are not seen: it is charged what its usual algorithm costs (``COSTS``;
collective_costs.py), from the moment all have called and the link is free. Nothing is subtracted for the
inner backend's time: choose delays well above it.

In a group of one rank nothing is communicated: its calls are counted, and have no payload.

How it is done: a subclass of dist.ProcessGroup whose methods count and hand on to an inner plain group. What
torch calls from C++ (DDP's reducer, functional collectives) comes through the same methods, as far as the
class has trampolines for it (torch/csrc/distributed/c10d/PyProcessGroup.hpp), and for those of 2.13 it has.

Limits: torch.ops.c10d.* called by hand with a boxed group goes to the inner backend uncounted;
``dist.batch_isend_irecv`` coalesces only on groups of exactly torch's class, so over NCCL write
``with dist._coalescing_manager(group, device)`` yourself.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from parallel.collective_costs import (
    direct_gather_cost,
    message_cost,
    pairwise_all_to_all_cost,
    ring_all_gather_cost,
    ring_all_reduce_cost,
    ring_reduce_scatter_cost,
    rounds,
    tree_broadcast_cost,
    tree_reduce_cost,
)
from parallel.inner_group import backends_of, plain_group
from parallel.link_lanes import Lanes
from parallel.link_work import LinkWork
from parallel.traffic import Traffic, blocked, count_bytes, counted, record

__all__ = ["LinkGroup", "Traffic", "counted", "seconds", "wrap"]

# What ProcessGroup calls it, under this torch's names and older ones -> what torch.distributed calls it.
OPERATIONS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
}

P2P = ("send", "recv")  # those with a peer

COSTS: dict[str, Callable[[float, int, float, float], float]] = {
    "all_reduce": ring_all_reduce_cost,
    "all_gather": ring_all_gather_cost,
    "reduce_scatter": ring_reduce_scatter_cost,
    "all_to_all": pairwise_all_to_all_cost,
    "broadcast": tree_broadcast_cost,
    "reduce": tree_reduce_cost,
    "gather": direct_gather_cost,
    "scatter": direct_gather_cost,
    "barrier": lambda size, world_size, latency, seconds_per_byte: rounds(world_size) * latency,
    "send": lambda size, world_size, latency, seconds_per_byte: message_cost(size, latency, seconds_per_byte),
    "recv": lambda size, world_size, latency, seconds_per_byte: message_cost(size, latency, seconds_per_byte),
}


def seconds(operation: str, payload: int, world_size: int, latency: float, seconds_per_byte: float) -> float:
    """How long a link is charged for one call (payload in bytes as ``Traffic`` counts it; gather and
    scatter: at the root, whose payload is the whole; another rank sends or receives one message)."""
    return COSTS[operation](payload, world_size, latency, seconds_per_byte)


class LinkGroup(dist.ProcessGroup):
    """A process group that counts, delays, and hands on to ``inner``."""

    def __init__(self, inner: dist.ProcessGroup, name: str, lanes: Lanes) -> None:
        super().__init__(inner.rank(), inner.size())
        self.inner, self.lanes, self._backend_name, self._group_name = inner, lanes, name, ""
        self._coalescing: list[float] | None = None  # seconds of the calls so far, between start and end

    def run(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dist.Work:
        """Count one call, make it, and give back the work that takes as long as the link."""
        operation = OPERATIONS[method]
        values = (*args, *kwargs.values())
        payload = max(map(count_bytes, values), default=0) if self.size() > 1 else 0
        duration = self._seconds(operation, payload, values)
        device = next(_devices(values), torch.device("cpu"))

        def issue() -> dist.Work:
            return getattr(self.inner, method)(*args, **kwargs)

        if self._coalescing is None:
            peer = f", {'to' if method == 'send' else 'from'} rank {args[1]}" if method in P2P else ""
            work = self._work(issue, f"{operation} of {payload} bytes{peer}", operation, duration, device)
        else:
            work = issue()
            self._coalescing.append(duration)
        record(operation, payload)
        return work

    def _work(
        self,
        issue: Callable[[], dist.Work],
        what: str,
        operation: str,
        duration: float,
        device: torch.device,
    ) -> LinkWork:
        name = self._group_name or "default"
        with blocked():
            what = f"rank {self.rank()} of {self.size()}, group {name}: {what}"
            return LinkWork(issue, what, self.lanes, operation, duration, device)

    def _seconds(self, operation: str, payload: int, values: tuple[Any, ...]) -> float:
        lanes = self.lanes
        if operation in ("gather", "scatter"):
            of_root = values[0] if operation == "gather" else values[1]  # empty elsewhere
            if not count_bytes(of_root):
                operation = "send"
        return seconds(operation, payload, self.size(), lanes.latency, lanes.seconds_per_byte)

    def _start_coalescing(self, device: torch.device) -> None:
        self.inner._start_coalescing(device)
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> dist.Work:
        durations, self._coalescing = self._coalescing or [], None
        what = f"{len(durations)} coalesced calls"
        return self._work(
            lambda: self.inner._end_coalescing(device), what, "coalesced", sum(durations), device
        )

    # What a plain group answers from its backends.
    def _get_backend(self, device: torch.device) -> Any:
        return self.inner._get_backend(device)

    @property
    def _device_types(self) -> list[torch.device]:
        return self.inner._device_types

    def _set_group_name(self, name: str) -> None:
        self._group_name = name
        self.inner._set_group_name(name)

    @property
    def group_name(self) -> str:
        return self._group_name

    def getGroupName(self) -> str:
        return self._group_name

    def getBackendName(self) -> str:
        return self._backend_name

    def name(self) -> str:
        return self._backend_name

    def _set_group_desc(self, description: str) -> None:
        self.inner._set_group_desc(description)

    @property
    def group_desc(self) -> str:
        return self.inner.group_desc

    def set_timeout(self, timeout: Any) -> None:
        self.inner.set_timeout(timeout)

    def abort(self) -> None:
        self.inner.abort()

    def shutdown(self) -> None:
        self.inner.shutdown()


def _intercepted(method: str) -> Callable[..., dist.Work]:
    def call(self: LinkGroup, *args: Any, **kwargs: Any) -> dist.Work:
        return self.run(method, args, kwargs)

    call.__name__ = method
    return call


for _method in OPERATIONS:
    if hasattr(dist.ProcessGroup, _method):  # older torches lack the newer names
        setattr(LinkGroup, _method, _intercepted(_method))


def _devices(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value.device
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _devices(part)


def wrap(inner: str, latency: float = 0.0, seconds_per_byte: float = 0.0) -> str:
    """Register a backend around ``inner`` and return its name for ``init_process_group`` and ``new_group``.

    inner: "gloo", "nccl", a registered plugin ("shm"), or several as in "cpu:gloo,cuda:nccl".
    latency: seconds a message; seconds_per_byte: 1 / bandwidth. Zero: only count.
    The same arguments give the same backend. ValueError: an unknown inner backend, a negative or infinite
    delay.
    """
    for what, value in (("latency", latency), ("seconds_per_byte", seconds_per_byte)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{what} must be a finite number of seconds, at least 0; got {value}")
    known = {"gloo", "nccl", *map(str.lower, dist.Backend._plugins)}
    for part in inner.split(","):
        if (backend := part.rpartition(":")[2]) not in known:
            raise ValueError(
                f"unknown backend {backend!r} to wrap: know {', '.join(sorted(known))}; "
                "a plugin must be registered first (import parallel.shm)"
            )
    delay = f"_{latency:g}_{seconds_per_byte:g}" if latency or seconds_per_byte else ""
    return _register(
        f"link_{inner.replace(':', '_').replace(',', '_')}{delay}", inner, latency, seconds_per_byte
    )


def _register(name: str, inner: str, latency: float, seconds_per_byte: float) -> str:
    if name.upper() not in dist.Backend._plugins:
        lanes = Lanes(latency, seconds_per_byte)  # one link of this process, for all groups of that name

        def create(options: Any, _backend_options: Any) -> LinkGroup:
            return LinkGroup(plain_group(inner, options), name, lanes)

        dist.Backend.register_backend(name, create, extended_api=True, devices=list(backends_of(inner)))
    return name


_register("link", "gloo", 0.0, 0.0)
