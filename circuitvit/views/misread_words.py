"""Why an image was misread, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from circuitvit.errors import counted
from circuitvit.verification.statistics import percent
from circuitvit.verification.templates import row

if TYPE_CHECKING:
    from circuitvit.views.misread import Why

SHARED = "shared"
"""What the set of shared nodes is said to be of."""


def findings(why: Why) -> list[str]:
    """What was found, in sentences."""
    said = [f"{why.image} is {why.label}, and {why.model} sees {why.answer} (margin {why.margin:+.2f})."]
    flipped = [each for each in why.counterfactuals if each.nodes]
    of = len(why.counterfactuals)
    if not flipped:
        near = counted(of, "rightly read image")
        return [*said, f"No set of nodes was found that turns the answer when patched from {near}."]
    sets, patched = [set(each.nodes) for each in flipped], f"patched {where(why)} from rightly read images"
    counts = {node: sum(node in nodes for nodes in sets) for node in why.shared}
    if len(counts) == 1 and all(len(nodes) == 1 or not nodes & {*counts} for nodes in sets):
        ((node, count),) = counts.items()
        said.append(
            f"{node} alone turns the answer when patched {where(why)} from {count} of {of} rightly read "
            "images."
        )
    elif counts:
        who = few_nodes(tuple(f"{node} (from {count} of {of})" for node, count in counts.items()))
        enough = sum(nodes <= set(why.shared) for nodes in sets)
        more = f"; from {enough} of them nothing else is needed" if enough else ""
        verb = "is" if len(counts) == 1 else "are"
        said.append(f"{who} {verb} among the few nodes that turn the answer when {patched}{more}.")
    else:
        said.append(
            f"What turns the answer when {patched} differs from one such image to the next; from the "
            f"nearest it takes {few_nodes(why.chosen)}."
        )
    return said + (suppression_told(why, 0) if why.suppressed else [])


def where(why: Why) -> str:
    """The tokens at which outputs are patched, in words."""
    if why.tokens == "all":
        return "at all tokens"
    return "at the class token" if why.tokens == "cls" else f"at the tokens {why.tokens}"


def suppression_told(why: Why, number: int) -> list[str]:
    """What suppressing a set does, in sentences."""
    found = why.suppressed[number]
    verb, answer = ("repairs", "is") if found.repairs else ("does not repair", "is then")
    answer = "is still" if found.answer == why.answer else answer
    said = [f"Suppressing {few_nodes(found.nodes)} {verb} the image: the answer {answer} {found.answer}."]
    if why.right_before.any():
        before, kept = int(why.right_before.sum()), why.kept(number)
        said.append(f"Of {counted(before, 'held-out image')} that were right {percent(kept)} still are.")
    if (~why.right_before).any():
        misread = int((~why.right_before).sum())
        right = int(why.right_after[number][~why.right_before].sum())
        said.append(f"Of {misread} that were misread as well {right} become right.")
    return said


def few_nodes(nodes: tuple[str, ...]) -> str:
    """Names, as a sentence has them.

    Example:
        >>> few_nodes(("a1.h2",)), few_nodes(("a1.h2", "m3", "m4"))
        ('a1.h2', 'a1.h2, m3 and m4')
    """
    return nodes[0] if len(nodes) == 1 else f"{', '.join(nodes[:-1])} and {nodes[-1]}"


def lines(why: Why) -> Iterator[str]:
    """The finding as Markdown."""
    yield f"# Why {why.image} is taken for {why.answer}"
    yield from ("", " ".join(findings(why)), "")
    columns = ("counterfactual", "similarity", "nodes that flip the answer", "then", "random sets that do")
    yield from row(*columns, header=True)
    for each in why.counterfactuals:
        chance = "" if each.by_chance is None else f"{100 * each.by_chance:.0f} %"
        yield from row(
            each.image, f"{each.similarity:.2f}", ", ".join(each.nodes) or "none", each.answer, chance
        )
    if why.suppressed:
        yield ""
        yield from row("suppressed", "then", "margin", "held-out images still right", header=True)
        for number, found in enumerate(why.suppressed):
            kept = percent(why.kept(number)) if why.right_before.any() else ""
            yield from row(", ".join(found.nodes), found.answer, f"{found.margin:+.2f}", kept)
    if why.caveats:
        yield from ("", "## Bear in mind", "", *(f"- {each}" for each in why.caveats))
