"""The fixture ``paired`` in another project's tests: verdicts, entries in pytest-benchmark, errors."""

import json
import subprocess
import sys
import textwrap

import pytest


def run_tests(folder, source, *options):
    (folder / "test_it.py").write_text(textwrap.dedent(source))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)


@pytest.mark.alone
def test_pairs_are_ordinary_pytest_benchmark_entries(tmp_path):
    done = run_tests(
        tmp_path,
        """
        def work(n):
            return lambda: sum(range(n))

        def test_slower(paired):
            result = paired(base=work(20_000), new=work(30_000))
            assert result.verdict == "slower"
            assert 1.3 < result.low <= result.ratio <= result.high < 1.7

        def test_three(paired):
            results = paired(a=work(2000), b=work(2000), c=work(1000), seconds=0.6)
            assert set(results) == {"b", "c"}
            assert results["c"].verdict == "faster"

        def test_plain(benchmark):
            benchmark(work(1000))
        """,
        "--benchmark-json=out.json",
        "--benchmark-max-time=0.1",  # of pytest-benchmark's own, which is only to stand beside ours
    )
    assert done.returncode == 0, done.stdout
    assert "test_it.py::test_slower: new against base: slower" in done.stdout
    data = json.loads((tmp_path / "out.json").read_text())
    names = [entry["name"] for entry in data["benchmarks"]]
    assert names == [
        "test_slower[base]",
        "test_slower[new]",
        "test_three[a]",
        "test_three[b]",
        "test_three[c]",
        "test_plain",
    ]
    new = data["benchmarks"][1]
    assert new["extra_info"]["against"]["base"] == "base"
    assert new["stats"]["rounds"] > 50
    assert new["extra_info"]["cold_s"] not in new["stats"]["data"]
    assert data["machine_info"]["perflab"]["allocator"] in ("default", "tuned")


def test_wrong_use_is_said(tmp_path):
    done = run_tests(
        tmp_path,
        """
        import pytest

        def test_one(paired):
            with pytest.raises(ValueError, match="at least two functions"):
                paired(base=lambda: 1)
            with pytest.raises(TypeError, match="new must be callable"):
                paired(base=lambda: 1, new=3)
            with pytest.raises(TypeError, match="give 'package.module:setup'"):
                paired(base=lambda: 1, new=lambda: 2, processes=2)
            with pytest.raises(ValueError, match="there is no clock 'sun'"):
                paired(base=lambda: 1, new=lambda: 2, clock="sun")
            paired(base=lambda: 1, new=lambda: 2, seconds=0.02)
            with pytest.raises(ValueError, match="already used"):
                paired(base=lambda: 1, new=lambda: 2)
        """,
    )
    assert done.returncode == 0, done.stdout


def test_disabled_benchmarks_run_each_function_once(tmp_path):
    done = run_tests(
        tmp_path,
        """
        calls = []

        def test_once(paired):
            assert paired(base=lambda: calls.append(1), new=lambda: calls.append(2)).verdict == "faster"

        def test_each_ran():
            assert calls == [1, 2]
        """,
        "--benchmark-disable",
    )
    assert done.returncode == 0, done.stdout
    assert "1 passed, 1 skipped" in done.stdout  # no verdict is made up


@pytest.mark.proof
def test_a_function_that_raises_in_a_world_is_torn_down_with_the_others(tmp_path):
    (tmp_path / "closing.py").write_text(
        textwrap.dedent(
            """
            class Step:
                def __init__(self, fails):
                    self.fails = fails

                def __call__(self):
                    if self.fails:
                        raise RuntimeError("planted")

                def close(self):
                    open("closed.txt", "a").write("x")


            def good():
                return Step(False)


            def bad():
                return Step(True)
            """
        )
    )
    done = run_tests(
        tmp_path,
        """
        import pytest

        def test_good(paired):
            paired(base="closing:good", new="closing:good", processes=2, seconds=0.2)

        def test_bad(paired):
            with pytest.raises(RuntimeError, match="planted"):
                paired(base="closing:good", new="closing:bad", processes=2, seconds=0.2)
        """,
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "closed.txt").read_text() == "x" * 6  # 2 ranks: one address, then two


@pytest.mark.alone
def test_asynchronous_jax_is_timed_to_its_end(tmp_path):
    done = run_tests(
        tmp_path,
        """
        import jax, jax.numpy as jnp

        def test_waits(paired):
            x = jnp.ones((700, 700))
            f = jax.jit(lambda x: x @ x @ x @ x)
            result = paired(base=lambda: f(x).block_until_ready(), new=lambda: f(x), clock="jax", seconds=1.0)
            assert result.low > 0.5  # un-synced it would look a hundred times faster
        """,
    )
    assert done.returncode == 0, done.stdout
