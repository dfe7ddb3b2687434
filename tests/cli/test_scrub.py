"""`circuitvit scrub`: a file of claims, tested as `cv.scrub` tests them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

import circuitvit as cv
from circuitvit.errors import CircuitViTError
from circuitvit.views import Scrubbing
from tests.cli.cases import N_PAIRS, Run

CLAIMS = """
schema: circuitvit.interpretation/1
circuit: ["input -> m0", "m0 -> m3", "m3 -> logits"]
claims: {m0: side & half, m3: side}
labels: labels.csv
"""


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    rows = [("image", "side", "half")]
    for side in ("clean", "corrupt"):
        rows += [(f"{number}.png", side, str(number % 2)) for number in range(N_PAIRS)]
    with (tmp_path / "labels.csv").open("w", newline="") as table:
        csv.writer(table).writerows(rows)
    file = tmp_path / "claims.yaml"
    file.write_text(CLAIMS)
    return file


def test_what_is_found_is_told_and_written(
    run: Run, behaviour: list[object], pairs: Path, claims: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / f"found.{ending}" for ending in ("json", "csv")]
    result = run(
        "scrub", claims, *behaviour, "--draws", 1, *(part for out in outs for part in ("--out", out))
    )
    assert result.exit_code == 0, result.output
    task = cv.Task(pairs / "clean", pairs / "corrupt", cv.logit_diff("cat", "dog"))
    expected = cv.scrub(cv.load("catdog-tiny"), task, cv.read_interpretation(claims), draws=1, progress=False)
    found = Scrubbing.load(outs[0])
    assert np.allclose(found.scrubbed, expected.scrubbed, atol=1e-5)
    assert found.claims == expected.claims
    assert [claim.classes for claim in found.claims] == [
        ("clean, 0", "clean, 1", "corrupt, 0", "corrupt, 1"), ("clean", "corrupt"),
    ]  # fmt: skip
    assert "m0 carries side & half: loses" in result.stdout
    assert len(list(csv.DictReader(outs[1].open()))) == len(list(expected.records()))


@pytest.mark.parametrize(
    ("claims_are", "labels_are", "said"),
    [
        ("just text", "", "does not begin with 'schema: circuitvit.interpretation/1'"),
        (CLAIMS.replace("/1", "/2"), "", "circuitvit.interpretation/1"),
        (CLAIMS.replace("m3: side", "m3: 5"), "", "m3"),
        (CLAIMS.replace("labels:", "lables:"), "", "lables"),
        (CLAIMS, None, "cannot read the labels"),
        (CLAIMS, "", "first line has to name each column"),
        (CLAIMS, "side,side\n1,2\n", "no two alike"),
        (CLAIMS, "side,half\n1\n", "row 0 has 1 entries, and there are 2 columns"),
    ],
)
def test_a_file_that_is_not_as_described_is_refused(
    claims: Path, claims_are: str, labels_are: str | None, said: str
) -> None:
    claims.write_text(claims_are)
    table = claims.with_name("labels.csv")
    table.unlink() if labels_are is None else table.write_text(labels_are)
    with pytest.raises(CircuitViTError, match=said):
        cv.read_interpretation(claims)


def test_a_circuit_may_be_a_file_beside_it(claims: Path) -> None:
    graph = cv.load("catdog-tiny").graph
    circuit = cv.Circuit.from_edges(graph, ["input->m0", "m0->logits"])
    circuit.save(claims.with_name("circuit.json"))
    claims.write_text("schema: circuitvit.interpretation/1\ncircuit: circuit.json\n")
    assert cv.read_interpretation(claims).about(graph, ["0.png"]).circuit == circuit
