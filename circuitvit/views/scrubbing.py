"""Causal scrubbing: everything that a hypothesis says must not matter is exchanged, and the metric looked at.

A hypothesis is a circuit with claims about what its edges carry (`Interpretation`). For each image the
circuit is run as a tree (`circuitvit.engine.trees`): what is heard over an edge is taken from another image
that is equal to the reader's own in what the edge is said to carry, and so on down to the input; what is
heard from outside of the circuit, from any other image. Were the hypothesis true, the metric would stay.

    recovered = (scrubbed - floor) / (original - floor)

of means over images. The floor is the metric of logits that come from any other image: what is left when a
model answers as often as before, but not to its own image.

Chan et al. 2022, "Causal scrubbing: a method for rigorously testing interpretability hypotheses", Alignment
Forum. Two things differ here. An image is drawn from the *others* of its class: the original may draw the
image itself, which favours the hypothesis, by one part in the size of the class. And the tree is bounded, as
`circuitvit.engine.trees` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit._progress import progress_bar
from circuitvit.engine import check_effect, choose_batch_size, memory_budget
from circuitvit.engine.evaluator import HELD_BYTES
from circuitvit.engine.trees import Heard, Reader, Rows, TreeRuns, written_out
from circuitvit.errors import DataError, OptionError, check_whole, counted
from circuitvit.export.style import INK, MUTED
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.verification.interpretation import Claim, Claimed, Interpretation
from circuitvit.verification.statistics import ROUNDING, Bootstrap, Estimate, estimated, ratio_interval
from circuitvit.verification.verdict import check_clusters

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Values = Float[np.ndarray, "draw image"]

TOGETHER, OUTSIDE = "all together", "outside of the circuit"
"""The rows of the table that are no claim's: the whole hypothesis, and that nothing else matters."""

MOST_CLASSES = 8
"""Of a claim with more, a figure shows those that lose most."""

AT_ONCE = 64
"""Images whose logits stand in for all others, when the floor is measured."""


