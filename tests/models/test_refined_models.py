"""Models whose nodes are cut are models like any other: copied, edited, hashed, read, and refused by name."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.models import Stage
from circuitvit.models.edited import EditedStage
from circuitvit.models.refined import refined
from tests.engine.test_refined_runs import dictionary
from tests.families import made
from tests.models.test_edited_edges import bent
from tests.rightness import METRIC, images, micro
from tests.strategies import assert_close

CLEAN, CORRUPT = images(seed=0), images(seed=1)
TASK = cv.Task(CLEAN, CORRUPT, METRIC)


def halves(model: cv.Model) -> cv.TokenGroups:
    return cv.TokenGroups(("even", "odd"), torch.arange(model.n_tokens) % 2)


def cut(model: cv.Model) -> cv.Model:
    """An MLP in neurons, one in features, and heads in pieces of both kinds."""
    table = {
        "m0": cv.neurons([3, 17]),
        "m1": cv.features(dictionary(24, "topk", 0), [0, 4]),
        "a0.h1": cv.features(dictionary(12, "jumprelu", 1), [2]),
    }
    return cv.split_sources(refined(model, table), halves(model), "a1.*")


@pytest.fixture
def fine() -> cv.Model:
    return cut(cv.wrap(micro()))


def half_of(graph: cv.Graph) -> cv.Circuit:
    return cv.Circuit.from_edges(graph, graph.edges[::2])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_computes_with_weights_of_its_own(fine: cv.Model, copied: Callable[[Any], Any]) -> None:
    again, circuit = copied(fine), half_of(fine.graph)
    before = cv.run(fine, TASK, circuit)
    assert torch.equal(cv.run(again, TASK, circuit), before)
    with torch.no_grad():
        for block in again.module.blocks:
            block.mlp.fc1.weight.mul_(-1)
    assert torch.equal(cv.run(fine, TASK, circuit), before)
    assert_close(cv.run(again, TASK, cv.Circuit.full(fine.graph)), again(CLEAN))
    assert not torch.allclose(again(CLEAN), fine(CLEAN))


def test_weights_edited_in_place_are_seen(fine: cv.Model) -> None:
    found = fine.weights_hash
    with torch.no_grad():
        for name, parameter in fine.module.named_parameters():
            if "mlp" in name:
                parameter.mul_(1.5)
    assert_close(cv.run(fine, TASK, cv.Circuit.full(fine.graph)), fine(CLEAN))
    assert fine.weights_hash != found


def test_the_hash_tells_units_and_dictionaries_apart() -> None:
    model, own = made("timm")[0], dictionary(24, "relu", 0)
    found = [
        refined(model, {"m1": units}).weights_hash
        for units in (
            cv.features(own, [1]),
            cv.features(copy.deepcopy(own), [1]),
            cv.features(own, [2]),
            cv.features(dictionary(24, "relu", 1), [1]),
            cv.neurons([1]),
        )
    ]
    assert found[0] == found[1]
    assert len({*found, model.weights_hash}) == 5


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_features_that_tie_for_the_last_place_count_once(kept: int) -> None:
    """Two equal rows: only as many as k are there, so that the pieces still sum to the node."""
    row = dictionary(24, "relu", 0)
    pairs = torch.arange(6) // 2
    own = cv.Dictionary(
        row.encoder[pairs], row.offset[pairs].abs() + 2, dictionary(24, "relu", 1).decoder[pairs], row.bias,
        "topk", k=kept,
    )  # fmt: skip
    model = made("timm")[0]
    for reads in ("output", "input"):
        units = cv.features(cv.Dictionary(**{**vars(own), "reads": reads}), [0, 1])
        tied = refined(model, {"m1": units})
        assert_close(cv.run(tied, TASK, cv.Circuit.full(tied.graph)), model(CLEAN))


class Foreign(nn.Module):
    """Somebody's autoencoder: with a layer that differs in training, and parameters that want gradients."""

    def __init__(self, own: cv.Dictionary) -> None:
        super().__init__()
        self.weight, self.decoder = nn.Parameter(own.encoder.clone()), nn.Parameter(own.decoder.T.clone())
        self.offset, self.bias, self.drop = own.offset, own.bias, nn.Dropout(0.5)

    def encode(self, x: Tensor) -> Tensor:
        return self.drop((x @ self.weight.T + self.offset).relu())

    def decode(self, active: Tensor) -> Tensor:
        return active @ self.decoder.T + self.bias


