"""Prompts on the CLIPs of other libraries: their own similarity, edges by hooks on the whole original, and
what their tokenizers do not say.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import circuitvit as cv
from circuitvit.errors import DataError, OptionError, UnsupportedModelError
from tests.hf_models import SMALL, hf, siglip
from tests.hf_models import hooked as hf_hooked
from tests.models.test_multihead import CLASSES
from tests.models.test_multihead import hooked as packed_hooked
from tests.models.test_open_clip_load import folder, state_of
from tests.reference.hooked import HookedModule, Receiver
from tests.rightness import CLEAN, CORRUPT, finished, formula
from tests.strategies import assert_close

__all__ = ["folder"]

PROMPTS = ["a cat", "two dogs, and a cat", "birds"]
VISION = {"image_size": 32, "patch_size": 16, "width": 24, "layers": 2, "head_width": 12}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BYTES = {name: number for number, name in enumerate([*"abcdefghijklmnopqrstuvwxyz,"])}


@dataclass
class Case:
    """A whole model with its tokenizer, and its own similarity of images and `PROMPTS`."""

    module: Any
    tokenizer: Any
    similarity: Callable[[Tensor], Tensor]
    nodes: HookedModule

    @property
    def model(self) -> cv.Model:
        return cv.wrap(self.module, tokenizer=self.tokenizer)


def of_open_clip(_: pytest.MonkeyPatch) -> Case:
    library = pytest.importorskip("open_clip")
    module, tokenizer = finished(library.CLIP(CLASSES, VISION, TEXT)), library.get_tokenizer("ViT-B-32")
    tokens = tokenizer(PROMPTS, context_length=12)
    return packed(module, tokenizer, lambda images: module.get_logits(images, tokens)[0])


def of_open_clip_without_a_mask(_: pytest.MonkeyPatch) -> Case:
    """As open_clip has SigLIP: every token sees every other, and the last is read."""
    library = pytest.importorskip("open_clip")
    text = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    module = finished(library.CustomTextCLIP(CLASSES, VISION, text, init_logit_bias=-10))
    tokens = library.tokenize(PROMPTS, context_length=12)
    return packed(module, library.tokenize, lambda images: module.get_logits(images, tokens)[0])


def of_openai(monkeypatch: pytest.MonkeyPatch) -> Case:
    pytest.importorskip("pkg_resources", exc_type=ImportError)
    clip = pytest.importorskip("clip")
    kind = sys.modules["clip.model"]
    monkeypatch.setattr(kind.LayerNorm, "forward", nn.LayerNorm.forward)  # which computes in float32
    module = finished(kind.CLIP(CLASSES, 32, 2, 128, 16, 12, 49408, 8, 2, 1))
    tokens = clip.tokenize(PROMPTS, context_length=12)
    return packed(module, clip.tokenize, lambda images: module(images, tokens)[0])


def packed(module: Any, tokenizer: Any, similarity: Callable[[Tensor], Tensor]) -> Case:
    tower = module.visual
    first: Any = (lambda stream: stream[0]) if type(module).__module__ == "clip.model" else Tensor.clone
    nodes = packed_hooked(tower, tower.transformer.resblocks, "attn", tower.ln_post, first)
    return Case(module, tokenizer, similarity, replace(nodes, run=similarity))


def letters() -> Any:
    """A tokenizer of transformers' CLIP for letters alone."""
    known = dict(BYTES)
    for name in [*(f"{letter}</w>" for letter in BYTES), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]:
        known[name] = len(known)
    return hf.CLIPTokenizer(vocab=known, merges=[("c", "a"), ("ca", "t</w>")])


def of_transformers(end: int | None = None) -> Case:
    tokenizer = letters()
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": 0}
    text["eos_token_id"] = tokenizer.eos_token_id if end is None else end
    module = finished(
        hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=SMALL, projection_dim=CLASSES))
    )
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    norm = module.vision_model.post_layernorm
    reads = Receiver(norm, norm, pool=lambda stream: stream[:, 0])
    names = ("layer_norm1", "layer_norm2"), "self_attn", "out_proj"
    nodes = hf_hooked(module.vision_model, "encoder.layers", *names, last=reads)

    def similarity(images: Tensor) -> Tensor:
        return module(pixel_values=images, **tokens).logits_per_image  # type: ignore[no-any-return]

    return Case(module, tokenizer, similarity, replace(nodes, run=similarity))