@dataclass(frozen=True, eq=False, repr=False)
class Scrubbing(Result):
    """What is left of a behaviour when all is exchanged that a hypothesis says must not matter.

    Attributes:
        model: its name.
        label: of the metric.
        names: of the clean images, on which the metric is measured.
        claims: what the hypothesis says of the edges of its circuit.
        edges: how many edges the circuit has.
        original: the metric of the model, `(image,)`.
        floor: of logits that are those of another image, the mean over all others, `(image,)`.
        scrubbed: under the whole hypothesis, `(draw, image)`.
        outside: when only what comes from outside of the circuit is exchanged, `(draw, image)`.
        alone: when only what one claim speaks of is exchanged, `(claim, draw, image)`.
        clusters: which cluster each image belongs to, or None.
        places: how many places the circuit has when it is written out as a tree.
        readers: how many were run; as many where the tree was whole.
        n_bootstrap: how often the images are resampled for intervals.
        seed: of all that was drawn.

    Example:
        >>> scrub(model, task, hypothesis).share  # doctest: +SKIP
        Estimate(value=0.93, low=0.88, high=0.97)
    """

    model: str
    label: str
    names: tuple[str, ...]
    claims: tuple[Claim, ...]
    edges: int
    original: Float[NDArray[np.float64], " image"]
    floor: Float[NDArray[np.float64], " image"]
    scrubbed: Values
    outside: Values
    alone: Float[NDArray[np.float64], "claim draw image"]
    clusters: tuple[str, ...] | None
    places: int
    readers: int
    n_bootstrap: int
    seed: int

    along = "names:image claims:claim clusters:image"

    @property
    def share(self) -> Estimate:
        """The share of the metric that is recovered under the whole hypothesis: 1 for all of it.

        Its interval is over images, each with all of its draws.
        """
        return self._of_effect(self.scrubbed.mean(axis=0) - self.floor)

    def lost(self, claim: int | None = None) -> Estimate:
        """The share of the metric that one claim loses with all others exact; None for the circuit, which
        says that nothing outside of it matters.

        Args:
            claim: its number in `claims`.

        Raises:
            OptionError: if there is no such claim.
        """
        return self._of_effect(self.original - self._values(claim).mean(axis=0))

    def lost_by_class(self, claim: int) -> dict[str, tuple[float, int]]:
        """What a claim alone loses on the images of each of its labels, and how many images these are.

        Losses are in units of the mean effect of all images: weighted by the images they add up to `lost`.
        """
        lost = (self.original - self._values(claim).mean(axis=0)) / (self.original - self.floor).mean()
        members = np.array(self.claims[claim].members[: len(self.names)], dtype=int)
        found = {}
        for number, name in enumerate(self.claims[claim].classes):
            if (inside := members == number).any():
                found[name] = float(lost[inside].mean()), int(inside.sum())
        return found

    @property
    def culprit(self) -> int | None:
        """The claim that loses most; None if none is shown to lose anything (its interval holds 0)."""
        losing = []
        for number in range(len(self.claims)):
            lost = self.lost(number)
            if (lost.value if lost.low is None else lost.low) > ROUNDING:
                losing.append((lost.value, -number))
        return -max(losing)[1] if losing else None

    def records(self) -> Iterator[Record]:
        """One row for all claims `all together`, one for what is `outside of the circuit`, and one for each
        claim (its pattern as `part`) and each of its labels (`class`, else None): what the edges `carry`, on
        how many images `n`, the mean `metric`, and the share that is `lost` with its interval (`_low`,
        `_high`)."""
        together = 1 - self.share.value
        yield self._row(TOGETHER, self.scrubbed, _flipped(self.share, together))
        yield self._row(OUTSIDE, self.outside, self.lost())
        for number, claim in enumerate(self.claims):
            yield self._row(claim.pattern, self.alone[number], self.lost(number), claim)
            for name, (value, _) in self.lost_by_class(number).items():
                inside = np.array(claim.members[: len(self.names)]) == claim.classes.index(name)
                values = self.alone[number][:, inside]
                yield self._row(claim.pattern, values, Estimate(value), claim, name)

    def __repr__(self) -> str:
        found = f"recovers {self.share} of {self.label}"
        size = f"{counted(len(self.claims), 'claim')} about {counted(self.edges, 'edge')}"
        return f"Scrubbing({size} of {self.model}: {found} on {counted(len(self.names), 'image')})"

    def __str__(self) -> str:
        images, draws = counted(len(self.names), "image"), counted(len(self.scrubbed), "draw")
        tree = f"all {self.places:,} places of the tree were run"
        if self.readers != self.places:
            tree = f"{self.readers:,} nodes were run for the {self.places:,} places of the tree"
        said = [
            f"{counted(len(self.claims), 'claim')} about {counted(self.edges, 'edge')} of {self.model}: "
            f"recovered {self.share} of {self.label} ({images}, {draws}; {tree}).",
            f"  {OUTSIDE}: loses {self.lost()}",
            *(f"  {claim}: loses {self.lost(number)}" for number, claim in enumerate(self.claims)),
        ]
        if (worst := self.culprit) is not None:
            by_class = self.lost_by_class(worst)
            name = max(by_class, key=lambda each: by_class[each][0])
            where = f", most on {name!r} ({by_class[name][0]:.3f})" if len(by_class) > 1 else ""
            said.append(f"The claim that loses most: {self.claims[worst]}{where}.")
        return "\n".join([*said, *self.caveats])

    @property
    def caveats(self) -> tuple[str, ...]:
        """What the figures do not test."""
        found = []
        for claim in self.claims:
            if claim.singles:
                few = ", ".join(claim.classes[number] for number in claim.singles[:3])
                more = ", ..." if len(claim.singles) > 3 else ""
                found.append(
                    f"{claim}: {counted(len(claim.singles), 'label')} ({few}{more}) on a single image, which "
                    "has no other to stand in for it and stays."
                )
        return tuple(found)

    def figure(self) -> Picture:
        """What each claim loses alone, with its interval, and on the images of each of its labels."""
        from circuitvit.views import canvas

        rows = list(self._bars())
        with canvas.styled():
            title = f"Causal scrubbing of {self.model}: {self.share} recovered"
            figure = canvas.blank(6.4, 1.1 + 0.24 * len(rows), title)
            axes = figure.subplots()
            for place, (_, lost, level) in enumerate(rows):
                colour = (INK, canvas.PALETTE[0], MUTED)[level]
                if lost.low is not None and lost.high is not None:
                    axes.plot([lost.low, lost.high], [place, place], color=colour, linewidth=1.2)
                axes.plot(lost.value, place, "o", color=colour, markersize=(5, 5, 3)[level])
            axes.axvline(0, color=MUTED, linewidth=0.6, zorder=0)
            axes.axvline(1, color=MUTED, linewidth=0.6, linestyle=":", zorder=0)
            axes.set_yticks(range(len(rows)), [canvas.label(name, 60) for name, _, _ in rows])
            for text, (_, _, level) in zip(axes.get_yticklabels(), rows, strict=True):
                text.set(color=(INK, INK, MUTED)[level], fontsize=(8, 8, 6.5)[level])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            lost_of = f"share lost of {canvas.label(self.label, 70)}"
            axes.set_xlabel(f"{lost_of}\n1 (dotted): as with the logits of another image")
        return figure

    # -- inside ----------------------------------------------------------------------------------

    def _bars(self) -> Iterator[tuple[str, Estimate, int]]:
        """The rows of the figure: name, loss, and whether it is of everything, of a claim or of a label."""
        yield TOGETHER, _flipped(self.share, 1 - self.share.value), 0
        yield OUTSIDE, self.lost(), 0
        for number, claim in enumerate(self.claims):
            yield str(claim), self.lost(number), 1
            by_class = sorted(self.lost_by_class(number).items(), key=lambda each: -each[1][0])
            if len(by_class) > 1:
                for name, (value, count) in by_class[:MOST_CLASSES]:
                    yield f"{name} ({counted(count, 'image')})", Estimate(value), 2

    def _row(
        self, part: str, values: NDArray[np.float64], lost: Estimate, claim: Claim | None = None,
        label: str | None = None,
    ) -> Record:  # fmt: skip
        return {
            "part": part,
            "carries": None if claim is None else claim.carries,
            "class": label,
            "n": values.shape[1],
            "metric": float(values.mean()),
            **estimated("lost", lost),
        }

    def _values(self, claim: int | None) -> Values:
        if claim is None:
            return self.outside
        check_whole("the number of a claim", claim, 0)
        if claim >= len(self.claims):
            raise OptionError(f"there is no claim {claim}: the {len(self.claims)} are counted from 0")
        return np.asarray(self.alone[claim])

    def _of_effect(self, part: NDArray[np.float64]) -> Estimate:
        settings = Bootstrap(n_resamples=self.n_bootstrap, seed=self.seed)
        return ratio_interval(part, self.original - self.floor, settings, self.clusters)

    def _check(self) -> None:
        check_whole("the number of draws", len(self.scrubbed))
        _ = self.share  # refused where there is no effect to have a share of
        for claim in self.claims:
            if claim.members and not 0 <= min(claim.members) <= max(claim.members) < len(claim.classes):
                raise OptionError(f"{claim}: its images have labels that it does not name")
            if claim.members and len(claim.members) < len(self.names):
                raise OptionError(f"{claim}: some images have no label")


