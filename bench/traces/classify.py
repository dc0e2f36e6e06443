"""What a slice is, from its category and its name.

Profilers agree on neither. The category decides where it says something; the name decides what no category
says: a kernel that communicates, a call that waits for a device, one step of training.
"""

from __future__ import annotations

import re

from bench.traces.events import Kind

_CATEGORIES = {
    # libkineto's ActivityType, and its older words
    "cpu_op": Kind.OPERATOR,
    "operator": Kind.OPERATOR,
    "hlo_op": Kind.OPERATOR,
    "python_function": Kind.FUNCTION,
    "runtime": Kind.RUNTIME,
    "driver": Kind.RUNTIME,
    "hpu_op": Kind.RUNTIME,
    "mtia_workloadd": Kind.RUNTIME,
    "overhead": Kind.RUNTIME,  # what the profiler costs inside the driver: it delays the calls around it
    "kernel": Kind.KERNEL,
    "concurrent_kernel": Kind.KERNEL,
    "mtia_ccp_events": Kind.KERNEL,
    "gpu_memcpy": Kind.COPY,
    "memcpy": Kind.COPY,
    "gpu_memset": Kind.SET,
    "memset": Kind.SET,
    "collective_comm": Kind.COMMUNICATION,
    "user_annotation": Kind.ANNOTATION,
    "gpu_user_annotation": Kind.ANNOTATION,
    "step_num": Kind.STEP,  # of JAX's StepTraceAnnotation
    "mpi": Kind.COMMUNICATION,  # of nsys
    "wait": Kind.WAIT,  # our own, as are synchronization and communication of a host
    "synchronization": Kind.SYNCHRONIZATION,
    "communication": Kind.COMMUNICATION,
}
_WRITTEN = {
    Kind.OPERATOR: "cpu_op",
    Kind.FUNCTION: "python_function",
    Kind.RUNTIME: "runtime",
    Kind.KERNEL: "kernel",
    Kind.COPY: "gpu_memcpy",
    Kind.SET: "gpu_memset",
    Kind.ANNOTATION: "user_annotation",
    Kind.STEP: "step_num",
}
_WRITTEN_OF_A_DEVICE = {
    Kind.SYNCHRONIZATION: "cuda_sync",
    Kind.COMMUNICATION: "collective_comm",
    Kind.ANNOTATION: "gpu_user_annotation",
}
_FAMILIES = {
    # cuda_, hip_, xpu_, mtia_, gcu_, glow_, privateuse1_ ...
    "_runtime": Kind.RUNTIME,
    "_driver": Kind.RUNTIME,
    "_sync": Kind.SYNCHRONIZATION,
    "_memcpy": Kind.COPY,
    "_memset": Kind.SET,
}
DEVICE_CATEGORIES = frozenset(
    (
        *("kernel", "concurrent_kernel", "mtia_ccp_events", "collective_comm", "gpu_user_annotation"),
        *("gpu_memcpy", "memcpy", "gpu_memset", "memset", "cuda_sync"),
    )
)
"""Categories whose slices lie on a stream of a device."""
HOST_CATEGORIES = frozenset(
    ("cpu_op", "operator", "python_function", "cuda_runtime", "cuda_driver", "runtime", "user_annotation")
)

