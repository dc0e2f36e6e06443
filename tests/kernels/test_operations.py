"""Every operation of ``kernels``, held to the same rules: ``kernels.spec`` lists them.

With TRITON_INTERPRET=1 the same tests run the Triton kernels (tests/kernels/test_interpreter.py).
"""

import threading

import pytest
import torch
from families import family_of
from precision import as_tuple, assert_accurate, to_double
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.spec import operations

OPERATIONS = operations()
CASES = [
    pytest.param(operation, case, id=f"{operation.name}-{case.label}")
    for operation in OPERATIONS
    for case in operation.cases
]


def sampled(operation):
    """float32 and one type of 16 bits, in turn, where a family makes many operations of one template.

    There they differ in how elements are loaded and stored: test_storage.py shows that for all bit patterns.
    """
    family = [other for other in OPERATIONS if family_of(other) == family_of(operation)]
    if len(family) < 3 or not {torch.bfloat16, torch.float16}.issubset(operation.dtypes):
        return operation.dtypes
    left_out = torch.bfloat16 if family.index(operation) % 2 else torch.float16
    return tuple(dtype for dtype in operation.dtypes if dtype is not left_out)


OTHERS = [case for case in CASES if len(sampled(case.values[0])) < len(case.values[0].dtypes)]
FIRST = [pytest.param(operation, operation.cases[1], id=operation.name) for operation in OPERATIONS]


@pytest.fixture(autouse=True)
def kernels_alone(every_size):
    """No crossover to torch for small tensors, and new memory full of NaN: an element never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS wants an environment variable for it
    yield
    torch.use_deterministic_algorithms(before)


def run(function, arguments, gradients=(), seed=1):
    """(outputs, gradients of a random weighting of the outputs with respect to the named arguments)."""
    arguments = {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    for name in gradients:
        if arguments.get(name) is not None:
            arguments[name].requires_grad_()
    outputs = as_tuple(function(**arguments))
    if not gradients:
        return outputs, ()
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    inputs = [arguments[name] for name in gradients if arguments.get(name) is not None]
    return outputs, torch.autograd.grad(outputs, inputs, weights)


@pytest.mark.interpreted
@pytest.mark.parametrize(("operation", "case"), CASES)
def test_values_and_gradients_are_as_accurate_as_torchs(operation, case, device):
    as_accurate_as_torch(
        operation, case, device, operation.dtypes if device == "cuda" else sampled(operation)
    )


@pytest.mark.proof
@pytest.mark.interpreted
@pytest.mark.parametrize(("operation", "case"), OTHERS)
def test_so_are_those_of_the_other_dtypes(operation, case):
    as_accurate_as_torch(operation, case, "cpu", {*operation.dtypes}.difference(sampled(operation)))


def as_accurate_as_torch(operation, case, device, dtypes):
    for dtype in dtypes:
        arguments = case.arguments(dtype, device)
        exact = {name: to_double(value) for name, value in arguments.items()}
        ours, our_gradients = run(operation.function, arguments, operation.gradients)
        theirs, their_gradients = run(operation.eager, arguments, operation.gradients)
        right, right_gradients = run(operation.reference, exact, operation.gradients)
        for index, values in enumerate(zip(ours, theirs, right, strict=True)):
            assert_accurate(*values, f"{dtype} output {index}")
        names = [name for name in operation.gradients if arguments.get(name) is not None]
        for name, *values in zip(names, our_gradients, their_gradients, right_gradients, strict=True):
            assert_accurate(*values, f"{dtype} gradient of {name}")


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(("operation", "case"), FIRST)
def test_strided_and_read_only_inputs_give_the_same(operation, case, device):
    arguments = case.arguments(torch.float32, device)
    expected, _ = run(operation.function, arguments)
    strided = {
        name: torch.stack([value, value], -1)[..., 0]
        if isinstance(value, torch.Tensor) and value.dim()
        else value
        for name, value in arguments.items()
    }
    outputs = as_tuple(operation.function(**strided))
    assert all(torch.equal(got, want) for got, want in zip(outputs, expected, strict=True))
    kept = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    shared = {name: read_only(value, device) for name, value in kept.items()}
    outputs = as_tuple(operation.function(**{**arguments, **shared}))
    assert all(torch.equal(got, want) for got, want in zip(outputs, expected, strict=True))
    assert all(torch.equal(shared[name], value) for name, value in kept.items())


def read_only(tensor, device):
    """The same values, as a tensor of a NumPy array that may not be written."""
    array = tensor.cpu().numpy().copy()
    array.flags.writeable = False
    return torch.from_numpy(array).to(device)


@pytest.mark.parametrize(("operation", "case"), FIRST)
def test_results_do_not_depend_on_threads(operation, case):
    arguments = case.arguments(torch.float32)
    expected, expected_gradients = run(operation.function, arguments, operation.gradients)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(run(operation.function, arguments, operation.gradients))
    finally:
        torch.set_num_threads(threads)

    def work():
        results.append(run(operation.function, arguments, operation.gradients))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(results) == 5
    for outputs, gradients in results:
        for got, want in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
            assert torch.equal(got, want)


class Recorded(TorchDispatchMode):
    """The calls of our operations, as torch dispatches them."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "perflab":
            self.calls[func] = (args, kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("operation", "case"), FIRST)
def test_opcheck(operation, case, device):
    torch.use_deterministic_algorithms(False)  # opcheck compares outputs with those of a compiled graph
    arguments = case.arguments(torch.float32, device)
    with Recorded() as recorded:
        run(operation.function, arguments, operation.gradients)
    assert recorded.calls
    for overload, (args, kwargs) in recorded.calls.items():
        args = tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in args)
        torch.library.opcheck(overload, args, kwargs)


@pytest.mark.parametrize(("operation", "case"), FIRST)
def test_it_compiles_into_one_graph(operation, case, device):
    arguments = case.arguments(torch.float32, device)
    compiled = torch.compile(operation.function, fullgraph=True, backend="aot_eager")
    expected = run(operation.function, arguments, operation.gradients)
    got = run(compiled, arguments, operation.gradients)
    for left, right in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(("operation", "case"), FIRST)
def test_each_gradient_alone_is_the_one_of_all(operation, case, device):
    if len(operation.gradients) < 2:
        pytest.skip("one gradient only")
    arguments = case.arguments(torch.float32, device)
    _, gradients = run(operation.function, arguments, operation.gradients)
    for name, expected in zip(operation.gradients, gradients, strict=True):
        _, (alone,) = run(operation.function, arguments, (name,))
        # To rounding: what is not wanted is compiled away, and what is left is a body of its own.
        distance, largest = (alone - expected).abs().max(), expected.abs().max()
        assert distance <= 4 * torch.finfo(alone.dtype).eps * largest, (name, distance, largest)
