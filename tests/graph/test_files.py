"""Circuits and scores as files: what is written is read back, and nothing else gets in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.errors import FileError, OptionError
from circuitvit.graph import Circuit, EdgeScores, Provenance
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.graph.files import read_json, write_bytes, write_json
from tests.graph.strategies import circuits, scored

GRAPH = transformer_graph(2, 2)
MADE = Provenance("toy", "ab12", "two pictures", "eap", {"k": 3, "nested": {"list": [1, None]}}, 7)


def example() -> Circuit:
    values = np.random.default_rng(0).standard_normal(GRAPH.shape)
    return EdgeScores(GRAPH, values, "random", provenance=MADE).connected(6)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return example().save(tmp_path / "circuit.json")


# -- what is written is read back ----------------------------------------------------------------


@given(scored(), st.integers(0, 8))
def test_a_circuit_survives_being_written(
    tmp_path_factory: pytest.TempPathFactory, scores: EdgeScores, k: int
) -> None:
    circuit = scores.top(min(k, len(scores)), prune=False).with_provenance(MADE)
    path = circuit.save(tmp_path_factory.mktemp("round") / "circuit.json")
    again = Circuit.load(path, circuit.graph)
    assert again == circuit
    assert again.provenance == circuit.provenance
    assert [again.score_of(name) for name in again] == [circuit.score_of(name) for name in circuit]
    assert again.graph.d_model == circuit.graph.d_model


@given(circuits())
def test_a_circuit_without_scores_stays_without(
    tmp_path_factory: pytest.TempPathFactory, circuit: Circuit
) -> None:
    again = Circuit.load(circuit.save(tmp_path_factory.mktemp("round") / "circuit.json"))
    assert again == circuit
    assert again.values is None


def test_the_same_circuit_gives_the_same_file(saved: Path, tmp_path: Path) -> None:
    assert example().save(tmp_path / "again.json").read_bytes() == saved.read_bytes()


def test_the_file_names_its_schema_and_edges_plainly(saved: Path) -> None:
    content = json.loads(saved.read_text())
    assert content["schema"] == "circuitvit.circuit/1"
    assert content["edges"] == list(example())
    assert content["provenance"]["model"] == "toy"


def test_numbers_of_numpy_among_the_settings_become_plain(tmp_path: Path) -> None:
    made = Provenance(parameters={"k": np.int64(3), "tau": np.float32(0.5), "sizes": np.arange(2)})
    again = Circuit.load(Circuit.empty(GRAPH).with_provenance(made).save(tmp_path / "x.json"))
    assert again.provenance.parameters == {"k": 3, "tau": 0.5, "sizes": [0, 1]}


def test_settings_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    made = Provenance(parameters={"model": object()})
    with pytest.raises(FileError, match="object is not a JSON value"):
        Circuit.empty(GRAPH).with_provenance(made).save(tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


# -- files that cannot be written ----------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no folder .*nowhere"):
        example().save(tmp_path / "nowhere" / "circuit.json")


def test_a_folder_in_the_place_of_the_file_is_an_error_and_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "circuit.json").mkdir()
    with pytest.raises(FileError, match="cannot write"):
        example().save(tmp_path / "circuit.json")
    assert [path.name for path in tmp_path.iterdir()] == ["circuit.json"]


def test_a_write_that_fails_leaves_the_old_file_as_it_was(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full_disk(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(FileError, match="No space left on device"):
        write_bytes(saved, b"new")
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_infinite_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="NaN or infinite"):
        write_json(tmp_path / "x.json", {"value": float("inf")})


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="'circuitvit' or 'eap-ig'"):
        example().save(tmp_path / "x.json", layout="acdc")


# -- files that are not what they should be ------------------------------------------------------

NOT_JSON = {
    "empty": b"",
    "cut off": b'{"schema": "circuitvit.circuit/1", "edges": ["inp',
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00",
    "not UTF-8": b'{"schema": "\xff\xfe"}',
    "NaN": b'{"score": NaN}',
    "infinity": b'{"score": -Infinity}',
    "a number too large for a float": b'{"score": 1e999}',
    "an integer too large for a float": b'{"score": 1' + b"0" * 400 + b"}",
    "nesting without end": b"[" * 100_000,
    "nested objects without end": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_a_file_that_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    for load in (Circuit.load, EdgeScores.load):
        with pytest.raises(FileError, match=r"bad\.json is not a JSON file"):
            load(path)


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_a_file_that_is_not_an_object_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(FileError, match="expected a JSON object"):
        Circuit.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read .*nothing\.json: No such file"):
        Circuit.load(tmp_path / "nothing.json")
    with pytest.raises(FileError, match="cannot read"):
        Circuit.load(tmp_path)


def test_a_file_too_large_to_be_ours_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(300 * 2**20)  # sparse: takes no room on the disk
    with pytest.raises(FileError, match="300 MiB is too large"):
        read_json(path)


Spoil = Callable[[dict[str, Any]], None]


def put(*keys: Any, value: Any) -> Spoil:
    """Set an entry deep in the file."""

    def spoil(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return spoil


def drop(key: str) -> Spoil:
    return lambda content: content.pop(key)


def twice(content: dict[str, Any]) -> None:
    content["edges"].append(content["edges"][0])


def many_nodes(content: dict[str, Any]) -> None:
    names = [f"n{index}" for index in range(20_000)]
    attention = content["graph"]["stages"][1]
    attention.update(senders=names, receivers=names, feeds=[[]] * 20_000, mixes=[True] * 20_000)


SPOILED: dict[str, tuple[Spoil, str]] = {
    "no schema": (drop("schema"), "names no schema"),
    "another version": (put("schema", value="circuitvit.circuit/2"), "the file says 'circuitvit.circuit/2'"),
    "a schema that is no text": (put("schema", value=[[[]]]), "names no schema"),
    "a file of scores": (put("schema", value="circuitvit.scores/1"), "reads 'circuitvit.circuit/1'"),
    "no edges": (drop("edges"), "'edges' is a required property"),
    "no graph": (drop("graph"), "'graph' is a required property"),
    "edges that are no texts": (put("edges", 0, value=3), "edges/0: '3' is not the name of an edge"),
    "an unknown edge": (put("edges", 0, value="input->m9"), "unknown receiver 'm9'"),
    "an edge that runs backwards": (put("edges", 0, value="m1->m0"), "unknown edge 'm1->m0'"),
    "an edge listed twice": (twice, "is listed 2 times"),
    "a score for an unknown edge": (put("scores", "input->m9", value=1.0), "unknown receiver 'm9'"),
    "a score that is no number": (put("scores", "input->m0", value="large"), "is not of type 'number'"),
    "a score that is true": (put("scores", "input->m0", value=True), "is not of type 'number'"),
    "stages that are no list": (put("graph", "stages", value={}), "is not of type 'array'"),
    "no stage": (put("graph", "stages", value=[]), "graph/stages"),
    "an unknown field of the graph": (put("graph", "code", value="x"), "'code' was unexpected"),
    "a stage without mixes": (put("graph", "stages", 1, "mixes", value=[]), "feeds and mixes need one entry"),
    "feeds past the last sender": (
        put("graph", "stages", 1, "feeds", 0, value=[9]),
        "points past the last sender",
    ),
    "feeds that are negative": (put("graph", "stages", 1, "feeds", 0, value=[-1]), "less than the minimum"),
    "a layer without end": (put("graph", "stages", 1, "layer", value=10**30), "greater than the maximum"),
    "two nodes of one name": (put("graph", "stages", 1, "senders", 0, value="input"), "are called 'input'"),
    "a node called markup": (
        put("graph", "stages", 1, "senders", 0, value="<script>"),
        "cannot name a sender",
    ),
    "no token group": (put("graph", "groups", value=[]), "graph/groups"),
    "more nodes than memory": (many_nodes, "no model we know"),
    "a seed that is text": (put("provenance", "seed", value="now"), "is not of type"),
    "settings that are a list": (put("provenance", "parameters", value=[]), "is not of type 'object'"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_a_spoiled_file_is_refused_and_the_fault_named(spoil: Spoil, message: str, saved: Path) -> None:
    content = json.loads(saved.read_text())
    spoil(content)
    saved.write_text(json.dumps(content))
    with pytest.raises(FileError) as caught:
        Circuit.load(saved)
    assert message in str(caught.value)
    assert str(saved) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_whole_numbers_written_with_a_point_are_taken_as_such(saved: Path) -> None:
    content = json.loads(saved.read_text())
    content["graph"]["stages"][1]["layer"] = 0.0
    content["graph"]["stages"][1]["feeds"][0] = [0.0]
    saved.write_text(json.dumps(content))
    circuit = Circuit.load(saved)
    assert circuit == example()
    assert list(circuit.paths()) == list(example().paths())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=5), st.lists
    )
)
def test_whatever_stands_in_a_field_the_error_is_ours(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    content = json.loads(json.dumps(dict(example().to_dict())))
    path = tmp_path_factory.mktemp("spoiled") / "circuit.json"
    for key in ("schema", "edges", "scores", "graph", "provenance"):
        path.write_text(json.dumps({**content, key: value}))
        with suppress(FileError):  # any other exception fails the test
            Circuit.load(path)


HOSTILE = "red\x1b[31m \ud800 \u202eback\nline"
HARMLESS = "red [31m back line"


def test_texts_of_a_file_can_be_shown_and_written(saved: Path) -> None:
    content = json.loads(saved.read_text())
    content["provenance"] = {"model": HOSTILE, "task": HOSTILE, "parameters": {HOSTILE: [{"a": HOSTILE}]}}
    saved.write_text(json.dumps(content))
    made = Circuit.load(saved).provenance
    assert (made.model, made.task) == (HARMLESS, HARMLESS)
    assert made.parameters == {HARMLESS: [{"a": HARMLESS}]}
    assert made.mismatch(Provenance("other")).isprintable()


def test_a_million_equal_edges_are_refused_at_once(saved: Path) -> None:
    content = json.loads(saved.read_text())
    content["edges"] = ["input->m0"] * 1_000_000
    saved.write_text(json.dumps(content))
    start = time.perf_counter()
    with pytest.raises(FileError, match="edge 'input->m0' is listed 1000000 times"):
        Circuit.load(saved)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("edge", [3, None, ["input->m0"], "input->m0" * 100])
def test_an_edge_that_is_no_name_is_refused(saved: Path, edge: object) -> None:
    content = json.loads(saved.read_text())
    content["edges"] = [edge]
    saved.write_text(json.dumps(content))
    with pytest.raises(FileError, match=r"edges/0: .* is not the name of an edge"):
        Circuit.load(saved)


def test_a_circuit_of_another_graph_is_refused(saved: Path) -> None:
    with pytest.raises(FileError, match="belongs to another graph"):
        Circuit.load(saved, transformer_graph(2, 3))
    assert Circuit.load(saved, GRAPH) == example()


def test_scores_must_cover_every_edge(tmp_path: Path) -> None:
    path = EdgeScores(GRAPH, np.ones(GRAPH.shape)).save(tmp_path / "scores.json")
    content = json.loads(path.read_text())
    del content["scores"]["input->m0"]
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match="1 edges have no score, such as 'input->m0'"):
        EdgeScores.load(path)


def test_scores_of_another_graph_or_kind_are_refused(tmp_path: Path, saved: Path) -> None:
    path = EdgeScores(GRAPH, np.ones(GRAPH.shape)).save(tmp_path / "scores.json")
    with pytest.raises(FileError, match="belongs to another graph"):
        EdgeScores.load(path, transformer_graph(1, 1))
    with pytest.raises(FileError, match=r"reads 'circuitvit\.scores/1'"):
        EdgeScores.load(saved)
