"""An audit of a compiled model whose answer is known: one head has the cue, another what should decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import circuitvit as cv
from circuitvit.errors import CircuitViTError, DataError, FileError, OptionError, UnsupportedModelError
from circuitvit.export import draw_audit
from circuitvit.groundtruth import compiler, programs
from circuitvit.models import zoo
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks.grouped import grouped_images
from circuitvit.tasks.inputs import fingerprint
from circuitvit.tasks.split import split_together
from circuitvit.verification import Audit
from circuitvit.verification.group_accuracy import fingerprints, worst
from circuitvit.verification.statistics import Estimate, share_of_means

METRIC = cv.logit_diff("yes", "no")

CUE = ["input->a0.h1<v>", "a0.h1->logits"]
"""The shape of the marked patch: three times the weight of its colour, which should decide."""

PROGRAM = replace(compiler._program("factors", []), readout={"cue-coloured": 1.0, "cue-round": 3.0}, bias=0.0)


@cache
def model() -> cv.Model:
    channels = len(PROGRAM.pixels)
    spec = zoo.InputSpec((channels, 6, 6), (0.5,) * channels, (0.5,) * channels, "nearest")
    return cv.wrap(
        compiler.assemble(PROGRAM, 0).float(), name="planted", classes=("yes", "no"), preprocessing=spec
    )


def pairs(change: str, n: int = 12, seed: int = 0) -> cv.Task:
    clean, corrupt = programs.draw(PROGRAM.scenes, change, n, seed)
    return cv.Task(programs.images_of(clean), programs.images_of(corrupt), metric=METRIC)


@cache
def groups() -> dict[str, dict[str, torch.Tensor]]:
    """By whether the shape agrees with the colour: images that the colour makes a yes or a no."""
    grids, changed = programs.vary(PROGRAM.scenes, 80, 5)
    images, found = programs.images_of(grids), {}
    for name, agree in (("agrees", True), ("disagrees", False)):
        rows = (changed["colour"] == changed["shape"]) == agree
        found[name] = {"yes": images[rows & ~changed["colour"]], "no": images[rows & changed["colour"]]}
    return found


@cache
def audited() -> Audit:
    return cv.audit_cue(
        model(), pairs("shape"), pairs("colour", 14, 1), groups(), name="the shape", within="5s",
        elsewhere={"colours": pairs("colour", 6, 2), "all of them": groups()["agrees"]},
        date="22 November 2026", progress=False,
    )  # fmt: skip


def test_it_finds_the_planted_share_and_the_planted_edges() -> None:
    found = audited()
    assert found.verdict == "carries"
    assert found.share is not None
    assert found.share.value == pytest.approx(0.75, abs=1e-4)  # weights of 3 and 1
    assert found.circuit is not None
    assert found.ablated is not None
    assert list(found.circuit) == list(found.ablated) == CUE
    assert list(found.certified) == CUE
    assert found.confirmed
    assert found.flips.value == 1
    assert found.specificity is not None
    assert set(found.specificity.specific) == {"the shape", "the behaviour"}


def test_without_the_cue_the_groups_where_it_misleads_are_right() -> None:
    found = audited()
    before = {each.name: each.before.value for each in found.groups}
    assert before == {"agrees, yes": 1, "agrees, no": 1, "disagrees, yes": 0, "disagrees, no": 0}
    assert all(each.after is not None and each.after.value == 1 for each in found.groups)
    assert found.worst_before[1].value == 0
    assert [each.name for each in found.elsewhere] == ["all of them"]
    lost = {each.name: each.share.value for each in found.lost}
    assert lost == pytest.approx(
        {"the shape": 1, "the behaviour": 0, "colours": 0}, abs=0.01
    )  # the heads are soft
    assert "worst group (disagrees" in str(found)


def test_pairs_that_change_both_give_the_same_share() -> None:
    cue, alone = pairs("shape", 6), pairs("colour", 6)
    assert torch.equal(cue.clean, alone.clean)  # type: ignore[arg-type]
    # shape and colour are channels of their own, so that both changes can be made to one image
    both = torch.where(cue.corrupt != cue.clean, cue.corrupt, alone.corrupt)  # type: ignore[arg-type, call-overload]
    known = {"cue": CUE, "behaviour": ["input->a0.h0<v>", "a0.h0->logits"]}
    found = cv.audit_cue(
        model(), cue, alone.with_options(corrupt=both), groups(), together=True, circuits=known,
        progress=False,
    )  # fmt: skip
    assert found.share is not None
    assert found.share.value == pytest.approx(0.75, abs=1e-4)
    assert found.ablated is not None
    assert list(found.ablated) == CUE
    assert "were given" in " ".join(found.caveats)


def test_a_cue_that_does_nothing_is_said_to_carry_nothing_and_too_few_pairs_are_not() -> None:
    both, at = pairs("shape"), PROGRAM.pixels.index("bait")  # which moves with every change; nobody reads it
    moved = both.clean.clone()  # type: ignore[union-attr]
    moved[:, at] = both.corrupt[:, at]  # type: ignore[index]
    found = cv.audit_cue(
        model(), both.with_options(corrupt=moved), pairs("colour", 12, 1), groups(), progress=False
    )
    assert found.verdict == "hardly any"
    assert found.circuit is None
    assert all(each.after is None for each in found.groups)
    known = {"cue": CUE, "behaviour": CUE}
    few = cv.audit_cue(model(), pairs("shape", 4), pairs("colour"), groups(), circuits=known, progress=False)
    assert few.verdict == "cannot tell"
    assert "5 pairs" in few.reason


def test_no_image_is_used_to_find_and_to_report() -> None:
    """Half of the cue's images are put among the groups: those that circuits are found on are left out."""
    cue, clean = pairs("shape", 12), pairs("shape", 12).clean
    mixed = {**groups(), "again": {"yes": clean}}  # type: ignore[dict-item]
    found = cv.audit_cue(model(), cue, pairs("colour", 12), mixed, within="2s", progress=False)
    again = next(each for each in found.groups if each.name == "again")
    assert again.n == 6
    assert "6 images of the groups took part" in " ".join(found.caveats)


