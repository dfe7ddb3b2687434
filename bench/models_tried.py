"""Every architecture of timm's isotropic files, and those of other libraries: decomposed rightly, or refused.

Each is built with two blocks, little width and a small image where its constructor takes these; all
weights are drawn anew (biases, LayerScale, tables of positions), so that none hides a difference. What its
senders and constants add up to is compared in float64 with the logits of the module itself.

    python -m bench.models_tried                    # print the tables
    python -m bench.models_tried --write            # and renew docs/models.md and docs/models_tried.csv
    python -m bench.models_tried --only eva         # names with this in them
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import circuitvit as cv
from bench._micro_models import MICRO
from circuitvit.errors import CircuitViTError
from circuitvit.models import Model
from circuitvit.models.timm_import import import_timm

FILES = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "deit",
    "beit",
    "eva",
    "naflexvit",
    "vitamin",
    "convit",
    "cait",
    "xcit",
    "tnt",
    "deepseek_vit",
    "gemma4_vit",
    "qwen3_vit",
)
"""timm's files whose models keep one number and width of tokens from the first block to the last."""

BOUND = 1e-5
"""How far the sum of the parts may be from the logits, relative to the largest of them."""

SHALLOW: dict[str, Any] = {"depth": 2}
NARROW = {**SHALLOW, "embed_dim": 48, "num_heads": 2}
GROUPED = {**NARROW, "num_kv_heads": (2, 1)}
"""What constructors are asked for: the first that they do not refuse, without what they do not know."""

UNNAMED = {"deepseek": 14}
"""Sides of patches that names do not tell."""

SINGLE = ("clip",)
"""Libraries whose norms compute in float32 whatever they are given, so that no more can be asked of them."""

PAGE, LIST = Path("docs/models.md"), Path("docs/models_tried.csv")
MARKS = ("<!-- tried: python -m bench.models_tried --write -->", "<!-- /tried -->")


@dataclass(frozen=True)
class Tried:
    """What became of one architecture.

    Attributes:
        name: of the architecture or class.
        where: timm's file, or the library.
        error: of the sum of its parts, relative to its largest logit; None if it was refused.
        reason: of the refusal.
        wrong: whether it was taken with a wrong sum, or something else than a refusal was raised.
    """

    name: str
    where: str
    error: float | None = None
    reason: str = ""
    wrong: bool = False

    @property
    def outcome(self) -> str:
        return "wrong" if self.wrong else "refused" if self.error is None else "accepted"


# -- building ------------------------------------------------------------------------------------


def architectures() -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Name, place and builder of everything that is tried."""
    timm = import_timm()
    for file in FILES:
        for name in timm.list_models(module=file):
            yield name, f"timm `{file}.py`", partial(small, name)
    for name, build in MICRO.items():
        library, _, kind = name.partition(": ")
        yield kind, library, build


def small(name: str) -> nn.Module:
    """One of timm's architectures, as small as its constructor makes it.

    Raises:
        RuntimeError: if it cannot be made small.
    """
    timm = import_timm()
    patch = re.search(r"(?:patch|_p)(\d+)", name)
    side = 4 * (int(patch[1]) if patch else UNNAMED.get(name.partition("_")[0], 16))
    size = {"img_size": side, "pretrained_cfg_overlay": {"input_size": (3, side, side)}}
    classes = {"num_classes": 10} if timm.get_pretrained_cfg(name).num_classes else {}
    complaints = []
    for wanted in (NARROW, GROUPED, SHALLOW):
        options: dict[str, Any] = {**wanted, **size, **classes}
        while True:
            try:
                return timm.create_model(name, **options)  # type: ignore[no-any-return]
            except Exception as error:
                complaints.append(str(error))
                unknown = re.search(r"keyword argument\D*'(\w+)'", complaints[-1])
                if unknown is None or options.pop(unknown[1], None) is None:
                    break
    raise RuntimeError(f"{name} cannot be made small: {complaints}")


def redraw(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Every parameter drawn anew, with outputs of order 1; in evaluation mode."""
    module = module.to(dtype).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim > 1:
                noise /= math.sqrt(parameter[0].numel()) if name.endswith("weight") else 1.5
            else:
                noise = (0.0 if name.endswith("bias") else 1.0) + 0.3 * noise
            parameter.copy_(noise)
    return module


