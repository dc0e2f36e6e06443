"""How Ray Train tells its ranks who they are: as torchrun does, in the same variables.

``TorchConfig`` itself would also initialise torch.distributed, over a plain backend. Here the ranks find each
other by ``parallel.elastic``, as under torchrun: they count their bytes, and notice when one of them is lost.

Imported where Ray Train is.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from ray.train.backend import Backend
from ray.train.torch import TorchConfig


class Launch(Backend):
    """Sets the variables in every rank, and initialises nothing."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, free_address)
        worker_group.execute(set_variables, address, port)


class Launched(TorchConfig):
    """For ``TorchTrainer(torch_config=...)``."""

    @property
    def backend_cls(self) -> Any:
        return Launch


def free_address() -> tuple[str, int]:
    """This node's address, and a port that is free now."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def set_variables(address: str, port: int) -> None:
    """Those that ``parallel.elastic.join`` reads."""
    from ray.train import get_context

    context = get_context()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
    )