def test_tasks_that_share_images_are_divided_together() -> None:
    tasks = {"one": pairs("shape", 9), "other": pairs("colour", 9)}  # the same clean images
    halves = split_together(model(), tasks, 0.5)
    sides = [fingerprints(*(half[side] for half in halves.values())) for side in (0, 1)]
    assert not sides[0] & sides[1]
    assert all(len(half.held_out) == 4 for half in halves.values())
    one = cv.split(model(), tasks["one"], 0.5)
    alone = split_together(model(), {"one": tasks["one"]}, 0.5)["one"]
    assert one.held_out.clean.names == alone.held_out.clean.names
    with pytest.raises(DataError, match="of other"):
        split_together(model(), {"one": pairs("shape", 9), "other": pairs("colour", 1)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"behaviour": pairs("colour").with_options(metric="logit")}, "same metric"),
        ({"cue": pairs("shape").with_options(ablation="zero")}, "'patch'"),
        ({"cue": pairs("shape").with_options(groups="kind")}, "groups of tokens"),
        ({"circuits": {"cue": CUE}}, "'cue' and 'behaviour'"),
        ({"name": "the behaviour"}, "name of its own"),
        ({"name": None}, "name of its own"),
        ({"name": "size", "elsewhere": {"size": pairs("shape")}}, "elsewhere has 'size'"),
        ({"elsewhere": {"the behaviour": pairs("shape")}}, "elsewhere has 'the behaviour'"),
        ({"circuits": (None, None)}, "'cue' and 'behaviour', by name, not tuple"),
        ({"elsewhere": [pairs("shape")]}, "elsewhere takes tasks or images by name, not list"),
        (dict.fromkeys(("cue", "behaviour"), pairs("shape").with_options(metric="kl_divergence")), "add up"),
        ({"groups": {"a": {"maybe": torch.zeros(1, len(PROGRAM.pixels), 6, 6)}}}, "maybe"),
        ({"groups": {}}, "groups are"),
        ({"groups": "nowhere"}, "no folder nowhere"),
        ({"least": 1.5}, "least share"),
        (
            {"elsewhere": {"more": cv.Task(pairs("shape").clean, metric=METRIC, ablation="zero")}},
            "task more needs pairs",
        ),
    ],
)
def test_what_cannot_be_audited_is_refused_by_name(change: dict[str, object], said: str) -> None:
    given = {"cue": pairs("shape"), "behaviour": pairs("colour"), "groups": groups(), **change}
    with pytest.raises(CircuitViTError, match=said):
        cv.audit_cue(model(), progress=False, **given)  # type: ignore[arg-type]


def test_a_model_without_classes_is_refused() -> None:
    small = {"img_size": 32, "depth": 1, "num_classes": 0}
    plain = cv.wrap(import_timm().create_model("vit_tiny_patch16_224", **small).eval())
    with pytest.raises(UnsupportedModelError, match="with_head"):
        cv.audit_cue(plain, pairs("shape"), pairs("colour"), groups())


# -- the statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["apart", "paired", "within"])
def test_intervals_of_a_share_hold_it_as_often_as_they_say(draw: str) -> None:
    rng, hits, n = np.random.default_rng(0), 0, 12
    for _ in range(400):
        common = rng.normal(size=n)
        part = 2 + 0.8 * common + 0.5 * rng.normal(size=n)
        rest = {"apart": 1 + rng.normal(size=20), "paired": 1 + common + 0.3 * rng.normal(size=n),
                "within": 4 - common + 0.3 * rng.normal(size=n)}[draw]  # fmt: skip
        clusters = None if draw == "apart" else (np.arange(n), np.arange(n))
        found = share_of_means(part, rest, clusters, within=draw == "within")
        hits += _holds(found, 0.5 if draw == "within" else 2 / 3)
    assert 0.92 <= hits / 400 <= 0.98


