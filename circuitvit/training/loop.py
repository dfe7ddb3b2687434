"""The training loop: AdamW, warm-up and cosine, soft cross-entropy; the same seed gives the same bytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from circuitvit._keywords import running
from circuitvit._progress import progress_bar
from circuitvit._version import __version__
from circuitvit.errors import DataError, FileError, OptionError
from circuitvit.graph.files import write_bytes
from circuitvit.models.zoo import load_zoo_module, zoo_card
from circuitvit.models.zoo.card import Card, build_module, sha256
from circuitvit.training.checkpoints import Checkpoints
from circuitvit.training.data import (
    SHARE,
    Labelled,
    TrainingData,
    catdog_data,
    digits_data,
    folder_data,
    shortcut_data,
)


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: number of batches.
        batch_size: pictures in each.
        learning_rate: at its peak.
        weight_decay: of all matrices; biases, norms, positions and the class token are not decayed.
        warmup: fraction of the steps during which the learning rate rises.
        label_smoothing: share of each target that is spread over all classes.
        sparsity: how hard each head's query, key, value and output matrix is pulled to zero (group lasso;
            0 for not at all). Heads that a model can do without fall silent, and circuits come out small.
        mlp_sparsity: how hard what each neuron of the MLPs reads and writes is pulled to zero, likewise. What
            heads can write themselves is then left to them.
        clip: largest norm of the gradient.
        seed: of the initial weights and of the data.
        threads: of torch, during training; sums are rounded differently by another number of threads, so
            the weights are the same to the byte only for the same number.
    """

    steps: int = 1500
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    label_smoothing: float = 0.0
    sparsity: float = 0.0
    mlp_sparsity: float = 0.0
    clip: float = 1.0
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} is above 0, not {getattr(self, name)}")
        if self.weight_decay < 0 or self.seed < 0:
            raise OptionError(f"weight_decay and seed are not negative: {self.weight_decay}, {self.seed}")
        if not (0 <= self.warmup <= 1 and 0 <= self.label_smoothing < 1):
            raise OptionError("warmup and label_smoothing are fractions between 0 and 1")

    def pull(self, step: int) -> float:
        """Share of the sparsity at a step: it rises slowly, since a model must first learn what it needs, and
        ends early.

        In the last two fifths there is no pull. What is silent stays so; what is left recovers.
        """
        progress = step / self.steps
        return min(progress / 0.3, 1.0) if progress < 0.6 else 0.0

    def rate(self, step: int) -> float:
        """Learning rate at a step: up in a line, then down along half a cosine to 0."""
        rising = max(round(self.warmup * self.steps), 1)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        progress = (step - rising) / max(self.steps - rising, 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """What came of it.

    Attributes:
        model: the trained module, in eval mode.
        card: what the card file says.
        accuracy: fraction of held-out pictures that are right.
        interrupted: whether Ctrl-C ended training early; the model is then that of the last step.
        weights: path of the safetensors file, None when nothing was saved.
        checkpoints: those of its checkpoints, by step.
    """

    model: nn.Module
    card: Card
    accuracy: float
    interrupted: bool
    weights: Path | None
    checkpoints: tuple[Path, ...] = ()


def training_data(
    dataset: str | Path,
    seed: int = 0,
    size: int | None = None,
    *,
    shortcut: str | None = None,
    shortcut_share: float | None = None,
) -> TrainingData:
    """`"catdog"`, `"digits"`, or a folder with a subfolder of pictures for each class.

    Args:
        dataset: which.
        seed: of the order and of everything that is drawn at random.
        size: side in pixels to which the pictures of a folder are resized, 48 by default.
        shortcut: of catdog alone: what nearly always gives the species away, `background`, `word` (on a sign)
            or `colour` (of the coat).
        shortcut_share: of the scenes in which it does, 0.99 by default.

    Raises:
        DataError: when it is none of these, or when pictures are missing or cannot be read.
        OptionError: for a size that is not a multiple of 8, a size for catdog or digits, a shortcut for
            anything but catdog, or a share without a shortcut.
        NameNotFoundError: for a shortcut that there is not.
    """
    if shortcut is None and shortcut_share is not None:
        raise OptionError("shortcut_share is of the scenes with a shortcut: say which, such as background")
    if shortcut is not None and dataset != "catdog":
        raise OptionError(f"a shortcut is drawn into catdog's scenes alone, not into {dataset}")
    if dataset == "clip":
        raise OptionError("clip is trained by train_clip, on pictures of a size of their own")
    if dataset not in ("catdog", "digits"):
        return folder_data(dataset, seed, **({} if size is None else {"size": size}))
    if size is not None:
        raise OptionError(f"the pictures of {dataset} have a size of their own: size is for folders")
    if shortcut is not None:
        return shortcut_data(seed, shortcut, SHARE if shortcut_share is None else shortcut_share)
    return catdog_data(seed) if dataset == "catdog" else digits_data(seed)


@running
def train(
    data: TrainingData,
    out: str | Path | None = None,
    *,
    architecture: Mapping[str, Any] | None = None,
    checkpoints: int | None = None,
    progress: bool = True,
    **options: Any,
) -> TrainingResult:
    """Trains a small timm `VisionTransformer` and writes `out`.safetensors and `out`.json.

    The same data, options, machine and number of threads give the same weights, byte for byte. Neither the
    global random state nor torch's settings are different afterwards. Ctrl-C stops training; what has been
    learned so far is saved and returned all the same.

    Args:
        data: from :func:`training_data` or made by hand.
        out: path without ending; None saves nothing.
        architecture: `VisionTransformer` arguments that replace those of `data.architecture`.
        checkpoints: how many to keep, from step 0 to the last and closer together at the beginning, in the
            folder `out`-checkpoints; `across` reads them.
        progress: whether to show a bar.
        **options: fields of :class:`Recipe` that replace those of `data.recipe`.

    Raises:
        OptionError: for an option that is no field of :class:`Recipe`, or a senseless value.
        FileError: when `out` cannot be written (found out before training).
        DataError: when the loss is no longer finite.

    Example:
        >>> result = train(training_data("digits"), steps=2, progress=False)
        >>> result.card.classes[:3]
        ('0', '1', '2')
    """
    recipe = make_recipe({**data.recipe, **options})
    shape = {**data.architecture, **(architecture or {})}
    stem = None if out is None else prepare(Path(out))

    def write(module: nn.Module, stem: Path | None, steps_done: int) -> TrainingResult:
        accuracy = {"held_out": evaluate(module, data.held_out), "n": len(data.held_out)}
        accuracy |= {name: evaluate(module, part) for name, part in data.extra.items()}
        accuracy |= _by_group(module, data.groups)
        return finish(
            module, stem, recipe, steps_done,
            name=data.name, architecture=shape, input=data.input, classes=data.classes, data=data.description,
            accuracy=accuracy, license=data.licence,
            beside={**data.drawn, **({"start": data.start, "tuned": data.tuned} if started else {})},
        )  # fmt: skip

    with threads(recipe.threads):
        module = build_module(shape, recipe.seed)
        started = data.start is not None and begin_as(data.start, module, shape, data.tuned)

        def objective(step: int) -> tuple[Tensor, Tensor]:
            return _classification(module, data.batch(step, recipe.batch_size), recipe.label_smoothing)

        keep = Checkpoints(module, stem, checkpoints, recipe.steps, write)
        done = fit(module, objective, recipe, data.name, progress, after=keep)
        module.requires_grad_()
        return replace(write(module, stem, done), checkpoints=tuple(keep.written))


def finish(
    module: nn.Module,
    stem: Path | None,
    recipe: Recipe,
    steps_done: int,
    *,
    name: str,
    beside: Mapping[str, Any] | None = None,
    **facts: Any,
) -> TrainingResult:
    """Writes weights and card to `stem`; None saves nothing.

    Args:
        module: as trained.
        stem: path without ending.
        recipe: how it was trained.
        steps_done: fewer than those of the recipe when it was interrupted.
        name: of the model where there is no path.
        beside: what belongs into the recipe on the card besides: how the data were drawn, and "start", the
            bundled model whose weights it started with.
        **facts: the other fields of the card.
    """
    weights = to_safetensors({key: value.contiguous() for key, value in module.state_dict().items()})
    card = Card(
        name=name if stem is None else stem.name,
        recipe={
            "optimiser": "AdamW", "schedule": "warm-up and cosine", **asdict(recipe),
            "steps_done": steps_done, "torch": torch.__version__.split("+")[0],
            **(beside or {}),
        },
        seed=recipe.seed,
        weights_sha256=sha256(weights),
        library_version=__version__,
        **facts,
    )  # fmt: skip
    path = None if stem is None else _save(stem, weights, card)
    return TrainingResult(module, card, card.accuracy["held_out"], steps_done < recipe.steps, path)


def make_recipe(options: Mapping[str, Any]) -> Recipe:
    """The usual options with some replaced.

    Raises:
        OptionError: for an option that there is not, or a senseless value.
    """
    known = [field.name for field in fields(Recipe)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise OptionError(f"no such training option: {', '.join(unknown)}; there are {', '.join(known)}")
    return replace(Recipe(), **options)


def begin_as(name: str, module: nn.Module, shape: Mapping[str, Any], tuned: int = 0) -> bool:
    """Give a module the weights of a bundled model where it has its shape, but for the readout.

    Heads that are silent there keep what was drawn for them, since no gradient reaches what is zero.

    Args:
        name: of the bundled model.
        module: freshly initialised.
        shape: its architecture.
        tuned: how many of the last layers are to be trained, with norm and readout: the others stay exactly
            as they are in the bundled model, and ask for no gradients. 0 for all.

    Returns:
        Whether it has the shape.
    """
    if {**zoo_card(name).architecture, "num_classes": 0} != {**shape, "num_classes": 0}:
        return False
    known = {key: value for key, value in load_zoo_module(name).state_dict().items() if key[:5] != "head."}
    drawn = copy.deepcopy(module)
    module.load_state_dict({**module.state_dict(), **known})
    for group, fresh in zip(head_groups(module, tuned), head_groups(drawn, tuned), strict=True):
        silent = group.abs().amax(dim=(1, 2), keepdim=True) == 0
        group.copy_(torch.where(silent, fresh, group))
    if tuned:
        module.requires_grad_(False)
        blocks: Any = module.blocks
        for part in (*blocks[-tuned:], module.norm, module.head):
            part.requires_grad_()
    return True


def fit(
    module: nn.Module,
    objective: Callable[[int], tuple[Tensor, Tensor]],
    recipe: Recipe,
    name: str,
    progress: bool,
    sparse: nn.Module | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> int:
    """Trains `module` in place, until it is done or Ctrl-C is pressed.

    Args:
        module: to train.
        objective: a step's number to its loss, and the fraction that is right.
        recipe: how to train.
        name: on the bar.
        progress: whether to show one.
        sparse: the part of the module whose heads `recipe.sparsity` pulls to zero, by default all of it.
        after: called with the number of steps done, before the first and after each.

    Returns:
        The number of steps done.

    Raises:
        DataError: when the loss is no longer finite.
    """
    optimiser = torch.optim.AdamW(_parameter_groups(module, recipe.weight_decay), lr=recipe.learning_rate)
    groups = _pulled(sparse or module, recipe)
    module.train()
    done = 0
    bar = progress_bar(recipe.steps, f"training {name}", progress, unit="step")
    with bar, _plain_attention(module):
        try:
            after(0)
            for step in range(recipe.steps):
                loss, right = objective(step)
                if not loss.isfinite():
                    raise DataError(f"the loss is {loss.item()} at step {step}: try a smaller learning_rate")
                _descend(module, loss, optimiser, groups, recipe, step)
                done = step + 1
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{right.item():.1%}", refresh=False)
                bar.update()
                after(done)
        except KeyboardInterrupt:
            pass
    module.eval()
    return done


def _classification(module: nn.Module, batch: Labelled, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and accuracy on a batch."""
    logits = module(batch.images)
    loss = F.cross_entropy(logits, batch.targets, label_smoothing=label_smoothing)
    return loss, _right(logits.detach(), batch.targets).float().mean()


def _descend(
    module: nn.Module,
    loss: Tensor,
    optimiser: torch.optim.Optimizer,
    groups: Sequence[tuple[Tensor, float]],
    recipe: Recipe,
    step: int,
) -> None:
    """One step of gradient descent, and the pull on `groups` of weights, each as hard as it says."""
    for options in optimiser.param_groups:
        options["lr"] = recipe.rate(step)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
    silent = [group.abs().amax(dim=(1, 2), keepdim=True) == 0 for group, _ in groups]
    optimiser.step()
    for (group, sparsity), was_silent in zip(groups, silent, strict=True):
        if recipe.pull(step):
            shrink(group, recipe.rate(step) * (sparsity * recipe.pull(step)))
        else:
            group.masked_fill_(was_silent, 0)


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        plain = parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token", "reg_token"))
        (free if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _pulled(module: nn.Module, recipe: Recipe) -> list[tuple[Tensor, float]]:
    """The groups of weights that are pulled to zero, and how hard."""
    each = [(head_groups, recipe.sparsity), (neuron_groups, recipe.mlp_sparsity)]
    return [(group, sparsity) for groups, sparsity in each if sparsity for group in groups(module)]


def neuron_groups(module: nn.Module) -> list[Tensor]:
    """What each neuron of the MLPs reads, and what it writes: views as those of heads."""
    mlps: list[Any] = [block.mlp for block in _trained(module)]
    reads = [mlp.fc1.weight.detach()[:, None] for mlp in mlps]
    return reads + [mlp.fc2.weight.detach().t()[:, :, None] for mlp in mlps]


def head_groups(module: nn.Module, last: int = 0) -> list[Tensor]:
    """Each head's query, key, value and output matrix: views of the weights, (groups, rows, columns).

    Of the layers that are trained; of the `last` ones among these, where that is not 0.
    """
    groups = []
    for block in _trained(module)[-last:]:
        heads = block.attn.num_heads
        groups.append(block.attn.qkv.weight.detach().unflatten(0, (3 * heads, -1)))
        groups.append(block.attn.proj.weight.detach().unflatten(1, (heads, -1)).transpose(0, 1))
    return groups


def _trained(module: nn.Module) -> list[Any]:
    """The blocks that are not frozen; timm's have no types of their own."""
    blocks: Any = module.blocks
    return [block for block in blocks if block.norm1.weight.requires_grad]


def shrink(groups: Tensor, amount: float) -> None:
    """The proximal step of a group lasso on groups (n, rows, columns), in place.

    The root-mean-square of each group falls by `amount`, and is 0 when it was less than that. As with
    AdamW's weight decay, the pull stays apart from Adam's own scaling.
    """
    rms = groups.square().mean(dim=(1, 2), keepdim=True).sqrt()
    groups.mul_((1 - amount / rms.clamp(min=1e-12)).clamp(min=0))


def evaluate(module: nn.Module, part: Labelled, batch_size: int = 250) -> float:
    """Fraction of pictures that are right: the k classes of the target are the k highest logits."""
    with torch.no_grad():
        right = [
            _right(module(part.images[start : start + batch_size]), part.targets[start : start + batch_size])
            for start in range(0, len(part), batch_size)
        ]
    return float(torch.cat(right).float().mean())


def _by_group(module: nn.Module, groups: Mapping[str, Labelled]) -> dict[str, float]:
    """Accuracy of each group and of the worst, and how many pictures the smallest has."""
    each = {name: evaluate(module, part) for name, part in groups.items()}
    if not each:
        return {}
    return {"worst_group": min(each.values()), **each, "n_group": min(map(len, groups.values()))}


def _right(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) bool. Every class in the picture has a higher logit than every class that is not."""
    present = targets > 0
    lowest_in = logits.masked_fill(~present, math.inf).amin(dim=1)
    highest_out = logits.masked_fill(present, -math.inf).amax(dim=1)
    return lowest_in > highest_out


@contextmanager
def _plain_attention(module: nn.Module) -> Iterator[None]:
    """Attention written out during training: on a CPU its backward pass is twice as fast as the fused one."""
    fused = [m for m in module.modules() if getattr(m, "fused_attn", False)]
    for layer in fused:
        layer.fused_attn = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in fused:
            layer.fused_attn = True  # type: ignore[assignment]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with `count` threads; the caller's number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(out: Path) -> Path:
    """`out` without a `.safetensors` or `.json` ending, its folder made and found writable."""
    stem = out.with_suffix("") if out.suffix in (".safetensors", ".json") else out
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        probe = stem.with_name(stem.name + ".safetensors.part")
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise FileError(f"cannot write {stem}.safetensors: {error.strerror}") from error
    return stem


def _save(stem: Path, weights: bytes, card: Card) -> Path:
    path = write_bytes(stem.with_name(stem.name + ".safetensors"), weights)
    card.save(stem.with_name(stem.name + ".json"))
    return path
