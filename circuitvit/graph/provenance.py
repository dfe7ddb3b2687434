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

    def mismatch(self, other: Provenance) -> str:
        """In what the models of two circuits differ, in words for a report; "" where nothing is known to.

        A circuit may run on another model of the same shape, and be compared with a circuit of one: that is
        allowed, but whoever reads the result must be told.

        Example:
            >>> Provenance("vit-a", "1f").mismatch(Provenance("vit-b", "2e"))
            "different models: 'vit-a' and 'vit-b'"
            >>> Provenance("vit-a", "1f").mismatch(Provenance("vit-a", "2e"))
            "different weights of 'vit-a'"
            >>> Provenance("vit-a", "1f").mismatch(Provenance("a copy", "1f"))
            ''
        """
        weights, names = (self.weights, other.weights), (self.model, other.model)
        if weights[0] == weights[1] != "":  # one model under two names
            return ""
        if all(names) and names[0] != names[1]:
            return f"different models: {names[0]!r} and {names[1]!r}"
        if all(weights):
            return f"different weights of {(names[0] or names[1] or 'a model')!r}"
        return ""
