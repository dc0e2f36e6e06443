"""Checkpoints: bit for bit at any world size, never lost to a kill, never trusted unread, never unpickled."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parallel import checkpoint, fsdp
from parallel.checkpoint import PerRank, RandomGenerators, Sharded
from parallel.checkpoint_background import BackgroundSaver
from parallel.sharded import boxes_of_range, uncovered
from parallel.tensor import ColumnParallelLinear

WORLDS = [1, 2, 3, 4]
ODD = [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]


class Model(nn.Module):
    """Tied weights, a frozen parameter, a buffer, a scalar; nothing divides by 2, 3 or 4."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.inner = nn.Linear(5, 5, dtype=torch.float32)
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.outer = nn.Linear(5, 11, bias=False)
        self.outer.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens):
        self.seen += tokens.numel()
        x = self.inner(self.embedding(tokens))
        return self.outer(x).square().mean() + self.frozen(x).square().mean()


def trained(kind, steps):
    """(model, optimizer) after so many steps; kind: "replicated", "fsdp" (PyTorch's), "sharded" (ours)."""
    torch.manual_seed(7)
    model = Model()
    run = model
    if kind == "fsdp":
        fully_shard(model)
    elif kind == "sharded":
        fsdp.fully_shard(model)
    elif steps:
        run = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        tokens = torch.arange(6).reshape(2, 3) + (dist.get_rank() + step) % 5
        optimizer.zero_grad()
        run(tokens).backward()
        optimizer.step()
    return model, optimizer


