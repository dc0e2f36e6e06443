"""Fixtures of the labs' tests."""

import time

import one_cluster
import pytest

_before_ray = []  # the processes that there were, while the cluster is there


@pytest.fixture(scope="module")
def two_ray_workers(request):
    """The cluster of ``labs.concurrency.cluster``; it stays for the next file that uses it."""
    from left_running import children  # which needs psutil; a GPU machine may lack it

    from labs.concurrency import cluster
    from labs.unrecorded import Unrecorded

    assert request.path.name in one_cluster.FILES
    if not _before_ray:
        _before_ray.append(children())
    return cluster.cluster(2, Unrecorded(time.perf_counter))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem):
    """Behind the last of these files the cluster ends, and leaves no process."""
    if _before_ray and (nextitem is None or nextitem.path.name not in one_cluster.FILES):
        from left_running import children, left_running

        from labs.concurrency import cluster

        started = children() - _before_ray.pop()
        cluster.shut_down()
        assert left_running(started) == []


@pytest.fixture(scope="module")
def kept_by_jax(request, pytestconfig):
    """For files that ask what programs are and compute, and not how long it takes to compile them. A folder
    for each, because JAX's files are not written at one stroke and lanes run beside each other."""
    from jax_cache import kept_in

    cache = getattr(pytestconfig, "cache", None)  # None under -p no:cacheprovider
    with kept_in(cache and cache.mkdir(f"jax-{request.path.stem}")):
        yield


@pytest.fixture
def one_thread():
    """Of torch, for tests of small matrices: threads that wait for each other cost more than they give."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
