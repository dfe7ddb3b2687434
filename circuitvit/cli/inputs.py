"""What commands work on, from options: a model, a task, and the checks that come before long work.

Values stay as they were written until here, so that every complaint reads alike and comes from one place. The
library is used through its face (`cv.tasks`, `cv.engine`), which loads a room when it is first needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import circuitvit as cv
from circuitvit._keywords import as_bytes
from circuitvit.cli.options import group
from circuitvit.cli.processes import many, own_device
from circuitvit.cli.wording import remark
from circuitvit.errors import FileError, OptionError, unknown_name

if TYPE_CHECKING:
    from circuitvit.graph import Provenance
    from circuitvit.models import Model
    from circuitvit.tasks import Ablation, Metric, PreparedTask, Task

DTYPES = ("float32", "float64", "bfloat16", "float16")


@group("Model", "models.load", model="--model -m NAME", checkpoint="--checkpoint FILE",
       arch="--arch KEY=VALUE", classes="--classes FILE", head="--head FILE", prompt="--prompt TEXT",
       template="--template TEXT", text="--text IMAGES", device="--device DEVICE",
       dtype="--dtype DTYPE")  # fmt: skip
@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs.

    Attributes:
        model: a bundled model (catdog-tiny, clip-tiny), a name of timm's (vit_tiny_patch16_224),
            `hf:NAME_OR_FOLDER` of transformers, `open_clip:MODEL/TAG_OR_FILE`, `torchvision:MODEL`, or a file
            written by `circuitvit train`. `circuitvit models` lists them.
        arch: what the weights need timm to build, such as num_classes=37 or img_size=384. Can be repeated.
        classes: a file with the names of the classes, one on each line, in the model's order.
        head: a linear classifier to put on the model's features: a file that `model.head.save` wrote.
        prompt: of a model of images and texts: a sentence that is a class, such as "a photo of a cat".
            Repeated for each class.
        template: a sentence with {} in the place of a prompt, which is then a name: "a photo of a {}".
            Repeated, a name is the average of its sentences.
        text: of a model of images and texts the text tower, compared with these images: a folder, or an
            image. Wherever images are asked for it takes sentences, or a .txt file of them.
        device: where the model runs, such as cpu, cuda or cuda:1.
        dtype: of the weights: float32, float64, bfloat16 or float16.
    """

    model: str
    checkpoint: Path | None = None
    pretrained: bool = False
    arch: list[str] | None = None
    classes: Path | None = None
    head: Path | None = None
    prompt: list[str] | None = None
    template: list[str] | None = None
    text: Path | None = None
    device: str = "cpu"
    dtype: str | None = None


@group("Images", "tasks.Task", pairs="--pairs CSV", pair="--pair HOW")
@dataclass(frozen=True)
class ImageOptions:
    """Which image pairs.

    Attributes:
        clean: images that show the behaviour, or clips for a model that sees those: a file, or a folder.
        corrupt: their counterfactuals, which do not: a file, or a folder.
        pairs: instead of both: a table whose first line is clean,corrupt or clean,corrupt,target,foil, or
            the names of two classes. Its lines may name folders.
        pair: how the images of folders are paired: names (files of the same name), order (of their names) or
            nearest (one to one, the most alike in their colours). [default: names where they are the same,
            order where none is]
    """

    clean: Path | None = None
    corrupt: Path | None = None
    pairs: Path | None = None
    pair: str | None = None


@group("Behaviour", "tasks.Task", metric="--metric NAME", target="--target CLASS", foil="--foil CLASS",
       to="--to FILE", corruption="--corruption NAME", ablation="--ablation NAME",
       groups="--groups NAME")  # fmt: skip
