"""What ``test_traces.py`` runs in child processes: our analysis of a trace, and what its peers call theirs.

    python trace_peers.py ours|hta|tracelens TRACE

HolisticTraceAnalysis does its breakdown by time, kernel table, overlap, idle time, launch statistics and
queue length, without drawing; TraceLens its report of PyTorch's traces. Each is imported only in its own
process.
"""

from __future__ import annotations

import gc
import os
import sys


def ours(path: str) -> None:
    from bench.traces.analysis import analyse
    from bench.traces.load import load

    for trace in load(path).traces:
        analyse(trace)


def hta(path: str) -> None:
    import warnings

    from hta.trace_analysis import TraceAnalysis  # type: ignore[import-not-found]

    warnings.simplefilter("ignore")
    analysis = TraceAnalysis(trace_files={0: path}, trace_dir=os.path.dirname(path))
    analysis.get_temporal_breakdown(visualize=False)
    analysis.get_gpu_kernel_breakdown(visualize=False)
    analysis.get_comm_comp_overlap(visualize=False)
    analysis.get_idle_time_breakdown(visualize=False)
    analysis.get_cuda_kernel_launch_stats(visualize=False)
    analysis.get_queue_length_summary()


def tracelens(path: str) -> None:
    import tempfile

    from TraceLens.Reporting.generate_perf_report_pytorch import (  # type: ignore[import-not-found]
        generate_perf_report_pytorch,
    )

    with tempfile.TemporaryDirectory() as folder:
        generate_perf_report_pytorch(profile_json_path=path, output_csvs_dir=folder)


def peak_mb() -> float:
    """Of this program: what wait4 says would include the process that started it."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    {"ours": ours, "hta": hta, "tracelens": tracelens}[sys.argv[1]](os.path.abspath(sys.argv[2]))
    print(f"\n{peak_mb()}")
    gc.freeze()  # as bench.cli does: what is left goes with the process, without a search for cycles in it
