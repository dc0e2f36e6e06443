"""Combinations of the options that both models have, and a sample of them."""

import itertools
import random

CHOICES = {
    "kv_heads": (4, 2, 1),
    "positions": ("learned", "rotary", "sinusoidal"),
    "norm": ("layer", "rms"),
    "norm_position": ("pre", "post"),
    "activation": ("gelu", "gelu_tanh", "relu", "swiglu"),
    "bias": (True, False),
    "tied": (True, False),
}
ALL = [dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())]
CHANCE = random.Random(0)
for options in ALL:  # what hardly meets the others is drawn
    options["head_dim"] = CHANCE.choice((None, 6))
    options["initialization"] = CHANCE.choice(("gpt2", "xavier", "kaiming"))
SAMPLE = CHANCE.sample(ALL, 20)
LLAMA = {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "kv_heads": 2}
