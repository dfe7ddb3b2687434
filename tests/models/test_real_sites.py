"""The real ViT-Ti on photographs: sites, edits and single edges against hooks on timm's own module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks.image_files import load_image
from tests.models.test_edits import along, among, without
from tests.reference.hooked import HookedModule, Receiver, packed_blocks
from tests.reference.sites import Changes, Original

NAME = "vit_tiny_patch16_224"
HEADS, WIDTH, LAYERS, D = 3, 64, 12, 192
TABBY, COLLIE = 281, 232
EDGE = "a8.h1->m10"


@dataclass(frozen=True)
class Case:
    """The model, timm's module that the library has never seen, and two photographs."""

    model: cv.Model
    original: Original
    module: Any
    clean: Tensor
    corrupt: Tensor


@pytest.fixture(scope="module")
def case(shared_data: Path) -> Case:
    weights = shared_data / "weights" / f"{NAME}.safetensors"
    model = cv.load(NAME, checkpoint=weights)
    module = import_timm().create_model(NAME, checkpoint_path=weights).eval().requires_grad_(False)
    senders, receivers = packed_blocks(module.blocks, HEADS, WIDTH)
    nodes = HookedModule(module, senders, {**receivers, "logits": Receiver(module.norm, module.norm)})
    neurons = {f"m{layer}": (block.mlp.fc2, None) for layer, block in enumerate(module.blocks)}
    heads = [[f"a{layer}.h{head}" for head in range(HEADS)] for layer in range(LAYERS)]
    photos = [shared_data / "images" / "catdog" / f"prisma_crop_{name}" for name in ("dog.jpeg", "cat.png")]
    clean, corrupt = (load_image(photo, model.preprocessing)[None] for photo in photos)
    return Case(model, Original(nodes, module.blocks, neurons, heads), module, clean, corrupt)


def assert_near(found: Tensor, expected: Tensor, relative: float) -> None:
    """Equal but for so much of the largest value."""
    kept = expected.isfinite()
    assert torch.equal(found.isfinite(), kept)
    difference, size = (found - expected)[kept].abs().max(), expected[kept].abs().max()
    assert float(difference) <= relative * float(size), f"{float(difference):.3g} of {float(size):.3g}"


def test_every_site_is_what_hooks_see(case: Case) -> None:
    expected, names = case.original.values(case.clean), case.model.sites().names
    found = case.model.activations(case.clean, names, progress=False)
    assert set(names) == set(expected)
    assert len(names) == 1 + 36 * 7 + 12 * 2 + 12 * 2 + 2
    for name in names:
        assert_near(found[name], expected[name], 1e-5)


CLS = torch.arange(197) == 0
TO_CLS = CLS[:, None] & ~CLS
DIRECTION = torch.randn(D, generator=torch.Generator().manual_seed(0))
WIDE = torch.randn(197, WIDTH, generator=torch.Generator().manual_seed(1))


def at_cls(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return among(CLS[:, None], change)


EDITS: dict[str, tuple[dict[str, Any], Changes]] = {
    "a number": ({"m6": 0}, {"m6": lambda x: 0 * x}),
    "a tensor": ({"a3.h1<v>": WIDE}, {"a3.h1<v>": lambda x: WIDE.expand_as(x)}),
    "a function of neurons": (
        {"m2.hidden": lambda x, at: x.clamp(max=1)},
        {"m2.hidden": lambda x: x.clamp(max=1)},
    ),
    "what a head writes, at a token": ({"a9.h2@cls": 0.1}, {"a9.h2": at_cls(lambda x: 0 * x + 0.1)}),
    "z of a head, halved": (
        {"a5.h0.z@patch": lambda x: x / 2},
        {"a5.h0.z": among(~CLS[:, None], lambda x: x / 2)},
    ),
    "scores": ({"a7.h1.scores": lambda x: 2 * x}, {"a7.h1.scores": lambda x: 2 * x}),
    "attention knocked out": (
        {"a1*.pattern@patch->cls": cv.knock_out()},
        {f"a{layer}.h{head}.pattern": without(TO_CLS) for layer in (1, 10, 11) for head in range(HEADS)},
    ),
    "steering": ({"resid6": cv.add(DIRECTION, 2.0, "cls")}, {"resid6": at_cls(lambda x: x + 2 * DIRECTION)}),
    "a clamp of the stream": (
        {"resid8": cv.clamp(DIRECTION, -0.5, 0.1)},
        {"resid8": along(DIRECTION, -0.5, 0.1)},
    ),
    "the stream between": ({"mid4@0": lambda x: 1.2 * x}, {"mid4": at_cls(lambda x: 1.2 * x)}),
    "several at once": (
        {"a11.h0": 0, "m3.hidden@patch": 0, "resid9": cv.add(DIRECTION), "a4.h2.pattern@patch->cls": 0},
        {
            "a11.h0": lambda x: 0 * x,
            "m3.hidden": among(~CLS[:, None], lambda x: 0 * x),
            "resid9": lambda x: x + DIRECTION,
            "a4.h2.pattern": among(TO_CLS, lambda x: 0 * x),
        },
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_those_of_hooks(case: Case, name: str) -> None:
    """Through the model itself, a full and an almost full circuit, and the lens."""
    table, changes = EDITS[name]
    edited, nodes = case.model.edit(table), case.original.edited(changes)
    with torch.no_grad():
        expected = nodes.run(case.clean)
        seen = _lens(case, changes)
    assert_near(edited(case.clean), expected, 1e-4)
    task = cv.Task(case.clean, case.corrupt, cv.logit_diff(TABBY, COLLIE))
    assert_near(cv.run(edited, task, cv.Circuit.full(edited.graph)), expected, 1e-4)
    lens = cv.logit_lens(edited, case.clean, classes=[TABBY, COLLIE])
    assert_near(torch.as_tensor(lens.logits[:, 0]), seen, 1e-4)
    assert_near(torch.as_tensor(lens.pooled[-1]), expected[:, [TABBY, COLLIE]], 1e-4)
    if edited.graph.edges == case.model.graph.edges:
        rest = cv.Circuit.from_edges(edited.graph, set(edited.graph.edges) - {EDGE})
        ablated = nodes.ablated(case.clean, case.corrupt, EDGE)
        assert_near(cv.run(edited, task, rest), ablated, 1e-4)
        assert float((ablated - expected).abs().max()) > 1e-3


def _lens(case: Case, changes: Changes) -> Tensor:
    """Each token's logits of two classes `(position, token, class)`, from the streams that hooks see."""
    streams: list[Tensor] = []

    def noted(name: str) -> Callable[[Tensor], Tensor]:
        def change(stream: Tensor) -> Tensor:
            streams.append(changes[name](stream) if name in changes else stream)
            return streams[-1]

        return change

    names = [f"resid{layer}" for layer in range(LAYERS + 1)]
    case.original.edited({**changes, **{name: noted(name) for name in names}}).run(case.clean)
    logits: Tensor = case.module.head(case.module.norm(torch.cat(streams)))
    return logits[..., [TABBY, COLLIE]]
