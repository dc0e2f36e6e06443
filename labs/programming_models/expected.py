"""What is counted of each way of the four small programs, before it runs."""

from __future__ import annotations

from labs.lab import Prediction
from labs.programming_models import behaviours
from labs.programming_models.config import Config
from labs.programming_models.ways import unavailable


def expected(config: Config) -> dict[tuple[str, str], dict[str, float]]:
    """(program, way) -> what is counted of it: graphs (compilations), effects, refused (1) or not (0)."""
    shapes = config.shapes
    buckets = len({(3 + 2 * index - 1).bit_length() for index in range(shapes)})
    graphs = {
        ("branch", "torch_compile"): 3.0,  # up to the branch, and each of its two ends
        ("branch", "torch_cond"): 1.0,
        ("branch", "jax_cond"): 1.0,
        ("branch", "numba"): 1.0,
        ("new_shapes", "torch_compile"): 2.0,  # the second shape makes the length a symbol
        ("new_shapes", "torch_static"): float(min(shapes, behaviours.RECOMPILE_LIMIT)),
        ("new_shapes", "torch_dynamic"): 1.0,
        ("new_shapes", "jax_jit"): float(shapes),
        ("new_shapes", "jax_padded"): float(buckets),
        ("new_shapes", "numba"): 1.0,
    }
    refused = {
        ("branch", "torch_fullgraph"), ("branch", "torch_export"), ("branch", "fx"), ("branch", "jax_jit"),
        ("side_effect", "numba"), ("selection", "jax_jit"), ("new_shapes", "torch_export"),
    }  # fmt: skip
    effects = {
        "torch": 3.0,
        "torch_compile": 3.0,
        "jax": 3.0,
        "numpy": 3.0,
        "torch_export": 1.0,
        "fx": 1.0,
        "jax_jit": 1.0,
    }
    found: dict[tuple[str, str], dict[str, float]] = {}
    for program, ways in behaviours.WAYS.items():
        for way in ways:
            key = (program, way)
            counted = found[key] = {"refused": float(key in refused)}
            if key in graphs:
                counted["graphs"] = graphs[key]
            if program == "side_effect" and key not in refused:
                counted["effects"] = effects[way]
    return found


def predict(config: Config) -> list[Prediction]:
    because = {
        "refused": "1 where the way needs a value, a shape or a type that it does not have while it captures",
        "graphs": "one graph for each set of shapes, types and branches that it was captured for",
        "effects": "Python runs at each call where it is interpreted or replayed, once where it is captured",
    }
    return [
        Prediction(f"{program}/{way}", key, value, because[key], exact=True)
        for (program, way), counts in expected(config).items()
        if not unavailable(program, way)
        for key, value in counts.items()
    ]
