"""Checkpoints that survive: sharded, atomic, checked, and read back at any world size.

    state = {"model": model, "optimizer": optimizer, "generators": PerRank(RandomGenerators()), "position": 0}
    if checkpoint.latest(directory):
        step = checkpoint.load(directory, state)
    ...
    checkpoint.save(directory, step, state)

A checkpoint is a directory ``step-<step>-<number>``, where the number counts the saves into ``directory``:
the newest is the one with the highest number, whatever its step, since a run may have been taken up again
from an earlier one. It is written under a hidden name; every rank brings its file to the disk; then rank 0
writes metadata.json and renames. A rename is atomic: a checkpoint is there whole or not at all, and whoever
is killed at whatever moment leaves the one before untouched. What was left unfinished is removed by the
next save. (`parallel.checkpoint_background` does this while the training goes on.)

Planning, deduplication of replicas and resharding are ``torch.distributed.checkpoint``'s, files and
metadata are `parallel.checkpoint_storage`'s (nothing is unpickled), what a state may hold is
`parallel.checkpoint_state`'s. All calls are collective over ``group``, and what goes wrong on one rank is
raised on all of them.
"""

import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.utils import find_state_dict_object

from parallel.checkpoint_state import PerRank, RandomGenerators, Restore, Tensors, merge, take_apart
from parallel.checkpoint_storage import Reader, Writer, read_metadata, sync, verify
from parallel.sharded import Sharded, check_layouts, layout
from parallel.together import raise_alike, said_by, together

__all__ = ["PerRank", "RandomGenerators", "Sharded", "latest", "load", "save"]

NAME = re.compile(r"step-(\d+)-(\d+)")
UNFINISHED, REMOVED = ".unfinished-", ".removed-"


def save(
    directory: str | os.PathLike,
    step: int,
    state: dict[str, Any],
    group: dist.ProcessGroup | None = None,
    keep: int = 2,
) -> Path:
    """Write ``state`` after ``step`` steps; returns where, once it has reached the disk. Keeps the last
    ``keep``.

    state: a dictionary of tensors, DTensors, `Sharded`, plain values, `torch.Generator`s, `PerRank`,
    objects with state_dict and load_state_dict, and dictionaries, lists and tuples of such. Modules that
    ``fully_shard`` was applied to, PyTorch's or ours, and their optimizers are sharded. What is neither
    sharded nor PerRank is the same on all ranks: plain values are compared, of equal tensors one rank
    writes its own.

    Raises ValueError on every rank for a state that ranks disagree on or that a checkpoint cannot hold,
    OSError for a directory that cannot be written; both name the ranks.
    """
    return prepare(directory, step, state, group, keep)()


def prepare(
    directory: str | os.PathLike,
    step: int,
    state: dict[str, Any],
    group: dist.ProcessGroup | None,
    keep: int,
    copied: bool = False,
) -> Callable[[], Path]:
    """The first half of ``save``, after which only the tensors are read; what it returns is the second.

    copied: the tensors are copied first, so that they may change before the second half.
    """
    if keep < 1:
        raise ValueError(f"a save keeps at least the checkpoint that it writes: keep is {keep}")
    folder, rank = Path(directory), _rank(group)
    tensors: Tensors = {}

    def describe() -> tuple[Any, dict[str, Any], int, tuple[str, Path]]:
        tree = take_apart(state, tensors, rank)
        names = _begin(folder, step) if rank == 0 else ("", folder)
        return tree, {name: layout(tensor) for name, tensor in tensors.items()}, step, names

    answers = together(group, describe)
    name, unfinished = answers[0][3]  # rank 0's choice

    def agree() -> dict[str, Any]:
        steps = [answer[2] for answer in answers]
        if len(set(steps)) > 1:
            raise ValueError(f"ranks 0 to {len(steps) - 1} save after steps {steps}")
        check_layouts([answer[1] for answer in answers])
        return {"step": step, "world_size": len(answers), "state": merge([answer[0] for answer in answers])}

    def commit() -> None:
        os.rename(unfinished, folder / name)
        sync(folder)
        for old in _all(folder)[keep:]:
            _remove(old)

    body = agree()  # all ranks have the same answers, so all raise or none
    writer = Writer(unfinished, rank, body, commit)
    held = {name: _copy(tensor) for name, tensor in tensors.items()} if copied else tensors

    def write() -> Path:
        _run(group, lambda **how: dcp.save(dict(held), storage_writer=writer, planner=_SavePlanner(), **how))
        return folder / name

    return write


def _copy(tensor: Any) -> Any:
    if isinstance(tensor, Sharded):
        return Sharded(tensor.local.detach().clone(), tensor.shape, tensor.offset)
    return tensor.detach().clone()