@pytest.mark.parametrize("node", ["m1", "a1.h0"])
def test_a_foreign_module_is_taken_as_a_dictionary_of_its_form(node: str) -> None:
    model = made("timm")[0]
    own = dictionary(24 if node == "m1" else 12, "relu", 0)
    theirs = Foreign(own)
    one, other = (refined(model, {node: cv.features(each, [0, 3])}) for each in (own, theirs))
    for method in ("eap", "local", "exact"):
        scores = [cv.attribute(each, TASK, method, progress=False).values for each in (one, other)]
        assert scores[1] == pytest.approx(scores[0], abs=1e-9)
    cv.learn_mask(other, TASK, 20, cv.MaskSettings(steps=2), progress=False)
    assert theirs.training
    assert theirs.weight.grad is None


@pytest.mark.parametrize(
    "edits",
    [
        {"m0.n3": bent, "m0.rest@cls": 0, "m1.error": bent},
        {"a0.h1.f2": bent, "a1.h0[even]": 0.3, "a1.h1<k>": bent},
        {"a0.h1.pattern@0->1": cv.knock_out(), "a1.h0.pattern@patch->cls": cv.knock_out()},
        {"resid1": bent, "m1.f4": 0},
    ],
    ids=lambda edits: "+".join(edits),
)
def test_edited_pieces_answer_as_the_literal_versions_say(fine: cv.Model, edits: dict[str, Any]) -> None:
    """The whole is that of the edited run, and fast answers are those of the contract."""
    edited = fine.edit(edits)
    assert_close(cv.run(edited, TASK, cv.Circuit.full(edited.graph)), edited(CLEAN))
    assert not torch.allclose(edited(CLEAN), fine(CLEAN))
    stream, other = edited.embed(CLEAN), edited.embed(CORRUPT)
    for stage in edited.layers:
        if isinstance(stage, EditedStage):
            reads, others = stage.read(stream), tuple(read[None] for read in stage.read(other))
            given = tuple(read.detach().requires_grad_() for read in reads)
            compact = stage.write(given)
            d_reads = torch.autograd.grad(compact, given, torch.ones_like(compact))
            arguments = reads, d_reads, torch.ones_like(compact)
            with torch.no_grad():
                found = stage.answers(reads, others, *arguments[1:])
                assert_close(found, Stage.local_effects(stage, *arguments, stream, other[None]))
        with torch.no_grad():
            stream, other = (stage.add(each, stage.write(stage.read(each))) for each in (stream, other))


def test_an_edited_model_is_cut_under_its_edits() -> None:
    model = made("timm")[0].edit({"a1.h0.pattern@patch->cls": cv.knock_out(), "resid1": bent})
    fine = cut(model)
    assert_close(fine(CLEAN), model(CLEAN))
    assert_close(cv.run(fine, TASK, cv.Circuit.full(fine.graph)), model(CLEAN))


def test_pieces_are_read_by_name(fine: cv.Model) -> None:
    names = ["a1.h0[even]", "a1.h0[odd]", "a1.h0.pattern", "m0.n3", "m0.n17", "m0.rest"]
    found = cv.activations(fine, CLEAN, names, progress=False)
    coarse = cv.activations(fine.coarse, CLEAN, ["a1.h0", "a1.h0.pattern", "m0"], progress=False)
    assert_close(found["a1.h0[even]"] + found["a1.h0[odd]"], coarse["a1.h0"])
    assert_close(found["m0.n3"] + found["m0.n17"] + found["m0.rest"], coarse["m0"])
    assert_close(found["a1.h0.pattern"], coarse["a1.h0.pattern"])
    with pytest.raises(NameNotFoundError, match=r"m0 is cut into m0\.n3, m0\.n17, m0\.rest"):
        fine.edit({"m0.hidden": 0})


def test_source_groups_are_of_images_of_their_size_and_number() -> None:
    model = cv.wrap(micro(dynamic_img_size=True))
    own = halves(model)
    fine = cv.split_sources(model, own)
    with pytest.raises(DataError, match=r"takes images of \(3, 32, 32\)"):
        cv.run(
            fine,
            cv.Task(CLEAN.repeat(1, 1, 2, 1), CORRUPT.repeat(1, 1, 2, 1), METRIC),
            cv.Circuit.full(fine.graph),
        )
    by_image = cv.split_sources(model, cv.TokenGroups(own.names, own.members.expand(3, -1)))
    with pytest.raises(OptionError, match="for 3 images, and there are 2"):
        cv.run(by_image, TASK, cv.Circuit.full(by_image.graph))