def whole(value):
    """The same nested value with sharded tensors gathered."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, (list, tuple)) else value


def whole_state(kind, model, optimizer):
    """The whole state dicts of both, numbers for parameters."""
    if kind != "sharded":
        return whole({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    named = fsdp.full_optimizer_state_dict(model, optimizer)
    names = [name for group in named["param_groups"] for name in group["params"]]
    state = {names.index(name): entries for name, entries in named["state"].items()}
    groups = whole(optimizer.state_dict()["param_groups"])
    optimizer_state = {"state": dict(sorted(state.items())), "param_groups": groups}
    return {"model": dict(fsdp.full_state_dict(model)), "optimizer": optimizer_state}


def assert_equal(found, expected, where=""):
    assert type(found) is type(expected), (where, found, expected)
    if isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        assert torch.equal(found, expected), where
    elif isinstance(found, dict):
        assert list(found) == list(expected), where
        for key in found:
            assert_equal(found[key], expected[key], f"{where}/{key}")
    elif isinstance(found, list):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    else:
        assert found == expected, where


def odd_tensors():
    """Every kind of element, no element, no dimension, strides."""
    made = torch.Generator().manual_seed(3)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5), generator=made).to(dtype) for dtype in ODD}
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.bfloat16)
    tensors["empty"] = torch.zeros(0, 4)
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).t()
    tensors["not a number"] = torch.tensor([float("nan"), float("inf"), -0.0]).view(torch.int32).clone()
    return tensors


def cut(tensor, world_size, rank):
    """The part of rank `rank` when a flattened tensor is cut in even pieces, regardless of rows."""
    size = -(-tensor.numel() // world_size)
    start, stop = min(rank * size, tensor.numel()), min((rank + 1) * size, tensor.numel())
    return Sharded(tensor.reshape(-1)[start:stop].clone(), tuple(tensor.shape), start)


def flat_parts(fill):
    made = torch.Generator().manual_seed(9)
    shapes = {"matrix": (7, 3), "cube": (3, 2, 5), "row": (2,), "single": (1, 1), "scalar": ()}
    tensors = {
        name: torch.randn(shape, generator=made, dtype=torch.float64) for name, shape in shapes.items()
    }
    world_size, rank = dist.get_world_size(), dist.get_rank()
    parts = {
        name: cut(tensor if fill else torch.zeros_like(tensor), world_size, rank)
        for name, tensor in tensors.items()
    }
    return parts, tensors


def save_all(folder):
    folder = Path(folder)
    for kind in ("replicated", "fsdp", "sharded"):
        model, optimizer = trained(kind, 3)
        place = checkpoint.save(folder / kind, 3, {"model": model, "optimizer": optimizer, "position": 24})
        expected = whole_state(kind, model, optimizer)
        if dist.get_rank() == 0:
            torch.save(expected, folder / f"{kind}.pt")
            written = sorted(path.name for path in place.iterdir())
            files = [f"rank-{rank}.bin" for rank in range(dist.get_world_size())]
            assert written == ["metadata.json", *files]
    checkpoint.save(folder / "flat", 5, {"parts": flat_parts(True)[0], "odd": odd_tensors()})


def load_all(folders):
    for folder in map(Path, folders):
        # What was saved by one is read by the other too: the names and shapes are the same.
        for saved, kind in [
            ("replicated", "replicated"),
            ("fsdp", "fsdp"),
            ("fsdp", "replicated"),
            ("replicated", "fsdp"),
            ("sharded", "sharded"),
            ("sharded", "replicated"),
            ("replicated", "sharded"),
            ("fsdp", "sharded"),
        ]:
            expected = torch.load(folder / f"{saved}.pt")
            model, optimizer = trained(kind, 0)
            state = {"model": model, "optimizer": optimizer, "position": 0}
            assert checkpoint.load(folder / saved, state) == 3
            assert state["position"] == 24
            found = whole_state(kind, model, optimizer)
            assert_equal(found, expected, f"{folder.name} {saved} {kind}")
            assert model.outer.weight is model.embedding.weight
            for parameter, entries in optimizer.state.items():  # sharded like its parameter
                for key in ("exp_avg", "exp_avg_sq"):
                    assert type(entries[key]) is type(parameter.data)
                    assert entries[key].shape == parameter.shape
                    if kind == "fsdp":
                        assert entries[key].placements == parameter.placements
        parts, tensors = flat_parts(False)
        odd = {name: torch.zeros_like(tensor) for name, tensor in odd_tensors().items()}
        assert checkpoint.load(folder / "flat", {"parts": parts, "odd": odd}) == 5
        assert_equal(odd, odd_tensors())
        for name, tensor in tensors.items():
            assert torch.equal(
                parts[name].local, cut(tensor, dist.get_world_size(), dist.get_rank()).local
            ), name
        full = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        checkpoint.load(folder / "flat", {"parts": full, "odd": odd})  # sharded then, whole now
        assert_equal(full, tensors)


def test_what_one_world_saved_another_loads_bit_for_bit(ranks, tmp_path):
    for saved, loaded in [(2, 3), (4, 1), (1, 2)]:
        folder = tmp_path / str(saved)
        if not folder.exists():
            ranks.run(saved, save_all, str(folder))
        ranks.run(loaded, load_all, [str(folder)])


@pytest.mark.proof
def test_what_any_world_saved_any_world_loads_bit_for_bit(ranks, tmp_path):
    folders = [str(tmp_path / str(world_size)) for world_size in WORLDS]
    for world_size, folder in zip(WORLDS, folders, strict=True):
        ranks.run(world_size, save_all, folder)
    for world_size in WORLDS:
        ranks.run(world_size, load_all, folders)


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_a_range_of_elements_is_few_boxes(shape, data):
    whole_tensor = torch.arange(int(np.prod(shape))).reshape(shape)
    start = data.draw(st.integers(0, whole_tensor.numel()))
    stop = data.draw(st.integers(start, whole_tensor.numel()))
    boxes = list(boxes_of_range(tuple(shape), start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    found = []
    for offsets, sizes in boxes:
        box = whole_tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
        found += box.reshape(-1).tolist()
    assert found == list(range(start, stop))


@given(st.integers(1, 30), st.lists(st.integers(0, 30), max_size=5), st.integers(0, 3))
def test_parts_that_do_not_make_up_a_tensor_are_found(total, cuts, doubled):
    ends = sorted({min(c, total) for c in cuts} | {0, total})
    parts = [(a, b - a) for a, b in itertools.pairwise(ends)]
    assert uncovered(parts + parts[:doubled], (total,)) is None
    if len(parts) > 1:
        assert "is on no rank" in uncovered(parts[1:], (total,))
        assert "overlap" in uncovered([*parts, (0, parts[0][1] + 1)], (total,))


# ---------------------------------------------------------------------------------------------------------
# Per rank, generators, and what is the same as PyTorch's own


def draws():
    return [random.random(), np.random.rand(), torch.rand(1).item(), dist.get_rank()]


def save_generators(folder):
    random.seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    torch.manual_seed(dist.get_rank())
    own = torch.Generator().manual_seed(dist.get_rank())
    state = {
        "default": PerRank(RandomGenerators()),
        "own": PerRank(own),
        "local": PerRank(torch.full((2,), dist.get_rank())),
    }
    checkpoint.save(folder, 1, state)
    return draws(), torch.rand(1, generator=own).item()


def load_generators(folder):
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(100)
    own = torch.Generator().manual_seed(100)
    state = {
        "default": PerRank(RandomGenerators()),
        "own": PerRank(own),
        "local": PerRank(torch.full((2,), 100)),
    }
    checkpoint.load(folder, state)
    return (draws(), torch.rand(1, generator=own).item()), state["local"].value.tolist()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_each_rank_goes_on_with_its_own_random_numbers(ranks, tmp_path, world_size):
    saved = ranks.run(3, save_generators, str(tmp_path))
    found = ranks.run(world_size, load_generators, str(tmp_path))
    for rank in range(min(world_size, 3)):
        assert found[rank] == (saved[rank], [rank, rank])
    if world_size == 4:  # nobody was rank 3: it keeps what it has
        assert found[3][1] == [100, 100]
        assert found[3][0][0][:3] != saved[0][0][:3]


def beside_pytorch(folder):
    found = []
    model, optimizer = trained("fsdp", 3)
    checkpoint.save(Path(folder) / "ours", 3, {"model": model, "optimizer": optimizer})
    dcp_save({"model": model.state_dict()}, storage_writer=FileSystemWriter(Path(folder) / "theirs"))
    ours, theirs = trained("fsdp", 0)[0], trained("fsdp", 0)[0]
    checkpoint.load(Path(folder) / "ours", {"model": ours, "optimizer": trained("fsdp", 0)[1]})
    state = {"model": theirs.state_dict()}
    dcp_load(state, storage_reader=FileSystemReader(Path(folder) / "theirs"))
    for a, b, c in zip(*(m.state_dict().values() for m in (model, ours, theirs)), strict=True):
        found.append(torch.equal(whole(a), whole(b)) and torch.equal(whole(a), whole(c)))
    return found


def test_it_holds_what_pytorchs_own_checkpoint_holds(ranks, tmp_path):
    assert all(all(found) for found in ranks.run(2, beside_pytorch, str(tmp_path)))


def classes_that_a_load_unpickles(folder, theirs):
    """Python reports each class or function that any unpickler looks up."""
    looked_up, listening = [], [False]
    sys.addaudithook(
        lambda event, _: looked_up.append(event) if listening[0] and event == "pickle.find_class" else None
    )
    state = {"x": torch.ones(3), "n": 4}
    if theirs:
        dcp_save(state, checkpoint_id=folder, no_dist=True)
        listening[0] = True
        dcp_load(state, checkpoint_id=folder, no_dist=True)
    else:
        checkpoint.save(folder, 1, state)
        listening[0] = True
        checkpoint.load(folder, state)
    listening[0] = False
    return len(looked_up)


def test_loading_unpickles_nothing(ranks, tmp_path):
    """PyTorch's own does, which is why it may not be given a checkpoint from a stranger."""
    assert ranks.run(1, classes_that_a_load_unpickles, str(tmp_path / "ours"), False, backend=None) == [0]
    assert ranks.run(1, classes_that_a_load_unpickles, str(tmp_path / "theirs"), True, backend=None)[0] > 0


