"""Commands of `circuitvit view`, run in this process, and photographs for them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from circuitvit.cli.inside import view
from circuitvit.errors import CircuitViTError


def run(*arguments: object) -> str:
    """What a command prints; what it refuses is raised."""
    result = CliRunner().invoke(view, [str(each) for each in arguments], catch_exceptions=True)
    if isinstance(result.exception, CircuitViTError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def save_pictures(folder: Path, pictures: Tensor) -> Path:
    """Pictures `(picture, channel, height, width)` from 0 to 1 as files `0.png`, `1.png`, ..."""
    folder.mkdir(exist_ok=True)
    for place, picture in enumerate(pictures):
        pixels = (picture * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return folder
