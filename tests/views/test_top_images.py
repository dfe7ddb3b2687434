"""Top images: what is planted is found, in order, whatever the batches; the page is inert and whole."""

from __future__ import annotations

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import circuitvit as cv
from circuitvit.cli.inside import view
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import CircuitViTError, DataError, NameNotFoundError, OptionError
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.corruptions import read_mask
from circuitvit.views.ranking import Extremes
from tests.export.browsing import browser, needs_browser

HEAD = "a2.h3"  # most heads of this model write nothing


@cache
def catdog() -> cv.Model:
    return cv.load("catdog-tiny")


@cache
def animals() -> torch.Tensor:
    return catdog_pairs(11, seed=0).clean


@cache
def planted() -> cv.Model:
    """Coordinate 2 of the embedding is the mean brightness of a patch, and neuron 1 is that, rectified."""
    module = import_timm().models.VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, embed_dim=8, depth=1, num_heads=2, mlp_ratio=1, num_classes=3
    )
    module = module.eval()
    with torch.no_grad():
        module.patch_embed.proj.weight.zero_()
        module.patch_embed.proj.bias.zero_()
        module.patch_embed.proj.weight[2] = 1 / 16
        module.pos_embed.zero_()
    spec = InputSpec((1, 16, 16), mean=(0.0,), std=(1.0,))
    return cv.wrap(module, name="planted", preprocessing=spec)


def bright(values: np.ndarray) -> torch.Tensor:
    """Images `(image, 1, 16, 16)` whose patches have these brightnesses `(image, 4, 4)`."""
    patches = torch.from_numpy(values.astype(np.float32))
    return patches.repeat_interleave(4, -1).repeat_interleave(4, -2)[:, None]


def values_of(found: cv.views.TopImages, unit: str, row: str | float = "top") -> list[float]:
    return found.picks(unit, row).values.tolist()


# -- planted truths ------------------------------------------------------------------------------


def test_nodes_of_a_refined_model_are_ranked_by_their_activation() -> None:
    """Neuron 1 writes nothing to look at but itself: a length would have no sign."""
    images = bright(np.random.default_rng(0).normal(size=(6, 4, 4)))
    fine = cv.refine_nodes(planted(), {"m0": cv.neurons([1])})
    node, neuron = (
        cv.top_images(model, images, unit, count=3, progress=False)[unit]
        for model, unit in ((fine, "m0.n1"), (planted(), "m0.hidden[1]"))
    )
    assert node.measure == neuron.measure == "activation"
    assert np.allclose(node.values, neuron.values, atol=1e-5)
    assert node.rows["top"].images.tolist() == neuron.rows["top"].images.tolist()
    assert np.allclose(node.rows["top"].maps, neuron.rows["top"].maps, atol=1e-5)


def test_the_brightest_patches_are_the_top_ones() -> None:
    values = np.zeros((5, 4, 4))
    values[3, 1, 2], values[0, 3, 3], values[4, 0, 0], values[1, 2, 2] = 8, 4, 2, -1
    unit = "resid0[2]"
    found = cv.top_images(planted(), bright(values), unit, count=3, batch_size=2)
    assert found.names(unit) == ["image 3", "image 0", "image 4"]
    top = found.picks(unit)
    assert values_of(found, unit) == [8, 4, 2]
    assert top.tokens.tolist() == [1 + 6, 1 + 15, 1]
    assert top.maps is not None
    np.testing.assert_allclose(top.maps, values[[3, 0, 4]])
    np.testing.assert_allclose(found[unit].values, [4, 0, 0, 8, 2])
    by_patch = cv.top_images(planted(), bright(values), unit, by="patch", count=3)
    assert by_patch.names(unit) == ["image 3, patch (1, 2)", "image 0, patch (3, 3)", "image 4, patch (0, 0)"]
    assert by_patch.names(unit, "bottom")[0] == "image 1, patch (2, 2)"
    assert by_patch[unit].quantiles[0.0] == -1
    assert by_patch[unit].counts.sum() == 5 * 16


