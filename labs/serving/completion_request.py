"""What a client of OpenAI's completions API asks for, checked before anything is served.

The model reads and writes bytes: a token is a byte of UTF-8. What the API has and this engine has not is
refused with its name, unless it is left at its default. Source: OpenAI, "API reference: completions".
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labs.serving.weights import VOCABULARY

MOST_PROMPTS, MOST_STOPS, LONGEST_STOP = 16, 4, 64
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (),
    "suffix": ("",),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
}
"""Parameters that cannot be used, with the values that change nothing (null always)."""


class Refused(ValueError):
    """parameter: what of the request is wrong. status: of HTTP."""

    def __init__(self, message: str, parameter: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.parameter, self.status = parameter, status


@dataclass(frozen=True)
class Completion:
    """prompts: each as its tokens. seed: any where none was asked for. stops: sequences of bytes."""

    model: str
    prompts: tuple[tuple[int, ...], ...]
    most: int
    temperature: float
    seed: int
    stops: tuple[bytes, ...]
    stream: bool
    with_usage: bool


def parse(body: bytes, model: str) -> Completion:
    """Refused: no JSON, another model, or a value that cannot be."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from None
    if not isinstance(asked, dict):
        raise Refused(f"the body is a JSON {type(asked).__name__}; it must be an object")
    if asked.get("model", model) != model:
        raise Refused(f"there is no model {asked['model']!r}; there is {model!r}", "model", 404)
    for name, allowed in UNSUPPORTED.items():
        value = asked.get(name)
        if value is not None and value not in allowed:
            raise Refused(f"{name}={value!r} is not supported; leave it out", name)
    options = asked.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refused("stream_options must be an object", "stream_options")
    return Completion(
        model,
        _prompts(asked.get("prompt")),
        _number(asked, "max_tokens", 16, whole=True, least=1, most=10**6),
        _number(asked, "temperature", 1.0, whole=False, least=0, most=2),
        _number(asked, "seed", random.getrandbits(63), whole=True, least=0, most=2**63 - 1),
        _stops(asked.get("stop")),
        _flag(asked, "stream"),
        _flag(options, "include_usage"),
    )


def _prompts(prompt: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(prompt, str) or (
        isinstance(prompt, list) and prompt and all(type(each) is int for each in prompt)
    ):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise Refused("prompt must be a string, a list of tokens, or a list of these", "prompt")
    if len(prompt) > MOST_PROMPTS:
        raise Refused(f"{len(prompt)} prompts in one request; at most {MOST_PROMPTS}", "prompt")
    return tuple(_tokens(each) for each in prompt)


def _tokens(prompt: Any) -> tuple[int, ...]:
    if isinstance(prompt, str):
        found = tuple(prompt.encode("utf-8", errors="replace"))  # JSON may hold half of a surrogate pair
    elif isinstance(prompt, list):
        found = tuple(prompt)
        if not all(type(each) is int and 0 <= each < VOCABULARY for each in found):
            raise Refused(f"a prompt's tokens are whole numbers from 0 to {VOCABULARY - 1}", "prompt")
    else:
        raise Refused("prompt must be a string, a list of tokens, or a list of these", "prompt")
    if not found:
        raise Refused("the prompt is empty; there must be at least 1 token to start from", "prompt")
    return found


def _number(asked: Mapping[str, Any], name: str, default: Any, whole: bool, least: float, most: float) -> Any:
    value = asked.get(name)
    if value is None:
        return default
    kind = "a whole number" if whole else "a number"
    if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
        raise Refused(f"{name}={value!r} must be {kind} from {least} to {most}", name)
    return value


def _flag(asked: Mapping[str, Any], name: str) -> bool:
    value = asked.get(name)
    if value is not None and type(value) is not bool:
        raise Refused(f"{name}={value!r} must be true or false", name)
    return bool(value)


def _stops(stop: Any) -> tuple[bytes, ...]:
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(each, str) for each in stops)
    ):
        raise Refused(f"stop must be a string or a list of at most {MOST_STOPS}", "stop")
    found = tuple(each.encode("utf-8", errors="replace") for each in stops)
    if any(not 0 < len(each) <= LONGEST_STOP for each in found):
        raise Refused(f"a stop sequence has 1 to {LONGEST_STOP} bytes", "stop")
    return found
