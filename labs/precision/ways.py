"""The forms at work, in groups.

``quality``      the trained model in each form, read back from its file: bits per byte on held-out text
``token``        one token through a gigabyte of weights, by number format
``smaller``      the same with fewer weights, or fewer of them read
``speculative``  a token, a verification of several, and a whole round with its draft
``cache``        one step of attention over a long KV cache
``prompt``       many tokens through one block: there arithmetic is the limit, and small weights save nothing

Quality is computed once: its result does not vary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from labs.lab import Recorder, Step, Variant
from labs.precision import model, sizes
from labs.precision.config import Config

Setup = Callable[[Config, Recorder], Step]


def _quality(form: str) -> Setup:
    def setup(config: Config, recorder: Recorder) -> Step:
        from labs.precision import forms
        from labs.precision.quality import bits_per_byte, held_out

        made = forms.trained(config)
        recorder.record("trained_steps", made.base.steps, "steps")
        full = made.base.recipe.name == "full" and made.whole
        recorder.record("trained_in_full", float(full), "share")
        kept = forms.stored(made, form)
        recorder.record("weights", kept.bytes, "B")
        tokens, targets = held_out(config.windows, made.base.recipe.model.context)

        def step() -> Any:
            for bits in bits_per_byte(kept.logits, tokens, targets).tolist():
                recorder.record("bits_per_byte", bits, "bits")
            if form == "early_exit":
                recorder.record("left_early", made.exit.share_leaving(tokens), "share")
            return kept.logits(tokens[:1]).detach()

        return step

    return setup


def _speculative_text(config: Config, recorder: Recorder) -> Step:
    """Text continued by the trained model and its distilled student, both of int8 weights, in float64."""
    from labs.precision import forms
    from labs.precision.exact import in_float64
    from labs.precision.speculative import speculate

    made = forms.trained(config)
    kept = [forms.stored(made, form) for form in ("int8", "int8_student")]
    recorder.record("weights", sum(each.bytes for each in kept), "B")
    target, draft = (in_float64(each.model) for each in kept)
    starts = prompts(config)

    def step() -> Any:
        import torch

        done = [speculate(target, draft, each[None], config.tokens, config.lookahead) for each in starts]
        recorder.record("rounds", sum(each.rounds for each in done), "rounds")
        recorder.record(
            "acceptance", sum(e.accepted for e in done) / max(1, sum(e.judged for e in done)), "share"
        )
        return torch.cat([each.tokens for each in done])

    return step


def prompts(config: Config) -> Any:
    """The beginnings of held-out windows that are continued: (prompts, half a context or less)."""
    from labs.precision import forms
    from labs.precision.quality import held_out

    context = forms.trained(config).base.recipe.model.context
    length = min(context // 2, context - config.tokens)
    return held_out(config.prompts, context)[0][:, :length]


class Pass:
    """``tokens`` random tokens through a model behind an empty cache, without gradients: its logits."""

    def __init__(self, model: Any, tokens: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(1)
        self.model, self.tokens = model, torch.randint(256, (1, tokens), generator=generator)
        self.cache = getattr(model, "model", model).new_cache(tokens)

    def __call__(self) -> Any:
        import torch

        for each in self.cache:
            each.length = 0
        with torch.no_grad():
            if hasattr(self.model, "decode"):
                return self.model.decode(self.tokens, self.cache)[0]
            return self.model(self.tokens, cache=self.cache)


def _pass(form: str, tokens: Callable[[Config], int], block: bool = False) -> Setup:
    def setup(config: Config, recorder: Recorder) -> Step:
        from labs.precision import forms

        return Pass(forms.large(config.block if block else config.large, form), tokens(config))

    return setup


def _speculative(name: str) -> Setup:
    """The large model verifies as fast as it reads, so it is the int8 one, as is its draft."""

    def setup(config: Config, recorder: Recorder) -> Step:
        from labs.precision import forms

        target = forms.large(config.large, "int8")
        if name == "token":
            return Pass(target, 1)
        verify = Pass(target, config.lookahead + 1)
        if name == "verify":
            return verify
        draft = Pass(forms.large(sizes.student_of(config.large), "int8"), 1)

        def step() -> Any:
            for _ in range(config.lookahead):
                draft()
            return verify()

        return step

    return setup


def cached(config: Config) -> tuple[Any, Any, Any]:
    """query (sequences, heads, 128), keys and values (sequences, heads, context, 128), float32, random."""
    import torch

    generator = torch.Generator().manual_seed(2)
    shape = (config.sequences, config.cache_heads, config.context, 128)
    query = torch.randn(config.sequences, config.cache_heads, 128, generator=generator)
    return query, torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def _cache(form: str) -> Setup:
    def setup(config: Config, recorder: Recorder) -> Step:
        from labs.precision.cache import StoredCache

        query, keys, values = cached(config)
        stored = StoredCache(keys, values, form)
        return lambda: stored.attend(query)

    return setup


def variants(config: Config) -> list[Variant]:
    found = [
        Variant(
            "quality",
            form,
            _speculative_text if form == "speculative" else _quality(form),
            max_rounds=1,
            threads=0,
        )
        for form in model.QUALITY
    ]
    for group, names in (("token", model.TOKEN), ("smaller", model.SMALLER)):
        for form in names:
            moved = sizes.token_bytes(config.large, form)
            found.append(_moving(group, form, _pass(form, lambda _: 1), moved))
    whole = sizes.token_bytes(config.large, "int8")
    draft = sizes.token_bytes(sizes.student_of(config.large), "int8")
    moved_by = {"token": whole, "verify": whole, "round": whole + config.lookahead * draft}
    found += [_moving("speculative", name, _speculative(name), moved) for name, moved in moved_by.items()]
    found += [_moving("cache", form, _cache(form), model.cache_bytes(config, form)) for form in model.CACHE]
    flops = 2.0 * config.prompt * sum(matrix.numbers for matrix in sizes.matrices(config.block))
    found += [
        Variant(
            "prompt",
            form,
            _pass(form, lambda c: c.prompt, block=True),
            flops=flops,
            dtype="bfloat16" if form == "bfloat16" else "float32",
            threads=0,
        )
        for form in model.TOKEN
    ]
    return found


def _moving(group: str, form: str, setup: Setup, moved: float) -> Variant:
    return Variant(group, form, setup, bytes_moved=moved, working_set=moved, threads=0)
