"""send and recv over shared memory: a channel from each rank to each other, in order, told apart by tags."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from parallel.shm_agreement import DTYPES, amounts, checked_rank, dtype_name, message_word
from parallel.shm_exchange import COMPARES, DIFFERENT, POSTS
from parallel.shm_group import SharedGroup
from parallel.shm_progress import Lane, Steps
from parallel.shm_tensors import bytes_of, in_order, place_of, put_back, room_for


class Messages(SharedGroup):
    """The half of a group that goes from rank to rank."""

    def _channel(self, source: int, target: int) -> Lane:
        lane = self._channels.get((source, target))
        if lane is None:
            area = self._segment.channel(source, target)
            lane = self._progress.lane(area, (source, target), int(self._rank == target))
            self._channels[source, target] = lane
        return lane

    def _peer(self, peer: int) -> int:
        if checked_rank(peer, self._size) == self._rank:
            raise ValueError(f"shm: rank {self._segment.names[peer]} cannot send to and receive from itself")
        return peer

    def send(self, tensors: Sequence[torch.Tensor], target: int, tag: int = 0) -> Any:
        (tensor,), lane = tensors, self._channel(self._rank, self._peer(target))
        name = f"send of {amounts(tensors)} to rank {self._segment.names[target]} (tag {tag})"
        return self._launch(lane, name, self._send(lane, tensor, tag), tensors, bytes_of(tensors), True)

    def _send(self, lane: Lane, tensor: torch.Tensor, tag: int) -> Steps:
        packed = in_order(tensor)
        lane.describe(POSTS, tag, message_word(packed), [place_of(packed)], [(0, 0)] * 2)
        yield

    def recv(self, tensors: Sequence[torch.Tensor], source: int, tag: int = 0) -> Any:
        (tensor,), lane = tensors, self._channel(self._peer(source), self._rank)
        name = f"recv of {amounts(tensors)} from rank {self._segment.names[source]} (tag {tag})"
        steps = self._recv(source, tensor, tag)
        return self._launch(lane, name, steps, tensors, bytes_of(tensors), self._arrived(source))

    def _arrived(self, source: int) -> bool:
        lane = self._channel(source, self._rank)
        return self._segment.header(lane.area, 0, lane.before)[0] > lane.before

    def _recv(self, source: int, tensor: torch.Tensor, tag: int) -> Steps:
        """The next message with this tag; others that come before it are kept until they are asked for."""
        lane, room, kept = self._channel(source, self._rank), room_for(tensor), self._unexpected[source]
        if kept[tag]:
            message, stored = kept[tag].popleft()
        else:
            while True:
                lane.describe(COMPARES, tag, message_word(room), [(0, 0)], [place_of(room), (0, 0)])
                if (yield) != DIFFERENT:
                    put_back(room, tensor)
                    return
                _, found, message = self._segment.header(lane.area, 0, lane.before)
                stored = torch.empty(message >> 8, dtype=torch.uint8)
                yield from self._keep(lane, found, message, stored)
                if found == tag:
                    break
                kept[found].append((message, stored))
        if message != message_word(room):
            dtype = DTYPES[message & 0xFF]
            raise ValueError(
                f"shm: rank {self._segment.names[source]} has sent "
                f"{(message >> 8) // dtype.itemsize} {dtype_name(dtype)} "
                f"(tag {tag}), rank {self._segment.names[self._rank]} receives {amounts([tensor])}"
            )
        tensor.detach().copy_(stored.view(tensor.dtype).view(tensor.shape))

    def recv_anysource(self, tensors: Sequence[torch.Tensor], tag: int = 0) -> Any:
        return AnySource(self, tensors, tag)

    def _ready(self, source: int, tag: int) -> bool:
        """There is a message from this rank with this tag. Messages before it are put aside."""
        lane, kept = self._channel(source, self._rank), self._unexpected[source]
        while not kept[tag] and not lane.queue and self._arrived(source):
            _, found, message = self._segment.header(lane.area, 0, lane.before)
            if found == tag:
                return True
            stored = torch.empty(message >> 8, dtype=torch.uint8)
            steps = self._keep(lane, found, message, stored)
            self._launch(lane, "recv", steps, [], message >> 8, True).wait()
            kept[found].append((message, stored))
        return bool(kept[tag])

    def _keep(self, lane: Lane, tag: int, message: int, stored: torch.Tensor) -> Steps:
        lane.describe(0, tag, message, [(0, 0)], [place_of(stored), (0, 0)])
        yield


class AnySource(dist.Work):
    """recv from whoever sends first; goes on while somebody waits for it or asks."""

    def __init__(self, group: Messages, tensors: Sequence[torch.Tensor], tag: int):
        super().__init__()
        self.group, self.tensors, self.tag = group, tensors, tag
        self.work: Any = None
        self.source = -1

    def is_completed(self) -> bool:
        group = self.group
        others = [rank for rank in range(group.size()) if rank != group.rank()]
        if self.work is None:
            self.source = next((rank for rank in others if group._ready(rank, self.tag)), -1)
            if self.source >= 0:
                self.work = group.recv(self.tensors, self.source, self.tag)
        return self.work is not None and self.work.is_completed()

    def wait(self, timeout: Any = None) -> bool:
        segment, progress = self.group._segment, self.group._progress
        seconds = progress.timeout if timeout is None else timeout.total_seconds()
        begun = time.monotonic()
        what = f"recv of {amounts(self.tensors)} from any rank (tag {self.tag})"
        while not self.is_completed() and self.work is None:
            progress.check()
            waited = time.monotonic() - begun
            if waited > seconds:
                raise dist.DistBackendError(
                    f"shm: time-out: rank {segment.names[segment.rank]} has waited {seconds:g} s in {what}"
                )
            dead = segment.dead()
            if len(dead) == segment.size - 1 and not self.is_completed():
                fates = "; ".join(map(segment.describe, dead))
                raise dist.DistBackendError(
                    f"shm: {fates}; rank {segment.names[segment.rank]} waited in {what}"
                )
            time.sleep(min(0.002, waited / 8))
        return self.work.wait()

    def source_rank(self) -> int:
        return self.source

    _source_rank = source_rank
