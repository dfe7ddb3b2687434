"""Reference outputs, what senders write on ablated edges, and all else that masked runs start from.

References stay as narrow as they come: in the stages' compact forms where a run wrote them, heads `d_head`
wide; of one image or one token where they are the same for all; nothing at all for zeros. They are expanded
to `(sender, batch, token, d_model)` for the senders in use only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.contraction import members_at
from circuitvit.engine.runs import Capture, capture, check_logits, differences, outputs
from circuitvit.errors import DataError, ModelError
from circuitvit.graph import Graph
from circuitvit.models import Factored, Model, Reads, Stage
from circuitvit.tasks import Batch, Constants, Mean, Noise, Patch, PreparedTask, Resample, Zero
from circuitvit.tasks.images import Images, as_images
from circuitvit.tasks.task import batches_of


@dataclass(frozen=True, eq=False)
class Reference:
    """What every sender writes on ablated edges; zeros where neither form is given.

    Batch and token dimensions of length 1 stand for all images and all tokens.

    Attributes:
        compacts: of the stages that have senders, in compact form.
        wide: of all senders, `(sender, batch or 1, token or 1, d_model)`, where no compact form gives it.
        streams: what each stage read in the run that wrote it; None where it has to be summed.
    """

    compacts: tuple[Tensor, ...] | None = None
    wide: Tensor | None = None
    streams: tuple[Tensor | None, ...] | None = None

    def subtracted(
        self,
        graph: Graph,
        index: int,
        part: Stage,
        senders: slice | list[int],
        compact: Tensor,
        count: int = 1,
        out: Tensor | None = None,
    ) -> Float[Tensor, "sender image token d_model"]:
        """What senders wrote minus their reference outputs, taken where it is narrow if it can be.

        Args:
            graph: of the senders.
            index: number of their stage.
            part: the stage, cut to them.
            senders: their places in the graph.
            compact: what they wrote, for `count` candidates of the batch one after the other.
            count: of candidates.
            out: room for the result.
        """
        tokens = compact.shape[-2]
        if self.compacts is not None:
            (own,) = part.pick((self.compacts[index],))
            between = compact.view(count, -1, *compact.shape[1:]) - own[..., :tokens, :]
            return part.expand(between.flatten(0, 1), out)
        made = part.expand(compact, out)
        if self.wide is None:
            return made
        reference = self.wide[senders, None, :, :tokens, : made.shape[-1]]
        by_candidate = made.view(len(made), count, -1, *made.shape[2:])
        if out is None:  # what was made may be `compact` itself
            return (by_candidate - reference).view(made.shape)
        by_candidate.sub_(reference)
        return made

    def changed(self, index: int, part: Stage, senders: list[int], compact: Tensor, out: Tensor) -> None:
        """The negative of `subtracted`, for one candidate, written into `out`."""
        if self.compacts is not None:
            (own,) = part.pick((self.compacts[index],))
            part.expand(own[..., : compact.shape[-2], :] - compact, out)
        elif self.wide is None:
            part.expand(-compact, out)
        else:
            part.expand(compact, out)
            torch.sub(self.wide[senders, :, : out.shape[2], : out.shape[3]], out, out=out)

    def deltas(self, model: Model, compacts: Sequence[Tensor]) -> list[Factored]:
        """Reference minus another run's output of every stage's senders, kept narrow."""
        if self.compacts is not None:
            return differences(model.stages, self.compacts, compacts)
        stages = enumerate(zip(model.stages[:-1], compacts, strict=False))
        if self.wide is None:
            return [stage.factored(-compact) for _, (stage, compact) in stages]
        wide = [self.wide[senders] for senders in model.graph.sender_slices]
        written = [(wide[index], stage.expand(compact)) for index, (stage, compact) in stages]
        return [Factored(each[:, :, : own.shape[2], : own.shape[3]] - own) for each, own in written]

    def added(self, graph: Graph, index: int, stage: Stage, stream: Tensor, like: Capture) -> Tensor:
        """A stream after a stage whose senders write their reference outputs.

        Args:
            graph: of the senders.
            index: number of the stage.
            stage: itself.
            stream: what it reads.
            like: a run of the batch.
        """
        if self.compacts is not None:
            return stage.add(stream, self.compacts[index])
        stream = stage.add(stream, torch.zeros_like(like.compacts[index][:1, ..., :1, :]))
        if self.wide is None:
            return stream
        _, tokens, width = like.stream(index + 1).shape
        return stream + self.wide[graph.sender_slices[index], :, :tokens, :width].sum(dim=0)

    def at(self, images: slice) -> Reference:
        """That of some images of the batch."""
        return Reference(
            None if self.compacts is None else tuple(_at(part, images) for part in self.compacts),
            None if self.wide is None else self.wide[:, images] if self.wide.shape[1] > 1 else self.wide,
            None,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that is kept."""
        streams = [stream for stream in self.streams or () if stream is not None]
        return (*(self.compacts or ()), *streams, *(() if self.wide is None else (self.wide,)))


