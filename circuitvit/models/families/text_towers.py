"""The text towers of CLIP and SigLIP, as OpenAI's `clip`, `open_clip`, `transformers` and this library have
them.

A sentence is read at one token: the end of the text, behind which padding is not seen by anything under a
causal mask, so that sentences are trimmed to it; or, in SigLIP, whose tokens all see each other, at the last
of a fixed number, and padding is a part of the sentence.

Radford et al. 2021, "CLIP", arXiv:2103.00020; Zhai et al. 2023, "Sigmoid loss for language image
pre-training", arXiv:2303.15343.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from circuitvit.errors import DataError, ModelError, UnsupportedModelError, counted
from circuitvit.models.attention import AttentionStage
from circuitvit.models.families import clip_towers, hf_vit, timm_vit
from circuitvit.models.families.family import Family, Grid
from circuitvit.models.parts import Derived, Linear, Readout, norm_of
from circuitvit.models.stages import Stage
from circuitvit.models.words import TextFamily, lines
from circuitvit.models.zoo import InputSpec

Tokens = Int64[Tensor, "sentence token"]


class TextTower(TextFamily):
    """What they have in common: where a sentence is read, and what cosines are multiplied with."""

    # -- sentences to features -----------------------------------------------------------------------

    def run(self, module: Any, images: Float[Tensor, "batch 1 1 token"]) -> Float[Tensor, "batch width"]:
        tokens = self.tokens(module, images)
        padding = max(0, self.length(module, tokens.shape[1]) - tokens.shape[1])
        return self.features(module, F.pad(tokens, (0, padding), value=self.padding))

    def tokens(self, module: Any, images: Float[Tensor, "batch 1 1 token"]) -> Tokens:
        """The numbers of tokens of sentences.

        Raises:
            DataError: for too many of them, numbers that there are none of, or an end that is not the last.
        """
        tokens, context, known = (
            images[:, 0, 0].long(),
            self.context(module),
            self.table(module).num_embeddings,
        )
        count = tokens.shape[1]
        if count > context or (self.whole(module) and count < context):
            most = "" if self.whole(module) else "at most "
            raise DataError(
                f"{counted(count, 'token')} in a sentence, and {type(module).__name__} takes {most}{context}"
            )
        if wrong := [each for each in (int(tokens.min()), int(tokens.max())) if not 0 <= each < known]:
            raise DataError(
                f"there is no token {wrong[0]}: {type(module).__name__} has {known}, so that the tokenizer "
                "is that of another model"
            )
        if not self.whole(module):
            places = self.read_at(module, tokens)
            for place in places[places != count - 1].tolist():
                raise DataError(
                    f"{type(module).__name__} reads a sentence of {counted(count, 'token')} at its token "
                    f"{place + 1}, not at the last: it has to end where the text ends, and nowhere else"
                )
        return tokens

    padding = 0
    """The number of a token that is put behind the end, where the module needs as many as its context."""

    @abstractmethod
    def table(self, module: Any) -> nn.Embedding:
        """What each token is for the model."""

    @abstractmethod
    def features(self, module: Any, tokens: Tokens) -> Float[Tensor, "sentence width"]:
        """What the module itself gives for sentences."""

    @abstractmethod
    def read_at(self, module: Any, tokens: Tokens) -> Int64[Tensor, " sentence"]:
        """The place at which each sentence is read, in a tower that does not read padding."""

    def length(self, module: Any, count: int) -> int:
        """How many tokens the module's own forward has to be given for this many."""
        return count

    # -- similarity ----------------------------------------------------------------------------------

    def scale(self, module: Any) -> Float[Tensor, ""]:
        return _number(module, "logit_scale").exp()

    def bias(self, module: Any) -> Float[Tensor, ""] | None:
        return None if getattr(module, "logit_bias", None) is None else _number(module, "logit_bias")

    # -- as a model ----------------------------------------------------------------------------------

    like: Family
    """The family of image towers that has blocks like its own."""

    @abstractmethod
    def places(self, module: Any) -> Float[Tensor, "token d_model"]:
        """What is added for its place, by place."""

    @abstractmethod
    def end(self, module: Any) -> int:
        """The number of the token that ends a sentence."""

    def causal(self, module: Any) -> bool:
        """Whether a token sees itself and those before it alone."""
        return not self.whole(module)

    def embed(self, module: Any, images: Tensor) -> Tensor:
        tokens = self.tokens(module, images)
        embedded: Tensor = self.table(module)(tokens) + self.places(module)[: tokens.shape[1]]
        return embedded

    def block(self, module: Any, block: Any, layer: int, where: str) -> tuple[Stage, ...]:
        first, *others = self.like.block(module, block, layer, where)
        if not self.causal(module):
            return first, *others
        assert isinstance(first, AttentionStage), "the first stage of a block is its attention"
        derived, like = Derived(), first.attention.out.full_weight
        added = partial(_mask, self.context(module), like, derived)
        masked = replace(first.attention, added=added, derived=derived)
        return AttentionStage(layer, first.norm, masked, first.gamma), *others

    @abstractmethod
    def readout_parts(self, module: Any) -> Readout:
        """The norm, and the projection of the token that is read."""

    def readout(self, module: Any, stream: Tensor) -> Tensor:
        return self.readout_parts(module)(stream)

    def classifies(self, module: Any) -> bool:
        return False

    def prefix(self, module: Any) -> tuple[str, ...]:
        return ()

    def grid(self, module: Any, height: int, width: int) -> Grid:
        return lines(width)

    def resizable(self, module: Any) -> bool:
        return not self.whole(module)

    def sample(self, module: Any, spec: InputSpec) -> Float[Tensor, "2 1 1 token"]:
        table, end, count = self.table(module), self.end(module), self.context(module)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(table.num_embeddings - 1, (2, 1, 1, count), generator=generator)
        drawn += drawn >= end  # any but the end
        drawn[..., -1] = end
        return drawn.to(table.weight.device, table.weight.dtype)

    def blank(self, module: Any, shape: Sequence[int]) -> Tensor:
        blank = torch.zeros(1, *shape, device=self.table(module).weight.device)
        blank[..., -1] = self.end(module)
        return blank.to(self.table(module).weight.dtype)


