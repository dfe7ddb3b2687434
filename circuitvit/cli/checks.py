"""What can be wrong with an installation, and the line that mends it: all that `circuitvit doctor` knows.

Nothing but the standard library is imported here, so that it runs where torch, timm or rich cannot be. What
has to be imported to be known is imported by another process (`PROBE`), which may fail or crash. Looking
(`look`) is apart from judging (`findings`).
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from circuitvit._version import __version__

Level = Literal["ok", "note", "broken"]

TIMEOUT = 120
"""Seconds that importing may take, on a cold disk."""

EXTRAS = {
    "plots": "figures as .png and .pdf, heat maps",
    "transformers": "models of transformers, `--model hf:...`",
    "open-clip": "models of open_clip",
    "video": "clips from video files",
    "digits": "handwritten digits",
    "heads": "classifiers fitted to features",
    "probes": "linear probes",
    "sae": "training dictionaries of features",
}
"""What each extra of the package is for."""

BROWSERS = ("google-chrome", "chromium", "chromium-browser", "firefox", "microsoft-edge", "safari", "brave")

WHEELS = "https://download.pytorch.org/whl"
"""Where torch publishes its builds, by device."""

PROBE = """
import importlib, json, sys, warnings

def told(name, work):
    print(json.dumps({"start": name}), flush=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = work() or {}
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"}
    found["warnings"] = [str(each.message) for each in said]
    print(json.dumps({"end": name, **found}), flush=True)

def of_torch():
    import torch
    seen = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(place) for place in range(torch.cuda.device_count())] if seen else []
    mps = getattr(torch.backends, "mps", None)
    return {"build": torch.version.cuda or getattr(torch.version, "hip", None), "devices": names,
            "mps": bool(mps and mps.is_available())}

def of_torchvision():
    importlib.import_module("torchvision")

def of_circuitvit():
    import circuitvit, torch
    model = circuitvit.load("catdog-tiny")
    logits = model(torch.zeros(1, *model.preprocessing.shape))
    assert logits.isfinite().all(), "the bundled model gives NaN"

told("torch", of_torch)
told("torchvision", of_torchvision)
told("circuitvit", of_circuitvit)
"""
"""Run by another Python: says before and after each import how it went, one line of JSON each."""


class Finding(NamedTuple):
    """Something that was looked at.

    Attributes:
        level: "ok", "note" for what can be lived with, "broken" for what must be mended.
        what: was looked at.
        said: how it is.
        mend: a line to type, or ""; where there is one, the level is not "ok".
    """

    level: Level
    what: str
    said: str
    mend: str = ""


@dataclass(frozen=True)
class Machine:
    """What was seen of a machine.

    Attributes:
        requires: requirements of the package as its metadata have them, such as "timm>=1.0.20", or
            "matplotlib>=3.8; extra == 'plots'".
        versions: of the packages named there and of torchvision, by name; None for those that are missing.
        imports: by name what `PROBE` said; with "error" where an import failed.
        programs: paths of programs by name; None where there is none.
        unwritable: folders that cannot be written to, by what they are for.
        hub: "" where it answers, what went wrong where not; None where nobody has asked.
        settings: environment variables that matter.
    """

    requires: tuple[str, ...] = ()
    versions: dict[str, str | None] = field(default_factory=dict)
    imports: dict[str, dict[str, Any]] = field(default_factory=dict)
    programs: dict[str, str | None] = field(default_factory=dict)
    unwritable: dict[str, Path] = field(default_factory=dict)
    hub: str | None = None
    settings: dict[str, str] = field(default_factory=dict)


# -- looking -------------------------------------------------------------------------------------


def look(online: bool = False) -> Machine:
    """The machine that this runs on; `online` also asks whether the hub of models answers."""
    requires = _requires()
    names = {*(_parsed(each).name for each in requires), "torch", "timm", "torchvision"}
    programs = {name: shutil.which(name) for name in ("dot", "nvidia-smi", *BROWSERS)}
    settings = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT") if name in os.environ}
    return Machine(
        requires,
        {name: _version(name) for name in names},
        _probed(),
        programs,
        {what: path for what, path in _folders().items() if not _writable(path)},
        _hub(settings.get("HF_ENDPOINT", "https://huggingface.co")) if online else None,
        settings,
    )


def _requires() -> tuple[str, ...]:
    try:
        return tuple(metadata.requires("circuitvit") or ())
    except metadata.PackageNotFoundError:
        return ()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _probed() -> dict[str, dict[str, Any]]:
    """What the other process said; the import that it died in has an error that says so."""
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", PROBE]
    end = ""
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, check=False,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        output = run.stdout
        end = f"the process ended with code {run.returncode}" if run.returncode else ""
    except subprocess.TimeoutExpired as late:
        output = (late.stdout or b"").decode()
        end = f"not imported within {TIMEOUT} seconds"
    found: dict[str, dict[str, Any]] = {}
    for line in output.splitlines():
        if line.startswith('{"start"'):
            found[json.loads(line)["start"]] = {"error": end}
        elif line.startswith('{"end"'):
            told = json.loads(line)
            found[told.pop("end")] = told
    return found


def _folders() -> dict[str, Path]:
    """Where libraries put what they have downloaded or made, and where files are made for a moment."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return {
        "HF_HOME": Path(os.environ.get("HF_HOME", home / "huggingface")),
        "TORCH_HOME": Path(os.environ.get("TORCH_HOME", home / "torch")),
        "TMPDIR": Path(tempfile.gettempdir()),
    }


