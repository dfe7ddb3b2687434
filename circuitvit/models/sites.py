"""Sites: the names of everything in a model that can be read or changed.

| site | what it is | shape for each image |
| --- | --- | --- |
| `a5.h2`, `m3`, `input` | what a node writes to the stream | `(token, d_model)` |
| `a5.h2<q>`, `<k>`, `<v>`, `<g>` | what a head reads: raw query, key, value, gate | `(token, d_head)` |
| `a5.h2.scores`, `a5.h2.pattern` | before and after the softmax | `(query, key)` |
| `a5.h2.z` | what a head writes, before its output projection | `(token, d_head)` |
| `m3.hidden` | an MLP's neurons, after the activation | `(token, hidden)` |
| `resid0` ... `residL` | the stream that enters block 0, ..., that the readout reads | `(token, d_model)` |
| `mid3` | the stream between the attention and the MLP of block 3 | `(token, d_model)` |
| `logits` | the model's output | `(class,)` |

Nodes are those of the graph. `*` stands for anything: `a*.pattern` is the pattern of every head, and `a5.*`
what every head of layer 5 writes; `m*` are the MLPs, not the streams. After `@` come tokens, joined by `+`:
kinds (`cls`, `reg`, `patch`), numbers, `patch(3,5)` by row and column, `frame2` of a clip, or token groups.
Of scores and patterns that is the query, or `@patch->cls`, as in edges: what goes *from* patches *to* the
class token, which attends to them.

`m3.hidden[17]` is neuron 17 alone; likewise one coordinate of anything that has a width, and one class of
the logits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitvit.errors import NameNotFoundError, OptionError, UnsupportedModelError, unknown_name
from circuitvit.graph import is_residual
from circuitvit.graph.names import node_of, port_of
from circuitvit.models.stages import Reads, Stage
from circuitvit.models.tokens import LATENT, Chosen, Groups, TokenSpec, chosen

if TYPE_CHECKING:
    from circuitvit.models.model import Model

LOOKS = ("scores", "pattern")
"""What has queries and keys for its axes."""

BESIDE = ("edit", "stream")
"""Kinds of stages that belong to no block: a change of the stream, and the stream cut into features."""

PARTS = (*LOOKS, "z", "hidden")
"""What comes after a node's name and a dot."""


@dataclass(frozen=True)
class Site:
    """One thing that can be read or changed.

    Attributes:
        name: such as `a5.h2.pattern`.
        node: the node, or the stream, that it belongs to: `a5.h2`.
        kind: "stream", "output", "read", "scores", "pattern", "z", "hidden" or "logits".
        stage: place among the model's stages; of a stream the stage that reads it.
        shape: for one image of the model's own size, such as `(197, 192)`.
        unit: of its values, in words.
    """

    name: str
    node: str
    kind: str
    stage: int
    shape: tuple[int, ...]
    unit: str

    @property
    def axes(self) -> tuple[str, ...]:
        """What the sides of `shape` are."""
        if self.kind in LOOKS:
            return "query", "key"
        return ("class",) if self.kind == "logits" else ("token", _WIDTHS[self.kind])

    def called(self, number: int | None) -> str:
        """Its name, with the neuron (coordinate, class) in brackets where one is meant: `m3.hidden[17]`."""
        return self.name if number is None else f"{self.name}[{number}]"


_WIDTHS = {"stream": "d_model", "output": "d_model", "read": "d_head", "z": "d_head", "hidden": "neuron"}
_UNITS = {
    "stream": "residual stream",
    "output": "residual stream",
    "read": "projection",
    "scores": "nats",
    "pattern": "share of attention",
    "z": "mixed values",
    "hidden": "activation",
    "logits": "logit",
}


