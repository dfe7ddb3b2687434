"""Micro-models of timm's, and what is true of any module: the library says the same of it, or refuses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import CircuitViTError, UnsupportedModelError
from circuitvit.models import Stage
from circuitvit.models.timm_import import import_timm
from tests.reference import literal_scores
from tests.reference.hooked import HookedModule
from tests.reference.literal_module import ModuleViT
from tests.reference.literal_vit import Groups, LiteralViT
from tests.strategies import assert_close, assert_same_scores, scramble

timm = import_timm()
VisionTransformer = timm.models.vision_transformer.VisionTransformer

CLASSES = 5
METRIC = cv.logit_diff(0, 1)
MICRO = {
    "img_size": 32,
    "patch_size": 16,
    "num_classes": CLASSES,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
}


def formula(logits: Tensor) -> Tensor:
    return logits[:, 0] - logits[:, 1]


def finished(module: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 1) -> Any:
    """A module with weights of order 1, in evaluation mode."""
    module = module.to(dtype).eval()
    scramble(module, seed, gain=1.0)
    return module


def micro(family: type = VisionTransformer, **options: Any) -> Any:
    return finished(family(**{**MICRO, **options}))


def images(n: int = 2, seed: int = 0, channels: int = 3) -> Tensor:
    """Images `(n, channel, 32, 32)`, exact in bfloat16, so that every dtype sees the same."""
    drawn = torch.randn(n, channels, 32, 32, generator=torch.Generator().manual_seed(seed))
    return drawn.bfloat16().double()


CLEAN, CORRUPT = images(seed=0), images(seed=1)


def task_of(**options: Any) -> cv.Task:
    return cv.Task(CLEAN, CORRUPT, METRIC, **options)


def scored(model: cv.Model, method: str, **options: Any) -> dict[str, float]:
    return cv.attribute(model, task_of(**options), method, progress=False).to_dict()


def drawn_circuit(graph: cv.Graph, density: float, seed: int = 0) -> cv.Circuit:
    """A random part of a graph's edges."""
    keep = np.random.default_rng(seed).random(len(graph.edges)) < density
    return cv.Circuit.from_edges(graph, [edge for edge, kept in zip(graph.edges, keep, strict=True) if kept])


def assert_right_or_refused(
    module: Any, naming: tuple[str, ...] = (), *, refusable: bool = True, literal: LiteralViT | None = None
) -> cv.Model | None:
    """The library says of a module what is true of it, or refuses it by name.

    Args:
        module: in float64 and evaluation mode, for images `(n, 3, 32, 32)`.
        naming: words, one of which the message of a refusal must have.
        refusable: whether a refusal is an answer; False where there is no reason for one.
        literal: what is true; by default the module's own parts.

    Returns:
        The model, or None if it was refused.
    """
    model = wrapped_or_told(module, UnsupportedModelError)
    if isinstance(model, str):
        assert refusable, f"refused without need: {model}"
        assert not naming or any(word in model for word in naming), f"names none of {naming}: {model}"
        return None
    assert_right(model, module, ModuleViT(module) if literal is None else literal)
    return model


def wrapped_or_told(module: Any, kind: type[CircuitViTError] = CircuitViTError) -> cv.Model | str:
    """The model, or what the refusal says; errors of other kinds are raised as they are."""
    try:
        return cv.wrap(module)
    except kind as error:
        return str(error)


def assert_right(model: cv.Model, module: Any, literal: LiteralViT) -> None:
    """Whole, ablated and masked runs, with and without token groups, and scores are what they should be."""
    with torch.no_grad():
        expected, other = module(CLEAN), module(CORRUPT)
    assert_close(literal.run(CLEAN).logits, expected)  # what is held against is itself right
    assert_close(cv.run(model, task_of(), cv.Circuit.full(model.graph)), expected)
    assert_close(cv.run(model, task_of(), cv.Circuit.empty(model.graph)), other)
    assert_close(model(CLEAN), expected)
    assert_same_runs_and_scores(model, literal)


