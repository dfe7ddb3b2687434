"""The task: which images show the behaviour, which do not, how it is measured, and what ablation means.

A `Task` is written down without a model. Preparing it for one loads and checks the images, turns class names
into indices, and refuses what cannot work before anything long is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL.Image import Image
from torch import Tensor

from circuitvit._keywords import check_processes
from circuitvit._progress import announce
from circuitvit.errors import DataError, OptionError, check_whole, counted
from circuitvit.graph import Direction, Graph, notebook
from circuitvit.models import Model
from circuitvit.models.sentences import TextSpec
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.ablations import Ablation, Patch, Resample, as_ablation
from circuitvit.tasks.ahead import in_turn, ready
from circuitvit.tasks.groups import TokenGroups
from circuitvit.tasks.image_files import is_sentence
from circuitvit.tasks.images import (
    FileImages,
    HeldImages,
    Images,
    ImageSpec,
    MadeImages,
    as_images,
    files_of,
    refuse_other,
)
from circuitvit.tasks.inputs import fingerprint_in_order
from circuitvit.tasks.metrics import BoundMetric, ClassSpec, Metric, PerPair, as_metric, bind, logit_diff
from circuitvit.tasks.pairs import Pairing, Pairs, check_pairing, pair_files
from circuitvit.tasks.sentences import refuse_unlike
from circuitvit.tasks.tables import Table, read_table
from circuitvit.tasks.written import as_python

DIRECTIONS = ("noising", "denoising")

GROUPS: dict[str, Callable[[Model, int], TokenGroups]] = {
    "kind": TokenGroups.by_kind,
    "frame": TokenGroups.by_frame,
    "token": TokenGroups.by_token,
}
"""Token groups by name, made of a model and its number of tokens."""

BATCH = 8
"""Images run at once where there are few of them: memory grows with this."""


@dataclass(frozen=True, eq=False)
class Task:
    """A behaviour: clean images that show it, corrupt ones that do not, a metric and an ablation.

    Args:
        clean: images with the behaviour. Tensors `(image, channel, height, width)` are taken as already
            preprocessed; paths go through the model's own preprocessing. For a model that sees clips:
            `(clip, time, channel, height, width)`, or files of frames. For a text tower: sentences.
        corrupt: their counterfactuals, one for each clean image, in the same order; or a function that makes
            them, one by one, of the clean ones, such as `circuitvit.tasks.corruptions.reverse`.
        metric: how the behaviour is measured; by default the logit difference between the classes that the
            model gives the clean and the corrupt image.
        ablation: what replaces a sender's output on an ablated edge: "patch", "mean", "mean-tokens", "zero",
            "noise", "resample", or one of `circuitvit.tasks.ablations`.
        direction: "noising" ablates edges of the clean run; "denoising" restores edges of the corrupt run.
        groups: resolve edges by token: "kind" for class token, registers and patches apart (of sentences
            start, words and end), "frame" for the patches of a clip by time, "token" for every token alone,
            or `TokenGroups`.
        preprocessing: instead of the model's own.
        pair: how files are paired: "names", "order" (of their names) or "nearest" (the most alike), see
            `circuitvit.tasks.pairs`. By default two folders are paired by name where their files have the
            same names, and in order where they have none in common; a single file is the partner of every
            file of a folder; lists are paired as they are.
        table: that the pairs were read from, by `from_csv`.
        pairing: how images that come as pairs were put together, in a sentence, where somebody knows.

    Example:
        >>> from circuitvit.tasks import Task, logit_diff
        >>> task = Task("cats/", "dogs/", metric=logit_diff("tabby", "Border collie"))
        >>> task.metric.name
        'logit_diff'
    """

    clean: ImageSpec
    corrupt: ImageSpec | Callable[[Tensor], Tensor] | None = None
    metric: Metric | str | Callable[[Tensor], Tensor] = field(default_factory=logit_diff)
    ablation: Ablation | str = "patch"
    direction: Direction = "noising"
    groups: TokenGroups | str | None = None
    preprocessing: InputSpec | None = None
    pair: Pairing | None = None
    table: Table | None = None
    pairing: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", as_metric(self.metric))
        object.__setattr__(self, "ablation", as_ablation(self.ablation))
        if self.direction not in DIRECTIONS:
            raise OptionError(f"the direction is 'noising' or 'denoising', not {self.direction!r}")
        if isinstance(self.groups, str) and self.groups not in GROUPS:
            raise OptionError(
                f"groups is {' or '.join(map(repr, GROUPS))} or a TokenGroups, not {self.groups!r}"
            )
        if self.direction == "denoising" and not isinstance(self.ablation, Patch):
            raise OptionError(
                "denoising restores the clean image's outputs, so its only ablation is 'patch', "
                f"not {as_ablation(self.ablation).name!r}"
            )
        if self.corrupt is None and isinstance(self.ablation, Patch):
            raise OptionError(
                'patch ablation needs corrupt images: give corrupt=, or another ablation=, such as "mean"'
            )
        check_pairing(self.pair)
        if self.pair is not None and not (_is_path(self.clean) and _is_path(self.corrupt)):
            raise OptionError(
                f"files are paired by {self.pair}: give folders or files for both clean and corrupt"
            )

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        metric: Metric | str | Callable[[Tensor], Tensor] = "logit_diff",
        pair: Pairing | None = None,
        **options: Any,
    ) -> Task:
        """A task from a table with the header `clean,corrupt,target,foil`; the last two may be left out.

        The header may also be the names of two classes, see `circuitvit.tasks.tables.read_table`.

        Args:
            path: of the CSV; paths in it are relative to its folder, and may be of images or of folders.
            metric: whose target and foil the columns fill in.
            pair: how the images of folders are paired, as for `Task`.
            **options: as for `Task`.

        Raises:
            FileError: if the table cannot be read.
            DataError: if a row is incomplete; the message names the line.
        """
        table = read_table(path, pair, options.get("preprocessing"))
        rows = table.rows
        targets, foils = (
            _column([getattr(row, side) for row in rows], side, path) for side in ("target", "foil")
        )
        return cls(
            [row.clean for row in rows],
            [row.corrupt for row in rows],
            as_metric(metric, targets, foils),
            table=table,
            **options,
        )

    def __repr__(self) -> str:
        return f"Task({', '.join(f'{name} {text}' for name, text in self._facts())})"

    def _repr_html_(self) -> str:
        return notebook.card("Task", self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        """What the task says, in short texts; nothing is read for it."""
        metric, ablation = as_metric(self.metric), as_ablation(self.ablation)
        classes = [
            (side, "the model's own top class" if said is None else str(said))
            for side, said, used in (
                ("target", metric.target, metric.uses_target),
                ("foil", metric.foil, metric.uses_foil),
            )
            if used
        ]
        classes += [("to", _described(metric.to))] if metric.to is not None else []
        images = [("clean", self.clean), ("corrupt", self.corrupt)]
        return [
            *((side, _described(source)) for side, source in images if source is not None),
            ("metric", metric.name),
            *((side, said if len(said) <= 60 else said[:59] + "…") for side, said in classes),
            ("ablation", ablation.name),
            ("direction", self.direction),
        ]

    def with_options(self, **changes: Any) -> Task:
        """The same task with some of its parts replaced, such as `ablation="mean"`."""
        if {"clean", "corrupt"} & set(changes):  # then they are not as they were read or paired
            changes = {"table": None, "pairing": "", **changes}
        return replace(self, **changes)

    def prepare(self, model: Model, progress: bool = False, processes: bool = False) -> PreparedTask:
        """Load and check everything for one model.

        Args:
            model: from `load` or `wrap`.
            progress: whether to show a bar while image files are checked.
            processes: share the work on it among the processes of `torch.distributed`, which must all do it.

        Raises:
            DataError: if images cannot be read, do not match each other, or do not fit the model.
            NameNotFoundError: for an unknown class; the message suggests the nearest.
            OptionError: for denoising, where a node's edges are kept in every run; if there are no processes
                to share with.
        """
        check_processes(processes)
        spec = self.preprocessing or model.preprocessing
        if self.direction == "denoising" and model.graph.always.any():
            raise OptionError(
                f"errors of {model.name} are kept in every run, which says nothing of a corrupt run that is "
                "restored: give the task direction='noising', or cv.features(..., error='node')"
            )
        clean, corrupt, pairing = self._images(spec)
        announce(pairing, progress and bool(pairing))
        _check_images(clean, corrupt, model, progress)
        base = corrupt if self.direction == "denoising" and corrupt is not None else clean
        model.check_base(partial(fingerprint_in_order, base))
        assert isinstance(self.metric, Metric)
        assert not isinstance(self.ablation, str)
        if isinstance(self.ablation, Resample) and len(clean) < 2:
            raise DataError("resample ablation needs at least two images to draw from")
        groups = self._token_groups(model, clean)
        bound = bind(
            self.metric,
            model,
            len(clean),
            model.n_logits,
            lambda: _top_classes(model, clean),
            lambda: _top_classes(model, _foil_images(corrupt)),
            lambda image: _output(model, as_images(image, spec), clean),
        )
        names = groups.names if groups is not None else model.graph.groups
        return PreparedTask(
            model=model,
            clean=clean,
            corrupt=corrupt,
            metric=bound,
            ablation=self.ablation,
            direction=self.direction,
            groups=groups,
            graph=model.graph if groups is None else model.graph.with_groups(names),
            spec=spec,
            pairing=pairing,
            code=as_python(self),
            processes=processes,
        )

    def _images(self, spec: InputSpec) -> tuple[Images, Images | None, str]:
        """Both sides, and how files were paired ("" where there was nothing to pair)."""
        if isinstance(spec, TextSpec):
            return *self._sentences(spec), ""
        pairs = self._paired(spec)
        if pairs is not None:
            clean_files, corrupt_files = pairs.sides
            return files_of(clean_files, spec), files_of(corrupt_files, spec), pairs.how
        clean = as_images(self.clean, spec)
        if callable(self.corrupt):
            return clean, MadeImages(clean, self.corrupt), ""
        listed = self.pairing if self.table is None else self.table.how
        return clean, None if self.corrupt is None else as_images(self.corrupt, spec), listed

    def _sentences(self, spec: TextSpec) -> tuple[Images, Images | None]:
        """Both sides of a task of sentences."""
        if self.pair is not None:
            raise OptionError(f"files are paired by {self.pair}, and sentences as they are listed")
        if callable(self.corrupt):
            raise OptionError(
                "sentences have no pixels to be corrupted: give the same sentences with a word exchanged"
            )
        clean = as_images(self.clean, spec)
        corrupt = None if self.corrupt is None else as_images(self.corrupt, spec)
        if corrupt is not None and clean.shape != corrupt.shape:
            refuse_unlike([*clean.names, *corrupt.names], spec)
        return clean, corrupt

    def _paired(self, spec: InputSpec) -> Pairs | None:
        sides = self.clean, self.corrupt
        if self.pair is None and not (all(map(_is_one_path, sides)) and any(map(_is_folder, sides))):
            return None
        clean: Any = self.clean
        corrupt: Any = self.corrupt
        return pair_files(clean, corrupt, self.pair, spec)

    def _token_groups(self, model: Model, clean: Images) -> TokenGroups | None:
        if self.groups is None:
            return None
        image = clean.take(0, 1).to(model.device, model.dtype)
        with torch.no_grad():
            n_tokens = (model.bare or model).embed(image).shape[1]
        groups = GROUPS[self.groups](model, n_tokens) if isinstance(self.groups, str) else self.groups
        for part in model.graph.parts[1:]:
            if part in groups.names:
                raise OptionError(
                    f"a token group cannot be called {part!r}: the pooled tokens of {model.name} are"
                )
        if groups.members.shape[-1] != n_tokens:
            raise DataError(
                f"token groups for {groups.members.shape[-1]} tokens, but the model sees {n_tokens}"
            )
        if groups.members.ndim == 2 and len(groups.members) != len(clean):
            raise DataError(f"token groups for {len(groups.members)} images, but the task has {len(clean)}")
        return groups


@dataclass(frozen=True, eq=False)
class Batch:
    """Some pairs of a task, on the model's device.

    Attributes:
        rows: which pairs, `(batch,)`, on the CPU.
        base: the images whose run is intervened on: clean ones, or corrupt ones when denoising.
        reference: the paired images; None without corrupt images.
        members: the token group of each token, `(token,)` or `(batch, token)`; None for one group.
    """

    rows: Int64[Tensor, " batch"]
    base: Float[Tensor, "batch *shape"]
    reference: Float[Tensor, "batch *shape"] | None
    members: Tensor | None


@dataclass(frozen=True, eq=False, repr=False)
class PreparedTask:
    """A task made ready for one model: images checked, classes resolved. What the engine works on.

    Attributes:
        model: the task was prepared for.
        clean: images with the behaviour.
        corrupt: their counterfactuals, or None.
        metric: bound to the pairs.
        ablation: what replaces a sender's output.
        direction: "noising" or "denoising".
        groups: token groups, or None for one.
        graph: the model's graph, with the task's token groups.
        spec: the preprocessing that image files went through.
        pairing: how files were paired and what was left out, in a sentence; "" where they came as pairs.
        code: the Python that makes the task; "" where it was made of tensors or functions.
        shared: which of how many equal runs of the pairs the batches come from; `(0, 1)` for all. Everything
            else, such as means over all images, is of the whole task.
        processes: whether the processes of `torch.distributed` share the work on the task. Whoever knows how
            takes a share of it and exchanges what was found; everybody else does all of it.
    """

    model: Model
    clean: Images
    corrupt: Images | None
    metric: BoundMetric
    ablation: Ablation
    direction: Direction
    groups: TokenGroups | None
    graph: Graph
    spec: InputSpec
    pairing: str = ""
    code: str = ""
    shared: tuple[int, int] = (0, 1)
    processes: bool = False

    def __len__(self) -> int:
        return len(self.clean)

    def share(self, number: int, count: int) -> PreparedTask:
        """The task whose batches come from one of `count` runs of the pairs, as equal as can be, and which
        is not shared any further."""
        return replace(self, shared=(number, count), processes=False)

    @property
    def is_whole(self) -> bool:
        """Whether the batches are of all pairs, not of a share."""
        return self.shared[1] == 1

    @property
    def denoising(self) -> bool:
        return self.direction == "denoising"

    @property
    def base(self) -> Images:
        """The images whose run is intervened on."""
        return self.corrupt if self.denoising and self.corrupt is not None else self.clean

    @property
    def reference(self) -> Images | None:
        """The images that the base images are paired with."""
        return self.clean if self.denoising else self.corrupt

    @property
    def label(self) -> str:
        """One line for reports and files."""
        count = counted(len(self), "image" if self.corrupt is None else "pair")
        return f"{count}, {self.metric.label}, {self.ablation.name} ablation, {self.direction}"

    def __repr__(self) -> str:
        return f"PreparedTask({self.label}, for {self.model.name})"

    def batches(self, size: int) -> Iterator[Batch]:
        """All pairs in order, `size` at a time; files are decoded as they are needed."""
        return self.batches_at(self.row_ranges(size))

    def batches_at(self, parts: Sequence[range]) -> Iterator[Batch]:
        """The pairs of some ranges of rows in turn; files of the next are decoded while one is worked on."""
        for rows, read in zip(parts, in_turn(self._read, parts, self._sides), strict=True):
            yield self._batch(rows, read)

    def row_ranges(self, size: int) -> list[range]:
        """The rows of each batch, `size` at a time."""
        number, count = self.shared
        first, last = (len(self) * place // count for place in (number, number + 1))
        return [range(start, min(start + size, last)) for start in range(first, last, size)]

    def batch(self, rows: range) -> Batch:
        """The pairs of a contiguous range of rows."""
        return self._batch(rows, self._read(rows))

    @property
    def _sides(self) -> list[Images]:
        return [self.base] if self.reference is None else [self.base, self.reference]

    def _read(self, rows: range) -> list[Tensor]:
        return [ready(each, rows, self.model) for each in self._sides]

    def _batch(self, rows: range, read: Sequence[Tensor]) -> Batch:
        members, device = None, self.model.device
        if self.groups is not None:
            members = self.groups.members.to(device)
            members = members[rows.start : rows.stop] if members.ndim == 2 else members
        base, *reference = (each.to(device, non_blocking=True) for each in read)
        return Batch(torch.arange(rows.start, rows.stop), base, reference[0] if reference else None, members)


def prepare(
    model: Model, task: Task | PreparedTask, progress: bool = False, processes: bool = False
) -> PreparedTask:
    """A task prepared for a model: the one door. A task that is prepared already is not read again.

    Raises:
        OptionError: if it was prepared for another model, what is given is no model or no task, or there are
            no processes to share the work with.
        ModelError: if the module that was wrapped has got other parts since, see `Model.refresh`.
    """
    if not isinstance(model, Model):
        way = "wrap it with cv.wrap first" if isinstance(model, torch.nn.Module) else "give what cv.load gave"
        raise OptionError(f"{type(model).__name__} is no model of circuitvit: {way}, and the task after it")
    if not isinstance(task, (Task, PreparedTask)):
        raise OptionError(f"{type(task).__name__} is no task: give a cv.Task after the model")
    model.refresh()
    if isinstance(task, Task):
        return task.prepare(model, progress, processes)
    if task.model is not model:
        raise OptionError(f"the task was prepared for {task.model.name}, not for this {model.name}")
    check_processes(processes)
    return replace(task, processes=True) if processes and not task.processes else task


def _column(values: list[Any], side: str, path: str | Path) -> PerPair | None:
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        raise DataError(f"{path}: some rows have a {side} and some have none: give all or none")
    classes: tuple[ClassSpec, ...] = tuple(values)
    return PerPair(classes)


def _described(source: object) -> str:
    """A source of images in a few words."""
    if isinstance(source, (Tensor, np.ndarray)):
        return f"tensor {' x '.join(map(str, source.shape))}"
    if isinstance(source, (str, Path)):
        return str(source)
    if callable(source):
        made = source.func if isinstance(source, partial) else source
        return f"made by {getattr(made, '__name__', repr(made))}"
    if isinstance(source, Image):
        return f"picture {source.width} x {source.height}"
    if isinstance(source, Sequence):
        if all(isinstance(each, str) and is_sentence(each) for each in source):
            return counted(len(source), "sentence")
        return counted(len(source), "file" if all(map(_is_one_path, source)) else "picture")
    return repr(source)


def _is_one_path(spec: object) -> bool:
    return isinstance(spec, (str, Path)) and bool(str(spec))


def _is_folder(spec: object) -> bool:
    return isinstance(spec, (str, Path)) and Path(spec).is_dir()


def _is_path(spec: object) -> bool:
    """A file, a folder, or files."""
    return _is_one_path(spec) or (isinstance(spec, (list, tuple)) and all(map(_is_one_path, spec)))


def _foil_images(corrupt: Images | None) -> Images:
    if corrupt is None:
        raise OptionError(
            "without corrupt images the metric needs a foil: name it, as in "
            "logit_diff('tabby', 'Border collie')"
        )
    return corrupt


def _check_images(clean: Images, corrupt: Images | None, model: Model, progress: bool) -> None:
    for images in (clean, corrupt):
        if isinstance(images, (FileImages, HeldImages, MadeImages)):
            images.check(progress)
    spec = model.preprocessing
    if corrupt is not None:
        if len(clean) != len(corrupt):
            raise DataError(
                f"{len(clean)} clean and {len(corrupt)} corrupt {spec.what}s: "
                f"every clean {spec.what} needs its counterfactual"
            )
        if clean.shape != corrupt.shape:
            raise DataError(
                f"clean {spec.what}s are {clean.shape} ({', '.join(spec.axes)}), corrupt ones "
                f"{corrupt.shape}: they must be alike"
            )
    check_size(clean, model)


def check_size(images: Images, model: Model) -> None:
    """Refuse images of another size than the model takes.

    Raises:
        DataError: naming both sizes, or what the model says of this one.
    """
    spec = model.preprocessing
    fits = images.shape == spec.shape or (model.resizable and images.shape[:-2] == spec.shape[:-2])
    refuse_other(images.shape, spec, fits)
    if images.shape != spec.shape:
        model.tokens_at(*images.shape[-2:])


def _output(model: Model, images: Images, clean: Images) -> tuple[Tensor, bool]:
    """The model's output for an image in float64, and whether all clean images are that image."""
    if len(images) != 1:
        raise DataError(f"the similarity is to one image, not to {len(images)}")
    check_size(images, model)
    image = images.take(0, 1)
    output = model(image.to(model.device, model.dtype))[0].to("cpu").double()
    return output, all(torch.equal(clean.take(row, row + 1), image) for row in range(len(clean)))


def _top_classes(model: Model, images: Images) -> Tensor:
    """The model's top class of each image `(image,)`."""
    return torch.cat([model(batch).argmax(dim=-1).cpu() for batch in batches_of(model, images, 16)])


def batches_of(
    model: Model, images: Images, batch_size: int | None = None
) -> Iterator[Float[Tensor, "batch *shape"]]:
    """The images in order, on the model's device and in its dtype, a few at a time.

    Raises:
        OptionError: if the batch size is not positive, or edits are for another number of images.
    """
    size = BATCH if batch_size is None else batch_size
    check_whole("the batch size (batch_size)", size)
    size = model.batch_of(len(images), size)
    parts = [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
    for read in in_turn(partial(ready, images, model=model), parts, [images]):
        yield read.to(model.device, non_blocking=True)
