"""A model as the library sees it: stages, names, and what is needed to feed it images."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from circuitvit.errors import DataError, ModelError, OptionError
from circuitvit.graph import Graph, notebook
from circuitvit.models.changes import Change, Value
from circuitvit.models.edit_hash import description
from circuitvit.models.edits import edit
from circuitvit.models.families import Family
from circuitvit.models.families.family import Grid
from circuitvit.models.folding import to_module
from circuitvit.models.habits import COUNTERPARTS, missing
from circuitvit.models.refusals import hooks_of
from circuitvit.models.rules import BackwardRules
from circuitvit.models.sites import Sites, all_sites, listed
from circuitvit.models.stages import Stage, through
from circuitvit.models.tokens import Groups
from circuitvit.models.weights import content_hash, hash_with, libraries
from circuitvit.models.words import PLACE, Words, with_prompts
from circuitvit.models.zoo import Card, InputSpec

if TYPE_CHECKING:
    from circuitvit.engine.kept import Activations
    from circuitvit.models.heads import Head
    from circuitvit.models.refined import Refinement


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A Vision Transformer as a list of stages: what `load` and `wrap` give and every method takes.

    The module that was wrapped is never changed. The stages hold a frozen copy of its structure in
    evaluation mode whose tensors share memory with the original.

    Attributes:
        name: for files and messages.
        stages: in running order: one source, layers, one readout.
        module: the frozen copy; calling it is the model's own forward, but for a head that was put on.
        preprocessing: how image files become inputs.
        n_logits: number of logits.
        family: what knows the module's attributes.
        prefix: the kinds of the tokens before the patches, such as `("cls", "reg", "reg")`.
        classes: names of the logits, or None where unknown; synonyms are separated by commas.
        synsets: WordNet ids of the logits, for ImageNet models.
        has_classes: whether the logits are of classes; False where they are features.
        card: what is known about how the model was trained, for bundled and own models.
        head: the linear classifier that `with_head` put on the module's features, or None.
        under: the model that it was put on, or None.
        origin: the module that was wrapped, as long as somebody else holds it.
        rules: by which its gradients flow, see `with_rules`; None for those of the module itself.
        edits: what is changed in it, see `edit`.
        bare: the model without its edits; None for one that has none.
        words: of a model of images and texts the text side; None for one without.
        wordless: why a model that could have words was loaded without.
        refinements: what nodes are cut into, by their names, see `refine_nodes` and `split_sources`.
        coarse: the model, without edits, in which nothing is cut; None for one that is not refined.

    Example:
        >>> import circuitvit as cv
        >>> model = cv.load("catdog-tiny")
        >>> model.graph.n_edges == len(model.graph.edges)
        True
    """

    name: str
    stages: tuple[Stage, ...]
    module: nn.Module
    preprocessing: InputSpec
    n_logits: int
    family: Family
    prefix: tuple[str, ...] = ("cls",)
    classes: tuple[str, ...] | None = None
    synsets: tuple[str, ...] | None = None
    has_classes: bool = True
    card: Card | None = None
    head: Head | None = None
    under: Model | None = None
    origin: Origin = field(default_factory=lambda: Origin(None))
    rules: BackwardRules | None = None
    edits: tuple[Change, ...] = ()
    bare: Model | None = None
    words: Words | None = None
    wordless: str = ""
    refinements: Mapping[str, Refinement] = field(default_factory=dict)
    coarse: Model | None = None

    @cached_property
    def graph(self) -> Graph:
        """The model's graph, with one token group."""
        return Graph(tuple(stage.nodes for stage in self.stages), d_model=self.d_model)

    @property
    def layers(self) -> tuple[Stage, ...]:
        """The stages between the source and the readout."""
        return self.stages[1:-1]

    @cached_property
    def d_model(self) -> int:
        """Width of the residual stream."""
        if self.bare is not None:
            return self.bare.d_model
        with torch.no_grad():
            return int(self.embed(self.blank()).shape[-1])

    @cached_property
    def essential(self) -> tuple[Stage, ...]:
        """The stages without what the logits do not depend on.

        In the last layer only the tokens that the readout reads matter: from the last stage that mixes
        tokens on, the stream is cut to them. Logits, gradients and effects are those of `stages`.
        """
        mixing = [place for place, stage in enumerate(self.layers, 1) if any(stage.nodes.mixes or ())]
        if self.leading is None or not mixing:
            return self.stages
        last = mixing[-1]
        cut, after = self.stages[last].leading(self.leading), self.stages[last + 1 :]
        if cut.cut is not None:
            after = tuple(stage.leading(self.leading) for stage in after)
        return (*self.stages[:last], cut, *after)

    @property
    def leading(self) -> int | None:
        """The number of tokens that the readout reads, if those are the first ones; None if it reads all."""
        if any(change.sees_all for change in self.edits):
            return None
        tokens: int | None = getattr(self.stages[-1], "tokens", None)
        return tokens

    @property
    def reading(self) -> int:
        """The number of the first stage that only prepares the logits: that of a pool, or the readout."""
        return next(place for place, stage in enumerate(self.stages) if stage.nodes.pools or stage.is_readout)

    # -- tokens --------------------------------------------------------------------------------------

    @cached_property
    def grid(self) -> Grid:
        """Rows and columns of patches of an image of the model's own size; of a clip with time first.

        Raises:
            DataError: if its tokens form no grid.
        """
        return self.grid_at(*self.preprocessing.size[1:])

    def grid_at(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of an image of this size; of a clip with time first.

        Raises:
            DataError: if the model takes no image of this size, or its tokens form no grid.
        """
        *before, own_height, own_width = self.preprocessing.shape
        if (height, width) != (own_height, own_width) and not self.resizable:
            raise DataError(
                f"{self.name} takes {self.preprocessing.what}s of {own_height} x {own_width}, not of "
                f"{height} x {width}: {self._way_to_size(width)}"
            )
        grid = self.family.grid(self.module, height, width)
        patches = self.tokens_at(height, width) - len(self.prefix)
        if grid is None and len(before) == 1:  # of all rectangles, the one most like the image
            grids = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
            unlike = {grid: abs(math.log(grid[0] * width / (grid[1] * height))) for grid in grids}
            grid = min(grids, key=lambda grid: unlike[grid], default=())
            if grid and unlike[grid] > math.log(1.5):  # patches may be oblong, but hardly more than this
                grid = ()
        if not grid or math.prod(grid) != patches:
            raise DataError(f"{patches} patches of {self.name} form no grid over {height} x {width} pixels")
        return grid

    def _way_to_size(self, width: int) -> str:
        """How inputs of another size can be had."""
        if self.preprocessing.what != "sentence":
            return "resize and crop them to that"
        return f"edits at places and source groups are of one number of tokens, .text(images, tokens={width})"

    def tokens_at(self, height: int, width: int) -> int:
        """The number of tokens of an image of this size, of a clip with all its frames.

        Raises:
            DataError: if the module takes no image of this size; with what it says.
        """
        *before, _, _ = self.preprocessing.shape
        blank = self.blank((*before, height, width))
        try:
            with torch.no_grad():
                return (self.bare or self).embed(blank).shape[1]
        except (AssertionError, RuntimeError, ValueError) as error:  # what modules raise on such sizes
            what = self.preprocessing.what
            raise DataError(f"{self.name} takes no {what} of {height} x {width}: {error}") from error

    def blank(self, shape: Sequence[int] | None = None) -> Tensor:
        """An input with nothing to see, of the model's own shape or another: a batch of one."""
        return self.family.blank(self.module, self.preprocessing.shape if shape is None else shape)

    @property
    def resizable(self) -> bool:
        """Whether the model takes images of other sizes than its own; with edits at places it does not."""
        bound = any(each.is_bound for each in (*self.edits, *self.refinements.values()))
        return not bound and self.family.resizable(self.module)

    def embed(self, images: Tensor) -> Tensor:
        """Images, or clips, as `preprocessing.shape` says, to the first layer's stream
        `(batch, token, d_model)`.
        """
        source = self.stages[0]
        return source.total(source.write(source.read(images)))

    def __call__(self, images: Tensor, *, grad: bool = False) -> Tensor:
        """The model's own forward: images, or clips, to logits `(batch, class)`.

        Args:
            images: as `preprocessing.shape` says, with a batch before it.
            grad: keep the graph, so that the logits can be differentiated by the images, and by tensors in
                edits.

        Raises:
            DataError: for something other than a tensor.
            OptionError: under `torch.autocast`, as `refresh`; if edits are for other images than these.
            ModelError: if there are torch's hooks on the module.
        """
        if not isinstance(images, Tensor):
            raise DataError(
                f"a model is called with a preprocessed tensor (image, channel, height, width), not with "
                f"{type(images).__name__}: model.activations(images, 'logits') takes files, folders and "
                "pictures too"
            )
        self._refuse_autocast()
        self.origin.refuse_hooks(self.module)
        with torch.set_grad_enabled(grad):
            if self.head is None and not self.edits:
                return self.family.run(self.module, images)
            changed = self.edits or self.refinements
            if changed and not self.resizable and images.shape[1:] != self.preprocessing.shape:
                own, given = self.preprocessing.shape, tuple(images.shape[1:])
                what, way = self.preprocessing.what, self._way_to_size(given[-1])
                raise DataError(f"{self.name} takes {what}s of {own}, not of {given}: {way}")
            self.batch_of(len(images), len(images))
            return through(self.essential[1:], self.embed(images))  # the module knows nothing of the head

    # -- looking inside and changing -----------------------------------------------------------------

    @cached_property
    def all_sites(self) -> Sites:
        """Everything in the model that can be read or changed; of an edited one what the bare one has."""
        return all_sites(self) if self.bare is None else self.bare.all_sites

    @cached_property
    def n_tokens(self) -> int:
        """The number of tokens of an image of the model's own size."""
        return self.tokens_at(*self.preprocessing.size[1:])

    def sites(self, names: str = "*") -> Sites:
        """What can be read or changed by name: see `circuitvit.models.sites`.

        Args:
            names: with `*` for anything; of a node all that there is of it.

        Raises:
            NameNotFoundError: if there is none, with the nearest.

        Example:
            >>> import circuitvit as cv
            >>> cv.load("catdog-tiny").sites("a1.h0")
            7 sites
            a1.h0<q>       37 x 16  token, d_head   projection
            a1.h0<k>       37 x 16  token, d_head   projection
            a1.h0<v>       37 x 16  token, d_head   projection
            a1.h0.scores   37 x 37  query, key      nats
            a1.h0.pattern  37 x 37  query, key      share of attention
            a1.h0.z        37 x 16  token, d_head   mixed values
            a1.h0          37 x 64  token, d_model  residual stream
        """
        return listed(self.all_sites, names)

    def edit(self, edits: Mapping[str, Value], *, groups: Groups | None = None) -> Model:
        """A model with some of its sites changed; this one stays as it is, and so does the user's module.

        What is downstream answers to the change. An edited model is a model: it can be scored, searched,
        tested, looked at, and edited again.

        Args:
            edits: by the names of sites, in order: a number, a tensor, a function of what is there (and of
                where that is, see `circuitvit.models.changes.At`), or `cv.add`, `cv.clamp`, `cv.causal`,
                `cv.knock_out`. A function gets a batch of images and must not mix them, nor give something
                else each time, nor stop gradients: it is tried on random numbers.
            groups: token groups whose names may stand after an @.

        Raises:
            NameNotFoundError: if there is no such site, with the nearest.
            OptionError: if a value does not fit, or there are no such tokens.

        Example:
            >>> import torch
            >>> import circuitvit as cv
            >>> model = cv.load("catdog-tiny")
            >>> edited = model.edit({"m1": 0, "a1.*.pattern@patch->cls": cv.knock_out()})
            >>> edited(torch.zeros(1, 3, 48, 48)).shape
            torch.Size([1, 4])
        """
        return edit(self, edits, groups)

    def to_module(self, *, shrink: bool = False) -> nn.Module:
        """A plain module with the edits in its weights: see `circuitvit.models.folding.to_module`."""
        return to_module(self, shrink=shrink)

    def activations(self, images: Any, names: str | Sequence[str], **options: Any) -> Activations:
        """Activations by name, in memory or streamed into a file: see `circuitvit.activations`."""
        from circuitvit.engine.reading import activations

        return activations(self, images, names, **options)

    def with_prompts(self, prompts: Sequence[str], templates: Sequence[str] | None = None) -> Model:
        """The model with sentences for classes, where it is one of images and texts: see
        `circuitvit.models.words.with_prompts`.
        """
        return with_prompts(self, prompts, templates)

    def text(self, images: Any = None, tokens: int | None = None) -> Model:
        """The text tower as a model, where this is one of images and texts: its inputs are sentences, and its
        logits the similarity to these images. See `circuitvit.tasks.text_tower.text_tower`.
        """
        from circuitvit.tasks.text_tower import text_tower

        return text_tower(self, images, tokens)

    @property
    def edited_images(self) -> int | None:
        """The number of images that edits have values for, which have to be run together; None for any."""
        own = (*(change.images for change in self.edits), *(how.images for how in self.refinements.values()))
        return next((images for images in own if images is not None), None)

    def check_base(self, images: Callable[[], str]) -> None:
        """Refuse base images other than those that edits hold values of.

        Args:
            images: gives the fingerprint of those at hand; only called where there are such edits.

        Raises:
            OptionError: naming the edits.
        """
        bound = [change for change in self.edits if change.base]
        if bound and (given := images()) != bound[0].base:
            held = ", ".join(change.name for change in bound if change.base != given)
            raise OptionError(
                f"{held} of {self.name} is frozen at what it was on other base images than these: give "
                "those, in the same order, or freeze it on these with cv.refine_nodes(..., task=this task)"
            )

    def batch_of(self, images: int, size: int) -> int:
        """How many images to run at once, where it is not `size` because edits are for all of them.

        Raises:
            OptionError: if edits are for another number of images.
        """
        own = self.edited_images
        if own is None:
            return size
        if own != images:
            raise OptionError(
                f"edits or source groups of {self.name} are for {own} images, and there are {images}: give "
                "what is the same for all images, or run these images"
            )
        return own

    def with_rules(self, rules: BackwardRules) -> Model:
        """A model with the same outputs and other gradients; this one stays as it is.

        Raises:
            UnsupportedModelError: if a stage is of a kind that the rules do not know.
        """
        if rules == self.rules:
            return self
        return replace(self, stages=tuple(stage.with_rules(rules) for stage in self.stages), rules=rules)

    def token_kinds(self, n_tokens: int) -> tuple[str, ...]:
        """The kind of each of `n_tokens` tokens: "cls", "dist", "reg" or "patch"; of a sentence "start",
        "word" or "end".
        """
        return self.family.kinds(self.prefix, n_tokens)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The sentences, or names in templates, that are its classes; () where classes are something else."""
        is_prompted = self.head is not None and self.head.templates is not None
        return self.classes or () if is_prompted else ()

    @property
    def templates(self) -> tuple[str, ...]:
        """The sentences that the prompts were put in as names; () where they are sentences themselves."""
        given = () if self.head is None else self.head.templates or ()
        return () if given == (PLACE,) else given

    @property
    def chooses(self) -> bool:
        """Whether the outputs choose between classes, so that there are predictions and a KL between them."""
        return self.has_classes and self.n_logits > 1

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    # -- weights -------------------------------------------------------------------------------------

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.module.parameters()
        yield from self.module.buffers()
        if self.head is not None:
            yield from self.head.tensors.values()
        yield from (change.tensor for change in self.edits if change.tensor is not None)
        yield from (tensor for how in self.refinements.values() for tensor in how.tensors)

    @property
    def weights_version(self) -> int:
        """A number that grows with every edit of a weight in place that torch counts or `refresh` has
        found.
        """
        return self.origin.edits + sum(tensor._version for tensor in self._watched)

    @cached_property
    def _watched(self) -> tuple[Tensor, ...]:
        """The tensors once and for all, as searches ask for their versions with every figure."""
        return tuple(self._tensors())

    def refresh(self) -> None:
        """Notice what has been done to the weights since the last call; every public function begins with
        this.

        Edits by way of `.data` are not counted by torch, so some rows of every tensor are looked at: whatever
        changes a tensor, a layer or a head is seen, and a single number may be missed.

        Raises:
            ModelError: if the module that was wrapped has got other tensors, which this model does not see.
            OptionError: under `torch.autocast`, where the model's own products change their dtype.
        """
        self._refuse_autocast()
        self.origin.check(self.module)
        self.origin.refuse_hooks(self.module)
        if self.origin.looks_different(self._tensors()):
            for stage in self.stages:
                stage.forget()

    def _refuse_autocast(self) -> None:
        if torch.is_autocast_enabled(self.device.type):
            raise OptionError(
                "torch.autocast is on, which changes the dtype of some products and not of others: "
                "leave it, or give the model another dtype, as cv.load(..., dtype=torch.bfloat16) does"
            )

    @property
    def weights_hash(self) -> str:
        """SHA-256 over the values of all weights, and of edits; the same for the same model in another
        library's layout.
        """
        if self.bare is not None:  # what a function reads, or a direction that is learned, changes unseen
            return hash_with(self.bare.weights_hash, *description(self.edits))
        if self.coarse is not None:
            each = {node: how.description for node, how in self.refinements.items()}
            said = "||".join(f"{node} {words}" for node, (words, _) in each.items())
            return hash_with(
                self.coarse.weights_hash, said, [own for _, all_ in each.values() for own in all_]
            )
        return self.origin.remembered(self.weights_version, self._hash)

    def _hash(self) -> str:
        found = content_hash(self.stages, self.module, lambda: self(self.blank()))
        head, parts = self.head, getattr(self.stages[-1], "parts", None)
        if head is None or (head.tokens == "pooled" and parts is not None):  # where it is as if built in
            return found
        return hash_with(found, head.tokens, head.tensors.values())

    @cached_property
    def libraries(self) -> dict[str, str]:
        """Versions of the libraries that its parts come from, and those of its prompts, by name."""
        if not self.prompts or self.words is None:
            return libraries(self.module)
        tokenizer = self.words.tokenizer
        return libraries(self.module, *self.words.module.modules(), getattr(tokenizer, "given", tokenizer))

    if not TYPE_CHECKING:  # for type checkers there is nothing but what is declared

        def __getattr__(self, name: str) -> Any:
            """Called for what is not there: says what stands for a habit from another library."""
            if name in COUNTERPARTS:
                raise AttributeError(missing(name), name=name, obj=self)
            return object.__getattribute__(self, name)  # raises what it has raised

    def __repr__(self) -> str:
        size = "x".join(str(side) for side in self.preprocessing.shape)
        classes = f", {len(self.classes)} classes" if self.classes else ""
        edges = f"{self.graph.n_edges:,} edges"
        return f"Model({self.name}: {len(self.layers)} stages, {edges}, input {size}{classes})"

    def _repr_html_(self) -> str:
        size = " x ".join(str(side) for side in self.preprocessing.shape)
        few = (
            f": {', '.join(self.classes[:5])}{', ...' if len(self.classes) > 5 else ''}"
            if self.classes
            else ""
        )
        rows = [
            ("stages", f"{len(self.layers)}, in a stream of width {self.d_model}"),
            ("graph", f"{len(self.graph.nodes):,} nodes, {self.graph.n_edges:,} edges"),
            ("input", f"{self.preprocessing.what} of {size}"),
            ("outputs", f"{self.n_logits:,}{few}"),
            *((("edits", len(self.edits)),) if self.edits else ()),
        ]
        return notebook.card(f"Model {self.name}", rows)


class Origin:
    """The module that a model was made of, and what its weights looked like when they were last looked at."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = None if module is None else weakref.ref(module)
        self.edits = 0
        self._look: list[float] | None = None
        self._hash: tuple[int, str] | None = None
        self._counters: frozenset[tuple[str, str]] | None = None
        self._parts: dict[str, int] | None = None
        parts = () if module is None else module.modules()
        self._hooks = frozenset(id(hook) for part in parts for hook in hooks_of(part))  # told when wrapping

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return Origin(None)  # a copied model has weights of its own

    def afresh(self) -> Origin:
        """The same module for another model, which has looked at nothing yet."""
        origin = Origin(None if self._module is None else self._module())
        origin._counters, origin._hooks, origin._parts = self._counters, self._hooks, self._parts
        return origin

    def check(self, twin: nn.Module) -> None:
        """Refuse a module whose tensors are no longer those of its twin, and a twin of which a part was
        exchanged, as the model's stages hold the part that was there before.

        Raises:
            ModelError: naming one of them.
        """
        parts = {name: id(each) for name, each in (*twin.named_modules(), *twin.named_parameters())}
        self._parts = parts if self._parts is None else self._parts
        if parts != self._parts:
            name = next(name for name in (*parts, *self._parts) if parts.get(name) != self._parts.get(name))
            raise ModelError(
                f"{name} of model.module has been exchanged, which the model does not see: change the module "
                "first, and wrap it then; for another head of an existing model, use cv.with_head"
            )
        module = None if self._module is None else self._module()
        if module is None:
            return
        own, now = (
            {name: tensor.data_ptr() for name, tensor in (*each.named_parameters(), *each.named_buffers())}
            for each in (twin, module)
        )
        if own == now:
            self._check_structure(twin, module)
        else:
            name = next(name for name in (*own, *now) if own.get(name) != now.get(name))
            raise ModelError(
                f"{name} of the module that was wrapped is another tensor now (a part was replaced, or the "
                "module was moved, cast, or loaded with assign=True): wrap the module again"
            )

    def _check_structure(self, twin: nn.Module, module: nn.Module) -> None:
        """Refuse a module with other parts, or other settings of a part, than when it was wrapped.

        What differs when a model is made counts the runs of the twin, and is no setting.

        Raises:
            ModelError: naming the part.
        """
        ours, theirs = dict(twin.named_modules()), dict(module.named_modules())
        said = {
            name: tuple(_said(parts.get(name)) for parts in (ours, theirs)) for name in {**ours, **theirs}
        }
        differing = {
            (name, key)
            for name, (before, after) in said.items()
            for key, value in before.items()
            if after.get(key) != value
        }
        if self._counters is None:
            self._counters = frozenset(differing)
        for name, (before, _) in said.items():
            changed = [key for key in before if (name, key) in differing - self._counters]
            if changed or not before:
                raise ModelError(
                    f"{name or type(module).__name__} of the module that was wrapped has been changed since "
                    f"({', '.join(changed) or 'it is new'}): wrap the module again"
                )

    def refuse_hooks(self, twin: nn.Module) -> None:
        """Refuse hooks of torch's that were put on the frozen copy, or on the module since it was wrapped.

        Raises:
            ModelError: naming the module that has one.
        """
        module = None if self._module is None else self._module()
        for each, known in ((twin, frozenset[int]()), (module, self._hooks)):
            for name, part in () if each is None else each.named_modules():
                if any(id(hook) not in known for hook in hooks_of(part)):
                    raise ModelError(
                        f"{name or type(part).__name__} has a hook of torch's, which parts of this library "
                        "would see and others not: remove it. To change activations, use "
                        "model.edit({'a5.h2': ...}); to read them, model.activations(images, ['a5.h2'])"
                    )

    def looks_different(self, tensors: Iterator[Tensor]) -> bool:
        """Whether the values have changed since the last look."""
        look = [_fingerprint(tensor) for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
        changed = self._look is not None and look != self._look
        self._look = look
        self.edits += changed
        return changed

    def remembered(self, version: int, make: Callable[[], str]) -> str:
        """The hash of weights of this version."""
        if self._hash is None or self._hash[0] != version:
            self._hash = version, make()
        return self._hash[1]


def _said(part: nn.Module | None) -> dict[str, object]:
    """The class of a part, its settings that are words, truth values or numbers, and whether its forward is
    that of the class.
    """
    if part is None:
        return {}
    said = {name: value for name, value in vars(part).items() if isinstance(value, (str, int, float))}
    forward = "forward" in vars(part) and "replaced"
    return {**said, "training": None, "class": type(part).__name__, "forward": forward}


ROWS = 64
"""Rows of each tensor that are looked at, evenly spaced: every head of every layer has one among them."""


@torch.no_grad()
def _fingerprint(tensor: Tensor) -> float:
    """A number that changes with the values and with their order: some rows, times two fixed vectors."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)
    rows = rows[:: max(1, len(rows) // ROWS)] if tensor.ndim > 1 else rows
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    down, across = (_ramp(side, rows.dtype, rows.device) for side in rows.shape)
    return float(torch.dot(rows @ across, down))


@lru_cache(maxsize=256)
def _ramp(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers between 1 and 2 that follow no pattern of weights."""
    return 1 + torch.arange(size, device=device).to(dtype).mul_(0.618).frac_()
