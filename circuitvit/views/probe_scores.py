"""What probes say of single tokens of some images: how much of a class each patch knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.special import log_softmax

from circuitvit.errors import OptionError, unknown_name
from circuitvit.export.sheet import Sheet
from circuitvit.export.style import MUTED
from circuitvit.graph.results import Record, Result, cells
from circuitvit.views.subjects import Subjects

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

MOST_PANELS = 16


@dataclass(frozen=True, eq=False, repr=False)
class ProbeScores(Result):
    """What probes say of single tokens of some images.

    Attributes:
        subjects: the images.
        sites: names of what is probed.
        classes: that are told apart.
        logits: `(site, image, token, class)`; NaN of tokens that were not asked.
    """

    subjects: Subjects
    sites: tuple[str, ...]
    classes: tuple[str, ...]
    logits: Float[NDArray[np.float32], "site image token class"]

    along = "subjects:image sites:site classes:class"
    may_be_nan = "logits"

    def records(self) -> Iterator[Record]:
        """One row for each `site`, `image`, `token` and `class`: its `logit` (NaN of tokens not asked)."""
        return cells(
            {"site": self.sites, **self.subjects.axes_of_tokens, "class": self.classes}, logit=self.logits
        )

    def _check(self) -> None:
        self.subjects.check_tokens(self.logits.shape[2])

    def log_odds(self, of: int | str) -> Float[NDArray[np.float32], "site image token"]:
        """The log-odds of a class against all others, in nats.

        Raises:
            NameNotFoundError, OptionError: if there is no such class.
        """
        number = number_of("class", of, self.classes)
        with np.errstate(invalid="ignore"):
            others = np.logaddexp.reduce(np.delete(self.logits, number, axis=-1), axis=-1)
        found: NDArray[np.float32] = self.logits[..., number] - others
        return found

    def probability(self, of: int | str) -> Float[NDArray[np.float32], "site image token"]:
        """The probability of a class, 0 to 1, as the probe says it."""
        number = number_of("class", of, self.classes)
        found: NDArray[np.float32] = np.exp(log_softmax(self.logits, axis=-1)[..., number])
        return found

    def ranges(self, of: int | str, image: int = 0) -> list[tuple[str, float, float, float]]:
        """By site: mean, least and greatest log-odds of a class over the tokens of an image."""
        asked = self.log_odds(of)[:, image]
        return [
            (site, float(np.nanmean(each)), float(np.nanmin(each)), float(np.nanmax(each)))
            for site, each in zip(self.sites, asked, strict=True)
        ]

    def figure(
        self, of: int | str = 0, image: int = 0, *, sites: Sequence[str] | None = None, picture: bool = True
    ) -> Picture:
        """The log-odds of a class at each patch, a panel for each site, on one scale: blue is for it.

        Args:
            of: the class, by name or number.
            image: which.
            sites: which; by default all, or 16 of them.
            picture: whether the image lies behind.

        Raises:
            NameNotFoundError, OptionError: if there is no such class, image or site.
        """
        from circuitvit.views import canvas

        row, number = self.subjects.index(image), number_of("class", of, self.classes)
        shown = spread(self.sites) if sites is None else list(sites)
        places = [number_of("site", each, self.sites) for each in shown]
        values = self.log_odds(number)[places, row]
        look: dict[str, Any] = {"norm": canvas.even_norm(values, 0.98), "cmap": canvas.signed_colours()}
        look["alpha"], sheet = 0.75 if picture else 1.0, self.subjects.sheet
        behind = self.subjects.pictures[row] if picture else None
        name = canvas.label(self.classes[number], 30)
        with canvas.styled():
            title = f"Log-odds of {name}, read off each patch: {self.subjects.names[row]}"
            figure, panels = site_panels(len(shown), sheet, title)
            for axes, site, each in zip(panels, shown, values, strict=True):
                drawn = canvas.overlay(axes, self.subjects.on_sheet(each), behind, sheet=sheet, **look)
                axes.set_title(canvas.label(site), loc="left", fontweight="bold")
                before = [
                    f"{self.subjects.token_name(token)} {each[token]:+.1f}"
                    for token in range(self.subjects.n_prefix)
                    if np.isfinite(each[token])
                ]
                axes.set_xlabel(canvas.label(", ".join(before)), color=MUTED)
            figure.colorbar(drawn, ax=panels, shrink=0.7, label=f"log-odds of {name} (nats)", extend="both")
        return figure

    def __repr__(self) -> str:
        return f"ProbeScores({len(self.subjects)} images, {len(self.sites)} sites: {', '.join(self.classes)})"


# -- names and panels ----------------------------------------------------------------------------


def number_of(kind: str, wanted: int | str, names: Sequence[str]) -> int:
    """The place of a name, or of a number that is counted from the end where negative."""
    if isinstance(wanted, str):
        if wanted not in names:
            raise unknown_name(kind, wanted, names)
        return names.index(wanted)
    if not -len(names) <= wanted < len(names):
        raise OptionError(f"there is no {kind} {wanted}: there are {len(names)}, counted from 0")
    return wanted % len(names)


def spread(sites: Sequence[str]) -> list[str]:
    """Sites for panels, from the first to the last."""
    places = np.linspace(0, len(sites) - 1, min(len(sites), MOST_PANELS)).round().astype(int)
    return [sites[place] for place in places]


def site_panels(count: int, sheet: Sheet, title: str) -> tuple[Picture, list[Any]]:
    """A figure with a panel for each site."""
    from circuitvit.views import canvas

    across = min(count, 3 if count <= 6 else 5) if sheet.frames == 1 else 1
    wide, high = canvas.proportions(sheet, 1.9, 9.0)
    figure = canvas.blank(max(wide * across + 0.8, 4.0), (high + 0.25) * -(-count // across) + 0.4, title)
    return figure, canvas.panels(figure, count, across)
