"""Values that people write with a unit or a name, as the library takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from circuitvit.errors import OptionError

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)
_BYTES = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_WORDS = {"True": True, "False": False, "None": None}


def parse_size(text: str, option: str) -> int:
    """Bytes from "2GB" (10^9), "512MiB" (2^20) or "1000B".

    Raises:
        OptionError: if it is no positive size with a unit.

    Example:
        >>> parse_size("2GB", "--memory"), parse_size("1.5 KiB", "--memory")
        (2000000000, 1536)
    """
    match = _AMOUNT.fullmatch(text)
    unit = _BYTES.get(match[2].lower()) if match else None
    size = round(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise OptionError(f"{option} takes a size such as 500MB, 2GB or 1GiB, not {text!r}")
    return size


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
