"""The text is the standard library's, split by file; batches do not depend on how many ranks share them."""

import hashlib
import sysconfig
from pathlib import Path

import pytest
import torch

from labs.models.text import Batches, standard_library


@pytest.fixture
def folder(tmp_path):
    for index in range(60):
        (tmp_path / f"module_{index}.py").write_text(f"value = {index}\n")
    package = tmp_path / "package"
    package.mkdir()
    (package / "inside.py").write_bytes("ä = 1\n".encode())
    (package / "data.txt").write_text("not source")
    for name in ("site-packages", "test", "__pycache__"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "other.py").write_text("not the library")
    return tmp_path


def test_the_running_librarys_source():
    text, folder = standard_library(), Path(sysconfig.get_path("stdlib"))
    assert text.train.dtype == text.validation.dtype == torch.uint8
    assert len(text.train) + len(text.validation) > 4_000_000
    for part, names in ((text.train, text.train_files), (text.validation, text.validation_files)):
        content = bytes(part.numpy())
        assert content.count(b"\0") == len(names)
        sources = content.split(b"\0")
        for index in (0, len(names) // 2, len(names) - 1):
            assert sources[index] == (folder / names[index]).read_bytes()
    files = {*text.train_files, *text.validation_files}
    assert len(files) == len(text.train_files) + len(text.validation_files)
    assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py"} <= files
    assert not [name for name in files if "site-packages" in name]
    assert 0.05 < len(text.validation) / len(text.train) < 0.3
    assert standard_library() is text


def test_split_by_file_name_only(folder):
    text = standard_library(folder)
    assert "package/inside.py" in {*text.train_files, *text.validation_files}
    assert len(text.train_files) + len(text.validation_files) == 61
    for name in text.validation_files:
        assert int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) < 0.1 * 2**64
    assert bytes(text.train.numpy()).startswith(b"value = 0\n\0value = 1\n\0")
    before = set(text.validation_files)
    (folder / "one_more.py").write_text("x = 1\n")
    standard_library.cache_clear()
    assert before <= set(standard_library(folder).validation_files)


def test_too_few_files(tmp_path):
    with pytest.raises(ValueError, match="holds 0 Python source files"):
        standard_library(tmp_path)


TEXT = torch.arange(1000).to(torch.uint8)


def test_targets_follow_inputs():
    inputs, targets = Batches(TEXT, 8, 5)[0]
    assert inputs.shape == targets.shape == (8, 5)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal((inputs + 1) % 256, targets)


def test_ranks_share_what_one_process_has():
    whole = Batches(TEXT, 12, 5, seed=3)
    for world in (1, 2, 3, 4):
        parts = [Batches(TEXT, 12, 5, seed=3, rank=rank, world_size=world) for rank in range(world)]
        for step in (0, 7):
            for index in (0, 1):
                shares = [part[step][index] for part in parts]
                assert {len(share) for share in shares} == {12 // world}
                assert torch.equal(torch.cat(shares), whole[step][index])


def test_seed_and_step_decide():
    batches = Batches(TEXT, 4, 5, seed=1)
    first = [inputs for _, (inputs, _) in zip(range(4), batches, strict=False)]
    assert all(torch.equal(inputs, batches[step][0]) for step, inputs in enumerate(first))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], Batches(TEXT, 4, 5, seed=2)[0][0])
    assert torch.equal(first[3], Batches(TEXT, 4, 5, seed=1)[3][0])  # a resumed run needs no replay


def test_every_window_can_come():
    text = torch.arange(6).to(torch.uint8)
    starts = torch.cat([Batches(text, 16, 3)[step][0][:, 0] for step in range(8)])
    assert sorted(starts.unique().tolist()) == [0, 1, 2]
    assert Batches(text[:4], 2, 3)[0][1].tolist() == [[1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 5, "world_size": 2}, "batch=5 sequences cannot be shared equally by 2 ranks; take 4 or 6"),
        ({"batch": 1, "world_size": 2}, "take 2"),
        ({"batch": 0}, "batch=0"),
        ({"length": 0}, "length=0"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not one of world_size=2"),
        ({"rank": -1}, "rank=-1"),
        ({"length": 1000}, "the text has 1000 bytes.*need 1001"),
        ({"seed": -1}, "seed=-1 is negative"),
    ],
)
def test_bad_batches(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(TEXT, **{"batch": 4, "length": 5} | arguments)


def test_steps_start_at_0():
    with pytest.raises(IndexError, match="step=-1"):
        Batches(TEXT, 4, 5)[-1]
