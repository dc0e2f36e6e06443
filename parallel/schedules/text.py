"""Schedules as text: printed, read, and read as PyTorch writes them. ``actions`` shows the form."""

from __future__ import annotations

import re
from pathlib import Path

from parallel.schedules.actions import SYMBOLS, Action, Kind, Schedule, columns
from parallel.schedules.validator import validate

_ACTION = re.compile(r"(\d+)([A-Z_]+)(\d+)")
_KINDS = {symbol: Kind(kind) for kind, symbol in enumerate(SYMBOLS)}
_SHARDING = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)")
_LARGEST = 2**31 - 1  # columns are int32


def to_text(schedule: Schedule) -> str:
    """The text that ``parse`` reads back."""
    lines = [f"name {schedule.name}", "placement " + " ".join(map(str, schedule.placement))]
    for rank in range(schedule.world_size):
        lines.append(" ".join([f"{rank}:", *map(str, schedule.actions(rank))]))
    return "\n".join(lines) + "\n"


def parse(text: str) -> Schedule:
    """The schedule that ``text`` writes down; ValueError with the line that is wrong.

    Whether it can be executed is ``validate``'s to say. There are as many micro-batches as the largest number
    tells.
    """
    settings: dict[str, str] = {}
    ranks: dict[int, list[Action]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        try:
            if re.match(r"\d+\s*:", line):
                rank, _, rest = line.partition(":")
                if int(rank) in ranks:
                    raise ValueError(f"rank {int(rank)} has a line already")
                ranks[int(rank)] = [_action(word) for word in rest.split()]
            elif line:
                key, _, value = line.partition(" ")
                if key not in ("name", "placement") or not value.strip():
                    raise ValueError(
                        f"{line!r} is neither 'name WORD', 'placement RANK ...' nor 'RANK: ACTION ...'"
                    )
                if key in settings:
                    raise ValueError(f"there is a {key} already")
                if key == "placement" and not re.fullmatch(r"[\d\s]+", value):
                    raise ValueError(
                        f"a placement names the rank of each stage, as in 'placement 0 1', not {value!r}"
                    )
                settings[key] = value.strip()
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    if "placement" not in settings:
        raise ValueError("there is no placement: a line 'placement RANK ...' names the rank of each stage")
    placement = tuple(map(int, settings["placement"].split()))
    return _schedule(settings.get("name", "unnamed"), placement, ranks)


def load(path: str | Path) -> Schedule:
    """The schedule in a file, validated. ValueError names the file and what is wrong; OSError: unreadable."""
    try:
        text = Path(path).read_text()
        schedule = parse_csv(text, Path(path).stem) if Path(path).suffix == ".csv" else parse(text)
        validate(schedule)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: a schedule is text, and this is not") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return schedule


def parse_csv(text: str, name: str = "csv") -> Schedule:
    """The schedule that PyTorch's pipelining writes with ``_dump_csv(file, format="compute_only")``: a row a
    rank, a cell an action, empty cells where the rank is idle. A forward and a backward that overlap,
    ``(0F1;7B0)OVERLAP_F_B``, stand one after the other here. What it does beside the pipeline, with sharded
    weights and their gradients (UNSHARD, RESHARD, REDUCE_GRAD), is left out. ValueError with the line that is
    wrong."""
    ranks: dict[int, list[Action]] = {}
    placement: dict[int, int] = {}
    for rank, line in enumerate(text.strip().splitlines()):
        words = re.sub(r"\(([^)]*)\)OVERLAP_F_B", r"\1", line).replace(";", ",").split(",")
        try:
            words = [word.strip() for word in words]
            ranks[rank] = [_action(word) for word in words if word and not _SHARDING.fullmatch(word)]
        except ValueError as error:
            raise ValueError(f"line {rank + 1}: {error}") from None
        for action in ranks[rank]:
            if placement.setdefault(action.stage, rank) != rank:
                other = placement[action.stage]
                raise ValueError(
                    f"line {rank + 1}: {action}: stage {action.stage} is on rank {other} already"
                )
    if sorted(placement) != list(range(len(placement))):
        raise ValueError(f"stages are numbered from 0 without gaps; there are {sorted(placement)}")
    return _schedule(name, tuple(placement[stage] for stage in sorted(placement)), ranks)


def _action(word: str) -> Action:
    match = _ACTION.fullmatch(word)
    if not match or match[2] not in _KINDS:
        raise ValueError(f"{word!r} is no action: stage, one of {' '.join(SYMBOLS)}, micro-batch, as in 2F0")
    stage, micro = int(match[1]), int(match[3])
    if max(stage, micro) >= _LARGEST:
        raise ValueError(f"{word!r}: a stage or micro-batch is below {_LARGEST}")
    return Action(_KINDS[match[2]], stage, micro)


def _schedule(name: str, placement: tuple[int, ...], ranks: dict[int, list[Action]]) -> Schedule:
    if missing := set(range(max(ranks, default=0) + 1)) - set(ranks):
        raise ValueError(f"rank {min(missing)} has no line")
    microbatches = 1 + max(
        (action.microbatch for actions in ranks.values() for action in actions), default=-1
    )
    return Schedule(name, placement, microbatches, tuple(columns(ranks[rank]) for rank in range(len(ranks))))
