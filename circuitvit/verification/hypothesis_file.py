"""Hypotheses in a YAML file, so that claims are stated, reviewed and versioned before they are tested.

    schema: circuitvit.hypotheses/1
    model: {name: vit_tiny_patch16_224, checkpoint: vit_tiny.safetensors}
    task: {clean: cat.jpg, corrupt: dog.jpg, target: tabby, foil: Border collie}
    hypotheses:
      - claim: the last layer's head 1 writes the cat
        edges: a11.h1 -> logits
        expect: {falls_by: 0.5}

Paths are relative to the folder of the file. `docs/hypotheses.md` describes every field.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml

from circuitvit.errors import FileError
from circuitvit.graph import Circuit
from circuitvit.graph.files import check_shape
from circuitvit.tasks import Task, ablation_names, metric_names
from circuitvit.tasks.metrics import ClassSpec, as_metric
from circuitvit.tasks.pairs import Pairing
from circuitvit.verification.expectations import BeatsRandom, Expectation, Falls, Flips, Rises, Unchanged
from circuitvit.verification.hypotheses import Hypothesis
from circuitvit.verification.interpretation import Interpretation
from circuitvit.verification.verdict import REFUTED, SCOPES, SUPPORTED, UNDECIDED

HYPOTHESES_SCHEMA = "circuitvit.hypotheses/1"
INTERPRETATION_SCHEMA = "circuitvit.interpretation/1"

LARGEST_FILE = 2**20
"""Bytes: YAML can refer to itself, and what is written by hand is short."""


@dataclass(frozen=True, eq=False)
class HypothesisFile:
    """What a file of hypotheses says.

    Attributes:
        path: of the file.
        hypotheses: in order.
        expected: the verdict that each is expected to get, or None where the file does not say.
        model: name of the model, or None.
        checkpoint: of its weights, or None.
        task: the task, or None where the file names no images.
        alpha: level of significance.
        seed: of everything random.
        behaviour: metric, classes and ablation, as they stand there.
        prompts: sentences, or names in templates, that are the classes of a model of images and texts.
        templates: that the names are put in.
    """

    path: Path
    hypotheses: tuple[Hypothesis, ...]
    expected: tuple[str | None, ...]
    model: str | None = None
    checkpoint: Path | None = None
    task: Task | None = None
    alpha: float = 0.05
    seed: int = 0
    behaviour: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


def read_hypotheses(path: str | Path) -> HypothesisFile:
    """Read a file of hypotheses.

    Raises:
        FileError: if it is missing, no YAML, or not as described; the message names the place.
        CircuitViTError: if a value makes no sense, such as a share above 1.

    Example:
        >>> file = read_hypotheses("docs/cat_dog_hypotheses.yaml")  # doctest: +SKIP
        >>> [each.claim for each in file.hypotheses]  # doctest: +SKIP
    """
    path = Path(path)
    content = _load(path, HYPOTHESES_SCHEMA)
    check_shape(path, content, _SCHEMA)
    folder = path.parent
    model, task = content.get("model", {}), content.get("task", {})
    checkpoint = model.get("checkpoint")
    return HypothesisFile(
        path=path,
        hypotheses=tuple(_hypothesis(each, folder) for each in content["hypotheses"]),
        expected=tuple(each.get("verdict") for each in content["hypotheses"]),
        model=model.get("name"),
        prompts=tuple(model.get("prompts", ())),
        templates=tuple(model.get("templates", ())),
        checkpoint=None if checkpoint is None else folder / checkpoint,
        task=_task(task, folder),
        alpha=float(content.get("alpha", 0.05)),
        seed=content.get("seed", 0),
        behaviour={
            key: folder / task[key] if key == "to" else task[key]
            for key in ("metric", "target", "foil", "to", "ablation")
            if key in task
        },
    )


def read_interpretation(path: str | Path) -> Interpretation:
    """Read a circuit with claims about what it carries, for `scrub`.

        schema: circuitvit.interpretation/1
        circuit: circuit.json # or patterns of edges
        claims: {a2.h1: species & x, m0: everything}
        labels: labels.csv # the names of the labels, and then a row for each image

    Paths are relative to the folder of the file. What stands in the table is text.

    Raises:
        FileError: if it, or the table, is missing or not as described.

    Example:
        >>> cv.scrub(model, task, read_interpretation("claims.yaml"))  # doctest: +SKIP
    """
    path = Path(path)
    content = _load(path, INTERPRETATION_SCHEMA)
    check_shape(path, content, _INTERPRETATION)
    said, folder = content["circuit"], path.parent
    circuit = folder / said if isinstance(said, str) and said.endswith(".json") else said
    labels = _labels(folder / content["labels"]) if "labels" in content else {}
    return Interpretation(circuit, content.get("claims", {}), labels)


def _labels(path: Path) -> dict[str, list[str]]:
    """The columns of a table by their names."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"cannot read the labels {path}: {error}") from error
    names, *rows = [row for row in rows if row] or [[]]
    if not all(names) or len(set(names)) < max(1, len(names)):
        raise FileError(f"{path}: its first line has to name each column of labels, no two alike")
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise FileError(
                f"{path}: row {number} has {len(row)} entries, and there are {len(names)} columns"
            )
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


# -- inside --------------------------------------------------------------------------------------

