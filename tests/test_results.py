"""Every result is data: saved and loaded without a change, a table, and short to look at."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitvit.errors import FileError, OptionError
from circuitvit.graph.results import Result
from circuitvit.pruning import Curve, Finding
from circuitvit.verification.interventions import PatchingMap
from circuitvit.views import TunedLens
from tests.results import SPECIAL, Maker, result_kinds, same
from tests.views.test_reprs import assert_inert

KINDS = result_kinds()
every = pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])


def example(kind: type[Result], seed: int = 0, large: bool = False) -> Any:
    maker = Maker(seed, large)
    return SPECIAL[kind](maker) if kind in SPECIAL else maker.example(kind)


@every
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=4)
@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_what_is_loaded_is_what_was_saved(
    kind: type[Result], ending: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if kind is TunedLens:
        pytest.skip("is loaded with its model: tests/views/test_tuned_lens.py")
    if (kind.__name__, ending) == ("Report", "safetensors"):
        pytest.skip("a report is read, not computed with")
    made = example(kind, seed)
    path = tmp_path_factory.mktemp("results") / f"result.{ending}"
    assert made.save(path) == path
    found = kind.load(path)
    assert same(found, made)
    again = found.save(path.with_name(f"again.{ending}"))
    assert again.read_bytes() == path.read_bytes()


@every
def test_a_result_is_a_table_of_plain_values(kind: type[Result], tmp_path: Path) -> None:
    made = example(kind)
    rows = list(made.records())
    assert rows
    assert len({tuple(row) for row in rows}) == 1
    assert all(type(value) in (str, int, float, bool, type(None)) for row in rows for value in row.values())
    table = list(csv.DictReader(made.save(tmp_path / "table.csv").open(newline="")))
    assert [list(row) for row in table] == [list(row) for row in rows]
    assert all(
        text == ("" if value is None else str(value))
        for line, row in zip(table, rows, strict=True)
        for text, value in zip(line.values(), row.values(), strict=True)
    )


@every
def test_a_result_is_short_to_look_at(kind: type[Result]) -> None:
    made = example(kind, large=True)
    assert len(repr(made)) < 2500
    assert len(repr(made).splitlines()) < 30
    assert type(made).__name__ in repr(made)
    assert " at 0x" not in repr(made)
    html = made._repr_html_()
    assert_inert(html)
    assert len(re.sub('base64,[^"]*', "", html)) < 40_000


@every
def test_json_is_what_to_dict_says(kind: type[Result], tmp_path: Path) -> None:
    # these have a shorter form of their own
    own = {"DeciderHeads", "Registers", "EdgeScores", "NodeScores", "UnitScores"}
    if kind.__name__ not in own and kind is not TunedLens:
        said = json.loads(json.dumps(example(kind).to_dict(), allow_nan=False))
        assert json.loads(example(kind).save(tmp_path / "x.json").read_text()) == said
        assert said["schema"].startswith("circuitvit.")


# -- pandas --------------------------------------------------------------------------------------


def test_tables_of_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    made = example(Curve)
    stand_in = ModuleType("pandas")
    stand_in.DataFrame = lambda rows: ("frame", rows)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", stand_in)
    assert made.to_dataframe() == ("frame", list(made.records()))
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(OptionError, match="pip install pandas"):
        made.to_dataframe()


# -- files that are not what they should be ------------------------------------------------------


def change_of(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *path, last = place.split("/")
        for name in path:
            content = content[int(name) if isinstance(content, list) else name]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_of("schema", "circuitvit.finding/1"), "holds a 'Finding' .* not a 'PatchingMap'"),
        (change_of("schema", "circuitvit.patching_map/9"), "reads 'circuitvit.patching_map/1'"),
        (change_of("schema", None), "names no schema"),
        (lambda content: content.pop("base"), "'base' is a required property"),
        (change_of("site", "everything"), "site: expected one of 'heads'"),
        (change_of("label", 3), "label: expected text, found 3"),
        (change_of("label", "a\x1b[2Jb"), "label: .* has .* in it"),
        (change_of("rows", ["a"] * 1_000_000), "rows: 1000000 along 'row'|values"),
        (change_of("rows", "abc"), "rows: expected a list"),
        (change_of("tokens", [[[[]]]]), "tokens/0/0: expected a whole number"),
        (change_of("values/shape", [2, 10**18]), "do not make an array"),
        (change_of("values/shape", [-1, 2, 3]), "do not make an array"),
        (change_of("values/shape", [0, 10**30, 10**30]), "do not make|no array"),
        (change_of("values/dtype", "object"), "no list of 'object'"),
        (change_of("values/values", [[1.0]]), "no list of 'float64'"),
        (change_of("values/values", ["nan"] * 4), "do not make|NaN"),
        (change_of("base/values", [1, 1e999]), "not a JSON file"),
        (change_of("base", {"tensor": "base"}), "no tensor"),
        (change_of("tops/dtype", "float64"), "tops: numbers of float64"),
        (change_of("tops/dtype", "int8"), "tops: numbers of int8"),
        (change_of("base", {"dtype": "float64", "shape": [7], "values": [0.5] * 7}), "7 along 'pair'"),
    ],
)
def test_hostile_files_are_refused_by_place(change: Any, message: str, tmp_path: Path) -> None:
    made: PatchingMap = example(PatchingMap)
    content = made.to_dict()
    change(content)
    path = tmp_path / "map.json"
    path.write_text(json.dumps(content).replace("Infinity", "1e999"))
    with pytest.raises(FileError, match=message) as refused:
        PatchingMap.load(path)
    assert str(refused.value).startswith(str(path))


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text('{"schema": "circuitvit.patching_map/1", "rows": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(FileError, match=r"map\.json"):
        PatchingMap.load(path)


def test_numbers_that_numpy_does_not_have_are_refused(tmp_path: Path) -> None:
    path = example(PatchingMap).save(tmp_path / "map.safetensors")
    written = path.read_bytes()
    header = int.from_bytes(written[:8], "little")
    said = json.loads(written[8 : 8 + header])
    start, end = said["base"]["data_offsets"]
    for dtype in ("F8_E4M3", "F8_E8M0"):
        said["base"] |= {"dtype": dtype, "shape": [end - start]}
        text = json.dumps(said).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + written[8 + header :])
        with pytest.raises(FileError, match=r"map\.safetensors"):
            PatchingMap.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"saved as \.json, \.safetensors or \.csv"):
        example(Curve).save(tmp_path / "curve.pkl")
    with pytest.raises(FileError, match="there is no folder"):
        example(Curve).save(tmp_path / "missing" / "curve.json")
    for name in ("curve.pkl", "curve.json", "curve.safetensors"):
        with pytest.raises(FileError, match="curve"):
            Curve.load(tmp_path / name)
    (tmp_path / "curve.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(FileError, match="cannot read"):
        Curve.load(tmp_path / "curve.safetensors")
    finding = example(Finding).save(tmp_path / "finding.safetensors")
    with pytest.raises(FileError, match=r"holds a 'Finding' .* not a 'Curve'"):
        Curve.load(finding)


def test_numbers_that_should_be_finite_are_not_written(tmp_path: Path) -> None:
    made: PatchingMap = example(PatchingMap)
    made.values[0, 0, 0] = np.nan
    for ending in ("json", "safetensors"):
        with pytest.raises(FileError, match="values holds NaN"):
            made.save(tmp_path / f"map.{ending}")


def test_names_that_hide_something_are_shown_when_they_are_saved(tmp_path: Path) -> None:
    path = Curve("a\x1b\u202eb", (), 3).save(tmp_path / "curve.json")
    assert Curve.load(path).label == "a\ufffd\ufffdb"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("FlipSearch", change_of("start", []), "no class to start from"),
        ("Comparison", change_of("curves/0/curve/points", []), "a curve has no points"),
        ("Comparison", change_of("curves/0/curve/points/0/fraction", 0), "curves/0/curve: sizes are shares"),
        ("Ranking", change_of("quantiles", [[0.5, 1.0]]), "the quantiles of .* lack"),
        ("Equivariance", change_of("groups/a3", [0, 2**62, 1]), "matches of 'a3' are not those"),
    ],
)
def test_what_could_not_be_shown_is_not_read(kind: str, change: Any, message: str, tmp_path: Path) -> None:
    (found,) = (each for each in KINDS if each.__name__ == kind)
    path = example(found).save(tmp_path / "result.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match=message):
        found.load(path)
