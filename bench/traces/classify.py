"""What a slice is, from its category and its name.

Profilers agree on neither. The category decides where it says something; the name decides what no category
says: a kernel that communicates, a call that waits for a device, one step of training.
"""

from __future__ import annotations

import re

from bench.traces.events import Kind

CATEGORIES = {
    # libkineto's ActivityType and, before torch 1.13, its older words
    "cpu_op": Kind.OPERATOR,
    "operator": Kind.OPERATOR,
    "python_function": Kind.FUNCTION,
    "cuda_runtime": Kind.RUNTIME,
    "cuda_driver": Kind.RUNTIME,
    "hip_runtime": Kind.RUNTIME,
    "xpu_runtime": Kind.RUNTIME,
    "xpu_driver": Kind.RUNTIME,
    "mtia_runtime": Kind.RUNTIME,
    "glow_runtime": Kind.RUNTIME,
    "privateuse1_runtime": Kind.RUNTIME,
    "privateuse1_driver": Kind.RUNTIME,
    "runtime": Kind.RUNTIME,
    "overhead": Kind.RUNTIME,
    "cuda_sync": Kind.SYNCHRONIZATION,
    "kernel": Kind.KERNEL,
    "concurrent_kernel": Kind.KERNEL,
    "mtia_ccp_events": Kind.KERNEL,
    "hpu_op": Kind.KERNEL,
    "gpu_memcpy": Kind.COPY,
    "memcpy": Kind.COPY,
    "gpu_memset": Kind.SET,
    "memset": Kind.SET,
    "collective_comm": Kind.COMMUNICATION,
    "user_annotation": Kind.ANNOTATION,
    "gpu_user_annotation": Kind.ANNOTATION,
}

DEVICE_CATEGORIES = frozenset(
    ("kernel", "concurrent_kernel", "mtia_ccp_events", "hpu_op", "gpu_memcpy", "memcpy", "gpu_memset", "memset")
    + ("collective_comm", "gpu_user_annotation")
)
"""Categories whose slices lie on a stream of a device."""

COMMUNICATING_KERNEL = re.compile(
    r"nccl|rccl|deep_?ep|::(intranode|internode|ep::)|nvshmem|rocshmem|(all|cross_device)_?reduce_|mscclpp"
    r"|all_?gather|reduce_?scatter|all_?to_?all|low_latency::(dispatch|combine)|oneshot|twoshot|multimem_",
    re.IGNORECASE,
)
HOST_COLLECTIVE = re.compile(r"(gloo|mpi|ucc|shm):")
STEP = re.compile(r"(ProfilerStep|(train(ing)?[ _])?(step|iteration|iter))[ _#:=]*\d+", re.IGNORECASE)
SYNCHRONIZE = re.compile(r"Synchronize|_synchronize", re.IGNORECASE)


def classify(category: str, name: str) -> Kind:
    """The kind of slices of this category and name."""
    category = category.lower()
    kind = CATEGORIES.get(category, Kind.UNCLASSIFIED)
    if kind is Kind.KERNEL and COMMUNICATING_KERNEL.search(name):
        return Kind.COMMUNICATION
    if kind is Kind.RUNTIME and SYNCHRONIZE.search(name):
        return Kind.SYNCHRONIZATION
    if kind in (Kind.ANNOTATION, Kind.OPERATOR) and category != "gpu_user_annotation":
        if STEP.fullmatch(name):
            return Kind.STEP
        if HOST_COLLECTIVE.match(name):
            return Kind.COMMUNICATION
    return kind