def assert_same_runs_and_scores(model: cv.Model, literal: LiteralViT) -> None:
    with torch.no_grad():
        reference = literal_scores.patch_reference(literal, CORRUPT)
    assert_same_runs(model, literal, reference, None)
    assert_same_runs(model, literal, reference, kinds_of(model, literal))
    asked = some_edges(literal)
    for method in ("exact", "local", "eap"):
        found = scored(model, method)
        told = getattr(literal_scores, method)(literal, CLEAN, reference, formula, edges=asked)
        assert_same_scores({edge: found[edge] for edge in told}, told)


def assert_same_runs(
    model: cv.Model, literal: LiteralViT, reference: dict[str, Tensor], groups: Groups | None
) -> None:
    """Random circuits, dense and sparse, have the logits of the literal masked run."""
    graph = model.graph if groups is None else model.graph.with_groups(groups.names)
    task = task_of(groups=None if groups is None else "kind")
    for seed, density in enumerate((0.9, 0.5, 0.2)):
        circuit = drawn_circuit(graph, density, seed)
        with torch.no_grad():
            told = literal.run(CLEAN, reference, lambda name, kept=frozenset(circuit): name in kept, groups)
        assert_close(cv.run(model, task, circuit), told.logits)


def kinds_of(model: cv.Model, literal: LiteralViT) -> Groups | None:
    """Class token, registers and patches apart; None where all tokens are of one kind."""
    found = cv.TokenGroups.by_kind(model, literal.run(CLEAN).outputs["input"].shape[1])
    return Groups(found.names, found.members) if len(found.names) > 1 else None


def some_edges(literal: LiteralViT) -> list[str]:
    """Edges of every kind of receiver: all into the last stages, some of the others."""
    names = [name for *_, name in literal.edges()]
    last = f"m{literal.depth - 1}"
    return [
        name for place, name in enumerate(names) if name.endswith(("->logits", f"->{last}")) or place % 7 == 0
    ]


def prove(
    model: cv.Model,
    hooked: HookedModule,
    clean: Tensor,
    corrupt: Tensor,
    edges: Sequence[str] | None = None,
) -> None:
    """Hold a wrapped micro-model in float64 against its original module, ablated by plain hooks.

    Every edge's `exact` effect is that of the hooks, `eap` is their finite difference, and every stage's
    `pull_back` and `local_effects` are the literal ones.

    Args:
        model: to prove right.
        hooked: the original module.
        clean: images.
        corrupt: their counterparts.
        edges: that are held against hooks; by default all.
    """
    task = cv.Task(clean, corrupt, METRIC)
    exact, eap = (cv.attribute(model, task, method).values for method in ("exact", "eap"))
    size, step = np.abs(exact).max(), 1e-4
    assert size > 1e-3, "a model in which nothing matters proves nothing"
    with torch.no_grad():
        base = formula(hooked.run(clean)).mean()
        for edge in model.graph.edges if edges is None else edges:
            place = model.graph.edge_index(edge)
            found = {
                share: float(formula(hooked.ablated(clean, corrupt, edge, share)).mean() - base)
                for share in (1.0, step, -step)
            }
            assert abs(exact[place] - found[1.0]) <= 1e-6 * size, edge
            slope = (found[step] - found[-step]) / (2 * step)
            assert abs(eap[place] - slope) <= 1e-5 * max(size, abs(slope)), edge
    _prove_stages(model, clean, corrupt)


def _prove_stages(model: cv.Model, clean: Tensor, corrupt: Tensor) -> None:
    """Every stage's fast gradient and fast answers are those of the contract's literal versions."""
    stream, other = model.embed(clean), model.embed(corrupt)
    for stage in model.layers:
        reads = tuple(read.detach().requires_grad_() for read in stage.read(stream))
        compact = stage.write(reads)
        d_compact = torch.randn(
            compact.shape, generator=torch.Generator().manual_seed(3), dtype=compact.dtype
        )
        d_reads = torch.autograd.grad(compact, reads, d_compact)
        with torch.no_grad():
            reads = tuple(read.detach() for read in reads)
            found = stage.pull_back(stream, reads, d_reads).expand()
            assert_close(found, Stage.pull_back(stage, stream, reads, d_reads).expand())
            streams = torch.stack([other, (stream + other) / 2])
            arguments = reads, d_reads, d_compact, stream, streams
            assert_close(stage.local_effects(*arguments), Stage.local_effects(stage, *arguments))
            stream, other = (stage.add(each, stage.write(stage.read(each))) for each in (stream, other))
