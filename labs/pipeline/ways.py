"""What is run, in groups.

``stage_times``      each stage by itself, forward and both halves of backward
``gpt``              the GPT's stages, equal but for the head, under every schedule
``encoder_decoder``  stages of unequal work: a decoder block does more than an encoder block
``virtual``          devices whose work is a set time, more of them than there are cores
"""

from __future__ import annotations

from collections.abc import Sequence

from labs.lab import Variant
from labs.pipeline import running, stage_times
from labs.pipeline.config import MODELS, Config
from labs.pipeline.running import VIRTUAL


def variants(config: Config) -> Sequence[Variant]:
    """The three pipelines under every schedule that is asked for."""
    real, virtual = config.names(config.stages), config.names(config.ranks)
    found = []
    if real:
        found += [
            Variant(stage_times.GROUP, model, stage_times.setup_of(model), processes=config.stages)
            for model in MODELS
        ]
    for model in MODELS:
        found += [
            Variant(model, name, running.setup_of(model, name), processes=config.stages) for name in real
        ]
    found += [
        Variant(VIRTUAL, name, running.setup_of(VIRTUAL, name), processes=config.ranks) for name in virtual
    ]
    return found
