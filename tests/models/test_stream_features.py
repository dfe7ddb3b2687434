"""The stream cut into features: every edge against torch's hooks on the original module, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.engine import batch_runs, soft_run
from circuitvit.errors import NameNotFoundError, OptionError, UnsupportedModelError
from circuitvit.models import Dictionary
from circuitvit.models.refined import refined
from tests.families import FAMILIES, made
from tests.reference.hooked import HookedModule, Receiver, Sender, gives
from tests.reference.sites import Original
from tests.rightness import METRIC, drawn_circuit, prove
from tests.strategies import assert_close

CHOSEN = [2, 7]


def dictionary(seed: int = 0, width: int = 24, features: int = 40) -> Dictionary:
    """A random one, of which about half of the features are active."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (features, width), (features,), (features, width), (width,)
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return Dictionary(drawn[0] / width**0.5, drawn[1], drawn[2] / features**0.5, drawn[3], "relu")


class Piece(nn.Module):
    """Something that is computed from the stream, where a hook sees what it reads and what it gives."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.seen, self.made = nn.Identity(), Made(made)

    def forward(self, stream: Tensor) -> Tensor:
        written: Tensor = self.made(self.seen(stream))
        return written


class Made(nn.Module):
    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = made

    def forward(self, stream: Tensor) -> Tensor:
        written: Tensor = self.function(stream)
        return written


def with_features(original: Original, tables: dict[str, Dictionary]) -> HookedModule:
    """The module with streams taken apart by the formulas of a dictionary, and put together again."""
    pieces: dict[str, Piece] = {}
    for stream, own in tables.items():

        def features(x: Tensor, own: Dictionary = own) -> Tensor:
            return torch.relu(x @ own.encoder.T + own.offset)

        def unit(x: Tensor, number: int, own: Dictionary = own) -> Tensor:
            return torch.relu(x @ own.encoder[number] + own.offset[number])[..., None] * own.decoder[number]

        def rest(x: Tensor, own: Dictionary = own) -> Tensor:
            others = [number for number in range(len(own.encoder)) if number not in CHOSEN]
            return features(x, own)[..., others] @ own.decoder[others] + own.bias

        def error(x: Tensor, own: Dictionary = own) -> Tensor:
            return x - features(x, own) @ own.decoder - own.bias

        for number in CHOSEN:
            pieces[f"{stream}.f{number}"] = Piece(partial(unit, number=number))
        pieces |= {f"{stream}.rest": Piece(rest), f"{stream}.error": Piece(error)}

    def whole(stream: str) -> Callable[[Tensor], Tensor]:
        mine = [piece for name, piece in pieces.items() if name.startswith(f"{stream}.")]
        return lambda x: torch.stack([piece(x) for piece in mine]).sum(dim=0)

    nodes = original.edited({stream: whole(stream) for stream in tables})
    senders = {name: Sender(piece, gives) for name, piece in pieces.items()}
    receivers = {name: Receiver(piece.seen, piece.made) for name, piece in pieces.items()}
    return HookedModule(nodes.run, {**nodes.senders, **senders}, {**nodes.receivers, **receivers})


def of_each_kind(graph: cv.Graph, count: int) -> list[str]:
    """Edges into and out of features, what is left, and what is missed, at even distances."""
    found = []
    for kind in ("f2", "rest", "error"):
        for place in (0, 1):
            ends = [edge for edge in graph.edges if edge.split("->")[place].endswith(f".{kind}")]
            found += ends[:: max(1, len(ends) // count)][:count]
    return found


def cut(family: str, streams: tuple[str, ...]) -> tuple[cv.Model, HookedModule]:
    model, original = made(family)
    tables = {stream: dictionary(number, model.d_model) for number, stream in enumerate(streams)}
    fine = refined(model, {stream: cv.features(own, CHOSEN) for stream, own in tables.items()})
    return fine, with_features(original, tables)


@pytest.mark.parametrize(
    ("family", "streams", "count"),
    [
        ("timm", ("mid1",), 10),
        ("timm, parallel", ("resid1",), 1),
        ("timm, pool beside a class token", ("resid2",), 1),
        ("transformers, timesformer", ("resid1",), 1),
    ],
)
def test_edges_into_and_out_of_features_are_those_of_hooks(
    family: str, streams: tuple[str, ...], count: int
) -> None:
    """Effects and slopes, and all stages' fast gradients and answers."""
    fine, nodes = cut(family, streams)
    clean, corrupt = FAMILIES[family].images(), FAMILIES[family].images(seed=1)
    prove(fine, nodes, clean, corrupt, of_each_kind(fine.graph, count))


def test_nothing_passes_a_dictionary_by() -> None:
    """What comes after it hears of what comes before it through its nodes alone, at the image's tokens."""
    fine, _ = cut("timm, pool beside a class token", ("resid1", "resid2"))
    first, second = ({f"resid{place}.{each}" for each in ("f2", "f7", "rest", "error")} for place in (1, 2))
    into = {
        name: {e.partition("->")[0] for e in fine.graph.edges if e.endswith(name)}
        for name in fine.graph.receivers
    }
    assert first == into["a1.h0<q>"]
    assert into["resid2.f2"] == {*first, "a1.h0", "a1.h1", "m1"}
    assert into["pool.h0<k>"] == second
    assert fine.graph.with_groups(("cls", "patch")).groups == ("cls", "patch", "pool")
    assert [site for site in fine.sites("resid*").names if "." not in site] == ["resid0", "resid1", "resid2"]


def test_masked_runs_with_groups_are_those_of_soft_masks() -> None:
    """Dense and sparse circuits, where the stream is cut twice and only the class token is read."""
    fine, _ = cut("timm", ("resid1", "resid2"))
    task = cv.Task(FAMILIES["timm"].images(), FAMILIES["timm"].images(seed=1), METRIC, groups="kind")
    (run,) = batch_runs(task.prepare(fine), 2)
    for seed, density in enumerate((0.8, 0.3)):
        circuit = drawn_circuit(run.sources.graph, density, seed)
        told = soft_run(run.sources, torch.from_numpy(circuit.kept).double())
        assert_close(cv.run(fine, task, circuit), told)


def test_a_feature_is_edited_as_the_stream_is() -> None:
    """Its direction is taken out of the stream, in a model whose last stream is cut."""
    (model, _), own = made("timm"), dictionary()
    fine = refined(model, {"resid2": cv.features(own, CHOSEN)})
    images = FAMILIES["timm"].images()
    whole = model.edit(
        {"resid2": lambda x: x - torch.relu(x @ own.encoder[2] + own.offset[2])[..., None] * own.decoder[2]}
    )
    assert_close(fine.edit({"resid2.f2": 0.0})(images), whole(images))


@pytest.mark.parametrize(
    ("table", "error", "says"),
    [
        ({"resid1": cv.neurons([1])}, OptionError, "resid1 is the stream.*give a dictionary"),
        ({"resid9": cv.features(dictionary(), [1])}, NameNotFoundError, "resid9.*did you mean"),
        ({"resid1": cv.features(dictionary(width=20), [1])}, OptionError, "width 20, and resid1 has 24"),
        ({"pool.resid": cv.features(dictionary(), [1])}, UnsupportedModelError, "stream of a pool"),
    ],
)
def test_what_cannot_be_cut_is_refused(table: dict[str, Any], error: type[Exception], says: str) -> None:
    model, _ = made("timm, pool beside a class token")
    with pytest.raises(error, match=says):
        refined(model, table)
