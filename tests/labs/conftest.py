"""Fixtures of the labs' tests."""

import pytest


@pytest.fixture
def one_thread():
    """Of torch, for tests of small matrices: threads that wait for each other cost more than they give."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