def pieces() -> Any:
    """A tokenizer of transformers' SigLIP 2 for letters alone."""
    known = {name: number for number, name in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"])}
    known |= {letter: len(known) + number for letter, number in BYTES.items()}
    return hf.Siglip2Tokenizer(vocab=known, merges=[], padding_side="right", add_eos_token=True)


def of_siglip(_: pytest.MonkeyPatch) -> Case:
    tokenizer = pieces()
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": 24}
    module = finished(hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=SMALL)))
    filled = tokenizer(PROMPTS, padding="max_length", max_length=24, return_tensors="pt")
    nodes = siglip(module.vision_model)
    sentences = module.get_text_features(filled.input_ids).pooler_output

    def similarity(images: Tensor) -> Tensor:
        return module(pixel_values=images, input_ids=filled.input_ids).logits_per_image  # type: ignore[no-any-return]

    def run(images: Tensor) -> Tensor:  # the hooks stand on the image tower, whose output goes on here
        cosine = F.cosine_similarity(nodes.run(images)[:, None], sentences, dim=-1)
        return module.logit_scale.exp() * cosine + module.logit_bias

    return Case(module, tokenizer, similarity, replace(nodes, run=run))


CASES: dict[str, Callable[[pytest.MonkeyPatch], Case]] = {
    "open_clip": of_open_clip,
    "open_clip, no mask": of_open_clip_without_a_mask,
    "openai": of_openai,
    "transformers": lambda _: of_transformers(),
    "transformers, old number of the end": lambda _: of_transformers(end=2),
    "siglip": of_siglip,
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_are_the_original_s_similarity_and_edges_those_of_hooks_on_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name](monkeypatch)
    model = case.model.with_prompts(PROMPTS)
    assert model.classes == tuple(PROMPTS)
    assert_close(model(CLEAN), case.similarity(CLEAN), 1e-10)
    if "old" in name:
        return  # the image tower is that of the one before
    found = cv.attribute(model, cv.Task(CLEAN, CORRUPT, cv.logit_diff(*PROMPTS[:2])), "exact").to_dict()
    base, size = formula(case.nodes.run(CLEAN)).mean(), max(map(abs, found.values()))
    for edge in [*found][:: len(found) // 10]:
        ablated = case.nodes.ablated(CLEAN, CORRUPT, edge, 1.0)
        assert abs(found[edge] - float(formula(ablated).mean() - base)) <= 1e-6 * size


# -- sentences -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_sentence_that_would_be_cut_off_is_refused_with_its_length(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CASES[name](monkeypatch).model
    assert model.words is not None
    most = model.words.tokenizer.context
    letter = len(model.words.tokenizer.encode("x"))
    with pytest.raises(
        DataError, match=rf"has \d+ tokens, start and end among them, and the model reads {most}"
    ):
        model.with_prompts(["a cat", "x " * most])
    assert letter <= most


def test_tokens_say_what_they_stand_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {}
    for name, case in CASES.items():
        words = case(monkeypatch).model.words
        assert words is not None
        said[name] = words.tokenizer.words(words.tokenizer.encode("A Cat"))
    start, end = "[start]", "[end]"
    whole = [start, "a", "cat", end]
    assert said["open_clip"] == said["openai"] == said["transformers"] == whole
    assert said["open_clip, no mask"][:4] == whole
    assert said["siglip"][:7] == ["a", "▁", "c", "a", "t", end, "[pad]"]
    assert [len(said[name]) for name in ("open_clip, no mask", "siglip")] == [12, 24]


def test_what_the_tokenizer_does_not_know_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="'Ä cat' has letters or words that"):
        of_siglip(monkeypatch).model.with_prompts(["Ä cat"])


