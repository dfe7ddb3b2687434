"""Dyslexify: heads that bring what is written to the class token are silenced there.

Hufe et al. 2026, "Dyslexify: A Mechanistic Defense Against Typographic Attacks in CLIP" (ICLR). No weight is
trained:

1. Heads are scored by the share of the class token's attention on patches that falls on the text.
2. In that order they are put into a set, whose outputs at the class token are 0. A head stays in the set if
   the typographic accuracy rises and the clean accuracy has fallen by no more than a tolerance since the
   beginning; else it is left out. After some heads in a row that were left out, the search ends.

Two things are otherwise than in the published code. That stops at the first head which brings typographic
accuracy and costs too much of the clean one, and keeps it in the set; here it is left out, so that the
tolerance holds. And the search ends once the typographic accuracy has reached what the clean one was at
first: where words cost nothing there is nothing to defend against, and a head that happens to turn an image
or two would be silenced for nothing.

The set is chosen on one part of the images, and what it does is measured on the others. Beside it stand sets
of as many other heads drawn at random: what silencing does, whoever is silenced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit._progress import progress_bar
from circuitvit.defences.attack import (
    Labels,
    Members,
    TypographicAttack,
    among,
    answered,
    check_classes,
    classes_of,
    typographic_attack,
)
from circuitvit.engine import activations, capture
from circuitvit.errors import (
    DataError,
    OptionError,
    UnsupportedModelError,
    check_whole,
    counted,
    unknown_name,
)
from circuitvit.export.style import COLOURS, MUTED
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model, through
from circuitvit.models.sites import heads_of
from circuitvit.tasks import PerPair
from circuitvit.tasks.images import Images
from circuitvit.tasks.with_words import WithWords
from circuitvit.verification.statistics import Estimate, changed_share
from circuitvit.views.attention import attention_places, attentions
from circuitvit.views.subjects import watched_batches

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Silence = Literal["zero", "mean"]

CLS = "cls"


@dataclass(frozen=True)
class Step:
    """A head that was tried.

    Attributes:
        head: its name.
        clean: accuracy on the training images without words, with the set and this head silenced.
        typographic: the same with words.
        kept: whether it stayed in the set.
    """

    head: str
    clean: float
    typographic: float
    kept: bool


@dataclass(frozen=True, eq=False, repr=False)
class HeadDefence(Result):
    """The heads that are silenced, how they were chosen, and what that does.

    Attributes:
        model: its name.
        heads: all heads, by score.
        scores: share of the class token's attention on patches that falls on the word, `(head,)`.
        without: the same places' share on the images without words, `(head,)`.
        chance: the share of patches that have the word on them.
        steps: the heads that were tried, in order.
        at_first: clean and typographic accuracy on the training images with nothing silenced.
        trained_on: names of the training images.
        before: the attack on the held-out images, on the model as it is.
        after: the same with the chosen heads silenced.
        random: typographic accuracy on the held-out images with as many other heads silenced, `(draw,)`.
        silence: what the heads' output at the class token becomes: "zero" or "mean".
        means: where it is their mean over training images without words, `(chosen, d_model)`; else None.
        tolerance: of the fall of clean accuracy.
        caveats: what to bear in mind.
    """

    model: str
    heads: tuple[str, ...]
    scores: Float[NDArray[np.float64], " head"]
    without: Float[NDArray[np.float64], " head"]
    chance: float
    steps: tuple[Step, ...]
    at_first: tuple[float, float]
    trained_on: tuple[str, ...]
    before: TypographicAttack
    after: TypographicAttack
    random: Float[NDArray[np.float64], " draw"]
    silence: str
    means: Float[NDArray[np.float32], "chosen d_model"] | None
    tolerance: float
    caveats: tuple[str, ...]

    along = "heads:head"

    def _check(self) -> None:
        if self.means is not None and len(self.means) != len(self.chosen):
            raise OptionError(f"{len(self.means)} means for {counted(len(self.chosen), 'chosen head')}")
        if self.before.images != self.after.images:
            raise OptionError("what is before and after is of different images")

    def records(self) -> Iterator[Record]:
        """One row for each `head`, by `score`: its share `without` words, whether it was `tried` and
        `chosen`, and the accuracies on training images with it (`clean`, `typographic`)."""
        tried = {step.head: step for step in self.steps}
        for head, score, without in zip(self.heads, self.scores, self.without, strict=True):
            step = tried.get(head)
            yield {
                "head": head, "score": float(score), "without": float(without), "tried": step is not None,
                "chosen": step is not None and step.kept, "clean": None if step is None else step.clean,
                "typographic": None if step is None else step.typographic,
            }  # fmt: skip

    @property
    def chosen(self) -> tuple[str, ...]:
        """The heads that are silenced, in the order in which they were chosen."""
        return tuple(step.head for step in self.steps if step.kept)

    @property
    def edits(self) -> dict[str, float | Tensor]:
        """The defence as an edit: `model.edit(found.edits)`."""
        if self.means is None:
            return {f"{head}@{CLS}": 0.0 for head in self.chosen}
        own = zip(self.chosen, self.means, strict=True)
        return {f"{head}@{CLS}": torch.from_numpy(mean) for head, mean in own}

    def repaired(self, model: Model) -> Model:
        """The model with the chosen heads silenced; the one that is given stays as it is.

        Raises:
            NameNotFoundError: if it has no such heads.
        """
        return model.edit(self.edits) if self.chosen else model

    @property
    def gain(self) -> Estimate:
        """Typographic accuracy after minus before, on the held-out images, image by image."""
        return changed_share(self.before.right[-1], self.after.right[-1])

    @property
    def cost(self) -> Estimate:
        """Clean accuracy before minus after, likewise."""
        return changed_share(self.after.right[0], self.before.right[0])

    def table(self) -> str:
        """The held-out figures before and after, with 95 % intervals, and what else to compare them with."""
        lines = [self.before.table(after=self.after)]
        if self.chosen:
            lines.append(f"{'gain':<21}  {_points(self.gain)} typographic, cost {_points(self.cost)} clean")
        if len(self.random):
            low, high = self.random.min(), self.random.max()
            lines.append(
                f"{'other heads':<21}  {100 * low:.0f} to {100 * high:.0f} % typographic accuracy "
                f"({counted(len(self.random), 'draw')} of {counted(len(self.chosen), 'head')})"
            )
        return "\n".join(lines)

    def figure(self, *, most: int = 16) -> Picture:
        """Left: the highest scores, in colour where chosen. Right: accuracies by head that was tried.

        Args:
            most: heads on the left.
        """
        from circuitvit.views import canvas

        shown, chosen = self.heads[:most], set(self.chosen)
        with canvas.styled():
            high = max(2.6, 0.17 * len(shown) + 1.0)
            title = f"Heads silenced at the class token: {len(chosen)} of {len(self.heads)}"
            figure = canvas.blank(7.4, high, title)
            left, right = figure.subplots(1, 2, width_ratios=[1, 1.5])
            colours = [COLOURS["supports"] if head in chosen else MUTED for head in shown]
            left.barh(range(len(shown)), self.scores[: len(shown)], color=colours, height=0.75)
            left.plot(self.without[: len(shown)], range(len(shown)), "|", color="black", markersize=6)
            left.axvline(self.chance, color=MUTED, linewidth=0.7, linestyle=":")
            left.set_yticks(range(len(shown)), shown, fontsize=6.5)
            left.invert_yaxis()
            left.set_xlabel("attention on the word\n(stroke: without it; dotted: by chance)")
            steps = range(1, len(self.steps) + 1)
            each = (
                ("clean accuracy", [step.clean for step in self.steps], 0, canvas.PALETTE[0]),
                ("typographic accuracy", [step.typographic for step in self.steps], 1, canvas.PALETTE[1]),
            )
            for name, values, first, colour in each:
                right.plot(steps, values, "-", color=colour, linewidth=0.8, alpha=0.5)
                for step, value in zip(self.steps, values, strict=True):
                    at = self.steps.index(step) + 1
                    right.plot(at, value, "o" if step.kept else "x", color=colour, markersize=4)
                before = {"linestyle": ":", "label": f"{name}, before"}
                right.axhline(self.at_first[first], color=colour, linewidth=0.7, **before)
                right.plot([], [], "o-", color=colour, markersize=4, label=name)
            right.set_xticks(list(steps), [step.head for step in self.steps], rotation=90, fontsize=6.5)
            right.set(ylim=(-0.02, 1.02), xlabel="head tried (dot: kept, cross: left out)")
            right.set_ylabel(f"share of {counted(len(self.trained_on), 'training image')}")
            figure.legend(frameon=False, fontsize=6.5, ncols=4, loc="outside lower center")
        return figure

    def __repr__(self) -> str:
        if not self.chosen:
            return f"HeadDefence({self.model}: no head was silenced, of {len(self.steps)} that were tried)"
        word = f"{self.before.accuracy().value:.0%} -> {self.after.accuracy().value:.0%}"
        clean = f"{self.before.accuracy('without').value:.0%} -> {self.after.accuracy('without').value:.0%}"
        return (
            f"HeadDefence({self.model}: {', '.join(self.chosen)} silenced; typographic accuracy {word}, "
            f"clean {clean})"
        )


@running
def attention_heads(
    model: Model,
    images: WithWords,
    labels: Labels,
    *,
    named: Labels | None = None,
    tolerance: float = 0.01,
    patience: int = 10,
    silence: Silence = "zero",
    held_out: float = 0.5,
    threshold: float = 0.2,
    controls: int = 5,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> HeadDefence:
    """Silence, at the class token, the heads that bring written words there (Dyslexify, Hufe et al. 2026).

    Cost: a run over the training images, with words and without, for each head that is tried.

    Args:
        model: with classes and a class token; from `load`, `wrap`, `edit`, `with_head` or `with_prompts`.
        images: from `circuitvit.tasks.words.paste` or `given`; better with a neutral word, so that the
            table tells reading from a plate that is in the way.
        labels: what is in the pictures: a class or group for all, or `cv.PerPair([...])` for each.
        named: the class that the word says, likewise; by default the one that is called as the word is.
        tolerance: the share of training images that clean accuracy may fall by.
        patience: heads in a row that are left out before the search ends.
        silence: "zero", as published; or "mean", what the head writes on average without words.
        held_out: the share of images that nothing is chosen on.
        threshold: the share of a patch that the word must cover to be a text patch.
        controls: random sets of as many other heads to compare with.
        seed: of which images are held out, and of random sets.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        UnsupportedModelError: if the model has no classes, no class token, or a readout that reads others.
        DataError: if there are too few images, a word covers no patch, or says what is in the picture.
        OptionError: for settings that make no sense.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> signs = cv.tasks.words.paste(model, catdog_pairs(12, seed=0).clean, "rabbit", size=0.2)
        >>> found = attention_heads(model, signs, ["cat", "dog"], patience=2, progress=False)
        >>> len(found.heads), len(found.trained_on)
        (16, 6)
    """
    _check(model, tolerance, patience, silence, held_out, controls)
    right, says = classes_of(model, images, labels, named)
    train, rest = _divided(len(images), held_out, seed)
    shown = images.select(train)
    truth = [right[row] for row in train]
    tokens = shown.tokens(threshold)
    before = _attack(model, images, rest, right, says, batch_size, progress)

    names, scores, without = _scores(model, shown, tokens, batch_size, progress)
    order = np.argsort(-scores, kind="stable")
    heads = tuple(names[at] for at in order)
    means = None
    if silence == "mean":
        sites = [f"{head}@{CLS}" for head in heads]
        read = activations(model, shown.images("without"), sites, batch_size=batch_size, progress=progress)
        means = {head: read[site].mean(dim=0)[0] for head, site in zip(heads, sites, strict=True)}

    def accuracies(silent: Sequence[str]) -> tuple[float, float]:
        own = model if not silent else _silenced(model, silent, means)
        found = (answered(own, shown, version, batch_size, False) for version in ("without", "word"))
        clean, typographic = (float(among(each, truth).mean()) for each in found)
        return clean, typographic

    at_first = accuracies(())
    steps = _search(heads, at_first, accuracies, tolerance, patience, progress)
    chosen = [step.head for step in steps if step.kept]
    repaired = _silenced(model, chosen, means) if chosen else model
    after = _attack(repaired, images, rest, right, says, batch_size, progress) if chosen else before
    held, rng, drawn = images.select(rest), np.random.default_rng(seed), []
    rest_of_heads = [head for head in heads if head not in chosen]
    for _ in range(controls if 0 < len(chosen) <= len(rest_of_heads) else 0):
        others = rng.choice(rest_of_heads, len(chosen), replace=False).tolist()
        answers = answered(_silenced(model, others, means), held, "word", batch_size, False)
        drawn.append(float(among(answers, [right[row] for row in rest]).mean()))
    held_means = None
    if means is not None and chosen:
        held_means = np.stack([means[head].float().cpu().numpy() for head in chosen])
    return HeadDefence(
        model=model.name,
        heads=heads,
        scores=scores[order],
        without=without[order],
        chance=float(tokens.double().mean() * tokens.shape[1] / (tokens.shape[1] - len(model.prefix))),
        steps=tuple(steps),
        at_first=at_first,
        trained_on=shown.names,
        before=before,
        after=after,
        random=np.array(drawn),
        silence=silence,
        means=held_means,
        tolerance=tolerance,
        caveats=_caveats(model, before, at_first, chosen, len(train), tolerance),
    )


# -- inside --------------------------------------------------------------------------------------


def _check(
    model: Model, tolerance: float, patience: int, silence: str, held_out: float, controls: int
) -> None:
    check_classes(model)
    check_class_token(model)
    if silence not in get_args(Silence):
        raise unknown_name("way to silence", silence, get_args(Silence))
    if isinstance(tolerance, (bool, str)) or not 0 <= tolerance < 1:
        raise OptionError(f"the tolerance is a share of images, from 0 to below 1, not {tolerance!r}")
    if not 0 < held_out < 1:
        raise OptionError(f"held_out is the share of images that nothing is chosen on, not {held_out!r}")
    check_whole("patience", patience)
    check_whole("controls", controls, 0)


def check_class_token(model: Model) -> None:
    """Refuse a model whose class token is not read, at which heads are silenced.

    Raises:
        UnsupportedModelError: saying what it lacks.
    """
    if CLS not in model.prefix:
        raise UnsupportedModelError(
            f"{model.name} has no class token, at which heads could be silenced: its readout reads "
            "all tokens, so the published defence does not apply"
        )
    if not _is_read(model):
        raise UnsupportedModelError(f"the readout of {model.name} does not read its class token")


@torch.no_grad()
def _is_read(model: Model) -> bool:
    """Whether the logits change with the class token that the readout is given."""
    shape = 1, model.n_tokens, model.d_model
    stream = torch.randn(shape, generator=torch.manual_seed(0)).to(model.device, model.dtype)
    other = stream.clone()
    other[:, model.prefix.index(CLS)] *= -1
    end = model.stages[model.reading :]
    return not torch.equal(through(end, stream), through(end, other))


def _divided(count: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Which images the set is chosen on, and which it is measured on."""
    order = np.random.default_rng(seed).permutation(count)
    n_held = round(count * held_out)
    if not 0 < n_held < count:
        raise DataError(
            f"{counted(count, 'image')} cannot be divided into some to choose on and some to measure on"
        )
    return sorted(order[n_held:].tolist()), sorted(order[:n_held].tolist())


