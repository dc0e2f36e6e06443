"""Not written yet."""

from typing import Any


def decode_attention(*arguments: Any) -> Any:
    raise NotImplementedError
