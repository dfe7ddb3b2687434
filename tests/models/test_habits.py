"""Habits from other libraries end in a sentence that says what to write instead."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

import circuitvit as cv
from circuitvit.models.habits import COUNTERPARTS


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.load("catdog-tiny")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("run_with_cache", r"model\.activations\(images, "),
        ("add_hook", r"model\.edit\("),
        ("cfg", r"model\.d_model"),
        ("blocks", r"model\.stages"),
        ("trace", r"model\.activations\("),
        ("attribute", r"cv\.attribute\(model, task"),
        ("cuda", r"cv\.load\(\.\.\., device='cuda'\)"),
    ],
)
def test_a_habit_is_answered_with_its_counterpart(model: cv.Model, name: str, way: str) -> None:
    with pytest.raises(AttributeError, match=f"'Model' object has no attribute '{name}': .*{way}"):
        getattr(model, name)
    with pytest.raises(AttributeError, match=way):
        getattr(model.edit({"m1": 0}), name)
    assert not hasattr(model, name)
    assert getattr(model, name, None) is None


def test_no_counterpart_stands_for_what_a_model_has(model: cv.Model) -> None:
    assert [name for name in COUNTERPARTS if hasattr(model, name)] == []


def test_what_the_sentences_name_is_there(model: cv.Model) -> None:
    """Of all `model.x` and `cv.x` in them."""
    said = " ".join(COUNTERPARTS.values())
    assert all(hasattr(model, name) for name in re.findall(r"\bmodel\.(\w+)", said))
    assert all(hasattr(cv, name) for name in re.findall(r"\bcv\.(\w+)", said))
    assert all(hasattr(model.module, name) for name in re.findall(r"model\.module\.(\w+)", said))


def test_other_names_and_copies_are_as_ever(model: cv.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError, match=r"^'Model' object has no attribute 'grpah'$"):
        model.grpah  # type: ignore[attr-defined]  # noqa: B018
    for copied in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.graph == model.graph

    def broken(self: cv.Model) -> int:
        raise AttributeError("what went wrong inside")

    monkeypatch.setattr(cv.Model, "reading", property(broken))
    with pytest.raises(AttributeError, match="what went wrong inside"):
        model.reading  # noqa: B018
