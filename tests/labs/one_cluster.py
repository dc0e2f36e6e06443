"""Tests that use one Ray cluster of two workers, because each start of one takes seconds."""

FILES = ("test_serving_live.py", "test_tuning_proof.py", "test_tuning_workers.py")
"""One after the other; pytest-xdist gives them to one lane (``tests/conftest.py``)."""
