"""The options that commands share, in groups; a command takes a group as one argument (see `grouped`).

Values stay as they were written: `inputs` and the commands make of them what the library takes, so that
every complaint reads alike and comes from one place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


def option(panel: str, names: str, help: str, metavar: str | None = None, **more: Any) -> Any:
    """An option of a panel of the help page; `names` is such as "--model -m"."""
    return typer.Option(*names.split(), help=help, metavar=metavar, rich_help_panel=panel, **more)


OutOption = Annotated[
    Path,
    option("Output", "--out -o", "Folder for the results; made if missing, older ones replaced.", "DIR"),
]

BudgetOption = Annotated[
    str | None,
    option(
        "Search",
        "--budget",
        "hybrid and auto: what scores may cost, as 60s for all pairs or 60 forward-equivalents for each.",
        "COST",
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Annotated[
        str,
        option(
            "Model",
            "--model -m",
            "A bundled model (catdog-tiny), a Vision Transformer of timm (vit_tiny_patch16_224), or a file "
            "written by `circuitvit train`. `circuitvit models` lists them.",
            "NAME",
        ),
    ]
    checkpoint: Annotated[
        Path | None,
        option("Model", "--checkpoint", "Weights in timm's layout: .safetensors, .pt or .pth.", "FILE"),
    ] = None
    pretrained: Annotated[bool, option("Model", "--pretrained", "Download timm's own weights instead.")] = (
        False
    )
    arch: Annotated[
        list[str] | None,
        option(
            "Model",
            "--arch",
            "What the weights need timm to build, such as num_classes=37 or img_size=384. Can be repeated.",
            "KEY=VALUE",
        ),
    ] = None
    classes: Annotated[
        Path | None,
        option("Model", "--classes", "Names of the classes, one on each line, in the model's order.", "FILE"),
    ] = None
    device: Annotated[str, option("Model", "--device", "Such as cpu, cuda or cuda:1.", "DEVICE")] = "cpu"
    dtype: Annotated[
        str | None,
        option("Model", "--dtype", "float32, float64, bfloat16 or float16.", "DTYPE"),
    ] = None


@dataclass(frozen=True)
class ImageOptions:
    """Which image pairs."""

    clean: Annotated[
        Path | None,
        option("Images", "--clean", "Images that show the behaviour: a file, or a folder.", "PATH"),
    ] = None
    corrupt: Annotated[
        Path | None,
        option(
            "Images",
            "--corrupt",
            "Their counterfactuals, which do not: a file, or a folder with the same file names.",
            "PATH",
        ),
    ] = None
    pairs: Annotated[
        Path | None,
        option(
            "Images",
            "--pairs",
            "Instead of both: a table whose first line is clean,corrupt or clean,corrupt,target,foil.",
            "CSV",
        ),
    ] = None


@dataclass(frozen=True)
class BehaviourOptions:
    """What is measured, and what ablation means."""

    metric: Annotated[
        str,
        option(
            "Behaviour",
            "--metric",
            "logit_diff, logit, log_probability, probability, kl_divergence, cross_entropy or accuracy.",
            "NAME",
        ),
    ] = "logit_diff"
    target: Annotated[
        list[str] | None,
        option(
            "Behaviour",
            "--target",
            "Class that the behaviour speaks for: a name, a WordNet id or an index. Repeated, it is a set of "
            "classes. By default what the model sees in each clean image.",
            "CLASS",
        ),
    ] = None
    foil: Annotated[
        list[str] | None,
        option(
            "Behaviour",
            "--foil",
            "Class that it is compared with. By default what the model sees in each corrupt image.",
            "CLASS",
        ),
    ] = None
    ablation: Annotated[
        str,
        option(
            "Behaviour",
            "--ablation",
            "What replaces an ablated edge: patch (the corrupt image's), mean, mean-tokens, zero, noise or "
            "resample.",
            "NAME",
        ),
    ] = "patch"
    direction: Annotated[
        str,
        option(
            "Behaviour",
            "--direction",
            "noising ablates edges of the clean run, denoising restores edges of the corrupt run.",
            "NAME",
        ),
    ] = "noising"
    groups: Annotated[
        str | None,
        option(
            "Behaviour",
            "--groups",
            "kind: tell edges apart by the tokens they act on, such as class token and patches.",
            "NAME",
        ),
    ] = None


@dataclass(frozen=True)
class SearchOptions:
    """How the circuit is found; what is None was not asked for."""

    method: Annotated[
        str,
        option(
            "Search",
            "--method",
            "find searches for a small faithful circuit; acdc removes edge after edge; all methods of "
            "`circuitvit attribute` score all edges, of which the best are taken.",
            "NAME",
        ),
    ] = "find"
    faithfulness: Annotated[
        float | None,
        option(
            "Search",
            "--faithfulness",
            "find: share of the behaviour that the circuit must keep. [default: 0.9]",
            "SHARE",
        ),
    ] = None
    within: Annotated[
        str | None,
        option("Search", "--within", "find: time to search, such as 90s or 5m. [default: 120s]", "TIME"),
    ] = None
    start: Annotated[
        str | None,
        option(
            "Search",
            "--start",
            "find: mask trims what a learned mask passes through; whole trims the whole model. [default: "
            "whole up to 500 edges, else mask]",
            "NAME",
        ),
    ] = None
    resume: Annotated[
        bool,
        option("Search", "--resume", "find, acdc, exact: go on where an interrupted run into --out ended."),
    ] = False
    plan: Annotated[
        str | None,
        option(
            "Search",
            "--plan",
            "find: repeat an earlier search by its steps, trim_runs and batch_size (in circuit.json).",
            "N,N,N",
        ),
    ] = None
    edges: Annotated[
        int | None, option("Search", "--edges", "Scoring methods: how many edges to take.", "K", min=1)
    ] = None
    threshold: Annotated[
        float | None,
        option(
            "Search",
            "--threshold",
            "Or: all edges that score at least this, in units of the metric.",
            "SCORE",
        ),
    ] = None
    by: Annotated[
        str | None,
        option(
            "Search",
            "--by",
            "Scoring methods: magnitude, or signed for edges in support only. [default: magnitude]",
            "RANKING",
        ),
    ] = None
    connected: Annotated[
        bool | None,
        option(
            "Search",
            "--connected/--top",
            "With --edges: grow whole paths from input to logits, or take the best edges wherever they are "
            "and drop those on no path. [default: connected]",
        ),
    ] = None
    steps: Annotated[
        int | None,
        option("Search", "--steps", "eap-ig methods: points on the path. [default: 5]", "N", min=1),
    ] = None
    budget: BudgetOption = None
    calibrate: Annotated[
        int | None,
        option(
            "Search",
            "--calibrate",
            "Scoring methods: edges whose exact effects are measured to say how right the scores are; "
            "0 for none. [default: 60]",
            "N",
            min=0,
        ),
    ] = None
    tau: Annotated[
        float | None,
        option(
            "Search",
            "--tau",
            "acdc: an edge stays when removing it adds at least this to the divergence. [default: 0.02]",
            "TAU",
        ),
    ] = None
    divergence: Annotated[
        str | None,
        option(
            "Search",
            "--divergence",
            "acdc: kl for the whole prediction, in nats, or metric for the behaviour. [default: kl]",
            "NAME",
        ),
    ] = None


@dataclass(frozen=True)
class HeldOutOptions:
    """Other pairs, on which circuits are judged."""

    held_out_clean: Annotated[
        Path | None,
        option(
            "Verification",
            "--held-out-clean",
            "Other images with the behaviour, on which the circuit is judged.",
            "PATH",
        ),
    ] = None
    held_out_corrupt: Annotated[
        Path | None, option("Verification", "--held-out-corrupt", "Their counterfactuals.", "PATH")
    ] = None
    held_out_pairs: Annotated[
        Path | None, option("Verification", "--held-out-pairs", "Instead of both: a table.", "CSV")
    ] = None
    held_out: Annotated[
        float | None,
        option(
            "Verification",
            "--held-out",
            "Instead: hold out this share of the pairs, drawn by --seed so that no image is on both sides.",
            "SHARE",
        ),
    ] = None


@dataclass(frozen=True)
class VerificationOptions(HeldOutOptions):
    """On what, and against how many random circuits, a circuit is tested."""

    random: Annotated[
        int,
        option("Verification", "--random", "Random circuits of the same shape to compare with.", "N", min=0),
    ] = 20


@dataclass(frozen=True)
class RunOptions:
    """How the work is done; none of it but the seed changes a result."""

    seed: Annotated[
        int,
        option("Run", "--seed", "Of everything random: the same seed, the same result.", "N", min=0),
    ] = 0
    batch_size: Annotated[
        int | None,
        option(
            "Run",
            "--batch-size",
            "Pairs at once; by default what --memory allows, and 16 for find.",
            "N",
            min=1,
        ),
    ] = None
    memory: Annotated[
        str | None,
        option("Run", "--memory", "What a batch may take, such as 2GB.", "SIZE"),
    ] = None
    quiet: Annotated[bool, option("Run", "--quiet -q", "No progress bars.")] = False

    @property
    def progress(self) -> bool:
        """Whether to show progress bars."""
        return not self.quiet

    @property
    def budget(self) -> int | None:
        """The memory budget in bytes, or None for the library's own."""
        from circuitvit.cli.values import parse_size

        return None if self.memory is None else parse_size(self.memory, "--memory")
