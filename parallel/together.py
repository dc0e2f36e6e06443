"""What goes wrong on one rank is raised on all: else the others wait for it in their next collective. Who
waits in vain says for what."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def together(group: dist.ProcessGroup | None, function: Callable[[], T]) -> list[T]:
    """What ``function`` returns on each rank. If it raises on any, all ranks raise, and say which ranks it
    was."""
    answer, error = None, None
    try:
        answer = function()
    except Exception as raised:
        if not dist.is_initialized():
            raise
        error = raised
    if not dist.is_initialized():
        return [answer]  # type: ignore[list-item]
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (answer, error and said_by(error)), group)
    raise_alike({rank: said for rank, (_, said) in enumerate(answers) if said}, error)
    return [answer for answer, _ in answers]


def said_by(error: BaseException) -> tuple[type[Exception], str]:
    """(the kind of error, its text) as other ranks can raise it: ValueError, OSError, else RuntimeError."""
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind, str(error)
    return RuntimeError, f"{type(error).__name__}: {error}"


def raise_alike(said: dict[int, tuple[type[Exception], str]], cause: BaseException | None) -> None:
    """One error, the same on all ranks, of what ranks said: what several say alike is said once."""
    if not said:
        return
    ranks: dict[str, list[str]] = {}
    for rank, (_, text) in said.items():
        ranks.setdefault(text, []).append(str(rank))
    text = "; ".join(f"{text} (rank {', '.join(who)})" for text, who in ranks.items())
    raise next(iter(said.values()))[0](text) from cause


@contextlib.contextmanager
def waiting_for_others(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Around a wait: an error of the backend, its time-out included, says which rank waited and for what."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} waited in vain for the others with "
            f"{what}: a rank has died, has fewer batches than others (see join) or left parameters unused "
            f"(see find_unused_parameters). {error}"
        ) from error