class Sites(tuple[Site, ...]):
    """Sites in the order in which a run passes them; printed as a table."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self)

    def __repr__(self) -> str:
        rows = [
            (site.name, " x ".join(map(str, site.shape)), ", ".join(site.axes), site.unit) for site in self
        ]
        shown = (
            rows if len(rows) <= 60 else [*rows[:40], ("...", f"{len(rows) - 50} more", "", ""), *rows[-10:]]
        )
        widths = [max((len(row[column]) for row in shown), default=0) for column in range(3)]
        lines = [
            f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {axes:<{widths[2]}}  {unit}".rstrip()
            for name, shape, axes, unit in shown
        ]
        return "\n".join([f"{len(self)} sites", *lines])


# -- all sites of a model ------------------------------------------------------------------------


def all_sites(model: Model) -> Sites:
    """Every site of a model, found by one run on a blank image."""
    one = model.blank()
    blank = one.expand(model.edited_images or 1, *one.shape[1:])
    found: list[Site] = []
    with torch.no_grad():
        stream = blank
        for place, stage in enumerate(model.stages):
            reads = stage.read(stream)
            compact = stage.write(reads)
            if stream_name := stream_names(model).get(place):
                found.append(_site(stream_name, "stream", place, stream))
            if stage.is_readout:
                found.append(_site("logits", "logits", place, compact))
                break
            for part, own, written in zip(
                stage.branches, stage.split_reads(reads), stage.split(compact), strict=True
            ):
                found += _of_part(part, own, written, place)
            stream = stage.add(stream, compact) if place else stage.total(compact)
    return Sites(found)


def _site(name: str, kind: str, place: int, like: Tensor, node: str | None = None) -> Site:
    return Site(name, node or name, kind, place, tuple(like.shape[1:]), _UNITS[kind])


def _of_part(part: Stage, reads: Reads, written: Tensor, place: int) -> Iterator[Site]:
    """What can be read of one attention or MLP: by node its reads, patterns, z or neurons, and output."""
    nodes, outputs = part.nodes, part.expand(written)
    heads = {kind: of_heads(part, kind, reads, written) for kind in _known_kinds(part, reads, written)}
    found = heads_of(part)
    for node in dict.fromkeys((*(head for head in found if heads), *nodes.senders)):
        mine = [receiver for receiver in nodes.receivers if node_of(receiver) == node and port_of(receiver)]
        for receiver in mine:
            yield _site(receiver, "read", place, read_of(part, reads, receiver), node)
        if mine:
            for kind in (
                *LOOKS,
                *(("z",) if node in nodes.senders else ()),
            ):  # of a head in pieces there is no z
                if kind in heads:
                    yield _site(f"{node}.{kind}", kind, place, heads[kind][:, found.index(node)], node)
        elif nodes.receivers:
            with suppress(UnsupportedModelError):
                yield _site(f"{node}.hidden", "hidden", place, part.hidden(reads), node)
        if node in nodes.senders:
            yield _site(node, "output", place, outputs[nodes.senders.index(node)])


def _known_kinds(part: Stage, reads: Reads, written: Tensor) -> Iterator[str]:
    """Which of scores, patterns and z there are."""
    for kind in (*LOOKS, "z"):
        try:
            of_heads(part, kind, reads, written)
        except UnsupportedModelError:
            continue
        yield kind


def read_of(part: Stage, reads: Reads, receiver: str) -> Tensor:
    """What one of a head's receivers reads, `(image, token, d_head)`."""
    place = part.nodes.receivers.index(receiver)
    heads = len(part.nodes.receivers) // len(reads)
    return reads[place // heads][:, place % heads]


def heads_of(part: Stage) -> list[str]:
    """The heads that an attention computes with, in the order of its patterns; it may not send for all."""
    return list(dict.fromkeys(node_of(receiver) for receiver in part.nodes.receivers))


def of_heads(part: Stage, kind: str, reads: Reads, written: Tensor) -> Tensor:
    """The scores, the patterns or the z of all heads that an attention computes with, `(image, head, ...)`.

    Raises:
        UnsupportedModelError: if it has none.
    """
    if kind == "z":
        return part.mixed(reads, written)
    return part.scores(reads) if kind == "scores" else part.pattern(reads)


def kinds_at(model: Model, site: Site, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The kinds of a site's tokens, or queries, and of its keys, for images of `count` tokens.

    Those that stand behind a pool are latents.
    """
    nodes, own = (model.bare or model).stages[site.stage].nodes, model.token_kinds(count)
    before = own if is_residual(nodes.reads_from) else (LATENT,) * site.shape[0]
    after = own if is_residual(nodes.writes_to) else (LATENT,) * site.shape[0]
    return (before if site.kind in ("stream", "read") else after), before


def chosen_of(
    site: Site,
    kinds: tuple[Sequence[str], Sequence[str]],
    tokens: TokenSpec,
    source: TokenSpec,
    grid: Callable[[], tuple[int, ...]],
    groups: Groups | None,
) -> tuple[Chosen, Chosen]:
    """The tokens, or queries, of a site that are meant, and the keys.

    Args:
        site: whose.
        kinds: of its tokens and keys, see `kinds_at`.
        tokens: see `TokenSpec`.
        source: the keys; None for all.
        grid: rows and columns of the patches.
        groups: whose names may be used.

    Raises:
        OptionError: naming the site, if it has no such tokens, or no keys.
    """
    if source is not None and site.kind not in LOOKS:
        raise OptionError(f"{site.name} has no keys: write {site.name}@{tokens}")
    try:
        rows, columns = (
            chosen(spec, each, grid, groups) for spec, each in zip((tokens, source), kinds, strict=True)
        )
    except OptionError as error:
        way = ""
        if LATENT in (*kinds[0], *kinds[1]):
            part = _split(site.name)[1]
            way = f". It is of a pool, which has latents: name it apart, and the blocks' as 'a*{part}@...'"
        raise OptionError(f"{site.name}: {error}{way}") from None
    return rows, columns


def stream_names(model: Model) -> dict[int, str]:
    """The names of the streams by the place of the stage that reads them."""
    found: dict[int, str] = {}
    blocks = 1 + max((stage.nodes.layer for stage in _blocks(model)), default=-1)
    seen: dict[int, int] = {}
    for place, stage in enumerate(model.stages):
        nodes = stage.nodes
        if stage.is_source or nodes.kind in BESIDE:
            continue
        if not is_residual(nodes.reads_from):
            if stage.is_readout or nodes.begins:
                found[place] = f"{nodes.reads_from}.resid"
        elif stage.is_readout or nodes.begins:
            found.setdefault(place, f"resid{blocks}")
        else:
            count = seen.get(nodes.layer, 0)
            seen[nodes.layer] = count + 1
            name = f"mid{nodes.layer}" if count else f"resid{nodes.layer}"
            found[place] = name if count < 2 else f"{name}.{count}"
    return found


def _blocks(model: Model) -> list[Stage]:
    return [
        stage
        for stage in model.layers
        if is_residual(stage.nodes.reads_from) and not stage.nodes.begins and stage.nodes.kind not in BESIDE
    ]


# -- finding sites by name -----------------------------------------------------------------------


def _means(name: str, wanted: str) -> bool:
    """Whether a name is meant; brackets are those of source groups, `a9.h2[object]`."""
    return fnmatchcase(name, wanted.replace("[", "[[]"))


def matching(sites: Sites, wanted: str) -> Sites:
    """The sites that a name with `*` in it means: of a node itself, or of the part that the name ends with.

    Streams are meant where no node is: `m*` are MLPs, `mid*` and `resid*` streams.

    Raises:
        NameNotFoundError: if there is none, with the nearest.
    """
    node, part = _split(wanted)
    found = Sites(
        site for site in sites if _means(_split(site.name)[0], node) and _is_part(_split(site.name)[1], part)
    )
    nodes = Sites(site for site in found if site.kind != "stream")
    return nodes or found or _refuse(sites, wanted)


def listed(sites: Sites, wanted: str) -> Sites:
    """The sites to list for a name with `*` in it: without a part, all parts of the nodes that it means.

    Raises:
        NameNotFoundError: if there is none, with the nearest.
    """
    node, part = _split(wanted)
    if part:
        return matching(sites, wanted)
    found = Sites(site for site in sites if _means(site.node, node))
    return found or _refuse(sites, wanted)


def _refuse(sites: Sites, wanted: str) -> Sites:
    node, part = _split(wanted)
    nodes = {site.node for site in sites}
    if part and any(_means(each, node) for each in nodes):
        own = sorted({_split(site.name)[1] for site in sites if _means(site.node, node)} - {""})
        has = f"has {', '.join(own)}" if own else "is all that there is of it"
        raise NameNotFoundError(f"there is no {wanted!r}: {node} {has}")
    if "*" in wanted or "?" in wanted:
        raise NameNotFoundError(f"no site is called {wanted!r}: model.sites() lists them all")
    bare, number = numbered(wanted)
    if number is not None and any(_means(name, bare) for name in sites.names):
        raise NameNotFoundError(f"{wanted!r} is a part of {bare!r}, which is what is listed")
    here = _spelt_here(wanted)
    if here and any(_means(site.name, here) for site in sites):
        raise NameNotFoundError(f"unknown site {wanted!r}: here it is {here!r}")
    pieces = [
        name for name in sites.names if name.startswith((f"{node}[", f"{node}.")) and not _split(name)[1]
    ]
    if pieces:
        shown = ", ".join(pieces[:6]) + (f" and {len(pieces) - 6} more" if len(pieces) > 6 else "")
        raise NameNotFoundError(f"there is no {wanted!r}: {node} is cut into {shown}")
    raise unknown_name("site", wanted, sites.names)


ELSEWHERE = {
    "resid_pre": "resid{0}",
    "resid_mid": "mid{0}",
    "resid_post": "resid{1}",
    "pattern": "a{0}.*.pattern",
    "scores": "a{0}.*.scores",
    "hook_q": "a{0}.*<q>",
    "hook_k": "a{0}.*<k>",
    "hook_v": "a{0}.*<v>",
    "hook_z": "a{0}.*.z",
    "mlp.hook_post": "m{0}.hidden",
    "mlp.act": "m{0}.hidden",
    "mlp": "m{0}",
    "attn": "a{0}.*",
    "blocks": "resid{1}",
}
"""Sites by what their names contain in other libraries; {0} is the block, {1} the one after it."""


def _spelt_here(name: str) -> str | None:
    """How something is written here that has a name of another library, or nearly one of ours.

    Example:
        >>> _spelt_here("blocks.5.attn.hook_pattern"), _spelt_here("resid_post.5"), _spelt_here("a5.h2.q")
        ('a5.*.pattern', 'resid6', 'a5.h2<q>')
    """
    if read := re.fullmatch(r"(a\d+\.h\d+)\.([qkvg])", name):
        return f"{read[1]}<{read[2]}>"
    if layer := re.fullmatch(r"(a\d+)(\.\w+)?", name):
        return f"{layer[1]}.*{layer[2] or ''}"
    if block := re.search(r"\d+", name):
        for word, here in ELSEWHERE.items():
            if word in name.lower():
                return here.format(int(block[0]), int(block[0]) + 1)
    return None


def _split(name: str) -> tuple[str, str]:
    """Node and part: "a5.h2" and ".pattern", "<q>" or ""."""
    if name.endswith(">"):
        node, _, port = name.partition("<")
        return node, f"<{port}"
    node, dot, part = name.rpartition(".")
    return (node, f".{part}") if dot and part in PARTS else (name, "")


def _is_part(own: str, wanted: str) -> bool:
    return own == wanted if "*" not in wanted else bool(own) and _means(own, wanted)


def parsed(key: str) -> tuple[str, str | None, str | None]:
    """The name, and the tokens after `@`: those read or changed, and of scores and patterns the keys.

    Example:
        >>> parsed("a3.h1.pattern@patch->cls")
        ('a3.h1.pattern', 'cls', 'patch')
    """
    name, at, tokens = key.partition("@")
    if at and not tokens.strip():
        raise OptionError(f"{key!r} names no tokens after the @: leave it out, or write @cls or @patch")
    source, arrow, target = tokens.partition("->")
    if not arrow:
        return name.strip(), tokens.strip() or None, None
    if not source.strip() or not target.strip():
        raise OptionError(f"{key!r}: write where from and where to, as in @patch->cls")
    return name.strip(), target.strip(), source.strip()


_NUMBERED = re.compile(r"(.*)\[\s*(\d+)\s*\]")


def numbered(name: str) -> tuple[str, int | None]:
    """A name, and the neuron (coordinate, class) in brackets after it.

    Example:
        >>> numbered("m3.hidden[17]"), numbered("m3")
        (('m3.hidden', 17), ('m3', None))
    """
    match = _NUMBERED.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


def check_number_of(site: Site, number: int) -> None:
    """Refuse a neuron (coordinate, class) that a site does not have.

    Raises:
        OptionError: naming how many there are, or how entries of patterns are named.
    """
    if site.kind in LOOKS:
        raise OptionError(f"{site.name} has no neurons: its entries are named as {site.name}@3->cls")
    if number >= site.shape[-1]:
        raise OptionError(f"there is no {site.called(number)}: there are {site.shape[-1]}, from 0")
