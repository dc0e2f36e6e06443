"""Not written yet."""

from typing import Any


def attention_backward(*arguments: Any) -> Any:
    raise NotImplementedError
