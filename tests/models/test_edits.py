"""Edits: against the same changes made by hooks on the original modules, through every way to run a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import circuitvit as cv
from circuitvit.errors import DataError
from tests.families import FAMILIES, made
from tests.reference.hooked import HookedModule
from tests.reference.sites import Changes
from tests.rightness import CLEAN, METRIC, formula, micro
from tests.strategies import assert_close

LOOKS = ("scores", "pattern")

EACH = max(9, settings.default.max_examples // 10)
"""Cases for each family; more in the profile `thorough`."""

BEYOND = {
    "transformers, timesformer": lambda site: (
        site.kind in ("read", "z", "pattern") or site.name.startswith("mid") or site.name[0] in "ta"
    ),
    "transformers, siglip": lambda site: site.node.startswith("pool.h") and site.kind == "output",
    "timm, differential": lambda site: site.kind == "pattern",
}
"""What cannot be changed by a hook: where tokens are grouped, and what no module gives alone."""


# -- drawn edits, said for both sides --------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """One edit.

    Attributes:
        key: the name, with tokens.
        value: what it becomes.
        site: its name.
        change: the same, literally.
        smooth: whether it has a slope everywhere.
    """

    key: str
    value: Any
    site: str
    change: Callable[[Tensor], Tensor]
    smooth: bool = True


def among(mask: Tensor, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A change where a mask is True alone."""
    return lambda value: torch.where(mask, change(value), value)


def along(direction: Tensor, low: float, high: float) -> Callable[[Tensor], Tensor]:
    def change(value: Tensor) -> Tensor:
        unit = direction / direction.square().sum().sqrt()
        before = value @ unit
        return value + (before.clamp(low, high) - before)[..., None] * unit

    return change


def without(lost: Tensor) -> Callable[[Tensor], Tensor]:
    """A pattern without some of its attention, and as much of the rest; 0 where nothing is left."""

    def change(pattern: Tensor) -> Tensor:
        kept = torch.where(lost, 0.0, pattern)
        left = kept.sum(dim=-1, keepdim=True)
        return torch.where(left == 0, 0.0, kept / left * pattern.sum(dim=-1, keepdim=True)).nan_to_num()

    return change


