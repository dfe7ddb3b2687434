"""Nodes of every family's models cut into pieces, against hooks on the original module."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.errors import CircuitViTError, UnsupportedModelError
from circuitvit.models.cut_heads import BySource
from circuitvit.models.refined import refined
from tests.engine.test_refined_runs import dictionary, encoding
from tests.families import FAMILIES, made
from tests.reference import pieces
from tests.reference.pieces import Piece, PiecesOf
from tests.rightness import METRIC, formula
from tests.strategies import assert_close

FUSED = ("torchvision", "open_clip")
"""Their heads are one function of torch's."""

NORMED = ("timm, gated and normed together", "timm, differential", "timm, norm across heads")
"""Their heads are no sums over the tokens that they take values from."""

UNLIKE = (
    "timm",
    "timm, registers",
    *NORMED,
    "timm, gated",
    "timm, parallel and fused",
    "timm, two of each",
    "timm, rotary",
    *FUSED,
    "transformers, siglip",
    "transformers, vivit",
)
"""Families whose nodes differ in what they are made of."""


@dataclass(frozen=True)
class Cut:
    """A family's micro-model with every third node cut in each way.

    Attributes:
        family: its name.
    """

    family: str

    @property
    def model(self) -> cv.Model:
        return made(self.family)[0]

    @cached_property
    def how(self) -> tuple[dict[str, Any], dict[str, Piece]]:
        """What becomes of each node; and its pieces, for hooks."""
        asked, told = dict[str, Any](), dict[str, Piece]()
        senders = self.model.graph.senders[1:]
        for number, head in enumerate(node for node in senders if ".h" in node):
            way = (self._sources, self._of_z, None)[number % 3]
            if way is not None and not (way == self._sources and self.family in NORMED):
                asked[head], own = way(head)
                told |= {name: replace(piece, less=self.family in FUSED) for name, piece in own.items()}
        for number, mlp in enumerate(node for node in senders if ".h" not in node):
            asked[mlp], own = (self._neurons, self._of_output, self._of_input)[number % 3](mlp)
            told |= own
        return asked, told

    @cached_property
    def fine(self) -> cv.Model:
        return refined(self.model, self.how[0])

    def _width(self, site: str) -> int:
        return next(each.shape[-1] for each in self.model.all_sites if each.name == site)

    def _neurons(self, mlp: str) -> tuple[Any, dict[str, Piece]]:
        chosen = [3, self._width(f"{mlp}.hidden") - 1]
        return cv.neurons(chosen), pieces.neurons(mlp, chosen)

    def _of_output(self, mlp: str) -> tuple[Any, dict[str, Piece]]:
        return _features(mlp, mlp, dictionary(self._width(mlp), "jumprelu", 1))

    def _of_input(self, mlp: str) -> tuple[Any, dict[str, Piece]]:
        return _features(mlp, "input", dictionary(self._width(mlp), "topk", 2, reads="input"))

    def _of_z(self, head: str) -> tuple[Any, dict[str, Piece]]:
        return _features(head, f"{head}.z", dictionary(self._width(f"{head}.z"), "relu", 3))

    def _sources(self, head: str) -> tuple[Any, dict[str, Piece]]:
        third = torch.arange(self.model.n_tokens) % 3 == 0
        groups = {"x": third, "y": ~third}
        by_source = BySource(("[x]", "[y]"), torch.stack([*groups.values()]))
        return by_source, pieces.sources(head, {name: own[:, None] for name, own in groups.items()})

    def kinds(self) -> dict[tuple[str, str], list[str]]:
        """Edges by the kind of piece that they lead into or out of."""
        found: dict[tuple[str, str], list[str]] = {}
        for edge in self.fine.graph.edges:
            for way, node in zip(("out of", "into"), edge.split("->"), strict=True):
                if node in self.how[1]:
                    found.setdefault((way, _kind(node)), []).append(edge)
        return found


def _features(node: str, site: str, own: cv.Dictionary) -> tuple[Any, dict[str, Piece]]:
    chosen = [1, 4]
    told = pieces.features(node, site, encoding(own), own.decoder, own.bias, chosen)
    return cv.features(own, chosen), told


def _kind(piece: str) -> str:
    if "[" in piece:
        return "source group"
    last = piece.rpartition(".")[2]
    return {"n": "neuron", "f": "feature"}[last[0]] if last[1:].isdigit() else last


def effect(model: cv.Model, clean: Tensor, corrupt: Tensor, edges: list[str]) -> float:
    """Of ablating some edges together."""
    circuit = cv.Circuit.from_edges(model.graph, edges)
    return float(formula(cv.run(model, cv.Task(clean, corrupt, METRIC), ablate=circuit)).mean())


@pytest.mark.parametrize("family", UNLIKE)
def test_an_edge_of_every_kind_is_that_of_hooks(family: str) -> None:
    prove(Cut(family), 1, kinds=3)


