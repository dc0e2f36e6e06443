"""What goes from rank to rank in a pipeline: in which order, of what shape, and who waits for it.

The schedule says who computes what in which order, so every rank knows what each other rank will send it, and
receives are posted in the sender's order, some of them ahead: no message waits for a receive, and no receive
stands in the way of another, whatever the transport (NCCL knows no tags).

The first message over a boundary between two stages is preceded by its shape; then both sides hold everything
against it. Receivers of later steps need no more than the sizes of micro-batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from parallel.liveness import RankLost
from parallel.schedules import Kind, Schedule

AHEAD = 2
"""Receives posted beyond the one that is waited for, of each other rank."""
TAG = 1 << 19
DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
TENSORS, DIMENSIONS = 8, 6
WIDTH = 4 + DIMENSIONS  # of a tensor in a header: dtype, rows, has_gradient, dimensions, shape
HEADER = 1 + TENSORS * WIDTH
HEADER_BYTES = 8 * HEADER


class TensorShape(NamedTuple):
    """A tensor that crosses a boundary. rows: of its first dimension, for each sample. shape: of a row."""

    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    has_gradient: bool

    def empty(self, samples: int, device: torch.device) -> torch.Tensor:
        return torch.empty((self.rows * samples, *self.shape), dtype=self.dtype, device=device)

    def fits(self, tensor: torch.Tensor, samples: int) -> bool:
        """Whether a tensor is one of this shape."""
        return (
            tensor.shape == (self.rows * samples, *self.shape)
            and tensor.dtype == self.dtype
            and tensor.requires_grad == self.has_gradient
        )

    def size(self, samples: int) -> int:
        """Bytes."""
        count = self.rows * samples
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        rows = "samples" if self.rows == 1 else f"{self.rows} * samples"
        gradient = "" if self.has_gradient else " without gradient"
        return f"({', '.join([rows, *map(str, self.shape)])}) {dtype}{gradient}"


Boundary = tuple[TensorShape, ...]
"""What a stage gives to the next one."""


def boundary_of(tensors: Sequence[torch.Tensor], samples: int, stage: int) -> Boundary:
    """ValueError or TypeError: outputs of ``stage`` for a micro-batch of ``samples`` that cannot be sent."""
    if not 1 <= len(tensors) <= TENSORS:
        raise ValueError(f"stage {stage} gives {len(tensors)} tensors; a stage gives 1 to {TENSORS}")
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"stage {stage} gives a {type(tensor).__name__}; a stage gives tensors")
        if tensor.dtype not in DTYPES or tensor.dim() > DIMENSIONS:
            raise ValueError(
                f"stage {stage} gives {tensor.dim()} dimensions of {tensor.dtype}; up to {DIMENSIONS} of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)} can be sent"
            )
        if not tensor.dim() or tensor.shape[0] % samples:
            raise ValueError(
                f"stage {stage} gives a tensor of shape {tuple(tensor.shape)} for {samples} samples; its "
                f"first dimension must be the samples, or a multiple of them"
            )
    return tuple(
        TensorShape(one.shape[0] // samples, tuple(one.shape[1:]), one.dtype, one.requires_grad)
        for one in tensors
    )


def encoded(boundary: Boundary | None) -> list[int]:
    """A boundary as HEADER integers; None, that the stage has failed, as zeros."""
    numbers = [0 if boundary is None else len(boundary)]
    for one in boundary or ():
        padding = [0] * (DIMENSIONS - len(one.shape))
        numbers += [DTYPES.index(one.dtype), one.rows, int(one.has_gradient), len(one.shape)]
        numbers += [*one.shape, *padding]
    return numbers + [0] * (HEADER - len(numbers))


def decoded(numbers: Sequence[int]) -> Boundary | None:
    """The inverse of ``encoded``."""
    rows = [numbers[1 + at * WIDTH : 1 + (at + 1) * WIDTH] for at in range(numbers[0])]
    return (
        tuple(TensorShape(row[1], tuple(row[4 : 4 + row[3]]), DTYPES[row[0]], bool(row[2])) for row in rows)
        or None
    )


class Message(NamedTuple):
    """The output of stage ``boundary`` (FORWARD), or the gradient of it (BACKWARD)."""

    kind: Kind
    boundary: int
    microbatch: int

    def __str__(self) -> str:
        what = "the output of" if self.kind == Kind.FORWARD else "the gradient for"
        return f"{what} stage {self.boundary}, micro-batch {self.microbatch}"


def messages(schedule: Schedule, source: int) -> list[tuple[int, Message, int]]:
    """What rank ``source`` sends: (position of the action that makes it, message, receiver)."""
    found, placement = [], schedule.placement
    for position, (kind, stage, microbatch) in enumerate(schedule.ranks[source].tolist()):
        if kind == Kind.FORWARD and stage + 1 < schedule.stages:
            message, target = Message(Kind.FORWARD, stage, microbatch), placement[stage + 1]
        elif kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT) and stage:
            message, target = Message(Kind.BACKWARD, stage - 1, microbatch), placement[stage - 1]
        else:
            continue
        if target != source:
            found.append((position, message, target))
    return found


def uses(schedule: Schedule, rank: int) -> dict[Message, int]:
    """Position of the action of ``rank`` that waits for each message, wherever it comes from."""
    found = {}
    for position, (kind, stage, microbatch) in enumerate(schedule.ranks[rank].tolist()):
        if kind == Kind.FORWARD and stage:
            found[Message(Kind.FORWARD, stage - 1, microbatch)] = position
        elif kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT) and stage + 1 < schedule.stages:
            found[Message(Kind.BACKWARD, stage, microbatch)] = position
    return found


class _Peer:
    """Another rank: what it is going to send, what is on its way from it, and to it."""

    def __init__(self, rank: int, incoming: list[tuple[int, Message]], used: dict[Message, int]) -> None:
        self.rank, self.incoming, self.used = rank, incoming, used
        self.position = {message: at for at, message in incoming}
        self.posted: dict[Message, tuple[list[torch.Tensor], list[Any]]] = {}
        self.sent: deque[tuple[int, list[torch.Tensor], list[Any]]] = deque()
        self.next = 0  # in ``incoming``, to be posted
        self.is_lost = False


class Mail:
    """The messages of one rank in one step after another of ``schedule`` (computing actions only).

    boundaries: what is known of each, by stage; shared with the stages, which enter what they give first.
    """

    def __init__(
        self,
        schedule: Schedule,
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        device: torch.device,
        boundaries: dict[int, Boundary],
    ) -> None:
        self.rank, self.world_size = groups[0].rank(), groups[0].size()
        self.boundaries, self.groups, self._device = boundaries, groups, device
        self._target = {message: target for _, message, target in messages(schedule, self.rank)}
        self._source: dict[Message, _Peer] = {}
        self._peers = {}
        for other in range(self.world_size):
            incoming = [(at, one) for at, one, to in messages(schedule, other) if to == self.rank]
            if other != self.rank:
                self._peers[other] = _Peer(other, incoming, uses(schedule, other))
                self._source.update((message, self._peers[other]) for _, message in incoming)

    def comes(self, message: Message) -> bool:
        """From another rank to this one."""
        return message in self._source

    def goes(self, message: Message) -> bool:
        """From this rank to another one."""
        return message in self._target

    def begin(self, samples: Sequence[int]) -> None:
        """A step with micro-batches of these sizes."""
        self._samples, self._failed = samples, set[int]()
        self._done: set[Message] = set()
        for peer in self._peers.values():
            peer.next = 0
            peer.posted.clear()
        for peer in self._peers.values():
            self.post_ahead(peer)

    def shapes(self, message: Message) -> list[TensorShape]:
        """Of the tensors of a message; empty ones and those without gradient are not sent."""
        boundary = self.boundaries.get(message.boundary, ())
        if message.kind == Kind.BACKWARD:
            boundary = tuple(one for one in boundary if one.has_gradient)
        return list(boundary)

    def send(self, message: Message, tensors: Sequence[torch.Tensor], is_first: bool = False) -> None:
        """Start to send. is_first: over this boundary, so that its shape goes ahead."""
        peer = self._peers[self._target[message]]
        self._done.add(message)
        if is_first:
            self._send_header(peer, self.boundaries[message.boundary])
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        self._post_sends(peer, peer.used[message], tensors)

    def _send_header(self, peer: _Peer, boundary: Boundary | None) -> None:
        header = torch.tensor(encoded(boundary), dtype=torch.int64, device=self._device)
        self._post_sends(peer, -1, [header])

    def _post_sends(self, peer: _Peer, used_at: int, tensors: list[torch.Tensor]) -> None:
        group = self.groups[self.rank > peer.rank]
        try:
            works = [group.send([tensor], peer.rank, TAG) for tensor in tensors if tensor.numel()]
        except RuntimeError as error:
            raise self._lose(peer, "what it sends to it", error) from error
        peer.sent.append((used_at, tensors, works))

    def receive(self, message: Message) -> list[torch.Tensor]:
        """Wait for a message. RuntimeError: the sender has died, or has not come within the time-out.
        ``OtherFailed``: it has raised."""
        peer = self._source[message]
        if peer.is_lost:
            raise OtherFailed(f"rank {peer.rank} is lost")
        while message not in peer.posted and message.boundary not in self._failed:
            self._post(peer)
        self._done.add(message)
        if message.boundary in self._failed:
            raise OtherFailed(f"rank {peer.rank} has failed in stage {message.boundary}")
        self.post_ahead(peer)
        tensors, works = peer.posted.pop(message)
        self._wait(peer, works, message)
        position = peer.position[message]
        while peer.sent and peer.sent[0][0] < position:  # what the sender had taken before it made this
            self._wait(peer, peer.sent.popleft()[2], message)
        return tensors

    def post_ahead(self, peer: _Peer) -> None:
        """Receives of what comes next, as far as its shape is known."""
        while len(peer.posted) <= AHEAD and peer.next < len(peer.incoming):
            boundary = peer.incoming[peer.next][1].boundary
            if boundary not in self.boundaries and boundary not in self._failed:
                return
            self._post(peer)

    def _post(self, peer: _Peer) -> None:
        message = peer.incoming[peer.next][1]
        if message.boundary not in self.boundaries and message.boundary not in self._failed:
            self._receive_header(peer, message)
        peer.next += 1
        if message.boundary in self._failed:
            return
        group, samples = self.groups[peer.rank > self.rank], self._samples[message.microbatch]
        tensors = [shape.empty(samples, self._device) for shape in self.shapes(message)]
        try:
            works = [group.recv([tensor], peer.rank, TAG) for tensor in tensors if tensor.numel()]
        except RuntimeError as error:
            raise self._lose(peer, str(message), error) from error
        peer.posted[message] = tensors, works

    def _receive_header(self, peer: _Peer, message: Message) -> None:
        header = torch.empty(HEADER, dtype=torch.int64, device=self._device)
        group = self.groups[peer.rank > self.rank]
        self._wait(peer, [group.recv([header], peer.rank, TAG)], message)
        boundary = decoded(header.tolist())
        if boundary is None:
            self._failed.add(message.boundary)
        else:
            self.boundaries[message.boundary] = boundary

    def _wait(self, peer: _Peer, works: list[Any], message: Message | str) -> None:
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise self._lose(peer, str(message), error) from error

    def _lose(self, peer: _Peer, what: str, error: RuntimeError) -> RuntimeError:
        """The error to raise for one of the transport: ``RankUnreachable``, with the ranks' names."""
        if isinstance(error, RankLost):
            return error
        peer.is_lost = True
        return RankUnreachable(
            f"rank {self.rank} of {self.world_size} waited in vain for rank {peer.rank} with {what}: "
            f"{str(error).splitlines()[0]}"
        )

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for peer in self._peers.values():
            while peer.sent:
                works = peer.sent.popleft()[2]
                if not peer.is_lost:
                    self._wait(peer, works, "what it takes last")

    def skip(self, message: Message) -> None:
        """This rank has failed, and takes what it would have received, so that its sender goes on."""
        if message not in self._done:
            self.receive(message)

    def fail(self, message: Message) -> None:
        """This rank has failed, and sends zeros, so that its receivers go on to where all ranks agree."""
        if message in self._done or message.boundary in self._failed:
            return
        self._done.add(message)
        peer = self._peers[self._target[message]]
        if peer.is_lost:
            return
        if message.boundary not in self.boundaries:
            self._failed.add(message.boundary)
            self._send_header(peer, None)
            return
        samples = self._samples[message.microbatch]
        zeros = [shape.empty(samples, self._device).zero_() for shape in self.shapes(message)]
        self._post_sends(peer, peer.used[message], zeros)


class RankUnreachable(RuntimeError):
    """A rank has died, or did not come within the time-out."""


class OtherFailed(RuntimeError):
    """Another rank says what has happened: this one only cannot go on."""
