"""``perflab profile LAB[:VARIANT]``: which variant is meant, and its steps in a report a rank."""

import pytest
from command import bring_labs, perflab

from bench.profile.labs import choose
from bench.traces.load import load
from bench.traces.ranks import compare_ranks
from bench.traces.steps import steps


@pytest.fixture
def folder(tmp_path):
    bring_labs(tmp_path, "tiny_lab")
    return tmp_path


@pytest.mark.parametrize(
    ("target", "address", "note"),
    [
        ("data_parallel:ddp", "replicas/ddp", "data_parallel:replicas/ddp (not memory/ddp, bytes/ddp)"),
        ("data_parallel:memory/ddp", "memory/ddp", "data_parallel:memory/ddp"),
        ("attention:full_512/torch", "full_512/torch", "attention:full_512/torch"),
        ("data_parallel:local_sgd", "straggler/local_sgd", "data_parallel:straggler/local_sgd"),
    ],
)
def test_which_variant_is_meant(target, address, note):
    _, _, variants, said = choose(target, "quick", {}, 0)
    assert [variant.address for variant in variants] == [address]
    assert said == note


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("data_parallel:dpd", r"data_parallel has no variant 'dpd'; did you mean 'ddp'\?"),
        ("collectives:gloo", "several variants 'gloo': name one of broadcast/gloo, scatter/gloo"),
        ("colectives", r"there is no lab 'colectives'; did you mean 'collectives'\?"),
    ],
)
def test_what_is_not_there_is_said_with_the_nearest(target, said):
    with pytest.raises(ValueError, match=said):
        choose(target, "quick", {}, 0)


def test_a_lab_alone_means_all_that_it_times_repeatedly():
    lab, config, variants, _ = choose("data_parallel", "quick", {}, 0)
    assert {variant.group for variant in variants} == {"step", "replicas"}
    assert len(variants) < len(lab.variants(config))


def test_settings_of_the_lab_and_its_ranks_count():
    _, config, (variant,), _ = choose("data_parallel:step/ddp_gloo", "quick", {"layers": "1"}, 3)
    assert (config.layers, config.ranks, variant.processes) == (1, 3, 3)


def test_each_rank_of_a_variant_records_its_steps(folder):
    """The README's command: two ranks over gloo, ten steps each unless told otherwise."""
    arguments = ("data_parallel:ddp", "--quick", "--steps", "6", "--output", "reports")
    status, out, err = perflab("profile", *arguments, folder=folder)
    assert (status, out) == (0, ""), err
    assert "perflab: 2 reports of torch.profiler in reports: rank0.json.gz, rank1.json.gz" in err
    assert "perflab: read it with: perflab trace reports" in err
    job = load(folder / "reports")
    assert [trace.rank for trace in job.traces] == [0, 1]
    for trace in job.traces:
        assert steps(trace).names == [f"ProfilerStep#{number}" for number in range(1, 7)]
        assert "gloo:all_reduce" in trace.names
    found = compare_ranks(job)
    assert found.rounds.said == "6 steps that all ranks mark"
    assert sum(row.calls for row in found.collectives) >= 6


def test_what_uses_no_library_is_profiled_as_python(folder):
    arguments = ("vectorization:pairwise/python", "--quick", "--steps", "2", "--set", "points=50")
    status, _, err = perflab("profile", *arguments, folder=folder)
    assert status == 0, err
    assert "1 report of cProfile in profile-vectorization-pairwise-python: profile.prof" in err


def test_a_variant_that_fails_says_why_and_leaves_nothing(folder):
    text = (folder / "tiny_lab.py").read_text()
    assert "def variants(" in text
    broken = "\n\ndef _broken(config, recorder):\n    raise OSError('no such device here')\n"
    broken += "\n\nfrom dataclasses import replace\n"
    broken += "def only(config):\n    return [replace(next(iter(variants(config))), setup=_broken)]\n"
    broken += "LAB = replace(LAB, variants=only)\n"
    (folder / "tiny_lab.py").write_text(text + broken)
    status, _, err = perflab("profile", "tiny_lab", folder=folder)
    assert status == 1
    assert "OSError: no such device here (tiny_lab.py:" in err
    assert not list(folder.glob("profile-*"))
