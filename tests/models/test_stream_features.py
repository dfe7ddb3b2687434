"""The stream cut into features: every edge against torch's hooks on the original module, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.engine import Evaluator, Replay, batch_runs, masked_run, new_workspace, soft_run
from circuitvit.errors import NameNotFoundError, OptionError, UnsupportedModelError
from circuitvit.models import Dictionary
from circuitvit.models.refined import refined
from circuitvit.tasks import prepare
from circuitvit.verification.missed import about_missed, missed_by_dictionaries
from tests.families import FAMILIES, made
from tests.reference.hooked import HookedModule, Receiver, Sender, gives
from tests.reference.sites import Original
from tests.rightness import METRIC, drawn_circuit, formula, prove
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
        ("timm", ("resid1", "mid1"), 10),
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
        told = soft_run(run.sources, torch.from_numpy(circuit.kept.copy()).double())
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


def test_the_mean_of_a_feature_is_that_of_its_activation() -> None:
    """Under mean ablation an edge carries the mean activation times the direction."""
    (fine, nodes), images = cut("timm", ("resid1",)), FAMILIES["timm"].images()
    task = cv.Task(images, metric=METRIC, ablation=cv.Mean(per_token=False))
    (run,) = batch_runs(task.prepare(fine), 2)
    found = run.sources.reference_outputs()[fine.graph.sender_index["resid1.f2"]]
    active = (
        nodes.written(images, "resid1.f2") @ dictionary().decoder[2] / dictionary().decoder[2].square().sum()
    )
    assert_close(found, (active.mean() * dictionary().decoder[2]).expand(found.shape))


def with_errors(kept: bool) -> cv.Model:
    """The stream and an MLP cut into features, whose errors are nodes, or kept."""
    model, _ = made("timm")
    error = "kept" if kept else "node"
    table = {"resid1": dictionary(), "m1": dictionary(1)}
    return refined(model, {name: cv.features(own, CHOSEN, error=error) for name, own in table.items()})


def test_errors_that_are_kept_are_in_every_run() -> None:
    """Runs, replays, soft masks and liveness are those of errors that are nodes, with all of their edges."""
    node, kept = with_errors(False), with_errors(True)
    ours = {edge for edge in node.graph.edges if ".error" in edge}
    assert {*kept.graph.edges} == {*node.graph.edges} - ours
    task = cv.Task(FAMILIES["timm"].images(), FAMILIES["timm"].images(seed=1), METRIC)
    for seed, density in enumerate((0.0, 0.5)):
        circuit = drawn_circuit(kept.graph, density, seed)
        whole = cv.Circuit.from_edges(node.graph, {*circuit, *ours})
        assert_close(cv.run(kept, task, circuit), cv.run(node, task, whole))
        assert {*circuit.pruned()} == {*whole.pruned()} - ours
        (run,) = batch_runs(task.prepare(kept), 2)
        soft = soft_run(run.sources, torch.from_numpy(circuit.kept.copy()).double())
        assert_close(soft, cv.run(kept, task, circuit))
    scores, others = (cv.attribute(each, task, "exact").to_dict() for each in (kept, node))
    assert max(abs(scores[edge] - others[edge]) for edge in scores) < 1e-9
    receiver, room = kept.graph.receiver_index["m1.f2"], new_workspace(run.sources)
    expected = masked_run(run.sources, circuit.kept, workspace=room)
    upstream = kept.graph.upstream[kept.graph.receiver_stages[receiver]]
    replayed = Replay(run.sources, circuit.kept, receiver, room)(circuit.kept[upstream, receiver, None])
    assert_close(replayed[0], expected)
    assert cv.Graph.from_dict(kept.graph.to_dict()) == kept.graph


def test_reports_say_what_dictionaries_miss() -> None:
    """The share of the effect is that of hooks which exchange what is missed; of the variance, by formula."""
    model, original = made("timm")
    own, images, other = dictionary(), FAMILIES["timm"].images(), FAMILIES["timm"].images(seed=1)
    for kept in (False, True):
        fine = with_errors(kept)
        task = cv.Task(images, other, METRIC)
        stream, error = missed_by_dictionaries(Evaluator(task.prepare(fine)))
        nodes = with_features(original, {"resid1": own})
        moved = nodes.written(other, "resid1.error") - nodes.written(images, "resid1.error")
        runs = [original.edited({"resid1": partial(torch.add, moved)}).run(images).detach(), model(other)]
        lost, all_of_it = (float((formula(model(images)) - formula(run)).sum()) for run in runs)
        assert stream.node == "resid1.error"
        assert stream.kept == error.kept == kept
        assert stream.effect == pytest.approx(lost / all_of_it, rel=1e-6)
        missed = nodes.written(images, "resid1.error").detach()
        x = model.activations(images, ["resid1"])["resid1"].double()
        expected = missed.square().sum() / (x - x.mean(dim=(0, 1))).square().sum()
        assert stream.variance == pytest.approx(float(expected), rel=1e-3)
        report = cv.verify(fine, task, cv.Circuit.full(fine.graph), n_random=0)
        assert any("resid1.error carries" in said for said in report.warnings)
        assert any("kept in every run" in said for said in report.warnings) == kept


@pytest.mark.parametrize("name", ["m1", "resid1", "a1.h0"])
def test_a_frozen_error_is_in_every_run_what_it_was_on_the_base_images(name: str) -> None:
    model, _ = made("timm")
    images, other = FAMILIES["timm"].images(), FAMILIES["timm"].images(seed=3)
    task = cv.Task(images, other, METRIC)
    own = cv.features(dictionary(width=12 if name[0] == "a" else 24), [1], error="frozen")
    fine = cv.refine_nodes(model, {name: own}, task=task)
    torch.testing.assert_close(fine(images), model(images), rtol=0, atol=1e-6)  # errors are read in float32
    assert float((fine(other) - model(other)).abs().max()) > 1e-3
    plain = cv.refine_nodes(model, {name: replace(own, error="node")})
    missed = plain.activations(images, f"{name}.error")[f"{name}.error"]
    ablated = plain.activations(other, f"{name}.f1")[f"{name}.f1"]
    expected = plain.edit({f"{name}.error": missed, f"{name}.f1": ablated})(images)
    torch.testing.assert_close(cv.run(fine, task, lacking(fine, f"{name}.f1")), expected, rtol=0, atol=1e-6)
    scores = cv.attribute(fine, task, "exact", progress=False).to_dict()
    assert max(abs(score) for edge, score in scores.items() if f"{name}.error->" in edge) < 1e-9
    assert any("is the same in every run" in said for said in about_missed(Evaluator(prepare(fine, task))))
    for unlike in (cv.Task(other, images, METRIC), cv.Task(images.flip(0), other, METRIC)):
        with pytest.raises(OptionError, match=rf"{name}.error of .* is frozen at what it was on other base"):
            prepare(fine.edit({"m0": 0}), unlike)


def lacking(model: cv.Model, node: str) -> cv.Circuit:
    """All edges but those out of a node."""
    kept = [edge for edge in model.graph.edges if not edge.startswith(f"{node}->")]
    return cv.Circuit.from_edges(model.graph, kept)


def test_a_frozen_error_is_that_of_a_hook() -> None:
    """A feature of the last MLP ablated: the dictionary is applied to what comes, and the error is not."""
    model, _ = made("timm")
    images, other, own = FAMILIES["timm"].images(), FAMILIES["timm"].images(seed=3), dictionary()
    task = cv.Task(images, other, METRIC)
    fine = cv.refine_nodes(model, {"m0": cv.features(own, [7], error="frozen")}, task=task)
    module: Any = copy.deepcopy(model.module)
    seen: list[Tensor] = []

    def features(written: Tensor) -> Tensor:
        return torch.relu(written @ own.encoder.T + own.offset)

    def note(_: Any, __: Any, written: Tensor) -> None:
        seen.append(written)

    def exchange(_: Any, __: Any, written: Tensor) -> Tensor:
        clean, corrupt = seen
        units = features(written)
        units[..., 7] = features(corrupt)[..., 7]
        return units @ own.decoder + own.bias + clean - features(clean) @ own.decoder - own.bias

    with torch.no_grad():
        noting = module.blocks[0].mlp.register_forward_hook(note)
        module(images), module(other)
        noting.remove()
        module.blocks[0].mlp.register_forward_hook(exchange)
        expected = module(images)
    found = cv.run(fine, task, lacking(fine, "m0.f7"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert float((found - model(images)).abs().max()) > 1e-3


def test_errors_are_frozen_on_the_images_of_a_task() -> None:
    frozen = cv.features(dictionary(), [1], error="frozen")
    with pytest.raises(OptionError, match=r"m1.error is frozen on which images\? Give the task"):
        cv.refine_nodes(made("timm")[0], {"m1": frozen})
    with pytest.raises(OptionError, match="str is no task"):
        cv.refine_nodes(made("timm")[0], {"m1": frozen}, task="cats")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"frozen on the images of a task: cv\.refine_nodes"):
        refined(made("timm")[0], {"m1": frozen})
    with pytest.raises(OptionError, match="'node', 'kept' or 'frozen', not 'lost'"):
        cv.features(dictionary(), [1], error="lost")


def test_kept_errors_are_refused_where_they_mean_nothing() -> None:
    """In a corrupt run that is restored, and of a head, whose inputs are searched."""
    images = FAMILIES["timm"].images()
    with pytest.raises(OptionError, match="give the task direction='noising'"):
        cv.Task(images, images, METRIC, direction="denoising").prepare(with_errors(True))
    with pytest.raises(OptionError, match="leave it a node"):
        refined(made("timm")[0], {"a1.h0": cv.features(dictionary(width=12), [1], error="kept")})


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