def _writable(path: Path) -> bool:
    """Whether a file can be made in a folder, or in the nearest one above it that is there."""
    path = path.expanduser()
    there = next((each for each in (path, *path.parents) if each.exists()), path)
    try:
        with tempfile.TemporaryFile(dir=there):
            return True
    except OSError:
        return False


def _hub(address: str) -> str:
    """Whether the hub answers: "" or what went wrong."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5):
            return ""
    except urllib.error.HTTPError:
        return ""  # it answered
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


# -- judging -------------------------------------------------------------------------------------


def findings(seen: Machine) -> list[Finding]:
    """What is well and what is not, the most basic things first."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return [
        Finding("ok", f"circuitvit {__version__}", system),
        *_requirements(seen),
        *_imports(seen),
        *_devices(seen),
        *_extras(seen),
        *_programs(seen),
        *_reach(seen),
    ]


class _Requirement(NamedTuple):
    name: str
    least: str
    extra: str


def _parsed(text: str) -> _Requirement:
    """A requirement with a lowest version at most, as those of this package are.

    Example:
        >>> _parsed("matplotlib>=3.8; extra == 'plots'")
        _Requirement(name='matplotlib', least='3.8', extra='plots')
    """
    needed, _, marker = text.partition(";")
    name, _, least = re.sub(r"\[.*?\]", "", needed).strip().partition(">=")
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
    return _Requirement(
        re.split(r"[<=!~ ]", name)[0], re.split(r"[,<]", least)[0].strip(), extra[1] if extra else ""
    )


def _older(version: str, least: str) -> bool:
    """Whether a version is below another.

    Example:
        >>> _older("1.0.9", "1.0.20"), _older("2.4.0+cpu", "2.4")
        (True, False)
    """
    ours, theirs = (
        [int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:4]] for text in (version, least)
    )
    return ours + [0] * (len(theirs) - len(ours)) < theirs


def _requirements(seen: Machine) -> Iterator[Finding]:
    if not seen.requires:
        yield Finding(
            "note",
            "requirements",
            "circuitvit is not installed here, only its folder is found",
            "pip install -e .",
        )
    needed = [each for each in map(_parsed, seen.requires) if not each.extra]
    faults = []
    for name, least, _ in needed:
        version, wanted = seen.versions.get(name), f"'{name}>={least}'"
        if version is None:
            faults.append(Finding("broken", name, "is not installed", f"pip install {wanted}"))
        elif least and _older(version, least):
            older = f"{version} is older than {least}"
            faults.append(Finding("broken", name, older, f"pip install --upgrade {wanted}"))
    yield from faults
    if needed and not faults:
        known = ", ".join(f"{name} {seen.versions.get(name)}" for name in ("torch", "timm"))
        yield Finding("ok", "requirements", f"all {len(needed)} are there and new enough ({known})")


