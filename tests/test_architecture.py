"""The house keeps its shape: data flows one way, and no file can smuggle code in.

Every module of the package is parsed, never imported, so that an import inside a function or under
`if TYPE_CHECKING` counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx
import pytest
import torch

PACKAGE = Path(__file__).resolve().parents[1] / "circuitvit"

# Rooms from the bottom of the house to the top: each imports only from the rooms before it.
ROOMS = (
    "errors",
    "_lazy",
    "_keywords",
    "_lock",
    "_progress",
    "_version",
    "graph",
    "models",
    "datasets",
    "tasks",
    "engine",
    "groundtruth",
    "attribution",
    "pruning",
    "verification",
    "testing",
    "export",
    "views",
    "defences",
    "training",
    "cli",
    "__main__",
)
PUBLIC = "circuitvit"  # the package itself, circuitvit/__init__.py, which may import every room

# Where a room may import less, or other things, than "everything before it".
ALLOWED: dict[str, frozenset[str]] = {
    "graph": frozenset({"errors", "_version"}),  # it knows nothing of models or torch modules
    # Users of the public face, which loads a room when it is first needed.
    "testing": frozenset({PUBLIC, *ROOMS[: ROOMS.index("testing")]}),
    "cli": frozenset({PUBLIC, *ROOMS[: ROOMS.index("cli")]}),
    "__main__": frozenset({"cli"}),
}
# Single files that may reach one room further, each with its reason.
EXCEPTIONS = {
    ("graph/circuit.py", "export"): "Circuit.draw is a convenience that calls the exporters",
    ("verification/certificates.py", "views"): "Certificate.figure is a convenience that calls the view",
    ("verification/cross_effects.py", "views"): "Specificity.figure likewise",
    ("verification/cue.py", "views"): "Audit.figure likewise",
    ("models/model.py", "engine"): "Model.activations is a convenience that calls the engine",
    ("models/model.py", "tasks"): "Model.text is given image files, which tasks read",
}

# Where modules of other libraries are taken apart, built or trained: only there their insides have names.
AT_HOME_IN_MODULES = (
    "models/families/", "groundtruth/compiler.py", "training/",
    "models/zoo/text_tower.py", "models/zoo/clip_module.py",  # which are modules of our own
)  # fmt: skip

# Parts of Vision Transformers as timm, transformers, torchvision and open_clip call them. An `encoder` is not
# among them, as dictionaries have one too; a module's own is found by the name of the module.
FOREIGN_NAMES = """
    attn attn_drop attn_mask attn_pool c_attn c_proj class_embedding class_token cls_token conv_proj
    default_cfg dist_token drop_path drop_path1 drop_path2 dynamic_img_size embed_dim embeddings
    encoder_layer fc1 fc2 fc_norm forward_features forward_head fused_attn global_pool grid_size head_dim
    head_dist head_drop head_hidden_dim hidden_dim hidden_size in_chans in_proj_bias in_proj_weight
    intermediate_size k_norm k_proj layer_norm1 layer_norm2 layer_scale layernorm_after layernorm_before ln_1
    ln_2 ln_post ln_pre ls1 ls2 mlp_head no_embed_class norm1 norm2 norm_pre num_attention_heads num_heads
    num_prefix_tokens num_reg_tokens out_proj patch_drop patch_embed patch_embedding patch_size pos_drop
    pos_embed position_embedding positional_embedding pre_layrnorm pretrained_cfg proj proj_drop q_norm
    q_proj qkv qkv_bias reg_token register_tokens rel_pos_bias relative_position_bias resblocks rope
    self_attention token_embedding v_proj vision_model visual
