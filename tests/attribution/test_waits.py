"""No method waits for the device in a loop: a GPU's queue runs dry at most once for each batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import circuitvit as cv
from circuitvit.models.parts import Norm
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks import PreparedTask

FETCHES = {Tensor.cpu, Tensor.numpy, Tensor.tolist}
"""Calls that fetch a tensor; on the CPU they do nothing that the dispatcher sees."""

WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")
"""Operations whose result must be known on the host: `item`, `bool`, `float`, places of what is True."""


class Waits(TorchDispatchMode):
    """Counts what would stop the queue of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put_") and any(
            each is not None and each.dtype == torch.bool for each in args[1]
        )
        self.count[name] += name.startswith(WAITS) or masks
        return func(*args, **(kwargs or {}))


class Fetches(TorchFunctionMode):
    """Counts the tensors that are fetched by name."""

    def __init__(self, count: Counter[str]) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FETCHES and not isinstance(args[0], torch.nn.Parameter):
            self.count[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def waits(work: Callable[[], object]) -> Counter[str]:
    with Waits() as found, Fetches(found.count):
        work()
    return +found.count


def prepared(heads: int, pairs: int = 16) -> PreparedTask:
    torch.manual_seed(0)
    vit = import_timm().models.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=heads, num_classes=3
    )
    model = cv.wrap(vit.eval())
    clean, corrupt = torch.randn(2, pairs, *model.preprocessing.shape)
    assert model.weights_hash  # read once, as for every result
    return cv.Task(clean, corrupt, metric=cv.logit_diff(0, 1)).prepare(model)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm looks at values on the CPU, where that costs nothing, to save itself a pass."""
    monkeypatch.setattr(Norm, "inverse", lambda norm, stream: norm.standardise(stream)[1])


@pytest.mark.parametrize("method", ["eap", "eap-ig", "ceap", "local", "exact", "ifr", "atp-qk"])
def test_waiting_does_not_grow_with_heads_and_edges(method: str) -> None:
    few, many = prepared(heads=1), prepared(heads=4)
    assert many.graph.n_edges > 4 * few.graph.n_edges
    counts = [
        waits(lambda task=task: cv.attribute(task.model, task, method, batch_size=16, progress=False))
        for task in (few, many)
    ]
    assert counts[0] == counts[1]
    assert counts[0]  # what waits at all is seen: the scores themselves are fetched


@pytest.mark.parametrize("method", ["exact", "atp"])
def test_nor_for_scores_of_nodes(method: str) -> None:
    counts = [
        waits(lambda task=task: cv.attribute_nodes(task.model, task, method, batch_size=16, progress=False))
        for task in (prepared(heads=1), prepared(heads=4))
    ]
    assert counts[0] == counts[1]


def test_nor_with_steps() -> None:
    task = prepared(heads=2)
    counts = [
        waits(lambda steps=steps: cv.attribute(task.model, task, "eap-ig", steps=steps, progress=False))
        for steps in (2, 5)
    ]
    assert counts[0] == counts[1]


def test_nor_with_the_edges_of_a_masked_run() -> None:
    task = prepared(heads=4)
    scores = cv.attribute(task.model, task, "eap", progress=False)
    evaluator = cv.engine.Evaluator(task)
    evaluator.check_effect(level=0)
    counts = [waits(lambda k=k: evaluator.values(scores.top(k))) for k in (6, 60)]
    assert counts[0] == counts[1]