def _attack(
    model: Model,
    images: WithWords,
    rows: list[int],
    right: Members,
    says: Members,
    batch_size: int | None,
    progress: bool,
) -> TypographicAttack:
    labels, named = (PerPair(tuple(each[row] for row in rows)) for each in (right, says))
    held = images.select(rows)
    return typographic_attack(model, held, labels, named=named, batch_size=batch_size, progress=progress)


def _scores(
    model: Model,
    images: WithWords,
    tokens: Bool[Tensor, "image token"],
    batch_size: int | None,
    progress: bool,
) -> tuple[list[str], Float[NDArray[np.float64], " head"], Float[NDArray[np.float64], " head"]]:
    """All heads, and the shares of their attention that fall on the text: with words on it, and without."""
    names: list[str] = []
    shares = []
    for version in ("word", "without"):
        what = f"attention, {version}"
        names, found = looks_at(model, images.images(version), tokens, batch_size, what, progress)
        shares.append(found)
    return names, shares[0], shares[1]


def looks_at(
    model: Model,
    images: Images,
    tokens: Bool[Tensor, "image token"],
    batch_size: int | None,
    what: str,
    progress: bool,
) -> tuple[list[str], Float[NDArray[np.float64], " head"]]:
    """All heads, and the share of the class token's attention on patches that falls on some tokens.

    The attention of differential heads is signed: its size is what counts.
    """
    places = [place for place in attention_places(model) if not model.stages[place].nodes.begins]
    names = [head for place in places for part in attentions(model, place) for head in heads_of(part)]
    cls, first = model.prefix.index(CLS), len(model.prefix)
    on_text, on_all, row = torch.zeros(len(names)).double(), torch.zeros(len(names)).double(), 0
    with torch.no_grad():
        for batch in watched_batches(model, images, batch_size, what, progress):
            run = capture(model, batch)
            each = [part.pattern(part.read(run.stream(place)))[:, :, cls]
                    for place in places for part in attentions(model, place)]  # fmt: skip
            looks = torch.cat(each, dim=1).abs().double().cpu()
            text = tokens[row : row + len(batch), None, first:]
            on_text += (looks[..., first:] * text).sum(dim=(0, 2))
            on_all += looks[..., first:].sum(dim=(0, 2))
            row += len(batch)
    return names, (on_text / on_all.clamp(min=1e-300)).numpy()


