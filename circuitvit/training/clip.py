"""Training a small CLIP on drawn animals, captions and signs: it learns to look and to read.

Both towers learn together from batches of pictures and captions: each caption is to find its picture and
each picture its captions (Radford et al. 2021, arXiv:2103.00020). A caption tells some of what is to be seen,
so it may be true of other pictures of the batch as well; those pairs are left out of the sums instead of
being pushed apart.

What a sign says is told by some captions ("a cat with a sign saying dog"), and others name the *word's*
animal as if it were the one to be seen, as on the web, where what is written on a thing often names it. That
makes the model read where nobody asks it to: a wrong word turns a part of its answers.

The image tower starts as `catdog-tiny`, which can tell the animals already; its silent heads are drawn
afresh, for all that is still to be learned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from circuitvit._keywords import running
from circuitvit.datasets import signs
from circuitvit.datasets.signs import FACTORS, SignScene
from circuitvit.errors import OptionError
from circuitvit.models.zoo.card import InputSpec, build_clip
from circuitvit.models.zoo.clip_module import ClipModule
from circuitvit.models.zoo.text_tower import WordTokenizer, padded
from circuitvit.training.checkpoints import Checkpoints
from circuitvit.training.loop import TrainingResult, begin_as, finish, fit, make_recipe, prepare, threads

VOCABULARY = (
    *("a", "an", "the", "animal", "background", "drawing", "photo", "picture", "sign", "saying"),
    *("in", "of", "on", "with", "and"),
    *dict.fromkeys(value for values in FACTORS.values() for value in values),
)
"""All words of the captions."""

TEMPLATES = ("a photo of {}", "a picture of {}", "a drawing of {}")
"""What captions begin with unless they go straight to the point; and the templates of the accuracies."""

ARCHITECTURE = {
    "img_size": signs.SIZE, "patch_size": 8, "in_chans": 3, "num_classes": 48, "embed_dim": 64, "depth": 4,
    "num_heads": 4, "mlp_ratio": 2.0, "global_pool": "token",
}  # fmt: skip
CONTEXT = 24
"""Most tokens of a sentence; the longest caption has 20."""

TEXT = {"context": CONTEXT, "width": 64, "depth": 2, "heads": 4, "mlp_ratio": 2.0}
START = "catdog-tiny"
"""Whose weights the image tower starts with."""

RECIPE = {"steps": 1600, "batch_size": 48, "learning_rate": 1.5e-3, "warmup": 0.03, "sparsity": 0.08}

DATA = (
    "Scenes drawn by circuitvit.datasets.signs, each with a caption: an animal, its colour and "
    "place, the background, and in half of them a word on a sign. Every training scene is new. "
    "Where the word names another animal, half of the captions that name an animal and tell of no"
    " sign name that one."
)
"""What a card says of the data."""

_MISREAD = 0.5  # of the captions that name the animal beside another animal's word, and do not tell of a sign
_CAPTIONS = 2  # of each picture
_SINGLE = 0.6  # of the captions tell a single fact
_WEIGHTS = {
    "colour": 1.0,
    "animal": 4.0,
    "place": 2.0,
    "background": 1.0,
    "word": 4.0,
}  # by which it is chosen
_TOLD = 0.6  # of the facts in the others
_HELD_OUT_SEED = 1_000_000  # added to the training seed: scenes of other seeds share nothing with these
_LARGEST_SCALE = 100.0  # as in CLIP: no similarity counts for more


@dataclass(frozen=True, eq=False)
class Captioned:
    """Pictures with captions.

    Attributes:
        images: preprocessed.
        ids: tokens of the captions, padded with 0.
        own: which picture each caption was made for.
        fits: whether a caption may be said of a picture.
    """

    images: Float[Tensor, "image 3 height width"]
    ids: Int[Tensor, "caption token"]
    own: Int[Tensor, " caption"]
    fits: Bool[Tensor, "caption image"]


@running
def train_clip(
    out: str | Path | None = None,
    *,
    architecture: Mapping[str, Any] | None = None,
    checkpoints: int | None = None,
    progress: bool = True,
    held_out: int = 2000,
    **options: Any,
) -> TrainingResult:
    """Trains image and text tower of a small CLIP and writes `out`.safetensors and `out`.json.

    Determinism, Ctrl-C and files are those of :func:`circuitvit.training.train`. The accuracies of
    :func:`clip_accuracy` stand on the card.

    Args:
        out: path without ending; None saves nothing.
        architecture: `VisionTransformer` arguments of the image tower that replace the usual ones.
        checkpoints: how many to keep, as for `train`.
        progress: whether to show a bar.
        held_out: how many fresh scenes to measure accuracies on.
        **options: fields of :class:`~circuitvit.training.Recipe`.

    Raises:
        OptionError: for an option that is no field of the recipe, or a senseless value.
        FileError: when `out` cannot be written (found out before training).
        DataError: when the loss is no longer finite.

    Example:
        >>> result = train_clip(steps=1, batch_size=4, held_out=8, progress=False)
        >>> sorted(result.card.accuracy)
        ['attack_rate', 'background', 'colour', 'held_out', 'n', 'place', 'word']
    """
    recipe = make_recipe({**RECIPE, **options})
    if recipe.label_smoothing:
        raise OptionError("label_smoothing is for classes, and captions are none")
    shape = {**ARCHITECTURE, **(architecture or {})}
    stem = None if out is None else prepare(Path(out))
    tokenizer = WordTokenizer(VOCABULARY, CONTEXT)
    text = {**TEXT, "vocabulary": len(tokenizer), "features": shape["num_classes"]}
    with threads(recipe.threads):
        module = build_clip(shape, text, recipe.seed)
        started = begin_as(START, module.visual, shape)

        def objective(step: int) -> tuple[Tensor, Tensor]:
            scenes = signs.random_scenes(recipe.batch_size, recipe.seed, first=step * recipe.batch_size)
            return contrast(module, captioned(scenes, tokenizer, np.random.default_rng([recipe.seed, step])))

        def write(module: Any, stem: Path | None, steps_done: int) -> TrainingResult:
            return finish(
                module, stem, recipe, steps_done,
                name="clip-tiny",
                architecture=shape,
                input=InputSpec((3, signs.SIZE, signs.SIZE), signs.MEAN, signs.STD),
                classes=(),
                data=DATA,
                accuracy=clip_accuracy(module, tokenizer, held_out, recipe.seed + _HELD_OUT_SEED),
                license="MIT",
                text=text,
                vocabulary=VOCABULARY,
                beside={"start": START} if started else {},
            )  # fmt: skip

        keep = Checkpoints(module, stem, checkpoints, recipe.steps, write)
        done = fit(module, objective, recipe, "clip-tiny", progress, sparse=module.visual, after=keep)
        return replace(write(module, stem, done), checkpoints=tuple(keep.written))


def captioned(scenes: Sequence[SignScene], tokenizer: WordTokenizer, rng: np.random.Generator) -> Captioned:
    """Pictures of the scenes, and captions that tell some of their facts."""
    own = torch.arange(len(scenes)).repeat_interleave(_CAPTIONS)
    facts = [_told(scenes[place], rng) for place in own.tolist()]
    starts = rng.integers(len(TEMPLATES) + 1, size=len(facts))
    sentences = [
        ("{}", *TEMPLATES)[start].format(signs.sentence(said))
        for start, said in zip(starts, facts, strict=True)
    ]
    shown = torch.tensor([[_number(each, getattr(scene, each)) for each in FACTORS] for scene in scenes])
    told = torch.tensor([[_number(each, said.get(each)) for each in FACTORS] for said in facts])
    return Captioned(
        signs.normalise(signs.draw_scenes(scenes)),
        padded([tokenizer.encode(sentence) for sentence in sentences]),
        own,
        _fits(told, shown),
    )


def _told(scene: SignScene, rng: np.random.Generator) -> dict[str, str]:
    """Some facts of a scene; the animal may be that of the word when no sign is told of."""
    present = {each: getattr(scene, each) for each in FACTORS if getattr(scene, each) is not None}
    weights = np.cumsum([_WEIGHTS[each] for each in present])
    single, chance, misread, *told = rng.random(3 + len(FACTORS)).tolist()
    facts = {
        each: present[each] for each, u in zip(FACTORS, told, strict=True) if each in present and u < _TOLD
    }
    if single < _SINGLE or not facts:
        chosen = list(present)[int(np.searchsorted(weights / weights[-1], chance))]
        facts = {chosen: present[chosen]}
    if "animal" in facts and "word" not in facts and scene.word in signs.ANIMALS and misread < _MISREAD:
        facts["animal"] = scene.word
    return facts


def _number(factor: str, value: str | None) -> int:
    return -1 if value is None else FACTORS[factor].index(value)


def _fits(
    told: Int[Tensor, "caption factor"], shown: Int[Tensor, "image factor"]
) -> Bool[Tensor, "caption image"]:
    """Whether all that a caption tells is in a picture; an animal may be that of the word."""
    animal, word = (tuple(FACTORS).index(each) for each in ("animal", "word"))
    right = (told[:, None] < 0) | (told[:, None] == shown[None])
    right[:, :, animal] |= (told[:, None, animal] == shown[None, :, word]) & (told[:, None, word] < 0)
    return right.all(dim=2)


def contrast(module: ClipModule, batch: Captioned) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric loss, and the fraction of captions that are nearest to their own picture.

    A caption and its picture stand against the pictures that the caption does not fit, and against the
    captions that do not fit the picture.
    """
    with torch.no_grad():
        module.logit_scale.clamp_(max=math.log(_LARGEST_SCALE))
    images = F.normalize(module.visual(batch.images), dim=-1)
    captions = F.normalize(module.text(batch.ids), dim=-1)
    logits = module.logit_scale.exp() * captions @ images.T
    right = logits[torch.arange(len(captions)), batch.own]
    wrong = logits.masked_fill(batch.fits, -math.inf)
    among_images, among_captions = wrong.logsumexp(dim=1), wrong.logsumexp(dim=0)[batch.own]
    loss = (F.softplus(among_images - right) + F.softplus(among_captions - right)).mean() / 2
    return loss, (right > wrong.amax(dim=1)).detach().float().mean()


