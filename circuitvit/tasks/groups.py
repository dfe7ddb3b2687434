"""Token groups: which tokens an edge is resolved by, such as class token against patches, or dog against cat.

Every token belongs to exactly one group, so the edges of all groups together are the edges of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from circuitvit.errors import DataError, OptionError, check_whole
from circuitvit.graph.topology import ONE_GROUP
from circuitvit.models import Model
from circuitvit.tasks.sentences import refuse_sentences

PATCH = "patch"
FAR = "far"


@dataclass(frozen=True, eq=False, repr=False)
class TokenGroups:
    """A partition of the tokens into named groups.

    Attributes:
        names: of the groups; an edge of one is written `a0.h1->a3.h2<q>@dog`, so names have no spaces.
        members: for each token the index of its group among `names`; `(token,)` for all images alike, or
            `(image, token)`, in the order of the images.

    Raises:
        OptionError: if a name is empty, has a space or "@" in it, or occurs twice, or `members` is not what
            it should be.

    Example:
        >>> groups = TokenGroups(("cls", "patch"), torch.tensor([0, 1, 1, 1, 1]))
        >>> groups
        TokenGroups(cls: 1, patch: 4)
    """

    names: tuple[str, ...]
    members: Int64[Tensor, " token"] | Int64[Tensor, "image token"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or len(set(self.names)) < len(self.names):
            raise OptionError(f"token groups need different names, and at least one, not {self.names}")
        given: tuple[object, ...] = self.names
        for name in given:
            if not isinstance(name, str) or not name or "@" in name or any(sign.isspace() for sign in name):
                raise OptionError(f"a token group cannot be called {name!r}: no spaces, no @, and not empty")
        members: object = self.members
        if (
            not isinstance(members, Tensor)
            or members.dtype != torch.int64
            or members.ndim not in (1, 2)
            or members.numel() == 0
        ):
            raise OptionError("members of token groups are int64 indices, (token,) or (image, token)")
        if members.min() < 0 or members.max() >= len(self.names):
            raise OptionError(
                f"members of {len(self.names)} token groups lie between 0 and {len(self.names) - 1}"
            )

    @property
    def n_tokens(self) -> int:
        """How many tokens are divided up."""
        return self.members.shape[-1]

    @classmethod
    def single(cls, n_tokens: int) -> TokenGroups:
        """All tokens in one group, called "all".

        Example:
            >>> TokenGroups.single(5)
            TokenGroups(all: 5)
        """
        if n_tokens < 1:
            raise OptionError(f"a group needs at least one token, not {n_tokens}")
        return cls(ONE_GROUP, torch.zeros(n_tokens, dtype=torch.int64))

    @classmethod
    def by_kind(cls, model: Model, n_tokens: int) -> TokenGroups:
        """Class token, distillation token, registers and patches apart: "cls", "dist", "reg", "patch"; of a
        sentence "start", "word" and "end".

        Only kinds that the model has are groups.

        Raises:
            OptionError: if there are too few tokens for a patch to be among them.

        Example:
            >>> import circuitvit as cv
            >>> TokenGroups.by_kind(cv.load("catdog-tiny"), 37)
            TokenGroups(cls: 1, patch: 36)
        """
        if n_tokens <= len(model.prefix):
            raise OptionError(
                f"{n_tokens} tokens leave none for patches: the first are {', '.join(model.prefix)}"
            )
        kinds = model.token_kinds(n_tokens)
        names = tuple(dict.fromkeys(kinds))
        return cls(names, torch.tensor([names.index(kind) for kind in kinds]))

    @classmethod
    def by_token(cls, model: Model, n_tokens: int) -> TokenGroups:
        """Every token alone: "cls", "patch0", "patch1" ...; of a sentence "start", "word0", ..., "end".

        Raises:
            OptionError: if there are no tokens.
        """
        kinds = model.token_kinds(n_tokens)
        if not kinds:
            raise OptionError("there are no tokens to tell apart")
        names = [
            kind if kinds.count(kind) == 1 else f"{kind}{kinds[:place].count(kind)}"
            for place, kind in enumerate(kinds)
        ]
        return cls(tuple(names), torch.arange(n_tokens))

    @classmethod
    def by_frame(cls, model: Model, n_tokens: int) -> TokenGroups:
        """The patches of a clip apart by time: "frame0", "frame1" ..., after the kinds of the tokens before.

        A patch of a model that sees tubelets covers several frames of the clip: "frame0" is then the first
        slice of them.

        Raises:
            OptionError: if the model sees no clips.
            DataError: if its tokens form no grid.
        """
        if len(model.grid) != 3:
            raise OptionError(
                f"{model.name} sees {model.preprocessing.what}s, which have no frames to tell tokens apart by"
            )
        frames, rows, columns = model.grid
        kinds = tuple(dict.fromkeys(model.prefix))
        names = (*kinds, *(f"frame{frame}" for frame in range(frames)))
        prefix = torch.tensor([kinds.index(kind) for kind in model.prefix], dtype=torch.int64)
        patches = len(kinds) + torch.arange(frames).repeat_interleave(rows * columns)
        if n_tokens != len(prefix) + len(patches):
            raise OptionError(f"{n_tokens} tokens are not the {len(prefix) + len(patches)} of {model.name}")
        return cls(names, torch.cat([prefix, patches]))

    @classmethod
    def from_masks(cls, model: Model, masks: Mapping[str, Tensor], threshold: float = 0.5) -> TokenGroups:
        """The patches that each mask covers, such as `{"dog": dog_mask}`, as groups.

        The other patches are the group "patch" (left out when there are none in any image), and tokens
        before the patches are grouped by kind. A patch that several masks cover belongs to the first.

        Args:
            model: whose patches are meant.
            masks: boolean, in the size of the model's input: `(height, width)`, the same for all images, or
                `(image, height, width)`. `read_mask` makes one from a file. On clips they hold at all times.
            threshold: what part of a patch a mask must cover to have it, above 0 and at most 1.

        Returns:
            Groups in the order: kinds of prefix tokens, masks, "patch"; `members` is `(image, token)` when
            any mask is given for each image.

        Raises:
            DataError: if a mask is not boolean, does not fit the model's input or the other masks, or has
                no patch in any image.
            OptionError: if there is no mask, or one is called like a kind of token, or for another threshold.

        Example:
            >>> import circuitvit as cv
            >>> top = torch.zeros(48, 48, dtype=torch.bool)
            >>> top[:24] = True
            >>> TokenGroups.from_masks(cv.load("catdog-tiny"), {"top": top})
            TokenGroups(cls: 1, top: 18, patch: 18)
        """
        refuse_sentences(model.preprocessing, "masks are of patches")
        if not masks:
            raise OptionError("no masks: for token kinds alone use TokenGroups.by_kind")
        if isinstance(threshold, (bool, str)) or not 0 < threshold <= 1:
            raise OptionError(
                f"the threshold is the covered part of a patch, above 0 and at most 1, not {threshold!r}"
            )
        for name in masks:
            if name in ("cls", "dist", "reg", PATCH):
                raise OptionError(
                    f"a mask cannot be called {name!r}, which is a kind of token: give it another name"
                )
        kinds = tuple(dict.fromkeys(model.prefix))
        names = (*kinds, *masks, PATCH)
        patches = _first_cover(model, masks, threshold) + len(kinds)
        prefix = torch.tensor([kinds.index(kind) for kind in model.prefix], dtype=torch.int64)
        members = torch.cat([prefix.expand(*patches.shape[:-1], -1), patches], dim=-1)
        for index, name in enumerate(masks, start=len(kinds)):
            if not (members == index).any():
                raise DataError(
                    f"no patch belongs to {name!r}: its mask covers none to {threshold:.0%}, or earlier "
                    "masks have them all; lower the threshold, or put the mask first"
                )
        return cls(names if (patches == len(names) - 1).any() else names[:-1], members)

    @classmethod
    def rings(
        cls, model: Model, mask: Tensor, count: int = 2, name: str = "object", threshold: float = 0.5
    ) -> TokenGroups:
        """The patches of an object, those around it by their distance from it, and those that are far.

        "ring1" are the patches beside the object, also across corners, "ring2" those beside these, and "far"
        all beyond the last ring; of clips within each frame. Tokens before the patches are grouped by kind.

        Args:
            model: whose patches are meant.
            mask: of the object, boolean, `(height, width)` or `(image, height, width)`, as of `from_masks`.
            count: how many rings, one patch wide.
            name: of the object.
            threshold: what part of a patch the mask must cover, above 0 and at most 1.

        Raises:
            DataError: if the mask does not fit the model's input, or covers no patch in some image.
            OptionError: for another count or threshold, or a name that a group has already.

        Example:
            >>> import circuitvit as cv
            >>> middle = torch.zeros(48, 48, dtype=torch.bool)
            >>> middle[16:32, 16:32] = True
            >>> TokenGroups.rings(cv.load("catdog-tiny"), middle, count=1)
            TokenGroups(cls: 1, object: 4, ring1: 12, far: 20)
        """
        check_whole("the number of rings (count)", count, 0)
        around = [f"ring{ring}" for ring in range(1, count + 1)]
        if name in (*around, FAR):
            raise OptionError(f"the object cannot be called {name!r}, which is what lies around it")
        found = cls.from_masks(model, {name: mask}, threshold)
        prefix, first = len(model.prefix), found.names.index(name)
        patches = found.members[..., prefix:]
        inside = patches == first
        if not inside.any(dim=-1).all():
            raise DataError(f"{name!r} covers no patch to {threshold:.0%} in some image: it has no rings")
        _, rows, columns = (1, *model.grid_at(*mask.shape[-2:]))[-3:]
        grown, distance = inside.reshape(-1, 1, rows, columns).double(), torch.zeros_like(patches)
        for _ in range(count + 1):
            distance += (grown == 0).reshape(patches.shape)
            grown = F.max_pool2d(grown, 3, 1, 1)
        members = torch.cat([found.members[..., :prefix], first + distance], dim=-1)
        names = (*found.names[: first + 1], *around, FAR)
        return cls(names[: int(members.max()) + 1], members)

    def __repr__(self) -> str:
        counts = torch.bincount(self.members.flatten(), minlength=len(self.names)).tolist()
        shown = ", ".join(f"{name}: {count}" for name, count in zip(self.names, counts, strict=True))
        return f"TokenGroups({shown}{f', in {len(self.members)} images' if self.members.ndim == 2 else ''})"


def _first_cover(
    model: Model, masks: Mapping[str, Tensor], threshold: float
) -> Int64[Tensor, " patch"] | Int64[Tensor, "image patch"]:
    """For each patch the number of the first mask that covers it, or the number of masks where none does."""
    height, width = _common_size(masks)
    *time, down, across = model.grid_at(height, width)
    if height % down or width % across:
        raise DataError(
            f"masks are {height} x {width}, which {down} x {across} patches do not divide: "
            "resize and crop them like the images, as read_mask does"
        )
    owner = torch.tensor(len(masks))
    for number, mask in reversed(list(enumerate(masks.values()))):  # backwards: the first has the last word
        *images, height, width = mask.shape
        blocks = mask.cpu().reshape(*images, down, height // down, across, width // across)
        covered = blocks.double().mean(dim=(-3, -1)).flatten(-2)
        owner = torch.where(covered >= threshold, number, owner)
    return owner.repeat(*(1,) * (owner.ndim - 1), math.prod(time))


def _common_size(masks: Mapping[str, Tensor]) -> tuple[int, int]:
    """Height and width of all masks, once it is certain that they fit each other."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.ndim not in (2, 3):
            kind = str(mask.dtype).removeprefix("torch.")
            raise DataError(
                f"the mask {name!r} is {kind} of shape {tuple(mask.shape)}: masks are boolean, "
                "(height, width) or (image, height, width)"
            )
    sizes = {tuple(mask.shape[-2:]) for mask in masks.values()}
    counts = {len(mask) for mask in masks.values() if mask.ndim == 3}
    if len(sizes) > 1 or len(counts) > 1:
        said = ", ".join(f"{name!r} of {tuple(mask.shape)}" for name, mask in masks.items())
        raise DataError(f"masks must be of one size and for one number of images, not {said}")
    height, width = sizes.pop()
    return height, width