class OpenAIText(TextTower):
    """The text side of OpenAI's `clip.model.CLIP`, whose parts are the module's own."""

    like = clip_towers.OPENAI

    def tower(self, module: Any) -> Any:
        """What holds the parts of the text tower."""
        return module

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(self.tower(module).transformer.resblocks)

    def token_first(self, module: Any) -> bool:
        return True

    def table(self, module: Any) -> nn.Embedding:
        return self.tower(module).token_embedding  # type: ignore[no-any-return]

    def places(self, module: Any) -> Tensor:
        return self.tower(module).positional_embedding  # type: ignore[no-any-return]

    def end(self, module: Any) -> int:
        return self.table(module).num_embeddings - 1  # the highest number

    def readout_parts(self, module: Any) -> Readout:
        tower = self.tower(module)
        norm, none = norm_of(tower.ln_final, "ln_final"), norm_of(nn.Identity(), "none")
        last = nn.Identity() if tower.text_projection is None else tower.text_projection
        head = last if isinstance(last, nn.Module) else Linear(last, transposed=True)
        return Readout(norm, self.read(module), none, (head,), ("text_projection",))

    def read(self, module: Any) -> Any:
        """From the normed stream to the token at which a sentence is read."""
        return _last

    def unused(self, module: Any) -> Sequence[nn.Module]:
        image = module.visual  # of whose first convolution the module asks for the dtype
        return [part for name, part in image.named_children() if name != "conv1"]

    def context(self, module: Any) -> int:
        return len(self.places(module))

    def features(self, module: Any, tokens: Tokens) -> Tensor:
        return module.encode_text(tokens)  # type: ignore[no-any-return]

    def read_at(self, module: Any, tokens: Tokens) -> Tensor:
        return tokens.argmax(dim=1)  # the end is the highest number


