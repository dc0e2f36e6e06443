"""One pool of ranks for all tests of a worker."""

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    pool = Ranks()
    yield pool
    pool.close()
