"""What the lab says to mistakes with JAX's transformations: where, what to do instead, and only then."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from labs.jax_transforms import LAB, misuse
from labs.jax_transforms.guards import TransformError, explained, guarded
from labs.lab import configure

X = jnp.linspace(-1.0, 1.0, 8)
CALLS = 0
TABLE = {"rate": 0.5}


@pytest.mark.parametrize("name", misuse.CASES)
def test_each_mistake_is_told_with_what_to_do_instead(name):
    text = misuse.message(name)
    assert all(word in text for word in misuse.CASES[name][1]), text
    assert "\n" not in text


def test_a_message_that_says_nothing_is_found_by_the_proof():
    config = configure(LAB, "quick")
    messages = {name: misuse.message(name) for name in misuse.CASES}
    assert LAB.check(config, {misuse.VARIANT: messages})[0].passed
    silent = messages | {"branch": misuse.SILENT}
    assert LAB.check(config, {misuse.VARIANT: silent})[0].error == 1
    with pytest.raises(TypeError, match="no message for each of side_effect"):
        LAB.check(config, {misuse.VARIANT: {}})


def test_a_pure_function_is_left_alone_and_computes_the_same():
    factor, table = 3.0, [1, 2]

    def pure(x, key):
        return TABLE["rate"] * factor * x + len(table) + jax.random.normal(key, x.shape)

    key = jax.random.key(1)
    np.testing.assert_allclose(guarded(pure)(X, key), pure(X, key), rtol=1e-6)


def test_a_global_that_is_set_while_tracing_is_named():
    def counting(x):
        global CALLS
        CALLS += 1
        return x

    with pytest.raises(TransformError, match=r"counting changes 'CALLS' while JAX traces it"):
        guarded(counting)(X)


def test_changes_of_arrays_dictionaries_and_objects_are_seen():
    buffer, notes = np.zeros(2), {}

    class Counter:
        calls = 0

    counter = Counter()

    def fill(x):
        buffer[0] = 1.0
        return x

    def note(x):
        notes["shape"] = x.shape
        return x

    def count(x):
        counter.calls += 1
        return x

    for function, name in ((fill, "buffer"), (note, "notes"), (count, "counter")):
        with pytest.raises(TransformError, match=f"changes '{name}'"):
            guarded(function)(X)


def test_what_is_taken_away_or_only_looked_at_is_told_apart():
    state, weights, table = {"seen": [np.zeros(3)]}, jnp.ones(3), [np.zeros(2000), {"deep": jnp.zeros(2)}]

    def reads(x):
        return x + weights.sum() + table[1]["deep"].sum() + len(state) + table[0].sum()

    guarded(reads)(X)

    def replaces(x):
        table[1]["deep"] = x
        return x

    def removes(x):
        state.pop("seen")
        return x

    rate = 0.5

    def forgets(x):
        nonlocal rate
        rate = None
        return x

    for function, name in ((replaces, "table"), (removes, "state"), (forgets, "rate")):
        with pytest.raises(TransformError, match=f"changes '{name}'"):
            guarded(function)(X)


def test_what_was_traced_before_has_no_side_effect_any_more():
    """The reason for the guard: from the second call on nothing happens, and so nothing is said."""
    seen = []

    def step(x):
        seen.append(0)
        return x

    function = guarded(step)
    with pytest.raises(TransformError):
        function(X)
    function(X)
    assert len(seen) == 1
    with pytest.raises(TransformError):
        function(jnp.ones(3))


def test_the_line_of_a_branch_is_shown_and_a_static_argument_may_decide():
    def power(x, n):
        if n > 1:
            return x**n
        return x

    with pytest.raises(
        TransformError, match=r"power \(test_jax_guards.py:\d+, 'if n > 1:'\) needs for a branch"
    ):
        guarded(power)(X, 2)
    np.testing.assert_allclose(guarded(power, static_argnames="n")(X, n=2), X**2, rtol=1e-6)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: np.sin(x), "for NumPy .* jax.numpy"),
        (lambda x: [0, 1][x[0].astype(int)], "a length or an index"),
        (lambda x: jnp.zeros(x[0].astype(int)), "a length or an index"),
        (lambda x: x[x > 0], "mask"),
    ],
)
def test_other_values_that_are_not_there_yet(function, words):
    with pytest.raises(TransformError, match=words):
        guarded(function)(X)


def test_keys_that_are_split_pass_and_a_key_used_in_two_calls_does_not():
    draw = guarded(lambda key: jax.random.normal(key, (3,)))
    first, second = jax.random.split(jax.random.key(0))
    assert not np.allclose(draw(first), draw(second))
    with pytest.raises(TransformError, match="draws twice from one random key"):
        draw(first)


def test_donated_memory_is_told_by_argument_and_the_result_goes_on():
    def update(weights, slope):
        return {name: weight - slope for name, weight in weights.items()}

    step = guarded(update, donate_argnums=0)
    weights = {"w": jnp.ones(3), "b": jnp.zeros(3)}
    new = step(step(weights, 1.0), 1.0)
    assert new["w"].tolist() == [-1, -1, -1]
    with pytest.raises(TransformError, match="update: the memory of argument 'weights' was given away"):
        step(weights, 1.0)


def test_errors_of_other_kinds_pass_as_they_are():
    def broken(x):
        raise RuntimeError("a bug of its own")

    with pytest.raises(RuntimeError, match="a bug of its own"):
        guarded(broken)(X)
    with pytest.raises(ZeroDivisionError), explained():
        1 / 0  # noqa: B018
    with pytest.raises(TypeError, match="missing a required argument"):
        guarded(lambda x, y: x)(X)


def test_a_callable_without_code_of_its_own_can_be_guarded():
    assert guarded(functools.partial(jnp.add, 1.0))(2.0) == 3.0
