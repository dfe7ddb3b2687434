"""Text towers as models: sentences in, similarity to images out, edges as hooks on the originals have
them.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.cli.inputs import ModelOptions, load_model
from circuitvit.errors import DataError, OptionError, UnsupportedModelError
from circuitvit.export.maps import maps_of
from circuitvit.export.written import CELL
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo.clip_module import ClipModule
from circuitvit.models.zoo.text_tower import TextTower
from tests.reference.hooked import (
    HookedModule,
    Receiver,
    Sender,
    exchanged_in_multihead,
    given,
    gives,
    packed_blocks,
    written_by_head,
    written_by_multihead,
)
from tests.rightness import METRIC, finished, formula, images, prove
from tests.strategies import assert_close

import_timm()

CONTEXT, VOCABULARY, WIDTH, HEADS, LAYERS, FEATURES = 10, 40, 24, 2, 2, 16
TOKENS = 6
"""Of a sentence, with start and end."""
START, END = VOCABULARY - 2, VOCABULARY - 1
HEAD = WIDTH // HEADS
MASK = torch.full((CONTEXT, CONTEXT), -torch.inf, dtype=torch.float64).triu(1)
PICTURES = images(2)


class Letters:
    """A tokenizer whose words are cut into pieces of three letters."""

    context = CONTEXT

    def __init__(self, whole: bool = False) -> None:
        self.whole, self.said = whole, {START: "[start]", END: "[end]"}

    def encode(self, sentence: str) -> list[int]:
        pieces = [word[at : at + 3] for word in sentence.split() for at in range(0, len(word), 3)]
        numbers = [sum(map(ord, piece)) % START for piece in pieces]
        self.said.update(zip(numbers, pieces, strict=True))
        return [START, *numbers, END, *[0] * (CONTEXT - len(numbers) - 2) * self.whole]

    def words(self, tokens: Any) -> list[str]:
        return [self.said.get(token, "?") for token in tokens]


def drawn(seed: int, tokens: int) -> Tensor:
    """Two sentences `(2, 1, 1, token)`."""
    numbers = torch.randint(START, (2, 1, 1, tokens), generator=torch.Generator().manual_seed(seed))
    numbers[..., 0], numbers[..., -1] = START, END
    return numbers.double()


# -- the originals ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Original:
    """A model of images and texts in float64, and where the nodes of its text tower are."""

    module: Any
    similarity: Callable[[Tensor, Tensor], Tensor]
    senders: dict[str, Sender]
    receivers: dict[str, Receiver]
    whole: bool = False

    @property
    def model(self) -> cv.Model:
        return cv.wrap(self.module, tokenizer=Letters(self.whole)).text(PICTURES)

    @property
    def hooked(self) -> HookedModule:
        return HookedModule(self.logits, self.senders, self.receivers)

    def logits(self, sentences: Tensor) -> Tensor:
        return self.similarity(PICTURES, sentences[:, 0, 0].long())


def padded(tokens: Tensor) -> Tensor:
    return nn.functional.pad(tokens, (0, CONTEXT - tokens.shape[1]))


def multihead_nodes(
    blocks: Any, last: nn.Module, mask: Tensor | None
) -> tuple[dict[str, Sender], dict[str, Receiver]]:
    """Of CLIP's blocks on torch's attention."""
    senders, receivers = {"input": Sender(blocks[0], given)}, {"logits": Receiver(last, last)}
    for layer, block in enumerate(blocks):
        senders[f"m{layer}"] = Sender(block.mlp, gives)
        receivers[f"m{layer}"] = Receiver(block.ln_2, block.ln_2)
        for head in range(HEADS):
            senders[f"a{layer}.h{head}"] = Sender(block.attn, written_by_multihead(head, mask=mask))
            for port, name in enumerate("qkv"):
                exchanged = exchanged_in_multihead(head, port, mask)
                receivers[f"a{layer}.h{head}<{name}>"] = Receiver(block.ln_1, block.attn, exchanged=exchanged)
    return senders, receivers


def openai() -> Original:
    pytest.importorskip("pkg_resources", exc_type=ImportError)
    model = pytest.importorskip("clip.model")
    module = finished(model.CLIP(FEATURES, 32, 1, 64, 16, CONTEXT, VOCABULARY, WIDTH, HEADS, LAYERS))
    senders, receivers = multihead_nodes(module.transformer.resblocks, module.ln_final, MASK)
    receivers["logits"] = Receiver(module.ln_final, module.ln_final, pool=lambda moved: moved.transpose(0, 1))
    return Original(module, lambda seen, said: module(seen, padded(said))[1], senders, receivers)


VISION = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
TEXT = {
    "context_length": CONTEXT,
    "vocab_size": VOCABULARY,
    "width": WIDTH,
    "heads": HEADS,
    "layers": LAYERS,
}


def open_clip() -> Original:
    library = pytest.importorskip("open_clip")
    module = finished(library.CLIP(FEATURES, VISION, TEXT))
    nodes = multihead_nodes(module.transformer.resblocks, module.ln_final, MASK)
    return Original(module, lambda seen, said: module.get_logits(seen, padded(said))[1], *nodes)


def open_clip_siglip() -> Original:
    """A text tower without a mask, read at the last token of the whole context, and a bias."""
    library = pytest.importorskip("open_clip")
    text = {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True}
    module = finished(library.CustomTextCLIP(FEATURES, VISION, text, init_logit_bias=-3.0))
    nodes = multihead_nodes(module.text.transformer.resblocks, module.text.ln_final, None)
    return Original(module, lambda seen, said: module.get_logits(seen, said)[1], *nodes, whole=True)


def hf_nodes(tower: Any) -> tuple[dict[str, Sender], dict[str, Receiver]]:
    last = tower.final_layer_norm
    senders, receivers = {"input": Sender(tower.encoder.layers[0], given)}, {"logits": Receiver(last, last)}
    for layer, block in enumerate(tower.encoder.layers):
        senders[f"m{layer}"] = Sender(block.mlp, gives)
        receivers[f"m{layer}"] = Receiver(block.layer_norm2, block.layer_norm2)
        for head in range(HEADS):
            senders[f"a{layer}.h{head}"] = Sender(block.self_attn.out_proj, written_by_head(head, HEAD))
            for name in "qkv":
                projection = getattr(block.self_attn, f"{name}_proj")
                columns = slice(head * HEAD, (head + 1) * HEAD)
                receivers[f"a{layer}.h{head}<{name}>"] = Receiver(block.layer_norm1, projection, columns)
    return senders, receivers


def hf(kind: str, **text: Any) -> Original:
    library = pytest.importorskip("transformers")
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    vision = {**shape, "image_size": 32, "patch_size": 16}
    ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": 0}
    text = {**shape, **ends, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, **text}
    config = getattr(library, f"{kind}Config")(text_config=text, vision_config=vision)
    module = finished(getattr(library, f"{kind}Model")(config))

    def similarity(seen: Tensor, said: Tensor) -> Tensor:
        found: Tensor = module(input_ids=said, pixel_values=seen).logits_per_text
        return found

    return Original(module, similarity, *hf_nodes(module.text_model), whole=kind == "Siglip")


def own(causal: bool = True) -> Original:
    timm = import_timm()
    vit = timm.models.vision_transformer.VisionTransformer
    visual = vit(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=FEATURES)
    text = TextTower(VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS, FEATURES, causal=causal, end=END)
    module = finished(ClipModule(visual, text))
    senders, receivers = packed_blocks(text.blocks, HEADS, HEAD)
    receivers["logits"] = Receiver(text.norm, text.norm, pool=lambda moved: moved[:, TOKENS - 1])

    def similarity(seen: Tensor, said: Tensor) -> Tensor:
        cosine = nn.functional.cosine_similarity(text(padded(said))[:, None], visual(seen)[None], dim=-1)
        return module.logit_scale.exp() * cosine

    return Original(module, similarity, senders, receivers)


ORIGINALS: dict[str, Callable[[], Original]] = {
    "OpenAI": openai,
    "open_clip": open_clip,
    "open_clip, SigLIP": open_clip_siglip,
    "transformers": lambda: hf("CLIP"),
    "transformers, the highest number ends": lambda: hf("CLIP", eos_token_id=2),
    "SigLIP": lambda: hf("Siglip", projection_size=WIDTH),
    "own": own,
    "own, without a mask": lambda: own(causal=False),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_logits_are_the_originals_and_edges_those_of_hooks_on_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "OpenAI":  # whose norms compute in float32 whatever they are given
        norm = pytest.importorskip("clip.model").LayerNorm
        monkeypatch.setattr(norm, "forward", nn.LayerNorm.forward)
    original = ORIGINALS[name]()
    clean, corrupt = (drawn(seed, CONTEXT if original.whole else TOKENS) for seed in (0, 1))
    model, hooked, task = original.model, original.hooked, cv.Task(clean, corrupt, METRIC)
    assert_close(model(clean), hooked.run(clean), 1e-9)
    effects = cv.attribute(model, task, "exact")
    strongest = list(effects.top(5, prune=False))
    with torch.no_grad():
        for edge in {*strongest, *list(model.graph.edges)[:: model.graph.n_edges // 5]}:
            found = formula(hooked.ablated(clean, corrupt, edge)) - formula(hooked.run(clean))
            assert effects[edge] == pytest.approx(float(found.mean()), abs=1e-6 * effects.values.max()), edge


def test_every_gradient_is_right_under_the_mask() -> None:
    original = own()
    prove(original.model, original.hooked, drawn(0, TOKENS), drawn(1, TOKENS))


# -- sentences as inputs ---------------------------------------------------------------------------

CLEAN, CORRUPT = ["a red cat", "my old cat"], ["a red dog", "my old dog"]


@pytest.fixture(scope="module")
def clip() -> cv.Model:
    return cv.wrap(own().module.float(), tokenizer=Letters(), name="micro")


@pytest.fixture(scope="module")
def text(clip: cv.Model) -> cv.Model:
    return clip.text(PICTURES.float())


def task(clean: Any = CLEAN, corrupt: Any = CORRUPT, **options: Any) -> cv.Task:
    return cv.Task(clean, corrupt, **{"metric": cv.logit_diff("image 0", "image 1"), **options})


def test_sentences_are_told_by_their_words(text: cv.Model) -> None:
    prepared = task().prepare(text)
    assert prepared.clean.names == tuple(CLEAN)
    assert prepared.clean.shape == (1, 1, 5)
    assert text(prepared.clean.take(0, 2)).shape == (2, 2)
    one, two = (text.activations([sentence], "logits")["logits"] for sentence in CLEAN)
    assert_close(torch.cat([one, two]), text(prepared.clean.take(0, 2)).cpu(), 1e-6)


CUT = r"(?s)equally many tokens.*(hed . geh . og|don . key).*each number"


def test_sentences_of_other_numbers_of_tokens_are_shown_cut(text: cv.Model) -> None:
    for clean, corrupt in ((CLEAN, ["a red dog", "my old hedgehog"]), (["a cat"], ["a donkey"])):
        with pytest.raises(DataError, match=CUT):
            task(clean, corrupt).prepare(text)


@pytest.mark.parametrize("number", [10**6, math.inf])
def test_numbers_that_no_token_has_are_refused(number: float) -> None:
    clip = cv.load("clip-tiny")
    text, numbers = clip.text(), torch.tensor([[1.0, number, 2.0]])
    with pytest.raises(DataError, match="give sentences as texts"):
        text.activations(numbers, "logits")


def test_edits_of_logits_are_not_taken_for_edits_of_features() -> None:
    model = cv.load("clip-tiny").with_prompts(["a cat", "a dog"]).edit({"logits": 1.0})
    with pytest.raises(UnsupportedModelError, match="images are compared by their features"):
        model.text(images=torch.zeros(1, *model.preprocessing.shape))


def test_reports_say_sentences_where_they_mean_them(text: cv.Model) -> None:
    circuit = cv.Circuit.full(text.graph)
    report = cv.verify(text, task(CLEAN[:1], CORRUPT[:1]), circuit, n_random=0, progress=False)
    said = " ".join(report.warnings)
    assert "no held-out sentences" in said
    assert "nothing is known about other sentences" in said


def test_sentences_come_from_files_too(text: cv.Model, tmp_path: Path) -> None:
    sides = [tmp_path / "clean.txt", tmp_path / "corrupt.txt"]
    for path, sentences in zip(sides, (CLEAN, CORRUPT), strict=True):
        path.write_text("\n".join([*sentences, ""]), encoding="utf-8")
    table = tmp_path / "pairs.csv"
    rows = [f"{clean},{corrupt},image 0,image 1" for clean, corrupt in zip(CLEAN, CORRUPT, strict=True)]
    table.write_text("\n".join(["clean,corrupt,target,foil", *rows]), encoding="utf-8")
    for each in (task(*map(str, sides)), cv.Task.from_csv(table)):
        assert each.prepare(text).clean.names == tuple(CLEAN)
    sides[0].write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no sentences"):
        task(*sides).prepare(text)
    with pytest.raises(DataError, match=r"no image a red cat.*the text tower, model\.text"):
        cv.Task.from_csv(table, "kl_divergence").prepare(cv.load("catdog-tiny"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("cat.jpg", "takes sentences.*image tower"),
        (Path("folder"), "takes sentences.*image tower"),
        (Image.new("RGB", (8, 8)), "takes sentences, not Image"),
        (torch.zeros(1, 3, 32, 32), r"\(sentence, 1, 1, token\)"),
        (torch.tensor([[START, 3, END, 3]]), "reads a sentence of 4 tokens at its token 3"),
        (torch.tensor([[START, 3, 99, END]]), "no token 99"),
        ("one two three four five six seven eight nine", "17 tokens in a sentence.*at most 10"),
        ("", "is empty"),
        ([], "no sentences"),
    ],
)
def test_what_is_no_sentence_is_told_so(text: cv.Model, given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        text.activations(given, "logits")


def test_pixels_are_asked_for_in_vain(text: cv.Model, clip: cv.Model) -> None:
    for ask in (
        lambda: task(corrupt=lambda images: images).prepare(text),
        lambda: task(pair="order").prepare(text),
        lambda: cv.equivariance(text, CLEAN * 4),
        lambda: cv.head_kinds(text, CLEAN),
        lambda: cv.registers(text, CLEAN),
        lambda: cv.feature_visualisation(text, "logits", unit=0),
        lambda: cv.TokenGroups.from_masks(text, {"cat": torch.ones(1, 5).bool()}),
        lambda: text.text(),
        lambda: cv.with_head(clip, torch.ones(2, FEATURES)).text(PICTURES),
        lambda: clip.text(tokens=CONTEXT + 1),
    ):
        with pytest.raises(OptionError, match=r"sentences|knows no words|head of its own|at most 10 tokens"):
            ask()
    said = cv.robustness(text, task("a red cat", "a red dog"), cv.Circuit.full(text.graph), progress=False)
    assert not [row for row in said.rows if row.kind == "perturbed images"]


def test_half_precision_would_round_tokens() -> None:
    module = own().module.to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match=r"bfloat16.*would be rounded.*float32"):
        cv.wrap(module, tokenizer=Letters()).text()


def test_tokens_are_named_by_what_they_are(text: cv.Model, clip: cv.Model) -> None:
    kinds = ("start", "word", "word", "word", "end")
    assert text.token_kinds(5) == kinds
    for groups, names in (
        ("kind", ("start", "word", "end")),
        ("token", ("start", "word0", "word1", "word2", "end")),
    ):
        assert task(groups=groups).prepare(text).graph.groups == names
    by_word = cv.attribute(text, task(groups="token"), "exact")
    assert by_word["input->m0@word2"] != 0  # where the sentences differ
    assert abs(by_word["input->m0@word1"]) < 1e-6
    edited = clip.text(PICTURES.float(), tokens=5).edit({"a0.h0@word": 0})
    assert edited.activations(CLEAN, "a0.h0")["a0.h0"][:, 1:4].abs().max() == 0
    with pytest.raises(DataError, match=r"of 4 tokens.*those of 5.*tokens=4"):
        edited.edit({"a1.h0@2": 0}).activations("my cat", "logits")


def test_images_are_those_of_the_image_tower(clip: cv.Model, text: cv.Model, tmp_path: Path) -> None:
    for name in ("cat.png", "dog.png"):
        Image.effect_noise((40, 40), 90).convert("RGB").save(tmp_path / name)
    found = clip.text(tmp_path)
    assert found.classes == ("cat.png", "dog.png")
    features = clip.activations(tmp_path, "logits")["logits"]
    assert found.head is not None
    assert found.head.weight is not None
    assert_close(found.head.weight, nn.functional.normalize(features, dim=-1), 1e-6)
    assert not clip.text().has_classes
    again = clip.with_prompts(["a cat", "a dog"]).text(PICTURES.float())
    assert again.weights_hash == text.weights_hash != found.weights_hash
    with pytest.raises(DataError, match=r"two images are called cat\.png"):
        clip.text([tmp_path / "cat.png", tmp_path / "cat.png"])


def test_a_text_tower_is_kept(text: cv.Model, tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(text))
    circuit = cv.attribute(again, task(), "eap").top(9)
    circuit.save(tmp_path / "circuit.json")
    assert cv.Circuit.load(tmp_path / "circuit.json").provenance.weights == text.weights_hash


def test_figures_show_words_in_place_of_patches(text: cv.Model) -> None:
    maps = maps_of(text, task())
    assert maps.grid == (5, 1)
    sides = maps.sides["clean"].image, maps.sides["corrupt"].image
    assert sides[0].shape == (5 * CELL[1], CELL[0], 3)
    differing = (sides[0] != sides[1]).any(axis=(1, 2)).reshape(5, -1).any(axis=1)
    assert differing.tolist() == [False, False, False, True, False]
    assert (maps.sides["clean"].heads["a1.h0"].pattern[0, 1:] == 0).all()
    page = cv.attention_page(text, CLEAN).html()
    assert CLEAN[0] in page


def test_the_command_line_takes_sentences_for_paths(
    clip: cv.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.effect_noise((40, 40), 90).convert("RGB").save(tmp_path / "cat.png")
    monkeypatch.setattr(cv, "load", lambda *names, **options: clip)
    model = load_model(ModelOptions("micro", text=tmp_path))
    assert model.classes == ("cat.png",)
    assert task(Path("a red cat"), Path("a red dog"), metric=cv.logit(0)).prepare(model).clean.names == (
        "a red cat",
    )
    with pytest.raises(OptionError, match="leave out --prompt"):
        load_model(ModelOptions("micro", text=tmp_path, prompt=["a cat"]))
