"""Units: what a node writes as a sum over its neurons, or over the features of a dictionary.

    y = sum over units of u_n d_n  +  rest  +  error

`u_n` is the unit's activation at a token and `d_n` its direction in the residual stream: a column of the
MLP's last layer, or a row of a decoder. `rest` is what is written without any unit, the layer's or
the decoder's bias; `error` is what a dictionary misses, 0 for neurons. Units are read from a captured run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.reading import output_of
from circuitvit.engine.references import mean_images, reference_source
from circuitvit.engine.runs import Capture, capture
from circuitvit.errors import ModelError, OptionError, UnsupportedModelError
from circuitvit.models import Model
from circuitvit.models.fine import ERROR, REST, directions_of
from circuitvit.models.sites import Site, heads_of
from circuitvit.models.stages import Reads, Stage
from circuitvit.tasks import Batch, Constants, Mean, Noise, PreparedTask, Zero
from circuitvit.tasks.task import batches_of

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class UnitPlace:
    """A node, or a stream, that is a sum over units.

    Attributes:
        model: whose.
        site: of the neurons ("hidden"), or what a dictionary stands for: an output, a head's z, a stream.
        dictionary: fitted to the site, whose features are the units; None for neurons, and for the
            coordinates of a head's z or of an output.
        chosen: numbers of the units that are told apart, all others being in the rest; None for all.
    """

    model: Model
    site: Site
    dictionary: Any | None = None
    chosen: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        edited = any(
            change.site.kind == "output" and change.site.node == self.site.node for change in self.model.edits
        )
        if edited and self.site.kind in ("hidden", "z"):
            units = "neurons" if self.dictionary is None else "features of its z"
            raise UnsupportedModelError(f"what {self.site.node} writes is edited: it is no sum over {units}")

    @property
    def count(self) -> int:
        """The number of its units."""
        return int(self.site.shape[-1] if self.dictionary is None else self.dictionary.n_features)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of what is told apart: units, the rest and, of a dictionary, the error."""
        numbers = range(self.count) if self.chosen is None else self.chosen
        letter, remainders = ("n", (REST,)) if self.dictionary is None else ("f", (REST, ERROR))
        return tuple(
            f"{self.site.node}.{each}" for each in (*(f"{letter}{at}" for at in numbers), *remainders)
        )

    # -- where it is ---------------------------------------------------------------------------------

    @cached_property
    def stage(self) -> int:
        """The number of the stage that computes it, or reads it if it is a stream."""
        own = [place for place, stage in enumerate(self.model.stages) if stage.nodes.kind != "edit"]
        return own[self.site.stage]

    @property
    def after(self) -> int:
        """The number of the first stage that reads what the units write."""
        return self.stage if self.site.kind == "stream" else self.stage + 1

    @cached_property
    def _branch(self) -> int:
        """Which of the stages side by side it is in."""
        parts = self._bare.branches
        return next(place for place, part in enumerate(parts) if self.site.node in part.nodes.senders)

    @property
    def _bare(self) -> Stage:
        """Its stage as it is without edits."""
        return (self.model.bare or self.model).stages[self.site.stage]

    # -- what is there in a run ----------------------------------------------------------------------

    def units(
        self, stages: Sequence[Stage], run: Capture, images: slice = ALL
    ) -> Float[Tensor, "image token unit"]:
        """The units' activations.

        Args:
            stages: that were run, the model's own or the essential ones.
            run: of them.
            images: of the run.
        """
        if self.dictionary is None:
            if self.site.kind != "hidden":
                return self._encoded(stages, run, images)
            return self._part(stages).hidden(self._reads(stages, run, images))
        units: Tensor = self.dictionary.encode(self._encoded(stages, run, images))
        return units

    def _encoded(self, stages: Sequence[Stage], run: Capture, images: slice) -> Tensor:
        """What a dictionary reads."""
        if self.site.kind == "stream":
            return run.stream(self.stage)[images]
        if getattr(self.dictionary, "reads", "output") == "input":
            return self._reads(stages, run, images)[0]
        if self.site.kind == "output":
            return self.written(stages, run, images)
        part, reads = self._part(stages), self._reads(stages, run, images)
        mixed = part.mixed(reads, self._compact(stages, run, images))
        return mixed[:, heads_of(part).index(self.site.node)]

    def written(
        self, stages: Sequence[Stage], run: Capture, images: slice = ALL
    ) -> Float[Tensor, "image token d_model"]:
        """What the node writes to the stream, or the stream itself: the sum of units, rest and error."""
        if self.site.kind == "stream":
            return run.stream(self.stage)[images]
        return output_of(self._part(stages), self._compact(stages, run, images), self.site.node)

    def _part(self, stages: Sequence[Stage]) -> Stage:
        return stages[self.stage].branches[self._branch]

    def _reads(self, stages: Sequence[Stage], run: Capture, images: slice) -> Reads:
        return self._part(stages).read(run.stream(self.stage)[images])

    def _compact(self, stages: Sequence[Stage], run: Capture, images: slice) -> Tensor:
        return stages[self.stage].split(run.compacts[self.stage][images])[self._branch]

    # -- what units write ----------------------------------------------------------------------------

    @property
    def ways(self) -> tuple[Float[Tensor, "unit d_model"], Float[Tensor, " d_model"]]:
        """What each unit writes at an activation of 1, and what is written when all are 0."""
        if self.dictionary is not None:
            return self._decoded
        if self.site.kind == "hidden":
            return self._bare.branches[self._branch].columns()
        width = self.site.shape[-1]
        own = torch.eye(width, device=self.model.device, dtype=self.model.dtype)
        return (self._out if self.site.kind == "z" else own), own.new_zeros(self.model.d_model)

    @cached_property
    @torch.no_grad()
    def _decoded(self) -> tuple[Tensor, Tensor]:
        assert self.dictionary is not None, "neurons have columns"
        rows = directions_of(self.dictionary, range(self.count))
        bias = self.dictionary.decode(rows.new_zeros(self.count))
        return (rows @ self._out, bias @ self._out) if self.site.kind == "z" else (rows, bias)

    @property
    def _out(self) -> Float[Tensor, "d_head d_model"]:
        """A head's way from its z to the stream."""
        part, width = self._bare.branches[self._branch], self.site.shape[-1]
        basis = torch.eye(width, device=self.model.device, dtype=self.model.dtype)
        place = heads_of(part).index(self.site.node)
        alone = basis.new_zeros(width, len(heads_of(part)), 1, width)
        alone[:, place, 0] = basis
        return part.expand(alone)[place, :, -1]


