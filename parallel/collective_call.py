"""One call of a collective: who takes part, with what, whether it fits, and the run."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from parallel import collective_trees as trees
from parallel.collective_costs import ALGORITHMS, algorithms, choose
from parallel.point_to_point import Handle, Rounds, agree, start
from parallel.reductions import NAMES, fits, number_of

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
FACTS = ("operation", "dtype", "elements", "reduction", "root", "algorithm", "arguments")
HEADER_BYTES = 8 * len(FACTS)  # what a rank tells every other in a checked call


class Call:
    """Collected arguments of one call. What is wrong with this rank's own is kept in ``problem`` until all
    know.

    tensor: gives dtype, device and size of the whole vector, as collective_costs.py counts it.
    """

    def __init__(
        self,
        operation: str,
        tensor: torch.Tensor,
        group: dist.ProcessGroup | None,
        algorithm: str | None,
        op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        root: int | None = None,
    ) -> None:
        self.operation, self.tensor, self.reduction, self.problem = operation, tensor, op, ""
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{operation}: this process is not in the group")
        self.group: dist.ProcessGroup = group if group is not None else dist.group.WORLD
        self.rank, self.size = self.group.rank(), self.group.size()
        self.count = tensor.numel() * (self.size if operation in ("gather", "scatter") else 1)
        self.root = 0
        if root is not None:
            ranks = dist.get_process_group_ranks(self.group)
            self.require(root in ranks, f"root {root} is not one of the group's ranks {ranks}")
            self.root = ranks.index(root) if root in ranks else -1
        self.place = (self.rank - self.root) % self.size
        self.require(not fits(op, tensor.dtype), fits(op, tensor.dtype))
        known = algorithms(operation)
        self.require(algorithm in (None, *known), f"no algorithm {algorithm!r}; there are {known}")
        self.algorithm = algorithm or choose(operation, self.count * tensor.element_size(), self.size)

    def require(self, right: bool, problem: str) -> None:
        """Note the first thing that is wrong."""
        if not right and not self.problem:
            self.problem = problem

    def require_like(self, name: str, tensor: torch.Tensor) -> None:
        """``tensor`` has the call's dtype and device."""
        there, here = (tensor.dtype, tensor.device), (self.tensor.dtype, self.tensor.device)
        self.require(there == here, f"{name} is {there[0]} on {there[1]}, the other {here[0]} on {here[1]}")

    def require_parts(self, whole_name: str, whole: torch.Tensor, name: str, part: torch.Tensor) -> None:
        """``whole`` has as many elements as one ``part`` of every rank."""
        self.require_like(name, part)
        self.require(
            whole.numel() == self.size * part.numel(),
            f"{whole_name} has {whole.numel()} elements; with {part.numel()} in {name} and {self.size} ranks "
            f"it must have {self.size * part.numel()}",
        )

    def require_splits(self, name: str, tensor: torch.Tensor, splits: Sequence[int] | None) -> list[int]:
        """Rows of ``tensor`` by rank: ``splits``, or as many for each."""
        rows = len(tensor) if tensor.ndim else 0
        self.require(tensor.ndim > 0, f"{name} must have rows, not be a scalar")
        if splits is None:
            self.require(rows % self.size == 0, f"{rows} rows of {name} do not divide by {self.size} ranks")
            return [rows // self.size] * self.size
        found = list(splits)
        self.require(
            len(found) == self.size and sum(found) == rows and min(found) >= 0,
            f"{name}_split_sizes {found} must be {self.size} numbers of rows that sum to {rows}",
        )
        return found

    def require_list(self, name: str, parts: list[torch.Tensor] | None, like: torch.Tensor) -> None:
        """The root, and nobody else, has a list of one tensor a rank, each as large as ``like``."""
        if self.place:
            self.require(not parts, f"{name} is given, but only the root (rank {self.root}) may give one")
            return
        shapes = [tuple(part.shape) for part in parts or []]
        self.require(
            len(shapes) == self.size and all(part.numel() == like.numel() for part in parts or []),
            f"{name} of the root must be {self.size} tensors of {like.numel()} elements, not {shapes}",
        )
        for part in parts or []:
            self.require_like(name, part)

    @contextlib.contextmanager
    def flat(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """``tensor`` as contiguous elements in one dimension; what is written there gets back into it."""
        tensor = tensor.detach()
        flat = tensor.contiguous().view(-1)
        yield flat
        if not tensor.is_contiguous():
            tensor.copy_(flat.view_as(tensor))

    def shifted(self, rounds: Rounds) -> Rounds:
        """Rounds between places as rounds between ranks."""
        return trees.shifted(rounds, self.root, self.size)

    def start(
        self,
        rounds: Callable[[], Rounds],
        async_op: bool,
        checked: bool,
        splits: tuple[list[int], list[int]] | None = None,
    ) -> Handle | None:
        """Agree with the others (``checked``), then run. ValueError on all ranks if something does not fit;
        asynchronously it is raised by ``wait()``."""

        def all_rounds() -> Rounds:
            if checked:
                yield from self._check()
            if self.problem:
                raise ValueError(f"{self.operation}: {self.problem}")
            if checked and splits is not None:
                yield from self._check_splits(*splits)
            yield from rounds()

        return start(all_rounds, self.group, self.operation, self.tensor.device, async_op)

    def _check(self) -> Rounds:
        known = algorithms(self.operation)
        facts = [
            list(ALGORITHMS).index(self.operation),
            DTYPES.index(self.tensor.dtype),
            0 if self.operation == "all_to_all" else self.tensor.numel(),  # may differ; the splits say
            number_of(self.reduction),
            self.root,
            known.index(self.algorithm) if self.algorithm in known else -1,
            bool(self.problem),
        ]
        found = yield from agree(facts, self.rank, self.size, self.tensor.device)
        for number, name in enumerate(FACTS[:-1]):
            ranks_by_value: dict[int, list[str]] = {}
            for rank, theirs in enumerate(found):
                ranks_by_value.setdefault(theirs[number], []).append(str(rank))
            if len(ranks_by_value) > 1 and not any(theirs[-1] for theirs in found):
                each = (
                    f"{_text(name, value, self.operation)} on rank {', '.join(ranks)}"
                    for value, ranks in ranks_by_value.items()
                )
                text = "; ".join(each)
                self.require(False, f"{name} must be the same on all ranks of the group, not {text}")
        for rank, theirs in enumerate(found):
            self.require(
                not theirs[-1], f"rank {rank} was called with wrong arguments, as its own error says"
            )

    def _check_splits(self, sent: list[int], received: list[int]) -> Rounds:
        width = self.tensor[0].numel() if self.tensor.numel() else 0
        found = yield from agree([*sent, *received, width], self.rank, self.size, self.tensor.device)
        if len(widths := {theirs[-1] for theirs in found if theirs[-1]}) > 1:
            raise ValueError(
                f"{self.operation}: rows must be as wide on all ranks, not {sorted(widths)} elements"
            )
        for source, theirs in enumerate(found):
            for target, others in enumerate(found):
                if theirs[target] != others[self.size + source]:
                    raise ValueError(
                        f"{self.operation}: rank {source} sends {theirs[target]} rows to rank {target}, "
                        f"which expects {others[self.size + source]}"
                    )


def _text(name: str, value: int, operation: str) -> str:
    """A fact as people write it."""
    names = {
        "operation": list(ALGORITHMS),
        "dtype": [str(dtype).removeprefix("torch.") for dtype in DTYPES],
        "reduction": list(NAMES.values()),
        "algorithm": algorithms(operation),
    }
    return names[name][value] if name in names else str(value)
