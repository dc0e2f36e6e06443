"""``python -m labs.jax_transforms.sharded_program DEVICES``: a product over host devices, as one JSON line.

A process of its own, since ``--xla_force_host_platform_device_count`` is read once, when JAX starts. The
devices share the cores that there are: this shows which collectives a layout needs, not how fast they are.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from labs.jax_transforms.arrays import random
from labs.jax_transforms.config import DIVIDED

ROWS, INNER, COLUMNS = DIVIDED, 2 * DIVIDED, 2 * DIVIDED
LAYOUTS = ("batch", "columns", "rows")
"""What is cut: rows of x; columns of w (the result is gathered); rows of w, and with them columns of x."""
COLLECTIVE = re.compile(r"= (\w+)\[([\d,]*)\]\S* (all-reduce|all-gather|reduce-scatter|all-to-all)\(")


def inputs() -> list[Any]:
    """x (64, 128) and w (128, 128), float32."""
    return random(81, (ROWS, INNER), (INNER, COLUMNS))


def sharded(layout: str, mesh: Any) -> Any:
    """The jitted product under a layout."""
    import jax
    from jax.sharding import PartitionSpec

    cut, whole = PartitionSpec("devices"), PartitionSpec()
    columns = PartitionSpec(None, "devices")
    ways = {
        "batch": (lambda x, w: x @ w, (cut, whole), cut),
        "columns": (
            lambda x, w: jax.lax.all_gather(x @ w, "devices", axis=1, tiled=True),
            (whole, columns),
            whole,
        ),
        "rows": (lambda x, w: jax.lax.psum(x @ w, "devices"), (columns, cut), whole),
    }
    function, given, made = ways[layout]
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=made, check_vma=False))


def collectives(hlo: str) -> dict[str, Any]:
    """Kinds, payload bytes and lines of the collectives in a compiled program."""
    found = [(match, line.strip()) for line in hlo.splitlines() if (match := COLLECTIVE.search(line))]
    sizes = []
    for match, _ in found:
        count = 1
        for size in filter(None, match[2].split(",")):
            count *= int(size)
        sizes.append(4 * count)
    return {
        "kinds": [match[3] for match, _ in found],
        "bytes": sum(sizes),
        "lines": [line for _, line in found],
    }


def report(devices: int) -> dict[str, Any]:
    import jax

    if len(jax.devices()) < devices:
        raise RuntimeError(f"JAX has {len(jax.devices())} devices, not {devices}: XLA_FLAGS came too late")
    x, w = map(jax.numpy.array, inputs())
    found: dict[str, Any] = {}
    mesh = jax.make_mesh(
        (devices,),
        ("devices",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    for layout in LAYOUTS:
        program = sharded(layout, mesh).lower(x, w).compile()
        placed = [
            jax.device_put(each, place)
            for each, place in zip((x, w), program.input_shardings[0], strict=True)
        ]
        found[layout] = collectives(program.as_text()) | {"result": program(*placed).reshape(-1).tolist()}
    return found


if __name__ == "__main__":
    from labs.concurrency.workers import die_with_parent

    die_with_parent()
    print(json.dumps(report(int(sys.argv[1]))))
