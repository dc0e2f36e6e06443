"""What the lab teaches, each sentence decided by the measured intervals."""

from __future__ import annotations

from labs.lab import Claim, Interval, Results, all_of, at_least, at_most
from labs.precision.measured import LEARNED, excess, has_learned, one, tokens_of_a_round, unhealed
from labs.precision.model import multiplies_by_amx, tokens_per_round


def _costs(results: Results, form: str, most: float, base: str = "float32") -> bool | None:
    found = excess(results, form, base)
    return at_most(found, most) if found is not None and has_learned(results) else None


def _faster(results: Results, new: str, base: str, times: float) -> bool | None:
    """new takes at most 1 / times of base's time."""
    return at_most(results.ratio(new, base), 1 / times) if results.has(new, base) else None


def half_is_free(results: Results) -> bool | None:
    return all_of(*(_costs(results, form, 0.01) for form in ("bfloat16", "int8", "cache_int8")))


def four_bits_cost_little(results: Results) -> bool | None:
    return _costs(results, "int4", 0.10)


def fewer_bits_are_faster(results: Results) -> bool | None:
    return all_of(*(_faster(results, f"token/{form}", "token/float32", 1.5) for form in ("int8", "int4")))


def structure_is_faster(results: Results) -> bool | None:
    return _faster(results, "smaller/structured", "smaller/float32", 1.4)


def zeros_are_not_faster(results: Results) -> bool | None:
    """Half the weights dropped at random places, stored as rows."""
    if not results.has("smaller/sparse", "smaller/structured"):
        return None
    return at_least(results.ratio("smaller/sparse", "smaller/structured"), 1.2)


def structure_costs_more(results: Results) -> bool | None:
    found = excess(results, "structured", "pruned")
    return at_least(found, 0.0) if found is not None and has_learned(results) else None


def healing_wins_back(results: Results) -> bool | None:
    """At most three quarters of what structured pruning lost are still missing."""
    lost, missing = excess(results, "structured"), unhealed(results, 0.75)
    if lost is None or missing is None or lost.low <= 0 or not has_learned(results):
        return None
    return at_most(missing, 0.0)


def verification_is_cheap(results: Results) -> bool | None:
    """At most 0.6 of the time that its tokens would take one by one."""
    if not results.has("speculative/verify", "speculative/token"):
        return None
    return at_most(
        results.ratio("speculative/verify", "speculative/token"), 0.6 * (results.config.lookahead + 1)
    )


def rounds_give_more(results: Results) -> bool | None:
    count = tokens_of_a_round(results)
    return at_least(Interval.exact(count), 1.2) if count is not None and has_learned(results) else None


def speculation_pays(results: Results) -> bool | None:
    """A round gives more tokens than it costs tokens' time, where its acceptance is predicted to do it."""
    whole, token = "speculative/round", "speculative/token"
    count, share = tokens_of_a_round(results), one(results, "speculative", "acceptance_share")
    expected, alone = results.predicted(whole), results.predicted(token)
    if not (count and share is not None and expected and alone and results.has(whole, token)):
        return None
    if not has_learned(results) or tokens_per_round(share, results.config.lookahead) < expected / alone:
        return None
    cost = results.ratio(whole, token)
    return at_least(Interval(count / cost.value, count / cost.high, count / cost.low), 1.0)


def teaching_helps(results: Results) -> bool | None:
    return _costs(results, "distilled", 0.0, "alone")


def exits_save(results: Results) -> bool | None:
    return _faster(results, "smaller/early_exit", "smaller/float32", 1.3)


def small_cache_is_faster(results: Results) -> bool | None:
    return _faster(results, "cache/bfloat16", "cache/float32", 1.2)


def prompts_gain_less(results: Results) -> bool | None:
    """Of what int8 and int4 win over float32 at one token, at most two thirds are won at a prompt; with AMX,
    which also multiplies integer weights faster, not all of it."""
    verdicts: list[bool | None] = []
    most = 1.0 if multiplies_by_amx(results.machine) else 2 / 3
    for form in ("int8", "int4"):
        pairs = [(f"{group}/{form}", f"{group}/float32") for group in ("prompt", "token")]
        if not results.has(*pairs[0], *pairs[1]):
            return None
        prompt, token = (results.ratio(*pair) for pair in pairs)
        share = Interval(token.value / prompt.value, token.low / prompt.high, token.high / prompt.low)
        verdicts.append(at_most(share, most))
    return all_of(*verdicts)


