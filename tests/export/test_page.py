"""The interactive page as text: one file that asks for nothing, the same bytes each time."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvit as cv
from circuitvit.errors import NameNotFoundError, OptionError
from circuitvit.export import draw
from circuitvit.export.findings import LISTED_PAIRS, findings_of
from circuitvit.export.page import SCRIPTS, safe_json
from circuitvit.graph import Circuit
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.verification.report import CircuitSize, PairResult, RandomBaseline, Report, Section
from circuitvit.verification.statistics import Estimate
from tests.export.cases import MADE, random_circuit, random_scores
from tests.export.test_svg import HOSTILE

CIRCUIT = random_circuit(4, 3, 60)
FOLDER = files("circuitvit.export") / "page"


def html(tmp_path: Path, circuit: Circuit = CIRCUIT, **options: object) -> str:
    return draw(circuit, tmp_path / "page.html", **options).read_text(encoding="utf-8")  # type: ignore[arg-type]


class Elements(HTMLParser):
    """Every start tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    text = html(tmp_path)
    for tag, attributes in Elements(text).found:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
    addresses = set(re.findall(r"https?://[^\s\"'<>)]*", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which no browser asks for


def test_the_policy_allows_only_our_own_script_and_style(tmp_path: Path) -> None:
    policies = [
        attributes.get("content") or "" for tag, attributes in Elements(html(tmp_path)).found if tag == "meta"
    ]
    policy = next(text for text in policies if "src" in text)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert len(re.findall("sha256-", policy)) == 2


def test_the_same_circuit_gives_the_same_bytes(tmp_path: Path) -> None:
    model = cv.load("catdog-tiny")
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    task = cv.Task(images[:1], images[1:], cv.logit_diff(0, 1))
    circuit = random_scores(model.graph).connected(30)
    first, second = (html(tmp_path, circuit, model=model, task=task) for _ in range(2))
    assert first == second
    assert "data:image/png;base64" in first
    assert "data:image/png;base64" not in html(tmp_path, circuit, model=model, task=task, thumbnails=False)


@pytest.mark.parametrize(
    "text", [*HOSTILE, "</script><script>alert(1)</script>", "<!--<script>", "\u2028\u2029"]
)
def test_hostile_titles_add_no_element(tmp_path: Path, text: str) -> None:
    made = type(CIRCUIT.provenance)(text, text, text, text)
    spoiled = html(tmp_path, CIRCUIT.with_provenance(made), title=text)
    tags = [tag for tag, _ in Elements(spoiled).found]
    assert tags == [tag for tag, _ in Elements(html(tmp_path)).found]
    assert "\u202e" not in spoiled


def test_json_keeps_every_text_and_ends_no_element() -> None:
    texts = [*HOSTILE, "</script>", "<!--", "]]>", "\u2028\u2029&amp;"]
    text = safe_json({"texts": texts})
    assert json.loads(text) == {"texts": texts}
    assert not set(text) & set("<>&\u2028\u2029")


def test_scripts_make_no_markup_of_text_remember_nothing_and_ask_nobody() -> None:
    for name in SCRIPTS:
        code = (FOLDER / name).read_text(encoding="utf-8")
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|new Function|"
            r"localStorage|sessionStorage|indexedDB|cookie|XMLHttpRequest|sendBeacon",
            code,
        )
        assert found == [], name


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_scripts_are_valid_javascript(tmp_path: Path) -> None:
    path = tmp_path / "page.js"
    path.write_text(
        "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS), encoding="utf-8"
    )
    done = subprocess.run(["node", "--check", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    name = next(iter(CIRCUIT))
    with pytest.raises(OptionError, match="give the lower end first"):
        html(tmp_path, intervals={name: (1.0, -1.0)})
    with pytest.raises(NameNotFoundError, match="input->m77"):
        html(tmp_path, intervals={"input->m77": (0.0, 1.0)})
    for curve in ([(-1, 0.5)], [(3, float("nan"))], [(3, float("inf"))]):
        with pytest.raises(OptionError, match="the curve is a list"):
            html(tmp_path, curve=curve)


def test_max_edges_and_empty_circuits(tmp_path: Path) -> None:
    assert "drawn: the 5 strongest" in html(tmp_path, max_edges=5)
    assert "0 of 13 edges" in html(tmp_path, Circuit.empty(transformer_graph(1, 2)))


# -- the report on the page ----------------------------------------------------------------------


def hostile_report(circuit: Circuit) -> Report:
    """A report with figures of its own, in which every name that a file can give is hostile."""
    names = HOSTILE[0]

    def estimate(value: float) -> Estimate:
        return Estimate(value, value - 0.01, value + 0.01)

    figures = {name: estimate(0.1) for name in ("nothing", "complement", "complement_faithfulness", "kl")}
    figures |= {name: estimate(0.9) for name in ("whole", "circuit", "necessity", "agreement")}
    pairs = (
        PairResult("a.png", names, 1.0, 0.0, 0.25, 0.0, names, "dog", "dog", 0.5),
        PairResult(names, "b.png", 1.0, 0.0, 0.875, 0.0, "cat", "cat", "dog", 0.1),
    )
    random = RandomBaseline(2, (0.0, 0.3), estimate(0.15), 0.0, 0.3, (), estimate(0.7), 0, 1 / 3, 0, 0.2)
    section = Section(
        images="held-out", task=names, n_pairs=2, faithfulness=estimate(0.8764), weak_pairs=0,
        opposite_pairs=0, random=random, pairs=pairs, **figures,
    )  # fmt: skip
    live, graph = circuit.pruned(), circuit.graph
    size = CircuitSize(len(live), 0, len(live.nodes), graph.n_edges, len(graph.nodes), 0.25)
    return Report(size, replace(section, images="task"), section, (names, "Few pairs."), MADE, MADE)


def test_the_report_is_on_the_page_in_words_and_figures(tmp_path: Path) -> None:
    text = html(tmp_path, report=hostile_report(CIRCUIT))
    plain = " ".join(re.sub(r"<[^>]*>", " ", text.partition("</style>")[2]).split())
    for said in (
        f"{len(CIRCUIT)} of {CIRCUIT.graph.n_edges} edges (25.0%) keep 87.6% of the behaviour",
        "on 2 held-out pairs",
        "0.876 faithfulness, 0.866 to 0.886",
        "0.900 necessity, 0.890 to 0.910",
        "0.150 random circuits, 0.000 to 0.300",
        "Few pairs.",
        "All 2 held-out pairs",
        "a.png",
        "-0.938",  # (0.25 - 1) / (0.9 - 0.1)
    ):
        assert said in plain, said
    assert text.count('class="failed"') == 2  # the same pair in both sections
    assert HOSTILE[0] not in text.partition("</style>")[2]


def test_only_the_pairs_that_say_most_are_listed_where_there_are_many() -> None:
    section = hostile_report(CIRCUIT).task
    pairs = tuple(
        replace(section.pairs[0], clean=str(n), circuit=1 - n / 1000) for n in range(LISTED_PAIRS + 50)
    )
    report = replace(hostile_report(CIRCUIT), task=replace(section, pairs=pairs), held_out=None)
    (found,) = findings_of(report)
    assert [pair.clean for pair, _ in found.pairs] == [str(n) for n in range(50, LISTED_PAIRS + 50)]
    assert found.unlisted == 50


def test_a_report_belongs_to_its_circuit_and_to_the_page(tmp_path: Path) -> None:
    report = hostile_report(CIRCUIT)
    with pytest.raises(OptionError, match="the report is of a circuit of 60 of"):
        html(tmp_path, random_circuit(4, 3, 20), report=report)
    with pytest.raises(OptionError, match=r"draw an \.html file"):
        draw(CIRCUIT, tmp_path / "circuit.svg", report=report)
    empty = Circuit.empty(CIRCUIT.graph)
    assert "no interval" in html(tmp_path, empty, report=bare(hostile_report(empty)))


def bare(report: Report) -> Report:
    """One pair: no intervals, no random circuits, no classes."""
    figures = (
        "whole",
        "nothing",
        "circuit",
        "complement",
        "faithfulness",
        "complement_faithfulness",
        "necessity",
    )
    alone: dict[str, Any] = {name: Estimate(getattr(report.task, name).value) for name in figures}
    section = replace(report.task, **alone, agreement=None, kl=None, random=None, n_pairs=1)
    return replace(report, task=section, held_out=None, warnings=())
