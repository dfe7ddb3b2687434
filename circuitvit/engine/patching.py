"""Activation patching: what a component writes is replaced by what it wrote in another run, for all readers.

Unlike a masked run, which cuts single edges, everything after the component hears the replacement, and later
components answer to it: the question is what the model would say had this one part seen the other image.
Only the part of the model after the component is run.

Heimersheim and Nanda 2024, "How to use and interpret activation patching", arXiv:2404.15255.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvit.engine.runs import Capture, run_from
from circuitvit.graph import RESIDUAL, is_residual
from circuitvit.models import Model

Site = Literal["heads", "mlps", "stream", "patterns"]
"""What is patched: heads' outputs, MLPs' outputs, the residual stream, or heads' attention patterns."""

Tokens = Bool[Tensor, " token"]
"""Which tokens are patched, of all parts of the stream one after the other: a pool's latents come last."""


def token_parts(model: Model, run: Capture) -> dict[str, range]:
    """The numbers of the tokens of each part of the stream."""
    found: dict[str, range] = {}
    for index, stage in enumerate(model.stages[1:], 1):
        part, tokens = stage.nodes.reads_from, run.stream(index).shape[1]
        first = max((numbers.stop for numbers in found.values()), default=0)
        # behind a dictionary of the stream its tokens are the same ones
        found.setdefault(
            part, found[RESIDUAL] if found and is_residual(part) else range(first, first + tokens)
        )
    return found


def _seen(model: Model, run: Capture, stage: int, tokens: Tokens) -> Bool[Tensor, "token 1"]:
    """Those of the tokens that are in the stream which a stage reads."""
    mine = token_parts(model, run)[model.stages[stage].nodes.reads_from]
    return tokens[mine.start : mine.stop, None]


@torch.no_grad()
def patch_sender(
    model: Model, base: Capture, other: Capture, stage: int, sender: int, tokens: Tokens
) -> Float[Tensor, "batch class"]:
    """The logits when a sender writes, at some tokens, what it wrote in another run.

    Args:
        model: to run.
        base: the run that is intervened on.
        other: the run that the output comes from, on as many images.
        stage: number of the sender's stage.
        sender: its place in the stage.
        tokens: True where its output is replaced, `(token,)`.
    """
    part = model.stages[stage]
    change = part.expand(other.compacts[stage])[sender] - part.expand(base.compacts[stage])[sender]
    return _after(model, base, stage, change, tokens)


@torch.no_grad()
def patch_senders(
    model: Model,
    base: Capture,
    other: Capture,
    chosen: Bool[np.ndarray, "run sender"],
    leading: int | None = None,
) -> Float[Tensor, "run class"]:
    """The logits of several runs, in each of which several senders write what they wrote in another run.

    Args:
        model: to run.
        base: the essential run on one image that is intervened on.
        other: the essential run, on one image, that the outputs come from.
        chosen: for each run, in graph order, whose outputs are replaced.
        leading: of how many of the first tokens; of all by default.
    """
    slices = model.graph.sender_slices
    touched = [place for place, senders in enumerate(slices) if chosen[:, senders].any()]
    if not touched:
        return base.logits.expand(len(chosen), -1)
    first = touched[0]
    if first == 0:
        raise ValueError("the input's output is the other image itself, and nothing is left to patch")
    stream = base.stream(first).expand(len(chosen), -1, -1)
    for place, stage in enumerate(model.essential[first:], first):
        compact = stage.write(stage.read(stream))
        if stage.is_readout:
            return compact
        stream = stage.add(stream, compact)
        if place in touched:
            change = (other.compacts[place].expand_as(compact) - compact)[..., :leading, :]
            inside = torch.from_numpy(chosen[:, slices[place]]).to(change)
            moved = torch.einsum("srtd,rs->rtd", stage.expand(change), inside)
            stream = torch.cat([stream[:, : moved.shape[1]] + moved, stream[:, moved.shape[1] :]], dim=1)
    raise AssertionError("a model ends with its readout")


@torch.no_grad()
def patch_stream(
    model: Model, base: Capture, other: Capture, stage: int, tokens: Tokens
) -> Float[Tensor, "batch class"]:
    """The logits when, before a stage, the residual stream at some tokens is that of another run."""
    mine, theirs = base.stream(stage), other.stream(stage)
    return run_from(model, stage, torch.where(_seen(model, base, stage, tokens), theirs, mine))


@torch.no_grad()
def patch_pattern(
    model: Model, base: Capture, other: Capture, stage: int, sender: int, tokens: Tokens
) -> Float[Tensor, "batch class"]:
    """The logits when a head attends, from some tokens, where it attended in another run.

    Queries and keys are those of the other run, values its own: where it looks changes, not what it finds.
    Where heads are normed together, the others write something else then.

    Raises:
        UnsupportedModelError: if the stage is not attention.
    """
    for part in model.stages[stage].branches:
        if sender < len(part.nodes.senders):
            break
        sender -= len(part.nodes.senders)
    mine, theirs = part.read(base.stream(stage)), part.read(other.stream(stage))
    own = part.pattern(mine)
    looked = own.clone()
    looked[:, sender] = part.pattern(theirs)[:, sender]
    change = part.attend(mine, looked) - part.attend(mine, own)
    return _after(model, base, stage, part.expand(change).sum(dim=0), tokens)


def _after(
    model: Model, base: Capture, stage: int, change: Float[Tensor, "batch token d_model"], tokens: Tokens
) -> Float[Tensor, "batch class"]:
    stream = base.stream(stage + 1)
    inside = _seen(model, base, stage + 1, tokens).to(change.dtype)
    return run_from(model, stage + 1, stream + change * inside)
