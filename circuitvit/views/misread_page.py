"""Why an image was misread: as a page without scripts or other files, and as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from circuitvit.errors import counted
from circuitvit.export.maps import LEAST_TIMES_MEAN, heat
from circuitvit.export.plain_page import rendered
from circuitvit.export.style import MUTED
from circuitvit.export.svg import image_uri
from circuitvit.graph.files import clean
from circuitvit.verification.statistics import percent
from circuitvit.views.misread_words import SHARED, findings, where

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture
    from circuitvit.views.misread import Why

HEIGHT = 260
"""Pixels of the height of a picture in the page."""

LISTED = 8
"""Nodes of which the page says what each does alone."""

MOST = 6
"""Nodes that the figure has room for."""


def page_of(why: Why) -> str:
    """The page."""
    verdict, *rest = (clean(each) for each in findings(why))
    return rendered(
        "misread.html",
        title=clean(f"Why {why.image} is taken for {why.answer}"),
        model=clean(why.model),
        state="none" if not why.suppressed else "repaired" if why.suppressed[0].repairs else "not",
        verdict=verdict,
        findings=rest,
        image=_card(why, 0),
        cards=[_card(why, place) for place in range(1, len(why.subjects))],
        where=where(why),
        at_all=why.tokens == "all",
        nodes=[_node(why, place) for place in range(len(why.looking))],
        alone=list(_alone(why)),
        names=[clean(name) for name in why.subjects.names],
        suppressed=[_suppressed(why, number) for number in range(len(why.suppressed))],
        held_out=counted(len(why.held_out), "image"),
        caveats=[clean(each) for each in why.caveats],
    )


def _card(why: Why, place: int) -> dict[str, Any]:
    """A picture and what is said of it; the first is the misread one."""
    card: dict[str, Any] = {
        "name": clean(why.subjects.names[place]),
        "uri": _uri(why.subjects.pictures[place]),
        "seen": clean(why.answer),
        "label": clean(why.label),
    }
    if place:
        each = why.counterfactuals[place - 1]
        card |= {
            "similarity": f"{each.similarity:.2f}",
            "margin": f"{each.margin:+.2f}",
            "nodes": [(node, node in why.shared) for node in each.nodes],
            "answer": clean(each.answer),
            "patched": None if each.patched is None else f"{each.patched:+.2f}",
            "by_chance": None if each.by_chance is None else f"{100 * each.by_chance:.0f} %",
        }
    return card


def _node(why: Why, place: int) -> dict[str, Any]:
    name = why.looking[place]
    return {
        "name": name,
        "chosen": name in why.chosen,
        "maps": [_uri(_heat(why, place, image)) for image in range(len(why.subjects))],
    }


def _alone(why: Why) -> Iterator[tuple[str, bool, list[tuple[str, bool]]]]:
    """The nodes that move the margin most by themselves: name, whether chosen, and by how much it moves from
    each counterfactual, with whether that flips the answer."""
    known = np.where(np.isnan(why.alone), 0.0, why.alone)
    for place in np.argsort(-known.mean(axis=0), kind="stable")[:LISTED].tolist():
        cells = [
            ("" if np.isnan(value) else f"{value:+.2f}", bool(why.margin + value > 0))
            for value in why.alone[:, place].tolist()
        ]
        yield why.nodes[place], why.nodes[place] in why.chosen, cells


def _suppressed(why: Why, number: int) -> dict[str, Any]:
    found, others = why.suppressed[number], ~why.right_before
    return {
        "nodes": ", ".join(found.nodes),
        "of": "shared" if found.of == SHARED else clean(f"flips with {found.of}"),
        "answer": clean(found.answer),
        "margin": f"{found.margin:+.2f}",
        "repairs": found.repairs,
        "kept": percent(why.kept(number)) if why.right_before.any() else "",
        "gained": f"{int(why.right_after[number][others].sum())} of {int(others.sum())}",
        "by_chance": "" if found.by_chance is None else f"{100 * found.by_chance:.0f} %",
    }


def _heat(why: Why, place: int, image: int) -> NDArray[np.uint8]:
    """A map over its picture: of heads so that attention which is spread evenly looks dull."""
    picture, values = why.subjects.pictures[image], np.asarray(why.maps[place, image], dtype=np.float64)
    size = (round(picture.shape[1] * HEIGHT / picture.shape[0]), HEIGHT)
    if ".h" in why.looking[place]:
        return heat(picture, values, size, LEAST_TIMES_MEAN * float(values.mean()))
    return heat(picture, values - values.min(), size)


def _uri(picture: NDArray[np.uint8]) -> str:
    image = Image.fromarray(np.ascontiguousarray(picture))
    scale = min(1.0, HEIGHT / image.height)
    return image_uri(np.asarray(image.resize((round(image.width * scale), round(image.height * scale)))))


# -- a figure ----------------------------------------------------------------------------------------


def figure_of(why: Why) -> Picture:
    """See `Why.figure`."""
    from circuitvit.views import canvas

    looking, images = why.looking[:MOST], len(why.subjects)
    with canvas.styled():
        sheet = why.subjects.sheet
        wide, high = canvas.proportions(sheet, 1.5, 4.6)
        across = 1 + len(looking)
        title = f"{why.image}: {why.answer} for {why.label}"
        figure = canvas.blank(max(wide * across + 0.2, 4.2), (high + 0.42) * images + 0.3, title)
        axes = figure.subplots(images, across, squeeze=False)
        for image, line in enumerate(axes):
            line[0].imshow(why.subjects.pictures[image])
            canvas.bare(line[0])
            for place, axis in enumerate(line[1:]):
                axis.imshow(_heat(why, place, image))
                canvas.bare(axis)
            line[0].set_xlabel(canvas.label("\n".join(_under(why, image)), 60), fontsize=6.5, color=MUTED)
        for axis, node in zip(axes[0][1:], looking, strict=True):
            axis.set_title(f"{node}{' (chosen)' if node in why.chosen else ''}")
    return figure


def _under(why: Why, image: int) -> Iterator[str]:
    yield why.subjects.names[image]
    if image:
        yield f"flips by {', '.join(why.counterfactuals[image - 1].nodes) or 'nothing'}"
    else:
        yield f"seen as {why.answer}"