def _imports(seen: Machine) -> Iterator[Finding]:
    torch, vision, whole = (seen.imports.get(name, {}) for name in ("torch", "torchvision", "circuitvit"))
    if error := torch.get("error"):
        mend = f"pip install --force-reinstall torch --index-url {WHEELS}/cpu"
        yield Finding("broken", "torch", f"cannot be imported: {_brief(error)}", mend)
        return
    if whole.get("error"):
        yield Finding(
            "broken",
            "circuitvit",
            f"cannot run its bundled model: {_brief(whole['error'])}",
            _vision_mend(seen),
        )
    elif whole:
        yield Finding("ok", "a model runs", "catdog-tiny was loaded and run")
    mismatch = _mismatch(seen)
    if error := vision.get("error"):
        said = f"{seen.versions.get('torchvision') or 'missing'}: cannot be imported: {_brief(error)}"
        around = (
            "" if whole.get("error") else "; models of timm run all the same, those of torchvision do not"
        )
        yield Finding(
            "broken" if whole.get("error") else "note", "torchvision", said + around, _vision_mend(seen)
        )
    elif mismatch:
        yield Finding("note", "torchvision", mismatch, _vision_mend(seen))


def _brief(error: str) -> str:
    """The last line that says something, short enough for a table."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    said = lines[0] if lines else "no reason given"
    return said if len(said) <= 160 else said[:159] + "…"


def _minor(version: str | None) -> int | None:
    match = re.match(r"\d+\.(\d+)", version or "")
    return int(match[1]) if match else None


def _build(version: str | None) -> str:
    """The build that a version names: "cpu", "cu128", or "" where it names none."""
    return (version or "").partition("+")[2]


def _mismatch(seen: Machine) -> str:
    """How torch and torchvision do not belong together; "" where they do."""
    torch, vision = (seen.versions.get(name) for name in ("torch", "torchvision"))
    ours, theirs = _minor(torch), _minor(vision)
    if torch and vision and torch.startswith("2.") and ours is not None and theirs != ours + 15:
        return f"{vision} belongs to another torch than {torch}, whose torchvision is 0.{ours + 15}"
    if torch and vision and _build(torch) != _build(vision):
        return f"{vision} is of another build than torch {torch}"
    return ""


def _vision_mend(seen: Machine) -> str:
    ours = _minor(seen.versions.get("torch"))
    wanted = f"torchvision==0.{ours + 15}.*" if ours is not None else "torchvision"
    build = _build(seen.versions.get("torch"))
    where = f" --index-url {WHEELS}/{build}" if build else ""
    return f"pip install --force-reinstall --no-deps '{wanted}'{where}"


def _devices(seen: Machine) -> Iterator[Finding]:
    torch = seen.imports.get("torch", {})
    if not torch or torch.get("error"):
        return
    if names := torch.get("devices"):
        yield Finding("ok", "devices", f"{', '.join(names)}: --device cuda; cpu by default")
        return
    driver = seen.programs.get("nvidia-smi")
    warned = next((each for each in torch.get("warnings", ()) if "driver" in each or "CUDA" in each), "")
    if torch.get("mps"):
        yield Finding(
            "ok", "devices", "cpu; Apple's GPU is there (mps), which has no float64: keep to cpu for figures"
        )
    elif torch.get("build") and "too old" in warned:
        newer = f"pip install --force-reinstall torch torchvision --index-url {WHEELS}/cu118"
        said = f"cpu only: {_brief(warned)} (torch is built for CUDA {torch['build']})"
        yield Finding("note", "devices", said, f"{newer}   # or update the NVIDIA driver")
    elif torch.get("build") and driver:
        said = f"cpu only: torch is built for CUDA {torch['build']} and sees no GPU"
        said += f": {_brief(warned)}" if warned else ""
        yield Finding(
            "note",
            "devices",
            said,
            "nvidia-smi   # is a GPU listed, and is CUDA_VISIBLE_DEVICES unset?",
        )
    elif driver:
        said = "cpu only: there is an NVIDIA driver, and this torch is built without CUDA"
        yield Finding(
            "note",
            "devices",
            said,
            f"pip install --force-reinstall torch torchvision --index-url {WHEELS}/cu126",
        )
    else:
        yield Finding("ok", "devices", "cpu; no GPU was seen, and none is needed")


def _extras(seen: Machine) -> Iterator[Finding]:
    parts = [each for each in map(_parsed, seen.requires) if each.extra in EXTRAS]
    for extra, purpose in EXTRAS.items():
        own = [each for each in parts if each.extra == extra]
        lacking = [each.name for each in own if seen.versions.get(each.name) is None]
        old = [each for each in own if (v := seen.versions.get(each.name)) and _older(v, each.least)]
        if lacking:
            said = f"{', '.join(lacking)} is not installed, for {purpose}"
            yield Finding("note", f"extra {extra}", said, f"pip install 'circuitvit[{extra}]'")
        for each in old:
            said = f"{each.name} {seen.versions[each.name]} is older than {each.least}, for {purpose}"
            yield Finding(
                "note", f"extra {extra}", said, f"pip install --upgrade '{each.name}>={each.least}'"
            )
        if own and not lacking and not old:
            known = ", ".join(f"{each.name} {seen.versions[each.name]}" for each in own)
            yield Finding("ok", f"extra {extra}", f"{known}: {purpose}")


def _programs(seen: Machine) -> Iterator[Finding]:
    if seen.programs.get("dot"):
        yield Finding("ok", "Graphviz", f"{seen.programs['dot']} lays out circuit.dot")
    else:
        said = "the program dot is not found; only files written as .dot need it, .svg and .html do not"
        yield Finding("note", "Graphviz", said, _by_system("graphviz"))
    found = next((name for name in BROWSERS if seen.programs.get(name)), None)
    if found or platform.system() in ("Darwin", "Windows"):
        yield Finding(
            "ok", "browser", f"{found or 'the system has one'}: pages such as circuit.html open in it"
        )
    else:
        said = "none is found; circuit.html is one file, which can be copied to where there is one"
        yield Finding("note", "browser", said, _by_system("chromium"))


def _by_system(package: str) -> str:
    """The line that installs a program here."""
    managers = {"Darwin": "brew install", "Windows": "winget install"}
    return f"{managers.get(platform.system(), 'sudo apt install')} {package}"


def _reach(seen: Machine) -> Iterator[Finding]:
    for name, path in seen.unwritable.items():
        said = f"{path} cannot be written to"
        kept = "no temporary file can be made" if name == "TMPDIR" else "downloaded weights cannot be kept"
        level: Level = "broken" if name == "TMPDIR" else "note"
        yield Finding(level, name, f"{said}: {kept}", f"export {name}=$PWD/cache   # a folder of yours")
    if not seen.unwritable:
        yield Finding("ok", "folders", "caches and temporary files can be written")
    if seen.hub == "":
        yield Finding("ok", "hub", "answers: --pretrained and hf:NAME can download weights")
    elif seen.hub is not None:
        said = f"does not answer ({seen.hub}): weights have to be files"
        yield Finding("note", "hub", said, "circuitvit discover --model NAME --checkpoint FILE ...")
    if seen.settings.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("note", "hub", "HF_HUB_OFFLINE is set: nothing is downloaded", "unset HF_HUB_OFFLINE")


def as_text(found: list[Finding]) -> str:
    """The findings as plain lines, each with what mends it below."""
    wide = max(len(each.what) for each in found)
    lines = []
    for each in found:
        lines.append(f"{each.level:<6}  {each.what:<{wide}}  {each.said}")
        if each.mend:
            lines.append(f"{'':<6}  {'':<{wide}}  $ {each.mend}")
    return "\n".join(lines)