_CLASS = {"type": ["string", "integer"]}
_CLASSES = {"anyOf": [_CLASS, {"type": "array", "items": _CLASS, "minItems": 1}]}
_NUMBER = {"type": "number"}
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT}
_ABLATION = {"enum": list(ablation_names())}
_EXPECT: dict[str, Any] = {
    "falls_by": _NUMBER,
    "rises_by": _NUMBER,
    "changes_less_than": {"type": "number", "exclusiveMinimum": 0},
    "flips": {
        "type": "object",
        "required": ["to"],
        "additionalProperties": False,
        "properties": {"from": _CLASSES, "to": _CLASSES, "share": _NUMBER},
    },
    "beats_random": {"type": "integer", "minimum": 1},
}
_IMAGES: dict[str, Any] = {"clean": _TEXT, "corrupt": _TEXT}
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["schema", "hypotheses"],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": HYPOTHESES_SCHEMA},
        "model": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"name": _TEXT, "checkpoint": _TEXT, "prompts": _TEXTS, "templates": _TEXTS},
        },
        "task": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                **_IMAGES,
                "pairs": _TEXT,
                "pair": {"enum": list(get_args(Pairing))},
                "metric": {"enum": list(metric_names())},
                "target": _CLASSES,
                "foil": _CLASSES,
                "to": _TEXT,
                "ablation": _ABLATION,
                "direction": {"enum": ["noising", "denoising"]},
                "groups": {"enum": ["kind"]},
            },
        },
        "alpha": _NUMBER,
        "seed": {"type": "integer", "minimum": 0},
        "hypotheses": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["claim", "expect"],
                "additionalProperties": False,
                "oneOf": [{"required": ["edges"]}, {"required": ["circuit"]}],
                "properties": {
                    "claim": _TEXT,
                    "edges": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]},
                    "circuit": _TEXT,
                    "keep": {"type": "boolean"},
                    "ablation": _ABLATION,
                    **_IMAGES,
                    "scope": {"enum": list(SCOPES)},
                    "verdict": {"enum": [SUPPORTED, REFUTED, UNDECIDED]},
                    "expect": {
                        "type": "object",
                        "additionalProperties": False,
                        "minProperties": 1,
                        "maxProperties": 1,
                        "properties": _EXPECT,
                    },
                },
            },
        },
    },
}


_INTERPRETATION: dict[str, Any] = {
    "type": "object",
    "required": ["schema", "circuit"],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": INTERPRETATION_SCHEMA},
        "circuit": {"anyOf": [_TEXT, {**_TEXTS, "minItems": 1}]},
        "claims": {"type": "object", "additionalProperties": _TEXT},
        "labels": _TEXT,
    },
}


def _load(path: Path, schema: str) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read the hypotheses {path}: {error.strerror or error}") from error
    if len(data) > LARGEST_FILE:
        raise FileError(f"{path} is {len(data):,} bytes: no file of hypotheses is that long")
    if b"&" in data and any(isinstance(token, yaml.AliasToken) for token in _tokens(path, data)):
        raise FileError(f"{path} refers to itself (a YAML alias, *name): write patterns in quotes")
    try:
        content = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        hint = " (a pattern that begins with * needs quotes)" if b"*" in data else ""
        raise FileError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}{hint}") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} does not begin with 'schema: {schema}': it is no list of names and values")
    return content


def _tokens(path: Path, data: bytes) -> list[Any]:
    try:
        return list(yaml.scan(data, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise FileError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error


def _task(said: Mapping[str, Any], folder: Path) -> Task | None:
    options = {key: said[key] for key in ("ablation", "direction", "groups", "pair") if key in said}
    metric = as_metric(
        said.get("metric", "logit_diff"),
        _classes(said.get("target")),
        _classes(said.get("foil")),
        folder / said["to"] if "to" in said else None,
    )
    if "pairs" in said:
        return Task.from_csv(folder / said["pairs"], metric, **options)
    if "clean" not in said:
        return None
    corrupt = folder / said["corrupt"] if "corrupt" in said else None
    return Task(folder / said["clean"], corrupt, metric, **options)


def _hypothesis(said: Mapping[str, Any], folder: Path) -> Hypothesis:
    edges: Any = Circuit.load(folder / said["circuit"]) if "circuit" in said else said["edges"]
    return Hypothesis(
        claim=said["claim"],
        edges=edges,
        expect=_expectation(said["expect"]),
        keep=said.get("keep", False),
        ablation=said.get("ablation"),
        clean=folder / said["clean"] if "clean" in said else None,
        corrupt=folder / said["corrupt"] if "corrupt" in said else None,
        scope=said.get("scope"),
    )


def _expectation(said: Mapping[str, Any]) -> Expectation:
    ((kind, value),) = said.items()
    match kind:
        case "falls_by":
            return Falls(float(value))
        case "rises_by":
            return Rises(float(value))
        case "changes_less_than":
            return Unchanged(float(value))
        case "flips":
            start = _classes(value.get("from"))
            to = _classes(value["to"])
            assert to is not None
            return Flips(to, start, float(value.get("share", 0.5)))
        case _:
            return BeatsRandom(int(value))


def _classes(said: Any) -> ClassSpec | None:
    return tuple(said) if isinstance(said, list) else said
