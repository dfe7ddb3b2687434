"""A circuit run as a tree is what plain recursion makes of it, image by image."""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.engine.trees import READOUT, Heard, Reader, Rows, Tree, TreeRuns, written_out
from circuitvit.errors import DataError
from circuitvit.models.refined import refined
from tests.families import FAMILIES, made
from tests.reference.literal_tree import LiteralTree, Path
from tests.reference.literal_vit import Groups, LiteralViT
from tests.rightness import METRIC, drawn_circuit, images, micro

ENOUGH = 10**6
"""Copies of a node: more than a tree of these models has."""


def paths_of(tree: Tree, graph: cv.Graph) -> dict[int, Path]:
    """Of each choice of a tree the places that it is for: the first of them, as the names of edges."""
    heard_at: dict[tuple[int, int], Path] = {(READOUT, 0): ()}
    found: dict[int, Path] = {}
    for reader in reversed(tree.readers):
        path = heard_at[reader.node, reader.copy]
        found[reader.choice] = (*path, "")
        for each in reader.heard:
            found[each.choice] = (*path, name_of(graph, each))
            heard_at.setdefault((each.sender, each.copy), found[each.choice])
    return found


def name_of(graph: cv.Graph, edge: Heard) -> str:
    mask = np.zeros(graph.shape, dtype=bool)
    mask[edge.sender, edge.receiver, edge.group] = True
    (name,) = graph.names_of(mask)
    return name


def drawn(path: Path, image: int, count: int) -> int:
    """Some image, always the same for the same place and image."""
    return crc32(f"{path} {image}".encode()) % count


class ByPath:
    """The choices of a tree, by the path to their place."""

    def __init__(self, tree: Tree, graph: cv.Graph, count: int) -> None:
        self.paths, self.count = paths_of(tree, graph), count

    def _rows(self, choice: int) -> Rows:
        return np.array([drawn(self.paths[choice], image, self.count) for image in range(self.count)])

    def outside(self, reader: Reader) -> Rows:
        return self._rows(reader.choice)

    def inside(self, heard: Heard) -> Rows:
        return self._rows(heard.choice)


@pytest.mark.parametrize("groups", [None, "kind"])
def test_a_whole_tree_is_what_recursion_makes_of_it(groups: str | None) -> None:
    module, count = micro(), 4
    model, sides = cv.wrap(module), images(4).split(2)
    prepared = cv.Task(*sides, METRIC, groups=groups).prepare(model)
    circuit = drawn_circuit(prepared.graph, 0.5, seed=2).pruned()
    tree = written_out(prepared.graph, circuit.kept, ENOUGH)
    assert tree.is_whole
    assert tree.places > len(circuit.nodes)  # some node is there twice
    choices = ByPath(tree, prepared.graph, count)
    found = TreeRuns.of(prepared, tree, 3, 2**30).logits(tree, choices, 2)

    members = None if prepared.groups is None else Groups(prepared.groups.names, prepared.groups.members)
    literal = LiteralTree(
        LiteralViT(module), images(4), set(circuit), lambda path, image: drawn(path, image, count), members
    )
    expected = torch.stack([literal.logits(image) for image in range(2)])
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, model(images(2)), rtol=0.01)


def test_copies_are_shared_in_turn_and_every_edge_of_each_is_chosen_for() -> None:
    graph = cv.wrap(micro()).graph
    kept = drawn_circuit(graph, 0.6).pruned().kept
    whole, bounded = written_out(graph, kept, ENOUGH), written_out(graph, kept, 2)
    assert whole.places == bounded.places == len(whole.readers) > len(bounded.readers)
    assert not bounded.is_whole
    for tree in (whole, bounded):
        choices = [reader.choice for reader in tree.readers]
        choices += [each.choice for reader in tree.readers for each in reader.heard]
        assert sorted(choices) == list(range(tree.choices))
        for reader in tree.readers:  # it is run after all that it hears, and hears all of its edges
            fed = {each.receiver for each in reader.heard}
            assert sum(int(kept[:, receiver].sum()) for receiver in fed) == len(reader.heard)
    node = max(range(len(graph.senders)), key=lambda sender: int(kept[sender].sum()))
    if graph.senders[node] != "input":
        assert {each.copy for reader in bounded.readers for each in reader.heard if each.sender == node} == {
            0,
            1,
        }


class Own:
    """Every place is about the image of its reader; said as numbers, so that everything is run."""

    def __init__(self, count: int) -> None:
        self.count = count

    def outside(self, reader: Reader) -> Rows:
        return np.arange(self.count)

    def inside(self, heard: Heard) -> Rows:
        return np.arange(self.count)


UNUSUAL = (
    "timm, gated and normed together", "timm, two of each", "timm, pool beside a class token", "timm, NaFlex",
    "transformers, timesformer",
)  # fmt: skip
"""Families whose stages differ most from a plain block's."""


@pytest.mark.parametrize("name", UNUSUAL)
def test_where_nothing_is_exchanged_a_tree_is_the_model(name: str) -> None:
    model, _ = made(name)
    shown = torch.randn(3, *FAMILIES[name].shape, generator=torch.Generator().manual_seed(0)).double()
    prepared = cv.Task(shown, metric=METRIC, ablation="zero").prepare(model)
    tree = written_out(prepared.graph, prepared.graph.edge_mask, 1)
    found = TreeRuns.of(prepared, tree, 2, 2**30).logits(tree, Own(3), 3)
    assert torch.allclose(found, model(shown), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "cut",
    [
        lambda model: cv.split_sources(
            model, cv.TokenGroups(("cls", "a", "b"), torch.tensor([0, 1, 1, 2, 2])), "a0.*"
        ),
        lambda model: refined(model, {"m0": cv.neurons([1, 5]), "m1": cv.neurons([2])}),
    ],
)
def test_and_of_models_whose_nodes_are_cut(cut: Callable[[cv.Model], cv.Model]) -> None:
    whole = cv.wrap(micro())
    model = cut(whole)
    prepared = cv.Task(images(3), metric=METRIC, ablation="zero").prepare(model)
    tree = written_out(prepared.graph, prepared.graph.edge_mask, 1)
    found = TreeRuns.of(prepared, tree, 2, 2**30).logits(tree, Own(3), 3)
    assert torch.allclose(found, whole(images(3)), rtol=1e-9, atol=1e-9)


def test_more_images_than_there_is_room_for_are_refused_with_the_number_that_fits() -> None:
    prepared = cv.Task(images(6), metric=METRIC, ablation="zero").prepare(cv.wrap(micro()))
    tree = written_out(prepared.graph, prepared.graph.edge_mask, 2)
    with pytest.raises(DataError, match=r"6 images would take .* at most [1-5] images in all"):
        TreeRuns.of(prepared, tree, 2, 20_000)