# ---------------------------------------------------------------------------------------------------------
# Which checkpoints are there


def numbered(step):
    return {"x": torch.full((50, 3), float(step)), "n": step}


def test_the_last_ones_are_kept_and_what_is_unfinished_is_removed(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None
    for step in (10, 20, 30, 40):
        place = checkpoint.save(tmp_path, step, numbered(step), keep=2)
        assert checkpoint.latest(tmp_path) == place
        shutil.copytree(place, tmp_path / ".unfinished-step-00000050-000009-abcd")
        assert checkpoint.latest(tmp_path) == place
    assert sorted(path.name for path in tmp_path.iterdir())[1:] == [
        "step-00000030-000003",
        "step-00000040-000004",
    ]
    state = numbered(0)
    assert checkpoint.load(tmp_path, state) == 40
    assert checkpoint.load(tmp_path, state, step=30) == 30
    assert_equal(state, numbered(30))
    # Taken up again from an earlier step: the newest is what was written last, and no save removes itself.
    checkpoint.save(tmp_path, 25, numbered(25), keep=2)
    assert checkpoint.load(tmp_path, state) == 25
    checkpoint.save(tmp_path, 25, numbered(-25), keep=1)
    assert checkpoint.load(tmp_path, state) == 25
    assert_equal(state, numbered(-25))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000025-000006"]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"no checkpoint in {tmp_path}")):
        checkpoint.load(tmp_path, {})
    checkpoint.save(tmp_path, 3, {"n": 1})
    with pytest.raises(ValueError, match=r"no checkpoint of step 4 in .*, which has step-00000003-000001"):
        checkpoint.load(tmp_path, {"n": 0}, step=4)
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.save(tmp_path, 3, {"n": 1}, keep=0)


# ---------------------------------------------------------------------------------------------------------
# What is wrong is said on every rank


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rewrite(change):
    """Metadata changed by someone who also mends the checksum."""

    def damage(path):
        from parallel.checkpoint_storage import FORMAT
        from parallel.checkpoint_storage import checksum as of

        body = json.loads(path.read_text())
        del body["format"], body["checksum"]
        change(body["tensors"]["x"]["chunks"][0])
        path.write_text(json.dumps({"format": FORMAT, "checksum": of(body), **body}))

    return damage


DAMAGES = {
    "truncated": (
        "rank-1.bin",
        lambda path: os.truncate(path, 100),
        r"rank-1.bin is truncated: 100 bytes instead of",
    ),
    "altered": ("rank-0.bin", flip, r"rank-0.bin: bytes \d+ to \d+ \(\w\) do not have their checksum"),
    "missing": ("rank-1.bin", os.unlink, r"rank-1.bin: No such file or directory"),
    "metadata missing": ("metadata.json", os.unlink, r"metadata.json: No such file or directory"),
    "metadata altered": ("metadata.json", flip, r"metadata.json cannot be read as the metadata"),
    "metadata truncated": (
        "metadata.json",
        lambda path: os.truncate(path, 200),
        r"metadata.json cannot be read",
    ),
    "another file": (
        "metadata.json",
        rewrite(lambda chunk: chunk.update(file="../../secret")),
        r"x lies outside of the checkpoint, in '../../secret'",
    ),
    "huge": (
        "metadata.json",
        rewrite(lambda chunk: chunk.update(sizes=[10**12, 3], length=12 * 10**12)),
        r"rank-\d.bin is truncated: \d+ bytes instead of 12000000",
    ),
}


def errors_of_loading(folder, step):
    state = {"x": torch.zeros(50, 3), "y": torch.zeros(50, 3), "n": 0}
    found = []
    began = time.monotonic()
    try:
        checkpoint.load(folder, state)
    except ValueError as error:
        found = [str(error)]
    assert time.monotonic() - began < 10
    assert not state["x"].any()
    assert state["n"] == 0
    if step:
        assert checkpoint.load(folder, state, step=step) == step
        assert (state["x"] == step).all()
    return found


def save_numbered(folder, steps):
    for step in steps:
        checkpoint.save(folder, step, {**numbered(step), "y": torch.full((50, 3), 1.0)}, keep=9)


def test_a_damaged_checkpoint_is_named_and_an_earlier_one_that_is_whole(ranks, tmp_path):
    ranks.run(2, save_numbered, str(tmp_path / "made"), [10, 20, 30])
    for name, (file, damage, message) in DAMAGES.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "made", folder)
        flip(folder / "step-00000020-000002" / "rank-0.bin")
        damage(folder / "step-00000030-000003" / file)
        found = ranks.run(3, errors_of_loading, str(folder), 10)
        assert found[0] == found[1] == found[2]
        assert re.search(message, found[0][0]), (name, found[0][0])
        assert "step-00000010-000001 before it is whole: load(..., step=10)" in found[0][0]
        flip(folder / "step-00000010-000001" / "rank-0.bin")
        assert "none before it is whole" in ranks.run(1, errors_of_loading, str(folder), None)[0][0]