@dataclass(frozen=True)
class BehaviourOptions:
    """What is measured, and what ablation means.

    Attributes:
        metric: how the behaviour is measured: logit_diff, logit, log_probability, probability, kl_divergence,
            cross_entropy or accuracy; of features that are no classes, similarity or projection.
        target: class that the behaviour speaks for: a name, a WordNet id, an index, or a group such as
            group:cat (`circuitvit classes cat`). Repeated, it is a set of classes. By default what the model
            sees in each clean image.
        foil: what it is compared with, likewise. By default what the model sees in each corrupt image.
        to: what similarity and projection compare the outputs with: a vector (.npy, or .safetensors with one
            tensor), or for similarity an image. By default each clean image, for similarity.
        corruption: instead of corrupt images: make them of the clean ones: reverse, shuffle or freeze (the
            frames of clips), blur or mean-colour.
        ablation: what replaces an ablated edge: patch (the corrupt image's), mean, mean-tokens, zero, noise
            or resample.
        direction: `noising` ablates edges of the clean run, `denoising` restores edges of the corrupt run.
        groups: tell edges apart by the tokens they act on: kind for class token and patches, frame for the
            patches of a clip by time.
    """

    metric: str = "logit_diff"
    target: list[str] | None = None
    foil: list[str] | None = None
    to: Path | None = None
    corruption: str | None = None
    ablation: str = "patch"
    direction: str = "noising"
    groups: str | None = None


@group("Verification", held_out="--held-out SHARE", held_out_pairs="--held-out-pairs CSV")
@dataclass(frozen=True)
class HeldOutOptions:
    """Other pairs, on which circuits are judged.

    Attributes:
        held_out_clean: other images with the behaviour, on which the circuit is judged.
        held_out_corrupt: their counterfactuals.
        held_out_pairs: instead of both: a table.
        held_out: instead: hold out this share of the pairs, drawn by `--seed` so that no image is on both
            sides.
    """

    held_out_clean: Path | None = None
    held_out_corrupt: Path | None = None
    held_out_pairs: Path | None = None
    held_out: float | None = None


@group("Verification")
@dataclass(frozen=True)
class VerificationOptions(HeldOutOptions):
    """On what, and against how many random circuits, a circuit is tested.

    Attributes:
        random: how many random circuits of the same shape to compare with; 0 for none.
    """

    random: int = 20


@group("Run", quiet="--quiet -q")
@dataclass(frozen=True)
class BatchOptions:
    """How images are run; none of it changes a result.

    Attributes:
        batch_size: images at once; 32 by default.
        quiet: no progress bars.
    """

    batch_size: int | None = None
    quiet: bool = False

    @property
    def progress(self) -> bool:
        """Whether to show progress bars."""
        return not self.quiet

    def settings(self) -> dict[str, Any]:
        """The keywords that most functions of the library share, but for the seed."""
        return {"batch_size": self.batch_size, "progress": self.progress}


@group("Run", memory="--memory SIZE", quiet="--quiet -q")
@dataclass(frozen=True)
class RunOptions(BatchOptions):
    """How pairs are run; none of it but the seed changes a result.

    Attributes:
        seed: of everything random: the same seed, the same result.
        batch_size: pairs at once; by default what `--memory` allows, and 16 for find.
        memory: what a batch may take, such as 2GB.
        quiet: no progress bars.
    """

    seed: int = 0
    memory: str | None = None

    @property
    def budget(self) -> int | None:
        """The memory budget in bytes, or None for the library's own."""
        return None if self.memory is None else as_bytes(self.memory)

    def settings(self) -> dict[str, Any]:
        """With the memory budget beside them."""
        return {**super().settings(), "memory": self.budget}


# -- the model -----------------------------------------------------------------------------------


