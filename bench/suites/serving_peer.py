"""The same requests served by the lab's engine and by ``transformers``, on the same weights, in one process.

A Llama of random weights is made by transformers, saved, and read by ``labs.models.huggingface``. Requests
are served eight at a time: ours admits one as soon as another is done; ``generate`` takes batches of eight,
prompts padded on the left, and writes as many tokens as the longest of them asks for.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from labs.serving.request import Request

CONCURRENT = 8
VOCABULARY, WIDTH, LAYERS, CONTEXT = 256, 256, 4, 1024
PADDING = 0
LOADS = {
    "equal": ((96, 96), (32, 32)),
    "mixed": ((32, 160), (8, 56)),
}
"""Bounds of (prompt, output) tokens. Equal lengths are where a static batch wastes nothing."""
CONFIGURATIONS = ("sdpa", "eager", "static cache")
"""Of ``generate``: its attention, or sdpa with a preallocated cache."""


def requests(load: str, count: int = 2 * CONCURRENT) -> list[Request]:
    drawn = random.Random(load)
    prompt, output = LOADS[load]
    return [
        Request(
            number,
            tuple(drawn.choices(range(1, VOCABULARY), k=drawn.randint(*prompt))),
            drawn.randint(*output),
        )
        for number in range(count)
    ]


def tokens_of(load: str) -> int:
    """Tokens that are asked for."""
    return sum(each.output for each in requests(load))


@cache
def _models() -> tuple[Any, Any]:
    """(transformers' model, ours), the same weights in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from labs.models.gpt import GPT
    from labs.models.huggingface import load_huggingface
    from labs.models.huggingface_configuration import read_configuration

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=-(-8 * WIDTH // 24) * 8,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.04,  # wide enough that tokens depend on what is before them
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PADDING,
    )
    theirs = LlamaForCausalLM(config).float().eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = GPT(read_configuration(folder))
        load_huggingface(ours, folder)
    return theirs, ours.eval()


def ours(load: str) -> Callable[[], dict[int, list[int]]]:
    """Serves all requests; the engine and its cache stay."""
    from labs.serving.layout import Layout
    from labs.serving.paged import PagedGPT

    layout = Layout("prefill_first", workers=1, budget=512, blocks=256, most=CONCURRENT)
    executor = _executor(layout.blocks, layout.block_size, PagedGPT)
    asked = requests(load)

    def serve() -> dict[int, list[int]]:
        engine = layout.engine("both", executor)  # an empty pool: nothing is found from the call before
        found: dict[int, list[int]] = {each.number: [] for each in asked}
        for each in asked:
            engine.add(each, 0.0)
        while (step := engine.step(0.0)) is not None:
            for event in step.events:
                found[event.number].append(event.token)  # type: ignore[union-attr]
        return found

    return serve


@cache
def _executor(blocks: int, block_size: int, kind: Any) -> Any:
    return kind(_models()[1], blocks, block_size)


def theirs(load: str, configuration: str) -> Callable[[], dict[int, list[int]]]:
    """``generate`` on batches of eight, in the order in which they are asked for."""
    import torch

    model = _models()[0]
    batches = [_padded(part) for part in _parts(requests(load))]

    def serve() -> dict[int, list[int]]:
        model.set_attn_implementation("eager" if configuration == "eager" else "sdpa")
        more = {"cache_implementation": "static"} if configuration == "static cache" else {}
        found = {}
        for part, tokens, mask in batches:
            with torch.inference_mode():
                written = model.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=max(each.output for each in part),
                    do_sample=False,
                    disable_compile=True,
                    **more,
                )
            for each, row in zip(part, written[:, tokens.shape[1] :].tolist(), strict=True):
                found[each.number] = row[: each.output]
        return found

    return serve


def _parts(asked: Sequence[Request]) -> list[Sequence[Request]]:
    return [asked[start : start + CONCURRENT] for start in range(0, len(asked), CONCURRENT)]


def _padded(part: Sequence[Request]) -> tuple[Sequence[Request], Any, Any]:
    import torch

    longest = max(len(each.prompt) for each in part)
    rows = [[PADDING] * (longest - len(each.prompt)) + list(each.prompt) for each in part]
    mask = [[0] * (longest - len(each.prompt)) + [1] * len(each.prompt) for each in part]
    return part, torch.tensor(rows), torch.tensor(mask)
