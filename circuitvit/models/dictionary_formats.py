"""Dictionaries of other libraries, by the names of their tensors: each becomes ours, or is refused by name.

What a library does to an activation before it is encoded is folded into encoder and offset, and what it does
to features before they are decoded into the decoder:

* the encoder of x - b is the encoder of x with another offset, less by encoder b;
* features times a scale s before the decoder are decoder rows times s;
* a gate, which is open where e x + g > 0 and lets through the positive part of r (e x) + m, with r > 0 for
  each feature, is a threshold: r (e x) + m > m - r g says the same (Rajamanoharan et al. 2024,
  arXiv:2404.16014).

Folding is done in float64. What divides each activation by its own length or spread cannot be folded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from circuitvit.errors import FileError
from circuitvit.models.dictionaries import Dictionary, DictionaryKind

Tensors = Mapping[str, Tensor]
Said = Mapping[str, Any]

SAELENS = {
    "W_enc": "wf",
    "W_dec": "fw",
    "b_enc": "f",
    "b_dec": "w",
    "threshold": "f",
    "b_gate": "f",
    "b_mag": "f",
    "r_mag": "f",
    "scaling_factor": "f",
}
"""What SAELens calls its tensors, and others after it; sides are features "f" and the width "w"."""

OVERCOMPLETE = {
    "dictionary._weights": "fw",
    "dictionary.multiplier": "",
    "encoder.final_block.0.weight": "fw",
    "encoder.final_block.0.bias": "f",
    "encoder.weight": "fw",
    "encoder.bias": "f",
    "thresholds": "f",
}
"""What is in the state of overcomplete's SAE, TopKSAE and JumpSAE with a linear encoder."""


def dictionary_of(tensors: Tensors, said: Said) -> Dictionary:
    """The dictionary that another library's tensors stand for.

    Args:
        tensors: by the names that the library gives them, as `layout_of` knows them.
        said: what is said of it, under the names of SAELens' configurations; `kind` and `site` are ours.

    Raises:
        FileError: naming what is not known, not said, or cannot be folded.
        OptionError: as `Dictionary`, for tensors that do not fit each other.
        ModelError: likewise, for numbers that are NaN or infinite.
    """
    exact = any(each.dtype == torch.float64 for each in tensors.values())
    given = {name: each.detach().to(torch.float64) for name, each in tensors.items()}
    found = _saelens(given, said) if "W_enc" in given else _overcomplete(given, said)
    return found.to(dtype=torch.float64 if exact else torch.float32)


def layout_of(names: set[str]) -> dict[str, str]:
    """The sides of tensors of these names, if they are a dictionary's.

    Raises:
        FileError: naming one that is not known, or that no dictionary of ours can stand for.
    """
    theirs = SAELENS if {"W_enc", "W_dec"} <= names else OVERCOMPLETE
    if not theirs.keys() & names or (theirs is OVERCOMPLETE and "dictionary._weights" not in names):
        raise FileError(
            f"no dictionary that is known here: its tensors are {', '.join(sorted(names)[:6]) or 'none'}, "
            "and SAELens' are called W_enc, W_dec, ..., overcomplete's dictionary._weights, ..."
        )
    for name in sorted(names - set(theirs)):
        raise FileError(f"the tensor {name} is not known: {_why(name, theirs)}")
    return {name: sides for name, sides in theirs.items() if name in names}


def _why(name: str, theirs: Mapping[str, str]) -> str:
    """What to do about a tensor that no dictionary has."""
    if name == "W_skip":
        return "a transcoder that also writes a linear map of what it reads is more than its features"
    if name.startswith("encoder."):
        return "an encoder with norms or hidden layers is not one linear map"
    if name.startswith("dictionary."):
        return "of an archetypal dictionary, save sae.get_dictionary() as dictionary._weights"
    return f"known are {', '.join(theirs)}"


# -- SAELens -------------------------------------------------------------------------------------

_KINDS: dict[str, DictionaryKind] = {
    "standard": "relu",
    "gated": "jumprelu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
}
"""The architectures that are dictionaries of ours."""