def test_a_direction_is_a_product_and_may_have_a_name() -> None:
    values = np.arange(6.0)[:, None, None] * np.ones((1, 4, 4))
    direction = torch.zeros(8)
    direction[2] = -2
    found = cv.top_images(
        planted(), bright(values), {"dark": ("resid0", direction), "light": "resid0[2]"}, count=2
    )
    assert list(found) == ["dark", "light"]
    assert found.names("dark") == found.names("light", "bottom") == ["image 0", "image 1"]
    np.testing.assert_allclose(found["dark"].values, -2 * found["light"].values)
    assert found["dark"].measure == "product with the direction"


def test_ties_keep_the_order_of_the_images_and_are_told() -> None:
    values = np.zeros((7, 4, 4))
    values[[2, 5]] = 1
    found = cv.top_images(planted(), bright(values), "resid0[2]", count=3, batch_size=3)
    assert found.names("resid0[2]") == ["image 2", "image 5", "image 0"]
    assert found.names("resid0[2]", "bottom") == ["image 0", "image 1", "image 3"]
    assert found.picks("resid0[2]").tokens.tolist() == [1, 1, 1]  # of equal patches the first
    assert "4 more have the value of the last of the top" in found["resid0[2]"].caveats
    flat = cv.top_images(planted(), bright(np.zeros((3, 4, 4))), "resid0[2]")
    assert flat["resid0[2]"].caveats == ("all values are equal, so that the order is that of the images",)


def test_quantiles_pick_what_lies_there() -> None:
    values = np.arange(21.0)[::-1, None, None] * np.ones((1, 4, 4))
    found = cv.top_images(planted(), bright(values), "resid0[2]", rows=(0.5, 0, 1, 0.9), count=3)
    rows = {row: values_of(found, "resid0[2]", row) for row in (0.5, 0, 1, 0.9)}
    assert rows == {0.5: [11, 10, 9], 0: [2, 1, 0], 1: [20, 19, 18], 0.9: [19, 18, 17]}
    assert found["resid0[2]"].quantiles[0.5] == 10


def test_objects_under_the_top_patches() -> None:
    """Of 12 images each, the bright patches are the upper half's: 3 of 4 at the top against half of all."""
    values = np.random.default_rng(0).random((12, 4, 4))
    values[:, 0] += 10  # the first row of four lies on the object
    values[:, 3, 0] += 10  # and one patch that does not
    mask = torch.zeros(12, 16, 16, dtype=torch.bool)
    mask[:, :8] = True
    found = cv.top_images(planted(), bright(values), "resid0[2]", masks={"sky": mask}, top_share=60 / 192)
    sky, rest = found["resid0[2]"].lifts
    assert (sky.object, sky.top, sky.all, sky.lift.value) == ("sky", 0.8, 0.5, 1.6)
    assert (rest.object, rest.top, rest.lift.value) == ("patch", pytest.approx(0.2), pytest.approx(0.4))
    assert not found["resid0[2]"].caveats
    few = cv.top_images(planted(), bright(values), "resid0[2]", masks={"sky": mask}, top_share=0.01)
    assert "the top patches come from 2 of 12 images" in few["resid0[2]"].caveats
    assert few["resid0[2]"].lifts[1].lift.low is None or few["resid0[2]"].lifts[1].top > 0


# -- against the literal computation -------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["max", "mean", "cls"])
@pytest.mark.parametrize("unit", [HEAD, "m0.hidden[3]", "a2.h1.pattern", "resid1[0]", "a2.h3.z", "m1.hidden"])
def test_values_are_those_of_activations(unit: str, reduce: str) -> None:
    found = cv.top_images(catdog(), animals(), unit, reduce=reduce, count=4, batch_size=3)  # type: ignore[arg-type]
    name, _, number = unit.partition("[")
    read = catdog().activations(animals(), name)[name]
    if number:
        by_token = read[..., int(number[:-1])]
    else:
        by_token = read[:, 0] if name.endswith("pattern") else (read**2).sum(dim=-1).sqrt()
    patches = by_token[:, 1:]
    expected = {"max": patches.max(dim=1).values, "mean": patches.mean(dim=1), "cls": by_token[:, 0]}[reduce]
    np.testing.assert_allclose(found[unit].values, expected, atol=1e-5)
    order = np.argsort(-found[unit].values, kind="stable")
    picks = found.picks(unit)
    assert picks.images.tolist() == order[:4].tolist()
    assert picks.maps is not None
    np.testing.assert_allclose(picks.maps, patches[order[:4]].reshape(4, 6, 6), atol=1e-5)
    by_patch = cv.top_images(catdog(), animals(), unit, by="patch", count=9, batch_size=4)
    np.testing.assert_allclose(
        by_patch.picks(unit, "bottom").values, np.sort(patches.flatten().numpy())[:9], atol=1e-5
    )