class Rooted(nn.Module):
    """Sharded as one: a parameter without dimensions, and one of which a second rank has no row."""

    def __init__(self):
        super().__init__()
        self.encoder, self.scale = nn.Linear(3, 4), nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(4, 1, bias=False)

    def forward(self, x):
        return self.head(self.encoder(x) * self.scale)


def rooted(optimizer_class=torch.optim.AdamW):
    torch.manual_seed(3)
    model = Rooted()
    fsdp.fully_shard(model)
    factored = optimizer_class is torch.optim.Adafactor  # divides by the rows that a rank has
    optimizer = optimizer_class([model.encoder.weight] if factored else model.parameters(), lr=0.1)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def moments(model, optimizer):
    return fsdp.full_optimizer_state_dict(model, optimizer)["state"]


def save_shards(folder):
    """In the forms that a sharded module can be in; what is refused."""
    folder = Path(folder)
    model, optimizer = rooted()
    expected, expected_moments = fsdp.full_state_dict(model), moments(model, optimizer)
    checkpoint.save(folder / "all", 1, {"model": model, "optimizer": optimizer})
    checkpoint.save(folder / "inner", 1, {"model": model.encoder})
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(copies, assign=True)  # new parameters, which no forward has seen
    assert_equal(fsdp.full_state_dict(model), expected)
    model.load_state_dict({name: tensor.clone() for name, tensor in copies.items()}, assign=True)
    checkpoint.save(folder / "assigned", 1, {"model": model})
    plain, adam = Rooted(), torch.optim.AdamW
    checkpoint.load(folder / "all", {"model": plain, "optimizer": adam(plain.parameters(), lr=0.1)})
    assert_equal(dict(plain.state_dict()), expected)
    plain = Rooted()
    checkpoint.load(folder / "assigned", {"model": plain})
    assert_equal(dict(plain.state_dict()), expected)
    inner = nn.Linear(3, 4)
    checkpoint.load(folder / "inner", {"model": inner})
    assert torch.equal(inner.weight, expected["encoder.weight"])
    other, again = rooted()  # has a state of its own already
    other(torch.ones(1, 3)).sum().backward()
    again.step()
    checkpoint.load(folder / "all", {"model": other, "optimizer": again})
    assert_equal(fsdp.full_state_dict(other), expected)
    assert_equal(moments(other, again), expected_moments)

    hooked = rooted()[0]
    hooked.register_state_dict_post_hook(lambda module, state, *_: state.__delitem__("encoder.bias"))
    split = ColumnParallelLinear(4, 4)
    before = split.weight.detach().clone()
    checkpoint.save(folder / "split", 1, {"own": PerRank({"model": split})})
    split.weight.data.zero_()
    checkpoint.load(folder / "split", {"own": PerRank({"model": split})})
    assert torch.equal(split.weight, before)
    refused = [
        {"optimizer": rooted(torch.optim.Adafactor)[1]},
        {"model": PerRank(model)},
        {"model": hooked},
        {"model": split},
        {"optimizer": torch.optim.SGD(split.parameters())},
    ]
    return [error_of(checkpoint.save, folder / "refused", 1, state) for state in refused]