"""
FOREIGN = frozenset(FOREIGN_NAMES.split())
MODULE_API = frozenset(dir(torch.nn.Module()))
LAYER_API = frozenset({"weight", "bias", "eps"})  # of torch's own layers, which parts are made of
TEXT_API = frozenset(dir(str))

UNSAFE_MODULES = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"})
UNSAFE_BUILTINS = frozenset({"eval", "exec"})


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a module imports.

    `from circuitvit import graph` gives `circuitvit.graph`: the caller tells rooms from other names.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield node.lineno, alias.name
            case ast.ImportFrom(module=source, names=names, level=level):
                parts = module.split(".")
                anchor = parts[: len(parts) - level + is_package] if level else []
                for alias in names:
                    yield node.lineno, ".".join([*anchor, *([source] if source else []), alias.name])
            case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(func).split(
                "."
            )[-1] in {"import_module", "__import__"}:
                yield node.lineno, name


def room_of(dotted: str) -> str | None:
    """The room an absolute name lives in; `PUBLIC` for the package's own face; None for other packages."""
    top, _, rest = dotted.partition(".")
    if top != PUBLIC:
        return None
    room = rest.partition(".")[0]
    return room if room in ROOMS else PUBLIC


def room_violations(path: str, source: str) -> list[str]:
    """The imports of one module, at `path` inside the package, that go up the house."""
    is_package = path.endswith("__init__.py")
    inner = path.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")
    module = f"{PUBLIC}.{inner}" if inner else PUBLIC
    room = room_of(module)
    if path == "__init__.py":
        return []
    if room is None or room == PUBLIC:
        return [f"{path}: belongs to no room; give it a place in ROOMS"]
    allowed = ALLOWED.get(room, frozenset(ROOMS[: ROOMS.index(room)])) | {room}
    return [
        f"{path}:{line}: {room} must not import {dotted}"
        for line, dotted in imported_modules(ast.parse(source), module, is_package)
        if (target := room_of(dotted)) is not None
        and target not in allowed
        and (path, target) not in EXCEPTIONS
    ]


def local_names(tree: ast.AST) -> dict[str, str]:
    """What each imported local name stands for, such as {"load": "torch.load", "np": "numpy"}."""
    stands_for: dict[str, str] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                stands_for |= {alias.asname: alias.name for alias in names if alias.asname}
            case ast.ImportFrom(module=str(origin), names=names, level=0):
                stands_for |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in names}
    return stands_for


def unsafe_uses(path: str, source: str) -> list[str]:
    """Everything in one module that could run code out of a file or a string."""
    tree = ast.parse(source)
    stands_for = local_names(tree)

    def full_name(node: ast.expr) -> str:
        head, dot, rest = ast.unparse(node).partition(".")
        return f"{stands_for.get(head, head)}{dot}{rest}"

    found = [
        f"{path}:{line}: imports {dotted}"
        for line, dotted in imported_modules(tree, PUBLIC, is_package=True)
        if dotted.split(".")[0] in UNSAFE_MODULES
    ]
    for node in ast.walk(tree):
        match node:
            case ast.Name() | ast.Attribute():
                builtin = full_name(node).removeprefix("builtins.")
                if builtin in UNSAFE_BUILTINS:
                    found.append(f"{path}:{node.lineno}: uses the builtin {builtin}")
            case ast.Call(func=func, keywords=keywords):
                values = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
                if full_name(func) == "torch.load" and values.get("weights_only") != "True":
                    found.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
                if values.get("allow_pickle", "False") != "False":
                    found.append(f"{path}:{node.lineno}: {full_name(func)} with allow_pickle")
    return found


def foreign_attributes(path: str, source: str) -> list[str]:
    """Everything in one module of the package that reaches into a module of somebody else's.

    By the names of other libraries' parts, wherever they stand; and by whatever is taken from something
    called `module` that torch's own modules do not have.
    """
    if path.startswith(AT_HOME_IN_MODULES):
        return []
    own = MODULE_API | (LAYER_API if path.startswith("models/") else frozenset())
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=value, attr=name):
                of_module = isinstance(value, (ast.Name, ast.Attribute)) and (
                    ast.unparse(value).split(".")[-1] == "module"
                )
                text = isinstance(value, ast.Name) and name in TEXT_API  # the dotted name of a module
                foreign = name in FOREIGN or (of_module and name not in own and not text)
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                foreign = name in FOREIGN
            case _:
                continue
        if foreign:
            found.append(f"{path}:{node.lineno}: {ast.unparse(node)} belongs to another library's module")
    return found


