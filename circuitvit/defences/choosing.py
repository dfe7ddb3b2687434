"""Which nodes to remove: by exact measurement of what goes and what is lost, in whatever order they come.

Every way of ordering nodes is judged by the same rules. A node, or a block of nodes, is removed where

    |what is left of the unwanted effect| + shares lost of wanted ones + a price for every node

falls, measured by running the model without all that has been chosen so far, and where right answers of no
wanted behaviour fall by more than the limit. The second term keeps out what makes all effects small: a node
without which the model says less of everything. Of a behaviour with counterfactuals it is the share of its
effect that is lost, where some is; of one with groups by how much right answers become less likely, with all
groups counting the same, which may be a gain. A mean over plain images holds the unwanted effect itself, and
says neither.

What is refused is not tried again. After some refusals in a row, or when nothing is left to go, it ends. As
the first choice may have spent what others would have made better use of, the search is repeated without it,
and the better of the two stands, until that is no better.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._progress import progress_bar
from circuitvit.defences.removable import AT_ONCE, Objective, Removable
from circuitvit.errors import ModelError
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask
from circuitvit.tasks.images import Images
from circuitvit.tasks.task import batches_of

PRICE = 1e-3
"""What a node costs, as a share of the unwanted effect at first: it has to bring more than that."""

GONE = 0.01
"""The share of the unwanted effect below which nothing is left to remove."""

PATIENCE = 10
"""Refusals in a row after which a search ends."""

Pairs = Float[np.ndarray, " pair"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a model does on the pairs of a behaviour.

    Attributes:
        effect: metric of the clean image minus that of the corrupt one; without one, the metric, `(pair,)`.
        right: whether the answer is right, or what the model answered at first; of the unwanted behaviour
            whether the answer is the same on both images. None for outputs that are no classes.
        extent: what the size of the behaviour is a mean of: the effect or, where there are groups, how likely
            right answers are, `(pair,)`.
    """

    effect: Pairs
    right: Bool[NDArray[np.bool_], " pair"] | None
    extent: Pairs


