"""A results dictionary with everything in it: two columns, every verdict, every kind of figure.

The numbers are made up but belong to each other (ratio = measured/predicted and so on); no test takes
them for measurements.
"""

from __future__ import annotations

import math
import random
from typing import Any

from labs.figure import Bars, Chart, Series, Span, Timeline, to_json

COLUMNS = ("default", "tuned")


def machine() -> dict[str, Any]:
    sizes = [2.0**k for k in range(14, 31, 2)]
    return {
        "name": "2-core server CPU",
        "measured": True,
        "allocator": "default",
        "measured_at": "2026-11-22T18:40:00+00:00",
        "constants": {
            "cores": 2,
            "memory_bytes": 24.0e9,
            "l1d_bytes": 48 * 1024,
            "l2_bytes": 2 * 2**20,
            "l3_bytes": 260 * 2**20,
            "vector_float32_1_flops": 3.21e11,
            "vector_float32_all_flops": 6.15e11,
            "vector_float64_1_flops": 1.6e11,
            "vector_float64_all_flops": 3.1e11,
            "matrix_bfloat16_1_flops": 9.5e11,
            "matrix_bfloat16_all_flops": 1.9e12,
            "torch_call_s": 2.2e-6,
            "page_fault_s_per_byte": 1.1e-10,
        },
        "facts": {
            "processor": "Example 9000",
            "python": "3.11.2",
            "load": 0.4,
            "instructions": ["avx2", "avx512f"],
        },
        "sources": {},
        "curves": {
            name: {
                "working_set_bytes": sizes,
                "bytes_per_second": [top / (1 + (s / 2**21) ** 0.3) for s in sizes],
            }
            for name, top in (
                ("copy_1", 9e10),
                ("copy_all", 1.7e11),
                ("read_1", 1.1e11),
                ("read_all", 2.1e11),
            )
        },
        "gpu": None,
    }


def verdict(ratio: float) -> str:
    size = abs(math.log2(ratio))
    return "confirmed" if size <= 0.5 else "close" if size <= 1 else "off"


def prediction(
    column: str, variant: str, key: str, predicted: float, ratio: float | None, **more: Any
) -> dict[str, Any]:
    measured = None if ratio is None else predicted * ratio
    return {
        "column": column,
        "variant": variant,
        "key": key,
        "predicted": predicted,
        "measured": measured,
        "low": measured and measured * 0.94,
        "high": measured and measured * 1.07,
        "ratio": ratio,
        "verdict": "not measured" if ratio is None else verdict(ratio),
        "because": f"max(1.3e8 FLOP / 615 GFLOP/s, 100 MB / 23.9 GB/s) + 2.2 us = {predicted:.3g} s",
        "suspect": "page faults of the fresh output: the tuned allocator has none",
        "exact": False,
        **more,
    }


