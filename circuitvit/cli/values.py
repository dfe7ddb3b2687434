"""Values that people write with a unit or a name, as the library takes them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from circuitvit.errors import OptionError

__all__ = ["parse_architecture", "parse_duration", "parse_size"]

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}
_BYTES = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_WORDS = {"True": True, "False": False, "None": None}


def parse_duration(text: str, option: str) -> float:
    """Seconds from "120s", "2m", "1.5h" or a bare number of seconds.

    Args:
        text: what was written.
        option: by which option, for the message.

    Raises:
        OptionError: if it is no positive duration.

    Example:
        >>> parse_duration("2m", "--within")
        120.0
    """
    return _amount(text, _SECONDS, f"{option} takes a duration such as 90s, 2m or 1h")


def parse_size(text: str, option: str) -> int:
    """Bytes from "2GB" (10^9), "512MiB" (2^20) or "1000B".

    Raises:
        OptionError: if it is no positive size with a unit.

    Example:
        >>> parse_size("2GB", "--memory"), parse_size("1.5 KiB", "--memory")
        (2000000000, 1536)
    """
    return round(_amount(text, _BYTES, f"{option} takes a size such as 500MB, 2GB or 1GiB"))


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


def _amount(text: str, units: dict[str, int], expected: str) -> float:
    match = _AMOUNT.fullmatch(text)
    factor = units.get(match[2].lower()) if match else None
    amount = float(match[1]) * factor if match and factor else 0.0
    if not 0 < amount < math.inf:
        raise OptionError(f"{expected}, not {text!r}")
    return amount


def _value(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    try:
        return json.loads(text)
    except ValueError:
        return text