def load(
    directory: str | os.PathLike,
    state: dict[str, Any],
    group: dist.ProcessGroup | None = None,
    step: int | None = None,
) -> int:
    """Fill ``state`` from the newest checkpoint, or the newest of ``step``; returns its step.

    The state is shaped as it was saved; tensors are filled where they are, plain values are replaced in the
    dictionaries, and objects get their load_state_dict called. Ranks may be more or fewer than saved it.

    Raises ValueError on every rank, before anything in ``state`` has changed: no such checkpoint; a file
    that is missing, truncated or altered, by name, and which earlier checkpoint is whole; a state that does
    not fit.
    """
    folder, rank = Path(directory), _rank(group)

    def choose() -> list[str]:
        found = [path.name for path in _all(folder)]
        wanted = [name for name in found if step in (None, _step(name))]
        if not wanted:
            what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise ValueError(f"{what} in {folder}" + (f", which has {', '.join(found)}" if found else ""))
        return found[found.index(wanted[0]) :]

    # One rank looks: another process may be saving, and all must read the same.
    names = together(group, lambda: choose() if rank == 0 else [])[0]
    try:
        _verify(folder / names[0], group)
    except ValueError as error:
        whole = next((name for name in names[1:] if _is_whole(folder / name, group)), None)
        rescue = (
            f"{whole} before it is whole: load(..., step={_step(whole)})"
            if whole
            else "none before it is whole"
        )
        raise ValueError(f"{error}; {rescue}") from error

    def prepare() -> tuple[Metadata, Tensors, Callable[[], Any], int]:
        body, metadata = read_metadata(folder / names[0])
        described = metadata.state_dict_metadata
        stored = {name: (tuple(t.size), t.properties.dtype) for name, t in described.items()}
        restore = Restore(stored, rank, {})
        return metadata, restore.tensors, restore.fit(state, body["state"]), body["step"]

    prepared: list[Any] = []
    together(group, lambda: prepared.extend(prepare()))
    metadata, tensors, finish, saved = prepared
    reader = Reader(folder / names[0], metadata)
    _run(group, lambda **how: dcp.load(dict(tensors), storage_reader=reader, planner=_LoadPlanner(), **how))
    finish()
    return saved


def latest(directory: str | os.PathLike) -> Path | None:
    """The newest finished checkpoint in ``directory``, or None."""
    return next(iter(_all(Path(directory))), None)


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        return _part(self.state_dict, index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.flatten_state_dict = False

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return _part(self.state_dict, index)


def _part(tensors: dict[str, Any], index: MetadataIndex) -> torch.Tensor:
    found = tensors[index.fqn]
    return (
        found.__get_tensor_shard__(index)
        if isinstance(found, Sharded)
        else find_state_dict_object(tensors, index)
    )


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_initialized() else 0


def _run(group: dist.ProcessGroup | None, call: Callable[..., Any]) -> None:
    """A call of torch.distributed.checkpoint; what it raises, all ranks raise, as ValueError or OSError."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            call(process_group=group)
    except CheckpointException as error:
        failures = {rank: raised for rank, (raised, _) in error.failures.items()}
        raise_alike(
            {rank: said_by(raised) for rank, raised in failures.items()}, next(iter(failures.values()))
        )


def _verify(path: Path, group: dist.ProcessGroup | None) -> None:
    """Every rank reads its share of the checkpoint; ValueError on all if a byte of it is not as written."""
    world_size = dist.get_world_size(group) if dist.is_initialized() else 1
    together(group, lambda: verify(path, _rank(group), world_size))


def _is_whole(path: Path, group: dist.ProcessGroup | None) -> bool:
    try:
        _verify(path, group)
    except ValueError:
        return False
    return True


def _all(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def _step(name: str) -> int:
    return int(name.split("-")[1])


def _begin(folder: Path, step: int) -> tuple[str, Path]:
    """The name of a new checkpoint and the hidden directory to write it into; removes what was left
    unfinished."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith((UNFINISHED, REMOVED)):
            shutil.rmtree(path)
    number = max((int(path.name.rpartition("-")[2]) for path in _all(folder)), default=0) + 1
    name = f"step-{step:08d}-{number:06d}"
    return name, folder / f"{UNFINISHED}{name}-{secrets.token_hex(4)}"


def _remove(path: Path) -> None:
    """Under another name first: a checkpoint of which half has been removed must not look like one."""
    hidden = path.with_name(REMOVED + path.name)
    os.rename(path, hidden)
    shutil.rmtree(hidden)