def save_unsplit(folder):
    layer = ColumnParallelLinear(4, 4)
    checkpoint.save(folder, 1, {"model": layer})
    plain = nn.Linear(4, 4)
    checkpoint.load(folder, {"model": plain})
    return torch.equal(plain.weight, layer.weight)


def test_a_tensor_parallel_layer_of_one_rank_is_saved_as_any_other(ranks, tmp_path):
    assert ranks.run(1, save_unsplit, str(tmp_path)) == [True]


def test_shards_are_saved_as_what_they_are_parts_of_or_not_at_all(ranks, tmp_path):
    first, second = ranks.run(2, save_shards, str(tmp_path))
    messages = [
        r"row_var is not one value for each element of a parameter \(4, 3\) that is sharded",
        r"is a part of a whole tensor, so leave PerRank out",
        r"state_dict gives nothing for encoder\.bias; this rank's shard is \(2,\)",
        r"weight of ColumnParallelLinear is this rank's alone",
        r"parameter 0 of SGD is this rank's alone",
    ]
    for found in (first, second):
        for error, message in zip(found, messages, strict=True):
            assert error, message
            assert error[0] == "ValueError"
            assert re.search(message, error[1]), error


def error_of(function, *arguments):
    try:
        function(*arguments)
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error)
    return None