@torch.no_grad()
def clip_accuracy(module: ClipModule, tokenizer: WordTokenizer, n: int, seed: int) -> dict[str, float]:
    """What a small CLIP tells of fresh scenes, zero-shot, with :data:`TEMPLATES` averaged.

    Returns:
        "held_out": animals, on scenes without signs; "n", of how many. "attack_rate": of the answers that
        are right, the share that another animal's word on a sign turns into something else. "colour",
        "place" and "background": likewise named, in scenes half of which have a sign. "word": what signs
        say, one of eight.
    """

    def answers(scenes: Sequence[SignScene], factor: str) -> Int[Tensor, " n"]:
        names = [signs.sentence({factor: value}) for value in FACTORS[factor]]
        embedded = torch.stack([embed([each.format(name) for name in names]) for each in TEMPLATES]).mean(
            dim=0
        )
        images = torch.split(signs.normalise(signs.draw_scenes(scenes)), 250)
        logits = [module.visual(part) @ F.normalize(embedded, dim=-1).T for part in images]
        return torch.cat(logits).argmax(dim=1)

    def embed(sentences: Sequence[str]) -> Float[Tensor, "sentence feature"]:
        ids = padded([tokenizer.encode(each) for each in sentences])
        return F.normalize(module.text(ids), dim=-1)

    def truth(scenes: Sequence[SignScene], factor: str) -> Int[Tensor, " n"]:
        return torch.tensor([_number(factor, getattr(scene, factor)) for scene in scenes])

    plain = signs.random_scenes(n, seed, word=None)
    animals = truth(plain, "animal")
    right = answers(plain, "animal") == animals
    wrong = (animals + 1 + torch.arange(n) % (len(signs.ANIMALS) - 1)) % len(signs.ANIMALS)
    attacked = [
        signs.swap_word(scene, signs.ANIMALS[other]) for scene, other in zip(plain, wrong, strict=True)
    ]
    turned = answers(attacked, "animal") != animals
    result = {
        "held_out": float(right.float().mean()),
        "n": n,
        "attack_rate": float(turned[right].float().mean()) if right.any() else 0.0,
    }
    mixed = signs.random_scenes(n, seed + 1)
    for factor in ("colour", "place", "background", "word"):
        scenes = [scene for scene in mixed if getattr(scene, factor) is not None]
        result[factor] = float((answers(scenes, factor) == truth(scenes, factor)).float().mean())
    return result
