"""Sites: what is read by name, against hooks on the original modules, and the grammar of names."""

from __future__ import annotations

import pytest
import torch

import circuitvit as cv
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from tests.families import FAMILIES, made
from tests.rightness import CLEAN, micro
from tests.strategies import assert_close

UNSEEN = {
    "timm, differential": ("a0.h0.pattern", "a0.h1.pattern", "a1.h0.pattern", "a1.h1.pattern"),
    "transformers, timesformer": (
        *(f"{kind}{layer}.h{head}.pattern" for kind in "ta" for layer in (0, 1) for head in (0, 1)),
        "mid0",
        "mid1",
    ),
}
"""What no hook sees in one piece; other tests say what it is."""

HEAD = ("a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "a0.h0.scores", "a0.h0.pattern", "a0.h0.z", "a0.h0")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_is_what_hooks_on_the_original_see(name: str) -> None:
    family = FAMILIES[name]
    model, original = made(name)
    images = family.images()
    expected, names = original.values(images), model.sites().names
    found = model.activations(images, names, progress=False)
    assert tuple(found) == names
    assert set(names) - set(expected) == set(UNSEEN.get(name, ()))
    for site in model.sites():
        value = found[site.name]
        assert value.shape == (2, *site.shape)
        if site.name in expected:
            value, literal = value.nan_to_num(neginf=0.0), expected[site.name].nan_to_num(nan=7e7, neginf=0.0)
            known = literal != 7e7
            assert value.shape == literal.shape
            assert known.any()
            assert_close(value[known], literal[known], 1e-9)


@pytest.mark.parametrize(
    ("name", "more"),
    [("timm", ()), ("open_clip", ()), ("transformers, vit, classes", ()), ("timm, gated", ("a0.h0<g>",))],
)
def test_the_sites_of_plain_models_written_out(name: str, more: tuple[str, ...]) -> None:
    model, _ = made(name)
    assert model.sites("a0.h0").names == (*HEAD[:3], *more, *HEAD[3:])
    others = [site for site in model.sites() if not site.node.startswith("a")]
    assert [(site.name, site.shape) for site in others] == [
        ("input", (5, 24)),
        ("resid0", (5, 24)),
        ("mid0", (5, 24)),
        ("m0.hidden", (5, 48)),
        ("m0", (5, 24)),
        ("resid1", (5, 24)),
        ("mid1", (5, 24)),
        ("m1.hidden", (5, 48)),
        ("m1", (5, 24)),
        ("resid2", (5, 24)),
        ("logits", (5,)),
    ]
    assert len(model.sites()) == 11 + 4 * (7 + len(more))


def test_every_kind_of_site_is_among_those_of_a_pool() -> None:
    model, _ = made("timm, pool")
    kinds = {"stream", "output", "read", "scores", "pattern", "z", "hidden", "logits"}
    assert {site.kind for site in model.sites()} == kinds
    assert {site.kind for site in model.sites("pool*")} == kinds - {"logits"}
    assert model.sites("pool.resid")[0].shape == (1, 24)


# -- names -----------------------------------------------------------------------------------------


def test_names_with_stars() -> None:
    model = cv.wrap(micro())
    acts = model.activations(CLEAN, ["a*.pattern", "a1.*", "*<q>", "resid*"], progress=False)
    heads = [f"a{layer}.h{head}" for layer in (0, 1) for head in (0, 1)]
    assert list(acts) == [
        *(f"{head}.pattern" for head in heads),
        "a1.h0",
        "a1.h1",
        *(f"{head}<q>" for head in heads),
        "resid0",
        "resid1",
        "resid2",
    ]
    assert len(model.sites("a1.*")) == 14
    assert model.sites("a1.*.z").names == ("a1.h0.z", "a1.h1.z")
    assert model.sites("m?").names == ("m0.hidden", "m0", "m1.hidden", "m1")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a1.h7", "did you mean"),
        ("resid3", "resid"),
        ("a1.h0.patern", "a1.h0.pattern"),
        ("m0.pattern", "there is no 'm0.pattern': m0 has .hidden"),
        ("a1.h0.hidden", "a1.h0 has"),
        ("b*", r"no site is called 'b\*': model.sites\(\) lists them all"),
        ("a*.hidden", r"a\* has"),
        ("", "unknown site"),
        ("a1", r"here it is 'a1\.\*'"),
        ("a1.pattern", r"here it is 'a1\.\*\.pattern'"),
        ("a1.h0.q", "here it is 'a1.h0<q>'"),
        ("resid_pre.1", "here it is 'resid1'"),
        ("resid_post.1", "here it is 'resid2'"),
        ("blocks.1.hook_resid_mid", "here it is 'mid1'"),
        ("blocks.1.attn.hook_pattern", r"here it is 'a1\.\*\.pattern'"),
        ("blocks.1.mlp", "here it is 'm1'"),
        ("blocks.7.mlp", "unknown site 'blocks.7.mlp': there are"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(name: str, says: str) -> None:
    model = cv.wrap(micro())
    for call in (
        model.sites,
        lambda wrong: model.edit({wrong: 0}),
        lambda wrong: model.activations(CLEAN, wrong),
    ):
        with pytest.raises(NameNotFoundError, match=says):
            call(name)


# -- tokens ----------------------------------------------------------------------------------------


def test_tokens_by_kind_number_place_and_mask() -> None:
    model = cv.wrap(micro(reg_tokens=2))
    whole = model.activations(CLEAN, ["resid1", "a1.h0.pattern"], progress=False)
    stream, pattern = whole["resid1"], whole["a1.h0.pattern"]
    for words, places in {
        "cls": [0],
        "reg": [1, 2],
        "cls+patch": [0, 3, 4, 5, 6],
        "1": [1],
        "-1": [6],
        "patch(1,0)": [5],
        "patch(0,1)+cls": [0, 4],
        "all": list(range(7)),
    }.items():
        acts = model.activations(CLEAN, f"resid1@{words}", progress=False)
        assert_close(acts[f"resid1@{words}"], stream[:, places])
        assert len(acts.tokens[f"resid1@{words}"]) == len(places)
    mask = torch.tensor([True, False, False, True, False, False, False])
    acts = model.activations(CLEAN, ["resid1", "a1.h0.pattern"], tokens=mask, progress=False)
    assert_close(acts["resid1"], stream[:, mask])
    assert_close(acts["a1.h0.pattern"], pattern[:, mask])
    key = "a1.h0.pattern@patch->cls"
    assert_close(model.activations(CLEAN, key, progress=False)[key], pattern[:, :1, 3:])
    assert acts.tokens["resid1"] == ("cls", "patch (0, 0)")


def test_tokens_of_groups() -> None:
    model = cv.wrap(micro())
    groups = cv.TokenGroups(("left", "right"), torch.tensor([0, 0, 1, 0, 1]))
    acts = model.activations(CLEAN, ["mid1@right", "mid1"], groups=groups, tokens="left", progress=False)
    whole = model.activations(CLEAN, "mid1", progress=False)["mid1"]
    assert_close(acts["mid1@right"], whole[:, [2, 4]])
    assert_close(acts["mid1"], whole[:, [0, 1, 3]])


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("resid1@reg", "no tokens are called 'reg'"),
        ("resid1@", "names no tokens"),
        ("resid1@9", "there is no token 9"),
        ("resid1@patch(2,0)", r"there is no patch\(2,0\)"),
        ("resid1@patch->cls", "resid1 has no keys"),
        ("a1.h0.pattern@patch->", "where from and where to"),
        ("logits@cls", "logits have no tokens"),
    ],
)
def test_wrong_tokens_are_refused(key: str, says: str) -> None:
    model = cv.wrap(micro())
    for call in (lambda: model.edit({key: 0}), lambda: model.activations(CLEAN, key)):
        with pytest.raises(OptionError, match=says):
            call()


