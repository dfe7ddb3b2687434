"""Unit scores: each neuron of an MLP, or feature of a dictionary, ablated for everything that hears it.

    eap     s(n) = sum over tokens of (r_n - u_n) d_n . d metric / d (the stream after the node)
    eap-ig  the same with the mean of the gradient along the path between the two inputs
    exact   s(n) = metric(u_n replaced by r_n) - metric(base),  one run from the next stage on for each unit

`u_n` is the unit's activation, `r_n` its reference, and `d_n` what it writes at an activation of 1, see
`circuitvit.engine.units`.
A single backward pass gives the gradients at the streams; units are then computed node by node, a few images
at a time, and nothing is kept of them but their scores.

Syed, Rager and Conmy 2023, "Attribution patching outperforms automated circuit discovery", arXiv:2310.10348;
Marks et al. 2024, "Sparse feature circuits", arXiv:2403.19647, for features and the error of a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.attribution.eap import objective
from circuitvit.attribution.paths import path_nodes
from circuitvit.attribution.scoring import check_gradient, provenance_of, require_gradient, require_slope
from circuitvit.engine import (
    Capture,
    UnitChanges,
    UnitPlace,
    capture,
    check_logits,
    choose_batch_size,
    members_at,
    progress_bar,
    run_from,
    slopes_of_streams,
    unit_changes,
)
from circuitvit.errors import OptionError, check_whole, unknown_name
from circuitvit.graph import UnitScores
from circuitvit.models import Model, Units, features
from circuitvit.models.dictionaries import fitted
from circuitvit.models.sites import matching
from circuitvit.tasks import Batch, PreparedTask, Task, prepare

UNIT_METHODS = ("eap", "eap-ig", "exact")

STEPS = 5
"""Points on the path of "eap-ig", unless told otherwise."""

ENTRIES = 2**21
"""Activations of units that are computed together: enough for large products, few enough for any memory."""


@running
def attribute_units(
    model: Model,
    task: Task | PreparedTask,
    units: Mapping[str, Any],
    method: str = "eap",
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> UnitScores:
    """Score the neurons of MLPs and the features of dictionaries for a task, each by itself.

    By "eap" all neurons of a model cost about as much as its edges do. A node's units, with `rest` (what it
    writes without any of them) and `error` (what a dictionary misses), sum to the node's own score by
    `attribute_nodes(model, task, "atp")`. With token groups, each group of a unit has its own score.

    Each unit is ablated as if it were a node: to 0, or to its own mean over images, or to what it is on
    another image. Noise and constants are made for whole nodes, and are refused.

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation; its token groups tell a unit's tokens apart.
        units: by the names of nodes, which may hold a `*`: `cv.neurons()` of MLPs; `cv.features(dictionary)`,
            or a dictionary alone, of what an MLP writes, a head's z ("a9.h2") or a stream ("resid6"). Where
            numbers are given, all others are in `rest`. A whole name goes before one with a `*`.
        method: "eap", "eap-ig", or "exact", which runs the rest of the model once for each unit.
        steps: points on the path of "eap-ig"; 5 by default.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown method or node.
        OptionError: for units that a node does not have, or a metric or an ablation that cannot be used.
        UnsupportedModelError: for an MLP whose neurons are not known, or a node whose output is edited.
        DataError: if the images cannot be used, or the metric is flat.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> cv.attribute_units(model, task, {"m*": cv.neurons()}).strongest(3)  # doctest: +SKIP
    """
    if method not in UNIT_METHODS:
        raise unknown_name("method", method, UNIT_METHODS)
    if steps is not None and method != "eap-ig":
        raise OptionError(f"{method} takes no steps: they are of 'eap-ig'")
    check_whole("steps", STEPS if steps is None else steps)
    prepared = prepare(model, task, progress)
    if method != "exact":
        (require_slope if method == "eap" else require_gradient)(prepared, method)
    places = unit_places(model, units)
    size = batch_size or choose_batch_size(prepared, memory)
    work = _Work(prepared, places, size, steps or STEPS)
    score, passes = {
        "eap": (work.first_order, 1),
        "eap-ig": (work.integrated, steps or STEPS),
        "exact": (work.exact, sum(len(each.names) for each in places)),
    }[method]
    total = np.zeros((sum(len(each.names) for each in places), len(prepared.graph.groups)))
    with progress_bar(len(prepared) * passes, f"units, {method}", progress) as bar:
        for batch in prepared.batches(size):
            total += np.concatenate(score(batch, bar.update))
    if method != "exact":
        check_gradient(prepared, torch.from_numpy(total))
    provenance = provenance_of(prepared, f"units, {method}")
    if method == "eap-ig":
        provenance = provenance.with_parameters(steps=steps or STEPS)
    names = tuple(name for each in places for name in each.names)
    total /= len(prepared)
    return UnitScores(names, prepared.graph.groups, total, method, prepared.direction, provenance)


# -- what is asked for -------------------------------------------------------------------------------


def unit_places(model: Model, units: Mapping[str, Any]) -> list[UnitPlace]:
    """The nodes whose units are asked for, in the order in which the model runs them.

    Args:
        model: whose.
        units: by names, see `attribute_units`.

    Raises:
        NameNotFoundError: for an unknown node.
        OptionError: for units that a node does not have.
        UnsupportedModelError: for an MLP whose neurons are not known, or a node whose output is edited.
    """
    given: Any = units
    if not isinstance(given, Mapping) or not given:
        raise OptionError('units are asked for by node, such as {"m*": cv.neurons()}')
    check_nodes(given)
    found: dict[str, UnitPlace] = {}
    for key in sorted(units, key=lambda key: "*" not in key and "?" not in key):  # whole names last
        each = units[key]
        for place in _meant(model, key, each if isinstance(each, Units) else features(each)):
            found[place.site.node] = place
    return sorted(found.values(), key=lambda place: (place.after, place.site.kind == "stream"))


def check_nodes(units: Mapping[Any, object]) -> None:
    """Refuse units that are not asked for by names."""
    wrong = next((key for key in units if not isinstance(key, str)), None)
    if wrong is not None or None in units:
        raise OptionError(f"units are asked for by the names of nodes, such as 'm5', not by {wrong!r}")


def _meant(model: Model, key: str, units: Units) -> Iterator[UnitPlace]:
    """What is asked for by one name, which may mean several nodes."""
    sites = model.all_sites
    if key in (model.bare or model).refinements and key not in sites.names:
        raise OptionError(f"{key} is refined already: score its units in the model before that")
    if units.dictionary is None:
        found = [(site, None) for site in matching(sites, f"{key.removesuffix('.hidden')}.hidden")]
    else:
        heads = {site.node: site for site in sites if site.kind == "z"}
        own = matching(sites, key.removesuffix(".z"))
        other = next((site for site in own if site.kind not in ("output", "stream")), None)
        if other is not None:
            raise OptionError(
                f"a dictionary stands for what a node writes, or for a stream, not {other.name}"
            )
        whole = [heads.get(site.node, site) for site in own]
        found = [(site, fitted(units.dictionary, site.name, site.shape[-1], model)) for site in whole]
    for site, dictionary in found:
        place = UnitPlace(model, site, dictionary, units.chosen)
        wrong = [number for number in units.chosen or () if not 0 <= number < place.count]
        if wrong:
            raise OptionError(
                f"{site.node} has no {units.what} {wrong[0]}: it has {place.count:,}, counted from 0"
            )
        yield place


# -- scoring a batch ---------------------------------------------------------------------------------

Found = list[NDArray[np.float64]]
"""For each node the scores `(unit, group)`, summed over the images of a batch."""

Advance = Callable[[int], object]


class _Work:
    """What the methods share.

    Args:
        prepared: the task.
        places: the nodes.
        batch_size: pairs at once.
        steps: of the path.
    """

    def __init__(
        self, prepared: PreparedTask, places: Sequence[UnitPlace], batch_size: int, steps: int
    ) -> None:
        self.prepared, self.places, self.steps = prepared, places, steps
        self.model = prepared.model
        self.read = {each.after for each in places}
        self.changes = unit_changes(prepared, places, batch_size)

    def first_order(self, batch: Batch, advance: Advance) -> Found:
        """Slopes at the base run."""
        with torch.no_grad():
            embedded = self.model.stages[0].write(self.model.stages[0].read(batch.base))
        metric = objective(self.prepared, batch)
        base, slopes = slopes_of_streams(self.model, embedded, metric, self.read)
        check_logits(base.logits, batch)
        advance(len(batch.rows))
        return self._products(batch, self.changes(batch, base), slopes)

    def integrated(self, batch: Batch, advance: Advance) -> Found:
        """Mean slopes along the path from the reference input to the base input."""
        base, metric = self._base(batch)
        changes = self.changes(batch, base)
        clean, moved = base.stream(1), changes.of_input()
        total: dict[int, Tensor] = {}
        for place, weight in path_nodes(self.steps, "midpoint"):
            stream = clean + (1.0 - place) * moved
            _, slopes = slopes_of_streams(self.model, base.compacts[0], metric, self.read, stream)
            total = {at: slope * weight + total.get(at, 0.0) for at, slope in slopes.items()}
            advance(len(batch.rows))
        return self._products(batch, changes, total)

    def _base(self, batch: Batch) -> tuple[Capture, Callable[[Tensor], Tensor]]:
        base = capture(self.model, batch.base, essential=True)
        check_logits(base.logits, batch)
        return base, objective(self.prepared, batch, base.logits)

    @torch.no_grad()
    def _products(self, batch: Batch, changes: UnitChanges, slopes: Mapping[int, Tensor]) -> Found:
        """Changes times slopes: of every unit, of the rest, and of what the units leave of their node."""
        found, whole = [], self.model.edited_images is not None
        for place in self.places:
            slope, (directions, rest) = slopes[place.after], place.ways
            size = len(slope) if whole else max(1, ENTRIES // (slope.shape[1] * len(directions)))
            total = None
            for first in range(0, len(slope), size):
                images = slice(first, first + size)
                own, inside = slope[images], self._inside(batch, place, slope, images)
                units = _summed(changes.of_units(place, images) * (own @ directions.T), inside)
                unmoved = _summed((own @ changes.of_rest(rest))[..., None], inside)
                node = _summed((own * changes.of_node(place, images)).sum(dim=-1, keepdim=True), inside)
                part = torch.cat([units, unmoved, node - units.sum(dim=0) - unmoved])
                total = part if total is None else total + part
            assert total is not None, "there are images"
            found.append(_folded(place, total).cpu().numpy())
        return found

    @torch.no_grad()
    def exact(self, batch: Batch, advance: Advance) -> Found:
        """The rest of the model run anew for each unit."""
        base, metric = self._base(batch)
        whole, changes, found = metric(base.logits), self.changes(batch, base), []
        for place in self.places:
            stream, effects = base.stream(place.after), []
            inside = self._inside(batch, place, stream) or [stream.new_ones(1)]
            for change in _each_change(place, changes):
                each = [run_from(self.model, place.after, stream + change * part) for part in inside]
                moved = [metric(logits) for logits in each]
                effects.append([float((values - whole).double().sum()) for values in moved])
                advance(len(batch.rows))
            found.append(np.array(effects))
        return found

    def _inside(
        self, batch: Batch, place: UnitPlace, like: Tensor, images: slice = slice(None)
    ) -> list[Float[Tensor, "image token 1"]] | None:
        """For each token group 1 at its tokens and 0 elsewhere; None where tokens are not told apart."""
        members = members_at(self.prepared.graph, place.after, batch.members, like.shape[1])
        if members is None:
            return None
        members = members[images] if members.ndim == 2 else members[None]
        return [(members == group).to(like)[..., None] for group in range(len(self.prepared.graph.groups))]


def _each_change(place: UnitPlace, changes: UnitChanges) -> Iterator[Float[Tensor, "image token d_model"]]:
    """What ablating each of the units alone adds to the stream, in the order of their names."""
    all_images, (directions, rest) = slice(None), place.ways
    units, unmoved = changes.of_units(place, all_images), changes.of_rest(rest)
    numbers = list(range(len(directions)) if place.chosen is None else place.chosen)
    for number in numbers:
        yield units[..., number, None] * directions[number]
    others = units.clone()
    others[..., numbers] = 0.0
    yield others @ directions + unmoved
    if place.dictionary is not None:
        yield changes.of_node(place, all_images) - units @ directions - unmoved


def _summed(
    products: Float[Tensor, "image token unit"], inside: Sequence[Tensor] | None
) -> Float[Tensor, "unit group"]:
    """The sum over images and tokens, for each token group."""
    parts = [products] if inside is None else [products * part for part in inside]
    return torch.stack([part.sum(dim=(0, 1), dtype=torch.float64) for part in parts], dim=1)


def _folded(place: UnitPlace, scores: Float[Tensor, "unit+2 group"]) -> Float[Tensor, "name group"]:
    """Scores of all units, the rest and the error, as they are named: what has no name is in the rest."""
    units, others = scores[:-2], scores[-2:].clone()
    if place.dictionary is None:
        others = others[:1]
    if place.chosen is None:
        return torch.cat([units, others])
    chosen = units[list(place.chosen)]
    others[0] += units.sum(dim=0) - chosen.sum(dim=0)
    return torch.cat([chosen, others])
