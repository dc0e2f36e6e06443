"""DataParallel against the module alone, and what is wrong with it, counted."""

import copy
import threading
import time
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.data import DataParallel
from parallel.replicas import gather, predict_communication, predict_memory, scatter

CPU = torch.device("cpu")
Pair = namedtuple("Pair", "first second")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.layer.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens, scale=1.0, *, shift):
        self.calls += 1
        hidden = self.layer(self.embedding(tokens)) * scale + shift
        return {"logits": self.head(torch.tanh(hidden)), "pair": (hidden.sum(1), None)}


@pytest.mark.parametrize(("replicas", "batch"), [(1, 4), (2, 4), (2, 5), (3, 5), (4, 2)])
def test_equals_the_module_alone(replicas, batch):
    torch.manual_seed(0)
    alone = Model().double()
    ours = DataParallel(copy.deepcopy(alone), ["cpu"] * replicas)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (alone, ours)]
    for _ in range(3):
        tokens, shift = torch.randint(0, 11, (batch,)), torch.randn(batch, 6, dtype=torch.float64)
        outputs = [model(tokens, 2.0, shift=shift) for model in (alone, ours)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-13)
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (output["logits"].square().sum() + output["pair"][0].sum()).backward()
            optimizer.step()
    for one, other in zip(alone.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)
    assert ours.module.layer.bias.grad is None
    assert ours.module.calls == 3  # the first replica's buffers are the module's
    assert list(ours.state_dict()) == [f"module.{name}" for name in alone.state_dict()]
    with torch.no_grad():
        assert not ours(tokens, shift=shift)["logits"].requires_grad


def test_scatter_and_gather_take_what_modules_take():
    value = (
        torch.arange(5),
        {"a": torch.arange(10).view(5, 2), "name": "x"},
        [torch.arange(5)],
        Pair(torch.arange(5), 2),
        [],
    )
    parts = scatter(value, [CPU] * 3)
    assert [len(part[0]) for part in parts] == [2, 2, 1]
    assert [part[1]["name"] for part in parts] == ["x"] * 3
    assert isinstance(parts[2][3], Pair)
    assert parts[2][4] == []
    tensors = [(part[0], part[1]["a"], part[2], part[3].first) for part in parts]
    torch.testing.assert_close(gather(tensors, CPU), (value[0], value[1]["a"], value[2], value[3].first))
    assert gather([torch.tensor(1.0), torch.tensor(2.0)], CPU).tolist() == [1.0, 2.0]
    assert isinstance(gather([Pair(torch.ones(1), None)] * 2, CPU), Pair)
    with pytest.raises(ValueError, match="no batch to scatter"):
        scatter(torch.tensor(1.0), [CPU] * 2)
    with pytest.raises(TypeError, match="replicas returned str"):
        gather(["a", "b"], CPU)


class Faulty(nn.Module):
    def forward(self, x):
        if x[0] > 1:
            raise ZeroDivisionError("of this slice")
        return x


def test_what_a_replica_raises_and_wrong_devices():
    with pytest.raises(ZeroDivisionError, match="of this slice") as raised:
        DataParallel(Faulty(), ["cpu"] * 3)(torch.arange(3))
    assert raised.value.__notes__ == ["in replica 2 of 3"]
    with pytest.raises(ValueError, match="device_ids is empty"):
        DataParallel(Faulty(), [])
    with pytest.raises(ValueError, match="weight is on meta; the module must be on cpu"):
        DataParallel(nn.Linear(2, 2, device="meta"), ["cpu"])(torch.ones(2, 2))
    assert DataParallel(nn.Linear(2, 2)).devices[0].type == ("cuda" if torch.cuda.is_available() else "cpu")


class Copies(TorchDispatchMode):
    """Bytes that this thread copies to make tensors, forward, and adds into others, backward."""

    def __init__(self):
        super().__init__()
        self.copied = self.added = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        name = operation.overloadpacket.__name__
        if name == "_to_copy":
            self.copied += result.nbytes
        if name in ("add", "add_") and isinstance(arguments[1], torch.Tensor):
            self.added += arguments[1].nbytes
        return result


class Elements(nn.Module):
    """No addition but that of the replicas' gradients."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(7, 3)), nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("mask", torch.ones(3))

    def forward(self, x):
        return x * self.first * self.mask * self.second


@pytest.mark.parametrize("replicas", [2, 4])
def test_bytes_are_as_predicted(replicas):
    model = Elements()
    ours = DataParallel(model, ["cpu"] * replicas)
    with Copies() as copies:
        output = ours(torch.ones(2 * replicas, 7, 3)).sum()
        forward = copies.copied
        output.backward()
    predicted = predict_communication(model, replicas)
    assert forward == predicted["broadcast"]
    assert copies.added == predicted["reduce"]
    memory = predict_memory(model, replicas)
    assert memory.buffers == model.mask.nbytes + forward
    assert memory.total == replicas * (memory.parameters + model.mask.nbytes) + memory.gradients


class Interpreted(nn.Module):
    """Work of the interpreter: no operator releases its lock."""

    def __init__(self):
        super().__init__()
        self.together = threading.Barrier(4)
        self.seconds = {}  # of each thread; shared by the replicas

    def forward(self, x):
        self.together.wait()
        start, total = time.thread_time(), 0
        for number in range(150_000):
            total += number
        self.seconds[threading.get_ident()] = time.thread_time() - start
        return x + total


def test_replicas_in_one_interpreter_take_turns():
    """However many cores there are: the time of all threads together fits into the time that passed."""
    module = Interpreted()
    start = time.perf_counter()
    DataParallel(module, ["cpu"] * 4)(torch.zeros(4))
    passed = time.perf_counter() - start
    assert len(module.seconds) == 4
    assert sum(module.seconds.values()) <= 1.05 * passed