def test_pairs_that_hang_together_count_once() -> None:
    part, rest = np.array([1.0, 2, 3, 4, 5, 6]), np.full(6, 2.0)
    once = share_of_means(part, rest, (np.arange(6), np.arange(6)))
    twice = share_of_means(np.repeat(part, 2), np.repeat(rest, 2), (np.arange(12) // 2, np.arange(12) // 2))
    assert twice.low == pytest.approx(once.low)
    assert twice.high == pytest.approx(once.high)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="not distinguishable from 0"):
        share_of_means([1.0, -1, 2, -2, 0.5, -0.5], [1.0, -1, 2, -2, 0.5, -0.5])


def test_the_worst_group_is_judged_for_all_groups_at_once() -> None:
    """Of four groups that are all right 70 % of the time the lowest looks worse; its interval holds that."""
    held = alone = 0.0
    for lowest in range(21):
        chance = stats.binom.sf(lowest - 1, 20, 0.7) ** 4 - stats.binom.sf(lowest, 20, 0.7) ** 4
        rows = [(str(at), 20, Estimate((20 if at else lowest) / 20)) for at in range(4)]
        found, own = worst(rows)[1], worst(rows[:1])[1]
        held += chance * _holds(found, 0.7)
        alone += chance * _holds(own, 0.7)
    assert alone < 0.95 <= held


def _holds(found: Estimate, truth: float) -> bool:
    return found.low is not None and found.high is not None and found.low <= truth <= found.high


# -- images in groups --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`groups/grass/cat`, `groups/grass/dog` and `groups/snow/cat`, and a table of the same."""
    lines = ["image,group,class"]
    for at, place in enumerate(("grass/cat", "grass/dog", "snow/cat")):
        (tmp_path / "groups" / place).mkdir(parents=True)
        Image.new("RGB", (8, 8), (at, 0, 0)).save(tmp_path / "groups" / place / "a.png")
        lines.append(f"groups/{place}/a.png,{place.replace('/', ',')}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    return tmp_path


def test_groups_are_read_from_folders_and_tables_alike(folder: Path) -> None:
    spec = zoo.InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    one, other = (grouped_images(folder / name, spec) for name in ("groups", "table.csv"))
    assert one.cells == other.cells == (("grass", "cat"), ("grass", "dog"), ("snow", "cat"))
    assert [fingerprint(one.images.take(row, row + 1)) for row in range(3)] == [
        fingerprint(other.images.take(row, row + 1)) for row in range(3)
    ]


def _empty(folder: Path) -> Path:
    (folder / "groups" / "empty").mkdir()
    return folder / "groups"


def _table(*lines: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "table.csv").write_text("\n".join(lines))
        return folder / "table.csv"

    return write


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (_empty, DataError, "no subfolders to name the classes"),
        (lambda folder: folder / "groups" / "grass" / "cat", DataError, "no subfolders to name the groups"),
        (_table("image,class", "a.png,cat"), FileError, "no column 'group'"),
        (_table("image,group,class", "a.png,grass"), DataError, "line 2: no class"),
        (_table("image,group,class", "gone.png,grass,cat"), DataError, "line 2: there is no image"),
        (_table("image,group,class"), DataError, "lists no images"),
    ],
)
def test_groups_that_cannot_be_read_are_refused(
    folder: Path, spoil: Callable[[Path], Path], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        grouped_images(spoil(folder), zoo.InputSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3))


# -- what is written ---------------------------------------------------------------------------------


def test_the_page_says_what_was_found_and_asks_for_nothing(tmp_path: Path) -> None:
    found = replace(audited(), name="<script>the shape</script>", caveats=("<b>bold</b>",))
    page = draw_audit(found, tmp_path / "audit.html").read_text()
    assert "75 % (75 to 75)" in page
    assert found.provenance.weights in page
    assert "22 November 2026" in page
    assert "a0.h1-&gt;logits" in page
    assert "<script" not in page
    assert "<b>bold" not in page
    assert "http" not in page.replace("http-equiv", "")
    with pytest.raises(OptionError, match=r"\.html"):
        draw_audit(found, tmp_path / "audit.pdf")


def test_it_comes_back_from_a_file(tmp_path: Path) -> None:
    found = audited()
    again = Audit.load(found.save(tmp_path / "audit.json"))
    assert again.to_markdown() == found.to_markdown()
    text = found.save(tmp_path / "audit.md").read_text()
    assert text.startswith("# Audit of planted: the shape carries 75 %")
    assert len(list(again.records())) == 5
    assert found.figure().save(tmp_path / "audit.svg").stat().st_size > 1000