def files_are_as_small(results: Results) -> bool | None:
    """A quarter and an eighth, with what scales and the embedding add."""
    whole = one(results, "float32", "weights_B")
    eight, four = (one(results, form, "weights_B") for form in ("int8", "int4"))
    if whole is None or eight is None or four is None:
        return None
    return all_of(at_most(Interval.exact(eight / whole), 0.40), at_most(Interval.exact(four / eight), 0.80))


NEEDS = f"Undecided above {LEARNED} bits per byte, where a model knows too little: `make model` trains one."

CLAIMS = (
    Claim(
        "bfloat16, int8 weights and an int8 KV cache each cost less than 1 % in bits per byte.",
        half_is_free,
        f"A step of int8 is 1/127 of the row's largest weight, far below what training leaves open. {NEEDS}",
    ),
    Claim(
        "int4 weights in groups of 64 cost less than 10 % in bits per byte.",
        four_bits_cost_little,
        f"15 levels a group: rounding to nearest, no calibration. If it fails, smaller groups help. {NEEDS}",
    ),
    Claim(
        "int8 and int4 files are at most 0.4 of float32's, and int4's at most 0.8 of int8's.",
        files_are_as_small,
        "Embedding, norms and biases stay float32, which weighs in a small model.",
    ),
    Claim(
        "A token of the large model is at least 1.5 times as fast with int8 or int4 weights.",
        fewer_bits_are_faster,
        "At one token each weight is read once and used once: bytes are the time. If it fails, is unpacking "
        "the limit? Where float32's CPU time is one core's, the library multiplies one row on one core, and "
        "a part of the gain is the other cores'.",
    ),
    Claim(
        "Quantised weights speed up a prompt at most two thirds as much as a token; with AMX, less than it.",
        prompts_gain_less,
        "Many tokens share each weight: arithmetic is the limit, not reading. Without a matrix unit it is "
        "float32's either way; AMX also multiplies integer weights faster than vectors do float32.",
    ),
    Claim(
        "Half the heads and neurons gone makes a token at least 1.4 times as fast.",
        structure_is_faster,
        "A smaller dense model: half the bytes.",
    ),
    Claim(
        "Half the weights gone one by one takes at least 1.2 times as long as half gone in structure.",
        zeros_are_not_faster,
        "A column beside each value: as many bytes as the dense matrix, and a gather.",
    ),
    Claim(
        "Structured pruning costs more bits per byte than dropping as many of the smallest weights.",
        structure_costs_more,
        f"Whole rows go with the large weights in them. {NEEDS}",
    ),
    Claim(
        "LoRA, trained briefly and merged, wins back at least a quarter of what structured pruning lost.",
        healing_wins_back,
        "The frozen half is bent towards the missing one; merging makes it free. Held against the whole "
        f"model with the same adapters: training alone would make either better. {NEEDS}",
    ),
    Claim(
        "A token that leaves after half of the blocks is at least 1.3 times as fast.",
        exits_save,
        "It reads half of the blocks, and of each other one the two matrices of its keys and values.",
    ),
    Claim(
        "Verifying several tokens costs at most 0.6 of computing them one by one.",
        verification_is_cheap,
        "The weights are read once for all. If it fails, the library's product for a few rows is the limit.",
    ),
    Claim(
        "A speculative round with the distilled draft gives at least 1.2 tokens.",
        rounds_give_more,
        f"They are the large model's own (proved). A draft that is often wrong gives one a round. {NEEDS}",
    ),
    Claim(
        "Where its acceptance is predicted to pay, speculative decoding is faster than token after token.",
        speculation_pays,
        "A round must give more tokens than it costs tokens' time; the picture shows from which acceptance "
        f"on. If it fails, is the draft slower than its bytes, bound by calls? {NEEDS}",
    ),
    Claim(
        "A student needs fewer bits per byte when the model teaches it than when it learns as long alone.",
        teaching_helps,
        f"The teacher's probabilities say more than the byte that came. {NEEDS}",
    ),
    Claim(
        "A bfloat16 KV cache makes attention over it at least 1.2 times as fast.",
        small_cache_is_faster,
        "A long cache is read once a token: half the bytes. If it fails, the library's attention over one "
        "query is slower than reading, or converts.",
    ),
)