def test_tokens_are_named_as_everywhere() -> None:
    units = [
        "m0.hidden[3]@cls",
        "m0.hidden[3]@patch(2,3)",
        "a2.h1.pattern@patch(2,3)->cls",
        "a2.h1.scores@cls+patch",
    ]
    found = cv.top_images(catdog(), animals(), units)
    hidden = catdog().activations(animals(), "m0.hidden")["m0.hidden"][..., 3]
    place = 1 + 2 * 6 + 3
    np.testing.assert_allclose(found[units[0]].values, hidden[:, 0], atol=1e-5)
    np.testing.assert_allclose(found[units[1]].values, hidden[:, place], atol=1e-5)
    pattern = catdog().activations(animals(), "a2.h1.pattern")["a2.h1.pattern"]
    np.testing.assert_allclose(found[units[2]].values, pattern[:, 0, place], atol=1e-6)
    scores = catdog().activations(animals(), "a2.h1.scores")["a2.h1.scores"]
    np.testing.assert_allclose(found[units[3]].values, scores.mean(1)[:, 1:].max(1).values, atol=1e-5)


def test_logits_have_no_patches() -> None:
    found = cv.top_images(catdog(), animals(), "logits[1]", count=3)
    np.testing.assert_allclose(found["logits[1]"].values, catdog()(animals())[:, 1], atol=1e-5)
    assert found.picks("logits[1]").maps is None
    assert 'class="map"' not in found.to_html()
    with pytest.raises(OptionError, match="no value at patches"):
        cv.top_images(catdog(), animals(), "logits[1]", by="patch")


def test_attention_of_the_token_lies_over_images() -> None:
    pattern = catdog().activations(animals(), f"{HEAD}.pattern")[f"{HEAD}.pattern"]
    for reduce in ("cls", "max", "mean"):
        found = cv.top_images(catdog(), animals(), HEAD, reduce=reduce, overlay="attention", count=2)  # type: ignore[arg-type]
        picks = found.picks(HEAD)
        assert picks.maps is not None
        for image, token, shown in zip(picks.images, picks.tokens, picks.maps, strict=True):
            row = pattern[image].mean(0) if reduce == "mean" else pattern[image, token]
            np.testing.assert_allclose(shown, row[1:].reshape(6, 6), atol=1e-6)
        assert found[HEAD].overlay == f"{HEAD}.pattern"
    with pytest.raises(OptionError, match="m0 has no attention"):
        cv.top_images(catdog(), animals(), "m0", overlay="attention")


def test_several_units_are_what_each_is_alone_and_globs_expand() -> None:
    units = [HEAD, "m0.hidden[3]", "logits[0]"]
    together = cv.top_images(catdog(), animals(), units, count=3)
    for unit in units:
        alone = cv.top_images(catdog(), animals(), unit, count=3)
        assert together.names(unit) == alone.names(unit)
        assert together.names(unit, "random") == alone.names(unit, "random")
        np.testing.assert_array_equal(together[unit].values, alone[unit].values)
    assert list(cv.top_images(catdog(), animals(), "a*.h0", count=1)) == [
        f"a{layer}.h0" for layer in range(4)
    ]


