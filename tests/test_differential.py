"""The whole library against the literal model, over every switch of models, tasks and calls at once.

A `Trial` is a random model, a random task and a random way to ask: its precision, its batch size, hooks that
look on, weights that are edited in place between two rounds of the same questions. In float64 the answers are
those of `tests/reference` to rounding; in lower precision they are as near as that precision allows.

Plain `pytest` draws some dozens of models. All 500: `pytest tests/test_differential.py
--hypothesis-profile=thorough`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import circuitvit as cv
from tests.reference import literal_scores
from tests.reference.literal_vit import Groups, LiteralViT
from tests.strategies import METRICS, Case, Recipe, assert_close, assert_same_scores, cases

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SCORE_EDGES = 30
EXACT_EDGES = 10

STEPS = 20
"""How many rounding steps of a lower precision an answer may be off, at the size of the largest number."""

ROUGH = 10
"""And how many times as far as the reference goes when every weight moves by one rounding step."""


@dataclass(frozen=True)
class Trial:
    """A model, a task, and how it is asked about.

    Attributes:
        case: model and task; of its groups only "none" is told apart from the others, if `kinds` is set.
        dtype: of the model, one of `DTYPES`.
        kinds: whether edges are resolved by kinds of tokens.
        batch_size: pairs at once; None for the library's choice.
        observed: which modules have hooks that look on, as places among all modules.
        edit: what happens to the weights between two rounds: "none", "scale", "load" or "step".
        seed: of masks, of edges that are asked for, of the edit.
    """

    case: Case
    dtype: str = "float64"
    kinds: bool = False
    batch_size: int | None = None
    observed: tuple[int, ...] = ()
    edit: str = "none"
    seed: int = 0

    def module(self) -> Any:
        return self.case.recipe.build(DTYPES[self.dtype])

    @property
    def images(self) -> tuple[Tensor, Tensor]:
        """Clean and corrupt images that every precision sees alike."""
        return self.case.clean.bfloat16().double(), self.case.corrupt.bfloat16().double()

    def task(self) -> cv.Task:
        groups: cv.TokenGroups | str | None = "kind" if self.kinds else None
        if self.case.token_groups is not None and not self.kinds:
            groups = cv.TokenGroups(self.case.token_groups.names, self.case.token_groups.members)
        metric, _ = METRICS[self.case.metric]
        return cv.Task(
            *self.images,
            metric,
            ablation=self.case.ablation,
            direction=self.case.direction,
            groups=groups,
        )


@st.composite
def trials(draw: st.DrawFn) -> Trial:
    """Trials with a drawn model, task and way to ask; most of them in float64, which shows most.

    In lower precision models are less deep, and smooth, so that rounding does not grow beyond measure.
    """
    dtype = draw(st.sampled_from(("float64", "float64", *DTYPES)))
    limits: dict[str, Any] = {} if dtype == "float64" else {"max_depth": 2, "smooth": True}
    case = draw(cases(**limits))
    if dtype.endswith("16"):  # probabilities near 1 round to 1, and then there is nothing to explain
        case = replace(case, metric="logit_diff")
    return Trial(
        case,
        dtype=dtype,
        kinds=case.groups != "none" and draw(st.booleans()),
        batch_size=draw(st.sampled_from((None, 1, 2, 3))),
        observed=tuple(draw(st.lists(st.integers(0, 200), max_size=3))),
        edit=draw(st.sampled_from(("none", "scale", "scale", "load", "step"))),
        seed=draw(st.integers(0, 2**16)),
    )


# -- the same questions, to the library and to the reference ---------------------------------------


@dataclass
class Answers:
    """What was asked, by name: logits, and scores by edge name."""

    logits: dict[str, Tensor]
    scores: dict[str, dict[str, float]]


class Questions:
    """Random circuits and edges of a trial, said for both sides."""

    def __init__(self, trial: Trial, literal: LiteralViT) -> None:
        self.trial = trial
        clean, corrupt = trial.images
        noising = trial.case.direction == "noising"
        self.base, self.paired = (clean, corrupt) if noising else (corrupt, clean)
        self.both = torch.cat([clean, corrupt])
        self.groups = kinds_of(trial.case.recipe) if trial.kinds else trial.case.token_groups
        self.edges = [name for *_, name in literal.edges(self.groups)]
        drawn = np.random.default_rng(trial.seed)
        self.masks = {
            f"{density:.0%} kept": frozenset(edge for edge in self.edges if drawn.random() < density)
            for density in (0.85, 0.5, 0.15)
        }
        self.some = [self.edges[place] for place in self._places(drawn, SCORE_EDGES)]
        self.few = [self.edges[place] for place in self._places(drawn, EXACT_EDGES)]

    def _places(self, drawn: np.random.Generator, at_most: int) -> list[int]:
        count = len(self.edges)
        return sorted(drawn.choice(count, size=min(at_most, count), replace=False).tolist())

    def to_library(self, model: cv.Model) -> Answers:
        task, size = self.trial.task(), self.trial.batch_size
        names = self.groups.names if self.groups is not None else ("patch",) if self.trial.kinds else None
        graph = model.graph if names is None else model.graph.with_groups(names)
        assert sorted(graph.edges) == sorted(self.edges)
        logits = {}
        for name, kept in self.masks.items():
            circuit = cv.Circuit.from_edges(graph, [edge for edge in graph.edges if edge in kept])
            logits[name] = cv.run(model, task, circuit, batch_size=size)
        scores = {
            method: cv.attribute(model, task, method, batch_size=size, progress=False).to_dict()
            for method in ("eap", "local", "exact")
        }
        asked = {"eap": self.some, "local": self.some, "exact": self.few}
        return Answers(
            logits, {method: {edge: scores[method][edge] for edge in asked[method]} for method in scores}
        )

    def to_reference(self, literal: LiteralViT) -> Answers:
        reference, base, groups = self.reference(literal), self.base, self.groups
        _, formula = METRICS[self.trial.case.metric]
        logits = {}
        for name, kept in self.masks.items():
            logits[name] = literal.run(base, reference, self._keeps(kept), groups).logits
        scores = {
            "eap": literal_scores.eap(literal, base, reference, formula, groups, self.some),
            "local": literal_scores.local(literal, base, reference, formula, groups, self.some),
            "exact": literal_scores.exact(literal, base, reference, formula, groups, self.few),
        }
        return Answers(logits, scores)

    def _keeps(self, circuit: frozenset[str]) -> Callable[[str], bool]:
        """Which edges keep the base run's outputs: noising, the circuit; denoising, all others."""
        noising = self.trial.case.direction == "noising"
        return lambda edge: (edge in circuit) == noising

    def reference(self, literal: LiteralViT) -> dict[str, Tensor]:
        ablation = self.trial.case.ablation
        if ablation == "patch":
            return literal_scores.patch_reference(literal, self.paired)
        if ablation == "zero":
            return literal_scores.zero_reference(literal, self.base)
        return literal_scores.mean_reference(literal, self.base, self.both, per_token=ablation == "mean")