def wrong_saves(folder, file):
    rank = dist.get_rank()
    wrong = [
        {"a": {"x": torch.zeros(2 + rank)}},
        {"x": torch.zeros(2, dtype=[torch.float32, torch.float64][rank])},
        {"x": torch.zeros(2)} if rank else {"x": 2},
        {"x": 1, "y": 2} if rank else {"x": 1},
        {"epoch": rank},
        {"list": [1] * (1 + rank)},
        {"x": Sharded(torch.zeros(3), (7,), 3 * rank)},
        {"x": Sharded(torch.zeros(4), (7,), 2 * rank)},
        {"x": object()} if rank else {"x": 1},
        {"x": torch.eye(2).to_sparse()},
        {(1, 2): 3},
        {"x": {"1": torch.zeros(1), 1: torch.zeros(1)}},
    ]
    found = [error_of(checkpoint.save, folder, 1, state) for state in wrong]
    found.append(error_of(checkpoint.save, folder, rank, {"x": 1}))
    found.append(error_of(checkpoint.save, file, 1, {"x": torch.zeros(1)}))
    assert checkpoint.latest(folder) is None
    return found


def test_a_state_that_cannot_be_saved_is_refused_on_all_ranks(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    first, second = ranks.run(2, wrong_saves, str(tmp_path / "folder"), str(tmp_path / "file"))
    assert first == second
    messages = [
        r"a/x is \(2,\) torch.float32 on rank 0 and \(3,\) torch.float32 on rank 1",
        r"x is \(2,\) torch.float32 on rank 0 and \(2,\) torch.float64 on rank 1",
        r"x is a value on rank 0 and a tensor on rank 1",
        r"the state has the keys \['x'\] on rank 0 and \['x', 'y'\] on rank 1",
        r"epoch is 0 on rank 0 and 1 on rank 1; wrap in PerRank",
        r"list has 1 items on rank 0 and 2 on rank 1",
        r"x: element 6 of 7 is on no rank; the parts are elements 0 to 3 on rank 0, 3 to 6 on rank 1",
        r"x: element 2 of 7 is in parts that overlap",
        r"x: a checkpoint holds tensors, .* not a object \(rank 1\)",
        r"x: a checkpoint holds dense tensors, not torch.sparse_coo \(rank 0, 1\)",
        r"the keys of a state are strings and integers, not \(1, 2\)",
        r"two tensors of the state have the name x/1",
        r"ranks 0 to 1 save after steps \[0, 1\]",
    ]
    for (kind, text), message in zip(first[:-1], messages, strict=True):
        assert kind == "ValueError"
        assert re.search(message, text), text
    assert first[-1][0] == "OSError"
    assert "file" in first[-1][1]


def wrong_loads(folder):
    rank = dist.get_rank()
    right = {"model": nn.Linear(3, 2), "n": 1, "g": PerRank(torch.zeros(2)), "o": {"state": {0: 1}}}
    checkpoint.save(folder, 1, right)
    wrong = [
        {**right, "model": nn.Linear(3, 2 + rank)},
        {**right, "model": nn.Linear(3, 2, bias=False)},
        {**right, "model": nn.Linear(3, 2).double()},
        {**right, "more": 1},
        {**right, "g": torch.zeros(2)},
        {**right, "n": PerRank(1)},
        {**right, "n": torch.zeros(1)},
        {**right, "n": torch.optim.SGD(nn.Linear(3, 2).parameters())},
        {**right, "o": torch.optim.SGD(nn.Linear(3, 2).parameters())},
    ]
    return [error_of(checkpoint.load, folder, state) for state in wrong]


def test_a_state_that_does_not_fit_is_refused_on_all_ranks(ranks, tmp_path):
    first, second = ranks.run(2, wrong_loads, str(tmp_path))
    assert first == second
    messages = [
        r"model/weight is \(2, 3\) torch.float32 in the checkpoint and \(3, 3\) .* here \(rank 1\)",
        r"model: the checkpoint lacks \[\] and has \['bias'\], which is not here \(rank 0, 1\)",
        r"model/weight is \(2, 3\) torch.float32 in the checkpoint and \(2, 3\) torch.float64 here",
        r"the state: the checkpoint lacks \['more'\] and has \[\]",
        r"g is a per_rank in the checkpoint and a Tensor here",
        r"n is the same on all ranks in the checkpoint; here it is PerRank",
        r"n is a value in the checkpoint and a Tensor here",
        r"n is a value in the checkpoint; an optimizer's state has a dict there",
        r"o/state/0 is a value in the checkpoint; an optimizer's state has a dict there",
    ]
    for (kind, text), message in zip(first, messages, strict=True):
        assert kind == "ValueError"
        assert re.search(message, text), text


# ---------------------------------------------------------------------------------------------------------
# Killed at any moment


def save_until_killed(folder, background):
    """Steps on from what is there; every tensor holds its step, so that a mixture of two saves shows."""
    folder = Path(folder)
    saver = BackgroundSaver() if background else None
    state = {f"x{i}": torch.zeros(300, 5) for i in range(6)} | {"n": 0}
    step = checkpoint.load(folder, state) if checkpoint.latest(folder) else 0
    (folder / f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    while True:
        step += 1
        for i in range(6):
            state[f"x{i}"].fill_(step)
        if saver is None:
            checkpoint.save(folder, step, {**state, "n": step}, keep=1)
        else:
            saver.save(folder, step, {**state, "n": step}, keep=1)
            for i in range(6):
                state[f"x{i}"].fill_(-1)  # the training goes on
            saver.wait()
        if dist.get_rank() == 0:
            (folder / "saved").write_text(f"{step}\n")


def read_back(folder):
    state = {f"x{i}": torch.zeros(300, 5) for i in range(6)} | {"n": 0}
    step = checkpoint.load(folder, state)
    return step, all((state[f"x{i}"] == step).all() for i in range(6)) and state["n"] == step


def number_in(path):
    text = path.read_text() if path.exists() else ""
    return int(text) if text.endswith("\n") else 0


def kill_during_saves(ranks, folder, times, seed, background=False, amid=0):
    """SIGKILL one rank or both, at random moments; what `save` has returned from is never lost.

    So many ``times``, and on (to three times as many) until more than ``amid`` came in the middle of a save.
    """
    chance, steps = random.Random(seed), [0]
    unfinished = kills = 0
    while kills < times or (unfinished <= amid and kills < 3 * times and amid):
        kills += 1
        victims = chance.choice([[0], [1], [0, 1]])
        for rank in range(2):
            (folder / f"pid-{rank}").unlink(missing_ok=True)

        wanted, delay = steps[-1] + chance.randrange(4), chance.uniform(0, 0.03)

        def kill(victims=victims, wanted=wanted, delay=delay):
            pids, counter = [folder / f"pid-{rank}" for rank in range(2)], folder / "saved"
            waits = time.monotonic() + 60
            while not all(path.exists() and path.read_text() for path in pids) or number_in(counter) < wanted:
                assert time.monotonic() < waits
                time.sleep(0.001)
            time.sleep(delay)
            for pid in [int(pids[rank].read_text()) for rank in victims]:
                os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(AssertionError, match=r"ended with -9|RuntimeError|ended"):
            ranks.run(2, save_until_killed, str(folder), background, timeout=30)
        killer.join()
        ranks.close()
        unfinished += any(path.name.startswith(".") for path in folder.iterdir())
        saved = number_in(folder / "saved")
        if checkpoint.latest(folder):
            step, consistent = read_back(folder)
            assert consistent
            assert step >= saved
            assert step >= steps[-1]
            steps.append(step)
        else:
            assert saved == 0
    return unfinished


@pytest.mark.parametrize("background", [False, True])
def test_a_kill_during_a_save_loses_nothing(ranks, tmp_path, background):
    kill_during_saves(ranks, tmp_path, 2, 0, background)


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.parametrize("background", [False, True])
def test_kills_at_a_hundred_moments_lose_nothing(ranks, tmp_path, background):
    assert kill_during_saves(ranks, tmp_path, 100, 1, background, amid=20) > 20


def saves_in_the_background(folder):
    """(where two saves are that were written while their tensors changed, what they hold)."""
    rank, folder = dist.get_rank(), Path(folder)
    whole, half = torch.zeros(200_000), torch.zeros(100_000)
    saver, futures = BackgroundSaver(), []
    for step in (1, 2):
        whole.fill_(step)
        half.fill_(10 * step + rank)
        state = {"whole": whole, "part": Sharded(half, (2, 100_000), 100_000 * rank), "n": step}
        futures.append(saver.save(folder / "good", step, state))
        whole.fill_(-1.0)
        half.fill_(-1.0)
    assert futures[0].done()  # one at a time
    paths = [future.result().name for future in futures]
    assert saver.wait() == futures[1].result()
    found = []
    for step in (1, 2):
        state = {"whole": whole, "part": torch.zeros(2, 100_000), "n": 0}
        checkpoint.load(folder / "good", state, step=step)
        found.append((whole.unique().tolist(), state["part"].unique().tolist(), state["n"]))
    if rank == 0:
        (folder / "a-file").write_text("")
    dist.barrier()
    saver.save(folder / "a-file", 3, {"whole": whole})
    with pytest.raises(OSError, match="a-file"):
        saver.wait()
    with pytest.raises(ValueError, match="save after steps"):
        saver.save(folder / "good", 4 + rank, {"whole": whole})
    saver.close()
    return paths, found


def test_a_save_in_the_background_holds_what_was_there_when_it_began(ranks, tmp_path):
    for paths, found in ranks.run(2, saves_in_the_background, str(tmp_path)):
        assert paths == ["step-00000001-000001", "step-00000002-000002"]
        assert found == [([1.0], [10.0, 11.0], 1), ([2.0], [20.0, 21.0], 2)]
