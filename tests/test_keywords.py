"""Keywords that are everywhere: who has `seed`, `batch_size`, `memory` and `progress`, and how they are said.

Every public function that is given a model with images or a task is looked at, so that a new one without them
fails here. What they mean is written down in docs/concepts.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import circuitvit as cv
from circuitvit._keywords import CHECKS
from circuitvit.cli.library import described
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import OptionError

ROOMS = ("attribution", "pruning", "verification", "views", "defences")

RUNS_NOTHING = ("repeated_patches", "split")
"""They draw or divide images, and run no model."""

ELSEWHERE = {
    "compare": ("batch_size", "memory", "progress"),  # in `settings`, which are kept in its file
    "learn_mask": ("batch_size", "seed"),  # in `settings`: they are of the training
    "learn_masks": ("batch_size", "seed"),
    "thin": ("batch_size", "seed"),  # likewise, of the rounds
    "find_several": ("batch_size", "progress"),  # whatever `find` takes
    "attention_page": ("batch_size",),  # image by image: a page holds 16 at most
    "certify": ("batch_size",),  # pair by pair
    "stability": ("batch_size",),  # what runs is the caller's `discover`
    "training.train": ("batch_size",),  # and its seed: of the recipe, which is kept with the weights
}
"""Keywords that a function gets by way of another argument, or has no use for."""

TRAINING = ("find", "learn_constants", "tuned_lens")
"""Their batch size is of a training step, and another one gives another result: the default is a number."""

TASKS = (
    "attribute", "attribute_nodes", "attribute_units", "refine_nodes", "find_nodes", "calibrate", "acdc",
    "find", "refine", "ddmin", "circuit_curve", "score_curve", "audit", "verify", "robustness",
    "check_hypotheses", "Hypothesis.test", "diff", "universality", "audit_cue",
    "patching_map", "flip_search", "deciders", "run", "tuned_lens", "scrub", "flow",
)  # fmt: skip
"""Which work on pairs, or keep streams: the memory of a batch can be foretold, and is asked for in bytes."""

DEFAULTS = {"seed": 0, "batch_size": None, "memory": None, "progress": True}

WORDS = {
    "batch_size": ("images at once; 32 by default.", "pairs at once; by default what `memory` allows."),
    "memory": ("bytes that a batch, and what is kept between runs, may take.",),
    "progress": ("whether to show a bar.",),
}


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions of the library's face and of its rooms, and the methods of public classes."""
    found: dict[str, object] = {name: getattr(cv, name) for name in cv.__all__}
    for room in ROOMS:
        face = import_module(f"circuitvit.{room}")
        found |= {name: getattr(face, name) for name in dir(face) if not name.startswith("_")}
    for name, each in found.items():
        if not getattr(each, "__module__", "").startswith("circuitvit."):
            continue
        if inspect.isfunction(each):
            yield name, each
        elif inspect.isclass(each):
            methods = {key: value for key, value in vars(each).items() if not key.startswith("_")}
            yield from ((f"{name}.{key}", way) for key, way in methods.items() if inspect.isfunction(way))


def runs(function: Callable[..., Any]) -> bool:
    """Whether it is given a model and what to run it on; options that are passed on are the receiver's."""
    taken = inspect.signature(function).parameters
    return "model" in taken and bool({"task", "images", "objective", "towards"} & set(taken))


ALL: dict[str, Callable[..., Any]] = {"training.train": cv.training.train} | {
    name: each
    for name, each in public()
    if runs(each)
    and name not in RUNS_NOTHING
    and not any(part.name == "options" for part in inspect.signature(each).parameters.values())
}


def keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: parameters[name] for name in parameters if name in CHECKS}


def test_the_functions_are_found() -> None:
    assert {"attribute", "find", "verify", "flip_search", "logit_lens", "activations", "fit_head"} <= set(ALL)
    assert set(RUNS_NOTHING) <= {name for name, _ in public()}


@pytest.mark.parametrize("name", ALL)
def test_a_function_that_runs_a_model_has_the_keywords(name: str) -> None:
    expected = {"batch_size", "progress", *(("memory",) if name in TASKS else ())}
    expected -= set(ELSEWHERE.get(name, ()))
    assert expected <= set(keywords(ALL[name]))
    assert ("memory" in keywords(ALL[name])) == (name in TASKS)


@pytest.mark.parametrize("name", ALL)
def test_they_stand_last_in_one_order_with_one_default(name: str) -> None:
    taken = [
        each for each in inspect.signature(ALL[name]).parameters.values() if each.kind != each.VAR_KEYWORD
    ]
    own = keywords(ALL[name])
    assert all(each.kind == each.KEYWORD_ONLY for each in own.values())
    assert [each.name for each in taken[len(taken) - len(own) :]] == [key for key in CHECKS if key in own]
    for key, each in own.items():
        if key == "batch_size" and name in TRAINING:
            assert isinstance(each.default, int)
        else:
            assert each.default == DEFAULTS[key]


@pytest.mark.parametrize("name", ALL)
def test_they_are_told_in_the_same_words(name: str) -> None:
    texts = described(inspect.getdoc(ALL[name]) or "")[1]
    if not texts:
        return  # a method that refers to another
    for key in keywords(ALL[name]):
        if key in WORDS and not (key == "batch_size" and name in TRAINING):
            assert texts[key].startswith(WORDS[key]), f"{key}: {texts[key]}"
        assert key in texts


@pytest.mark.parametrize("name", ALL)
def test_nonsense_is_refused_before_anything_else_is_looked_at(name: str) -> None:
    function = ALL[name]
    needed = [
        each.name
        for each in inspect.signature(function).parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]
    for key in keywords(function):
        wrong, message = {
            "seed": (-1, "a seed must be at least 0, not -1"),
            "batch_size": (0, r"the batch size \(batch_size\) must be at least 1, not 0"),
            "memory": (0.5, r"the memory budget \(memory\) must be a positive number of bytes, not 0.5"),
            "progress": ("no", r"whether to show a bar \(progress\) is True or False, not 'no'"),
        }[key]
        with pytest.raises(OptionError, match=message):
            function(*[None] * len(needed), **{key: wrong})


def test_a_seed_is_one_that_every_library_takes() -> None:
    """Not the time in nanoseconds, which scikit-learn's generator refuses in its own way."""
    for wrong in (2**32, 2**70):
        with pytest.raises(OptionError, match=f"a seed must be below 2\\*\\*32 = 4,294,967,296, not {wrong}"):
            CHECKS["seed"](wrong)
        with pytest.raises(OptionError, match="a seed must be below"):
            cv.Resample(seed=wrong)
    CHECKS["seed"](2**32 - 1)


def test_memory_is_a_number_or_a_text() -> None:
    model = cv.load("catdog-tiny")
    images = catdog_pairs(2, seed=0).clean
    task = cv.Task(images, metric=cv.logit("cat"), ablation="zero")
    found = [
        cv.attribute(model, task, "eap", memory=memory, progress=False).values for memory in ("1MB", 10**6)
    ]
    assert (found[0] == found[1]).all()
    with pytest.raises(OptionError, match="memory= takes a size such as 500MB, 2GB or 1GiB, not '2 lots'"):
        cv.attribute(model, task, memory="2 lots")


def test_the_page_says_what_they_mean() -> None:
    page = (Path(cv.__file__).parents[1] / "docs" / "concepts.md").read_text(encoding="utf-8")
    (section,) = [part for part in page.split("\n## ") if part.startswith("Keywords that are everywhere")]
    assert all(f"`{name}" in section for name in (*CHECKS, "device"))