def lab(
    name: str, question: str, answer: str, columns: tuple[str, ...], figures: list[Any]
) -> dict[str, Any]:
    random.seed(name)
    ways = [
        "python",
        "numpy",
        "numba",
        "numba_simd",
        "numba_parallel",
        "jax_jit",
        "torch_eager",
        "torch_compile",
    ]
    work = {"roofline": ["add", "softmax"], "concurrency": ["sort", "wait"]}.get(
        name, ["pairwise", "black_scholes"]
    )
    predictions, groups, checks = [], [], []
    for group in work:
        rows = []
        base = 10 ** random.uniform(-2.5, -0.5)
        for column in columns:
            for rank, way in enumerate(ways):
                seconds = base * 0.45**rank * random.uniform(0.8, 1.2)
                ratio = 3.4 if (group, way) == (work[0], "numba_simd") else 2 ** random.gauss(0, 0.4)
                predictions.append(prediction(column, f"{group}/{way}", "time_s", seconds / ratio, ratio))
                speed = base / seconds
                rows.append(
                    {
                        "column": column,
                        "variant": f"{group}/{way}",
                        "seconds": seconds,
                        "low": seconds * 0.96,
                        "high": seconds * 1.05,
                        "cold_s": seconds * 3 + 0.8,
                        "cpu_s": seconds * 1.9,
                        "flops_per_s": 1.3e8 / seconds,
                        "bytes_per_s": None if rank % 2 else 1e8 / seconds,
                        "fraction_of_roof": min(0.97, 2e-4 / seconds),
                        "rounds": 31,
                        "speedup": None
                        if rank == 0
                        else {"value": speed, "low": speed * 0.9, "high": speed * 1.1, "verdict": "faster"},
                    }
                )
                checks.append(
                    {
                        "column": column,
                        "variant": f"{group}/{way}",
                        "error": 2.3e-7,
                        "tolerance": 1e-6,
                        "against": "float64 NumPy",
                        "passed": True,
                    }
                )
        groups.append({"group": group, "columns": list(columns), "rows": rows})
    logs = sorted(abs(math.log2(item["ratio"])) for item in predictions)
    predictions += [
        prediction("", "", "crossover_task_s", 0.0021, 1.7),
        prediction("", "", "sent_B", 16_777_216.0, 1.0, verdict="exact", exact=True),
        prediction("", f"{work[0]}/gpu", "time_s", 3.1e-5, None),
    ]
    return {
        "question": question,
        "answer": answer,
        "status": "done",
        "error": "",
        "seconds": 41.7,
        "sources": [
            "Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009. https://doi.org/10.1145/1498765.1498785"
        ],
        "settings": [{"name": "rows", "value": 1000, "unit": "rows", "help": "rows of each matrix"}],
        "command": f"perflab run {name} --quick",
        "predictions": predictions,
        "summary": {
            "times": len(logs),
            "median_abs_log2": logs[len(logs) // 2],
            "off": sum(x > 1 for x in logs),
        },
        "elsewhere": [
            {
                "machine": "NVIDIA H200",
                "variant": f"{work[0]}/gpu",
                "key": "time_s",
                "predicted": 3.1e-5,
                "because": "100 MB / 4.8 TB/s + 4 us",
            }
        ],
        "groups": groups,
        "checks": checks,
        "claims": [
            {
                "text": "SIMD is at least four times as fast as scalar code.",
                "verdict": "holds",
                "why": "A register holds 16 float32; loads and stores take the rest.",
            },
            {"text": "More threads always help.", "verdict": "fails", "why": "Memory bandwidth is shared."},
            {
                "text": "Compiled code beats eager code.",
                "verdict": "undecidable",
                "why": "The intervals overlap.",
            },
        ],
        "figures": [to_json(figure) for figure in figures],
        "listings": [
            {
                "variant": f"{work[0]}/jax_jit",
                "title": "jaxpr",
                "text": "{ lambda ; a:f32[3]. let\n    b:f32[3] = mul a 2.0\n  in (b,) }",
            }
        ],
        "unavailable": [{"variant": f"{work[0]}/cuda", "reason": "no CUDA device"}],
    }


def figures() -> dict[str, list[Any]]:
    intensity = [2.0**k for k in range(-5, 11)]
    roof = [min(6.15e11, 2.39e10 * x) for x in intensity]
    names = [
        "add",
        "sum",
        "softmax",
        "layernorm",
        "gelu",
        "exp",
        "matvec",
        "matmul 256",
        "matmul 1024",
        "transpose",
        "dot",
        "attention",
    ]
    at = [0.08, 0.12, 0.6, 0.55, 1.5, 1.4, 0.5, 40.0, 170.0, 0.05, 0.25, 60.0]
    reached = [0.8, 0.9, 0.55, 0.6, 0.5, 0.45, 0.85, 0.5, 0.8, 0.4, 0.9, 0.3]
    sizes = [2.0**k for k in range(10, 31)]
    tasks = [10 ** (k / 4) for k in range(-20, 1)]
    random.seed(1)
    workers = []
    for worker in range(4):
        clock, spans = 0.004 * worker, []
        for task in range(6):
            length = random.uniform(0.01, 0.05)
            spans.append(Span(clock, clock + length, ("compute", "wait", "send")[task % 3]))
            clock += length + 0.002
        workers.append((f"process {worker}", spans))
    return {
        "roofline": [
            Chart(
                "Operations on this machine's roofline",
                "arithmetic intensity (FLOP/B)",
                "speed (FLOP/s)",
                [
                    Series("limit float32", intensity, roof, "line"),
                    Series(
                        "limit of one core", intensity, [min(3.2e11, 1.2e10 * x) for x in intensity], "dashed"
                    ),
                    Series(
                        "measured",
                        at,
                        [r * min(6.15e11, 2.39e10 * x) for x, r in zip(at, reached, strict=True)],
                        "points",
                        names,
                    ),
                ],
                True,
                True,
            ),
            Chart(
                "Copy bandwidth over the working set",
                "working set (B)",
                "bandwidth (B/s)",
                [
                    Series("one thread", sizes, [9e10 / (1 + (s / 2**21) ** 0.4) for s in sizes], "line"),
                    Series("all cores", sizes, [1.7e11 / (1 + (s / 2**22) ** 0.4) for s in sizes], "line"),
                ],
                True,
                True,
            ),
        ],
        "concurrency": [
            Chart(
                "Time of 8 tasks over the length of a task",
                "task (s)",
                "time (s)",
                [
                    Series("threads predicted", tasks, [8 * t + 1e-4 for t in tasks], "dashed"),
                    Series(
                        "threads measured",
                        tasks[::3],
                        [8.4 * t + 1.2e-4 for t in tasks[::3]],
                        "points",
                        (),
                        [7.8 * t + 1e-4 for t in tasks[::3]],
                        [9 * t + 1.5e-4 for t in tasks[::3]],
                    ),
                    Series("processes predicted", tasks, [4 * t + 2e-2 for t in tasks], "dashed"),
                    Series(
                        "processes measured", tasks[::3], [4.3 * t + 2.1e-2 for t in tasks[::3]], "points"
                    ),
                ],
                True,
                True,
                "The crossover is where the dashed lines meet.",
            ),
            Timeline("Who ran when: 4 processes, 24 tasks", workers),
        ],
        "vectorization": [
            Bars(
                "Speed-up over NumPy",
                "speed-up (x)",
                [
                    "pure Python",
                    "numba",
                    "numba with SIMD",
                    "numba on all cores",
                    "jax.jit",
                    "torch eager",
                    "torch.compile",
                ],
                {
                    "pairwise": [0.0096, 4.1, 23.6, 45.0, 117.0, 68.0, 38.0],
                    "Black-Scholes": [0.12, 1.1, 21.0, 39.0, 34.0, 3.4, 27.0],
                    "Mandelbrot": [0.056, 5.5, 8.0, 10.5, 4.0, math.nan, math.nan],
                },
                True,
            ),
            Bars("Share of the vector peak", "share (%)", ["pairwise", "Black-Scholes"], {"": [13.0, 33.0]}),
        ],
    }


def example() -> dict[str, Any]:
    drawn = figures()
    return {
        "machine_info": {
            "cpu": {"brand_raw": "Example 9000"},
            "system": "Linux",
            "machine": "x86_64",
            "python_version": "3.11.2",
        },
        "benchmarks": [],
        "datetime": "2026-11-22T18:44:00+00:00",
        "perflab": {
            "format": 1,
            "command": "perflab run roofline concurrency vectorization --quick",
            "started": "2026-11-22T18:41:07.123456+00:00",
            "finished": "2026-11-22T18:43:52+00:00",
            "scale": "quick",
            "device": "cpu",
            "machine": machine(),
            "notes": ["The machine was busy (load 3.1 on 2 cores): wall times may be too long."],
            "labs": {
                "roofline": lab(
                    "roofline",
                    "What are the differences between a CPU and a GPU?",
                    "A GPU has ten to a hundred times the bandwidth and arithmetic, but starts slowly. "
                    "Small work is faster on the CPU, large work on the GPU; the roofline tells where.",
                    COLUMNS,
                    drawn["roofline"],
                ),
                "concurrency": lab(
                    "concurrency",
                    "What is multithreading vs multiprocessing?",
                    "Threads share memory and, in Python, a lock; processes share neither. They win when a "
                    "task holds the lock for longer than it costs to hand it over.",
                    ("default",),
                    drawn["concurrency"],
                ),
                "vectorization": lab(
                    "vectorization",
                    "What is vectorization?",
                    "One instruction works on 8 or 16 numbers. Compilers use them when no branch forbids it.",
                    COLUMNS,
                    drawn["vectorization"],
                ),
            },
        },
    }


def plain() -> dict[str, Any]:
    """What pytest-benchmark writes by itself."""
    stats = {"min": 1.1e-5, "median": 1.3e-5, "iqr": 4e-7, "rounds": 812, "mean": 1.4e-5}
    return {
        "machine_info": {"node": "secret-host", "cpu": {"brand_raw": "Example 9000"}, "system": "Linux"},
        "datetime": "2026-11-22T18:44:00+00:00",
        "version": "5.2.3",
        "benchmarks": [
            {"name": "test_sort", "group": "sorting", "stats": stats},
            {"name": "test_find", "group": None, "stats": {**stats, "median": 0.2}},
        ],
    }
