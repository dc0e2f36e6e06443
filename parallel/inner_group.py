"""A plain process group beside the one that torch.distributed knows: what ``parallel.link`` hands its calls
on to."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d


def backends_of(inner: str) -> dict[str, str]:
    """{device type: backend} of a backend string."""
    return dict(distributed_c10d.BackendConfig(dist.Backend(inner)).get_device_backend_map())


def plain_group(inner: str, options: Any) -> dist.ProcessGroup:
    """A plain group with the backends of ``inner``, as init_process_group would have made it."""
    rank, size, timeout = options.group_rank, options.group_size, options.timeout
    group = dist.ProcessGroup(options.store, rank, size)
    made: dict[str, Any] = {}
    for device, backend in backends_of(inner).items():
        kind = dist.Backend.backend_type_map[backend]
        if backend not in made:
            store = dist.PrefixStore(f"{backend}/", options.store)
            made[backend] = backend_object = _backend(backend, store, rank, size, timeout, options)
            if isinstance(backend_object, dist.ProcessGroup):
                return backend_object  # a backend written in Python is the whole group
            group._set_default_backend(kind)
        group._register_backend(torch.device(device), kind, made[backend])
    return group


def _backend(name: str, store: Any, rank: int, size: int, timeout: Any, options: Any) -> Any:
    ranks = options.global_ranks_in_group
    if name == "gloo":
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        gloo.options.global_ranks_in_group, gloo.options.group_name = ranks, options.group_id
        gloo._set_sequence_number_for_group()
        return gloo
    if name == "nccl":
        settings = dist.ProcessGroupNCCL.Options()
        settings._timeout, settings.global_ranks_in_group = timeout, ranks
        settings.group_name = options.group_id
        nccl = dist.ProcessGroupNCCL(store, rank, size, settings)
        nccl._set_sequence_number_for_group()
        return nccl
    plugin = dist.Backend._plugins[name.upper()]
    if not plugin.extended_api:
        return plugin.creator_fn(store, rank, size, timeout)
    inner_options = distributed_c10d._DistributedBackendOptions()
    inner_options.store, inner_options.timeout = store, timeout
    inner_options.group_rank, inner_options.group_size = rank, size
    inner_options.group_id, inner_options.global_ranks_in_group = options.group_id, ranks
    return plugin.creator_fn(inner_options, None)
