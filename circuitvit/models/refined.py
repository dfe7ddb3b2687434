"""Refined models: some nodes cut into neurons, features, or source groups; each is a model like any other.

A table says what becomes of which node. Stages are made anew from those of the coarse model, in which nothing
is cut, so that refinements can be added to, and edits be made on top of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from circuitvit.errors import OptionError, UnsupportedModelError, unknown_name
from circuitvit.graph import RESIDUAL, is_residual
from circuitvit.models.attention import AttentionStage
from circuitvit.models.cut_heads import ByFeature, BySource, CutHeads
from circuitvit.models.dictionaries import Dictionary, fitted
from circuitvit.models.edit_hash import said_of
from circuitvit.models.edits import edited
from circuitvit.models.encoders import features_of
from circuitvit.models.fine import Carried, Features, FineStage, Neurons, StreamFeatures
from circuitvit.models.layers import MLPStage
from circuitvit.models.parallel import ParallelStage
from circuitvit.models.rules import BackwardRules
from circuitvit.models.sites import LOOKS, heads_of, stream_names
from circuitvit.models.stages import Stage
from circuitvit.models.tokens import Groups

if TYPE_CHECKING:
    from circuitvit.models.model import Model


@dataclass(frozen=True, eq=False)
class Units:
    """What a node is cut into: neurons, or features of a dictionary. See `neurons` and `features`.

    Attributes:
        dictionary: None for neurons.
        chosen: numbers of those that become nodes of their own; None where they are still to be chosen.
        error: what is done with what the dictionary misses, one of `ERRORS`.
    """

    dictionary: Any | None = None
    chosen: tuple[int, ...] | None = None
    error: str = "node"

    @property
    def what(self) -> str:
        return "neuron" if self.dictionary is None else "feature"

    @property
    def letter(self) -> str:
        """What follows the node's name in that of a unit, before its number."""
        return self.what[0]

    @property
    def images(self) -> None:
        """For how many images it is made: for any."""
        return None

    @property
    def is_bound(self) -> bool:
        """Whether it holds for images of the model's own size alone."""
        return False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the dictionary, which may be edited in place, so far as they are known."""
        if isinstance(self.dictionary, nn.Module):
            return *self.dictionary.parameters(), *self.dictionary.buffers()
        return tuple(self.dictionary.tensors.values()) if isinstance(self.dictionary, Dictionary) else ()

    @property
    def description(self) -> tuple[str, list[Tensor]]:
        """What it is, for the hash of a model: in words, and tensors."""
        if isinstance(self.dictionary, Dictionary):
            own = self.dictionary
            return f"{self.chosen} {own.kind} {own.k} {own.reads}", list(own.tensors.values())
        said, tensors = said_of(self.dictionary)
        if self.dictionary is not None:  # a module's own description is of `forward`
            code = [said_of(getattr(type(self.dictionary), name, None))[0] for name in ("encode", "decode")]
            said = f"{said} {code} {_plain(self.dictionary)}"
        return f"{self.chosen} {said}", tensors


def _plain(dictionary: Any) -> list[tuple[str, str]]:
    """Numbers and names that the parts of a module keep beside their tensors, such as the k of a top-k."""
    parts = dictionary.modules() if isinstance(dictionary, nn.Module) else ()
    kept = [item for part in parts for item in vars(part).items() if item[0] != "training"]
    return [(name, repr(each)) for name, each in kept if isinstance(each, (bool, int, float, str))]


ERRORS = ("node", "kept", "frozen")
"""What a dictionary misses is a node like any other, is kept in every run, or stays as in the base run."""

Refinement = Units | BySource
"""What becomes of a node."""


def neurons(chosen: Iterable[int] | None = None) -> Units:
    """The neurons of an MLP as nodes, for `refine_nodes`: what its last linear layer reads.

    Args:
        chosen: their numbers; all others together are one more node, `m5.rest`. None to have them chosen.

    Raises:
        OptionError: for numbers that are none, or occur twice.

    Example:
        >>> import circuitvit as cv
        >>> model = cv.refine_nodes(cv.load("catdog-tiny"), {"m1": cv.neurons([3, 17])})
        >>> [node for node in model.graph.nodes if node.startswith("m1")]
        ['m1.n3', 'm1.n17', 'm1.rest']
    """
    return Units(None, _numbers(chosen))


def features(dictionary: Any, chosen: Iterable[int] | None = None, error: str = "node") -> Units:
    """The features of a dictionary as nodes, for `refine_nodes`.

    Args:
        dictionary: a `Dictionary`, or anything with `encode` and `decode`, of what a node writes, of the
            normed input of an MLP (a transcoder), or of what a head has mixed (its z).
        chosen: numbers of features; all others together are one more node, `m8.rest`, and what the
            dictionary misses is `m8.error`. None to have them chosen.
        error: "node"; or "kept": all edges of the error are in every run, whatever is ablated; or "frozen":
            in every run it is what it was on the task's base images, whatever it would hear.

    Raises:
        OptionError: for numbers that are none, or occur twice, or an error that is none of these.

    Example:
        >>> import circuitvit as cv
        >>> cv.features(dictionary, [12, 40])  # doctest: +SKIP
    """
    if not callable(getattr(dictionary, "encode", None)) or not callable(getattr(dictionary, "decode", None)):
        raise OptionError(f"a dictionary has encode and decode, which {type(dictionary).__name__} has not")
    if error not in ERRORS:
        raise OptionError(f"the error is 'node', 'kept' or 'frozen', not {error!r}")
    return Units(dictionary, _numbers(chosen), error)


def _numbers(chosen: Iterable[int] | None) -> tuple[int, ...] | None:
    if chosen is None:
        return None
    given: Any = chosen.tolist() if isinstance(chosen, (Tensor, np.ndarray)) else chosen
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise OptionError(f"units are chosen by their numbers, such as [17, 42], not by {given!r}")
    numbers = list(given)
    if any(isinstance(number, bool) or not hasattr(number, "__index__") for number in numbers):
        raise OptionError(f"units are chosen by their numbers, such as [17, 42], not by {numbers}")
    own = [int(number) for number in numbers]
    if len(set(own)) < len(own):
        twice = next(number for number in own if own.count(number) > 1)
        raise OptionError(f"unit {twice} is chosen twice")
    return tuple(own)


def unit_labels(model: Model) -> dict[str, str]:
    """What the dictionaries of a refined model call its features, by the names of nodes."""
    found: dict[str, str] = {}
    for node, how in (model.bare or model).refinements.items():
        labels = getattr(how.dictionary, "labels", None) if isinstance(how, Units) else None
        if labels is not None and isinstance(how, Units):
            found.update({f"{node}.{how.letter}{number}": str(labels[number]) for number in how.chosen or ()})
    return {name: label for name, label in found.items() if label}


# -- making one ----------------------------------------------------------------------------------


def refined(model: Model, table: Mapping[str, Refinement], rules: BackwardRules | None = None) -> Model:
    """The model with some nodes cut.

    Args:
        model: which may be refined and edited already.
        table: what becomes of which node, by its full name, with all units chosen.
        rules: by which its gradients flow.

    Raises:
        NameNotFoundError: for a node that there is not.
        OptionError: if a node is cut already, or edited, or units do not fit it.
        UnsupportedModelError: if the node cannot be cut so.
    """
    bare = model.bare or model
    bare.refresh()
    if bare.rules is not None:
        raise OptionError("refine a model first, and change its gradients (with_rules) then")
    coarse = bare.coarse or bare
    for node, how in table.items():
        _check_node(model, coarse, node)
        if isinstance(how, Units) and how.error == "frozen":
            raise OptionError(
                f"{node}.error is frozen on the images of a task: cv.refine_nodes(..., task=task)"
            )
    every = {**bare.refinements, **table}
    made = replace(
        coarse,
        name=_name(coarse, every),
        stages=tuple(_cut_stages(coarse, every)),
        origin=coarse.origin.afresh(),
        refinements=every,
        coarse=coarse,
    )
    made.refresh()
    _check_sum(coarse, made)
    if model.edits:
        return edited(made, model.edits, rules)
    return made if rules is None else made.with_rules(rules)


def _check_node(model: Model, coarse: Model, node: str) -> None:
    bare = model.bare or model
    known = {name for stage in coarse.layers for name in stage.nodes.senders}
    known |= set(stream_names(coarse).values())
    if node not in known:
        raise unknown_name("node", node, sorted(known))
    if node in bare.refinements:
        raise OptionError(f"{node} is refined already: refine the model without that, with other units")
    for change in model.edits:
        if change.site.node == node and change.site.kind not in (*LOOKS, "read"):
            raise OptionError(f"{node} is edited ({change.name}): refine the model first, and edit it then")


def _name(coarse: Model, table: Mapping[str, Refinement]) -> str:
    names = list(table)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    kept = any(isinstance(each, Units) and each.error == "kept" for each in table.values())
    return f"{coarse.name}, refined ({shown}{'; errors kept' if kept else ''})"


def _cut_stages(coarse: Model, table: Mapping[str, Refinement]) -> Iterator[Stage]:
    """All stages, with nodes cut that the table names, and streams, behind which what follows is another
    part of the stream.
    """
    names, part = stream_names(coarse), RESIDUAL
    for place, stage in enumerate(coarse.stages):
        reads, name = stage.nodes.reads_from, names.get(place, "")
        if name in table:
            if not is_residual(reads):
                raise UnsupportedModelError(f"{name} is the stream of a pool, which is not cut into features")
            after = stage.is_readout or stage.nodes.begins  # the last stream is drawn above the last block
            layer = coarse.stages[place - after].nodes.layer
            cut = _cut_stream(coarse, Carried(name, layer, part), name, table[name])
            part = cut.nodes.writes_to
            yield cut
        own = _cut_stage(coarse, stage, table)
        yield own.behind(part) if part != RESIDUAL and is_residual(reads) else own


def _cut_stream(coarse: Model, inner: Carried, name: str, units: Refinement) -> FineStage:
    """The stream before a stage, cut into features."""
    if not isinstance(units, Units) or units.dictionary is None:
        raise OptionError(f"{name} is the stream, which has no neurons and takes nothing: give a dictionary")
    if getattr(units.dictionary, "reads", "output") == "input":
        raise OptionError(f"{name} is the stream, and the dictionary is a transcoder: it is of an MLP")
    dictionary = fitted(units.dictionary, name, coarse.d_model, coarse)
    assert units.chosen is not None, "chosen before"
    _check_chosen(name, units, dictionary.n_features)
    cut = StreamFeatures(inner, dictionary, features_of(dictionary, units.chosen))
    return FineStage(cut, name, units.letter, units.error == "kept")


def _cut_stage(coarse: Model, stage: Stage, table: Mapping[str, Refinement]) -> Stage:
    """A stage with its nodes cut that the table names."""
    if not any(node in table for node in stage.nodes.senders):
        return stage
    if isinstance(stage, ParallelStage):
        return stage.with_parts([_cut_stage(coarse, part, table) for part in stage.whole])
    if stage.nodes.kind == "attention":
        return _cut_attention(coarse, stage, table)
    (node,) = stage.nodes.senders
    units = table[node]
    if isinstance(units, BySource):
        raise UnsupportedModelError(f"{node} is no head: it takes nothing from other tokens")
    return _cut_mlp(coarse, stage, node, units)


def _cut_mlp(coarse: Model, stage: Stage, node: str, units: Units) -> FineStage:
    if not isinstance(stage, MLPStage):
        raise UnsupportedModelError(f"{node} is no MLP whose parts are known: it cannot be cut")
    if any(stage.nodes.mixes or ()):
        raise UnsupportedModelError(
            f"{node} is an MLP that carries something from one token to another: its units are not told apart"
        )
    assert units.chosen is not None, "chosen before"
    if units.dictionary is None:
        _check_chosen(node, units, stage.last.weight.shape[1])
        return FineStage(Neurons.of(stage, units.chosen), node, units.letter)
    dictionary = fitted(units.dictionary, node, _width(coarse, stage), coarse)
    _check_chosen(node, units, dictionary.n_features)
    of_input = getattr(units.dictionary, "reads", "output") == "input"
    cut = Features.of(stage, dictionary, units.chosen, of_input)
    return FineStage(cut, node, units.letter, units.error == "kept")


def _width(coarse: Model, stage: MLPStage) -> int:
    """How wide the part of the stream is that an MLP reads and writes."""
    if stage.part == RESIDUAL:
        return coarse.d_model
    return int(stage.last.weight.shape[0])


def _cut_attention(coarse: Model, stage: Stage, table: Mapping[str, Refinement]) -> CutHeads:
    if not isinstance(stage, AttentionStage):
        raise UnsupportedModelError(f"{stage.nodes.name} is an attention whose parts are not known")
    cuts: dict[str, BySource | ByFeature] = {}
    for node in (node for node in stage.nodes.senders if node in table):
        how = table[node]
        if isinstance(how, BySource):
            cuts[node] = how
            continue
        if how.dictionary is None:
            raise OptionError(f"{node} is a head, which has no neurons: give a dictionary of its z")
        if how.error == "kept":
            raise OptionError(
                f"{node}.error has the inputs of the head, which are searched: it cannot be kept in every "
                "run; leave it a node"
            )
        assert how.chosen is not None, "chosen before"
        dictionary = fitted(how.dictionary, node, stage.d_head, coarse)
        _check_chosen(node, how, dictionary.n_features)
        cuts[node] = ByFeature(dictionary, how.chosen)
    return CutHeads(stage, cuts)


def _check_chosen(node: str, units: Units, count: int) -> None:
    wrong = [number for number in units.chosen or () if not 0 <= number < count]
    if wrong:
        raise OptionError(f"{node} has no {units.what} {wrong[0]}: it has {count:,}, counted from 0")


@torch.no_grad()
def _check_sum(coarse: Model, made: Model) -> None:
    """Refuse a cut whose pieces do not sum to what the stage wrote, on noise.

    Raises:
        UnsupportedModelError: naming the stage.
    """
    blank = coarse.blank().to(coarse.device, coarse.dtype)
    stream = blank.expand(made.edited_images or 1, *blank.shape[1:])
    generator = torch.Generator().manual_seed(0)
    coarse_stages = iter(coarse.stages)
    for cut in made.stages:
        own = next(coarse_stages) if cut.nodes.kind != "stream" else Carried(cut.nodes.name, 0, RESIDUAL)
        if own.is_source:
            stream = own.total(own.write(own.read(stream)))
            noise = torch.randn(stream.shape, generator=generator, dtype=torch.float64)
            stream = stream + noise.to(stream)
            continue
        if own.is_readout:
            return
        compact = own.write(own.read(stream))
        if cut is not own:
            whole, pieces = own.total(compact), cut.expand(cut.write(cut.read(stream)))
            made_of = pieces.sum(dim=0) if cut.constant is None else pieces.sum(dim=0) + cut.constant
            size = 1 + max(float(whole.abs().max()), float(pieces.abs().max()))
            unit = torch.finfo(stream.dtype).eps * 1e3 * size
            if made_of.shape != whole.shape or not float((made_of - whole).abs().max()) <= unit:
                nodes = [node for node in own.nodes.senders if node in made.refinements]
                raise UnsupportedModelError(
                    f"the pieces of {' and '.join(nodes)} do not sum to what is written: heads that are "
                    "normed after they have mixed their values, or that add something to these, cannot be "
                    "cut by the tokens that they take them from, only by the features of a dictionary"
                )
        stream = own.add(stream, compact)


# -- source groups -------------------------------------------------------------------------------


def split_sources(model: Model, groups: Groups, heads: str | Sequence[str] = "*") -> Model:
    """A model whose heads are senders by the tokens that they take values from: `a9.h2[object]`.

    An edge `a9.h2[object]->m9@cls` is what the head carries from the object to the class token, for the MLP
    to read. `z_t = sum over groups of sum over s in group of A[t, s] v_s`: linear, so the sum is the model.

    Args:
        model: from `load` or `wrap`.
        groups: that cover all tokens: `TokenGroups`. Where they differ from image to image, all images are
            run together, in their order.
        heads: names of heads, with `*` for anything; by default all.

    Raises:
        NameNotFoundError: if no head is called so.
        OptionError: if groups do not fit the model's tokens, or a head is refined already.
        UnsupportedModelError: if a head is not linear in its values.

    Example:
        >>> import circuitvit as cv
        >>> model = cv.load("catdog-tiny")
        >>> split = cv.split_sources(model, cv.TokenGroups.by_kind(model, 37), "a1.h0")
        >>> [node for node in split.graph.nodes if node.startswith("a1.h0")]
        ['a1.h0[cls]', 'a1.h0[patch]', 'a1.h0']
    """
    if not isinstance(getattr(groups, "members", None), Tensor):
        raise OptionError(f"groups are TokenGroups, such as TokenGroups.by_kind(model, {model.n_tokens})")
    given: Any = heads
    wanted = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not wanted or not all(isinstance(name, str) for name in wanted):
        raise OptionError(f"heads are names, such as 'a1.h0' or ['a1.*'], not {heads!r}")
    known = [
        node
        for stage in model.layers
        for part in stage.branches
        if part.nodes.kind == "attention"
        for node in heads_of(part)
    ]
    chosen = {name for pattern in wanted for name in known if fnmatchcase(name, pattern)}
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise unknown_name("head", pattern, known)
    for name in groups.names:
        if name.isdigit():
            raise OptionError(
                f"a group called {name!r}: {known[0]}[{name}] is a coordinate; call it 'token{name}'"
            )
    members = groups.members
    count = model.n_tokens
    if members.shape[-1] != count:
        raise OptionError(f"groups of {members.shape[-1]} tokens, and {model.name} has {count}")
    masks = torch.stack([members == number for number in range(len(groups.names))])
    by_source = BySource(tuple(f"[{name}]" for name in groups.names), masks)
    return refined(model, {name: by_source for name in known if name in chosen})