class OpenClipText(OpenAIText):
    """The text side of `open_clip.model.CLIP`: the module itself, or `.text` of a `CustomTextCLIP`."""

    like = clip_towers.OPEN_CLIP

    def tower(self, module: Any) -> Any:
        return getattr(module, "text", module)

    def token_first(self, module: Any) -> bool:
        return not getattr(self.tower(module).transformer, "batch_first", False)

    def causal(self, module: Any) -> bool:
        return self.tower(module).attn_mask is not None

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        if self.pooling(module) in ("argmax", "eos") and not self.causal(module):
            raise UnsupportedModelError(
                "the text tower reads a sentence at its end and sees what is behind it (no_causal_mask), so "
                "that padding takes part: as a model it is not supported"
            )
        return super().blocks(module)

    def end(self, module: Any) -> int:
        return super().end(module) if self.pooling(module) != "eos" else self._own_end(module)

    def _own_end(self, module: Any) -> int:
        tower = self.tower(module)
        return int(tower.text_eos_id if tower is module else tower.eos_id)

    def read(self, module: Any) -> Any:
        return _beginning if self.pooling(module) == "first" else _last

    def unused(self, module: Any) -> Sequence[nn.Module]:
        return (module.visual,)

    def pooling(self, module: Any) -> str:
        """How the tokens become one vector: "argmax", "eos", "last", "first"."""
        tower = self.tower(module)
        return str(tower.text_pool_type if tower is module else tower.pool_type)

    def refuse(self, module: Any) -> None:
        tower = self.tower(module)
        if tower is not module and type(tower).__name__ != "TextTransformer":
            raise UnsupportedModelError(
                f"text of {type(module).__name__} is a {type(tower).__name__}: prompts are known of "
                "open_clip's own TextTransformer"
            )
        for switch in ("cls_emb", "use_pad_mask"):
            if getattr(tower, switch, None) not in (None, False):
                raise UnsupportedModelError(f"the text tower has {switch}, which is not supported")
        if getattr(tower, "output_tokens", False) or self.pooling(module) == "none":
            raise UnsupportedModelError("the text tower gives more than one vector for a sentence")

    def whole(self, module: Any) -> bool:
        return self.tower(module).attn_mask is None or self.pooling(module) not in ("argmax", "eos")

    def features(self, module: Any, tokens: Tokens) -> Tensor:
        return module.encode_text(tokens)  # type: ignore[no-any-return]

    def read_at(self, module: Any, tokens: Tokens) -> Tensor:
        if self.pooling(module) == "argmax":
            return tokens.argmax(dim=1)
        return _first(tokens, self._own_end(module))

    def length(self, module: Any, count: int) -> int:
        return self.context(module)  # its positions and its mask are not cut


class HFClipText(TextTower):
    """The text side of transformers' `CLIPModel`."""

    like = hf_vit.CLIP_TOWER

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(module.text_model.encoder.layers)

    def table(self, module: Any) -> nn.Embedding:
        return module.text_model.embeddings.token_embedding  # type: ignore[no-any-return]

    def places(self, module: Any) -> Tensor:
        return module.text_model.embeddings.position_embedding.weight  # type: ignore[no-any-return]

    def end(self, module: Any) -> int:
        own = int(getattr(module.text_model, "eos_token_id", 2))
        return self.table(module).num_embeddings - 1 if own == 2 else own

    def readout_parts(self, module: Any) -> Readout:
        norm = norm_of(module.text_model.final_layer_norm, "final_layer_norm")
        none, head = norm_of(nn.Identity(), "none"), self.projection(module)
        return Readout(norm, _last, none, (head,), ("text_projection",))

    def projection(self, module: Any) -> nn.Module:
        """What comes last."""
        return module.text_projection  # type: ignore[no-any-return]

    def unused(self, module: Any) -> Sequence[nn.Module]:
        return (module.vision_model,)

    def settle(self, module: Any, spec: InputSpec) -> None:
        self.like.settle(module, spec)

    def context(self, module: Any) -> int:
        return len(self.places(module))

    def features(self, module: Any, tokens: Tokens) -> Tensor:
        given = module.get_text_features(input_ids=tokens)
        return given if isinstance(given, Tensor) else given.pooler_output

    def read_at(self, module: Any, tokens: Tokens) -> Tensor:
        end = getattr(module.text_model, "eos_token_id", 2)
        return (
            tokens.argmax(dim=1) if end == 2 else _first(tokens, end)
        )  # 2: as OpenAI's own, whatever the end


