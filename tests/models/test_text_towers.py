"""Text towers as models: sentences in, similarity to images out, edges as hooks on the originals have them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import CircuitViTError, DataError, OptionError, UnsupportedModelError
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