@pytest.mark.parametrize("family", ["timm, pool"])
def test_ten_edges_of_every_kind_are_those_of_hooks(family: str) -> None:
    prove(Cut(family), 10, slopes=1)


def prove(cut: Cut, count: int, slopes: int = 0, kinds: int | None = None) -> None:
    """Effects of edges of pieces of every kind, or of some drawn kinds, and the slopes of the first ones."""
    clean, corrupt = FAMILIES[cut.family].images(), FAMILIES[cut.family].images(seed=1)
    hooked, drawn, step = PiecesOf(made(cut.family)[1], cut.how[1]), random.Random(0), 1e-4
    scores = (
        cv.attribute(cut.fine, cv.Task(clean, corrupt, METRIC), "eap", progress=False) if slopes else None
    )
    by_kind = cut.kinds()
    assert {kind for _, kind in by_kind} >= {"neuron", "feature", "rest", "error"}
    chosen = sorted(by_kind) if kinds is None else random.Random(cut.family).sample(sorted(by_kind), kinds)
    with torch.no_grad():
        whole = float(formula(made(cut.family)[0](clean)).mean())
        size = abs(float(formula(made(cut.family)[0](corrupt)).mean()) - whole)
    for kind in chosen:
        edges = by_kind[kind]
        for number, edge in enumerate(drawn.sample(edges, min(count, len(edges)))):
            shares = (1.0, step, -step) if number < slopes else (1.0,)
            found = [
                float(formula(hooked.ablated(clean, corrupt, edge, each).detach()).mean()) for each in shares
            ]
            assert abs(effect(cut.fine, clean, corrupt, [edge]) - found[0]) <= 1e-6 * size, edge
            if scores is not None and number < slopes:
                slope = (found[1] - found[2]) / (2 * step)
                assert abs(scores[edge] - slope) <= 1e-5 * max(size, abs(slope)), edge


@pytest.mark.parametrize("family", FAMILIES)
def test_all_pieces_of_a_node_together_are_the_node(family: str) -> None:
    """The logits are the model's, and so are the effects of nodes all of whose pieces are ablated."""
    cut = Cut(family)
    clean, corrupt = FAMILIES[family].images(), FAMILIES[family].images(seed=1)
    with torch.no_grad():
        task = cv.Task(clean, corrupt, METRIC)
        assert_close(cv.run(cut.fine, task, cv.Circuit.full(cut.fine.graph)), cut.model(clean))
    for node in list(cut.how[0])[-2:]:
        own = [name for name, piece in cut.how[1].items() if piece.node == node]
        assert len(own) > 1
        parts, wholes = (
            [edge for edge in model.graph.edges if edge.partition("->")[0] in names]
            for model, names in ((cut.fine, own), (cut.model, [node]))
        )
        coarse = effect(cut.model, clean, corrupt, wholes)
        assert effect(cut.fine, clean, corrupt, parts) == pytest.approx(coarse, abs=1e-9)


@pytest.mark.parametrize("family", NORMED)
def test_heads_that_are_no_sums_over_tokens_are_refused_by_name(family: str) -> None:
    model = made(family)[0]
    groups = cv.TokenGroups(("x", "y"), torch.arange(model.n_tokens) % 2)
    with pytest.raises(UnsupportedModelError, match=r"the pieces of a1\.h0 do not sum"):
        cv.split_sources(model, groups, "a1.h0")


def test_what_no_piece_can_be_cut_out_of_is_refused_by_name() -> None:
    model = made("timm")[0]
    everywhere = cv.TokenGroups(("x",), torch.zeros(model.n_tokens, dtype=torch.int64))
    wrong: list[tuple[Any, str]] = [
        (lambda: refined(model, {"m7": cv.neurons([0])}), "m7"),
        (lambda: refined(model, {"a0.h0": cv.neurons([0])}), "a0.h0 is a head"),
        (lambda: refined(model, {"m0": cv.neurons([48])}), "m0 has no neuron 48"),
        (lambda: refined(model, {"m0": cv.features(dictionary(7, "relu", 0), [0])}), "width 7, and m0"),
        (lambda: refined(refined(model, {"m0": cv.neurons([0])}), {"m0": cv.neurons([1])}), "m0 is refined"),
        (lambda: refined(model.edit({"m0.hidden": 0}), {"m0": cv.neurons([1])}), "m0 is edited"),
        (lambda: refined(model, {"m0": BySource(("[x]",), everywhere.members[None] == 0)}), "m0 is no head"),
        (
            lambda: cv.split_sources(model, cv.TokenGroups(("x",), torch.zeros(3, dtype=torch.int64))),
            "3 tokens",
        ),
        (lambda: cv.split_sources(model, cv.TokenGroups(("7",), everywhere.members)), "group called '7'"),
    ]
    for asked, naming in wrong:
        with pytest.raises(CircuitViTError, match=naming):
            asked()
