"""The same requests served by the lab's workers and by ``transformers``, on the same weights and two cores.

Eight requests at a time: ours takes the next as soon as one is done, four on each of two single-threaded
workers, and every token goes through the service; ``generate`` takes batches of eight in one process with two
threads, prompts padded on the left, and writes as many tokens as the longest of them asks for.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import cache
from time import perf_counter
from typing import Any

from labs.serving.config import Config
from labs.serving.request import Request

CONCURRENT, WORKERS = 8, 2
PADDING = 0
CONFIG = Config(workers=WORKERS, blocks=256)
LOADS = {
    "equal": ((96, 96), (32, 32)),
    "mixed": ((32, 160), (8, 56)),
}
"""Bounds of (prompt, output) tokens. Equal lengths are where a static batch wastes nothing."""
CONFIGURATIONS = ("sdpa", "eager", "static cache")
"""Of ``generate``: its attention, or sdpa with a cache that is allocated beforehand."""


def requests(load: str, count: int = 3 * CONCURRENT) -> list[Request]:
    drawn = random.Random(load)
    prompt, output = LOADS[load]
    return [
        Request(
            number,
            tuple(drawn.choices(range(1, 256), k=drawn.randint(*prompt))),
            drawn.randint(*output),
        )
        for number in range(count)
    ]


def tokens_of(load: str) -> int:
    """Tokens that are asked for."""
    return sum(each.output for each in requests(load))


def ours(load: str) -> Callable[[], dict[int, list[int]]]:
    """Serves all requests on workers that stay, with empty caches."""
    from dataclasses import replace

    from labs.serving.fleet import fleet
    from labs.unrecorded import Unrecorded

    there = fleet(CONFIG, Unrecorded(perf_counter))
    layout = replace(CONFIG.layout("prefill_first"), most=CONCURRENT // WORKERS)
    asked = requests(load)

    async def one(request: Request) -> list[int]:
        return [token.token async for token, _ in there.service.submit(request)]

    async def all_of_them() -> dict[int, list[int]]:
        await there.service.change(layout)
        found = await asyncio.gather(*map(one, asked))
        return {each.number: tokens for each, tokens in zip(asked, found, strict=True)}

    return lambda: there.run(all_of_them())


@cache
def peer() -> Any:
    """transformers' Llama with the weights of the lab's model, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from labs.models.huggingface import LLAMA
    from labs.serving.weights import serving_model

    mine = serving_model(CONFIG.width, CONFIG.layers, CONFIG.context, CONFIG.seed)
    sizes = mine.config
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.size_of_hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.context,
        rms_norm_eps=sizes.norm_epsilon,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PADDING,
    )
    state = {}
    for name, parameter in mine.named_parameters():
        module, _, kind = name.rpartition(".")
        if module.startswith("blocks."):
            _, index, inside = module.split(".", 2)
            there = f"model.{LLAMA.block.format(index)}{LLAMA.inside[inside]}"
        else:
            there = f"{'' if module == 'head' else 'model.'}{LLAMA.outside[module]}"
        state[f"{there}.{kind}"] = parameter
    model = LlamaForCausalLM(config).float().eval()
    model.load_state_dict(state)
    return model


def theirs(load: str, configuration: str) -> Callable[[], dict[int, list[int]]]:
    """``generate`` on batches of eight, in the order in which they are asked for."""
    import torch

    model, asked = peer(), requests(load)
    batches = [_padded(asked[start : start + CONCURRENT]) for start in range(0, len(asked), CONCURRENT)]

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


def _padded(part: Sequence[Request]) -> tuple[Sequence[Request], Any, Any]:
    """(requests, tokens, which of them are no padding)."""
    import torch

    longest = max(len(each.prompt) for each in part)
    rows = [[PADDING] * (longest - len(each.prompt)) + list(each.prompt) for each in part]
    mask = [[0] * (longest - len(each.prompt)) + [1] * len(each.prompt) for each in part]
    return part, torch.tensor(rows), torch.tensor(mask)


def close() -> None:
    """Ends the workers."""
    from labs.concurrency import cluster
    from labs.serving import fleet

    fleet.shut_down()
    cluster.shut_down()