@dataclass(frozen=True, eq=False)
class Watched:
    """A behaviour on some pairs, as the model shows it at first and without some nodes.

    Attributes:
        name: of the behaviour.
        task: the pairs, prepared for the model.
        groups: the group of each pair; () where there are none.
        is_unwanted: whether it is the one to be removed.
    """

    name: str
    task: PreparedTask
    groups: tuple[str, ...] = ()
    is_unwanted: bool = False

    @cached_property
    def clean(self) -> Float[Tensor, "pair class"]:
        """The logits of the model as it is on clean images."""
        return self._logits(self.task.model, self.task.clean)

    @property
    def has_labels(self) -> bool:
        """Whether the task says which answer is right."""
        return self.task.metric.metric.target is not None

    def seen(self, model: Model) -> Outcome:
        """What a model does."""
        clean = self.clean if model is self.task.model else self._logits(model, self.task.clean)
        corrupt = None if self.task.corrupt is None else self._logits(model, self.task.corrupt)
        effect = self._metric(clean)
        if corrupt is not None:
            effect = effect - self._metric(corrupt)
        right = self._right(clean, corrupt) if self.task.model.chooses else None
        return Outcome(effect, right, self._likely(clean).numpy() if self._is_grouped else effect)

    @property
    def _is_grouped(self) -> bool:
        """Whether groups, and no counterfactuals, say how much of it there is."""
        return self.task.corrupt is None and bool(self.groups) and self.task.model.chooses

    @cached_property
    def _wanted(self) -> Bool[Tensor, "pair class"]:
        """The right answers, or the model's own at first."""
        target = self.task.metric.target
        if self.has_labels and target is not None:
            return target.cpu()
        return torch.nn.functional.one_hot(self.clean.argmax(dim=-1), self.clean.shape[-1]).bool()

    def _likely(self, logits: Tensor, rows: Tensor | None = None) -> Float[Tensor, " image"]:
        """How likely the right answers are, 0 to 1."""
        wanted = self._wanted if rows is None else self._wanted[rows]
        return (logits.double().softmax(dim=-1) * wanted.to(logits.device)).sum(dim=-1)

    def _right(self, clean: Tensor, corrupt: Tensor | None) -> NDArray[np.bool_]:
        answers = clean.argmax(dim=-1)
        if self.is_unwanted:
            assert corrupt is not None, "checked at first"
            return (answers == corrupt.argmax(dim=-1)).numpy()
        return self._wanted.gather(1, answers[:, None])[:, 0].numpy()

    def _metric(self, logits: Tensor) -> Pairs:
        found = self.task.metric(logits, self.clean, torch.arange(len(logits)))
        return found.double().numpy()

    def _logits(self, model: Model, images: Images) -> Tensor:
        with torch.no_grad():
            found = torch.cat([model(batch).cpu() for batch in batches_of(model, images, AT_ONCE)])
        if not found.isfinite().all():
            raise ModelError(f"{model.name} gives NaN or infinite logits: check its weights and the images")
        return found

    # -- how much of it there is ---------------------------------------------------------------------

    @cached_property
    def weights(self) -> Pairs | None:
        """What each pair counts in the size of the behaviour; None where a mean says nothing of it.

        With groups each group counts the same, so that what is for one group and against another cancels.
        """
        if self.task.corrupt is not None:
            return np.full(len(self.task), 1 / len(self.task))
        if not self._is_grouped:
            return None
        counts = {name: self.groups.count(name) for name in self.groups}
        return np.array([1 / (len(counts) * counts[name]) for name in self.groups])

    @cached_property
    def at_first(self) -> Outcome:
        return self.seen(self.task.model)

    @cached_property
    def size(self) -> float:
        """The size of the behaviour at first; 0 where a mean says nothing of it."""
        return 0.0 if self.weights is None else float(self.weights @ self.at_first.extent)

    def share(self, outcome: Outcome) -> float:
        """The share of it that is left."""
        return float(self.weights @ outcome.extent) / self.size if self.weights is not None else 1.0

    def lost(self, share: Any) -> Any:
        """What counts as lost of it, of shares that are left: with groups a gain counts as well."""
        return 1 - share if self._is_grouped else np.maximum(0, 1 - share)

    def fall(self, outcome: Outcome) -> float:
        """By how much the share of right answers has fallen; of outputs that are no classes the effect's."""
        before = self.at_first
        if outcome.right is None or before.right is None:
            whole = np.abs(before.effect).mean()
            return float((before.effect - outcome.effect).mean() / whole) if whole else 0.0
        return float(before.right.mean() - outcome.right.mean())

    def to_first_order(self, nodes: Removable, model: Model, batch_size: int | None) -> Pairs:
        """By how much each removal alone changes the share that is left, to first order, `(name,)`."""
        assert self.weights is not None, "asked where there is a size"
        found = nodes.to_first_order(model, self.task.clean, self._objective, batch_size)
        if self.task.corrupt is not None:
            found = found - nodes.to_first_order(model, self.task.corrupt, self._objective, batch_size)
        return found / self.size

    @property
    def _objective(self) -> Objective:
        weights = torch.from_numpy(self.weights)

        def weighed(logits: Tensor, rows: Int64[Tensor, " batch"]) -> Tensor:
            own = weights[rows].to(logits.device)
            if self._is_grouped:
                return self._likely(logits, rows) * own
            return self.task.metric(logits, self.clean[rows].to(logits.device), rows) * own.to(logits)

        return weighed