def load_model(options: ModelOptions) -> Model:
    """The model that the options name.

    Raises:
        CircuitViTError: as `circuitvit.load`, and if the device cannot be used.
    """
    architecture = parse_architecture(options.arch or ())
    if options.template and not options.prompt:
        raise OptionError("--template takes names, and there are none: give each with --prompt")
    if options.prompt and (options.head or options.classes):
        other = "--head" if options.head else "--classes"
        raise OptionError(f"--prompt says what the classes are, and so does {other}: leave one of them out")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise unknown_name("dtype", options.dtype, DTYPES)
    classes = None if options.classes is None else _lines(options.classes)
    model = cv.load(
        options.model,
        checkpoint=options.checkpoint,
        pretrained=options.pretrained,
        device=own_device(options.device),
        dtype=None if options.dtype is None else getattr(_torch(), options.dtype),
        classes=classes,
        **architecture,
    )
    if options.text is not None:
        if options.prompt or options.head:
            other = "--prompt" if options.prompt else "--head"
            raise OptionError(f"with --text the classes are images: leave out {other}")
        return model.text(options.text)
    if options.prompt:
        return model.with_prompts(options.prompt, options.template or None)
    return model if options.head is None else cv.with_head(model, options.head)


def prompted(options: ModelOptions, origin: Provenance) -> ModelOptions:
    """The options with the prompts that a file's circuit is about, where none are given."""
    if not origin.prompts or options.prompt or options.head or options.classes:
        return options
    remark(f"prompts, as the circuit's file says: {origin.about()}")
    return replace(options, prompt=list(origin.prompts), template=list(origin.templates) or None)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        why = error.strerror or error
        raise FileError(f"cannot read the class names {path}: {why}. Give a file, one name a line") from error
    except UnicodeDecodeError as error:
        raise FileError(f"cannot read the class names {path}: it is not text in UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _torch() -> Any:
    """torch, which only comes with the first piece of work."""
    return import_module("torch")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one core: a model as small as the bundled ones only loses time by dividing its work up."""
    torch = _torch()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the task ------------------------------------------------------------------------------------


def make_task(images: ImageOptions, behaviour: BehaviourOptions, seed: int) -> Task:
    """The task that the options describe; nothing is read yet but a table of pairs.

    Raises:
        CircuitViTError: as `circuitvit.Task`, and for options that contradict each other.
    """
    return _task(images, behaviour, seed, prefix="--")


def make_held_out(
    options: HeldOutOptions, behaviour: BehaviourOptions, seed: int, pair: str | None = None
) -> Task | float | None:
    """The same behaviour on the held-out images, the share of pairs to hold out, or None for neither.

    Args:
        options: which images.
        behaviour: to measure.
        seed: of random ablations.
        pair: how the images of folders are paired, as those to discover on.

    Raises:
        CircuitViTError: as `make_task`.
    """
    images = ImageOptions(options.held_out_clean, options.held_out_corrupt, options.held_out_pairs)
    if options.held_out is None:
        given = replace(images, pair=pair)
        return None if images == ImageOptions() else _task(given, behaviour, seed, prefix="--held-out-")
    if images != ImageOptions():
        raise OptionError("--held-out divides the pairs given: leave out the other --held-out options")
    if not 0 < options.held_out < 1:
        raise OptionError(f"--held-out is a share of the pairs, between 0 and 1, not {options.held_out:g}")
    return options.held_out


def _task(images: ImageOptions, behaviour: BehaviourOptions, seed: int, prefix: str) -> Task:
    """A task; `prefix` is what the options for its images begin with, for messages."""
    if images.pairs is not None and (images.clean is not None or images.corrupt is not None):
        raise OptionError(f"give either {prefix}pairs or {prefix}clean and {prefix}corrupt, not both")
    if images.pairs is None and images.clean is None:
        raise OptionError(f"no images: give {prefix}clean and {prefix}corrupt, or {prefix}pairs with a table")
    metric = _metric(behaviour)
    parts: dict[str, Any] = {
        "ablation": _ablation(behaviour.ablation, seed),
        "direction": behaviour.direction,
        "groups": behaviour.groups,
    }
    if images.pairs is not None:
        if behaviour.corruption is not None:
            raise OptionError(f"{prefix}pairs names the counterfactuals: leave out --corruption")
        _refuse_named_twice(images.pairs, behaviour)
        return cv.Task.from_csv(images.pairs, metric, _pairing(images.pair), **parts)
    assert images.clean is not None
    corrupt = _counterfactuals(images.corrupt, behaviour.corruption, seed, prefix)
    if corrupt is None and (behaviour.ablation == "patch" or behaviour.direction == "denoising"):
        raise OptionError(
            f"no counterfactuals: give {prefix}corrupt, or --corruption to make them, or another --ablation "
            "such as mean (noising only)"
        )
    if images.pair is not None and (corrupt is None or callable(corrupt)):
        raise OptionError(f"--pair says which counterfactual belongs to which image: give {prefix}corrupt")
    return cv.Task(images.clean, corrupt, metric, pair=_pairing(images.pair), **parts)


def _pairing(name: str | None) -> Any:
    """How folders are paired; checked here, as a table of pairs is read at once."""
    cv.tasks.pairs.check_pairing(name)
    return name


def _counterfactuals(corrupt: Path | None, corruption: str | None, seed: int, prefix: str) -> Any:
    """Where the counterfactuals are, or the function that makes them."""
    if corruption is None:
        return corrupt
    if corrupt is not None:
        raise OptionError(f"give either {prefix}corrupt or --corruption, not both")
    known = import_module("circuitvit.tasks.corruptions").CORRUPTIONS
    if corruption not in known:
        raise unknown_name("corruption", corruption, known)
    return partial(known[corruption], seed=seed) if corruption == "shuffle" else known[corruption]


def _metric(behaviour: BehaviourOptions) -> Metric:
    target, foil = behaviour.target or None, behaviour.foil or None
    shared = {name.casefold() for name in target or ()} & {name.casefold() for name in foil or ()}
    if shared:
        raise OptionError(f"--target and --foil are both {min(shared)!r}: they must be different classes")
    metrics = cv.tasks.metrics
    if behaviour.to is not None and behaviour.metric not in metrics.COMPARING:
        raise OptionError(f"the metric {behaviour.metric} compares with no file: leave out --to")
    metric = metrics.as_metric(behaviour.metric, target, foil, behaviour.to)
    for option, given, used in (("target", target, metric.uses_target), ("foil", foil, metric.uses_foil)):
        if given and not used:
            raise OptionError(f"the metric {metric.name} has no {option}: leave out --{option}")
    return metric


def _ablation(name: str, seed: int) -> Ablation:
    ablation = cv.tasks.ablations.as_ablation(name)
    return replace(ablation, seed=seed) if isinstance(ablation, (cv.Noise, cv.Resample)) else ablation


def _refuse_named_twice(table: Path, behaviour: BehaviourOptions) -> None:
    named = cv.tasks.tables.classes_named(table)
    for option, given in (("target", behaviour.target), ("foil", behaviour.foil)):
        if given and option in named:
            raise OptionError(f"{table} names a {option} for each pair: leave out --{option}")


# -- checks --------------------------------------------------------------------------------------


def prepare(model: Model, task: Task | PreparedTask, run: RunOptions, *, verifiable: bool) -> PreparedTask:
    """Load and check images, classes and token groups, and see that the metric differs at all.

    Args:
        model: from `load_model`.
        task: to prepare.
        run: batch size and memory.
        verifiable: whether a circuit is to be verified on the pairs: then also refuse those whose mean
            difference in the metric may be 0, now and not after the search.

    Raises:
        CircuitViTError: as `Task.prepare`; or if the metric is the same with and without the behaviour.
    """
    prepared = cv.tasks.prepare(model, task, processes=many())
    if not isinstance(task, cv.tasks.PreparedTask):  # the sides of a split have been spoken of
        tell_pairs(prepared)
    ends = cv.engine.Evaluator(prepared, batch_size=batch_size(prepared, run))
    names, level = prepared.clean.names, 0.95 if verifiable else 0.0
    cv.engine.check_effect(ends.whole, ends.nothing, label=prepared.metric.label, names=names, level=level)
    return prepared


def tell_pairs(prepared: PreparedTask) -> None:
    """Say how images were paired before the work begins, unless they are simply as they were named."""
    said = prepared.pairing
    if said and not said.endswith("paired by name") and " listed in " not in said:
        remark(said)


def prepare_both(
    model: Model, task: Task, held_out: Task | float | None, run: RunOptions
) -> tuple[PreparedTask, PreparedTask | None]:
    """The pairs to discover on and those to judge on, each prepared and checked as by `prepare`.

    Raises:
        CircuitViTError: as `prepare`, and if the pairs cannot be divided.
    """
    if held_out is None:
        return prepare(model, task, run, verifiable=True), None
    if isinstance(held_out, float):
        sides: tuple[Task | PreparedTask, ...] = cv.split(model, task, held_out, seed=run.seed)
        tell_pairs(cv.tasks.prepare(model, sides[0]))
    else:
        sides = task, held_out
    first, second = (prepare(model, side, run, verifiable=True) for side in sides)
    return first, second


def batch_size(prepared: PreparedTask, run: RunOptions) -> int:
    """How many pairs to run at once."""
    return run.batch_size or cv.engine.choose_batch_size(prepared, run.budget)


# -- values with a unit or a name -----------------------------------------------------------------

_WORDS = {"True": True, "False": False, "None": None}


def parse_architecture(settings: Sequence[str]) -> dict[str, Any]:
    """What timm is to build, from settings such as "num_classes=37" or "global_pool=avg".

    Values are read as JSON or as Python's True, False and None, and are taken as text where they are neither.

    Raises:
        OptionError: if a setting is not KEY=VALUE, names something twice, or something with its own option.

    Example:
        >>> parse_architecture(["num_classes=37", "global_pool=avg", "qkv_bias=False"])
        {'num_classes': 37, 'global_pool': 'avg', 'qkv_bias': False}
    """
    found: dict[str, Any] = {}
    for setting in settings:
        key, sign, text = (part.strip() for part in setting.partition("="))
        if not (sign and key.isidentifier() and text):
            raise OptionError(f"--arch takes KEY=VALUE, such as num_classes=37, not {setting!r}")
        if key in ("name", "model", "checkpoint", "pretrained", "device", "dtype", "classes"):
            raise OptionError(f"--arch {setting}: use the option --{'model' if key == 'name' else key}")
        if key in found:
            raise OptionError(f"--arch gives {key} twice: {found[key]!r} and {text!r}")
        found[key] = _value(text)
    return found


def parse_plan(text: str) -> tuple[int, int, int]:
    """Steps, trimming runs and batch size of a search, from "240,400,16".

    Raises:
        OptionError: if it is not three whole numbers above 0; steps may be 0.

    Example:
        >>> parse_plan("240,400,16")
        (240, 400, 16)
    """
    match = re.fullmatch(r"\s*(0|[1-9]\d*)\s*,\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*", text)
    if match is None:
        raise OptionError(f"--plan takes steps,trim_runs,batch_size, such as 240,400,16, not {text!r}")
    return int(match[1]), int(match[2]), int(match[3])


def parse_shares(text: str, option: str) -> tuple[float, ...]:
    """Shares of all edges from "0.01,0.05,1" or "1%,5%,100%".

    Raises:
        OptionError: if one of them is no number above 0 and up to 1.

    Example:
        >>> parse_shares("0.01,5%,1", "--sizes")
        (0.01, 0.05, 1.0)
    """
    shares = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", part)
        share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
        if not 0 < share <= 1:
            raise OptionError(
                f"{option} takes shares of all edges such as 0.01,0.05,1 or 1%,5%, not {text!r}"
            )
        shares.append(share)
    return tuple(shares)


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text
