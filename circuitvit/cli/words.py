"""`circuitvit words`: photographs with a word on them, to find out whether a model looks or reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import circuitvit as cv
from circuitvit.cli.options import command
from circuitvit.cli.output import Row, show_rows
from circuitvit.cli.wording import remark
from circuitvit.errors import FileError, OptionError, counted

_MEANING = {
    "without": "as they are",
    "neutral": "with the neutral word: what the plate alone does",
    "word": "with the word",
    "mask": "where the word is: white",
}


@command(
    "Words", "tasks.word_files:write_pictures", out="--out -o FOLDER", word="--word TEXT|PICTURE",
    neutral="--neutral TEXT|PICTURE", place="--place PLACE", size="--size SHARE", font="--font FILE",
    ink="--ink COLOUR", ground="--ground COLOUR", look="--look plate|outline",
)  # fmt: skip
def words(
    images: Annotated[
        list[Path], typer.Argument(help="Photographs, or one folder of them.", metavar="IMAGE...")
    ],
    *,
    word: str,
    neutral: str | None = None,
    place: list[str] | None = None,
    size: list[float] | None = None,
    look: str = "plate",
    ink: str = "black",
    ground: str = "white",
    font: Path | None = None,
    seed: int = 0,
    out: Path = Path("words"),
) -> None:
    """Write a word on photographs: does a model look at the picture, or does it read?

    Every picture is written with the word, with a neutral word on the same plate, and without: folders of
    files of the same names, which are pairs. Outside of the plate not a pixel differs.

    ```sh
    circuitvit words cats/ --word dog --neutral sign --place 'bottom right' --size 0.2 --out signs
    ```

    Then look for the circuit that reads:

    ```sh
    circuitvit discover --model catdog-tiny --clean signs/word --corrupt signs/neutral --target dog --foil cat
    ```

    Args:
        word: a text, or a file: a picture of a word, such as one written by hand.
        neutral: a word that names no class, or a file, to compare with.
        place: "top left", top, "top right", left, centre, right, "bottom left", bottom, "bottom right",
            random, or the middle as shares of width and height: 0.5,0.8. Can be repeated: the word is then at
            several places. [default: bottom]
        size: height of the plate as a share of the picture's shorter side. Can be repeated, once for each
            place. [default: 0.15]
        look: a plate behind the letters, or an outline around them.
        out: the folder to write to; there will be `word`, `neutral`, `without` and `mask` in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} is there already, and not empty: give another --out")
    given: Any = images[0] if len(images) == 1 else images
    found = cv.tasks.word_files.write_pictures(
        given,
        out,
        _word(word),
        neutral=None if neutral is None else _word(neutral),
        place=[_place(each) for each in place or ["bottom"]],
        size=size or 0.15,
        look=look,  # type: ignore[arg-type]
        ink=ink,
        ground=ground,
        font=font,
        seed=seed,
    )
    rows = [Row(name, str(folder), _MEANING[name]) for name, folder in found.folders.items()]
    show_rows(f"Wrote {counted(found.count, 'picture')} each", rows, explain=True)
    if found.shrunk:
        remark(f"the word was too long for {counted(len(found.shrunk), 'picture')}, and made smaller to fit")
    if neutral is None:
        remark("without --neutral nobody knows whether a word was read, or its plate was in the way")


def _word(given: str) -> Any:
    """A text, or the path of a picture where there is such a file."""
    path = Path(given)
    if path.suffix.lower() in cv.tasks.image_files.IMAGE_SUFFIXES and not path.is_file():
        raise OptionError(f"there is no picture {path} of a word")
    return path if path.suffix and path.is_file() else given


def _place(given: str) -> Any:
    if "," not in given:
        return given
    try:
        across, down = (float(part) for part in given.split(","))
    except ValueError as error:
        raise OptionError(f"--place is a name or two numbers such as 0.5,0.8, not {given!r}") from error
    return across, down
