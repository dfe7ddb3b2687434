"""Attention patterns in a compact form, and the page that shows those of all heads of some images.

At 1,025 tokens a head has a million numbers for each image, and a model of 72 heads 75 million. So each row
of a pattern is stored as its largest value and, for each key, one of a few levels: the root of its share of
that value. With 255 levels a value is then right to within 1/255 of the largest in its row. A head gets the
most levels for which it fits into its share of the page; if even 9 are too many, keys are pooled in squares
of 2, 4 or 8 patches on each side, and what is shown of a square is its mean. The page says which it is.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup
from numpy.typing import NDArray

from circuitvit.export.page import COLOURS, document
from circuitvit.export.sheet import Sheet
from circuitvit.models.tokens import token_name

LADDER = tuple((pool, levels) for pool in (1, 2, 4, 8) for levels in (255, 127, 63, 31, 15, 9))
"""How keys are pooled and how many levels there are, the best first."""

NIBBLE = 16
"""So many codes fit two into a byte, which compresses better than one for each."""

SCRIPTS = ("page/common.js", "attention/patterns.js", "attention/paint.js", "attention/attention.js")
STYLES = ("page/page.css", "attention/attention.css")

SAMPLED = 128
"""Rows on which it is tried how small a head becomes."""

OWN = 40
"""Bytes that the compression takes for itself."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a page: those that are no patches, and then patches as they lie on paper.

    Attributes:
        prefix: kinds of the tokens before the patches.
        sheet: how the patches lie.
    """

    prefix: tuple[str, ...]
    sheet: Sheet

    def __len__(self) -> int:
        return len(self.prefix) + prod(self.sheet.grid)

    @property
    def names(self) -> list[str]:
        """Of the tokens before the patches."""
        kinds = (*self.prefix, *("patch",) * prod(self.sheet.grid))
        return [token_name(kinds, token, lambda: self.sheet.grid) for token in range(len(self.prefix))]

    @property
    def order(self) -> Int[NDArray[np.int64], " token"]:
        """The model's tokens in the order of the page."""
        before = len(self.prefix)
        return np.concatenate([np.arange(before), before + self.sheet.order])

    def blocks(self, pool: int) -> Int[NDArray[np.int64], " token"]:
        """The number of the square that each token is in, within its frame; other tokens are alone.

        Example:
            >>> Tokens(("cls",), Sheet((2, 4))).blocks(2).tolist()
            [0, 1, 1, 2, 2, 1, 1, 2, 2]
        """
        if pool == 1:
            return np.arange(len(self))
        high, wide = self.sheet.grid[-2:]
        frame, row, column = np.indices((self.sheet.frames, high, wide)).reshape(3, -1)
        down, across = ceil(high / pool), ceil(wide / pool)
        square = (frame * down + row // pool) * across + column // pool
        return np.concatenate([np.arange(len(self.prefix)), len(self.prefix) + square[self.sheet.order]])

    @property
    def least(self) -> int:
        """Bytes that a head takes at the very least, at the lower end of `LADDER`."""
        return len(self) * (8 + (int(self.blocks(LADDER[-1][0]).max()) + 1) // 2) + 100


@dataclass(frozen=True, eq=False)
class Packed:
    """The pattern of a head on one image in the compact form.

    Attributes:
        queries: how many rows it has.
        levels: between 0 and the largest value of a row; on either side of 0 where values are signed.
        pool: patches on each side of the squares in which keys are pooled.
        signed: whether values may be negative.
        weighs: whether the sizes of values follow.
        content: compressed: the largest value of each row and the size of each key's value, float32; then for
            each row and block of keys a code, which is `levels` for 0 where values are signed.
    """

    queries: int
    levels: int
    pool: int
    signed: bool
    weighs: bool
    content: bytes

    @property
    def precision(self) -> float:
        """How far a value may be off, as a share of the largest in its row."""
        return 1 / self.levels

    @property
    def text(self) -> str:
        """The content in letters."""
        return base64.b64encode(self.content).decode()

    def unpacked(self, tokens: Tokens) -> Float[NDArray[np.float32], "query key"]:
        """The pattern, true to `precision`; of keys that are pooled the mean of their square."""
        content = np.frombuffer(zlib.decompress(self.content), dtype=np.uint8)
        blocks = tokens.blocks(self.pool)
        start, width = 4 * (self.queries + self.weighs * len(tokens)), int(blocks.max()) + 1
        codes, count = content[start:], self.queries * width
        if _codes(self.levels, self.signed) <= NIBBLE:
            codes = np.stack([codes >> 4, codes & 15], axis=1).ravel()[:count]
        levels = codes.reshape(self.queries, width).astype(np.float32) - self.signed * self.levels
        shares = np.sign(levels) * (levels / self.levels) ** 2
        found = (content[: 4 * self.queries].view("<f4")[:, None] * shares)[:, blocks]
        return np.asarray(found, dtype=np.float32)

    def sizes(self, tokens: Tokens) -> Float[NDArray[np.float32], " key"] | None:
        """The size of each key's value, where it is there."""
        content, first = np.frombuffer(zlib.decompress(self.content), dtype=np.uint8), 4 * self.queries
        return content[first : first + 4 * len(tokens)].view("<f4") if self.weighs else None

    def said(self) -> list[Any]:
        """What the page must know to unpack it."""
        return [self.queries, self.levels, self.pool, int(self.signed), int(self.weighs)]


def pack(
    pattern: Float[NDArray[np.float32], "query key"],
    weights: Float[NDArray[np.float32], " key"] | None,
    tokens: Tokens,
    room: float,
) -> Packed:
    """A pattern with the most levels for which it fits into some room.

    Args:
        pattern: keys in the order of the page.
        weights: the size of each key's value, if there is such a thing.
        tokens: the keys.
        room: bytes; what does not fit even with the fewest levels is larger.

    Example:
        >>> pattern, tokens = np.array([[0.5, 0.125, 0.375]], dtype=np.float32), Tokens((), Sheet((1, 3)))
        >>> pack(pattern, None, tokens, 1000).unpacked(tokens).round(2).tolist()
        [[0.5, 0.12..., 0.37...]]
    """
    signed = bool((pattern < 0).any())
    every = max(1, len(pattern) // SAMPLED)
    plain = b"" if weights is None else weights.astype("<f4").tobytes()
    room -= 4 * len(pattern) + len(plain) + OWN
    pooled, roots, largest = 0, pattern, pattern
    for pool, levels in LADDER:
        levels = levels // 2 if signed else levels
        if pool != pooled:
            pooled, means = pool, _pooled(pattern, tokens.blocks(pool), pool)
            largest = np.abs(means).max(axis=1)
            shares = means / np.maximum(largest, np.finfo(np.float32).tiny)[:, None]
            roots = np.sign(shares) * np.sqrt(np.abs(shares))
        if every * len(_deflated(_coded(roots[::every], levels, signed))) <= room:
            break
    content = _deflated(largest.astype("<f4").tobytes() + plain, _coded(roots, levels, signed))
    return Packed(len(pattern), levels, pool, signed, weights is not None, content)


def attention_html(
    title: str,
    origin: str,
    tokens: Tokens,
    rows: Sequence[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]],
    start: Mapping[str, int],
) -> str:
    """The page as HTML; the same data gives the same text, byte for byte.

    Args:
        title: above the page; names are inert already (`graph.files.clean`).
        origin: what it is of, below the title.
        tokens: of the images.
        rows: of the overview: a `name`, names of `heads`, `latents` that ask in place of tokens, or 0, and
            whether the heads have a gate (`gated`).
        images: a `name`, a `picture` as a data URI or None, `words` of a sentence by token, `heads`,
            one `Packed` for each head of all rows, and the `overview`, one for the rows of all heads that are
            shown at first.
        start: what is shown first: `image`, `head` and `token`; -1 is the mean of all queries.
    """
    packs = [[image["overview"], *image["heads"]] for image in images]
    pools = sorted({pack.pool for each in packs for pack in each})
    high, wide = tokens.sheet.grid[-2:]
    data = {
        "tokens": len(tokens),
        "prefix": tokens.names,
        "grid": tokens.sheet.shape,
        "frame": [high, wide, tokens.sheet.across, tokens.sheet.frames],
        "blocks": {str(pool): tokens.blocks(pool).tolist() for pool in pools},
        "rows": list(rows),
        "images": [
            {
                "name": image["name"],
                "picture": image["picture"],
                "words": image["words"],
                "packs": [pack.said() for pack in each],
            }
            for image, each in zip(images, packs, strict=True)
        ],
        "start": dict(start),
        **COLOURS,
    }
    letters = [
        (f"pack-{image}-{place}", Markup(pack.text))
        for image, each in enumerate(packs)
        for place, pack in enumerate(each)
    ]
    return document("attention/page.html", SCRIPTS, STYLES, data, title=title, origin=origin, packs=letters)


def _pooled(pattern: NDArray[np.float32], blocks: NDArray[np.int64], pool: int) -> NDArray[np.float32]:
    """The mean of the keys of each block."""
    if pool == 1:
        return pattern
    sizes = np.bincount(blocks)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    sums: NDArray[np.float32] = np.add.reduceat(pattern[:, np.argsort(blocks, kind="stable")], starts, axis=1)
    return (sums / sizes).astype(np.float32)


def _codes(levels: int, signed: bool) -> int:
    """How many codes there are."""
    return 2 * levels + 1 if signed else levels + 1


def _coded(roots: NDArray[np.float32], levels: int, signed: bool) -> bytes:
    codes = (np.rint(levels * roots) + signed * levels).astype(np.uint8).ravel()
    if _codes(levels, signed) > NIBBLE:
        return codes.tobytes()
    codes = np.append(codes, np.zeros(len(codes) % 2, dtype=np.uint8))
    return bytes((codes[::2] * NIBBLE + codes[1::2]).tobytes())


def _deflated(*parts: bytes) -> bytes:
    """As zlib does, but looking for runs alone: levels hold little else, and it is five times as fast.

    Each part has letters of its own, as its bytes are unlike those of the others.
    """
    made = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return b"".join(made.compress(part) + made.flush(zlib.Z_FULL_FLUSH) for part in parts) + made.flush()