@running
def scrub(
    model: Model,
    task: Task | PreparedTask,
    hypothesis: Interpretation,
    *,
    draws: int = 10,
    copies: int = 4,
    clusters: Sequence[str] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Scrubbing:
    """Test a circuit with claims about what it carries, by exchanging all that must not matter.

    The task's ablation is not used: what is exchanged comes from plain runs of its clean and corrupt images.

    Args:
        model: from `load` or `wrap`.
        task: images and metric. The metric has to be about each image, as a class of its own for each is.
        hypothesis: the circuit and the claims.
        draws: how often all images are chosen.
        copies: of each node that are run at most, where the circuit written out as a tree has more.
        clusters: which cluster (photograph, class) each clean image belongs to.
        n_bootstrap: how often images are resampled for intervals.
        seed: of the draws and of resampling.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: if a claim names no edge of the circuit, or labels that there are not.
        OptionError: if the circuit is empty, the task restores (denoising), or its token groups or the
            model's edits are for single images.
        DataError: if labels do not fit the images, if the metric is the same on images that are exchanged, or
            if there is no memory for all of them.

    Example:
        >>> import circuitvit as cv
        >>> relay = cv.compiled("relay")
        >>> images, factors = relay.factors(24)
        >>> classes = cv.PerPair(
        ...     tuple("yes" if each else "no" for each in ~(factors["colour"] ^ factors["cue"]))
        ... )
        >>> task = cv.Task(images, metric=cv.log_probability(classes), ablation="resample")
        >>> seen = (factors["colour"] ^ factors["cue"]).tolist()  # whether the cue is not coloured
        >>> claims = {"a0.h0": "answer", "a1.h0": "answer"}
        >>> hypothesis = Interpretation(relay.wired, claims, labels={"answer": seen})
        >>> round(scrub(relay.model, task, hypothesis, progress=False).share.value, 3)
        1.0
    """
    check_whole("the number of draws (draws)", draws)
    check_whole("the number of copies (copies)", copies)
    settings = Bootstrap(n_resamples=n_bootstrap, seed=seed)
    if not isinstance(hypothesis, Interpretation):
        raise OptionError(f"{type(hypothesis).__name__} is no hypothesis to scrub: give an Interpretation")
    prepared = _checked(prepare(model, task, progress))
    n = len(prepared)
    check_clusters(clusters, n)
    corrupt = () if prepared.corrupt is None else prepared.corrupt.names
    claimed = hypothesis.about(prepared.graph, prepared.clean.names, corrupt)
    tree = written_out(prepared.graph, claimed.circuit.kept, copies)
    limit = HELD_BYTES if memory is None and model.device.type == "cpu" else memory_budget(model, memory)
    runs = TreeRuns.of(prepared, tree, batch_size or choose_batch_size(prepared, memory), limit)
    original, floor = _measured(prepared, runs.plain.logits[None, :n], runs)[0], _floor(prepared, runs)
    _check_effect(prepared, original, floor, settings)
    ratio_interval(original - floor, original - floor, settings, clusters)  # refused before long work
    plans = [
        Plan(frozenset(range(len(claimed.claims))), True),
        Plan(frozenset(), True),
        *(Plan(frozenset({claim}), False) for claim in range(len(claimed.claims))),
    ]
    found = np.empty((len(plans), draws, n))
    with progress_bar(draws * len(plans), "scrubbing", progress, unit="run") as bar:
        for draw in range(draws):
            for place, plan in enumerate(plans):
                logits = runs.logits(tree, Drawn(claimed, plan, (seed, draw), len(runs)), n)
                found[place, draw] = _measured(prepared, logits[None], runs)[0]
                bar.update()
    return Scrubbing(
        model=model.name,
        label=prepared.metric.label,
        names=tuple(prepared.clean.names),
        claims=claimed.claims,
        edges=len(claimed.circuit),
        original=original,
        floor=floor,
        scrubbed=found[0],
        outside=found[1],
        alone=found[2:],
        clusters=None if clusters is None else tuple(map(str, clusters)),
        places=tree.places,
        readers=len(tree.readers),
        n_bootstrap=n_bootstrap,
        seed=seed,
    )


# -- what is drawn -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is exchanged in a run: by which claims, and whether from outside of the circuit."""

    claims: frozenset[int]
    outside: bool


@dataclass(frozen=True, eq=False)
class Drawn:
    """The images that stand in for each other in one run.

    Each choice has random numbers of its own, so that a claim alone is tested on the same images as with all
    others.

    Attributes:
        claimed: the circuit and its claims.
        plan: what is exchanged.
        seed: of the draw.
        images: how many there are.
    """

    claimed: Claimed
    plan: Plan
    seed: tuple[int, int]
    images: int

    def outside(self, reader: Reader) -> Rows | None:
        return (
            self._others(np.zeros(self.images, dtype=np.int64), reader.choice) if self.plan.outside else None
        )

    def inside(self, heard: Heard) -> Rows | None:
        claim = int(self.claimed.deciding[heard.sender, heard.receiver, heard.group])
        if claim not in self.plan.claims or not self.claimed.claims[claim].members:
            return None
        return self._others(np.array(self.claimed.claims[claim].members), heard.choice)

    def _others(self, members: Int64[np.ndarray, " image"], choice: int) -> Rows:
        return others(members, np.random.default_rng([*self.seed, choice]))


def others(members: Int64[np.ndarray, " image"], rng: np.random.Generator) -> Rows:
    """For each image another one with the same label, all others being equally likely; itself if it has none.

    Example:
        >>> others(np.array([0, 1, 0, 2, 1]), np.random.default_rng(0)).tolist()
        [2, 4, 0, 3, 1]
    """
    order = np.argsort(members, kind="stable")
    sizes = np.bincount(members)
    size, first = sizes[members[order]], (np.cumsum(sizes) - sizes)[members[order]]
    steps = rng.integers(1, np.maximum(size, 2))
    found = np.empty_like(order)
    found[order] = order[first + (np.arange(len(order)) - first + steps) % size]
    return found


# -- inside --------------------------------------------------------------------------------------


def _checked(prepared: PreparedTask) -> PreparedTask:
    """Refuse a task or a model in which one image cannot stand in for another."""
    if len(prepared) == 1 and prepared.corrupt is None:
        raise DataError("there is no other image to stand in for a single one: give two or more")
    if prepared.denoising:
        raise OptionError(
            "scrubbing exchanges images and restores nothing: give a task with direction='noising'"
        )
    if prepared.groups is not None and prepared.groups.members.ndim == 2:
        raise OptionError(
            "token groups that differ from image to image cannot be exchanged between images: give groups of "
            "the same tokens for all, such as groups='kind'"
        )
    if prepared.model.edited_images is not None:
        raise OptionError(
            f"edits or source groups of {prepared.model.name} have a value for each image, and images are "
            "exchanged: give one value for all"
        )
    if kept := [name for stage in prepared.graph.stages for name in stage.kept]:
        raise OptionError(
            f"the edges of {kept[0]} are kept in every run and belong to no circuit, so that no claim says "
            "what they carry: refine the model without error='kept', with the error as a node"
        )
    return prepared


def _measured(
    prepared: PreparedTask, logits: Float[Tensor, "run image class"], runs: TreeRuns
) -> Float[NDArray[np.float64], "run image"]:
    """The metric of logits that are taken for those of the clean images."""
    n = len(prepared)
    values = prepared.metric(logits, runs.plain.logits[:n], torch.arange(n)).double().cpu().numpy()
    if not np.isfinite(values).all():
        raise DataError(
            f"the metric {prepared.metric.label} is NaN or infinite: choose one that is always finite"
        )
    return np.asarray(values)


def _floor(prepared: PreparedTask, runs: TreeRuns) -> Float[NDArray[np.float64], " image"]:
    """The mean metric of each image over the logits of all others."""
    n, count = len(prepared), len(runs)
    total, own = np.zeros(n), torch.arange(n)
    for start in range(1, count, AT_ONCE):
        steps = torch.arange(start, min(start + AT_ONCE, count))
        total += _measured(prepared, runs.plain.logits[(own + steps[:, None]) % count], runs).sum(axis=0)
    return total / max(count - 1, 1)


def _check_effect(prepared: PreparedTask, original: ArrayLike, floor: ArrayLike, settings: Bootstrap) -> None:
    try:
        check_effect(
            original, floor, label=prepared.metric.label, names=prepared.clean.names, level=settings.level,
            n_resamples=settings.n_resamples, seed=settings.seed,
        )  # fmt: skip
    except DataError as error:
        raise DataError(
            f"{error}. Scrubbing compares each image with logits of others: the metric has to differ between "
            "them, as with PerPair() classes, one for each image, or with corrupt images of another class"
        ) from error


def _flipped(share: Estimate, lost: float) -> Estimate:
    """What is lost where a share is recovered."""
    if share.low is None or share.high is None:
        return Estimate(lost)
    return Estimate(lost, 1 - share.high, 1 - share.low)