# nccl and rccl; DeepEP's namespaces; NVSHMEM; vLLM's, SGLang's and TensorRT-LLM's own all-reduce; MSCCL++;
# torch's symmetric memory; HLO's collectives. For names in lower case: ignoring case takes thrice as long.
_COMMUNICATING = re.compile(
    r"nccl|rccl|oneccl|hccl|deep_?ep|\b(intranode|internode|internode_ll)::|::ep::|low_latency::(dispatch|combine)"
    r"|nvshmem|rocshmem|all_?reduce|cross_device_reduce|mscclpp|multimem_|(one|two)_?shot_"
    r"|all[-_]?gather|reduce[-_]?scatter|all[-_]?to[-_]?all|all-reduce|collective-(permute|broadcast)"
)
_HOST_COLLECTIVE = re.compile(r"(gloo|mpi|ucc|shm):")
_HLO_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
    r"|collective-broadcast|send|recv)\b"
)
_STEP = re.compile(r"(ProfilerStep|(train(ing)?[ _])?(step|iteration|iter))[ _#:=]*\d+", re.IGNORECASE)
_SYNCHRONIZES = re.compile(r"Synchronize|_synchronize", re.IGNORECASE)
_COPIES = re.compile(r"Memcpy|copyBuffer", re.IGNORECASE)
_SETS = re.compile(r"Memset|fillBuffer", re.IGNORECASE)
_DRIVER_CALL = re.compile(r"(cuda|cu|hip)[A-Z]")
_XLA_INTERNAL = re.compile(
    r".*::|PjitFunction\(|ParseArguments|(PjRt|Thunk|Xla|Hlo|Execute|Allocate)\w*|end: |Handle input"
    r"|Wait for \w+ holds"
)
# Functions in which a thread is blocked by another one, by a process, by a file or by the clock: those of
# modules, "threading.py(655): wait" as well as "wait (threading.py:655)", and those whose name says enough.
_WAITING_MODULES = (
    ("threading.py", r"wait|join|acquire|_wait_for_tstate_lock"),
    ("queue.py", r"get"),
    ("selectors.py", r"select"),
    ("subprocess.py", r"wait|_wait|communicate"),
    ("concurrent", r"result|wait"),
    ("multiprocessing", r"recv\w*|_recv\w*|poll|_poll|wait|join"),
)
_WAITS = re.compile(
    "|".join(rf"(?=.*{re.escape(module)})(?=.*\b({names})\b)" for module, names in _WAITING_MODULES)
    + r"|.*(method 'acquire'|\b(time\.)?sleep\b|select\.(e?poll|select)|epoll_wait|\bfutex_wait|\bbarrier\b"
    r"|pthread_cond_\w*wait|\bsem_\w*wait|RendezvousWait|wait for completion)"
    r"|(p?poll|p?select|futex|nanosleep|usleep|waitpid|wait4|pthread_(mutex_lock|join|rwlock_\w+lock))$",
    re.IGNORECASE,
)


def classify(category: str, name: str) -> Kind:
    """The kind of a slice in PyTorch's traces and wherever slices have such categories."""
    word = category.lower()
    kind = _CATEGORIES.get(word)
    if kind is None:
        kind = next((k for family, k in _FAMILIES.items() if word.endswith(family)), Kind.UNCLASSIFIED)
    if kind is Kind.KERNEL and _COMMUNICATING.search(name.lower()):
        return Kind.COMMUNICATION
    if kind is Kind.RUNTIME and _SYNCHRONIZES.search(name):
        return Kind.SYNCHRONIZATION
    if kind is Kind.FUNCTION and _WAITS.match(name):
        return Kind.WAIT
    if kind in (Kind.ANNOTATION, Kind.OPERATOR) and word != "gpu_user_annotation":
        if _STEP.fullmatch(name):
            return Kind.STEP
        if _HOST_COLLECTIVE.match(name) or (word == "hlo_op" and _HLO_COLLECTIVE.match(name)):
            return Kind.COMMUNICATION
    return kind


def category_of(kind: Kind, on_device: bool) -> str:
    """A category of which ``classify`` makes this kind again."""
    written = _WRITTEN | _WRITTEN_OF_A_DEVICE if on_device else _WRITTEN
    return written.get(kind, kind.name.lower())


def is_communication_call(name: str) -> bool:
    """Whether a host operator of this name hands a collective over, or waits for one: no computation.

    torch.distributed's own, and those of its functional collectives, whose wait_tensor waits.
    """
    return name.startswith(("c10d::", "_c10d_functional", "record_param_comms"))


def classify_python(category: str, name: str) -> Kind:
    """Of a profiler of functions: whatever it recorded is one, or waits in one."""
    return Kind.WAIT if _WAITS.match(name) else Kind.FUNCTION


def classify_jax(category: str, name: str) -> Kind:
    """Of a host thread in JAX's traces, which have no categories: what a slice is stands in its name."""
    if name.startswith("$"):
        return classify("python_function", name)
    if _DRIVER_CALL.match(name):
        return classify("cuda_runtime", name)
    if category:
        return classify(category, name)
    if _WAITS.match(name):
        return Kind.WAIT
    return Kind.RUNTIME if _XLA_INTERNAL.match(name) else classify("user_annotation", name)


def classify_jax_device(line: str, name: str) -> Kind:
    """Of a line of a device in JAX's traces: streams work; modules, scopes and steps are drawn over them."""
    if line == "Steps":
        return Kind.STEP
    if not line.startswith(("Stream", "XLA Ops", "Async XLA Ops")):
        return Kind.ANNOTATION
    if _COPIES.search(name):
        return Kind.COPY
    return Kind.SET if _SETS.search(name) else classify("kernel", name)
