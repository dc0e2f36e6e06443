"""Optimizers: torch.optim's trajectories, options, checkpoints, errors; sparse, strided and mixed tensors.

Tests marked ``interpreted`` run the Triton kernels too (tests/kernels/test_interpreter.py).
"""

import copy
import io
import threading
import warnings

import pytest
import torch
from precision import assert_accurate
from test_operations import Recorded

import kernels
from kernels.inspect import inspect_function
from kernels.optimizer import cpu, cpu_lists, operations, reference
from kernels.simd import vector_bits

RULES = {
    "SGD": (reference.sgd, ("momentum_buffer",)),
    "Adagrad": (reference.adagrad, ("sum",)),
    "RMSprop": (reference.rmsprop, ("square_avg", "grad_avg", "momentum_buffer")),
    "Adadelta": (reference.adadelta, ("square_avg", "acc_delta")),
    "Adam": (reference.adam, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    "AdamW": (reference.adam, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
}
"""Reference of the rule, and the names of its states in the order of the reference's arguments."""

FULL = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01, "initial_accumulator_value": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.01},
    "Adadelta": {"lr": 0.7, "rho": 0.8, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "betas": (0.3, 0.9), "weight_decay": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
}
"""Options of each class that use most of its rule."""

SHAPES = ((1,), (0,), (3, 17), (4099,), ())
EVERY = pytest.mark.parametrize("name", RULES)

pytestmark = pytest.mark.usefixtures("every_size")


def values(generator, dtype, shapes=SHAPES):
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def trained(maker, options, dtype=torch.float32, steps=3, shapes=SHAPES, grads=None, device="cpu"):
    """(parameters, optimizer) after steps whose gradients are drawn once and are the same for all."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(value.to(device)) for value in values(generator, dtype, shapes)]
    optimizer = maker(params, **options)
    for number in range(steps):
        for param, grad in zip(params, values(generator, dtype, shapes), strict=True):
            param.grad = grad.to(device) if grads is None else grads(number, grad)
        optimizer.step()
    return params, optimizer


def exact(name, options, dtype, steps=3):
    """(parameters, states in the reference's order) of the same steps in float64."""
    rule, names = RULES[name]
    generator = torch.Generator().manual_seed(0)
    defaults = getattr(torch.optim, name)([torch.zeros(1)], **options).defaults
    params = [value.double() for value in values(generator, dtype)]
    states = []
    for param in params:
        has = {
            "momentum_buffer": name == "RMSprop" and defaults["momentum"],
            "grad_avg": defaults.get("centered"),
            "max_exp_avg_sq": defaults.get("amsgrad"),
        }
        start = defaults.get("initial_accumulator_value", 0.0)
        states.append([torch.full_like(param, start) if has.get(key, True) else None for key in names])
    for step in range(1, steps + 1):
        grads = values(generator, dtype)
        for index, grad in enumerate(grads):
            params[index], *states[index] = rule(
                params[index], grad.double(), *states[index], step=step, **defaults
            )
    return params, [dict(zip(names, state, strict=True)) for state in states]


def flat(tensors):
    return torch.cat([tensor.detach().reshape(-1).cpu() for tensor in tensors])


def assert_as_accurate_as_torch(name, options, dtype, device="cpu"):
    ours, ours_optimizer = trained(getattr(kernels, name), options, dtype, device=device)
    theirs, their_optimizer = trained(getattr(torch.optim, name), options, dtype, device=device)
    right, right_states = exact(name, options, dtype)
    assert_accurate(flat(ours), flat(theirs), flat(right), f"{name} {options} parameters")
    for key in their_optimizer.state[theirs[0]]:
        mine = [ours_optimizer.state[param][key] for param in ours]
        other = [their_optimizer.state[param][key] for param in theirs]
        assert [(s.dtype, s.device, s.shape) for s in mine] == [(s.dtype, s.device, s.shape) for s in other]
        if key == "step":
            assert [int(step) for step in mine] == [3] * len(ours)
        else:
            assert_accurate(flat(mine), flat(other), flat([state[key] for state in right_states]), key)
    assert ours_optimizer.state[ours[0]].keys() == their_optimizer.state[theirs[0]].keys()


@pytest.mark.interpreted
@EVERY
def test_parameters_and_states_are_as_accurate_as_torchs(name, device):
    assert_as_accurate_as_torch(name, FULL[name], torch.float32, device)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_are_as_accurate_as_torchs(dtype, device):
    assert_as_accurate_as_torch("AdamW", {**FULL["AdamW"], "eps": 1e-3}, dtype, device)


@pytest.mark.interpreted
def test_double_precision_is_torchs(device):
    options = {"betas": (0.3, 0.9), "lr": 1.0}
    ours, _ = trained(kernels.Adam, options, torch.float64, device=device)
    theirs, _ = trained(torch.optim.Adam, options, torch.float64, device=device)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@EVERY
def test_checkpoints_go_both_ways(name):
    options = FULL[name]
    grads = values(torch.Generator().manual_seed(5), torch.float32)

    def continued(params, optimizer, maker):
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        params = [torch.nn.Parameter(param.detach().clone()) for param in params]
        resumed = maker(params, lr=123.0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for _ in range(2):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            resumed.step()
        return params, resumed.state_dict()

    start = trained(getattr(kernels, name), options)
    ours, our_state = continued(*start, getattr(kernels, name))
    theirs, their_state = continued(*start, getattr(torch.optim, name))
    torch.testing.assert_close(ours, theirs)
    assert our_state["param_groups"] == their_state["param_groups"]
    torch.testing.assert_close(our_state["state"], their_state["state"])
    start = trained(getattr(torch.optim, name), options)
    back, _ = continued(*start, getattr(kernels, name))
    torch.testing.assert_close(back, theirs)


@EVERY
def test_infinite_and_nan_gradients_do_as_with_torch(name):
    options = {**FULL[name], "centered": True} if name == "RMSprop" else FULL[name]

    def grads(number, grad):
        if number and grad.numel() > 100:  # some live on for a step, some come with the last
            for place, odd in enumerate((torch.nan, torch.inf, -torch.inf, 1e30)):
                grad[40 * number + 10 * place :][:10] = odd
        return grad

    ours, our_optimizer = trained(getattr(kernels, name), options, grads=grads)
    theirs, their_optimizer = trained(getattr(torch.optim, name), options, grads=grads)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    for param, other in zip(ours, theirs, strict=True):
        mine, state = our_optimizer.state[param], their_optimizer.state[other]
        torch.testing.assert_close(mine, state, equal_nan=True)


@EVERY
def test_results_do_not_depend_on_threads_or_chunks(name, monkeypatch):
    shapes = [(40_000,), (7,), (3, 1000), (5,)]
    expected, _ = trained(getattr(kernels, name), FULL[name], shapes=shapes)
    threads = torch.get_num_threads()
    monkeypatch.setattr(cpu_lists, "ELEMENTS_PER_CHUNK", 4099)
    results = []

    def run():
        results.append(trained(getattr(kernels, name), FULL[name], shapes=shapes)[0])

    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            run()
    finally:
        torch.set_num_threads(threads)
    workers = [threading.Thread(target=run) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(results) == 5
    assert all(torch.equal(flat(result), flat(expected)) for result in results)


def model(maker, seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    return net, maker(net)


def groups(name, tensor_lr=False):
    def maker(net):
        rate = torch.tensor(0.05) if tensor_lr else 0.05
        rows = [
            {"params": net[0].parameters()},
            {"params": net[2].parameters(), "lr": 0.01, "maximize": True},
        ]
        return getattr(name[0], name[1])(rows, **{**FULL[name[1]], "lr": rate})

    return maker


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_groups_schedules_closures_and_frozen_parameters_do_as_with_torch(name, tensor_lr):
    ends = []
    for module in (kernels, torch.optim):
        net, optimizer = model(groups((module, name), tensor_lr))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        x, y = torch.linspace(-1, 1, 40).view(8, 5), torch.linspace(0, 1, 24).view(8, 3)

        def closure(net=net, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = ((net(x) - y) ** 2).mean()
            loss.backward()
            return loss

        losses = []
        for number in range(5):
            net[0].bias.requires_grad_(number > 2)  # frozen at first, then without a state
            losses.append(optimizer.step(closure).item())
            scheduler.step()
        ends.append((losses, [*net.parameters()], [group["lr"] for group in optimizer.param_groups]))
    torch.testing.assert_close(*ends)


def test_it_is_torchs_optimizer():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = kernels.AdamW([("weight", param)])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert repr(optimizer) == repr(torch.optim.AdamW([("weight", param)]))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    assert optimizer.step() is None  # no gradient, nothing to do
    assert not optimizer.state
    param.grad = torch.ones(3)
    version = param._version
    optimizer.step()
    assert calls == ["before", "after"] * 2
    assert param._version > version  # autograd sees that it changed
    other = copy.deepcopy(optimizer)
    assert other.state_dict()["state"].keys() == {0}


def test_errors_are_torchs():
    param = torch.nn.Parameter(torch.ones(3))
    for maker, options, message in (
        (kernels.SGD, {"lr": -1.0}, "Invalid learning rate"),
        (kernels.SGD, {"nesterov": True}, "Nesterov momentum requires"),
        (kernels.Adam, {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0"),
        (kernels.RMSprop, {"alpha": -1.0}, "Invalid alpha"),
        (kernels.Adadelta, {"rho": 2.0}, "Invalid rho"),
        (kernels.Adagrad, {"lr_decay": -1.0}, "Invalid lr_decay"),
    ):
        with pytest.raises(ValueError, match=message):
            maker([param], **options)
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        kernels.Adam([param]).step()


def test_operations_refuse_lists_that_do_not_fit():
    def call(params, grads, buffers):
        operations.sgd_(params, grads, buffers, torch.tensor(0.1), 0.9, 0.0, 0.0, False, False, False)

    one, two = torch.ones(3), torch.ones(4)
    for lists, message in (
        (([], [], []), "params is empty"),
        (([one], [two], [one]), "grads are not as many and of the shapes"),
        (([one], [one], [one, one]), "states are not as many"),
        (([one, one], [one, one.double()], [one, one]), "grads have several dtypes"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*lists)
    with pytest.raises(ValueError, match="state_steps"):
        operations.adagrad_([one], [one], [one], [two], torch.tensor(0.1), 0.0, 0.0, 0.0, False)
    assert torch.equal(one, torch.ones(3))


@pytest.fixture
def warned_anew(monkeypatch):
    monkeypatch.setattr("kernels.op._warned", set())


@pytest.mark.usefixtures("warned_anew")
def test_what_the_kernels_do_not_take_runs_torchs_update_and_says_so_once():
    def stepped(maker, options, start, grad):
        param = torch.nn.Parameter(start.clone())
        optimizer = maker([param], **options)
        for _ in range(2):
            param.grad = grad.clone()
            optimizer.step()
        return param.detach()

    dense, sparse = torch.ones(3, 2), torch.eye(3, 2).to_sparse()
    for name, options, start, grad, message in (
        ("SGD", {"lr": 0.1}, dense, sparse, "gradients of layout torch.sparse_coo"),
        ("Adagrad", {}, dense, sparse, "gradients of layout torch.sparse_coo"),
        ("Adam", {"lr": 0.1}, dense * 1j, dense * 2j, "tensors of complex64"),
        ("RMSprop", {"lr": 0.1}, dense * 1j, dense * 2j, "tensors of complex64"),
        ("Adadelta", {"lr": 0.1}, dense * 1j, dense * 2j, "tensors of complex64"),
    ):
        with pytest.warns(kernels.FallbackWarning, match=message) as caught:
            ours = stepped(getattr(kernels, name), options, start, grad)
        assert [item.category for item in caught].count(kernels.FallbackWarning) == 1
        assert torch.equal(ours, stepped(getattr(torch.optim, name), options, start, grad))
    param = torch.nn.Parameter(dense.clone())
    param.grad = dense
    with pytest.warns(kernels.FallbackWarning, match="capturable=True"), pytest.raises(AssertionError):
        kernels.Adam([param], capturable=True).step()  # torch's own: on a CPU there is no graph to capture
    optimizer = kernels.SGD([param], fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.warns(kernels.FallbackWarning, match="still scaled"):
        optimizer.step()
    assert torch.equal(param, torch.full((3, 2), 1 - 0.001 / 2))


def test_the_step_can_be_differentiated():
    start, rate = torch.ones(3, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    param = start.clone()
    param.retain_grad()
    param.grad = torch.full((3,), 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kernels.FallbackWarning)
        kernels.SGD([param], lr=rate, differentiable=True).step()
    param.sum().backward()
    assert rate.grad == -6.0


def test_any_memory_layout():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 4, 5, generator=generator)
    table = torch.randn(6, 8, generator=generator)

    def layouts():
        yield image.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
        yield image.to(memory_format=torch.channels_last), image
        yield table.clone().t(), table.t().contiguous()
        yield table.clone()[::2, 1:], table[::2, 1:]
        yield table.clone(), torch.ones(1, 1).expand(6, 8)
        yield table.clone().view(-1)[1:], table.view(-1)[1:]  # an address that no vector divides

    ends = []
    for module in (kernels, torch.optim):
        params = []
        for start, grad in layouts():
            params.append(start.clone(memory_format=torch.preserve_format) if start.dim() == 4 else start)
            params[-1] = params[-1].detach().requires_grad_()
            params[-1].grad = grad
        optimizer = module.AdamW(params)
        for _ in range(3):
            optimizer.step()
        ends.append([param.detach() for param in params])
    torch.testing.assert_close(*ends)


def test_one_group_of_several_dtypes():
    shapes, dtypes = (
        [(5,), (7,), (11,), (13,)],
        [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16],
    )
    ends = []
    for module in (kernels, torch.optim):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        optimizer = module.AdamW(params, lr=0.1, weight_decay=0.1)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        ends.append(params)
    torch.testing.assert_close(*ends)


def test_opcheck():
    with Recorded() as recorded:
        trained(kernels.AdamW, FULL["AdamW"], steps=1, shapes=[(5,), (3, 4)])
        trained(kernels.SGD, FULL["SGD"], steps=1, shapes=[(5,), (3, 4)])
    assert len(recorded.calls) == 2
    for overload, (args, kwargs) in recorded.calls.items():
        args = [[item.detach() for item in value] if isinstance(value, list) else value for value in args]
        torch.library.opcheck(overload, tuple(args), kwargs)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_step_compiles(name):
    expected, _ = trained(getattr(kernels, name), FULL[name])
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(value) for value in values(generator, torch.float32)]
    optimizer = getattr(kernels, name)(params, **FULL[name])
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        for param, grad in zip(params, values(generator, torch.float32), strict=True):
            param.grad = grad
        compiled()
    torch.testing.assert_close(params, expected)


def test_small_groups_take_torchs_fused_loop(monkeypatch):
    monkeypatch.setattr("kernels.op.crossover", lambda name, device: 5000)
    with Recorded() as recorded, warnings.catch_warnings():
        warnings.simplefilter("error")
        small, _ = trained(kernels.AdamW, {}, shapes=[(8, 64)])
        assert not recorded.calls
        trained(kernels.AdamW, {}, shapes=[(8, 64), (5000,)])
    assert set(recorded.calls) == {operations.adam_}
    theirs, _ = trained(torch.optim.AdamW, {"fused": True}, shapes=[(8, 64)])
    assert torch.equal(small[0], theirs[0])


@pytest.mark.skipif(vector_bits() < 512, reason="needs AVX-512")
@pytest.mark.parametrize(("rule", "element", "states"), [("_adam", "float32", 3), ("_sgd", "uint16", 1)])
def test_loops_use_whole_registers(rule, element, states):
    types = [f"{element}[::1]"] * (2 + states) + ["none"] * (3 - states) + ["float64", "float64[::1]"]
    found = inspect_function(getattr(cpu, rule), ", ".join(types))
    assert not any(loop.calls for loop in found.loops)
    assert any(loop.packed_bits == 512 for loop in found.loops)
    assert found.packed_fma > found.scalar_fma
