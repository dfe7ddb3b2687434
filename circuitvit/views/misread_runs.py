"""The runs behind `why`: counterfactuals, the nodes that flip the answer, and what suppressing them does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit._progress import progress_bar
from circuitvit.engine import Capture, activation_batches, capture
from circuitvit.errors import (
    DataError,
    ModelError,
    OptionError,
    UnsupportedModelError,
    check_number,
    check_whole,
    counted,
)
from circuitvit.export.maps import maps_of
from circuitvit.models import Model
from circuitvit.models.sentences import TextSpec
from circuitvit.tasks import Task
from circuitvit.tasks.classes import (
    ClassSpec,
    class_indices,
    class_label,
    class_or_kind,
    spec_label,
    taken_on_trust,
)
from circuitvit.tasks.images import Images, ImageSpec, TensorImages, as_images
from circuitvit.tasks.labelled import LabelledSpec, Labels, labelled_images
from circuitvit.tasks.split import SomeImages
from circuitvit.tasks.task import check_size
from circuitvit.views.flipping import Flipping, PatchedPair, flipping, margin, nodes_of
from circuitvit.views.misread import Counterfactual, Suppressed, Why
from circuitvit.views.misread_words import SHARED
from circuitvit.views.outcomes import few_images, rerun
from circuitvit.views.subjects import images_of, subjects_of, watched_batches

CONTROLS = 20
"""Random sets of as many nodes that a set is compared with."""

FEWEST = 4
"""Images without which nothing could be chosen and nothing be held out."""

SHOWN = 6
"""Nodes that there are maps of."""


@running
def why(
    model: Model,
    image: ImageSpec,
    label: ClassSpec,
    among: LabelledSpec,
    *,
    labels: Labels | None = None,
    counterfactuals: int = 3,
    held_out: float = 0.5,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Why:
    """Why was this image misread? Which few heads and MLPs turn the answer, and can they be spared?

    1. The *counterfactuals* are the images of `among` that are of `label`, are read rightly, and are nearest
       to the misread one by what the answer is read from (the class token), by cosine, less the mean.
    2. With each of them nodes' outputs are patched into the misread image, at the class token where the
       answer is read from that alone (all of them together then give the counterfactual's own answer), else
       at all tokens. Nodes are ranked to first order, and the highest run alone. Of those that flip the
       answer the one is taken that does most over all counterfactuals; where there is none, the shortest
       beginning of the order that flips it is cut down until no node can be spared.
    3. Nodes in the sets of more than half of the counterfactuals are *shared*; they, and each single set,
       are *suppressed*: replaced by their mean over images, at those tokens, each class counting the same.
       One constant for all images and tokens, so that it can be folded into weights. Whether that repairs
       the image is seen on itself, what it costs on images that nothing was chosen on.

    Cost: one run of each image of `among`, and for each counterfactual of the order of 100 runs of the later
    layers.

    Args:
        model: from `load`, `wrap`, `edit`, `with_head` or `with_prompts`, with classes.
        image: one, as a file, a picture or a preprocessed tensor.
        label: what would be right: a class, a set or a group; or the name of a kind, such as "cat", all
            classes of which are meant.
        among: other images: a folder with a subfolder for each class (or kind), or a mapping from classes to
            images. Images without either are all taken to be of `label`.
        labels: instead of subfolders a class, or kind, for each image.
        counterfactuals: how many.
        held_out: the share of each class of `among` that nothing is chosen on.
        seed: of which images are held out, and of random sets.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        OptionError: if the image is read rightly already, or settings make no sense.
        NameNotFoundError: if a label, or the name of a folder, is no class and no kind.
        DataError: if images cannot be read, there are too few, or none of `label` is read rightly.
        UnsupportedModelError: if the model has no classes, takes sentences, or is edited for some images.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(8, seed=0)
        >>> half = (pairs.clean[:1] + pairs.corrupt[:1]) / 2  # a cat and a dog, one through the other
        >>> found = why(model, half, "cat", {"cat": pairs.clean, "dog": pairs.corrupt}, progress=False)
        >>> found.answer, len(found.counterfactuals), len(found.held_out)
        ('dog', 3, 8)
    """
    check_model(model)
    check_whole("counterfactuals", counterfactuals)
    check_number("held_out, the share that nothing is chosen on,", held_out, 0, 1)
    asked = _asked(model, image, label)
    search, held = _divided(_labelled(model, among, labels, asked), held_out, seed)
    seen = _seen(asked, search, batch_size, progress)
    near = _nearest(asked, search, seen, counterfactuals)
    rng = np.random.default_rng(seed)
    pairs = [
        PatchedPair(model, asked.right, asked.run, _run(model, search.images, row), _leading(model))
        for row, _ in near
    ]
    with progress_bar(len(pairs), "what flips the answer", progress) as bar:
        found = flipping(pairs, bar.update)
    rows = [row for row, _ in near]
    shown, names = _shown(asked, search.images, rows), [search.images.names[row] for row in rows]
    nodes = nodes_of(model)
    draft = Why(
        model=model.name,
        label=spec_label(model, asked.label),
        answer=asked.answer,
        margin=asked.margin,
        tokens=_tokens(model) or "all",
        nodes=tuple(model.graph.senders[node] for node in nodes),
        alone=np.stack([each.alone[nodes] for each in found]),
        counterfactuals=tuple(
            _told(pair, flip, name, similarity, rng)
            for pair, flip, name, (_, similarity) in zip(pairs, found, names, near, strict=True)
        ),
        suppressed=(),
        constants={},
        held_out=(),
        right_before=np.zeros(0, dtype=bool),
        right_after=np.zeros((0, 0), dtype=bool),
        subjects=replace(subjects_of(model, shown), names=(asked.image.names[0], *names)),
        looking=(),
        maps=np.zeros((0, 0, 0, 0), dtype=np.float32),
        caveats=(),
    )
    draft = _suppressed(draft, asked, seen.means, held, rng, batch_size, progress)
    draft = _mapped(draft, asked, shown)
    return replace(draft, caveats=_caveats(draft, asked, search))


# -- what is asked, and of which images --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Asked:
    """The misread image.

    Attributes:
        model: that misreads it.
        image: it alone.
        label: what would be right.
        right: the same as a mask of classes.
        run: the essential run on it.
        margin: of that run.
        answer: what the model sees.
    """

    model: Model
    image: Images
    label: ClassSpec
    right: Bool[Tensor, " class"]
    run: Capture
    margin: float
    answer: str


@dataclass(frozen=True, eq=False)
class _Labelled:
    """Images, and what each of them is.

    Attributes:
        images: of `among`, or some of them.
        labels: what each is called.
        classes: a mask of classes for each label.
        own: which labels are of what would be right for the misread image.
    """

    images: Images
    labels: tuple[str, ...]
    classes: Mapping[str, Bool[Tensor, " class"]]
    own: frozenset[str]

    @property
    def is_own(self) -> Bool[NDArray[np.bool_], " image"]:
        return np.array([each in self.own for each in self.labels])

    def some(self, rows: Sequence[int]) -> _Labelled:
        chosen = tuple(rows)
        labels = tuple(self.labels[row] for row in chosen)
        return replace(self, images=SomeImages(self.images, chosen), labels=labels)

    def is_right(self, tops: Sequence[int], first: int = 0) -> Bool[NDArray[np.bool_], " image"]:
        """Whether answers are right, of images in order from the first on."""
        labels = self.labels[first : first + len(tops)]
        pairs = zip(labels, tops, strict=True)
        return np.array([bool(self.classes[label][top]) for label, top in pairs], dtype=bool)


def check_model(model: Model) -> None:
    """Refuse models that misread no images.

    Raises:
        UnsupportedModelError: saying why.
    """
    if not model.chooses:
        raise UnsupportedModelError(
            f"{model.name} has no classes, so it misreads nothing: give it some, with "
            "model.with_prompts([...]) or cv.with_head(...)"
        )
    if isinstance(model.preprocessing, TextSpec):
        raise UnsupportedModelError(f"{model.name} takes sentences: images alone are misread")
    if model.refinements:
        raise UnsupportedModelError(
            f"nodes of {model.name} are refined, and why() is about heads and MLPs: give the model that was "
            "refined"
        )
    if model.edited_images is not None:
        raise UnsupportedModelError(
            f"edits of {model.name} are for {counted(model.edited_images, 'image')}, and why() runs others: "
            "give what is the same for all images"
        )


def _asked(model: Model, image: ImageSpec, label: ClassSpec) -> _Asked:
    meant = class_or_kind(model, label)
    right, called = _mask(model, meant), spec_label(model, meant)
    if right.all():
        raise OptionError(f"{called} are all classes of {model.name}: no answer is wrong")
    picture = images_of(model, image)
    if len(picture) != 1:
        raise DataError(f"one misread image is asked about, and {len(picture)} are given")
    run = _run(model, picture, 0)
    check_finite(run.logits, picture.names[0])
    before, answer = _read(model, run.logits[0], right)
    if before > 0:
        raise OptionError(
            f"{picture.names[0]} is read rightly: {model.name} sees {answer}, and the label is {called}. "
            "Give an image that is misread, or the label that it should have"
        )
    return _Asked(model, picture, meant, right, run, before, answer)


def check_finite(logits: Tensor, name: str) -> None:
    """Refuse logits that are no numbers.

    Raises:
        ModelError: naming the image.
    """
    if not logits.isfinite().all():
        raise ModelError(
            f"the model gives NaN or infinite logits for {name}: check its weights and the image"
        )


def masks_of(
    model: Model, among: LabelledSpec, labels: Labels | None
) -> tuple[Images, tuple[str, ...], dict[str, Bool[Tensor, " class"]]]:
    """Images, the label of each, and a mask of classes for each label.

    Raises:
        NameNotFoundError: if a label is no class and no kind.
        DataError: if images cannot be used, or nothing names their classes.
        UnsupportedModelError: if the model cannot misread them.
    """
    check_model(model)
    found, given = labelled_images(among, labels, model.preprocessing)
    if len(given) != len(found):
        raise DataError(f"{len(given)} labels for {counted(len(found), 'image')} of among")
    classes = {str(each): _mask(model, class_or_kind(model, each)) for each in dict.fromkeys(given)}
    found.check(progress=False)
    check_size(found, model)
    return found, tuple(map(str, given)), classes


def _labelled(model: Model, among: LabelledSpec, labels: Labels | None, asked: _Asked) -> _Labelled:
    """The images of `among`, of which there are enough."""
    own = spec_label(model, asked.label)
    if labels is not None or isinstance(among, Mapping) or _has_folders(among):
        found, given, classes = masks_of(model, among, labels)
    else:
        found = as_images(among, model.preprocessing)
        found.check(progress=False)
        check_size(found, model)
        given, classes = (own,) * len(found), {own: asked.right}
    if found.shape != asked.image.shape:
        raise DataError(f"the images of among are {found.shape}, and the misread one is {asked.image.shape}")
    inside = frozenset(name for name, each in classes.items() if bool((each & ~asked.right).sum() == 0))
    if not inside:
        raise DataError(
            f"no image of among is said to be {own}: they are {', '.join(map(repr, classes))}. The misread "
            "image is compared with others of its label"
        )
    if len(found) < FEWEST:
        raise DataError(
            f"among has {counted(len(found), 'image')}, of which some have to be chosen on and others held "
            f"out: give {FEWEST} or more, {own} among them"
        )
    return _Labelled(found, given, classes, inside)


def _has_folders(among: object) -> bool:
    """Whether images are a folder with folders in it."""
    if not isinstance(among, (str, Path)) or not Path(among).is_dir():
        return False
    return any(each.is_dir() and not each.name.startswith(".") for each in Path(among).iterdir())


def _divided(whole: _Labelled, held_out: float, seed: int) -> tuple[_Labelled, _Labelled]:
    """Images to choose on and images to judge on, of each label in proportion."""
    rng, held = np.random.default_rng(seed), []
    for label in whole.classes:
        rows = [row for row, own in enumerate(whole.labels) if own == label]
        drawn = rng.permutation(rows)[: round(held_out * len(rows))]
        held += drawn.tolist()
    rest = sorted(set(range(len(whole.labels))) - set(held))
    if not held or not any(whole.labels[row] in whole.own for row in rest):
        raise DataError(
            f"{counted(len(whole.labels), 'image')} of among cannot be divided with {held_out:g} held out: "
            "give more images, or another held_out"
        )
    return whole.some(rest), whole.some(sorted(held))


# -- counterfactuals ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is known of the images that are chosen on.

    Attributes:
        features: what the answer is read from, the mean over the tokens, `(image, width)`.
        right: whether each is read rightly.
        means: the mean of each node over images, each label counting the same, by what is edited.
    """

    features: Float[Tensor, "image d_model"]
    right: Bool[NDArray[np.bool_], " image"]
    means: Mapping[str, Float[Tensor, " _width"]]


def _seen(asked: _Asked, search: _Labelled, batch_size: int | None, progress: bool) -> _Seen:
    model, tokens = asked.model, _tokens(asked.model)
    at = "" if tokens is None else f"@{tokens}"
    edited = list(edited_sites(model).values())
    names = [f"{site}{at}" for site in edited]
    itself, counts = asked.image.take(0, 1), Counter(search.labels)
    share = {label: 1 / (len(counts) * count) for label, count in counts.items()}
    means: dict[str, Tensor] = {site: torch.zeros(()) for site in edited}
    features, right, weight = [], [], 0.0
    batches = activation_batches(
        model, search.images, [*names, _last(model), "logits"], batch_size=batch_size, progress=progress
    )
    for first, values in batches:
        tops = values["logits"].argmax(dim=-1).tolist()
        right.append(search.is_right(tops, first))
        features.append(_pooled(values[_last(model)], _leading(model)).double().cpu())
        rows = range(first, first + len(tops))
        others = [not torch.equal(search.images.take(row, row + 1), itself) for row in rows]
        each = zip(rows, others, strict=True)
        weights = torch.tensor([share[search.labels[row]] * other for row, other in each]).double()
        weight += float(weights.sum())
        for site, name in zip(edited, names, strict=True):
            own = values[name].double().cpu().flatten(1, -2).mean(dim=1)
            means[site] = means[site] + weights @ own
    return _Seen(
        torch.cat(features),
        np.concatenate(right),
        {site: (each / max(weight, 1e-12)).to(model.dtype) for site, each in means.items()},
    )


def _nearest(asked: _Asked, search: _Labelled, seen: _Seen, count: int) -> list[tuple[int, float]]:
    """The nearest images of the label that are read rightly, by their rows, and how near."""
    usable = np.flatnonzero(seen.right & search.is_own)
    if not len(usable):
        raise DataError(
            f"of {counted(int(search.is_own.sum()), 'image')} of among that are "
            f"{spec_label(asked.model, asked.label)} and may be chosen none is read rightly: there is "
            "nothing to compare with"
        )
    mean = seen.features.mean(dim=0)
    own = _pooled(asked.run.stream(len(asked.model.essential) - 1), _leading(asked.model)).double().cpu()
    near = torch.cosine_similarity(seen.features - mean, own - mean, dim=-1).numpy()
    order = usable[np.argsort(-near[usable], kind="stable")][:count]
    return [(int(row), float(near[row])) for row in order]


def _told(
    pair: PatchedPair, flip: Flipping, name: str, similarity: float, rng: np.random.Generator
) -> Counterfactual:
    model, own = pair.model, float(margin(pair.other.logits[0], pair.label))
    if not flip.nodes:
        return Counterfactual(name, similarity, own, (), None, "", 0, None)
    patched, answer = _read(model, pair.logits([flip.nodes])[0], pair.label)
    drawn = [rng.choice(pair.nodes, len(flip.nodes), replace=False).tolist() for _ in range(CONTROLS)]
    chance = float((pair.margins(drawn) > 0).mean())
    nodes = tuple(model.graph.senders[node] for node in flip.nodes)
    return Counterfactual(name, similarity, own, nodes, patched, answer, flip.tried, chance)


# -- suppression -------------------------------------------------------------------------------------


def edited_sites(model: Model) -> dict[str, str]:
    """What is edited of each head and MLP so that it folds into weights: of heads their mixed values."""
    known = set(model.all_sites.names)
    names = [model.graph.senders[node] for node in nodes_of(model)]
    return {name: f"{name}.z" if f"{name}.z" in known else name for name in names}


def _suppressed(
    draft: Why,
    asked: _Asked,
    means: Mapping[str, Tensor],
    held: _Labelled,
    rng: np.random.Generator,
    batch_size: int | None,
    progress: bool,
) -> Why:
    """With what suppressing each set does to the image, and to those that nothing was chosen on."""
    model, sites = asked.model, edited_sites(asked.model)
    of = SHARED if draft.shared else next((e.image for e in draft.counterfactuals if e.nodes), "")
    sets = {frozenset(draft.chosen): (of, draft.chosen)} if draft.chosen else {}
    for each in draft.counterfactuals:
        if each.nodes:
            sets.setdefault(frozenset(each.nodes), (each.image, each.nodes))

    def without(nodes: Sequence[str]) -> Model:
        return model.edit({sites[node]: means[sites[node]] for node in nodes})

    image = asked.image.take(0, 1).to(model.device, model.dtype)
    changed = [without(nodes) for _, nodes in sets.values()]
    outcomes = [_read(model, rerun(model, each, asked.run, image)[0], asked.right) for each in changed]
    found = [Suppressed(of, nodes, *told) for (of, nodes), told in zip(sets.values(), outcomes, strict=True)]
    if found:
        drawn = [rng.choice(draft.nodes, len(draft.chosen), replace=False).tolist() for _ in range(CONTROLS)]
        controls = (rerun(model, without(nodes), asked.run, image)[0] for nodes in drawn)
        chance = float(np.mean([float(margin(each, asked.right)) > 0 for each in controls]))
        found[0] = replace(found[0], by_chance=chance)
    names, right = _judged(asked, changed, held, batch_size, progress)
    used = sorted({sites[node] for _, nodes in sets.values() for node in nodes})
    return replace(
        draft,
        suppressed=tuple(found),
        constants={site: means[site].float().cpu().numpy() for site in used},
        held_out=names,
        right_before=right[0],
        right_after=right[1:],
    )


@torch.no_grad()
def _judged(
    asked: _Asked, changed: Sequence[Model], held: _Labelled, batch_size: int | None, progress: bool
) -> tuple[tuple[str, ...], Bool[NDArray[np.bool_], "run image"]]:
    """The held-out images but for the misread one, and whether they are right as it is and when changed."""
    model, itself, first = asked.model, asked.image.take(0, 1), 0
    found, others = [], []
    for batch in watched_batches(model, held.images, batch_size, "what is held out", progress):
        run = capture(model, batch, essential=True)
        rows = range(first, first + len(batch))
        logits = [run.logits, *(rerun(model, each, run, batch) for each in changed)]
        found.append(np.stack([held.is_right(each.argmax(dim=-1).tolist(), first) for each in logits]))
        others += [row for row in rows if not torch.equal(held.images.take(row, row + 1), itself)]
        first += len(batch)
    return tuple(held.images.names[row] for row in others), np.concatenate(found, axis=1)[:, others]


# -- what they look at -------------------------------------------------------------------------------


def _mapped(draft: Why, asked: _Asked, shown: Images) -> Why:
    """With what the nodes look at, on the misread image and on each counterfactual."""
    often = Counter(node for each in draft.counterfactuals for node in each.nodes)
    wanted = list(dict.fromkeys((*draft.chosen, *(node for node, _ in often.most_common()))))
    if draft.tokens != "all":  # what an MLP writes elsewhere was not patched
        wanted = [node for node in wanted if ".h" in node]
    task = Task(shown, metric="logit", ablation="zero").prepare(asked.model)
    maps = [maps_of(asked.model, task, place, set(wanted)) for place in range(len(shown))]
    found: dict[str, NDArray[np.float32]] = {}
    for node in wanted:
        patches = [each.sides["clean"].patches(node, each) for each in maps]
        if len(found) < SHOWN and all(each is not None for each in patches):
            found[node] = np.stack([each for each in patches if each is not None]).astype(np.float32)
    empty = np.zeros((0, len(shown), *draft.subjects.sheet.shape), dtype=np.float32)
    return replace(draft, looking=tuple(found), maps=np.stack([*found.values()]) if found else empty)


def _shown(asked: _Asked, images: Images, rows: Sequence[int]) -> TensorImages:
    """The misread image and the counterfactuals."""
    return TensorImages(torch.cat([asked.image.take(0, 1), *(images.take(row, row + 1) for row in rows)]))


# -- inside ------------------------------------------------------------------------------------------


def _mask(model: Model, wanted: ClassSpec) -> Bool[Tensor, " class"]:
    found = torch.zeros(model.n_logits, dtype=torch.bool, device=model.device)
    found[list(class_indices(model, wanted))] = True
    return found


def _run(model: Model, images: Images, row: int) -> Capture:
    return capture(model, images.take(row, row + 1).to(model.device, model.dtype), essential=True)


def _read(model: Model, logits: Float[Tensor, " class"], right: Tensor) -> tuple[float, str]:
    """The margin and the answer."""
    return float(margin(logits, right)), class_label(model, int(logits.argmax()))


def _leading(model: Model) -> int | None:
    """How many of the first tokens the answer is read from, where it is from no others; else None."""
    leading = (model.bare or model).leading  # edits that look at all tokens do not change what is read
    pools = any(stage.nodes.pools for stage in model.stages)
    return None if leading is None or pools or leading > len(model.prefix) else leading


def _tokens(model: Model) -> str | None:
    """These tokens as edits name them; None for all."""
    leading = _leading(model)
    return None if leading is None else "+".join(dict.fromkeys(model.prefix[:leading]))


def _last(model: Model) -> str:
    """The stream that the answer is read from."""
    return [site.name for site in model.all_sites if site.kind == "stream"][-1]


def _pooled(stream: Float[Tensor, "image token d_model"], leading: int | None) -> Tensor:
    return stream[:, :leading].mean(dim=1)


def _caveats(draft: Why, asked: _Asked, search: _Labelled) -> tuple[str, ...]:
    said = list(taken_on_trust(asked.model, [asked.label]))
    if draft.tokens == "all":
        said.append(
            "outputs are patched at all tokens, as the answer is read from all: at one place different "
            "photographs show different things, and early nodes bring the other image along with them"
        )
    without = [each.image for each in draft.counterfactuals if not each.nodes]
    if without:
        said.append(f"no beginning of the ranking flips the answer with {', '.join(without)}")
    if draft.chosen and not draft.shared:
        said.append(
            "the counterfactuals share no node: what flips the answer depends on which image is compared with"
        )
    easy = [each.image for each in draft.counterfactuals if (each.by_chance or 0) >= 0.5]
    if easy:
        said.append(
            f"with {', '.join(easy)} at least half of the random sets of as many nodes flip the answer too: "
            "it is a close call, and the nodes found are not special"
        )
    first = draft.suppressed[:1]
    if any(each.repairs and (each.by_chance or 0) >= 0.2 for each in first):
        said.append(
            f"{100 * (first[0].by_chance or 0):.0f} % of the random sets of as many nodes repair the image "
            "as well when they are suppressed: that says little about these nodes"
        )
    if len(search.classes) == 1:
        said.append(
            f"`among` holds {draft.label} alone, so that the mean which replaces a node speaks for it by "
            "itself, and what suppression costs elsewhere is not seen"
        )
    if len(search.classes) > 1 and not torch.stack([*search.classes.values()]).any(dim=0).all():
        said.append(
            f"what suppression costs is known for {', '.join(search.classes)} alone: `among` has no images "
            "of the model's other classes"
        )
    return (*said, *few_images(int(draft.right_before.sum())))
