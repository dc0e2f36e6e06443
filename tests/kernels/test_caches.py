"""kernels/caches: sizes as the system says them, and none made up."""

from pathlib import Path

import pytest

from kernels import cores
from kernels.caches import _bytes, caches, last_level_bytes, second_level_bytes

SYSTEM = Path("/sys/devices/system/cpu")


def system(root, *found):
    """A root folder with these caches: (core, level, kind, size, cores that share it)."""
    for place, (core, *facts) in enumerate(found):
        folder = root / "sys/devices/system/cpu" / f"cpu{core}" / "cache" / f"index{place}"
        folder.mkdir(parents=True)
        for name, text in zip(("level", "type", "size", "shared_cpu_list"), facts, strict=True):
            (folder / name).write_text(f"{text}\n")
    return root


def test_sizes_are_read_as_the_system_writes_them(tmp_path):
    assert _bytes("32K") == 32768
    assert _bytes("1M") == 2**20
    root = system(
        tmp_path,
        (0, 1, "Data", "48K", "0"), (0, 1, "Instruction", "64K", "0"), (0, 2, "Unified", "1280K", "0"),
        (1, 2, "Unified", "1M", "1"),
        (0, 3, "Unified", "32M", "0-1"), (1, 3, "Unified", "32M", "0-1"), (2, 3, "Unified", "32M", "2-3"),
    )  # fmt: skip
    assert caches([0, 1, 2], root) == {"l1d_bytes": 48 << 10, "l2_bytes": 1280 << 10, "l3_bytes": 64 << 20}
    assert caches([7], root) == {}


def test_the_second_level_is_what_the_system_says_of_one_core(tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.caches.affinity", lambda: {3, 4})
    found = [(3, 2, "Unified", "1M", "3"), (4, 2, "Unified", "4M", "4")]
    assert second_level_bytes(system(tmp_path / "said", *found)) == 1 << 20
    assert second_level_bytes(tmp_path / "nothing") == 2 << 20


def test_the_last_level_is_all_that_the_usable_cores_reach(tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.caches.affinity", lambda: {0, 1, 8})
    found = [
        (0, 3, "Unified", "32M", "0-7"),
        (1, 3, "Unified", "32M", "0-7"),
        (8, 3, "Unified", "32M", "8-15"),
    ]
    assert last_level_bytes(system(tmp_path / "said", *found)) == 64 << 20
    assert last_level_bytes(tmp_path / "nothing") == 0


def test_the_sizes_of_this_cpu_are_those_in_its_files():
    said = [
        (folder / "size").read_text().strip()
        for folder in (SYSTEM / f"cpu{min(cores.affinity())}" / "cache").glob("index*")
        if (folder / "level").read_text().strip() == "2" and (folder / "size").exists()
    ]
    if not said:
        pytest.skip("the system says nothing of the second level")
    assert second_level_bytes() == sum(int(size.removesuffix("K")) << 10 for size in said)
