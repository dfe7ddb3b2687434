"""A report as Markdown: first what it says in sentences, then every caveat, then all the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from circuitvit.graph import Provenance
from circuitvit.verification.bootstrap import Estimate
from circuitvit.verification.findings import conclusion_sentences, further_findings
from circuitvit.verification.markup import plain, row
from circuitvit.verification.report import Report, Section

PAIRS_SHOWN = 50
"""Rows of the table of pairs; the JSON file holds them all."""

_FIGURES: tuple[tuple[str, Callable[[Section], Estimate]], ...] = (
    ("metric, every edge kept", lambda section: section.whole),
    ("metric, every edge ablated", lambda section: section.nothing),
    ("metric, only the circuit kept", lambda section: section.circuit),
    ("metric, only the circuit ablated", lambda section: section.complement),
    ("faithfulness of the circuit", lambda section: section.faithfulness),
    ("faithfulness of the complement", lambda section: section.complement_faithfulness),
    ("necessity (1 - faithfulness of the complement)", lambda section: section.necessity),
    ("top-1 agreement with the full model", lambda section: section.agreement),
    ("KL(full model, circuit), nats", lambda section: section.kl),
)


def report_to_markdown(report: Report) -> str:
    """The whole report. See `Report.to_markdown`."""
    sections = [section for section in (report.held_out, report.task) if section is not None]
    lines = ["# Verification of a circuit", "", *conclusion_sentences(report), *_sentences(report), ""]
    lines += ["## Caveats", "", *(f"- {plain(text)}" for text in report.warnings or ("None.",)), ""]
    lines += ["## Figures", "", *_figures(sections), ""]
    for section in sections:
        lines += [f"## Pairs it fails on ({_where(section)})", "", *_failures(section), ""]
    for section in sections:
        lines += [f"## Pair by pair ({_where(section)})", "", *_pairs(section), ""]
    lines += further_findings(report)
    lines += ["## Origin", "", *_origin(report)]
    return "\n".join(lines) + "\n"


# -- sentences -----------------------------------------------------------------------------------


def _sentences(report: Report) -> Iterator[str]:
    size, section = report.size, report.headline
    asked = "" if size.asked is None else f"; {size.asked:,} were asked for"
    yield (
        f"The circuit has {size.edges:,} of the graph's {size.graph_edges:,} edges "
        f"({size.density:.1%}{asked}) and {size.nodes} of its {size.graph_nodes} nodes."
    )
    yield ""
    pairs = "1 pair" if section.n_pairs == 1 else f"{section.n_pairs} pairs"
    kind = "held-out images" if report.held_out else "the images of the task"
    level = report.provenance.parameters.get("level", 0.95)
    brackets = "" if section.faithfulness.low is None else f", with {level:.0%} intervals in brackets"
    yield f"On {pairs} ({kind}){brackets}:"
    yield ""
    yield f"- The circuit alone keeps {section.faithfulness} of the behaviour (faithfulness; 1 is all of it)."
    yield f"- Without the circuit {section.necessity} of the behaviour is lost (necessity; 1 is all of it)."
    yield (
        f"- Its top class is the full model's on {_percent(section.agreement)} of the images, and its "
        f"prediction is {section.kl} nats from the full one (KL)."
    )
    if section.failures:
        yield f"- It fails on {len(section.failures)} of {pairs}, which are listed below."
    if section.random is not None:
        yield _random_sentence(section)
    if report.held_out is not None:
        found, other = report.task.faithfulness.value, section.faithfulness.value
        yield (
            f"- On the images it was found on it keeps {found:.3f}: generalising to held-out ones changes it "
            f"by {other - found:+.3f}."
        )


def _random_sentence(section: Section) -> str:
    random = section.random
    assert random is not None
    come = "comes" if random.as_good == 1 else "come"
    return (
        f"- Of {random.n} random circuits with as many edges into every stage, {random.as_good} {come} as "
        f"close to the full model (p = {random.p_value:.2g}). They keep {random.mean} of the behaviour on "
        f"average, from {random.low:.3f} to {random.high:.3f}; the circuit keeps {random.advantage} more."
    )


# -- tables --------------------------------------------------------------------------------------


def _figures(sections: Sequence[Section]) -> Iterator[str]:
    yield from row("figure", *(_where(section) for section in sections), header=True)
    yield from row("pairs", *(str(section.n_pairs) for section in sections))
    for name, figure in _FIGURES:
        yield from row(name, *(str(figure(section)) for section in sections))
    for name, value in _RANDOM_FIGURES:
        if any(section.random is not None for section in sections):
            yield from row(name, *("" if section.random is None else value(section) for section in sections))
    yield from row("pairs that hardly differ", *(str(section.weak_pairs) for section in sections))
    yield from row("pairs that differ the other way", *(str(section.opposite_pairs) for section in sections))


def _of_random(text: Callable[..., str]) -> Callable[[Section], str]:
    return lambda section: text(section.random)


_RANDOM_FIGURES: tuple[tuple[str, Callable[[Section], str]], ...] = (
    ("random circuits", _of_random(lambda random: str(random.n))),
    ("their mean faithfulness", _of_random(lambda random: str(random.mean))),
    ("their smallest and largest", _of_random(lambda random: f"{random.low:.3f}, {random.high:.3f}")),
    (
        "their 5, 25, 50, 75, 95 % quantiles",
        _of_random(lambda random: ", ".join(f"{value:.3f}" for value in random.quantiles)),
    ),
    ("as close to the full model as the circuit", _of_random(lambda random: str(random.as_good))),
    ("p-value", _of_random(lambda random: f"{random.p_value:.2g}")),
    ("their live edges after pruning, mean", _of_random(lambda random: f"{random.live_edges:.1f}")),
    ("circuit's edges that they share, mean", _of_random(lambda random: f"{random.shared:.0%}")),
)


def _failures(section: Section) -> Iterator[str]:
    yield (
        "The circuit fails on a pair when its top class is not the full model's, or its metric is off by "
        "more than half of the mean behaviour."
    )
    yield ""
    if not section.failures:
        yield "There is none."
        return
    yield from row(
        "clean", "corrupt", "off by (share of the behaviour)", "top: all", "top: circuit", header=True
    )
    for pair in section.failures[:PAIRS_SHOWN]:
        yield from row(pair.clean, pair.corrupt or "", f"{pair.off:+.3f}", pair.top_whole, pair.top_circuit)
    if len(section.failures) > PAIRS_SHOWN:
        yield ""
        yield f"And {len(section.failures) - PAIRS_SHOWN:,} more, in the JSON file."


def _pairs(section: Section) -> Iterator[str]:
    yield from row(
        "clean", "corrupt", "all", "none", "circuit", "complement",
        "top: all", "top: circuit", "top: complement", "KL", header=True,
    )  # fmt: skip
    for pair in section.pairs[:PAIRS_SHOWN]:
        metrics = (pair.whole, pair.nothing, pair.circuit, pair.complement)
        tops = (pair.top_whole, pair.top_circuit, pair.top_complement)
        numbers = [f"{value:.4g}" for value in metrics]
        yield from row(pair.clean, pair.corrupt or "", *numbers, *tops, f"{pair.kl:.3g}")
    if len(section.pairs) > PAIRS_SHOWN:
        yield ""
        yield f"And {len(section.pairs) - PAIRS_SHOWN:,} more pairs, in the JSON file."
    yield ""
    yield f"Task: {plain(section.task)}."


def _origin(report: Report) -> Iterator[str]:
    yield f"- circuit: {_described(report.circuit_provenance)}"
    yield f"- verification: {_described(report.provenance)}"


def _described(provenance: Provenance) -> str:
    parts = [
        f"model {provenance.model}" if provenance.model else "",
        f"weights {provenance.weights[:12]}" if provenance.weights else "",
        f"method {provenance.method}" if provenance.method else "",
        *(f"{key} {value}" for key, value in provenance.parameters.items()),
        f"seed {provenance.seed}" if provenance.seed is not None else "",
        f"circuitvit {provenance.library}",
    ]
    return plain(", ".join(part for part in parts if part))


def _where(section: Section) -> str:
    return "held-out pairs" if section.images == "held-out" else "the task's pairs"


def _percent(share: Estimate) -> str:
    if share.low is None or share.high is None:
        return f"{share.value:.0%}"
    return f"{share.value:.0%} ({share.low:.0%} to {share.high:.0%})"
