"""Keeping the prediction: searches that go by the top class, against plain loops and known circuits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.engine import Evaluator, evaluator
from circuitvit.errors import DataError, OptionError
from circuitvit.models.timm_import import import_timm
from circuitvit.pruning.aims import Aim
from circuitvit.pruning.learned import MaskTrainer
from circuitvit.pruning.refine import BLOCKS
from circuitvit.verification.recipe import searched
from tests.reference.literal_scores import patch_reference
from tests.reference.literal_vit import LiteralViT
from tests.strategies import Case, Recipe

N_PAIRS = 10


IMAGES = torch.randn(2 * N_PAIRS, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
CLEAN, CORRUPT = IMAGES.split(N_PAIRS)


def vit(classes: int) -> Any:
    """A random ViT of one layer and two heads, in float64."""
    kind = import_timm().models.vision_transformer.VisionTransformer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = kind(
            img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2, num_classes=classes
        ).double()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


@pytest.fixture(scope="module")
def module() -> Any:
    """One that sees all of four classes about as often."""
    made = vit(classes=4)
    with torch.no_grad():
        made.head.bias -= made(IMAGES).mean(dim=0)
    return made


@pytest.fixture(scope="module")
def model(module: Any) -> cv.Model:
    return cv.wrap(module)


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(CLEAN, CORRUPT, metric=cv.logit_diff(0, 1))


class Literal:
    """The split model run circuit by circuit, with nothing of the library's."""

    def __init__(self, module: Any) -> None:
        self.vit = LiteralViT(module)
        self.reference = patch_reference(self.vit, CORRUPT)
        self.edges = [name for *_, name in self.vit.edges()]
        self.whole = self.logits(self.edges)

    def logits(self, kept: list[str]) -> Tensor:
        return self.vit.run(CLEAN, self.reference, {name: name in kept for name in self.edges}).logits

    def agreement(self, kept: list[str]) -> float:
        return sum(self.logits(kept).argmax(1) == self.whole.argmax(1)).item() / N_PAIRS

    def divergence(self, kept: list[str]) -> float:
        full, other = (torch.log_softmax(each, dim=1) for each in (self.whole, self.logits(kept)))
        return float((full.exp() * (full - other)).sum(dim=1).mean())

    def without(self, kept: list[str], gone: list[str]) -> list[str]:
        return [name for name in kept if name not in gone]

    def trimmed(self, target: float) -> list[str]:
        """The whole model less the edges whose removal leaves the top class on enough pairs, those that
        change the prediction least by themselves first: blocks of them once, then single ones in passes."""
        effect = {name: self.divergence(self.without(self.edges, [name])) for name in self.edges}
        kept = self.edges
        for size in BLOCKS:
            again = True
            while again:
                before = kept
                present = sorted(kept, key=lambda name: effect[name])
                for start in range(0, len(present), size):
                    less = self._live(self.without(kept, present[start : start + size]))
                    if self.agreement(less) >= target:
                        kept = less
                again = size == 1 and kept != before
        return kept

    def _live(self, kept: list[str]) -> list[str]:
        """The edges on paths from the input to the logits."""
        ends = [(name, *name.split("->")) for name in kept]
        while True:
            heard = {"input", *(receiver.split("<")[0] for _, _, receiver in ends)}
            told = {"logits", *(sender for _, sender, _ in ends)}
            left = [each for each in ends if each[1] in heard and each[2].split("<")[0] in told]
            if left == ends:
                return [name for name, *_ in ends]
            ends = left


@pytest.fixture(scope="module")
def literal(module: Any) -> Literal:
    return Literal(module)


@pytest.mark.parametrize("target", [0.6, 0.9])
def test_trimming_the_whole_is_the_plain_loop(
    model: cv.Model, task: cv.Task, literal: Literal, target: float
) -> None:
    found = cv.find(model, task, keep="prediction", agreement=target, progress=False)
    assert list(found.circuit) == literal.trimmed(target)
    assert found.agreement == literal.agreement(list(found.circuit))
    assert found.kl == pytest.approx(literal.divergence(list(found.circuit)), abs=1e-9)
    again = searched(found.circuit.provenance)  # as a report says it
    assert f"keep='prediction', agreement={target}" in again
    assert eval(again, {"cv": cv, "model": model, "task": task}) == found.circuit


def test_of_a_learned_mask_no_edge_can_go_without_falling_below_the_target(
    model: cv.Model, task: cv.Task, literal: Literal
) -> None:
    plan = cv.Plan(steps=20, trim_runs=300, batch_size=5, keep="prediction")
    found = cv.find(model, task, keep="prediction", agreement=0.8, plan=plan, progress=False)
    kept = list(found.circuit)
    assert found.minimal
    assert literal.agreement(kept) == found.agreement >= 0.8
    assert all(literal.agreement(literal.without(kept, [edge])) < 0.8 for edge in kept)
    assert "with the model's top class on at least 80% of them" in found.summary
    sizes = [(each.size, each.agreement) for each in found.candidates]
    assert sizes[0] == (model.graph.n_edges, 1.0)