# -- trying --------------------------------------------------------------------------------------


def tried(name: str, where: str, build: Callable[[], nn.Module]) -> Tried | None:
    """Build, redraw, wrap and compare; None where the library is not installed."""
    try:
        module = redraw(build(), torch.float32 if where in SINGLE else torch.float64)
    except ImportError:
        return None
    try:
        error = off(cv.wrap(module))
    except CircuitViTError as refusal:
        return Tried(name, where, reason=str(refusal))
    except Exception as raised:
        return Tried(name, where, reason=f"{type(raised).__name__}: {raised}", wrong=True)
    if not error <= BOUND:
        return Tried(name, where, error, f"the sum of its parts is off by {error:.1e}", wrong=True)
    return Tried(name, where, error)


@torch.no_grad()
def off(model: Model) -> float:
    """How far what all senders and constants add up to is from the module's own logits on other images."""
    shape, generator = model.preprocessing.shape, torch.Generator().manual_seed(8)
    images = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    images = images.to(model.dtype)
    own, found = model(images), summed(model, images)
    return float((found - own).abs().max() / own.abs().max())


def summed(model: Model, images: Tensor) -> Tensor:
    """The logits by the sum of all senders' own outputs."""
    stream = model.embed(images)
    for stage in model.layers:
        written = stage.expand(stage.write(stage.read(stream))).sum(dim=0)
        if stage.constant is not None:
            written = written + stage.constant
        stream = written if stage.nodes.begins else stream + written  # a pool begins a stream of its own
    return model.stages[-1].write(model.stages[-1].read(stream))


# -- telling -------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def by_place(found: Sequence[Tried]) -> str:
    """How many of each file or library are accepted, and the largest error."""
    rows = []
    for where in dict.fromkeys(each.where for each in found):
        own = [each for each in found if each.where == where]
        rows.append([where, *counts(own)])
    timm = [each for each in found if each.where.startswith("timm")]
    rows.insert(len({each.where for each in timm}), ["**all of timm's**", *counts(timm)])
    return table(["where", "tried", "accepted", "refused", "largest error"], rows)


def counts(found: Sequence[Tried]) -> list[str]:
    outcomes = Counter(each.outcome for each in found)
    errors = [each.error for each in found if each.error is not None]
    largest = f"{max(errors):.0e}" if errors else ""
    return [str(len(found)), str(outcomes["accepted"]), str(outcomes["refused"]), largest]


def by_reason(found: Sequence[Tried]) -> str:
    """The reasons of refusals, the commonest first, with the architectures."""
    reasons: dict[str, list[Tried]] = defaultdict(list)
    for each in found:
        if each.outcome != "accepted":
            reasons[re.sub(r"^\S+ cannot be decomposed: ", "", each.reason)].append(each)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    return table(
        ["refused", "because", "such as"],
        [[str(len(own)), reason, ", ".join(f"`{each.name}`" for each in own[:3])] for reason, own in ordered],
    )


def report(found: Sequence[Tried]) -> str:
    return f"{by_place(found)}\n\n{by_reason(found)}"


def write(found: Sequence[Tried]) -> None:
    """Renew the tables of the page, and the list of all names."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{report(found)}\n\n{MARKS[1]}{after}", encoding="utf-8")
    with LIST.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["where", "name", "outcome", "error", "reason"])
        for each in found:
            error = "" if each.error is None else f"{each.error:.0e}"
            lines.writerow([each.where.replace("`", ""), each.name, each.outcome, error, each.reason])


def main() -> None:
    """Try all, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only names or places with this in them")
    parser.add_argument("--write", action="store_true", help="renew docs/models.md and docs/models_tried.csv")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [each for each in architectures() if options.only in each[0] or options.only in each[1]]
    outcomes = (tried(*each) for each in tqdm(chosen, desc="architectures"))
    found = [each for each in outcomes if each is not None]
    print(report(found))
    if options.write:
        write(found)
    if any(each.wrong for each in found):
        sys.exit("some were taken wrongly, or raised something else than a refusal")


if __name__ == "__main__":
    main()
