"""Wherever a circuit is asked for, whatever means one is taken: itself, a result, edge names, a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import Evaluator
from circuitvit.errors import FileError, NameNotFoundError, OptionError
from circuitvit.graph import Circuit, Graph, as_circuit
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.groundtruth import separation
from circuitvit.pruning.refine import Refinement
from circuitvit.testing import assert_faithful, assert_minimal, assert_necessary, assert_unchanged
from circuitvit.verification import connected_circuits, select_edges, stage_profile

EDGES = ["input->m3", "m3->logits", "input->logits"]


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.load("catdog-tiny")


@pytest.fixture(scope="module")
def task(model: cv.Model) -> Any:
    return cv.Task(*catdog_pairs(6), metric=cv.logit_diff("cat", "dog")).prepare(model)


@pytest.fixture(scope="module")
def circuit(model: cv.Model) -> Circuit:
    return Circuit.from_edges(model.graph, EDGES)


@pytest.fixture(params=["a result", "edge names", "a path", "the text of a path"])
def given(request: pytest.FixtureRequest, circuit: Circuit, tmp_path: Path) -> Any:
    match request.param:
        case "a result":
            return Refinement(circuit, faithfulness=1.0, minimal=True, runs=0)
        case "edge names":
            return list(circuit)
        case "a path":
            return circuit.save(tmp_path / "circuit.json")
        case _:
            return str(circuit.save(tmp_path / "circuit.json"))


AUDIT = cv.AuditSettings(n_random=5, n_others=5, n_paths=0)
USES: dict[str, Callable[[cv.Model, Any, Any], Any]] = {
    "run": lambda model, task, circuit: cv.run(model, task, circuit).tolist(),
    "ablate": lambda model, task, circuit: cv.run(model, task, ablate=circuit).tolist(),
    "evaluator": lambda model, task, circuit: Evaluator(task).faithfulness(circuit),
    "verify": lambda model, task, circuit: replace(
        cv.verify(model, task, circuit, n_random=2, progress=False), circuit_provenance=None
    ),
    "audit": lambda model, task, circuit: cv.audit(
        model, task, circuit, settings=AUDIT, progress=False
    ),
    "robustness": lambda model, task, circuit: cv.robustness(model, task, circuit, perturb=False),
    "refine": lambda model, task, circuit: list(
        cv.refine(model, task, circuit, max_runs=2, progress=False).circuit
    ),
    "constants": lambda model, task, circuit: cv.learn_constants(
        model, cv.Task(task.clean.take(0, 2), task.corrupt.take(0, 2)), circuit, steps=1, progress=False
    ).values.tolist(),
    "curve": lambda model, task, circuit: cv.circuit_curve(
        model, task, [circuit], "one", fractions=(0.1, 1), progress=False
    ).points,
    "separation": lambda model, task, circuit: separation(
        cv.attribute(model, task, "eap", progress=False), circuit
    ),
    "assert_faithful": lambda model, task, circuit: assert_faithful(
        model, task, circuit, at_least=-9, at_most=9
    ),
    "assert_necessary": lambda model, task, circuit: assert_necessary(model, task, circuit, at_least=-9),
    "assert_minimal": lambda model, task, circuit: assert_minimal(model, task, circuit, least=0),
    "a claim": lambda model, task, circuit: str(
        cv.Hypothesis("they matter", circuit, cv.Falls(by=0.1)).test(model, task)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected(model: cv.Model, task: Any, circuit: Circuit) -> Callable[[str], Any]:
    """What a use makes of the circuit itself."""
    return cache(lambda use: USES[use](model, task, circuit))


@pytest.mark.parametrize("use", USES)
def test_it_is_taken(
    use: str, model: cv.Model, task: Any, given: Any, expected: Callable[[str], Any]
) -> None:
    if use == "a claim" and isinstance(given, str):
        given = Path(given)  # text is a pattern there
    assert USES[use](model, task, given) == expected(use)


def test_drawings_take_results_and_files(circuit: Circuit, tmp_path: Path) -> None:
    saved = circuit.save(tmp_path / "circuit.json")
    drawn = cv.export.draw(circuit, tmp_path / "one.svg").read_text()
    assert cv.export.draw(Refinement(circuit, 1.0, True, 0), tmp_path / "two.svg").read_text() == drawn
    assert cv.export.draw(saved, tmp_path / "three.svg").read_text() == drawn
    both = [
        cv.export.draw_difference(one, other, tmp_path / f"{place}.svg").read_text()
        for place, (one, other) in enumerate([(circuit, circuit), (saved, EDGES)])
    ]
    assert both[0] == both[1]


def test_what_needs_no_model_takes_results_and_files(circuit: Circuit, tmp_path: Path) -> None:
    saved = circuit.save(tmp_path / "circuit.json")
    assert connected_circuits(saved, 2) == connected_circuits(circuit, 2)
    assert np.array_equal(stage_profile(saved), stage_profile(circuit))
    assert assert_unchanged(saved, EDGES) == 1.0
    assert select_edges(circuit.graph, [saved, "m2"]) == circuit | select_edges(circuit.graph, "m2")


# -- what does not mean a circuit of this graph ----------------------------------------------------


@pytest.mark.parametrize("wrong", [3, None, [1, 2], {"circuit": 3}.values()])
def test_other_things_are_no_circuit(wrong: Any) -> None:
    with pytest.raises(OptionError, match="is no circuit: give a Circuit, what a search found"):
        as_circuit(wrong, transformer_graph(1, 1))


def test_a_name_that_is_no_edge_gets_the_nearest() -> None:
    with pytest.raises(NameNotFoundError, match="unknown receiver 'm7'"):
        as_circuit(["input->m7"], transformer_graph(3, 1))


def test_names_alone_say_nothing_of_the_graph() -> None:
    with pytest.raises(OptionError, match="need a graph to belong to"):
        as_circuit(["input->m0"])


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileError, match=r"cannot read nothing\.json"):
        as_circuit("nothing.json", transformer_graph(1, 1))


def other_graphs() -> dict[str, tuple[Graph, str]]:
    graph = transformer_graph(2, 2)
    renamed = replace(graph.stages[2], senders=("x0",), feeds=((0,),))
    kinds = replace(graph.stages[1], kind="gated attention")
    return {
        "a sender": (Graph((*graph.stages[:2], renamed, *graph.stages[3:])),
                     "its stage 'mlp0' differs in its senders: 'x0', not 'm0'"),
        "a kind": (Graph((graph.stages[0], kinds, *graph.stages[2:])),
                   "its stage 'attn0' differs in its kind: 'gated attention', not 'attention'"),
        "heads": (transformer_graph(2, 3), "its stage 'attn0' has 3 senders, not 2"),
        "layers": (transformer_graph(3, 2), "its stage 'attn2' differs in its name: 'attn2', not 'readout'"),
        "groups": (graph.with_groups(("cls", "patch")), "its token groups are cls, patch, not all"),
    }  # fmt: skip


@pytest.mark.parametrize("name", other_graphs())
def test_the_first_difference_of_two_graphs_is_named(name: str) -> None:
    """Graphs that differ in a name print alike: 5 senders, 15 receivers, 56 edges."""
    other, said = other_graphs()[name]
    with pytest.raises(OptionError, match=said):
        as_circuit(Circuit.full(other), transformer_graph(2, 2))
