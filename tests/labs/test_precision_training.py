"""What the lab trains: each part kept when it is done, so that a training that was stopped goes on."""

import math
from dataclasses import replace

import pytest

from labs.models import trained
from labs.models.trained import TINY, chosen, named_tensors, path_of
from labs.precision import training
from labs.precision.config import PARTS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Of sixteen steps, by the name of the tiny one, in a folder of its own; ``kept`` looks for it."""
    recipe = replace(TINY, steps=16)
    monkeypatch.setenv("PERFLAB_HOME", str(tmp_path))
    monkeypatch.setitem(trained.RECIPES, "tiny", recipe)
    monkeypatch.setattr(trained, "FULL", recipe)
    training._family.cache_clear()
    return recipe


def test_a_training_that_was_stopped_is_not_taken_for_the_full_one_and_goes_on(recipe):
    def stop(line):
        if line.startswith("alone"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.family(recipe, progress=stop)
    done = {part: path_of(recipe, part) for part in PARTS if path_of(recipe, part).exists()}
    assert set(done) == {"gpt", "student"}
    assert chosen("kept", PARTS) is trained.SHORT
    before = {part: path.stat().st_mtime_ns for part, path in done.items()}

    said = []
    made = training.family(recipe, progress=said.append)
    assert made.whole
    assert {part: path.stat().st_mtime_ns for part, path in done.items()} == before
    assert [line.split(":")[0] for line in said if "steps" in line and "loss" not in line] == [
        "alone", "adapters", "tuned", "exit",
    ]  # fmt: skip
    assert chosen("kept", PARTS) is recipe


def test_what_is_kept_is_given_back_as_it_was(recipe, monkeypatch):
    first = training.family(recipe)
    training._family.cache_clear()
    monkeypatch.setattr(training, "_train", None)  # nothing is trained
    again = training.family(recipe)
    assert again.whole
    for part in ("student", "alone", "healed", "tuned", "exit"):
        tensors = named_tensors(getattr(first, part))
        for name, tensor in named_tensors(getattr(again, part)).items():
            assert tensor.equal(tensors[name]), (part, name)


def test_a_training_that_the_limit_ends_is_not_whole_and_nothing_made_of_it_is_kept(recipe):
    made = training.family(recipe, limit_seconds=1e-9)
    assert not made.whole
    assert not any(path_of(recipe, part).exists() for part in PARTS)


def test_a_part_that_the_limit_ends_is_not_kept(recipe, monkeypatch):
    monkeypatch.setitem(training.SHARES, "exit", 1e-9 / 60)
    made = training.family(recipe, limit_seconds=60.0)
    assert not made.whole
    assert [part for part in PARTS if not path_of(recipe, part).exists()] == ["exit"]


def test_a_file_of_another_part_is_trained_anew(recipe):
    training.family(recipe)
    path_of(recipe, "tuned").write_bytes(path_of(recipe, "alone").read_bytes())
    training._family.cache_clear()
    said = []
    assert training.family(recipe, progress=said.append).whole
    assert any(line.startswith("tuned") for line in said)


def test_the_control_of_healing_is_the_whole_model_trained_as_long(recipe):
    made = training.family(recipe)
    assert made.tuned.config == made.base.model.config
    assert made.healed.config != made.tuned.config
    layer, base = made.tuned.blocks[0].feed_forward.up, made.base.model.blocks[0].feed_forward.up
    assert 0 < float((layer.weight - base.weight).abs().max().detach()) < math.inf


def test_shares_of_the_time_are_all_of_it():
    assert set(training.SHARES) == set(PARTS)
    assert sum(training.SHARES.values()) == pytest.approx(1)
