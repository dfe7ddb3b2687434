"""Import timm, also beside a torchvision that was built for another torch.

timm imports torchvision, and torchvision registers its compiled operators with torch when it is imported.
A torchvision wheel built for another torch (the usual case: a CUDA wheel beside a CPU torch) cannot load
its operators. It tolerates that everywhere except in one file, `torchvision/_meta_registrations.py`, which
describes the operator `nms` to torch without asking whether it is there, so that the whole import dies with
`RuntimeError: operator torchvision::nms does not exist`.

timm uses the Python parts of torchvision only (transforms and graph utilities), and that file does nothing
but describe operators that are absent. So on exactly this failure the import is tried once more with an
empty module in the file's place. Where torch and torchvision match, nothing is replaced.
"""

from __future__ import annotations

import importlib
import logging
import sys
from importlib import metadata
from types import ModuleType

from circuitvit.errors import ModelError, ProcessError

_logger = logging.getLogger(__name__)

_MISMATCH = "operator torchvision::nms does not exist"
_REGISTRATIONS = "torchvision._meta_registrations"


def import_timm() -> ModuleType:
    """The module `timm`, imported on the first call.

    Importing timm takes seconds, so the library calls this where timm is first needed and never when
    circuitvit itself is imported. Once it has returned, a plain `import timm` works anywhere in the process.

    Raises:
        ModelError: timm cannot be imported; the message names the installed versions, and `__cause__` is
            the error that timm or torchvision raised.
        ProcessError: this process is told to end meanwhile.
    """
    try:
        return _import_with_guard()
    except ProcessError:  # torchrun ends this process, at whatever place it is
        raise
    except Exception as error:  # an import runs other people's code, which may raise anything
        raise ModelError(
            f"timm cannot be imported: {type(error).__name__}: {error}\n"
            f"Installed: {_versions()}. Install timm, and the torchvision release that belongs to this torch."
        ) from error


def _import_with_guard() -> ModuleType:
    """`import timm`, retried without torchvision's operator descriptions when those are what fails."""
    timm = sys.modules.get("timm")
    if timm is not None and not getattr(timm.__spec__, "_initializing", False):
        return timm  # asked for often, and noting what is loaded takes a millisecond
    loaded_before = set(sys.modules)
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if _MISMATCH not in str(error):
            raise
    _logger.info("torchvision was built for another torch: importing timm without torchvision's operators")
    _forget_half_imported(loaded_before)
    sys.modules[_REGISTRATIONS] = ModuleType(_REGISTRATIONS, "Emptied by circuitvit.models.timm_import.")
    try:
        return importlib.import_module("timm")
    except BaseException:
        sys.modules.pop(_REGISTRATIONS, None)
        raise


def _forget_half_imported(loaded_before: set[str]) -> None:
    """Drop the timm and torchvision modules that the failed import added to `sys.modules`.

    Python drops a package whose import fails but keeps those of its submodules that were complete. A second
    import would find these without running them, and so never bind them as attributes of the new package.
    """
    for name in set(sys.modules) - loaded_before:
        if name.partition(".")[0] in {"timm", "torchvision"}:
            del sys.modules[name]


def _versions() -> str:
    """The installed versions that decide whether the import can work, for the error message."""
    found = []
    for name in ("torch", "torchvision", "timm"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return ", ".join(found)