def test_neither_batches_nor_the_seed_change_what_is_not_random() -> None:
    one = cv.top_images(catdog(), animals(), "m0.hidden[3]", by="patch", batch_size=1)
    other = cv.top_images(catdog(), animals(), "m0.hidden[3]", by="patch", batch_size=7, seed=1)
    for row in ("top", "bottom", 0.5):
        assert one.names("m0.hidden[3]", row) == other.names("m0.hidden[3]", row)
    assert one.names("m0.hidden[3]", "random") != other.names("m0.hidden[3]", "random")


def test_of_many_patches_a_sample_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = cv.top_images(catdog(), animals(), "m0.hidden[3]", by="patch")["m0.hidden[3]"]
    monkeypatch.setattr("circuitvit.views.ranking.SAMPLE", 100)
    found = [
        cv.top_images(catdog(), animals(), "m0.hidden[3]", by="patch", batch_size=size) for size in (2, 11)
    ]
    one, other = (each["m0.hidden[3]"] for each in found)
    assert one.counts.sum() == 100
    assert one.quantiles == pytest.approx(other.quantiles, abs=1e-5)
    assert (one.quantiles[0.0], one.quantiles[1.0]) == pytest.approx(
        (exact.quantiles[0.0], exact.quantiles[1.0])
    )
    assert found[0].names("m0.hidden[3]") == found[1].names("m0.hidden[3]")
    assert found[0].names("m0.hidden[3]", 0.5) == found[1].names("m0.hidden[3]", 0.5)


@given(
    st.lists(st.lists(st.integers(-3, 3), max_size=6), min_size=1, max_size=6),
    st.integers(1, 8),
    st.booleans(),
)
def test_extremes_are_those_of_all(batches: list[list[int]], count: int, largest: bool) -> None:
    kept, first = Extremes(count, largest), 0
    for batch in batches:
        kept.add(np.array(batch, dtype=np.float32), first)
        first += len(batch)
    every = [value for batch in batches for value in batch]
    places = sorted(range(len(every)), key=lambda place: (-every[place] if largest else every[place], place))
    assert kept.places.tolist() == places[:count]
    assert kept.values.tolist() == [every[place] for place in places[:count]]


# -- models --------------------------------------------------------------------------------------


def test_edits_are_honoured_also_those_made_for_all_images() -> None:
    silent = cv.top_images(catdog().edit({HEAD: 0}), animals(), HEAD)
    assert not silent[HEAD].values.any()
    per_image = torch.arange(11.0)[:, None, None].expand(11, 37, 64)
    edited = catdog().edit({"resid1": per_image})
    found = cv.top_images(edited, animals(), "resid1[5]", count=3, rows=("top",))
    assert found.names("resid1[5]") == ["image 10", "image 9", "image 8"]
    picks = found.picks("resid1[5]")
    assert picks.maps is not None
    assert (picks.maps[0] == 10).all()


def test_a_model_without_a_class_token_and_one_that_pools() -> None:
    module = import_timm().models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=2, class_token=False,
        global_pool="map",
    )  # fmt: skip
    model = cv.wrap(
        module.eval(), name="pooled", preprocessing=InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    )
    images = torch.randn(4, 3, 32, 32, generator=torch.manual_seed(0))
    found = cv.top_images(model, images, ["a0.h0", "pool.h0.pattern", "pool.h0"], count=2)
    read = model.activations(images, ["pool.h0", "pool.h0.pattern"])
    np.testing.assert_allclose(found["pool.h0"].values, read["pool.h0"].norm(dim=-1).max(1).values, atol=1e-5)
    np.testing.assert_allclose(
        found["pool.h0.pattern"].values, read["pool.h0.pattern"].mean(1).max(1).values, atol=1e-5
    )
    assert found.picks("pool.h0").maps is None
    assert found.picks("pool.h0.pattern").maps is not None
    seen = cv.top_images(model, images, "pool.h0", overlay="attention", count=2).picks("pool.h0")
    assert seen.maps is not None
    assert seen.tokens.tolist() == [-1, -1]
    with pytest.raises(OptionError, match="no tokens are called 'cls'"):
        cv.top_images(model, images, "a0.h0", reduce="cls")


