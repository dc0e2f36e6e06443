"""Memory that nobody has written yet: the system gives it page by page, zeroed, when it is first touched.

glibc maps a block of 32 MiB or more anew at every allocation (mallopt(3), M_MMAP_THRESHOLD), so that what an
operation returns in one costs more in page faults than in reading its input. Two things make that less:

- pages of the size that the system calls huge (2 MiB on x86-64): one fault where there were 512
  (madvise(2), MADV_HUGEPAGE; Linux, Documentation/admin-guide/mm/transhuge.rst);
- plain stores: the lines that were zeroed lie in the caches, from which a store past them would first have
  to push each to memory.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kernels.cores import text_of


@cache
def huge_page_bytes(root: Path = Path("/")) -> int:
    """0 where the system has none for anonymous memory, or does not say."""
    folder = root / "sys/kernel/mm/transparent_hugepage"
    size = text_of(folder / "hpage_pmd_size")
    return int(size) if size and "[never]" not in text_of(folder / "enabled") else 0


@cache
def _system() -> Any:
    """The C library, or None where it is not Linux's."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    address, length = ctypes.c_void_p, ctypes.c_size_t
    library.madvise.argtypes = [address, length, ctypes.c_int]
    library.mincore.argtypes = [address, length, ctypes.POINTER(ctypes.c_ubyte)]
    return library


def is_fresh(tensor: torch.Tensor) -> bool:
    """Whether the page in the middle of a tensor on the CPU has never been touched; False if nobody knows."""
    library = _system()
    if library is None:
        return False
    middle = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    resident = ctypes.c_ubyte(1)
    library.mincore(middle - middle % mmap.PAGESIZE, 1, resident)  # an error leaves it resident
    return not resident.value & 1


def in_huge_pages(out: torch.Tensor) -> torch.Tensor:
    """The tensor, whose pages are to be huge where its memory is fresh and holds two of them.

    Asked only of those that nothing else is in, so that they take no more memory than small ones would. It is
    advice: whether the system takes it changes no value.
    """
    size, huge = out.numel() * out.element_size(), huge_page_bytes()
    if huge and size >= 2 * huge and out.is_cpu and is_fresh(out):
        begin = -(-out.data_ptr() // huge) * huge
        end = (out.data_ptr() + size) // huge * huge
        _system().madvise(begin, end - begin, mmap.MADV_HUGEPAGE)
    return out
