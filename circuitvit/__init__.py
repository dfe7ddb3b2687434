"""Find, draw and verify the circuits of Vision Transformers.

A model becomes a graph of components (input, attention heads with separate query, key and value inputs, MLPs,
logits) joined by edges of the residual stream. Every edge is scored, the graph is pruned to the circuit that
carries a behaviour, and the circuit is proved by ablation, drawn and saved.

    >>> import circuitvit as cv
    >>> model = cv.load("catdog-tiny")

Importing the package loads nothing but this file: torch and the other rooms come with the first name that is
used. A new name goes below for type checkers, and into the table of homes.
"""

from circuitvit._lazy import lazy
from circuitvit._version import __version__ as __version__

TYPE_CHECKING = False  # typing's own would cost half of the import

if TYPE_CHECKING:
    from circuitvit import attribution as attribution
    from circuitvit import datasets as datasets
    from circuitvit import defences as defences
    from circuitvit import engine as engine
    from circuitvit import errors as errors
    from circuitvit import export as export
    from circuitvit import graph as graph
    from circuitvit import groundtruth as groundtruth
    from circuitvit import models as models
    from circuitvit import pruning as pruning
    from circuitvit import tasks as tasks
    from circuitvit import testing as testing
    from circuitvit import training as training
    from circuitvit import verification as verification
    from circuitvit import views as views
    from circuitvit.attribution import METHODS as METHODS
    from circuitvit.attribution import attribute as attribute
    from circuitvit.attribution import attribute_nodes as attribute_nodes
    from circuitvit.attribution import attribute_units as attribute_units
    from circuitvit.attribution import calibrate as calibrate
    from circuitvit.attribution import refine_nodes as refine_nodes
    from circuitvit.defences import Mended as Mended
    from circuitvit.defences import mend as mend
    from circuitvit.engine import activations as activations
    from circuitvit.engine import masked_module as masked_module
    from circuitvit.engine import run as run
    from circuitvit.errors import CircuitViTError as CircuitViTError
    from circuitvit.graph import Circuit as Circuit
    from circuitvit.graph import EdgeScores as EdgeScores
    from circuitvit.graph import Fidelity as Fidelity
    from circuitvit.graph import Graph as Graph
    from circuitvit.graph import NodeScores as NodeScores
    from circuitvit.graph import UnitScores as UnitScores
    from circuitvit.groundtruth import Compiled as Compiled
    from circuitvit.groundtruth import compiled as compiled
    from circuitvit.models import Dictionary as Dictionary
    from circuitvit.models import Layout as Layout
    from circuitvit.models import Model as Model
    from circuitvit.models import add as add
    from circuitvit.models import causal as causal
    from circuitvit.models import clamp as clamp
    from circuitvit.models import features as features
    from circuitvit.models import knock_out as knock_out
    from circuitvit.models import load as load
    from circuitvit.models import load_dictionary as load_dictionary
    from circuitvit.models import neurons as neurons
    from circuitvit.models import register as register
    from circuitvit.models import split_sources as split_sources
    from circuitvit.models import to_module as to_module
    from circuitvit.models import with_head as with_head
    from circuitvit.models import wrap as wrap
    from circuitvit.pruning import Curve as Curve
    from circuitvit.pruning import FamilySettings as FamilySettings
    from circuitvit.pruning import Finding as Finding
    from circuitvit.pruning import MaskSettings as MaskSettings
    from circuitvit.pruning import Plan as Plan
    from circuitvit.pruning import Thinned as Thinned
    from circuitvit.pruning import ThinSettings as ThinSettings
    from circuitvit.pruning import acdc as acdc
    from circuitvit.pruning import circuit_curve as circuit_curve
    from circuitvit.pruning import ddmin as ddmin
    from circuitvit.pruning import find as find
    from circuitvit.pruning import find_nodes as find_nodes
    from circuitvit.pruning import find_several as find_several
    from circuitvit.pruning import learn_constants as learn_constants
    from circuitvit.pruning import learn_mask as learn_mask
    from circuitvit.pruning import learn_masks as learn_masks
    from circuitvit.pruning import refine as refine
    from circuitvit.pruning import score_curve as score_curve
    from circuitvit.pruning import thin as thin
    from circuitvit.tasks import Constants as Constants
    from circuitvit.tasks import Mean as Mean
    from circuitvit.tasks import Noise as Noise
    from circuitvit.tasks import Patch as Patch
    from circuitvit.tasks import PerPair as PerPair
    from circuitvit.tasks import Resample as Resample
    from circuitvit.tasks import Task as Task
    from circuitvit.tasks import TokenGroups as TokenGroups
    from circuitvit.tasks import Zero as Zero
    from circuitvit.tasks import accuracy as accuracy
    from circuitvit.tasks import cross_entropy as cross_entropy
    from circuitvit.tasks import group as group
    from circuitvit.tasks import kl_divergence as kl_divergence
    from circuitvit.tasks import log_probability as log_probability
    from circuitvit.tasks import logit as logit
    from circuitvit.tasks import logit_diff as logit_diff
    from circuitvit.tasks import probability as probability
    from circuitvit.tasks import projection as projection
    from circuitvit.tasks import similarity as similarity
    from circuitvit.tasks import split as split
    from circuitvit.training.heads import fit_head as fit_head
    from circuitvit.training.sae import train_sae as train_sae
    from circuitvit.verification import Audit as Audit
    from circuitvit.verification import AuditSettings as AuditSettings
    from circuitvit.verification import BeatsRandom as BeatsRandom
    from circuitvit.verification import Certificate as Certificate
    from circuitvit.verification import Drift as Drift
    from circuitvit.verification import Falls as Falls
    from circuitvit.verification import Flips as Flips
    from circuitvit.verification import Hypothesis as Hypothesis
    from circuitvit.verification import Interpretation as Interpretation
    from circuitvit.verification import Report as Report
    from circuitvit.verification import Rises as Rises
    from circuitvit.verification import Unchanged as Unchanged
    from circuitvit.verification import Verdict as Verdict
    from circuitvit.verification import audit as audit
    from circuitvit.verification import audit_cue as audit_cue
    from circuitvit.verification import certify as certify
    from circuitvit.verification import diff as diff
    from circuitvit.verification import flip_search as flip_search
    from circuitvit.verification import patching_map as patching_map
    from circuitvit.verification import read_hypotheses as read_hypotheses
    from circuitvit.verification import read_interpretation as read_interpretation
    from circuitvit.verification import robustness as robustness
    from circuitvit.verification import specificity as specificity
    from circuitvit.verification import stability as stability
    from circuitvit.verification import verify as verify
    from circuitvit.views import Across as Across
    from circuitvit.views import Why as Why
    from circuitvit.views import across as across
    from circuitvit.views import attention_page as attention_page
    from circuitvit.views import attention_patterns as attention_patterns
    from circuitvit.views import deciders as deciders
    from circuitvit.views import decompose as decompose
    from circuitvit.views import difference_of_means as difference_of_means
    from circuitvit.views import direct_logit_attribution as direct_logit_attribution
    from circuitvit.views import disentanglement as disentanglement
    from circuitvit.views import equivariance as equivariance
    from circuitvit.views import feature_visualisation as feature_visualisation
    from circuitvit.views import flow as flow
    from circuitvit.views import head_kinds as head_kinds
    from circuitvit.views import knock_outs as knock_outs
    from circuitvit.views import linear_probes as linear_probes
    from circuitvit.views import logit_lens as logit_lens
    from circuitvit.views import match as match
    from circuitvit.views import mean_ablate as mean_ablate
    from circuitvit.views import misread_images as misread_images
    from circuitvit.views import registers as registers
    from circuitvit.views import scrub as scrub
    from circuitvit.views import steer as steer
    from circuitvit.views import text_span as text_span
    from circuitvit.views import token_ablations as token_ablations
    from circuitvit.views import top_images as top_images
    from circuitvit.views import tuned_lens as tuned_lens
    from circuitvit.views import universality as universality
    from circuitvit.views import why as why
    from circuitvit.views.comparison import Comparison as Comparison
    from circuitvit.views.comparison import compare as compare
    from circuitvit.views.model_sheet import ModelSheet as ModelSheet
    from circuitvit.views.models_compared import compare_models as compare_models
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        {
            "circuitvit.attribution": (
                "METHODS attribute attribute_nodes attribute_units calibrate refine_nodes"
            ),
            "circuitvit.defences": "Mended mend",
            "circuitvit.engine": "activations masked_module run",
            "circuitvit.errors": "CircuitViTError",
            "circuitvit.graph": "Circuit EdgeScores Fidelity Graph NodeScores UnitScores",
            "circuitvit.groundtruth": "Compiled compiled",
            "circuitvit.models": (
                "Dictionary Layout Model add causal clamp features knock_out load load_dictionary neurons "
                "register split_sources to_module with_head wrap"
            ),
            "circuitvit.pruning": (
                "Curve FamilySettings Finding MaskSettings Plan ThinSettings Thinned acdc circuit_curve "
                "ddmin find find_nodes find_several learn_constants learn_mask learn_masks refine "
                "score_curve thin"
            ),
            "circuitvit.tasks": (
                "Constants Mean Noise Patch PerPair Resample Task TokenGroups Zero accuracy cross_entropy "
                "group kl_divergence log_probability logit logit_diff probability projection similarity "
                "split"
            ),
            "circuitvit.training.heads": "fit_head",
            "circuitvit.training.sae": "train_sae",
            "circuitvit.verification": (
                "Audit AuditSettings BeatsRandom Certificate Drift Falls Flips Hypothesis Interpretation "
                "Report Rises Unchanged Verdict audit audit_cue certify diff flip_search patching_map "
                "read_hypotheses read_interpretation robustness specificity stability verify"
            ),
            "circuitvit.views": (
                "Across Why across attention_page attention_patterns deciders decompose difference_of_means "
                "direct_logit_attribution disentanglement equivariance feature_visualisation flow "
                "head_kinds knock_outs linear_probes logit_lens match mean_ablate misread_images registers "
                "scrub steer text_span token_ablations top_images tuned_lens universality why"
            ),
            "circuitvit.views.comparison": "Comparison compare",
            "circuitvit.views.model_sheet": "ModelSheet",
            "circuitvit.views.models_compared": "compare_models",
        },
        submodules=(
            "attribution datasets defences engine errors export graph groundtruth models pruning tasks "
            "testing training verification views"
        ),
    )
    __all__.append("__version__")