# Modules that look ahead on purpose: inside a room, everything else is a tree of imports.
LOOK_AHEADS = {
    (
        "circuitvit.graph.circuit",
        "circuitvit.export",
    ): "Circuit.draw is a convenience that calls the exporters",
    (
        "circuitvit.models.model",
        "circuitvit.engine",
    ): "Model.activations is a convenience that calls the engine",
    (
        "circuitvit.models.model",
        "circuitvit.tasks",
    ): "Model.text is given image files, which tasks read",
}
LAZY_FACES = frozenset({"circuitvit", "circuitvit.testing", "circuitvit.datasets"})


def module_name(path: str) -> str:
    """The dotted name of a file of the package, such as `circuitvit.graph` of `graph/__init__.py`."""
    return f"{PUBLIC}.{path.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")


def room_path(dotted: str) -> str:
    """`circuitvit.export` of `circuitvit.export.svg`."""
    return ".".join(dotted.split(".")[:2])


def running(source: str) -> ast.Module:
    """A module without what only type checkers read."""

    class Dropper(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            return (
                node.orelse if ast.unparse(node.test).endswith("TYPE_CHECKING") else self.generic_visit(node)
            )

    tree = Dropper().visit(ast.parse(source))
    assert isinstance(tree, ast.Module)
    return tree


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which module imports which, wherever the import stands; a package is its `__init__`."""
    names = {module_name(path): path for path in sources}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        if name in LAZY_FACES:  # what they name is only imported when it is used
            graph[name] = set()
            continue
        dotted = imported_modules(running(sources[path]), name, path.endswith("__init__.py"))
        wanted = {found if found in names else found.rpartition(".")[0] for _, found in dotted}
        ahead = {target for source, target in LOOK_AHEADS if source == name}
        graph[name] = {each for each in wanted & set(names) - {name} if room_path(each) not in ahead}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which imports all others, by whatever way."""
    found = networkx.strongly_connected_components(networkx.DiGraph(graph))
    return sorted(sorted(group) for group in found if len(group) > 1)


def second_evaluators(path: str, source: str) -> list[str]:
    """Masked runs outside the engine, and classes that measure circuits beside its `Evaluator`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.alias(name="masked_run") | ast.Attribute(attr="masked_run"):
                if not path.startswith("engine/"):
                    found.append(f"{path}:{node.lineno}: runs circuits by itself: ask engine.Evaluator")
            case ast.ClassDef(name=name) if name.endswith("Meter"):
                found.append(f"{path}:{node.lineno}: {name} is a second evaluator")
            case ast.ClassDef(name=name) if name.endswith("Evaluator") and not path.startswith("engine/"):
                found.append(f"{path}:{node.lineno}: {name} is a second evaluator")
    return found


def named_arrays(path: str, source: str) -> list[str]:
    """Dimensions put on `NDArray[...]` where Python runs the line, and not only in a hint that stays text.

    From NumPy 2.5 on this is a name for a type, which jaxtyping refuses: the module could not be imported.
    """
    tree = ast.parse(source)
    fields = {ast.AnnAssign: "annotation", ast.arg: "annotation", ast.FunctionDef: "returns"}
    hints = [getattr(node, fields[type(node)]) for node in ast.walk(tree) if type(node) in fields]
    texts = {id(part) for hint in hints if hint is not None for part in ast.walk(hint)}
    return [
        f"{path}:{node.lineno}: write np.ndarray instead of {ast.unparse(array)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and id(node) not in texts and isinstance(node.slice, ast.Tuple)
        for array, dims in [(node.slice.elts[0], node.slice.elts[-1])]
        if isinstance(array, ast.Subscript) and ast.unparse(array.value).endswith("NDArray")
        if isinstance(dims, ast.Constant) and isinstance(dims.value, str)
    ]


def modules() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def source_of(path: str) -> str:
    return (PACKAGE / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", modules())
def test_rooms_import_only_from_earlier_rooms(path: str) -> None:
    found = room_violations(path, source_of(path))  # apart, so that a failure does not print the source
    assert found == []


@pytest.mark.parametrize("path", modules())
def test_nothing_runs_code_from_files_or_strings(path: str) -> None:
    found = unsafe_uses(path, source_of(path))  # apart, so that a failure does not print the source
    assert found == []


@pytest.mark.parametrize("path", modules())
def test_no_module_needs_an_old_numpy_to_be_imported(path: str) -> None:
    assert named_arrays(path, source_of(path)) == []


@pytest.mark.parametrize("path", modules())
def test_only_families_reach_into_modules_of_other_libraries(path: str) -> None:
    found = foreign_attributes(path, source_of(path))  # apart, so that a failure does not print the source
    assert found == []


def test_no_module_imports_itself_by_a_detour() -> None:
    assert circles(import_graph({path: source_of(path) for path in modules()})) == []


@pytest.mark.parametrize("path", modules())
def test_circuits_are_run_by_one_evaluator(path: str) -> None:
    assert second_evaluators(path, source_of(path)) == []


# The rules themselves, on sources small enough to see the answer.


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/capture.py", "from circuitvit.graph.topology import Graph"),
        ("engine/capture.py", "from .hooks import tap"),
        ("engine/__init__.py", "from .hooks import tap"),
        ("engine/deep/inner.py", "from ..capture import tap\nfrom ...models import stages"),
        ("models/timm_vit.py", "from circuitvit import errors\nimport timm"),
        ("graph/circuit.py", "def draw():\n    from circuitvit.export import svg"),
        ("graph/circuit.py", "from circuitvit._version import __version__"),
        ("cli/__init__.py", "import circuitvit as cv\nfrom circuitvit import Task"),
        ("__main__.py", "from circuitvit.cli import main"),
        ("__init__.py", "from circuitvit.export import svg\nfrom circuitvit.cli import main"),
        ("models/a.py", "import circuitvits.graph\nimport graph"),
    ],
)
def test_imports_down_the_house_are_accepted(path: str, source: str) -> None:
    assert room_violations(path, source) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("graph/names.py", "from circuitvit.models.stages import Stage"),
        ("models/stages.py", "import circuitvit.engine"),
        ("models/stages.py", "import circuitvit"),
        ("models/stages.py", "from circuitvit import Task"),
        ("models/stages.py", "from circuitvit import engine"),
        ("models/stages.py", "from .. import engine"),
        ("models/__init__.py", "from ..engine.runs import tap"),
        ("models/zoo/card.py", "from ...engine import capture"),
        ("models/stages.py", "def late():\n    from circuitvit.tasks import Task"),
        ("models/stages.py", "import importlib\nimportlib.import_module('circuitvit.tasks')"),
        (
            "graph/topology.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from circuitvit.models import Stage",
        ),
        ("graph/topology.py", "from circuitvit.export import svg"),
        ("graph/circuit.py", "from circuitvit.engine import run"),
        ("export/svg.py", "from circuitvit.cli import console"),
        ("helpers.py", "x = 1"),
        ("helpers/__init__.py", ""),
    ],
)
def test_imports_up_the_house_are_found(path: str, source: str) -> None:
    assert len(room_violations(path, source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import ast\nast.literal_eval('1')",
        "import torch\ntorch.load('w.pt', map_location='cpu', weights_only=True)",
        "from safetensors.torch import load_file as load\nload('w.safetensors')",
        "import numpy as np\nnp.load('x.npz', allow_pickle=False)",
        "import json\njson.load(file)",
        "import re\nre.compile('x')",
    ],
)
def test_harmless_code_is_accepted(source: str) -> None:
    assert unsafe_uses("engine/run.py", source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "def late():\n    from pickle import loads",
        "from dill import *",
        "import importlib\nimportlib.import_module('pickle')",
        "eval('1')",
        "exec('x = 1')",
        "list(map(eval, texts))",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import exec as run\nrun('x = 1')",
        "import torch\ntorch.load('w.pt')",
        "import torch\ntorch.load('w.pt', weights_only=False)",
        "import torch\ntorch.load('w.pt', weights_only=flag)",
        "import torch as t\nt.load('w.pt')",
        "from torch import load as read\nread('w.pt')",
        "import numpy as np\nnp.load('x.npy', allow_pickle=True)",
    ],
)
def test_unsafe_code_is_found(source: str) -> None:
    assert len(unsafe_uses("engine/run.py", source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/families/timm_vit.py", "module.patch_embed"),
        ("groundtruth/compiler.py", "block.attn.qkv.weight"),
        ("training/loop.py", "module.blocks"),
        ("models/model.py", "self.module.state_dict(), module.named_parameters(), module.training"),
        ("models/parts.py", "module.weight, self.module.bias"),
        ("views/attention.py", "stage.pattern(reads), model.grid, model.layers"),
        ("cli/library.py", "module.split('.')"),
    ],
)
def test_modules_may_be_used_as_torchs(path: str, source: str) -> None:
    assert foreign_attributes(path, source) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/patching.py", "stage.attention.qkv"),
        ("tasks/groups.py", "model.module.patch_embed"),
        ("models/registry.py", "module.blocks"),
        ("models/stages.py", "self.attention.num_heads"),
        ("views/readout.py", "getattr(model.module, 'head_dist', None)"),
        ("views/readout.py", "hasattr(module, 'attn_pool')"),
        ("views/readout.py", "model.module.head"),
        ("views/readout.py", "model.module.encoder"),
        ("export/maps.py", "model.module.weight"),
    ],
)
def test_reaching_into_modules_is_found(path: str, source: str) -> None:
    assert foreign_attributes(path, source) != []


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"graph/a.py": "from circuitvit.graph import b", "graph/b.py": ""}, []),
        (
            {"graph/a.py": "from circuitvit.graph.b import x", "graph/b.py": "def f():\n    from . import a"},
            [["circuitvit.graph.a", "circuitvit.graph.b"]],
        ),
        (
            {
                "graph/__init__.py": "from circuitvit.graph.a import x",
                "graph/a.py": "from circuitvit.graph import y",
            },
            [["circuitvit.graph", "circuitvit.graph.a"]],
        ),
        (
            {
                "graph/a.py": "from . import b",
                "graph/b.py": "if TYPE_CHECKING:\n    from circuitvit.graph import a",
            },
            [],
        ),
        (
            {
                "graph/circuit.py": "from circuitvit.export import svg",
                "export/svg.py": "import circuitvit.graph.circuit",
            },
            [],
        ),
    ],
)
def test_circles_are_found(sources: dict[str, str], expected: list[list[str]]) -> None:
    assert circles(import_graph(sources)) == expected


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pruning/acdc.py", "from circuitvit.engine import masked_run"),
        ("pruning/acdc.py", "import circuitvit.engine as e\ne.masked_run(sources, mask)"),
        ("verification/meter.py", "class PairMeter:\n    pass"),
        ("engine/meter.py", "class PairMeter:\n    pass"),
        ("verification/meter.py", "class OwnEvaluator(Evaluator):\n    pass"),
    ],
)
def test_second_evaluators_are_found(path: str, source: str) -> None:
    assert len(second_evaluators(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "engine/evaluator.py",
            "from circuitvit.engine.masked import masked_run\nclass Evaluator:\n    pass",
        ),
        (
            "pruning/find.py",
            "from circuitvit.engine import Evaluator\nEvaluator(prepared).faithfulness(mask)",
        ),
    ],
)
def test_the_one_evaluator_is_accepted(path: str, source: str) -> None:
    assert second_evaluators(path, source) == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ('Values = Float[NDArray[np.float64], " edge"]', [1]),
        ('def f(x):\n    return cast(Float[npt.NDArray[np.float64], "edge"], x)', [2]),
        ('def f(x: Float[NDArray[np.float64], "edge"]) -> Float[NDArray[np.float64], "edge"]: ...', []),
        ('class Scores:\n    values: Mapping[str, Float[NDArray[np.float64], "edge"]]', []),
        ('Values = Float[np.ndarray, " edge"]\nPlain = dict[str, NDArray[np.float64]]', []),
    ],
)
def test_dimensions_of_a_named_array_are_found_where_they_are_run(source: str, lines: list[int]) -> None:
    assert [int(each.split(":")[1]) for each in named_arrays("a.py", source)] == lines