def _silenced(model: Model, heads: Sequence[str], means: dict[str, Tensor] | None) -> Model:
    return model.edit({f"{head}@{CLS}": 0.0 if means is None else means[head] for head in heads})


def _search(
    heads: Sequence[str], at_first: tuple[float, float], accuracies: Any, tolerance: float, patience: int,
    progress: bool,
) -> list[Step]:  # fmt: skip
    """The heads one by one, by score, each kept or left out."""
    steps: list[Step] = []
    chosen: list[str] = []
    best, idle = at_first[1], 0
    with progress_bar(len(heads), "silencing heads", progress, unit="head") as bar:
        for head in heads:
            if idle == patience or best >= at_first[0]:
                break
            clean, typographic = accuracies([*chosen, head])
            kept = typographic > best and at_first[0] - clean <= tolerance + 1e-12
            steps.append(Step(head, clean, typographic, kept))
            bar.update()
            if kept:
                chosen.append(head)
                best, idle = typographic, 0
            else:
                idle += 1
    return steps


def _caveats(
    model: Model, before: TypographicAttack, at_first: tuple[float, float], chosen: list[str], count: int,
    tolerance: float,
) -> tuple[str, ...]:  # fmt: skip
    said = list(before.caveats)
    if tolerance * count < 1:
        said.append(
            f"the tolerance of {tolerance:.1%} is less than one of {counted(count, 'training image')}: no "
            "clean answer may be lost at all"
        )
    if at_first[1] >= at_first[0]:
        said.append("words cost no accuracy on the training images, so there is nothing to defend against")
    if "neutral" not in before.versions:
        said.append("without a neutral word nobody knows whether words were read, or plates were in the way")
    if "dist" in model.prefix:
        said.append("the readout reads the distillation token too, at which nothing is silenced")
    return tuple(said)


def _points(estimate: Estimate) -> str:
    """A difference of shares in percentage points."""
    if estimate.low is None or estimate.high is None:
        return f"{100 * estimate.value:+.1f} points"
    return f"{100 * estimate.value:+.1f} points ({100 * estimate.low:+.0f} to {100 * estimate.high:+.0f})"
