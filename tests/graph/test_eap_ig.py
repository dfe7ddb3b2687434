"""The JSON layout of EAP-IG and MIB."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.errors import FileError, OptionError
from circuitvit.graph import Circuit, EdgeScores
from circuitvit.graph.eap_ig import transformer_graph
from tests.graph.strategies import scored

SAMPLE = {
    "cfg": {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 8},
    "nodes": {
        "input": {"in_graph": True},
        "a0.h0": {"in_graph": False},
        "m0": {"in_graph": True},
        "logits": {"in_graph": True},
    },
    "edges": {
        "input->a0.h0<q>": {"score": 0.0, "in_graph": False},
        "input->a0.h0<k>": {"score": 0.25, "in_graph": False},
        "input->a0.h0<v>": {"score": 0.0, "in_graph": False},
        "input->m0": {"score": -1.5, "in_graph": True},
        "input->logits": {"score": 0.0, "in_graph": False},
        "a0.h0->m0": {"score": 0.0, "in_graph": False},
        "a0.h0->logits": {"score": 0.0, "in_graph": False},
        "m0->logits": {"score": 2.0, "in_graph": True},
    },
}
"""What `Graph.to_json` of EAP-IG writes for a model of one block with one head, written down by hand."""


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def by_hand() -> Circuit:
    graph = transformer_graph(1, 1, d_model=8)
    values = np.zeros(graph.shape)
    for name, score in {"input->a0.h0<k>": 0.25, "input->m0": -1.5, "m0->logits": 2.0}.items():
        values[graph.edge_index(name)] = score
    return Circuit.from_edges(graph, ["input->m0", "m0->logits"]).with_scores(EdgeScores(graph, values))


def test_it_is_written_as_the_other_tools_write_it(tmp_path: Path) -> None:
    path = by_hand().save(tmp_path / "circuit.json", layout="eap-ig")
    assert json.loads(path.read_text()) == SAMPLE


def test_what_the_other_tools_write_is_read(tmp_path: Path) -> None:
    circuit = Circuit.load(write(tmp_path / "circuit.json", SAMPLE))
    assert circuit == by_hand()
    assert circuit.score_of("input->a0.h0<k>") == 0.25
    assert circuit.graph.d_model == 8


def test_the_short_forms_of_mib_are_read(tmp_path: Path) -> None:
    """Scores may be left out, edges outside the circuit too, and an edge may be a plain truth value."""
    short = {
        "cfg": {"n_layers": 1, "n_heads": 1},
        "edges": {"input->m0": {"in_graph": True}, "m0->logits": True},
    }
    assert Circuit.load(write(tmp_path / "circuit.json", short)) == by_hand()


@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.data())
def test_circuits_of_every_plain_transformer_survive_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, n_layers: int, n_heads: int, parallel: bool, data: st.DataObject
) -> None:
    graph = transformer_graph(n_layers, n_heads, d_model=16, parallel=parallel)
    seed = data.draw(st.integers(0, 2**32 - 1))
    scores = EdgeScores(graph, np.random.default_rng(seed).standard_normal(graph.shape))
    circuit = scores.top(data.draw(st.integers(0, graph.n_edges)))
    path = circuit.save(tmp_path_factory.mktemp("round") / "circuit.json", layout="eap-ig")
    again = Circuit.load(path, graph)
    assert again == circuit
    assert again.values is not None
    assert np.array_equal(again.values[graph.edge_mask], scores.values[graph.edge_mask])


def test_inputs_of_a_layer_stand_in_the_order_of_the_other_tools_tensors() -> None:
    graph = transformer_graph(1, 2)
    assert graph.receivers[:6] == tuple(f"a0.h{head}<{port}>" for port, head in product("qkv", range(2)))


@given(scored())
def test_other_graphs_cannot_be_said_in_this_layout(
    tmp_path_factory: pytest.TempPathFactory, scores: EdgeScores
) -> None:
    with pytest.raises(OptionError, match="plain transformers with one token group"):
        scores.top(1).save(tmp_path_factory.mktemp("odd") / "x.json", layout="eap-ig")


def test_token_groups_cannot_be_said_in_this_layout(tmp_path: Path) -> None:
    circuit = Circuit.empty(transformer_graph(1, 1).with_groups(("cls", "patch")))
    with pytest.raises(OptionError, match="one token group"):
        circuit.save(tmp_path / "x.json", layout="eap-ig")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no sizes": ({"cfg": {}}, "integer n_layers"),
    "sizes that are no numbers": ({"cfg": {"n_layers": "1", "n_heads": 1}}, "integer n_layers"),
    "sizes that are true": ({"cfg": {"n_layers": True, "n_heads": 1}}, "integer n_layers"),
    "a configuration that is a list": ({"cfg": []}, "integer n_layers"),
    "no layer": ({"cfg": {"n_layers": 0, "n_heads": 1}}, "no model we know"),
    "negative heads": ({"cfg": {"n_layers": 1, "n_heads": -3}}, "no model we know"),
    "layers past all memory": ({"cfg": {"n_layers": 250_000, "n_heads": 1}}, "no model we know"),
    "heads past all memory": ({"cfg": {"n_layers": 1, "n_heads": 10**30}}, "no model we know"),
    "no edges": ({"edges": None}, "needs an object 'edges'"),
    "an unknown edge": ({"edges": {"input->m7": {"in_graph": True}}}, "unknown receiver 'm7'"),
    "what is no edge": ({"edges": {"m0": {"in_graph": True}}}, "is not an edge"),
    "membership that is a number": (
        {"edges": {"input->m0": {"in_graph": 1}}},
        "expected in_graph true or false",
    ),
    "a score that is text": ({"edges": {"input->m0": {"in_graph": True, "score": "1"}}}, "a number as score"),
    "a score that is true": (
        {"edges": {"input->m0": {"in_graph": True, "score": True}}},
        "a number as score",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_a_malformed_file_is_refused_and_the_fault_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "bad.json", {**SAMPLE, **change})
    with pytest.raises(FileError) as caught:
        Circuit.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_of_a_smaller_model_is_not_taken_for_the_larger_one(tmp_path: Path) -> None:
    """All of its edges exist there too, so only the sizes tell the two apart."""
    with pytest.raises(FileError, match="another graph"):
        Circuit.load(write(tmp_path / "circuit.json", SAMPLE), transformer_graph(2, 1))