# -- what replaces units -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class UnitChanges:
    """What ablating units changes in the runs of one batch: their reference values minus those of the run.

    Attributes:
        model: that was run.
        base: the run, at the tokens that matter.
        other: the run that references come from, where they come from one.
        means: the means of units, nodes and the source over images, for "mean"; None for zeros too.
    """

    model: Model
    base: Capture
    other: Capture | None = None
    means: Means | None = None

    def of_units(self, place: UnitPlace, images: slice) -> Float[Tensor, "image token unit"]:
        """How far the units' activations change."""
        own = place.units(self.model.essential, self.base, images)
        if self.other is not None:
            return place.units(self.model.essential, self.other, images) - own
        return -own if self.means is None else _cut(self.means.units[place], own) - own

    def of_node(self, place: UnitPlace, images: slice) -> Float[Tensor, "image token d_model"]:
        """How far all that the node writes changes, in the stream."""
        own = place.written(self.model.essential, self.base, images)
        if self.other is not None:
            return place.written(self.model.essential, self.other, images) - own
        return -own if self.means is None else _cut(self.means.nodes[place], own) - own

    def of_rest(self, rest: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """How far what is written without any unit changes: it is the same in every run."""
        return -rest if self.other is None and self.means is None else torch.zeros_like(rest)

    def of_input(self) -> Float[Tensor, "batch token d_model"]:
        """How far the stream that the first layer reads changes."""
        source, own = self.model.stages[0], self.base.compacts[0]
        other = self.other.compacts[0] if self.other is not None else None
        if other is None:
            other = torch.zeros_like(own) if self.means is None else self.means.source
        return source.expand(other - own).sum(dim=0)


@dataclass(frozen=True, eq=False)
class Means:
    """Means over the images of a "mean" ablation, `(1, token or 1, width)` each.

    Attributes:
        units: of every place's units.
        nodes: of all that every place writes.
        source: of what the source writes, in compact form.
    """

    units: dict[UnitPlace, Tensor]
    nodes: dict[UnitPlace, Tensor]
    source: Tensor


def _cut(mean: Tensor, own: Tensor) -> Tensor:
    """A mean at the tokens that are there."""
    return mean[:, : own.shape[1]]


def unit_changes(
    prepared: PreparedTask, places: Sequence[UnitPlace], batch_size: int
) -> Callable[[Batch, Capture], UnitChanges]:
    """How the task's ablation changes units, from a batch and its base run; means are computed here, once.

    Raises:
        OptionError: for an ablation that is made for whole nodes.
    """
    model, ablation = prepared.model, prepared.ablation
    if isinstance(ablation, (Noise, Constants)):
        raise OptionError(
            f"{type(ablation).__name__.lower()} ablation is made for whole nodes and says nothing of their "
            "neurons and features: use 'patch', 'zero', 'mean' or 'resample'"
        )
    if isinstance(ablation, Zero):
        return lambda batch, base: UnitChanges(model, base)
    if isinstance(ablation, Mean):
        means = _means(prepared, ablation, places, batch_size)
        return lambda batch, base: UnitChanges(model, base, means=means)
    references = reference_source(prepared, batch_size)

    def another(batch: Batch, base: Capture) -> UnitChanges:
        made = references.make(batch, base)
        assert made.compacts is not None, "of patch and resample"
        assert made.streams is not None, "of patch and resample"
        return UnitChanges(model, base, Capture(made.streams, made.compacts, base.essential))

    return another


@torch.no_grad()
def _means(prepared: PreparedTask, ablation: Mean, places: Sequence[UnitPlace], batch_size: int) -> Means:
    """Each unit's own mean: that of a feature is not the feature of the mean."""
    model, count = prepared.model, 0
    total: list[Tensor] = []
    for images in mean_images(prepared, ablation):
        for batch in batches_of(model, images, batch_size):
            run, stages = capture(model, batch), model.stages
            each = [place.units(stages, run).sum(dim=0, keepdim=True) for place in places]
            each += [place.written(stages, run).sum(dim=0, keepdim=True) for place in places]
            each += [run.compacts[0].sum(dim=0, keepdim=True)]
            total = [one.add_(other) for one, other in zip(total, each, strict=True)] if total else each
            count += len(batch)
    if not all(each.isfinite().all() for each in total):
        raise ModelError("the mean of the units is NaN or infinite: check the images to average")
    means = [each / count for each in total]
    if not ablation.per_token:
        means = [each.mean(dim=-2, keepdim=True) for each in means]
    of_units, of_nodes = means[: len(places)], means[len(places) : -1]
    return Means(
        dict(zip(places, of_units, strict=True)), dict(zip(places, of_nodes, strict=True)), means[-1]
    )
