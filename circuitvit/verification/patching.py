"""Activation patching maps: which head, MLP, layer or attention pattern, at which tokens, moves the decision.

Each cell of a map is one run: the component's activity at the tokens of its column is replaced by what it was
on the paired corrupt image, and the rest of the model goes on from there. (For a denoising task: clean
activity in the corrupt run.)

    >>> import circuitvit as cv
    >>> from circuitvit.datasets.catdog import catdog_pairs
    >>> model = cv.load("catdog-tiny")
    >>> task = cv.Task(*catdog_pairs(2), metric=cv.logit_diff("cat", "dog"))
    >>> found = patching_map(model, task, "mlps", tokens="kind", progress=False)
    >>> found.rows, found.columns, found.values.shape
    (('m0', 'm1', 'm2', 'm3'), ('all', 'cls', 'patch'), (4, 3, 2))

Heimersheim and Nanda 2024, "How to use and interpret activation patching", arXiv:2404.15255.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine import (
    BatchRun,
    Capture,
    Site,
    batch_runs,
    capture,
    choose_batch_size,
    patch_pattern,
    patch_sender,
    patch_stream,
    progress_bar,
)
from circuitvit.errors import DataError, OptionError
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task

SITES: tuple[Site, ...] = ("heads", "mlps", "stream", "patterns")

TokenSets = Literal["each", "kind", "all"] | Mapping[str, Sequence[int]]
"""Which tokens are patched together: each alone, all and each kind, all, or named sets of token numbers."""

Run = Callable[[BatchRun, Capture, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PatchingMap:
    """The metric and the top class under every patch.

    Attributes:
        site: "heads", "mlps", "stream" or "patterns".
        rows: names of what is patched, such as `a3.h1`, `m2`, or `before a3` for the residual stream.
        columns: names of the token sets.
        tokens: the tokens of each column.
        values: the metric, `(row, column, pair)`.
        tops: index of the top class, `(row, column, pair)`.
        base: the metric without a patch, `(pair,)`.
        base_tops: the top class without a patch, `(pair,)`.
        other: the metric of the run that activity comes from, `(pair,)`.
        other_tops: its top class, `(pair,)`.
        label: of the metric.
    """

    site: Site
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    values: Float[NDArray[np.float64], "row column pair"]
    tops: Int64[NDArray[np.int64], "row column pair"]
    base: Float[NDArray[np.float64], " pair"]
    base_tops: Int64[NDArray[np.int64], " pair"]
    other: Float[NDArray[np.float64], " pair"]
    other_tops: Int64[NDArray[np.int64], " pair"]
    label: str = ""

    @property
    def effect(self) -> Float[NDArray[np.float64], "row column"]:
        """Mean change of the metric, in its units."""
        return np.asarray((self.values - self.base).mean(axis=-1))

    @property
    def share(self) -> Float[NDArray[np.float64], "row column"]:
        """Of the way to the other run, as a ratio of means: 0 for no change, 1 for all of it.

        Raises:
            DataError: if the two runs do not differ in the metric.
        """
        way = float((self.other - self.base).mean())
        if abs(way) <= 1e-6 * max(float(np.abs(self.base).max()), 1e-6):
            raise DataError("the two runs do not differ in the metric: there is no share of the way")
        return self.effect / way

    @property
    def flipped(self) -> Float[NDArray[np.float64], "row column"]:
        """Share of pairs whose top class is another one than without the patch."""
        return np.asarray((self.tops != self.base_tops).mean(axis=-1))

    def heat_map(self, path: str | Path) -> Path:
        """Draw the mean change of the metric; the ending chooses the format, such as `.png` or `.svg`.

        Raises:
            OptionError: if matplotlib is not installed.
            FileError: if the file cannot be written.
        """
        from circuitvit.verification.heatmap import draw_heat_map  # it imports matplotlib

        return draw_heat_map(self, path)


def patching_map(
    model: Model,
    task: Task | PreparedTask,
    site: Site = "heads",
    tokens: TokenSets = "each",
    *,
    rows: Sequence[str] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> PatchingMap:
    """Patch every component at every set of tokens, one at a time.

    Args:
        model: from `load` or `wrap`.
        task: with corrupt images; its ablation does not matter.
        site: "heads" or "mlps" (their outputs), "stream" (the residual stream before each stage), "patterns"
            (where a head looks: queries and keys of the other run, values its own).
        tokens: "each" token alone; "kind": all, and each kind; "all"; or named sets of token numbers.
        rows: only these rows.
        batch_size: pairs at once.
        progress: whether to show a bar.

    Raises:
        DataError: if the task has no corrupt images.
        OptionError: for an unknown site, token or row.
    """
    if site not in SITES:
        raise OptionError(f"what is patched is one of {', '.join(SITES)}, not {site!r}")
    prepared = task if isinstance(task, PreparedTask) else task.prepare(model)
    if prepared.reference is None:
        raise DataError("activation patching takes what it patches from corrupt images: give corrupt=")
    runs = _runs(model, site)
    if rows is not None:
        unknown = [row for row in rows if row not in runs]
        if unknown:
            raise OptionError(
                f"there is no {unknown[0]!r} among the {site}: {', '.join(list(runs)[:5])}, ..."
            )
        runs = {row: runs[row] for row in rows}
    sets = _token_sets(model, prepared, tokens)
    values, tops, ends = [], [], []
    size = batch_size or choose_batch_size(prepared)
    with progress_bar(len(runs) * len(sets) * len(prepared), f"patching {site}", progress) as bar:
        for batch in batch_runs(prepared, size):
            assert batch.batch.reference is not None
            other = capture(model, batch.batch.reference)
            logits = []
            for run in runs.values():
                for chosen in sets.values():
                    logits.append(run(batch, other, chosen))
                    bar.update(len(batch.batch.rows))
            stacked = torch.stack([*logits, batch.base.logits, other.logits])
            metric = batch.metric(stacked).double().cpu()
            values.append(metric[:-2])
            tops.append(stacked.argmax(dim=-1).cpu())
            ends.append(metric[-2:])
    shape = (len(runs), len(sets), len(prepared))
    every_top, every_end = torch.cat(tops, dim=1).numpy(), torch.cat(ends, dim=1).numpy()
    return PatchingMap(
        site=site,
        rows=tuple(runs),
        columns=tuple(sets),
        tokens=tuple(tuple(np.flatnonzero(chosen.cpu().numpy()).tolist()) for chosen in sets.values()),
        values=torch.cat(values, dim=1).numpy().reshape(shape),
        tops=every_top[:-2].reshape(shape),
        base=every_end[0],
        base_tops=every_top[-2],
        other=every_end[1],
        other_tops=every_top[-1],
        label=prepared.metric.label,
    )


# -- inside --------------------------------------------------------------------------------------


def _runs(model: Model, site: Site) -> dict[str, Run]:
    """For each row what to run."""
    found: dict[str, Run] = {}
    for place, stage in enumerate(model.stages):
        if stage.is_source:
            continue
        if site == "stream":
            found[f"before {stage.nodes.name}"] = _stream_run(place)
        wanted = {"heads": "attention", "patterns": "attention", "mlps": "mlp"}.get(site)
        if stage.nodes.kind == wanted:
            for sender, name in enumerate(stage.nodes.senders):
                found[name] = _sender_run(place, sender, site == "patterns")
    return found


def _stream_run(place: int) -> Run:
    return lambda run, other, tokens: patch_stream(run.sources.model, run.base, other, place, tokens)


def _sender_run(place: int, sender: int, pattern: bool) -> Run:
    patch = patch_pattern if pattern else patch_sender
    return lambda run, other, tokens: patch(run.sources.model, run.base, other, place, sender, tokens)


def _token_sets(model: Model, prepared: PreparedTask, tokens: TokenSets) -> dict[str, Tensor]:
    with torch.no_grad():
        n = model.embed(prepared.base.take(0, 1).to(model.device, model.dtype)).shape[1]
    kinds = model.token_kinds(n)
    if tokens == "each":
        chosen: Mapping[str, Sequence[int]] = {_token_name(kinds, token): [token] for token in range(n)}
    elif tokens in ("kind", "all"):
        chosen = {"all": range(n)}
        if tokens == "kind":
            chosen = {
                **chosen,
                **{kind: [at for at in range(n) if kinds[at] == kind] for kind in dict.fromkeys(kinds)},
            }
    elif isinstance(tokens, Mapping):
        chosen = tokens
    else:
        raise OptionError(f"tokens is 'each', 'kind', 'all' or named sets of token numbers, not {tokens!r}")
    return {name: _mask(name, members, n).to(model.device) for name, members in chosen.items()}


def _token_name(kinds: Sequence[str], token: int) -> str:
    """Such as "cls", "reg 2" or "patch 17", numbered from 0 within its kind where there are several."""
    kind = kinds[token]
    return kind if list(kinds).count(kind) == 1 else f"{kind} {token - list(kinds).index(kind)}"


def _mask(name: str, members: Sequence[int], n: int) -> Tensor:
    if not len(members) or not all(0 <= token < n for token in members):
        raise OptionError(f"the token set {name!r} must hold numbers from 0 to {n - 1}, and at least one")
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(members)] = True
    return mask
