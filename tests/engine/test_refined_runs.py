"""Runs and scores of models whose nodes are cut, against the literal split model cut in the same way."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import circuitvit as cv
from circuitvit.engine import batch_runs, masked_run, soft_run
from circuitvit.models.cut_heads import BySource
from circuitvit.models.refined import refined
from tests.reference import literal_scores
from tests.reference.literal_methods import InteractionViT, RelevanceViT
from tests.reference.literal_refined import Features, How, Neurons, RefinedViT, Sources
from tests.strategies import Case, Recipe, assert_close, assert_same_scores, cases

COUNT = 5
"""Features of a dictionary."""


def dictionary(width: int, kind: cv.DictionaryKind, seed: int, **options: Any) -> cv.Dictionary:
    """A random one, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return 0.4 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    threshold = drawn(COUNT).abs() if kind == "jumprelu" else None
    kept = 2 if kind == "topk" else None
    given = drawn(COUNT, width), drawn(COUNT), drawn(COUNT, width), drawn(width)
    return cv.Dictionary(*given, kind, threshold=threshold, k=kept, **options)


def encoding(own: cv.Dictionary) -> Callable[[Tensor], Tensor]:
    """The formulas of the three kinds, written down again."""

    def encode(x: Tensor) -> Tensor:
        raw = x @ own.encoder.T + own.offset
        if own.threshold is not None:
            return torch.where(raw > own.threshold, raw, 0.0)
        if own.k is None:
            return raw.clamp(min=0)
        least = raw.sort(dim=-1).values[..., -own.k, None]
        return torch.where(raw >= least, raw.clamp(min=0), 0.0)

    return encode


@dataclass(frozen=True)
class RefinedCase(Case):
    """A case whose nodes are cut at random.

    Attributes:
        cut_seed: of the cuts.
        rules: the literal model's derivatives.
    """

    cut_seed: int = 0
    rules: type | None = None

    @cached_property
    def cuts(self) -> tuple[dict[str, Any], dict[str, How]]:
        """What becomes of each node, as a user says it, and for the literal model."""
        drawn, asked, told = random.Random(self.cut_seed), dict[str, Any](), dict[str, How]()
        for layer, block in enumerate(self.module.blocks):
            mlp = f"m{layer}"
            asked[mlp], told[mlp] = self._mlp(block, drawn)
            for head in range(block.attn.num_heads):
                made = self._head(block, drawn)
                if made is not None:
                    asked[f"a{layer}.h{head}"], told[f"a{layer}.h{head}"] = made
        return asked, told

    def _mlp(self, block: Any, drawn: random.Random) -> tuple[Any, How]:
        kind = drawn.choice(("neurons", "relu", "jumprelu", "topk", "transcoder"))
        if kind == "neurons":
            chosen = drawn.sample(range(block.mlp.fc2.in_features), 2)
            return cv.neurons(chosen), Neurons(chosen)
        width, of_input = block.attn.qkv.in_features, kind == "transcoder"
        own = dictionary(
            width, "topk" if of_input else kind, drawn.randrange(99), reads="input" if of_input else "output"
        )
        return self._features(own, drawn, of_input)

    def _head(self, block: Any, drawn: random.Random) -> tuple[Any, How] | None:
        kind = drawn.choice(("whole", "source", "source by image", "jumprelu"))
        if kind == "whole":
            return None
        if kind == "jumprelu":
            return self._features(dictionary(block.attn.head_dim, kind, drawn.randrange(99)), drawn)
        by_image = kind == "source by image" and self.ablation == "patch"
        shape = (self.n_pairs, self.recipe.n_tokens) if by_image else (self.recipe.n_tokens,)
        members = torch.randint(2, shape, generator=torch.Generator().manual_seed(drawn.randrange(99)))
        groups = {"x": members == 0, "y": members == 1}
        return BySource(("[x]", "[y]"), torch.stack([*groups.values()])), Sources(groups)

    @staticmethod
    def _features(own: cv.Dictionary, drawn: random.Random, of_input: bool = False) -> tuple[Any, How]:
        chosen = drawn.sample(range(COUNT), 2)
        told = Features(encoding(own), own.decoder, own.bias, chosen, of_input)
        return cv.features(own, chosen), told

    @cached_property
    def model(self) -> cv.Model:
        return refined(cv.wrap(self.module), self.cuts[0])

    @cached_property
    def literal(self) -> RefinedViT:
        family = RefinedViT if self.rules is None else type("Ruled", (RefinedViT, self.rules), {})
        return family(self.module, self.cuts[1])


@given(cases(max_depth=2, max_heads=2), st.integers(0, 2**16))
@settings(max_examples=6)
def test_any_mask_gives_the_logits_of_the_literal_model(case: Case, seed: int) -> None:
    """Neurons, features, source groups and what is left, under hard and real-valued masks."""
    case = RefinedCase(**vars_of(case), cut_seed=seed)
    (run,) = batch_runs(case.task().prepare(case.model), case.n_pairs)
    graph = run.sources.graph
    with torch.no_grad():
        whole = case.module(case.base)
    assert_close(masked_run(run.sources, graph.edge_mask), whole, 1e-10)
    for density in (0.2, 0.7):
        mask = case.random_mask(seed, density)
        assert list(mask) == list(graph.edges)
        with torch.no_grad():
            told = case.literal.run(case.base, case.reference, mask, case.token_groups).logits
        kept = cv.Circuit.from_edges(graph, [name for name, keep in mask.items() if keep]).kept
        assert_close(masked_run(run.sources, kept), told)
        with torch.no_grad():
            assert_close(soft_run(run.sources, torch.from_numpy(kept.copy()).double()), told)


@given(cases(max_depth=2, max_heads=2, smooth=True), st.integers(0, 2**16))
@settings(max_examples=4)
def test_scores_are_those_of_the_literal_model(case: Case, seed: int) -> None:
    case = RefinedCase(**vars_of(case), cut_seed=seed)
    names = [name for *_, name in case.literal.edges(case.token_groups)]
    some = random.Random(seed).sample(names, min(10, len(names)))
    arguments = case.literal, case.base, case.reference, case.formula, case.token_groups
    for method in ("exact", "eap", "local"):
        told = getattr(literal_scores, method)(*arguments, edges=some)
        found = cv.attribute(case.model, case.task(), method, progress=False).to_dict()
        assert_same_scores({name: found[name] for name in told}, told)


@pytest.mark.parametrize(("method", "rules"), [("relp", RelevanceViT), ("gim", InteractionViT)])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_backward_rules_go_by_way_of_the_pieces(method: str, rules: type, mlp: str) -> None:
    recipe = Recipe(depth=3, heads=2, layer_scale=True, mlp=mlp, seed=3)
    case = RefinedCase(recipe, n_pairs=1, cut_seed=2, rules=rules)
    kinds = {type(how) for how in case.cuts[1].values()}
    assert kinds == {Neurons, Features, Sources}
    told = literal_scores.eap(case.literal, case.base, case.reference, case.formula)
    assert_same_scores(cv.attribute(case.model, case.task(), method, progress=False).to_dict(), told)


def vars_of(case: Case) -> dict[str, Any]:
    """What a case is made of, without what it has computed."""
    return {name: getattr(case, name) for name in Case.__dataclass_fields__}