@st.composite
def edits(draw: st.DrawFn, model: cv.Model, name: str) -> Drawn:
    """One edit of a model."""
    beyond = BEYOND.get(name, lambda site: False)
    site = draw(st.sampled_from([site for site in model.sites() if not beyond(site)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    if site.kind == "logits":
        value = draw(st.sampled_from((2.0, random(site.shape[0]), lambda x: 2 * x - 1)))
        literal = value if callable(value) else lambda x: torch.zeros_like(x) + value
        return Drawn("logits", value, "logits", literal)
    words, mask = draw(tokens(model, site.shape[0]))
    at, mask = f"@{words}" * bool(words), mask[:, None]
    if site.kind in LOOKS:
        to, sources = draw(tokens(model, site.shape[1]))
        if words and to:
            at, mask = f"@{to}->{words}", mask & sources
        kind = draw(
            st.sampled_from(
                ("number", "tensor", "function", "knock out", "causal")[: 5 if site.kind == "pattern" else 3]
            )
        )
        smooth = True
    else:
        kind = draw(
            st.sampled_from(("number", "vector", "tensor", "images", "function", "mixing", "add", "clamp"))
        )
        smooth = kind != "clamp"
    shape = site.shape
    made_: dict[str, Callable[[], tuple[Any, Callable[[Tensor], Tensor]]]] = {
        "number": lambda: (0.3, lambda x: torch.full_like(x, 0.3)),
        "vector": lambda: _tensor(random(shape[1])),
        "tensor": lambda: _tensor(random(*shape)),
        "images": lambda: _tensor(random(2, *shape)),
        "function": lambda: (lambda x, at: 1.5 * x + 0.1, lambda x: 1.5 * x + 0.1),
        "mixing": lambda: (
            lambda x: x - x.mean(dim=1, keepdim=True),
            lambda x: x - x.mean(dim=1, keepdim=True),
        ),
        "add": lambda: _added(random(shape[1])),
        "clamp": lambda: _clamped(random(shape[1])),
        "knock out": lambda: (cv.knock_out(), without(mask)),
        "causal": lambda: _causal(model, shape),
    }
    value, change = made_[kind]()
    change = change if kind == "knock out" else among(mask, change)
    return Drawn(site.name + at, value, site.name, change, smooth)


def _tensor(value: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return value, lambda x: value.expand_as(x)


def _added(direction: Tensor) -> tuple[Any, Callable[[Tensor], Tensor]]:
    return cv.add(direction, scale=1.5), lambda x: x + 1.5 * direction


def _clamped(direction: Tensor) -> tuple[Any, Callable[[Tensor], Tensor]]:
    return cv.clamp(direction, -0.5, 0.1), along(direction, -0.5, 0.1)


def _causal(model: cv.Model, shape: Sequence[int]) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """Each query sees the keys up to its own; class token and registers come last."""
    queries, keys = shape
    rank = [key + 1000 * (key < len(model.prefix) and queries == keys) for key in range(keys)]
    lost = torch.tensor([[rank[key] > rank[query] for key in range(keys)] for query in range(queries)])
    return cv.causal(), without(lost)


@st.composite
def tokens(draw: st.DrawFn, model: cv.Model, count: int) -> tuple[str, Tensor]:
    """Words for some of the tokens of a site, and which those are; none for all."""
    kinds = model.token_kinds(count) if count > 1 else ("latent",)
    number = draw(st.integers(0, count - 1))
    choices = {"": [True] * count, str(number): [place == number for place in range(count)]}
    for kind in dict.fromkeys(kinds):
        choices[kind] = [each == kind for each in kinds]
    word = draw(st.sampled_from(list(choices)))
    return word, torch.tensor(choices[word])


def together(drawn: Sequence[Drawn]) -> tuple[dict[str, Any], Changes]:
    """Several edits as a table, and the literal changes in the order in which a run passes them."""
    table = {each.key: each.value for each in drawn}
    last = [
        each for place, each in enumerate(drawn) if all(each.key != other.key for other in drawn[place + 1 :])
    ]
    ordered = [next(each for each in last if each.key == key) for key in table]
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for each in sorted(ordered, key=lambda each: not each.site.startswith(("input", "mid"))):
        before = changes.get(each.site)
        changes[each.site] = each.change if before is None else _one_after_the_other(before, each.change)
    return table, changes


def _one_after_the_other(
    first: Callable[[Tensor], Tensor], then: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda value: then(first(value))


# -- proofs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=EACH, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_edits_are_those_of_hooks_on_the_original(name: str, data: st.DataObject) -> None:
    """Over 200 cases in all: the output, full, empty and half circuits, single edges and their slopes."""
    model, original = made(name)
    drawn = data.draw(st.lists(edits(model, name), min_size=1, max_size=3))
    table, changes = together(drawn)
    inside = any("<" in site or "." in site for site in changes)
    fused = any(original.is_fused(heads[0]) for heads in original.attentions) and inside
    assume(not (fused and any(site in original.nodes.senders for site in changes)))  # hooks see the one alone
    edited, family = model.edit(table), FAMILIES[name]
    clean, corrupt = family.images(), family.images(seed=1)
    nodes = original.edited(changes)
    expected, other = nodes.run(clean), nodes.run(corrupt)
    assert_close(edited(clean), expected, 1e-8)
    assert_close(edited.activations(clean, "logits", progress=False)["logits"], expected, 1e-8)
    task = cv.Task(clean, corrupt, METRIC if model.has_classes else cv.similarity(to=expected[0].detach()))
    graph = edited.graph
    assert_close(cv.run(edited, task, cv.Circuit.full(graph)), expected, 1e-6)
    assert_close(cv.run(edited, task, cv.Circuit.empty(graph)), other, 1e-6)
    if graph.edges == model.graph.edges and model.has_classes and not fused:
        some = data.draw(st.lists(st.sampled_from(graph.edges), min_size=2, max_size=2, unique=True))
        _prove_edges(edited, nodes, some, task, all(each.smooth for each in drawn))


def _prove_edges(
    edited: cv.Model, nodes: HookedModule, edges: Sequence[str], task: cv.Task, smooth: bool
) -> None:
    """Ablating single edges gives the logits that hooks give, and `eap` their slope."""
    clean, corrupt, graph, step = task.clean, task.corrupt, edited.graph, 1e-5
    assert isinstance(clean, Tensor)
    assert isinstance(corrupt, Tensor)
    clean, corrupt = clean.double(), corrupt.double()
    try:
        scores = cv.attribute(edited, task, "eap", progress=False).to_dict()
    except DataError:  # nothing matters any more
        scores = dict.fromkeys(edges, 0.0)
    for edge in edges:
        rest = cv.Circuit.from_edges(graph, [other for other in graph.edges if other != edge])
        assert_close(cv.run(edited, task, rest), nodes.ablated(clean, corrupt, edge), 1e-6)
        if smooth:
            ends = [formula(nodes.ablated(clean, corrupt, edge, share)).mean() for share in (step, -step)]
            slope = float((ends[0] - ends[1]).detach()) / (2 * step)
            assert abs(scores[edge] - slope) <= 1e-5 * max(1.0, abs(slope)), edge


# -- where edits stand -----------------------------------------------------------------------------


def test_sites_behind_an_edited_stream_are_read_where_they_are() -> None:
    """A changed stream is a stage of its own, which no site stands for."""
    model = cv.wrap(micro())
    edited = model.edit({"resid1": lambda x: 2 * x})
    before, after = (
        each.activations(CLEAN, ["resid1", "m1", "logits"], progress=False) for each in (model, edited)
    )
    assert_close(after["resid1"], 2 * before["resid1"])
    assert_close(after["logits"], edited(CLEAN))
    assert not torch.allclose(after["m1"], before["m1"])
    other = {"m1": after["m1"], "mid1": edited.activations(CLEAN, "mid1", progress=False)["mid1"]}
    assert_close(model.edit(other)(CLEAN), edited(CLEAN))