def _saelens(tensors: Tensors, said: Said) -> Dictionary:
    architecture = _architecture(tensors, said)
    _refuse_unfolded(tensors, said)
    kind, reads_input = _KINDS[architecture], architecture.endswith("transcoder")
    kind = "topk" if _function(said) == "topk" else kind
    encoder, decoder = tensors["W_enc"].mT, tensors["W_dec"]
    bias = tensors.get("b_dec", decoder.new_zeros(decoder.shape[-1:]))
    threshold = None
    if architecture == "gated":
        scale, offset = _needed(tensors, "r_mag").exp(), _needed(tensors, "b_mag")
        encoder, threshold = encoder * scale[:, None], offset - scale * _needed(tensors, "b_gate")
    else:
        offset = tensors.get("b_enc", encoder.new_zeros(encoder.shape[:1]))
        threshold = _needed(tensors, "threshold") if kind == "jumprelu" else None
    if not reads_input and _is_centred(said, bias):
        offset = offset - encoder @ bias
    if kind == "topk" and said.get("rescale_acts_by_decoder_norm"):
        norms = decoder.norm(dim=1)
        encoder, offset, decoder = encoder * norms[:, None], offset * norms, decoder / norms[:, None]
    return Dictionary(
        encoder,
        offset,
        decoder,
        bias,
        kind,
        None if threshold is None else threshold.clamp(min=0),  # there it comes after a relu
        _k(said) if kind == "topk" else None,
        "input" if reads_input else "output",
        _site(said),
        card=_card(said, "SAELens"),
    )


def _architecture(tensors: Tensors, said: Said) -> str:
    """What SAELens calls such a dictionary.

    Where nothing is said, a threshold and a gate speak for themselves, and relu or top-k must be said by
    whoever loads it.
    """
    name, function = said.get("architecture"), _function(said)
    if name is None:
        own = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}
        gate = "gated" if "b_gate" in tensors else "jumprelu" if "threshold" in tensors else None
        said_kind = "topk" if said.get("k") is not None else said.get("kind")
        name = gate or own.get(str(said_kind)) or ("standard" if "d_in" in said else None)
        if name is None:
            raise FileError("it does not say what it is: load it with kind='relu', or with k= for a top-k")
    if name not in _KINDS:
        raise FileError(f"the architecture {name!r} is no dictionary here: known are {', '.join(_KINDS)}")
    if function == "topk" and name not in ("standard", "topk", "transcoder"):
        raise FileError(f"the architecture {name} with the activation function topk is not known")
    return str(name)


def _function(said: Said) -> str:
    """The activation function, which files from before version 6 say apart from the architecture."""
    function = said.get("activation_fn", said.get("activation_fn_str", "relu"))
    if function not in ("relu", "topk"):
        raise FileError(f"activation_fn {function!r}: only relu, jumprelu and topk are dictionaries here")
    return str(function)


_FOLDED_BY = {
    "expected_average_only_in": "sae.fold_activation_norm_scaling_factor(factor)",
    "covariance_whitening": "sae.fold_activation_whitening(...)",
}
"""How SAELens folds what it can fold itself, once it has seen activations."""


def _refuse_unfolded(tensors: Tensors, said: Said) -> None:
    norm = said.get("normalize_activations") or "none"
    norm = "expected_average_only_in" if norm is True else norm  # so before version 6
    if norm in _FOLDED_BY:
        raise FileError(
            f"normalize_activations={norm!r} needs numbers that are not in the file: fold them in SAELens by "
            f"{_FOLDED_BY[norm]} and save it again"
        )
    if norm != "none":
        raise FileError(
            f"normalize_activations={norm!r} divides each activation by its own length or spread, which "
            "cannot be folded into a dictionary"
        )
    factor = tensors.get("scaling_factor")
    if said.get("finetuning_scaling_factor") or (factor is not None and not (factor == 1).all()):
        raise FileError("finetuning_scaling_factor: fold scaling_factor into W_dec and save it again")


def _is_centred(said: Said, bias: Tensor) -> bool:
    """Whether the decoder's bias is subtracted from activations before they are encoded."""
    centred = said.get("apply_b_dec_to_input")
    if isinstance(centred, bool):
        return centred
    if centred is not None:
        raise FileError(f"apply_b_dec_to_input (centred=) is true or false, not {centred!r}")
    if "architecture" in said or "d_in" in said:  # a configuration, whose default it is
        return True
    if bias.any():
        raise FileError(
            "it does not say whether b_dec is subtracted before the encoder: load it with centred=True or "
            "centred=False"
        )
    return False