# -- what cannot be done -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "options", "error", "said"),
    [
        ("a0.h9", {}, NameNotFoundError, "a0.h"),
        ("m0.hidden[128]", {}, OptionError, r"no m0\.hidden\[128\]: there are 128"),
        ("a2.h1.pattern[3]", {}, OptionError, "entries are named"),
        ("m0.hidden[3]@dog", {}, OptionError, "no tokens are called 'dog'"),
        ("m0@patch->cls", {}, OptionError, "has no keys"),
        ("logits", {}, OptionError, r"logits\[281\]"),
        ([], {}, OptionError, "no units"),
        (("resid1", torch.zeros(3)), {}, OptionError, "64 finite numbers"),
        (("a2.h1.pattern", torch.zeros(37)), {}, OptionError, "a direction is for"),
        ([("resid1", torch.ones(64)), ("resid1", torch.zeros(64))], {}, OptionError, "give names"),
        ({"all": "a*.h0"}, {}, OptionError, "several units"),
        ("m0", {"by": "row"}, NameNotFoundError, "way to rank"),
        ("m0", {"reduce": "min"}, NameNotFoundError, "way to reduce"),
        ("m0", {"overlay": "none"}, NameNotFoundError, "overlay"),
        ("m0", {"rows": ("best",)}, NameNotFoundError, "row"),
        ("m0", {"rows": (1.5,)}, OptionError, "between 0 and 1"),
        ("m0", {"rows": ()}, OptionError, "rows are"),
        ("m0", {"count": 0}, OptionError, "count"),
        ("m0", {"top_share": 2}, OptionError, "top_share"),
        ("m0@cls", {"by": "patch"}, OptionError, "name no tokens"),
        ("m0", {"masks": {"dog": torch.ones(3, 48, 48, dtype=torch.bool)}}, DataError, "3 images for 11"),
        (
            "logits[0]",
            {"masks": {"dog": torch.ones(48, 48, dtype=torch.bool)}},
            OptionError,
            "no value at patches",
        ),
    ],
)
def test_refusals(units: object, options: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        cv.top_images(catdog(), animals(), units, **options)  # type: ignore[arg-type]


def test_rows_and_units_that_are_not_there() -> None:
    found = cv.top_images(catdog(), animals(), HEAD, rows=("top",))
    with pytest.raises(NameNotFoundError, match="unknown row 'bottom'"):
        found.names(HEAD, "bottom")
    with pytest.raises(NameNotFoundError, match="unknown unit"):
        found["a0.h3"]


# -- pictures ------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=alert(1)>&\"'.png"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for place, picture in enumerate(catdog_pairs(6, seed=0, preprocessed=False).clean):
        pixels = (picture * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / (HOSTILE if place == 3 else f"{place}.png"))
    return folder


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_is_whole_inert_and_the_same_each_time(photos: Path, tmp_path: Path) -> None:
    found = cv.top_images(catdog(), photos, [HEAD, "m0.hidden[3]"], count=6, rows=("top", 0.5))
    assert HOSTILE in found.names(HEAD)
    page = found.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page == found.to_html()
    tags = Tags(page).found
    assert not {tag for tag, _ in tags} & {"script", "img", "iframe", "link", "object"}
    assert all((own.get("href") or "#").startswith(("#", "data:image/")) for _, own in tags)
    assert not [name for _, own in tags for name in own if name.startswith("on")]
    assert "onerror=alert(1)&gt;" in page
    assert len(re.findall(r'<image id="p\d+"', page)) == 6  # each photograph once, however often it is shown
    assert page.count("<use ") == 2 * 2 * 6


def test_by_patch_the_page_shows_surroundings_within_the_image() -> None:
    values = np.zeros((2, 4, 4))
    values[0, 0, 0], values[1, 3, 2] = 2, 1
    found = cv.top_images(planted(), bright(values), "resid0[2]", by="patch", count=2, rows=("top",))
    assert 'viewBox="0 0 4 4"' in found.to_html()
    wide = cv.top_images(catdog(), animals(), "m0.hidden[3]", by="patch", rows=("top",))
    boxes = re.findall(r'viewBox="(\d) (\d) 5 5"', wide.to_html())
    assert len(boxes) == 12
    assert {int(side) for box in boxes for side in box} <= {0, 1}


def test_fifty_images_make_a_small_page() -> None:
    noise = torch.rand(50, 3, 48, 48, generator=torch.manual_seed(0))
    found = cv.top_images(catdog(), noise, "m0", count=50, rows=("top",))
    assert len(found.to_html()) < 1_000_000


def test_figures(tmp_path: Path) -> None:
    found = cv.top_images(catdog(), animals(), [HEAD, "logits[0]"], count=3)
    assert len(found.figure().axes) == 2 * 3
    assert len(found.figure(HEAD, picture=False).axes) == 4 * 3
    by_patch = cv.top_images(catdog(), animals(), HEAD, by="patch", count=3)
    assert by_patch.figure().save(tmp_path / "top.png").stat().st_size > 1000
    with pytest.raises(NameNotFoundError, match="unknown unit"):
        found.figure("a0.h9")


def test_reprs_are_short() -> None:
    found = cv.top_images(catdog(), animals(), HEAD)
    assert repr(found).startswith("TopImages of catdog-tiny, by image, max, 11 images\n  Ranking(a2.h3: ")
    assert len(repr(found)) < 200


@needs_browser
def test_in_a_browser_the_maps_can_be_taken_off(photos: Path, tmp_path: Path) -> None:
    cv.top_images(catdog(), photos, HEAD, count=3).to_html(tmp_path / "page.html")
    with browser(tmp_path / "profile") as page:
        page.requests()
        page.browser.get((tmp_path / "page.html").as_uri())
        shown = "return getComputedStyle(document.querySelector('image.map')).display"
        assert page.run(shown) == "inline"
        page.element("#overlay").send_keys(" ")
        assert page.run(shown) == "none"
        assert page.complaints() == []
        assert not [each for each in page.requests() if each.startswith("http")]


def on_the_command_line(*arguments: object) -> str:
    """What the command prints."""
    every = ["top-images", "--model", "catdog-tiny", *map(str, arguments)]
    result = CliRunner().invoke(view, every, catch_exceptions=True)
    if isinstance(result.exception, CircuitViTError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_on_the_command_line(photos: Path, tmp_path: Path) -> None:
    units = ("--unit", HEAD, "--unit", "m0.hidden[3]")
    page, figure = tmp_path / "new" / "top.html", tmp_path / "top.png"
    said = on_the_command_line(photos, *units, "--row", "0.9", "--row", "top", "--count", 2, "--out", page)
    assert "m0.hidden[3], 0.9 of 6 images" in said
    assert "around the 90% quantile" in page.read_text(encoding="utf-8")
    assert "patch (" in on_the_command_line(photos, *units, "--by", "patch", "--no-picture", "--out", figure)
    assert figure.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match="without its images"):
        on_the_command_line(photos, *units, "--no-picture", "--out", page)
    with pytest.raises(NameNotFoundError, match="patch"):
        on_the_command_line(photos, *units, "--by", "patches", "--out", page)


# -- real ----------------------------------------------------------------------------------------


def test_real_heads_on_pets(shared_data: Path) -> None:
    """Where a7.h0 writes most is the animal (95%, of all patches 39%); a10.h0 writes beside it (6%)."""
    name = "vit_tiny_patch16_224"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    folder = shared_data / "images" / "pets_masks"
    photos = sorted((folder / "images").iterdir())
    masks = [read_mask(folder / "masks" / f"{each.stem}.png", (1, 2), model.preprocessing) for each in photos]
    found = cv.top_images(
        model, photos, ["a7.h0", "a10.h0"], masks={"animal": torch.stack(masks)}, top_share=0.05, count=4
    )
    on, beside = (found[unit].lifts[0] for unit in found)
    assert on.object == "animal"
    assert on.top > 0.8 > 2 * on.all
    assert on.lift.low is not None
    assert on.lift.low > 1
    assert beside.lift.high is not None
    assert beside.lift.high < 0.5
