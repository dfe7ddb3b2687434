"""Convert a sparse autoencoder or transcoder of ViT-Prisma into a dictionary of circuitvit.

    python examples/convert_prisma_sae.py weights.pt config.json dictionary.safetensors

ViT-Prisma saves pickles, which could run code. This script runs apart from the library and opens them with
`weights_only=True`, so that nothing but tensors comes out. A file that holds its configuration as an object
as well cannot be opened so; it says what to do about it.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import circuitvit as cv
from circuitvit.graph.files import read_json

AGAIN = """
    loaded = torch.load("{path}", weights_only=False)
    torch.save(loaded["state_dict"], "weights.pt"), loaded["cfg"].save_config("config.json")"""


def main(weights: Path, config: Path, out: Path) -> cv.Dictionary:
    """Convert one file.

    Args:
        weights: the `.pt` file, a state dict.
        config: the `config.json` beside it.
        out: the safetensors file to write.

    Raises:
        SystemExit: saying what stands in the way.
    """
    tensors = tensors_of(weights)
    try:
        said = read_json(config)
        with tempfile.TemporaryDirectory() as folder:
            save_file(as_saelens(tensors), Path(folder) / "sae_weights.safetensors")
            (Path(folder) / "cfg.json").write_text(json.dumps(settings(said)))
            dictionary = cv.load_dictionary(folder)
    except cv.CircuitViTError as error:
        raise SystemExit(f"{weights} cannot be converted: {str(error).split(': ', 1)[-1]}") from error
    dictionary.save(out)
    print(f"{out}: {dictionary}")
    return dictionary


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which holds nothing else."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        raise SystemExit(
            f"{path} holds more than tensors, and opening it would run {asked}. If you trust it, save it "
            f"again where ViT-Prisma is installed:\n{AGAIN.format(path=path)}"
        ) from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(loaded, Mapping) or not all(isinstance(each, Tensor) for each in loaded.values()):
        raise SystemExit(f"{path} is no state dict: it holds a {type(loaded).__name__} of more than tensors")
    return {name: each.contiguous() for name, each in loaded.items()}


def as_saelens(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with one decoder's bias: a transcoder subtracts one from its input, and adds another."""
    if not {"W_enc", "b_enc", "b_dec", "b_dec_out"} <= tensors.keys():
        return tensors
    rest = {name: each for name, each in tensors.items() if name != "b_dec_out"}
    offset = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
    return {**rest, "b_enc": offset, "b_dec": tensors["b_dec_out"]}


def settings(said: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of ViT-Prisma under the names of SAELens, from whose older versions it comes."""
    kept = ("activation_fn_str", "activation_fn_kwargs", "normalize_activations", "d_in", "model_name")
    transcoder, layer = bool(said.get("is_transcoder")), said.get("hook_point_layer")
    hook = f"blocks.{layer}.{said.get('layer_subtype')}"
    if transcoder:
        hook = f"blocks.{said.get('out_hook_point_layer')}.{said.get('layer_out_subtype')}"
    return {
        **{name: said[name] for name in kept if name in said},
        "architecture": "transcoder" if transcoder else said.get("architecture", "standard"),
        "apply_b_dec_to_input": not transcoder,
        "hook_name": hook,
        "hook_head_index": said.get("hook_point_head_index"),
    }


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
