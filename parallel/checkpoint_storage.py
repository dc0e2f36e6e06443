"""The files of a checkpoint: raw bytes of tensors, one file a rank, and ``metadata.json`` that says where
each lies.

PyTorch's own reader unpickles ``.metadata`` and whatever is not a tensor, so that loading a checkpoint runs
the code that its author put there. Here nothing is unpickled: the metadata are JSON, tensors are their bytes,
and every chunk has its checksum (CRC-32) and every place is checked before it is read.

`Writer` and `Reader` are storage layers of ``torch.distributed.checkpoint``, which plans what each rank
writes (replicas once, spread over the ranks) and which chunks a rank needs at another world size.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

FORMAT = "perflab checkpoint 1"
METADATA = "metadata.json"
ALIGNMENT = 64  # bytes, so that a mapped file gives aligned tensors
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith(("torch.q", "torch.bits"))
}


@dataclass(frozen=True)
class Place:
    """Where the bytes of a chunk lie: ``length`` bytes from ``start`` in ``file``, with their CRC-32."""

    file: str
    start: int
    length: int
    checksum: int


def sync(path: Path) -> None:
    """Returns when the file's, or the directory's, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finished(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class Writer(StorageWriter):
    """Writes the tensors of one rank to ``directory / rank-<rank>.bin``; the coordinator then calls
    ``commit``.

    describe: what goes into metadata.json besides the tensors; on the coordinator.
    commit: makes the finished directory visible; called after every file in it has reached the disk.
    """

    def __init__(
        self, directory: Path, rank: int, describe: dict[str, Any], commit: Callable[[], None]
    ) -> None:
        self.directory, self.rank, self.describe, self.commit = directory, rank, describe, commit

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"rank-{self.rank}.bin"
        results = []
        with open(path, "xb") as file:
            for item in plan.items:
                file.write(bytes(-file.tell() % ALIGNMENT))
                data = as_bytes(planner.resolve_data(item))
                place = Place(path.name, file.tell(), len(data), zlib.crc32(data))
                file.write(data)
                results.append(WriteResult(item.index, len(data), place))
            file.flush()
            os.fsync(file.fileno())
        return finished(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {result.index: result.storage_data for written in results for result in written}
        for place in places.values():
            check_size(self.directory / place.file, place)
        body = {**self.describe, "tensors": encode(metadata, places)}
        with open(self.directory / METADATA, "x") as file:
            file.write(json.dumps({"format": FORMAT, "checksum": checksum(body), **body}, indent=1))
            file.flush()
            os.fsync(file.fileno())
        sync(self.directory)
        self.commit()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def as_bytes(tensor: torch.Tensor) -> memoryview:
    flat = (
        tensor.detach().cpu().contiguous().view(-1)
    )  # a conjugate or negative view is resolved by contiguous
    return memoryview(flat.resolve_conj().resolve_neg().view(torch.uint8).numpy())


def checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def encode(metadata: Metadata, places: dict[MetadataIndex, Place]) -> dict[str, Any]:
    tensors = {}
    for name, tensor in metadata.state_dict_metadata.items():
        chunks = [
            {
                "offsets": list(c.offsets),
                "sizes": list(c.sizes),
                **asdict(places[MetadataIndex(name, c.offsets)]),
            }
            for c in tensor.chunks
        ]
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[name] = {"shape": list(tensor.size), "dtype": dtype, "chunks": chunks}
    return tensors


def read_metadata(directory: Path) -> tuple[dict[str, Any], Metadata]:
    """(everything in metadata.json, its tensors as PyTorch describes them). ValueError names the file."""
    path = directory / METADATA
    try:
        body = json.loads(path.read_text())
        if (version := body.pop("format")) != FORMAT:
            raise ValueError(f"the format is {version!r}, not {FORMAT!r}")
        if body.pop("checksum") != checksum(body):
            raise ValueError("its checksum is wrong")
        return body, decode(body["tensors"])
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} cannot be read as the metadata of a checkpoint: {reason}") from error


def decode(tensors: dict[str, Any]) -> Metadata:
    described, places = {}, {}
    for name, tensor in tensors.items():
        dtype, chunks = DTYPES[tensor["dtype"]], []
        for chunk in tensor["chunks"]:
            place = Place(*(chunk[key] for key in ("file", "start", "length", "checksum")))
            offsets, sizes = torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])
            if Path(place.file).name != place.file or place.start < 0:
                raise ValueError(f"{name} lies outside of the checkpoint, in {place.file!r} at {place.start}")
            if place.length != math.prod(sizes) * dtype.itemsize:
                raise ValueError(f"{name}: {tuple(sizes)} {dtype} is not {place.length} bytes")
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            places[MetadataIndex(name, offsets)] = place
        described[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(tensor["shape"]), chunks)
    return Metadata(described, storage_data=places)


def check_size(path: Path, place: Place) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; all ranks must write to one file system") from error
    if size < place.start + place.length:
        raise ValueError(f"{path} is truncated: {size} bytes instead of {place.start + place.length} or more")


def read_place(directory: Path, file: BufferedReader, place: Place) -> torch.Tensor:
    check_size(directory / place.file, place)  # before memory is asked for
    data = torch.empty(place.length, dtype=torch.uint8)
    file.seek(place.start)
    if file.readinto(data.numpy()) != place.length:
        raise ValueError(f"{directory / place.file} is truncated")
    return data


def verify(directory: Path, part: int = 0, parts: int = 1) -> None:
    """Read every ``parts``-th chunk and compare checksums; ValueError names the file, and what lies there."""
    places = read_metadata(directory)[1].storage_data
    for index, place in list(places.items())[part::parts]:
        path = directory / place.file
        try:
            with open(path, "rb") as file:
                data = read_place(directory, file, place)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        if zlib.crc32(data.numpy()) != place.checksum:
            end = place.start + place.length
            raise ValueError(f"{path}: bytes {place.start} to {end} ({index.fqn}) do not have their checksum")


class Reader(StorageReader):
    """Reads the chunks that a rank needs from a directory that `verify` has found whole."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        self.directory, self.metadata = directory, metadata

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None: ...

    def read_metadata(self) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def by_chunk(item: Any) -> Any:
            place = self.metadata.storage_data[item.storage_index]
            return place.file, place.start

        for item, chunk in self._chunks(sorted(plan.items, key=by_chunk)):
            for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                chunk = chunk.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(chunk)
            planner.commit_tensor(item, target)
        return finished(None)

    def _chunks(self, items: list[Any]) -> Iterator[tuple[Any, torch.Tensor]]:
        """Each item with the stored chunk that it takes from; a chunk that several items take is read
        once."""
        last, tensor = None, torch.empty(0)
        for item in items:
            index = item.storage_index
            if index != last:
                place: Place = self.metadata.storage_data[index]
                described = self.metadata.state_dict_metadata[index.fqn]
                with open(self.directory / place.file, "rb") as file:
                    data = read_place(self.directory, file, place)
                sizes = next(c.sizes for c in described.chunks if c.offsets == index.offset)
                tensor, last = data.view(described.properties.dtype).view(sizes), index
            yield item, tensor

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True
