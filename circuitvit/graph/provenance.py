"""Where a circuit or a set of scores came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from circuitvit._version import __version__
from circuitvit.graph.files import TEXT, cleaned, record

PROVENANCE_SCHEMA = record(
    "",
    model=TEXT,
    weights=TEXT,
    task=TEXT,
    method=TEXT,
    parameters={"type": "object"},
    seed={"type": ["integer", "null"]},
    library=TEXT,
    libraries={"type": "object", "additionalProperties": TEXT},
    prompts={"type": "array", "items": TEXT},
    templates={"type": "array", "items": TEXT},
)


@dataclass(frozen=True)
class Provenance:
    """What a circuit or a set of scores came from; every field may be unknown (empty).

    Texts are kept as they can be shown and written, see `clean`: they may come from anybody's file.

    Attributes:
        model: name of the model.
        weights: SHA-256 over the values of the model's weights, whatever library's layout they are in. Files
            of version 0.1 hold another hash, which was over names too, and is compared with its like alone.
        task: one line that describes images, metric and ablation.
        method: how the edges were scored or searched.
        parameters: the method's settings, JSON values only; a size asked for stands here as `asked`.
        seed: of whatever was drawn at random.
        library: version of circuitvit that made it.
        libraries: versions of torch and of the libraries that the model's parts come from, by name.
        prompts: the sentences, or names in templates, that were the model's classes; files made before there
            were prompts hold none.
        templates: that names were put in; none where the prompts are sentences.
    """

    model: str = ""
    weights: str = ""
    task: str = ""
    method: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    library: str = __version__
    libraries: Mapping[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for each in fields(self):
            value = cleaned(getattr(self, each.name))
            object.__setattr__(self, each.name, tuple(value) if isinstance(value, list) else value)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; prompts where there are some."""
        values = {**asdict(self), "parameters": dict(self.parameters), "libraries": dict(self.libraries)}
        said = {name: list(values.pop(name)) for name in ("prompts", "templates")}
        return values | {name: texts for name, texts in said.items() if texts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """The inverse of `to_dict`; unknown keys are left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    @property
    def shares_of(self) -> str:
        """What the scores are shares of, where they are no effects and have no sign; else ""."""
        return str(self.parameters.get("shares_of") or "")

    def with_shares_of(self, what: str) -> Provenance:
        """The same for scores that are shares of something; "" for effects."""
        others = {name: value for name, value in self.parameters.items() if name != "shares_of"}
        return replace(self, parameters=others | ({"shares_of": what} if what else {}))

    def with_parameters(self, **parameters: Any) -> Provenance:
        """The same, with some of the method's settings added or replaced."""
        return replace(self, parameters={**self.parameters, **parameters})

    def about(self, most: int = 8) -> str:
        """The prompts, and the templates that they were put in, in words for people; the first few of many.

        Example:
            >>> Provenance(prompts=("cat", "dog", "owl"), templates=("a {}",)).about(2)
            'cat; dog; and 1 more, in the template a {}'
        """
        said = [_few(each, most) for each in (self.prompts, self.templates) if each]
        return f", in the template{'s' if len(self.templates) > 1 else ''} ".join(said)

    def is_comparable(self, other: Provenance) -> bool:
        """Whether the weights' hashes of both are known and of one kind: they differ if the weights do."""
        kinds = {each.weights.rpartition("-")[0] for each in (self, other)}
        return bool(self.weights and other.weights) and len(kinds) == 1

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
        if all(weights) and self.is_comparable(other):
            return f"different weights of {(names[0] or names[1] or 'a model')!r}"
        return ""


def _few(texts: tuple[str, ...], most: int) -> str:
    more = (f"and {len(texts) - most} more",) if len(texts) > most else ()
    return "; ".join((*texts[:most], *more))