def test_patches_of_a_pool_are_refused_with_the_way_out() -> None:
    model, _ = made("timm, pool")
    says = r"pool.h0.pattern: no tokens are called 'patch': there are latent.*'a\*.pattern@\.\.\.'"
    key = "*.pattern@patch->patch"
    for call in (lambda: model.edit({key: 0}), lambda: model.activations(torch.zeros(1, 3, 32, 32), key)):
        with pytest.raises(OptionError, match=says):
            call()
    model.edit({f"a{key}": 0})


def test_images_of_another_size() -> None:
    module = micro(dynamic_img_size=True)
    model = cv.wrap(module)
    wide = torch.randn(2, 3, 32, 64).double()
    names = ["resid1", "a1.h0.pattern", "logits", "resid2@cls", "resid1@patch(1,3)"]
    acts = model.activations(wide, names, progress=False)
    assert acts["resid1"].shape == (2, 9, 24)
    assert acts["a1.h0.pattern"].shape == (2, 9, 9)
    assert acts.tokens["resid1"][:2] == ("cls", "patch (0, 0)")
    assert_close(acts["resid1@patch(1,3)"], acts["resid1"][:, -1:])
    assert_close(acts["logits"], module(wide))
    with pytest.raises(cv.CircuitViTError, match="the model takes images of"):
        cv.wrap(micro()).activations(wide, "resid1")


# -- gradients -------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_original_module() -> None:
    module = micro()
    model = cv.wrap(module)
    given, own = CLEAN.clone().requires_grad_(), CLEAN.clone().requires_grad_()
    acts = model.activations(given, ["m1", "logits"], grad=True)
    written: list[torch.Tensor] = []
    module.blocks[1].mlp.register_forward_hook(lambda part, inputs, output: written.append(output))
    logits = module(own)
    for found, expected in ((acts["m1"], written[0]), (acts["logits"], logits)):
        (ours,) = torch.autograd.grad(found.square().sum(), given, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected.square().sum(), own, retain_graph=True)
        assert_close(ours, theirs)


def test_a_model_is_called_with_tensors() -> None:
    with pytest.raises(DataError, match=r"not with str: model\.activations\(images, 'logits'\) takes files"):
        cv.wrap(micro())("cat.png")  # type: ignore[arg-type]