def test_a_mask_is_learned_by_the_divergence_alone(model: cv.Model, task: cv.Task, literal: Literal) -> None:
    """With every gate wide open or shut the loss is the KL of that circuit."""
    settings = cv.MaskSettings(batch_size=N_PAIRS, keep="prediction")
    trainer = MaskTrainer(task.prepare(model), 5, settings)
    kept = literal.edges[::2]
    saved = trainer.state()
    saved.tensors["phi"] = torch.tensor([50.0 if name in kept else -50.0 for name in model.graph.edges])
    trainer.restore(saved)
    trainer.step()
    assert trainer.trace.distance == pytest.approx([literal.divergence(kept)], rel=1e-9)


def test_repair_brings_the_prediction_back(model: cv.Model, task: cv.Task, literal: Literal) -> None:
    lost = max(literal.edges, key=lambda edge: literal.divergence(literal.without(literal.edges, [edge])))
    without = literal.without(literal.edges, [lost])
    start = cv.Circuit.from_edges(model.graph, without)
    found = cv.refine(model, task, start, keep="prediction", band=(0.9, 1.0), progress=False)
    assert found.minimal
    assert literal.agreement(list(found.circuit)) == found.agreement >= 0.9 > literal.agreement(without)


def test_of_a_compiled_model_the_true_circuit_is_found() -> None:
    made = cv.compiled("relay")
    task = cv.Task(*made.pairs(4), metric=cv.logit_diff("yes", "no")).prepare(made.model)
    found = cv.find(made.model, task, keep="prediction", agreement=1.0, start="whole", progress=False)
    assert set(found.circuit) == set(made.wired)


class TestRefused:
    def test_a_model_without_classes(self) -> None:
        model = cv.wrap(vit(classes=0))
        task = cv.Task(CLEAN, CORRUPT, metric=lambda outputs: outputs[:, 0])
        for search in (
            lambda: cv.find(model, task, keep="prediction", progress=False),
            lambda: cv.refine(model, task, cv.Circuit.full(model.graph), keep="prediction", progress=False),
            lambda: cv.learn_mask(model, task, 5, cv.MaskSettings(keep="prediction"), progress=False),
        ):
            with pytest.raises(OptionError, match="are no classes, so there is no top class to keep"):
                search()

    def test_a_prediction_that_stays_whatever_is_ablated(self, model: cv.Model, literal: Literal) -> None:
        tops = literal.whole.argmax(1)
        other = literal.vit.run(CORRUPT).logits.argmax(1)
        (alike,) = torch.nonzero(tops == other, as_tuple=True)
        task = cv.Task(CLEAN[alike], CORRUPT[alike], metric=cv.logit_diff(0, 1))
        with pytest.raises(DataError, match="the top class is still the model's on 100% of the"):
            cv.find(model, task, keep="prediction", progress=False)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"keep": "metric"}, "'behaviour' or the 'prediction', not 'metric'"),
            (
                {"keep": "prediction", "agreement": 0.0},
                "agreement asked for must be a number between 0 and 1",
            ),
            (
                {"keep": "prediction", "agreement": 1.1},
                "agreement asked for must be a number between 0 and 1",
            ),
            ({"plan": cv.Plan(0, 9, 2, keep="prediction")}, "the plan is for keep='prediction'"),
        ],
    )
    def test_what_makes_no_sense(
        self, model: cv.Model, task: cv.Task, options: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(OptionError, match=said):
            cv.find(model, task, progress=False, **options)

    @pytest.mark.parametrize("band", [(0.0, 1.0), (1.1, 1.2), (0.9, 0.5)])
    def test_a_band_in_which_no_agreement_lies(
        self, model: cv.Model, task: cv.Task, band: tuple[float, float]
    ) -> None:
        with pytest.raises(OptionError, match="the band must go from above 0 to 1"):
            cv.refine(model, task, cv.Circuit.full(model.graph), keep="prediction", band=band)


def test_rounding_of_what_runs_together_does_not_decide_at_the_end_of_a_band(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A circuit lies at the end of a band; run beside others it seems to lie outside of one of two."""
    case = Case(Recipe(depth=2, heads=2), n_pairs=1)
    prepared = case.task().prepare(case.model)
    drawn = np.random.default_rng(0)
    masks = [prepared.graph.edge_mask & (drawn.random(prepared.graph.shape) < 0.8) for _ in range(3)]
    alone = Evaluator(prepared).faithfulness(masks[0])
    original = evaluator.masked_runs
    monkeypatch.setattr(evaluator, "masked_runs", lambda *given: original(*given) * (1 - 1e-6))
    for band in ((alone, alone + 1), (alone - 1, alone)):
        together = Evaluator(prepared)
        together.measure(masks)
        assert together.faithfulness(masks[0]) != alone
        assert Aim("behaviour", band).holds(together, masks[0])
