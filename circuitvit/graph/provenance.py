"""Where a result came from: enough to say what was run on what, and to refuse mixing results up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from circuitvit._version import __version__


@dataclass(frozen=True)
class Provenance:
    """What a circuit or a set of scores came from; every field may be unknown (empty).

    Attributes:
        model: name of the model.
        weights: SHA-256 over the model's parameters.
        task: one line that describes images, metric and ablation.
        method: how the edges were scored or searched.
        parameters: the method's settings, JSON values only; a size asked for stands here as `asked`.
        seed: of whatever was drawn at random.
        library: version of circuitvit that made it.
    """

    model: str = ""
    weights: str = ""
    task: str = ""
    method: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    library: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**asdict(self), "parameters": dict(self.parameters)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """The inverse of `to_dict`; unknown keys are left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def with_parameters(self, **parameters: Any) -> Provenance:
        """The same, with some of the method's settings added or replaced."""
        return replace(self, parameters={**self.parameters, **parameters})