class SiglipText(HFClipText):
    """The text side of transformers' `SiglipModel` and `Siglip2Model`, without a causal mask."""

    like = hf_vit.SIGLIP

    def projection(self, module: Any) -> nn.Module:
        return module.text_model.head  # type: ignore[no-any-return]

    def kinds(self, prefix: Sequence[str], count: int) -> tuple[str, ...]:
        return (*("word",) * (count - 1), "end")

    def whole(self, module: Any) -> bool:
        return True

    def read_at(self, module: Any, tokens: Tokens) -> Tensor:
        return tokens.new_full((len(tokens),), tokens.shape[1] - 1)


class OwnText(TextTower):
    """The text side of `clip-tiny`: a `ClipModule`, whose text tower is its `text`."""

    like = timm_vit.FAMILY

    def blocks(self, module: Any) -> Sequence[nn.Module]:
        return tuple(module.text.blocks)

    def table(self, module: Any) -> nn.Embedding:
        return module.text.token_embedding  # type: ignore[no-any-return]

    def places(self, module: Any) -> Tensor:
        return module.text.positional_embedding  # type: ignore[no-any-return]

    def end(self, module: Any) -> int:
        return int(module.text.end)

    def causal(self, module: Any) -> bool:
        return bool(module.text.causal)

    def readout_parts(self, module: Any) -> Readout:
        norm, none = norm_of(module.text.norm, "norm"), norm_of(nn.Identity(), "none")
        return Readout(norm, _last, none, (module.text.projection,), ("projection",))

    def unused(self, module: Any) -> Sequence[nn.Module]:
        return (module.visual,)

    def context(self, module: Any) -> int:
        return int(module.text.context)

    def features(self, module: Any, tokens: Tokens) -> Tensor:
        return module.text(tokens)  # type: ignore[no-any-return]

    def read_at(self, module: Any, tokens: Tokens) -> Tensor:
        return _first(tokens, module.text.end)


OPENAI, OPEN_CLIP, HF_CLIP, SIGLIP, OWN = (
    OpenAIText(), OpenClipText(), HFClipText(), SiglipText(), OwnText()
)  # fmt: skip


def _first(tokens: Tokens, number: int) -> Int64[Tensor, " sentence"]:
    """Where a number is first in each sentence; 0 where it is not."""
    return (tokens == number).int().argmax(dim=1)


def _number(module: Any, name: str) -> Float[Tensor, ""]:
    found: Tensor = getattr(module, name)
    if found.numel() != 1:
        raise ModelError(f"{name} of {type(module).__name__} is {tuple(found.shape)}, not one number")
    return found.reshape(())


def _last(normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
    return normed[:, -1:]


def _beginning(normed: Tensor) -> Float[Tensor, "batch 1 d_model"]:
    return normed[:, :1]


def _mask(count: int, like: Tensor, derived: Derived, heads: Sequence[int]) -> Float[Tensor, "head key key"]:
    """What hides from each token those after it, in every head."""
    mask = derived.get("added", (like,), lambda: like.new_full((count, count), -torch.inf).triu(1))
    return mask.expand(len(heads), -1, -1)
