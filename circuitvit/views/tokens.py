"""Token ablations: what is lost without some tokens, by several ways of losing them side by side.

| way | what becomes of the tokens |
| --- | --- |
| `remove` | nobody attends to them from there on: the same as a model run without them |
| `mean` | each is the mean over all images at its place |
| `shuffle` | each is that of another image at its place (no image keeps its own) |
| `zero` | each is 0, which no image brings about |

A vector of zeros is unlike anything that the layers after it have seen, and what breaks then is no measure of
what the tokens carry: means and shuffles stay closer to what the model knows (on registers zeroing costs tens
of points of accuracy where means cost one or two).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import activations, progress_bar
from circuitvit.errors import DataError, OptionError, unknown_name
from circuitvit.export.style import INK, MUTED
from circuitvit.graph import is_residual
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model, knock_out
from circuitvit.models.sites import Site, matching
from circuitvit.models.tokens import PATCH, Groups, TokenSpec, chosen
from circuitvit.tasks import Batch, PreparedTask, Task, TokenGroups
from circuitvit.verification.statistics import Estimate
from circuitvit.views.outcomes import (
    FIGURES,
    Changed,
    Figure,
    MetricSpec,
    Outcomes,
    always,
    few_images,
    outcomes,
    question,
    told,
)
from circuitvit.views.subjects import ImageSpec

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Way = Literal["remove", "mean", "shuffle", "zero"]
Tokens = TokenSpec | float
"""Tokens by kind, number, place, group or mask; or a share of the patches, drawn for each image."""

ZEROING = (
    "zeroing alone overstates: 0 is no state that a token is ever in, and what it breaks can be tens of "
    "points of accuracy where means and shuffles cost one or two; go by those"
)


@dataclass(frozen=True, eq=False, repr=False)
class TokenAblations(Result):
    """What is lost without some tokens.

    Attributes:
        tokens: names of the sets of tokens.
        counts: how many tokens each has, the mean over images.
        ways: of losing them.
        site: the stream at which they are lost.
        outcomes: for every set and way, arrays `(tokens, way, image)`; see `Outcomes`.
        caveats: what to bear in mind.
    """

    tokens: tuple[str, ...]
    counts: tuple[float, ...]
    ways: tuple[str, ...]
    site: str
    outcomes: Outcomes
    caveats: tuple[str, ...]

    along = "tokens:set counts:set"

    def records(self) -> Iterator[Record]:
        """One row for each set of `tokens`, `way` of losing them and `image`: the metric `before` and
        `after`, `kl` in nats, and whether the top class `flips`."""
        return self.outcomes.columns(
            {"tokens": self.tokens, "way": self.ways}, self.outcomes.after.shape[:-1]
        )

    def _check(self) -> None:
        self.outcomes.check_changes(len(self.tokens), len(self.ways))

    def estimate(self, tokens: str, way: str, of: Figure = "metric") -> Estimate:
        """One effect with its bootstrap interval over images; of flips the exact interval.

        Raises:
            NameNotFoundError: for other tokens, or another way.
        """
        for name, known, kind in ((tokens, self.tokens, "set of tokens"), (way, self.ways, "way")):
            if name not in known:
                raise unknown_name(kind, name, known)
        return self.outcomes.estimate((self.tokens.index(tokens), self.ways.index(way)), of)

    def figure(self) -> Picture:
        """Bars by way, one panel each for top class, KL and metric; whiskers are 95 % intervals."""
        from circuitvit.views import canvas

        shown: list[Figure] = ["metric"] if self.outcomes.kl is None else ["flips", "kl", "metric"]
        with canvas.styled():
            high = 1.1 + 0.24 * len(self.tokens) * (len(self.ways) + 1)
            title = f"Without some tokens, from {self.site} on ({len(self.outcomes.images)} images)"
            figure = canvas.blank(1.2 + 2.3 * len(shown), high, title)
            axes = canvas.panels(figure, len(shown), len(shown))
            for axis, of in zip(axes, shown, strict=True):
                for place, way in enumerate(self.ways):
                    for row, name in enumerate(self.tokens):
                        found = self.estimate(name, way, of)
                        at = row * (len(self.ways) + 1) + place
                        axis.barh(at, found.value, color=canvas.PALETTE[place], height=0.8,
                                  label=way if row == 0 else None)  # fmt: skip
                        if found.low is not None and found.high is not None:
                            axis.plot([found.low, found.high], [at, at], color=INK, linewidth=0.9)
                axis.invert_yaxis()
                axis.axvline(0, color=MUTED, linewidth=0.6)
                middles = np.arange(len(self.tokens)) * (len(self.ways) + 1) + (len(self.ways) - 1) / 2
                names = [
                    f"{canvas.label(name)} ({count:g})"
                    for name, count in zip(self.tokens, self.counts, strict=True)
                ]
                axis.set_yticks(middles, names if of == shown[0] else [""] * len(names))
                said = FIGURES[of].split(",")[0]
                axis.set_xlabel(
                    canvas.label(self.outcomes.metric, 34) + ", change" if of == "metric" else said
                )
            axes[-1].legend(frameon=False, fontsize=7)
        return figure

    def __repr__(self) -> str:
        what = ", ".join(f"{name} ({count:g})" for name, count in zip(self.tokens, self.counts, strict=True))
        first = ", ".join(f"{way} {told(self.estimate(self.tokens[0], way), 'metric')}" for way in self.ways)
        return f"TokenAblations({what} at {self.site}; {self.outcomes.metric} of {self.tokens[0]}: {first})"


@running
def token_ablations(
    model: Model,
    images: ImageSpec | Task,
    tokens: Tokens | Mapping[str, Tokens],
    *,
    ways: Sequence[Way] | None = None,
    site: str = "resid0",
    groups: Groups | None = None,
    metric: MetricSpec | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> TokenAblations:
    """What is lost without some tokens: top class, KL and a metric, by several ways side by side.

    Args:
        model: from `load`, `wrap` or `edit`.
        images: preprocessed images or paths; or a task, whose clean images and metric are meant.
        tokens: kinds ("reg", "cls+reg"), numbers, places ("patch(2,3)"), groups, a boolean mask `(token,)` or
            `(image, token)`; or a number between 0 and 1: a share of the patches, drawn anew for each image.
            Several by name: `{"registers": "reg", "a tenth": 0.1}`.
        ways: of losing them: "remove", "mean", "shuffle", "zero"; all that there are by default. A token
            that the readout itself reads cannot be removed.
        site: the stream at which they are lost: "resid0" at the start, "resid6" before block 6.
        groups: token groups whose names may be used, such as `TokenGroups.from_masks`.
        metric: for images: a metric or its name; the logit of the predicted class by default.
        seed: of the shuffle, and of the share of patches.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown way, site, metric or class.
        OptionError: if there are no such tokens, or the readout reads those to be removed.
        DataError: if images cannot be read, or there is but one, which has no other to be shuffled with.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> found = token_ablations(cv.load("catdog-tiny"), catdog_pairs(6, seed=0).clean, 0.25)
        >>> found.ways, found.outcomes.after.shape
        (('remove', 'mean', 'shuffle', 'zero'), (1, 4, 6))
    """
    for way in ways or ():
        if way not in get_args(Way):
            raise unknown_name("way of losing tokens", way, get_args(Way))
    place = _stream(model, site)
    prepared = question(model, images, metric)
    sets = _sets(model, tokens, groups, prepared, seed)
    read = {name: _read_by_readout(model, mask) for name, mask in sets.items()}
    if "remove" in (ways or ()) and (refused := [name for name, is_read in read.items() if is_read]):
        raise OptionError(
            f"the readout of {model.name} reads {refused[0]}: it cannot be removed; use mean or shuffle, or "
            "knock_outs to take away who attends to it"
        )
    taken = tuple(ways or (way for way in get_args(Way) if way != "remove" or not any(read.values())))
    if {"mean", "shuffle"} & set(taken) and len(prepared) < 2:
        raise DataError("a single image has no mean of others and none to be shuffled with: give at least 2")
    mean = _mean(prepared, site, batch_size, progress) if "mean" in taken else None
    others = derangement(len(prepared), seed)
    values = {"mean": mean}
    changes = [
        _change(prepared, place, mask, way, values.get(way), others)
        for mask in sets.values()
        for way in taken
    ]
    found = outcomes(prepared, changes, "token ablations", batch_size, progress)
    unlost = "" if ways else "+".join(name for name, is_read in read.items() if is_read)
    caveats = (
        *((ZEROING,) if "zero" in taken else ()),
        *((f"nothing is removed: the readout reads {unlost} itself",) if unlost else ()),
        *few_images(len(prepared)),
    )
    counts = tuple(float(mask.double().sum(dim=-1).mean()) for mask in sets.values())
    return TokenAblations(tuple(sets), counts, taken, site, found.reshaped(len(sets), len(taken)), caveats)


def derangement(count: int, seed: int) -> NDArray[np.int64]:
    """For each image another one, drawn so that none is its own: one round through all of them.

    Example:
        >>> bool((derangement(5, seed=0) != np.arange(5)).all())
        True
    """
    order = np.random.default_rng(seed).permutation(count)
    others = np.empty(count, dtype=np.int64)
    others[order] = np.roll(order, 1)
    return others


# -- which tokens --------------------------------------------------------------------------------


def _stream(model: Model, name: str) -> Site:
    found = matching(model.all_sites, name)
    if len(found) != 1 or found[0].kind != "stream":
        raise OptionError(f"tokens are lost from the stream, at one place such as 'resid0', not at {name!r}")
    return found[0]


def _sets(
    model: Model,
    tokens: Tokens | Mapping[str, Tokens],
    groups: Groups | None,
    prepared: PreparedTask,
    seed: int,
) -> dict[str, Bool[Tensor, " token"] | Bool[Tensor, "image token"]]:
    """Masks of the sets of tokens, by name."""
    named = tokens if isinstance(tokens, Mapping) else {_name(tokens): tokens}
    if not named:
        raise OptionError("no tokens are named: write, for example, 'reg', or 0.1 for a tenth of the patches")
    kinds = model.token_kinds(model.tokens_at(*prepared.clean.shape[-2:]))
    found = {}
    for name, spec in named.items():
        mask = (
            _share(spec, kinds, len(prepared), seed)
            if isinstance(spec, float)
            else chosen(spec, kinds, lambda: model.grid_at(*prepared.clean.shape[-2:]), groups).of(kinds)
        )
        if mask is None or not mask.any():
            raise OptionError(f"{name!r} is {'no token' if mask is not None else 'all tokens'}: name some")
        if mask.ndim == 2 and len(mask) != len(prepared):
            raise DataError(f"{name!r} is for {len(mask)} images, and there are {len(prepared)}")
        found[name] = mask
    return found


def _name(tokens: Tokens) -> str:
    if isinstance(tokens, float):
        return f"{tokens:.0%} of the patches"
    if isinstance(tokens, Tensor):
        return "masked tokens"
    return tokens if isinstance(tokens, str) else "+".join(map(str, np.atleast_1d(tokens)))  # type: ignore[arg-type]


def _share(share: float, kinds: Sequence[str], images: int, seed: int) -> Bool[Tensor, "image token"]:
    """A share of the patches, drawn for each image."""
    if not 0 < share < 1:
        raise OptionError(f"a share of the patches lies between 0 and 1, not {share:g}")
    patches = torch.tensor([kind == PATCH for kind in kinds])
    count, rng = int(patches.sum()), np.random.default_rng(seed)
    taken = max(1, round(share * count))
    order = np.argsort(rng.random((images, count)), axis=1)
    mask = torch.zeros(images, len(kinds), dtype=torch.bool)
    mask[:, patches] = torch.from_numpy(order < taken)
    return mask


def _read_by_readout(model: Model, mask: Tensor) -> bool:
    """Whether the readout reads any of the tokens itself, rather than what attention has made of them."""
    bare = model.bare or model
    pools = [
        stage.nodes for stage in bare.stages if stage.nodes.pools and is_residual(stage.nodes.reads_from)
    ]
    if pools:
        return any(nodes.kind != "attention" for nodes in pools)
    return bool((mask if bare.leading is None else mask[..., : bare.leading]).any())


# -- what is changed -----------------------------------------------------------------------------


def _change(
    prepared: PreparedTask,
    site: Site,
    mask: Tensor,
    way: Way,
    value: Tensor | None,
    others: NDArray[np.int64],
) -> Changed:
    """One ablation, which is made once where it is the same for all images."""
    if mask.ndim == 1 and way != "shuffle":
        return always(_lost(prepared.model, site, mask, way, value))
    return partial(_for_batch, prepared, site, mask, way, value, others)


def _for_batch(
    prepared: PreparedTask,
    site: Site,
    mask: Tensor,
    way: Way,
    value: Tensor | None,
    others: NDArray[np.int64],
    batch: Batch,
) -> Model:
    model = prepared.model
    if way == "shuffle":
        donors = torch.cat([prepared.clean.take(row, row + 1) for row in others[batch.rows.numpy()].tolist()])
        value = activations(model, donors, site.name, batch_size=len(donors), progress=False)[site.name]
    return _lost(model, site, mask if mask.ndim == 1 else mask[batch.rows], way, value)


def _lost(model: Model, site: Site, mask: Tensor, way: Way, value: Tensor | None) -> Model:
    groups = TokenGroups(("kept", "lost"), mask.long())
    if way != "remove":
        return model.edit({f"{site.name}@lost": 0 if value is None else value}, groups=groups)
    heads = [
        each.node
        for each in model.all_sites
        if each.kind == "pattern" and each.stage >= site.stage and _reads_stream(model, each)
    ]
    if not heads:
        raise OptionError(f"nobody attends to anything from {site.name} on: name an earlier stream")
    return model.edit({f"{head}.pattern@lost->all": knock_out() for head in heads}, groups=groups)


def _reads_stream(model: Model, site: Site) -> bool:
    return is_residual((model.bare or model).stages[site.stage].nodes.reads_from)


def _mean(prepared: PreparedTask, site: str, batch_size: int | None, progress: bool) -> Tensor:
    """The mean stream over all images, token by token, `(token, d_model)`."""
    model = prepared.model
    total: Tensor | None = None
    size = model.batch_of(len(prepared), 32 if batch_size is None else batch_size)
    with progress_bar(len(prepared), "means", progress) as bar:
        for batch in prepared.batches(size):
            streams = activations(model, batch.base, site, batch_size=len(batch.base), progress=False)[site]
            own = streams.double().sum(dim=0)
            total = own if total is None else total + own
            bar.update(len(batch.base))
    assert total is not None, "there is at least one image"
    return (total / len(prepared)).to(model.dtype)
