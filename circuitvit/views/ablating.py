"""Which direct contributions does the answer need? Some are replaced by their mean over the images.

Only what a head or an MLP adds to the embedding itself is replaced, after the final norm; what later layers
made of it stays as it was. This asks where an answer is written, not where it is computed.

Gandelsman, Efros and Steinhardt 2024, arXiv:2310.05916: late attention layers alone move zero-shot accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.errors import DataError, OptionError, counted, unknown_name
from circuitvit.export.style import INK, MUTED
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.models.held import classifier_of, logits_readout
from circuitvit.tasks.classes import class_indices
from circuitvit.tasks.labelled import LabelledSpec, Labels, labelled_images
from circuitvit.verification.statistics import Estimate, estimated, share_interval
from circuitvit.views.contributions import Decomposition, decompose

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

KINDS = {"heads": "head", "MLPs": "mlp"}
"""What layers are made of, as a figure calls it and as a decomposition does."""

ORDERS = ("up to", "from")


@dataclass(frozen=True, eq=False, repr=False)
class MeanAblation(Result):
    """How many images are still classified rightly when contributions are replaced by their mean.

    Attributes:
        model: its name.
        names: of the sets of senders that are replaced, such as "heads up to layer 3".
        senders: of each set.
        layers: of a set of heads or MLPs up to or from a layer what, which way and the layer; else None.
        correct: `(set, image)`, whether the answer is the label then.
        whole: `(image,)`, whether it is when nothing is replaced.
    """

    model: str
    names: tuple[str, ...]
    senders: tuple[tuple[str, ...], ...]
    layers: tuple[tuple[str, str, int | str] | None, ...]
    correct: Bool[NDArray[np.bool_], "set image"]
    whole: Bool[NDArray[np.bool_], " image"]

    along = "names:set senders:set layers:set"

    def records(self) -> Iterator[Record]:
        """One row for each set (`ablated`; "" for none): how many `senders`, and the `accuracy` with its
        interval."""
        for name, senders in (("", ()), *zip(self.names, self.senders, strict=True)):
            yield {
                "ablated": name,
                "senders": len(senders),
                **estimated("accuracy", self.accuracy(name)),
            }

    def accuracy(self, name: str = "") -> Estimate:
        """The share of images that are classified rightly without a set ("" for none), and its interval.

        Raises:
            NameNotFoundError: for another set.
        """
        if not name:
            return share_interval(self.whole)
        if name not in self.names:
            raise unknown_name("set of senders", name, self.names)
        return share_interval(self.correct[self.names.index(name)])

    def figure(self) -> Picture:
        """Accuracy by layer, ablated up to and from it; of other sets a bar for each."""
        from circuitvit.views import canvas

        whole = self.accuracy().value
        with canvas.styled():
            title = f"Direct contributions replaced by their mean: {self.model}"
            if all(self.layers):
                figure = canvas.blank(7.4, 2.9, title)
                panels = figure.subplots(1, 2, sharey=True)
                for axes, order in zip(panels, ORDERS, strict=True):
                    for colour, what in zip(canvas.PALETTE, KINDS, strict=False):
                        found = [
                            (str(said[2]), self.accuracy(name))
                            for name, said in zip(self.names, self.layers, strict=True)
                            if said is not None and said[:2] == (what, order)
                        ]
                        values = [estimate.value for _, estimate in found]
                        ends = [
                            (
                                est.value if est.low is None else est.low,
                                est.value if est.high is None else est.high,
                            )
                            for _, est in found
                        ]
                        places = range(len(found))
                        axes.plot(places, values, marker="o", markersize=3, color=colour, label=what)
                        axes.fill_between(places, *zip(*ends, strict=True), color=colour, alpha=0.15, lw=0)
                        axes.set_xticks(places, [layer for layer, _ in found])
                    axes.axhline(whole, color=MUTED, linewidth=0.7, linestyle=":")
                    axes.set_xlabel(f"ablated {order} this layer")
                    axes.set_ylim(-0.02, 1.04)
                panels[0].set_ylabel("accuracy")
                panels[0].legend(frameon=False)
                return figure
            figure = canvas.blank(5.2, 1.2 + 0.26 * len(self.names), title)
            axes = figure.subplots()
            values = [self.accuracy(name).value for name in ("", *self.names)]
            drawn = axes.barh(
                range(len(values)),
                values,
                color=[INK, *[canvas.PALETTE[0]] * len(self.names)],
                height=0.7,
            )
            axes.bar_label(drawn, [f"{value:.0%}" for value in values], padding=2, fontsize=6.5)
            axes.set_yticks(range(len(values)), ["nothing", *(canvas.label(name) for name in self.names)])
            axes.invert_yaxis()
            axes.set_xlim(0, 1.1)
            axes.set_xlabel("accuracy without it")
        return figure

    def __repr__(self) -> str:
        worst = sorted(self.names, key=lambda name: self.accuracy(name).value)[:2]
        said = [f"without {name} {self.accuracy(name).value:.0%}" for name in worst]
        shares = ", ".join([f"{self.accuracy().value:.0%}", *said])
        return f"MeanAblation({self.model}, {counted(len(self.whole), 'image')}; {shares})"


@running
def mean_ablate(
    model: Model,
    images: LabelledSpec,
    labels: Labels | None = None,
    *,
    sets: Mapping[str, Sequence[str]] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> MeanAblation:
    """How accuracy changes when direct contributions are replaced by their mean over the images.

    Args:
        model: from `load` or `wrap`, with classes: its own, a head's, or prompts.
        images: preprocessed, or paths; a mapping from classes to images, or a folder with one subfolder for
            each class, says the labels itself.
        labels: a class of the model for each image, by name or number.
        sets: names of sets of senders that are replaced together; by default the heads, and the MLPs, up to
            and from every layer.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        DataError: for images that cannot be used, and labels that do not fit them.
        NameNotFoundError: for an unknown class or sender.
        OptionError: if there are no sets.
        UnsupportedModelError: if the model has no classes, or as `decompose`.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(6, seed=0)
        >>> found = mean_ablate(model, pairs.clean, pairs.clean_classes)  # doctest: +SKIP
    """
    classifier = classifier_of(model)
    logits_readout(model)  # which refuses edits of what the classifier gives
    found, given = labelled_images(images, labels, model.preprocessing)
    if len(given) != len(found):
        raise DataError(f"{len(given)} labels for {counted(len(found), 'image')}")
    numbers = {each: class_indices(model, each)[0] for each in dict.fromkeys(given)}
    wanted = np.array([numbers[each] for each in given])
    if len(found) < 2:
        raise DataError("the mean over images takes two or more of them")
    whole = decompose(model, found, batch_size=batch_size, progress=progress)
    layered = _by_layer(whole) if sets is None else {name: (None, tuple(of)) for name, of in sets.items()}
    if not layered:
        raise OptionError("there are no sets of senders to replace")

    def right(embedding: NDArray[np.float64]) -> NDArray[np.bool_]:
        with torch.no_grad():
            given = torch.from_numpy(embedding).to(model.device, model.dtype)
            return np.asarray(classifier(given).argmax(dim=1).cpu().numpy() == wanted)

    return MeanAblation(
        model.name,
        tuple(layered),
        tuple(senders for _, senders in layered.values()),
        tuple(said for said, _ in layered.values()),
        np.stack([right(whole.ablated(senders)) for _, senders in layered.values()]),
        right(whole.embedding),
    )


# -- inside --------------------------------------------------------------------------------------


def _by_layer(
    found: Decomposition,
) -> dict[str, tuple[tuple[str, str, int | str] | None, tuple[str, ...]]]:
    """The heads, and the MLPs, up to and from every layer that has some."""
    sets: dict[str, tuple[tuple[str, str, int | str] | None, tuple[str, ...]]] = {}
    for what, kind in KINDS.items():
        own = [
            (name, layer)
            for name, each, layer in zip(found.senders, found.kinds, found.layers, strict=True)
            if each == kind
        ]
        layers = list(dict.fromkeys(layer for _, layer in own))
        for order in ORDERS:
            for place, layer in enumerate(layers):
                inside = set(layers[: place + 1] if order == "up to" else layers[place:])
                senders = tuple(name for name, each in own if each in inside)
                sets[f"{what} {order} layer {layer}"] = ((what, order, layer), senders)
    return sets
