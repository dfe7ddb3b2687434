"""`circuitvit view`, further: looks that measure, train or edit, at many images rather than at one."""

from __future__ import annotations

from circuitvit.cli.view import view

VIEWS: dict[str, tuple[object, str]] = {}

for _name, (_command, _summary) in VIEWS.items():
    view.command(_name, short_help=_summary)(_command)  # type: ignore[type-var]

__all__ = ["view"]