def _k(said: Said) -> int:
    inner = said.get("activation_fn_kwargs")
    k = said.get("k", inner.get("k") if isinstance(inner, Mapping) else None)
    if isinstance(k, bool) or not isinstance(k, int):
        raise FileError(f"the k of a top-k dictionary is a whole number, not {k!r:.40}: load it with k=")
    return k


def _needed(tensors: Tensors, name: str) -> Tensor:
    if name not in tensors:
        raise FileError(f"there is no tensor {name}, which this architecture needs")
    return tensors[name]


_HOOKS = (
    (r"blocks\.(\d+)\.hook_mlp_out", "m{0}"),
    (r"blocks\.(\d+)\.hook_resid_pre", "resid{0}"),
    (r"blocks\.(\d+)\.hook_resid_mid", "mid{0}"),
    (r"blocks\.(\d+)\.hook_resid_post", "resid{1}"),
    (r"blocks\.(\d+)\.attn\.hook_z", "a{0}.h{2}.z"),
)
"""Names of TransformerLens and ViT-Prisma, and ours: {1} is the next layer, {2} the head."""


def _site(said: Said) -> str | None:
    """The site that a dictionary was trained on, as far as its hook has a name here."""
    if isinstance(said.get("site"), str):
        return str(said["site"])
    inner = said.get("metadata")
    all_said = {**said, **(inner if isinstance(inner, Mapping) else {})}
    hooks = [all_said.get(name) for name in ("hook_name_out", "hook_name", "hook_point")]
    hook = next((each for each in hooks if isinstance(each, str)), "")
    head = all_said.get("hook_head_index", all_said.get("hook_point_head_index"))
    for pattern, name in _HOOKS:
        match = re.fullmatch(pattern, hook)
        if match and (head is not None) == ("{2}" in name):
            return name.format(match[1], int(match[1]) + 1, head)
    return None


def _card(said: Said, library: str) -> dict[str, Any]:
    return {"from": library, **{name: value for name, value in said.items() if name not in ("kind", "site")}}


# -- overcomplete --------------------------------------------------------------------------------


def _overcomplete(tensors: Tensors, said: Said) -> Dictionary:
    inner = "encoder.final_block.0." if "encoder.final_block.0.weight" in tensors else "encoder."
    decoder = tensors["dictionary._weights"]
    _refuse_moved(decoder, said)
    if "dictionary.multiplier" in tensors:
        decoder = decoder * tensors["dictionary.multiplier"].exp()
    encoder = tensors.get(f"{inner}weight", decoder)  # a tied one
    threshold = tensors.get("thresholds")
    k = said.get("k", said.get("top_k"))
    kind: Any = "jumprelu" if threshold is not None else "topk" if k is not None else said.get("kind")
    if kind is None:
        raise FileError(
            "overcomplete's files do not say what becomes of features: load it with kind='relu' for an SAE, "
            "or with k= for a TopKSAE (its default is a tenth of all features)"
        )
    if threshold is not None:  # what equals it passes there, and not here
        threshold = torch.nextafter(threshold.exp(), torch.zeros_like(threshold))
    return Dictionary(
        encoder,
        tensors.get(f"{inner}bias", decoder.new_zeros(len(decoder))),
        decoder,
        decoder.new_zeros(decoder.shape[-1:]),
        kind,
        threshold,
        _k({"k": k}) if kind == "topk" else None,
        site=_site(said),
        card=_card(said, "overcomplete"),
    )


def _refuse_moved(weights: Tensor, said: Said) -> None:
    """Refuse directions that were saved between a step of training and the normalisation that follows it.

    The library normalises when a dictionary is used, by a way that the file does not say; after `eval()` the
    stored directions are those that are used, whichever way it was, and then some lengths are 1.
    """
    if weights.ndim != 2 or said.get("normalization") == "identity":
        return
    for lengths in (weights.norm(dim=1), weights.norm(p=1, dim=1)):
        if (lengths - 1).abs().max() < 1e-3 or (lengths.max() - 1).abs() < 1e-5:
            return
    raise FileError(
        "its directions are not normalised: save sae.state_dict() after sae.eval(), or say normalization: "
        "identity in the file's metadata if that is what the dictionary was trained with"
    )
