"""A package's face that costs nothing to import: each name is fetched from its home when it is first used."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def lazy(
    package: str, homes: Mapping[str, str], submodules: str = ""
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """The functions `__getattr__` and `__dir__` of a package (PEP 562), and its `__all__`.

    Nothing is kept: a name is looked up at its home each time, so that a test may replace it there.

    Args:
        package: its dotted name.
        homes: from a module to the names that live there, apart by spaces.
        submodules: modules of the package that can be used without an import of their own.

    Example:
        >>> import circuitvit._lazy
        >>> get, names, _ = circuitvit._lazy.lazy("circuitvit", {"circuitvit.errors": "DataError FileError"})
        >>> names(), get("DataError").__name__
        (['DataError', 'FileError'], 'DataError')
    """
    home = {name: module for module, names in homes.items() for name in names.split()}
    own = submodules.split()

    def __getattr__(name: str) -> object:
        if name in home:
            return getattr(import_module(home[name]), name)
        if name in own:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*home, *own])

    return __getattr__, __dir__, list(home)
