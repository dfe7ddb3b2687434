"""What models of other libraries can be asked for, and what stands in its place here.

`Model` looks here for a name that it does not have, so that a habit of TransformerLens, ViT-Prisma, nnsight,
captum or plain torch ends in a sentence that says what to write. It stays an `AttributeError`: what asks with
`hasattr`, copies or pickles is answered as ever.
"""

from __future__ import annotations

READ = "activations are read by name, images first: model.activations(images, ['resid3', 'a5.h2.pattern'])"
CHANGE = "what a site becomes is said by an edit, which gives another model: model.edit({'a5.h2': 0})"
PARTS = "its parts are nodes and sites: model.graph.nodes, model.stages and model.sites() list them"
WEIGHTS = "the weights are the module's own: model.module.state_dict()"
SHAPE = (
    "sizes are those of its parts: model.graph (layers and heads), model.d_model, model.n_tokens, "
    "model.n_logits, model.preprocessing"
)
PREDICTS = "calling it gives the logits, (image, class): model(images), or model(images, grad=True)"
SCORES = "edges are scored by a function: cv.attribute(model, task, 'eap-ig')"
FIXED = "it is not trained: train the module, then cv.wrap(module)"
STAYS = "it stays where it was loaded: cv.load(..., device='cuda'), or cv.wrap(module.to('cuda'))"

COUNTERPARTS: dict[str, str] = {
    # TransformerLens, ViT-Prisma
    "run_with_cache": READ,
    "cache_all": READ,
    "cache_some": READ,
    "get_caching_hooks": READ,
    "run_with_hooks": CHANGE,
    "add_hook": CHANGE,
    "add_perma_hook": CHANGE,
    "hooks": CHANGE,
    "reset_hooks": "nothing is hooked: an edit gives another model, and this one stays as it is",
    "hook_dict": PARTS,
    "hook_points": PARTS,
    "blocks": PARTS,
    "cfg": SHAPE,
    "W_Q": WEIGHTS,
    "W_K": WEIGHTS,
    "W_V": WEIGHTS,
    "W_O": WEIGHTS,
    "W_E": WEIGHTS,
    "W_U": WEIGHTS,
    "W_pos": WEIGHTS,
    "W_in": WEIGHTS,
    "W_out": WEIGHTS,
    "to_tokens": "images are what it takes: give files or tensors; model.token_kinds(n) says what tokens are",
    "from_pretrained": "models are loaded by name: cv.load('vit_tiny_patch16_224', pretrained=True)",
    "fold_layer_norm": "norms stay as they are: nothing has to be folded",
    # nnsight
    "trace": READ,
    "scan": PARTS,
    "save": "models are not saved: save their module's weights; circuits, scores and maps have .save(path)",
    "output": READ,
    "input": READ,
    # captum
    "attribute": SCORES,
    "interpret": SCORES,
    # torch and timm
    "register_forward_hook": CHANGE,
    "register_forward_pre_hook": CHANGE,
    "register_full_backward_hook": SCORES,
    "forward": PREDICTS,
    "forward_features": "the stream after each block is read by name: model.activations(images, ['resid*'])",
    "predict": PREDICTS,
    "eval": "it is in evaluation mode always",
    "train": FIXED,
    "requires_grad_": FIXED,
    "load_state_dict": FIXED,
    "to": STAYS,
    "cuda": STAYS,
    "cpu": STAYS,
    "half": "numbers are chosen when it is loaded: cv.load(..., dtype=torch.float16)",
    "float": "numbers are chosen when it is loaded: cv.load(..., dtype=torch.float32)",
    "parameters": "the weights are the module's own: model.module.parameters()",
    "named_parameters": "the weights are the module's own: model.module.named_parameters()",
    "named_modules": PARTS,
    "modules": PARTS,
    "children": PARTS,
    "state_dict": WEIGHTS,
    "config": SHAPE,
    "num_classes": "it is called model.n_logits here, with their names in model.classes",
}
"""A name, and what to do instead; none of them is an attribute of `Model`."""


def missing(name: str) -> str:
    """What is said where a model is asked for a name that it does not have.

    Example:
        >>> missing("eval")
        "'Model' object has no attribute 'eval': it is in evaluation mode always"
    """
    return f"'Model' object has no attribute {name!r}: {COUNTERPARTS[name]}"