def _at(tensor: Tensor, images: slice) -> Tensor:
    return tensor[images] if len(tensor) > 1 else tensor


# -- what masked runs start from -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sources:
    """What masked runs of one batch start from; made once, used for any number of masks.

    Attributes:
        model: to run.
        graph: the model's graph with the task's token groups.
        base: the captured run that is intervened on.
        reference: what the senders write on ablated edges.
        members: token group of each token, `(token,)` or `(batch, token)`; None for one group.
        whole: of the batch that this is a part of, and its images there; None for the batch itself.
    """

    model: Model
    graph: Graph
    base: Capture
    reference: Reference
    members: Tensor | None = None
    whole: tuple[Sources, slice] | None = None
    _known: dict[int, Reads] = field(default_factory=dict, init=False, repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(batch, token, d_model)` that every part of the stream fits in."""
        shapes = [each.shape for each in self.base.streams if each is not None]
        return shapes[0][0], max(shape[1] for shape in shapes), max(shape[2] for shape in shapes)

    def written_shape(self, stage: int) -> tuple[int, int]:
        """Tokens and width of the part of the stream that a stage writes to."""
        _, tokens, width = self.base.stream(stage + 1).shape
        return tokens, width

    def members_at(self, stage: int, tokens: int) -> Tensor | None:
        """The token group of each of the first tokens that a stage reads."""
        return members_at(self.graph, stage, self.members, tokens)

    @cached_property
    def reference_streams(self) -> tuple[Tensor | None, ...]:
        """What each stage would read if every edge were ablated, `(batch, token, d_model)`."""
        if self.whole is not None:
            sources, images = self.whole
            return tuple(None if each is None else each[images] for each in sources.reference_streams)
        streams, cut = [], None
        for place, (stage, stream) in enumerate(zip(self.model.essential, self._full_streams(), strict=True)):
            whole = None if stream is None else stream.expand(self.base.stream(place).shape)
            streams.append(None if whole is None else whole[:, :cut])
            cut = stage.cut or cut
        return tuple(streams)

    def _full_streams(self) -> Iterator[Tensor | None]:
        if self.reference.streams is not None:
            yield from self.reference.streams
            return
        stream = self.base.stream(1).new_zeros(1, 1, self.base.stream(1).shape[2])
        for index, stage in enumerate(self.model.stages):
            yield None if stage.is_source else stream
            if not stage.is_readout:
                stream = self.reference.added(self.graph, index, stage, stream, self.base)

    def reference_reads(self, stage: int) -> Reads:
        """What the receivers of a stage read if every edge is ablated; computed when first asked for."""
        if self.whole is not None:
            sources, images = self.whole
            return tuple(read[images] for read in sources.reference_reads(stage))
        if stage not in self._known:
            stream = self.reference_streams[stage]
            assert stream is not None, "the source reads no stream"
            same = stream.stride(0) == 0  # for all images
            reads = self.model.essential[stage].read(stream[:1] if same else stream)
            batch = len(stream)
            self._known[stage] = tuple(read.expand(batch, *read.shape[1:]) for read in reads)
        return self._known[stage]

    def deltas(
        self, senders: Sequence[int] | None = None, tokens: int | None = None
    ) -> Float[Tensor, "sender batch token d_model"]:
        """Reference minus base output of some senders: what ablating all of their edges adds.

        Args:
            senders: their places in the graph, in increasing order; all by default.
            tokens: only so many of the first tokens.
        """
        wanted = range(len(self.graph.senders)) if senders is None else senders
        batch, all_tokens, width = self.shape
        found = self.base.stream(1).new_empty(len(wanted), batch, tokens or all_tokens, width)
        for index, part, compact, rows, places in self.written(wanted):
            written = min(found.shape[2], compact.shape[-2])
            every = found[places]
            room = every[:, :, :written, : self.written_shape(index)[1]]
            if room.shape != every.shape:
                every.zero_()
            self.reference.changed(index, part, rows, compact[..., :written, :], room)
        return found

    def reference_outputs(self) -> Float[Tensor, "sender batch token d_model"]:
        """Every sender's reference output, expanded."""
        return self.deltas() + outputs(self.model.stages, self.base.compacts)

    def written(self, senders: Sequence[int]) -> Iterator[tuple[int, Stage, Tensor, list[int], slice]]:
        """What senders wrote in the base run: stage, its part, their compact output, their places in the
        graph and in `senders`."""
        for index, slots in enumerate(self.graph.sender_slices[:-1]):
            places = slice(bisect_left(senders, slots.start), bisect_left(senders, slots.stop))
            rows = list(senders[places])
            if rows:
                part = self.model.stages[index].restrict([row - slots.start for row in rows])
                (compact,) = part.pick((self.base.compacts[index],))
                yield index, part, compact, rows, places

    @cached_property
    def all_deltas(self) -> Float[Tensor, "sender batch token d_model"]:
        """The same of all senders, for methods that come back to each of them for every stage."""
        return self.deltas()

    @property
    def factored_deltas(self) -> list[Factored]:
        """The same of every stage's senders, kept narrow."""
        return self.reference.deltas(self.model, self.base.compacts)

    @cached_property
    def differs(self) -> bool:
        """Whether any sender's reference output differs from what it wrote: else no edge has an effect."""
        return any(not each.vanishes for each in self.factored_deltas)

    def parts(self, size: int) -> list[Sources]:
        """Itself, a few images at a time, but where edits have values for all; nothing is copied."""
        batch = self.shape[0]
        if size >= batch or self.model.edited_images is not None:
            return [self]
        count = -(-batch // size)
        edges = [batch * place // count for place in range(count + 1)]
        return [self._part(slice(*both)) for both in pairwise(edges)]

    def _part(self, images: slice) -> Sources:
        members = self.members
        return replace(
            self,
            base=Capture(
                tuple(None if each is None else each[images] for each in self.base.streams),
                tuple(each[images] for each in self.base.compacts),
                self.base.essential,
            ),
            reference=self.reference.at(images),
            members=members if members is None or members.ndim == 1 else members[images],
            whole=(self, images),
        )

    @property
    def nbytes(self) -> int:
        """Memory that it takes, with all that is computed when first asked for."""
        held = [*(each for each in self.base.streams if each is not None), *self.base.compacts]
        held += self.reference.tensors
        if self.reference.streams is None:
            held += [each for each in self.reference_streams if each is not None and each.stride(0)]
        reads = 0
        for index, stage in enumerate(self.model.layers, 1):
            compact, tokens = self.base.compacts[index], self.base.stream(index).shape[1]
            each = compact.nbytes // (compact.shape[-2] * len(stage.nodes.senders))
            reads += each * tokens * len(stage.nodes.receivers)
        return sum(each.nbytes for each in held) + reads


# -- the ablations -------------------------------------------------------------------------------


@dataclass(frozen=True)
class References:
    """The reference outputs of any batch whose base run has been captured.

    Attributes:
        model: that is run.
        make: gives them for a batch and its base run.
    """

    model: Model
    make: Callable[[Batch, Capture], Reference]

    def deltas(self, batch: Batch, base: Capture) -> list[Factored]:
        """Reference minus base output of every stage's senders: what ablating all of their edges adds."""
        return self.make(batch, base).deltas(self.model, base.compacts)


def reference_source(prepared: PreparedTask, batch_size: int) -> References:
    """How the task's ablation gets its reference outputs; data-set statistics are computed here, once."""
    return References(prepared.model, _maker(prepared, batch_size))


def _maker(prepared: PreparedTask, batch_size: int) -> Callable[[Batch, Capture], Reference]:
    model, ablation = prepared.model, prepared.ablation
    match ablation:
        case Patch():
            return lambda batch, base: _patched(model, batch, base)
        case Zero():
            return lambda batch, base: Reference()
        case Mean():
            mean = Reference(_mean_compacts(prepared, ablation, batch_size))
            return lambda batch, base: mean
        case Noise():
            return lambda batch, base: Reference(wide=_noisy(model, ablation, batch))
        case Constants():
            return lambda batch, base: Reference(wide=_constant(ablation, base))
        case Resample():
            return lambda batch, base: _resampled(prepared, ablation, batch, base)


def _patched(model: Model, batch: Batch, base: Capture) -> Reference:
    assert batch.reference is not None, "a task with patch ablation has corrupt images"
    run = capture(model, batch.reference, essential=base.essential)
    check_logits(run.logits, batch)
    return Reference(run.compacts, streams=run.streams)


def _mean_compacts(prepared: PreparedTask, ablation: Mean, batch_size: int) -> tuple[Tensor, ...]:
    """The mean compact output of every stage over the ablation's images: a sum, then one division.

    Senders' outputs are linear in the compact form, so theirs are the means as well.
    """
    model = prepared.model
    total: list[Tensor] = []
    sources = mean_images(prepared, ablation)
    for images in sources:
        for batch in batches_of(model, images, batch_size):
            sums = [each.sum(dim=0, keepdim=True) for each in capture(model, batch).compacts[:-1]]
            total = [one.add_(other) for one, other in zip(total, sums, strict=True)] if total else sums
    if not all(each.isfinite().all() for each in total):
        raise ModelError("the mean of the senders' outputs is NaN or infinite: check the images to average")
    count = sum(len(images) for images in sources)
    means = tuple(each / count for each in total)
    return means if ablation.per_token else tuple(each.mean(dim=-2, keepdim=True) for each in means)


def mean_images(prepared: PreparedTask, ablation: Mean) -> list[Images]:
    """The images over which "mean" averages."""
    if ablation.images is None:
        return [prepared.clean] if prepared.corrupt is None else [prepared.clean, prepared.corrupt]
    images = as_images(ablation.images, prepared.spec)
    if images.shape != prepared.clean.shape:
        raise DataError(f"the images to average are {images.shape}, those of the task {prepared.clean.shape}")
    return [images]


def _constant(ablation: Constants, base: Capture) -> Float[Tensor, "sender 1 token d_model"]:
    streams = [each for each in base.streams if each is not None]
    values = ablation.values.to(streams[0])[:, None]
    tokens, width = (max(each.shape[axis] for each in streams) for axis in (1, 2))
    if values.shape[2] not in (1, tokens) or values.shape[3] != width:
        raise DataError(
            f"the constants are for {values.shape[2]} tokens of width {values.shape[3]}, "
            f"the model has {tokens} of width {width}"
        )
    return values


def _noisy(model: Model, ablation: Noise, batch: Batch) -> Tensor:
    run = capture(model, batch.base)
    own = outputs(model.stages, run.compacts)
    written = [stage.expand(compact) for stage, compact in zip(model.stages[:-1], run.compacts, strict=False)]
    spread = torch.cat([each.flatten(2).std(dim=2) for each in written])[..., None, None]
    noise = torch.empty_like(own)
    for place, row in enumerate(batch.rows.tolist()):
        generator = torch.Generator().manual_seed((ablation.seed * 1_000_003 + row) % 2**63)
        shape = (own.shape[0], *own.shape[2:])
        noise[:, place] = torch.randn(shape, generator=generator).to(own)
    return noise.mul_(ablation.scale * spread).add_(own)


def _resampled(prepared: PreparedTask, ablation: Resample, batch: Batch, base: Capture) -> Reference:
    """Outputs on other base images: image `i` gets image `order[(place of i) + 1]` of one random cycle."""
    generator = torch.Generator().manual_seed(ablation.seed)
    order = torch.randperm(len(prepared), generator=generator)
    successor = torch.empty_like(order)
    successor[order] = order.roll(-1)
    images = [prepared.base.take(int(row), int(row) + 1) for row in successor[batch.rows]]
    model = prepared.model
    run = capture(model, torch.cat(images).to(model.device, model.dtype), essential=base.essential)
    return Reference(run.compacts, streams=run.streams)
