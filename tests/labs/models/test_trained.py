"""The trained model: seeded, kept, loaded as it was, and honest about where it comes from."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from labs.models import trained
from labs.models.trained import TINY, chosen, fit, gpt, load, path_of, save


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("PERFLAB_HOME", str(tmp_path))


@pytest.fixture
def shortest(monkeypatch):
    """A recipe of three steps, by the name of the tiny one."""
    recipe = replace(TINY, steps=3)
    monkeypatch.setitem(trained.RECIPES, "tiny", recipe)
    return recipe


def test_the_same_seed_gives_the_same_model_and_the_file_gives_it_back(shortest):
    torch.manual_seed(1)
    first = gpt("tiny")
    path_of(shortest).unlink()
    torch.manual_seed(2)
    second = gpt("tiny")
    before = path_of(shortest).stat().st_mtime_ns
    loaded = gpt("tiny")
    assert path_of(shortest).stat().st_mtime_ns == before
    for a, b, c in zip(*(made.model.parameters() for made in (first, second, loaded)), strict=True):
        assert a.equal(b)
        assert a.equal(c)
    assert loaded.steps == 3
    assert loaded.model.head.weight is loaded.model.embedding.tokens.weight
    assert not loaded.model.training


def test_training_leaves_the_callers_random_numbers_alone(shortest):
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    gpt("tiny")
    assert torch.randn(3).equal(expected)


def test_where_it_comes_from_is_said(shortest):
    assert "trained for a short time" in gpt("tiny").origin
    assert "3 of 3 steps" in gpt("tiny").origin
    assert "make model" in trained._origin(trained.FULL, 1000)


def test_a_training_that_the_limit_ends_is_shorter_and_not_kept(shortest):
    made = gpt("tiny", limit_seconds=1e-9)
    assert made.steps == 0
    assert not path_of(shortest).exists()


def test_a_damaged_file_is_trained_anew(shortest):
    whole = gpt("tiny")
    path_of(shortest).write_bytes(path_of(shortest).read_bytes()[:100])
    assert load(path_of(shortest)) is None
    assert gpt("tiny").model.head.weight.equal(whole.model.head.weight)
    assert load(path_of(shortest)) is not None


def test_the_full_one_is_taken_where_it_is_kept():
    assert chosen("kept") is trained.SHORT
    save(path_of(trained.FULL), {"x": torch.zeros(1)}, {"steps": 1})
    assert chosen("kept") is trained.FULL
    assert chosen("kept", ("gpt", "student")) is trained.SHORT  # stopped before it came to the student
    save(path_of(trained.FULL, "student"), {"x": torch.zeros(1)}, {"steps": 1})
    assert chosen("kept", ("gpt", "student")) is trained.FULL
    with pytest.raises(ValueError, match="there is no recipe 'huge'; there are kept, full, short, tiny"):
        gpt("huge")


def test_another_recipe_is_another_file():
    others = [
        replace(TINY, seed=1),
        replace(TINY, steps=41),
        replace(TINY, model=replace(TINY.model, width=32)),
    ]
    assert len({path_of(recipe) for recipe in (TINY, *others)} | {path_of(TINY, "precision")}) == 5


def test_windows_are_as_long_as_the_context():
    """A learned position that no window reaches would stay random."""
    for recipe in trained.RECIPES.values():
        assert recipe.length == recipe.model.context


def test_the_rate_rises_and_falls_and_what_needs_no_gradient_stays():
    moved, frozen = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    frozen.requires_grad_(False)
    torch.set_num_threads(2)
    seen = []

    def loss(step):
        assert torch.get_num_threads() == 1
        seen.append(moved.item())
        return (moved * (-1) ** step).sum()

    lines = []
    assert fit([moved, frozen], loss, 40, 0.1, math.inf, lines.append) == 40
    assert frozen.item() == 1.0
    changes = [abs(b - a) for a, b in pairwise(seen)]
    assert max(changes[:5]) > 2 * max(changes[-5:])
    assert len(lines) == 20
    assert torch.get_num_threads() == 2
    assert "bits" in lines[0]
