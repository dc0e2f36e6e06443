"""kernels/fresh_memory: what nobody has written yet is asked for in huge pages, and stored plainly."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import fresh_memory, streaming
from kernels.fresh_memory import huge_page_bytes, in_huge_pages, is_fresh

MEBI = 2**20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for pages")
with_huge_pages = pytest.mark.skipif(
    not huge_page_bytes(), reason="this system gives no huge pages (sys/kernel/mm/transparent_hugepage)"
)


def mapped(size: int) -> torch.Tensor:
    """Memory of its own, as malloc maps a large block; its pages are asked to stay small."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def advised() -> list[tuple[int, int]]:
    """Address ranges of this process whose pages are to be huge."""
    found, here = [], (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(edge, 16) for edge in first.split("-"))
            here = (begin, end)
        elif first == "VmFlags:" and "hg" in line.split():
            found.append(here)
    return found


def advised_bytes(tensor: torch.Tensor) -> int:
    low, high = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    return sum(max(0, min(high, end) - max(low, begin)) for begin, end in advised())


@on_linux
def test_memory_is_fresh_until_its_middle_is_written():
    memory = mapped(64 * mmap.PAGESIZE)
    assert is_fresh(memory)
    memory[0] = 1
    assert is_fresh(memory)
    memory[len(memory) // 2] = 1
    assert not is_fresh(memory)


@on_linux
@with_huge_pages
def test_whole_huge_pages_of_the_tensor_and_no_others_are_asked_for():
    huge = huge_page_bytes()
    memory = mapped(8 * huge)
    first = -memory.data_ptr() % huge + mmap.PAGESIZE  # begins within a huge page, and ends within one
    tensor = memory[first : first + 4 * huge]
    before = sum(end - begin for begin, end in advised())
    assert in_huge_pages(tensor) is tensor
    assert advised_bytes(tensor) == 3 * huge
    assert sum(end - begin for begin, end in advised()) - before == 3 * huge


@on_linux
@with_huge_pages
def test_what_is_small_or_written_already_keeps_its_pages():
    huge = huge_page_bytes()
    small, written = mapped(2 * huge)[: 2 * huge - 1], mapped(4 * huge)
    written[len(written) // 2] = 1
    for tensor in (small, written):
        in_huge_pages(tensor)
        assert advised_bytes(tensor) == 0
    assert advised_bytes(in_huge_pages(mapped(2 * huge))) >= huge


@on_linux
def test_fresh_memory_is_not_stored_past_the_caches(monkeypatch):
    monkeypatch.setattr(streaming, "STREAMED_BYTES", 4096)
    out = mapped(64 * mmap.PAGESIZE).view(torch.float32).view(-1, 1024)
    assert not streaming.is_streamed(out, 1024)
    out.zero_()
    assert streaming.is_streamed(out, 1024)


@on_linux
@with_huge_pages
def test_large_results_of_operations_are_asked_for(every_size, monkeypatch):
    """Each in memory that is mapped for it alone, whatever this process's malloc still holds."""
    rows = 8 * huge_page_bytes() // 4096
    x, other = torch.randn(rows, 1024).requires_grad_(), torch.randn(rows, 1024)
    cos, sin = torch.randn(2, rows, 512).unbind()
    target = torch.zeros(rows, dtype=torch.int64)
    given = torch.empty_like

    def on_a_mapping(like, **options):
        return mapped(like.numel() * like.element_size()).view(like.dtype).view(like.shape)

    monkeypatch.setattr(torch, "empty_like", on_a_mapping)
    weight = torch.ones(1024)
    normalised, total = kernels.add_rms_norm(x, other, (1024,), weight)
    results = {
        "layer_norm": kernels.layer_norm(x, (1024,), weight),
        "add_rms_norm": normalised,
        "softmax": kernels.softmax(x, -1),
        "gelu": kernels.gelu(x),
        "swiglu": kernels.swiglu(x, other),
        "rotary_embedding": kernels.rotary_embedding(x.view(1, 1, rows, 1024), cos, sin),
    }
    for name, out in list(results.items()):
        gradient = given(out).fill_(0.5)
        results[name + " backward"] = torch.autograd.grad(out, x, gradient)[0]
    results["sum of add_rms_norm"] = total
    results["cross_entropy backward"] = torch.autograd.grad(kernels.cross_entropy(x, target), x)[0]
    wanted = rows * 4096 - 2 * huge_page_bytes()
    assert [name for name, out in results.items() if advised_bytes(out) < wanted] == []


def test_the_size_of_huge_pages_is_the_systems(tmp_path):
    folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    assert huge_page_bytes(tmp_path) == 0
    huge_page_bytes.cache_clear()
    (folder / "hpage_pmd_size").write_text("2097152\n")
    (folder / "enabled").write_text("always [madvise] never\n")
    assert huge_page_bytes(tmp_path) == 2 * MEBI
    huge_page_bytes.cache_clear()
    (folder / "enabled").write_text("always madvise [never]\n")
    assert huge_page_bytes(tmp_path) == 0
    huge_page_bytes.cache_clear()


def test_elsewhere_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    fresh_memory._system.cache_clear()
    tensor = torch.empty(64 * MEBI, dtype=torch.uint8)
    assert not is_fresh(tensor)
    assert in_huge_pages(tensor) is tensor
    fresh_memory._system.cache_clear()
