"""The same requests served by the lab's workers and by ``transformers``, on the same weights and two cores.

Eight requests at a time: ours takes the next as soon as one is done, four on each of two single-threaded
workers, and every token goes through the service. ``generate`` takes batches, prompts padded on the left, and
writes as many tokens as the longest of a batch asks for: eight in one process with two threads or one, or
four in each of two processes of one thread, which is how ours has the cores.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
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


@dataclass(frozen=True)
class Configuration:
    """How ``generate`` is run. static: with a cache that is allocated beforehand; compiled: its decode step,
    by torch.compile. by_output: requests that ask for about as much are in one batch, which no server that
    takes them as they come can do."""

    attention: str = "sdpa"
    threads: int = WORKERS
    processes: int = 1
    static: bool = False
    compiled: bool = False
    by_output: bool = False

    def batches(self, asked: Sequence[Request]) -> list[list[Request]]:
        order = sorted(asked, key=lambda each: each.output) if self.by_output else list(asked)
        size = CONCURRENT // self.processes
        return [order[start : start + size] for start in range(0, len(order), size)]


CONFIGURATIONS = {
    "sdpa": Configuration(),
    "eager": Configuration("eager"),
    "1 thread": Configuration(threads=1),
    "static cache": Configuration(static=True),
    "static cache, compiled": Configuration(static=True, compiled=True),
    "2 processes": Configuration(threads=1, processes=2),
    "2 processes, eager": Configuration("eager", threads=1, processes=2),
    "2 processes, by output": Configuration(threads=1, processes=2, by_output=True),
}


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


def theirs(load: str, name: str) -> Callable[[], dict[int, list[int]]]:
    """``generate`` on batches, in the order in which they are asked for; of two processes each takes the next
    batch when it is done with one."""
    configuration, asked = CONFIGURATIONS[name], requests(load)
    batches = configuration.batches(asked)

    def serve() -> dict[int, list[int]]:
        if configuration.processes > 1:
            rows = processes().map(partial(generate, configuration), batches)
        else:
            rows = map(partial(generate, configuration), batches)
        return {number: tokens for row in rows for number, tokens in row.items()}

    return serve


@cache
def processes() -> ProcessPoolExecutor:
    """Those of the peer, which stay; each has a model."""
    return ProcessPoolExecutor(WORKERS, get_context("spawn"))


def generate(configuration: Configuration, batch: Sequence[Request]) -> dict[int, list[int]]:
    """What the peer writes for a batch, in this process."""
    import torch

    model = peer()
    torch.set_num_threads(configuration.threads)
    model.set_attn_implementation(configuration.attention)
    more: dict[str, Any] = {}
    if configuration.static:
        more["cache_implementation"] = "static"
    if configuration.compiled:
        from transformers import CompileConfig

        more["compile_config"] = CompileConfig(fullgraph=False, mode="default")
        more["compile_config"]._compile_all_devices = True  # a CPU is left out by default
    tokens, mask = _padded(batch)
    with torch.inference_mode():
        written = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=max(each.output for each in batch),
            do_sample=False,
            disable_compile=not configuration.compiled,
            **more,
        )
    rows = written[:, tokens.shape[1] :].tolist()
    return {each.number: row[: each.output] for each, row in zip(batch, rows, strict=True)}


def _padded(batch: Sequence[Request]) -> tuple[Any, Any]:
    """(tokens, which of them are no padding)."""
    import torch

    longest = max(len(each.prompt) for each in batch)
    rows = [[PADDING] * (longest - len(each.prompt)) + list(each.prompt) for each in batch]
    mask = [[0] * (longest - len(each.prompt)) + [1] * len(each.prompt) for each in batch]
    return torch.tensor(rows), torch.tensor(mask)


def close() -> None:
    """Ends the workers and the peer's processes."""
    from labs.concurrency import cluster
    from labs.serving import fleet

    if processes.cache_info().currsize:
        processes().shutdown()
        processes.cache_clear()
    fleet.shut_down()
    cluster.shut_down()
