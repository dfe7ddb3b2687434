"""The only code that runs models: captured runs, gradients, masked runs."""

from circuitvit._progress import announce, progress_bar
from circuitvit.engine.as_module import masked_module
from circuitvit.engine.batches import (
    BatchRun,
    batch_runs,
    choose_batch_size,
    clean_logits,
    free_logits,
    memory_budget,
)
from circuitvit.engine.contraction import add_products, members_at
from circuitvit.engine.effect import check_effect, resampled_sums
from circuitvit.engine.evaluator import Evaluator, Measured, run
from circuitvit.engine.gradients import (
    Gradients,
    gradients,
    output_gradients,
    refuse_inference_mode,
    slopes_of_streams,
    stream_gradients,
)
from circuitvit.engine.kept import Activations
from circuitvit.engine.many import masked_runs
from circuitvit.engine.masked import masked_run, new_workspace
from circuitvit.engine.patching import (
    Site,
    patch_pattern,
    patch_sender,
    patch_senders,
    patch_stream,
    token_parts,
)
from circuitvit.engine.processes import (
    agreed,
    is_first,
    joined,
    once,
    own_part,
    own_share,
    place_in_group,
    spread,
    summed,
)
from circuitvit.engine.reading import activation_batches, activations
from circuitvit.engine.references import Reference, References, Sources, reference_source
from circuitvit.engine.replay import Replay
from circuitvit.engine.runs import Capture, capture, check_logits, differences, outputs, run_from
from circuitvit.engine.soft import soft_run
from circuitvit.engine.state import Saved, StateFile
from circuitvit.engine.units import UnitChanges, UnitPlace, unit_changes

__all__ = [
    "Activations",
    "BatchRun",
    "Capture",
    "Evaluator",
    "Gradients",
    "Measured",
    "Reference",
    "References",
    "Replay",
    "Saved",
    "Site",
    "Sources",
    "StateFile",
    "UnitChanges",
    "UnitPlace",
    "activation_batches",
    "activations",
    "add_products",
    "agreed",
    "announce",
    "batch_runs",
    "capture",
    "check_effect",
    "check_logits",
    "choose_batch_size",
    "clean_logits",
    "differences",
    "free_logits",
    "gradients",
    "is_first",
    "joined",
    "masked_module",
    "masked_run",
    "masked_runs",
    "members_at",
    "memory_budget",
    "new_workspace",
    "once",
    "output_gradients",
    "outputs",
    "own_part",
    "own_share",
    "patch_pattern",
    "patch_sender",
    "patch_senders",
    "patch_stream",
    "place_in_group",
    "progress_bar",
    "reference_source",
    "refuse_inference_mode",
    "resampled_sums",
    "run",
    "run_from",
    "slopes_of_streams",
    "soft_run",
    "spread",
    "stream_gradients",
    "summed",
    "token_parts",
    "unit_changes",
]
