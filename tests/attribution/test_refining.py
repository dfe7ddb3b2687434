"""Refining for a task: the units with the largest scores become nodes, and what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import circuitvit as cv
from circuitvit.errors import NameNotFoundError, OptionError, UnsupportedModelError
from tests.rightness import CLEAN, CORRUPT, METRIC, micro


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(micro())


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(CLEAN, CORRUPT, metric=METRIC)


def units(model: cv.Model) -> set[str]:
    return {node for node in model.graph.nodes if node.rpartition(".")[2][1:].isdigit() and ".h" not in node}


def dictionary(width: int = 24, count: int = 40) -> cv.Dictionary:
    drawn = torch.Generator().manual_seed(0)
    encoder, decoder = (torch.randn(count, width, generator=drawn).double() for _ in range(2))
    return cv.Dictionary(encoder, torch.zeros(count).double(), decoder, torch.ones(width).double(), "relu")


def test_the_strongest_units_of_all_nodes_become_nodes(model: cv.Model, task: cv.Task) -> None:
    scores = cv.attribute_units(model, task, {"m*": cv.neurons()}, progress=False)
    fine = cv.refine_nodes(model, {"m*": cv.neurons()}, top=9, task=task, progress=False)
    assert units(fine) == {name for name, _ in scores.strongest(9)}


def test_units_that_are_named_stay_beside_those_that_are_chosen(model: cv.Model, task: cv.Task) -> None:
    table = {"m*": cv.neurons(), "m1": cv.neurons([2])}
    fine = cv.refine_nodes(model, table, top=3, task=task, progress=False)
    assert {"m1.n2", "m1.rest"} <= set(fine.graph.nodes)
    assert len([name for name in units(fine) if name.startswith("m0.")]) == 3


def test_the_error_of_a_dictionary_is_a_node_even_where_no_feature_is(model: cv.Model, task: cv.Task) -> None:
    table = {"m0": dictionary(), "m1": cv.neurons()}
    fine = cv.refine_nodes(model, table, top=0 + 1, task=task, progress=False)
    assert {"m0.rest", "m0.error"} <= set(fine.graph.nodes)


def test_what_is_missing_or_too_much_is_said(model: cv.Model, task: cv.Task) -> None:
    with pytest.raises(OptionError, match="which neurons of m1"):
        cv.refine_nodes(model, {"m1": cv.neurons()}, progress=False)
    with pytest.raises(OptionError, match="leave out top and task"):
        cv.refine_nodes(model, {"m1": cv.neurons([1])}, top=3, progress=False)
    with pytest.raises(OptionError, match="by name"):
        cv.refine_nodes(model, {}, progress=False)
    with pytest.raises(NameNotFoundError, match="m7"):
        cv.refine_nodes(model, {"m7": cv.neurons([1])}, progress=False)
    with pytest.raises(OptionError, match="m1 has no neuron 400"):
        cv.refine_nodes(model, {"m1": cv.neurons([400])}, progress=False)


# -- what is given ---------------------------------------------------------------------------------


def numbers(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(0)).double()


class TopK(torch.nn.Module):
    """A dictionary that is not ours, whose k is no tensor."""

    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.weight, self.k = torch.nn.Parameter(numbers()), k

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        raw = (x @ self.weight.T).relu()
        return raw * (raw >= raw.topk(self.k).values[..., -1:])

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.weight


class Mixes(TopK):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x - x.mean(dim=0))


class Detaches(TopK):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x.detach()).detach()


class Rounds(TopK):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x).float()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return super().decode(features.double())


class SaysNothing(TopK):
    def decode(self, features: torch.Tensor) -> None:  # type: ignore[override]
        return None


class Endless(TopK):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(x) / 0


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Mixes(), "other tokens or images"),
        (Detaches(), "no gradient"),
        (Rounds(), "float32"),
        (SaysNothing(), "NoneType"),
        (Endless(), "NaN or infinite"),
    ],
)
def test_a_dictionary_that_is_not_ours_is_tried_first(model: cv.Model, made: TopK, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        cv.refine_nodes(model, {"m1": cv.features(made, [1])})


def test_dictionaries_that_differ_make_models_that_differ(model: cv.Model) -> None:
    class Other(TopK):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return super().encode(2 * x)

    made = [cv.refine_nodes(model, {"m1": cv.features(each, [1])}) for each in (TopK(), TopK(4), Other())]
    assert len({each.weights_hash for each in made}) == 3
    assert made[0].weights_hash == cv.refine_nodes(model, {"m1": cv.features(TopK(), [1])}).weights_hash


def test_a_dictionary_of_another_site_is_refused(model: cv.Model) -> None:
    own = replace(dictionary(), site="m0")
    with pytest.raises(OptionError, match="of m0, not of m1"):
        cv.refine_nodes(model, {"m1": cv.features(own, [1])})
    fine = cv.refine_nodes(
        model, {"m0": cv.features(own, [1]), "m1": cv.features(replace(own, site=None), [1])}
    )
    assert {"m0.f1", "m1.f1"} <= set(fine.graph.nodes)


def test_what_is_refined_in_inference_mode_has_gradients_outside(model: cv.Model, task: cv.Task) -> None:
    foreign = TopK()
    with torch.inference_mode():
        fine = cv.refine_nodes(model, {"m1": cv.features(dictionary(), [1]), "m0": cv.features(foreign, [1])})
    assert cv.attribute(fine, task, method="eap", progress=False).values.any()


@pytest.mark.parametrize("chosen", [5, torch.tensor(3), [[1, 2], [3]], torch.tensor([[1, 2]])])
def test_units_that_are_no_list_of_numbers_are_refused(chosen: object) -> None:
    with pytest.raises(OptionError, match="by their numbers"):
        cv.neurons(chosen)  # type: ignore[arg-type]


def test_a_table_is_of_a_model_and_by_names(model: cv.Model) -> None:
    with pytest.raises(OptionError, match="names of nodes"):
        cv.refine_nodes(model, {5: cv.neurons([1])})  # type: ignore[dict-item]
    with pytest.raises(OptionError, match="no model of circuitvit"):
        cv.refine_nodes("catdog-tiny", {"m1": cv.neurons([1])})  # type: ignore[arg-type]


def test_sources_are_groups_of_heads_that_are_named(model: cv.Model) -> None:
    groups = cv.TokenGroups.by_kind(model, model.n_tokens)
    with pytest.raises(OptionError, match="TokenGroups"):
        cv.split_sources(model, "kind")  # type: ignore[arg-type]
    for heads in ([], None, 3, [3]):
        with pytest.raises(OptionError, match="heads are names"):
            cv.split_sources(model, groups, heads)  # type: ignore[arg-type]


def test_what_crosses_is_asked_of_whole_heads_and_streams(model: cv.Model, task: cv.Task) -> None:
    split = cv.split_sources(model, cv.TokenGroups.by_kind(model, model.n_tokens))
    with pytest.raises(OptionError, match="whole"):
        cv.flow(split, task, progress=False)
    stream = cv.refine_nodes(model, {"resid1": cv.features(dictionary(), [1])})
    with pytest.raises(UnsupportedModelError, match="stream cut into features"):
        cv.flow(stream, task, progress=False)
    with pytest.raises(OptionError, match="TokenGroups"):
        cv.flow(model, task, 5, progress=False)  # type: ignore[arg-type]
