"""Sizes of the serving lab: the model, its memory, and what arrives."""

from __future__ import annotations

from dataclasses import dataclass

from labs.lab import setting
from labs.serving.layout import Layout
from labs.serving.weights import HEAD

WHOLE_PROMPTS = 512
"""Tokens of a step that reads whole prompts: several short ones together, a longer one alone."""

NEIGHBOURS = 8
"""Sequences that each worker decodes at a time where workers are neighbours, with so many tokens each:"""
NEIGHBOUR_PROMPT, NEIGHBOUR_OUTPUT = 64, 24


@dataclass(frozen=True)
class Config:
    """Two workers, a core each, under every policy."""

    width: int = setting(
        256, unit="numbers", help="width of the model; a multiple of 64", minimum=HEAD, maximum=4096
    )
    layers: int = setting(4, unit="blocks", help="blocks of the model", minimum=1, maximum=64)
    context: int = setting(1024, unit="tokens", help="longest sequence", minimum=2, maximum=65536)
    workers: int = setting(2, unit="workers", help="processes, a thread each", minimum=2, maximum=64)
    prefill: int = setting(1, unit="workers", help="of these, that only read prompts", minimum=1, maximum=63)
    chunk: int = setting(64, unit="tokens", help="budget of a step of the chunked policy", minimum=1)
    blocks: int = setting(
        512, unit="blocks", help="of 16 tokens, in the cache of each worker", minimum=1, maximum=10**6
    )
    rate: float = setting(
        12.0, unit="requests/s", help="Poisson arrivals, to all workers together", minimum=0.01, maximum=1e5
    )
    prompt: int = setting(256, unit="tokens", help="mean prompt; from half to 1.5 times it", minimum=1)
    output: int = setting(24, unit="tokens", help="mean tokens written, likewise", minimum=2)
    requests: int = setting(
        120,
        quick=24,
        full=600,
        unit="requests",
        help="of a block of load, served once in each round",
        minimum=4,
    )
    ttft_ms: float = setting(
        500.0,
        unit="ms",
        help="limit to the first token",
        minimum=1e-3,
        maximum=1e7,
    )
    itl_ms: float = setting(
        25.0, unit="ms", help="limit that 99 % of a request's gaps are to meet", minimum=1e-3, maximum=1e7
    )
    seed: int = setting(0, unit="", help="of the weights and the load", minimum=0)

    def __post_init__(self) -> None:
        if self.width % HEAD:
            raise ValueError(f"serving: width={self.width} is no multiple of {HEAD}, the size of a head")
        if self.prefill >= self.workers:
            raise ValueError(
                f"serving: prefill={self.prefill} of workers={self.workers} leave nobody to write; take at "
                f"most {self.workers - 1}"
            )
        prompt, output = 3 * self.prompt // 2, 3 * self.output // 2  # the longest
        if prompt + output + 1 > min(self.context, self.blocks * 16):
            raise ValueError(
                f"serving: a prompt of {prompt} and {output} more tokens do not fit the "
                f"context of {self.context} and the {self.blocks * 16} tokens of the cache"
            )
        neighbours = NEIGHBOURS * -(-(NEIGHBOUR_PROMPT + NEIGHBOUR_OUTPUT) // 16)
        if self.context < NEIGHBOUR_PROMPT + NEIGHBOUR_OUTPUT or self.blocks < neighbours:
            raise ValueError(
                f"serving: context={self.context} and blocks={self.blocks} leave no room for {NEIGHBOURS} "
                f"sequences of {NEIGHBOUR_PROMPT + NEIGHBOUR_OUTPUT} tokens, which tell what workers take "
                f"from each other: a context of that many and {neighbours} blocks"
            )

    def layout(self, policy: str, chunk: int = 0) -> Layout:
        """The same workers and memory under a policy."""
        budget = (chunk or self.chunk) if policy == "chunked" else WHOLE_PROMPTS
        return Layout(policy, self.workers, self.prefill, budget, self.blocks)