def test_an_end_in_the_middle_of_a_sentence_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="at its token 2, not at the last: it has to end where the text ends"):
        of_open_clip(monkeypatch).model.with_prompts(["<end_of_text> cat"])


def test_a_tokenizer_of_another_model_is_told() -> None:
    library, case = pytest.importorskip("open_clip"), of_transformers()
    other = cv.wrap(case.module, tokenizer=library.get_tokenizer("ViT-B-32"))
    with pytest.raises(DataError, match=r"there is no token 49\d+: CLIPModel has 58.*of another model"):
        other.with_prompts(PROMPTS)


@pytest.mark.parametrize(
    ("kind", "tokenizer", "message"),
    [
        (OptionError, "a text", "is no tokenizer that is known"),
        (UnsupportedModelError, "reduced", "leaves tokens out"),
    ],
)
def test_tokenizers_that_cannot_be_taken(kind: type[Exception], tokenizer: str, message: str) -> None:
    if tokenizer == "reduced":
        library = pytest.importorskip("open_clip")
        tokenizer = library.SimpleTokenizer(reduction_mask="random")
    with pytest.raises(kind, match=message):
        cv.wrap(of_transformers().module, tokenizer=tokenizer)


def test_a_text_tower_of_another_kind_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    case = of_open_clip_without_a_mask(monkeypatch)
    case.module.text.__class__ = type("HFTextEncoder", (nn.Module,), {})
    with pytest.raises(UnsupportedModelError, match="text of CustomTextCLIP is a HFTextEncoder"):
        assert case.model


# -- the model around ------------------------------------------------------------------------------


def test_prompts_and_edits_come_in_either_order_and_are_copied() -> None:
    case = of_transformers()
    edits = {"m0": 0}
    first, last = case.model.edit(edits).with_prompts(PROMPTS), case.model.with_prompts(PROMPTS).edit(edits)
    assert_close(first(CLEAN), last(CLEAN), 1e-12)
    for again in (copy.deepcopy(first), copy.deepcopy(last)):
        assert torch.equal(again(CLEAN), first(CLEAN))
        assert again.with_prompts(["x", "y"]).classes == ("x", "y")


def test_both_towers_of_a_file_of_open_clip_are_loaded(folder: Path) -> None:
    library = pytest.importorskip("open_clip")
    file = folder / "configs" / "Micro-16.json"
    config = json.loads(file.read_text())
    config["text_cfg"] |= {"vocab_size": 49408, "context_length": 77}
    file.write_text(json.dumps(config))
    library.add_model_config(folder / "configs")
    module = finished(library.CLIP(**config), torch.float32)
    torch.save({f"module.{key}": each for key, each in state_of(module).items()}, folder / "both.pt")
    model = cv.load("open_clip:Micro-16", checkpoint=folder / "both.pt", dtype=torch.float64)
    tokens = library.get_tokenizer("ViT-B-32")(PROMPTS)
    with torch.no_grad():
        assert_close(model.with_prompts(PROMPTS)(CLEAN), module.double().get_logits(CLEAN, tokens)[0], 1e-8)
    visual = {key: each for key, each in state_of(module).items() if key.startswith("visual.")}
    torch.save(visual, folder / "visual.pt")
    with pytest.raises(OptionError, match="holds the weights of its image tower alone"):
        cv.load("open_clip:Micro-16", checkpoint=folder / "visual.pt").with_prompts(PROMPTS)


def test_both_towers_of_a_folder_of_transformers_are_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    case = of_transformers()
    case.module.float().save_pretrained(tmp_path)
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path
    )
    alone = cv.load(f"hf:{tmp_path}")
    with pytest.raises(OptionError, match="knows no words: there is no tokenizer beside its weights"):
        alone.with_prompts(PROMPTS)
    case.tokenizer.save_pretrained(tmp_path)
    model = cv.load(f"hf:{tmp_path}").with_prompts(PROMPTS)
    with torch.no_grad():
        assert_close(model(CLEAN.float()), case.similarity(CLEAN.float()), 1e-5)
    assert model.with_prompts(PROMPTS).weights_hash == model.weights_hash