# -- the search ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What a search chose.

    Attributes:
        names: of what is removed, in the order in which it was chosen.
        left: the share of the unwanted effect that is left, with its sign.
        lost: the sum of what is lost of wanted behaviours, as shares; below 0 where more is gained.
        falls: by how much the right answers of each wanted behaviour have fallen.
        tried: runs of the model without something.
    """

    names: tuple[str, ...]
    left: float
    lost: float
    falls: tuple[float, ...]
    tried: int = 0

    @property
    def cost(self) -> float:
        """What is to become small."""
        return abs(self.left) + self.lost + PRICE * len(self.names)


@dataclass(frozen=True, eq=False)
class Search:
    """The rules by which every method's nodes are chosen.

    Attributes:
        unwanted: the behaviour to be removed.
        wanted: the behaviours to be kept.
        max_loss: by how much right answers of any of them may fall.
        most: the largest number of nodes; None for any.
        progress: whether to show a bar.
    """

    unwanted: Watched
    wanted: tuple[Watched, ...]
    max_loss: float
    most: int | None
    progress: bool

    def judged(self, model: Model, names: Sequence[str] = ()) -> Choice:
        """What is left, lost and fallen in a model without some nodes."""
        seen = [(each, each.seen(model)) for each in self.wanted]
        lost = [float(each.lost(each.share(outcome))) for each, outcome in seen if each.size > 0]
        return Choice(
            tuple(names),
            self.unwanted.share(self.unwanted.seen(model)),
            sum(lost),
            tuple(each.fall(outcome) for each, outcome in seen),
        )

    def chosen(
        self,
        without: Callable[[Sequence[str]], Model],
        ranked: Callable[[Model], Iterable[str]],
        what: str,
    ) -> Choice:
        """The nodes that are removed, of those that are offered.

        Args:
            without: the model without some nodes.
            ranked: nodes in the order in which they are to be tried, given the model without those that are
                chosen; asked for again after each choice.
            what: for the bar.
        """
        best, passed = self._once(without, ranked, what, set()), set[str]()
        tried = best.tried
        while best.names and best.names[0] not in passed:
            passed.add(best.names[0])
            other = self._once(without, ranked, what, passed)
            tried += other.tried
            if other.cost < best.cost:
                best = other
        return replace(best, tried=tried)

    def _once(
        self,
        without: Callable[[Sequence[str]], Model],
        ranked: Callable[[Model], Iterable[str]],
        what: str,
        passed: Collection[str],
    ) -> Choice:
        """The same, some nodes being passed over."""
        best, refused, tried, idle = self.judged(without(())), set(passed), 0, 0
        order, block = [name for name in ranked(without(())) if name not in refused], 1
        with progress_bar(self.most or len(order), f"mending, {what}", self.progress, unit="node") as bar:
            while order and idle < PATIENCE and abs(best.left) > GONE:
                room = min(block, len(order) if self.most is None else self.most - len(best.names))
                if room <= 0:
                    break
                names = (*best.names, *order[:room])
                model = without(names)
                found, tried = self.judged(model, names), tried + 1
                if self._allows(found) and found.cost < best.cost:
                    bar.update(room)
                    best, idle, block = found, 0, 2 * room
                    order = [name for name in ranked(model) if name not in refused.union(best.names)]
                elif room > 1:
                    block = max(1, room // 4)
                else:
                    refused.add(order.pop(0))
                    idle += 1
        return replace(best, tried=tried)

    def _allows(self, choice: Choice) -> bool:
        return all(fall <= self.max_loss + 1e-12 for fall in choice.falls)


def by_effects(search: Search, nodes: Removable, batch_size: int | None) -> Callable[[Model], Iterator[str]]:
    """Nodes by how much of the unwanted effect they take away, less what they take of wanted ones.

    Those come first that are expected to improve the choice most, to first order at the model as it is by
    then; those that are expected to make it worse are not offered.
    """

    def ranked(model: Model) -> Iterator[str]:
        left = search.unwanted.share(search.unwanted.seen(model))
        change = search.unwanted.to_first_order(nodes, model, batch_size) * np.sign(left)
        sized = [each for each in search.wanted if each.size > 0]
        costs = [each.lost(1 + each.to_first_order(nodes, model, batch_size)) for each in sized]
        gain = -change - np.sum([np.zeros_like(change), *costs], axis=0)
        for place in np.argsort(-gain, kind="stable"):
            if gain[place] > PRICE:
                yield nodes.names[place]

    return ranked