def kinds_of(recipe: Recipe) -> Groups | None:
    """Class token, distillation token, registers and patches apart; None where all tokens are of one kind."""
    kinds = ["cls"] * recipe.class_token + ["dist"] * recipe.distilled + ["reg"] * recipe.registers
    kinds += ["patch"] * (recipe.n_tokens - len(kinds))
    names = tuple(dict.fromkeys(kinds))
    return Groups(names, torch.tensor([names.index(kind) for kind in kinds])) if len(names) > 1 else None


# -- what happens around the questions -------------------------------------------------------------


def watched(module: nn.Module, places: Iterable[int]) -> list[str]:
    """Hooks that look on, at some of the modules; gives the list of what they have seen."""
    seen: list[str] = []
    parts = list(module.named_modules())
    for place in places:
        name, part = parts[place % len(parts)]
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
        part.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    return seen


def edited(module: Any, trial: Trial) -> None:
    """The weights changed in place, as users do it."""
    drawn = np.random.default_rng(trial.seed)
    if trial.edit == "scale":
        parameters = list(module.parameters())
        with torch.no_grad():
            for place in drawn.choice(len(parameters), size=min(3, len(parameters)), replace=False):
                parameters[place].mul_(0.5 + float(drawn.random()))
    elif trial.edit == "load":
        other = Recipe(**{**trial.case.recipe.__dict__, "seed": trial.seed + 1})
        module.load_state_dict(other.build(DTYPES[trial.dtype]).state_dict())
    elif trial.edit == "step":
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, float(drawn.normal()))
        optimizer.step()
        optimizer.zero_grad()


def as_double(module: nn.Module) -> LiteralViT:
    """The literal model of the weights as they are now."""
    return LiteralViT(copy.deepcopy(module).double())


@dataclass
class Round:
    """What the library and the reference answer, and what the reference does for weights a step away."""

    found: Answers
    told: Answers
    nearby: Callable[[], Answers]


def rounds(trial: Trial) -> list[Round]:
    """The answers before and after the weights are edited."""
    module = trial.module()
    seen = watched(module, trial.observed)
    questions = Questions(trial, as_double(module))
    model = cv.wrap(module)
    seen.clear()
    made = [answered(questions, model, as_double(module))]
    if trial.edit != "none":
        edited(module, trial)
        made.append(answered(questions, model, as_double(module)))
    assert not seen, f"hooks of the user's module fired: {seen[:3]}"
    return made


def answered(questions: Questions, model: cv.Model, literal: LiteralViT) -> Round:
    step = torch.finfo(DTYPES[questions.trial.dtype]).eps
    return Round(
        questions.to_library(model),
        questions.to_reference(literal),
        lambda: questions.to_reference(moved(literal, step)),
    )


def moved(literal: LiteralViT, step: float) -> LiteralViT:
    """The same model with every weight moved by about a rounding step."""
    module, generator = copy.deepcopy(literal.vit), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1 + step * noise)
    return LiteralViT(module)


# -- the tests -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the forward hooks of")
@given(trials())
def test_every_answer_is_the_references(trial: Trial) -> None:
    for round_ in rounds(trial):
        if trial.dtype == "float64":
            assert_the_same(round_.found, round_.told)
        else:
            assert_near(round_, DTYPES[trial.dtype])


def assert_the_same(found: Answers, told: Answers) -> None:
    for name, logits in told.logits.items():
        assert_close(found.logits[name], logits)
    for method, scores in told.scores.items():
        assert_same_scores(found.scores[method], scores)


def assert_near(round_: Round, dtype: torch.dtype) -> None:
    """Equal but for rounding, at the size of the largest number; more where the task itself is that rough.

    How rough it is, is measured: by what the reference answers when each weight moves by a rounding step.
    """
    found, told = stacked(round_.found), stacked(round_.told)
    size = max(1.0, *(float(expected.abs().max()) for expected in told.values()))
    for name, expected in told.items():
        off = float((found[name] - expected).abs().max())
        if off > STEPS * size * torch.finfo(dtype).eps:
            rough = float((stacked(round_.nearby())[name] - expected).abs().max())
            assert off <= ROUGH * rough, f"{name} is off by {off:.3g}, a step of the weights by {rough:.3g}"


def stacked(answers: Answers) -> dict[str, Tensor]:
    scores = {
        method: torch.tensor(list(values.values()), dtype=torch.float64)
        for method, values in answers.scores.items()
    }
    return {name: logits.double() for name, logits in answers.logits.items()} | scores
