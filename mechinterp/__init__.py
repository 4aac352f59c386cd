"""mechinterp: find the circuit of a task in a transformer, write it to a file, and check the file again.

The public names are imported when they are first used, so that `import mechinterp` does not import torch.
"""

from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any

from mechinterp.base.notebook import in_notebook, with_bar

if TYPE_CHECKING:
    from mechinterp.analysis.activation_patching import activation_patching as activation_patching
    from mechinterp.analysis.activation_patching import fraction as fraction
    from mechinterp.analysis.attention_edits import edit_pattern as edit_pattern
    from mechinterp.analysis.attention_edits import knock_out_attention as knock_out_attention
    from mechinterp.analysis.attribution import attribution_patching as attribution_patching
    from mechinterp.analysis.attribution import node_attribution as node_attribution
    from mechinterp.analysis.attribution_graph.aggregate import AggregatedGraph as AggregatedGraph
    from mechinterp.analysis.attribution_graph.aggregate import aggregate_graphs as aggregate_graphs
    from mechinterp.analysis.attribution_graph.aggregate import graph_prompts as graph_prompts
    from mechinterp.analysis.attribution_graph.build import GraphSize as GraphSize
    from mechinterp.analysis.attribution_graph.build import attribution_graph as attribution_graph
    from mechinterp.analysis.attribution_graph.build import graph_size as graph_size
    from mechinterp.analysis.attribution_graph.graph import AttributionGraph as AttributionGraph
    from mechinterp.analysis.attribution_graph.graph import GraphNode as GraphNode
    from mechinterp.analysis.attribution_graph.graph import Supernode as Supernode
    from mechinterp.analysis.attribution_graph.supernodes import find_supernodes as find_supernodes
    from mechinterp.analysis.attribution_graph.validate import EdgeValidation as EdgeValidation
    from mechinterp.analysis.attribution_graph.validate import GraphValidation as GraphValidation
    from mechinterp.analysis.attribution_graph.validate import validate_edges as validate_edges
    from mechinterp.analysis.attribution_graph.validate import validate_graph as validate_graph
    from mechinterp.analysis.causal_inner_product import CausalInnerProduct as CausalInnerProduct
    from mechinterp.analysis.causal_inner_product import ConceptDirection as ConceptDirection
    from mechinterp.analysis.causal_inner_product import causal_inner_product as causal_inner_product
    from mechinterp.analysis.causal_inner_product import concept_direction as concept_direction
    from mechinterp.analysis.causal_tracing import causal_tracing as causal_tracing
    from mechinterp.analysis.compensation import compensation as compensation
    from mechinterp.analysis.composition import composition_scores as composition_scores
    from mechinterp.analysis.contextual import Decomposition as Decomposition
    from mechinterp.analysis.contextual import contextual_decomposition as contextual_decomposition
    from mechinterp.analysis.describe import Description as Description
    from mechinterp.analysis.describe import Examples as Examples
    from mechinterp.analysis.describe import describe as describe
    from mechinterp.analysis.describe import strongest_examples as strongest_examples
    from mechinterp.analysis.description_scores import DescriptionScore as DescriptionScore
    from mechinterp.analysis.description_scores import SeparationScores as SeparationScores
    from mechinterp.analysis.description_scores import score_description as score_description
    from mechinterp.analysis.description_scores import separation_scores as separation_scores
    from mechinterp.analysis.direct_logit_attribution import direct_logit_attribution as direct_logit_attribution
    from mechinterp.analysis.direct_logit_attribution import group_parts as group_parts
    from mechinterp.analysis.direction_comparison import ComparedDirections as ComparedDirections
    from mechinterp.analysis.direction_comparison import compare_directions as compare_directions
    from mechinterp.analysis.direction_paths import direction_paths as direction_paths
    from mechinterp.analysis.direction_paths import direction_readers as direction_readers
    from mechinterp.analysis.direction_paths import direction_writers as direction_writers
    from mechinterp.analysis.directions import Direction as Direction
    from mechinterp.analysis.directions import find_direction as find_direction
    from mechinterp.analysis.directions import given_direction as given_direction
    from mechinterp.analysis.directions import orient_pairs as orient_pairs
    from mechinterp.analysis.directions import read_direction as read_direction
    from mechinterp.analysis.feature_circuit.build import FeatureCircuit as FeatureCircuit
    from mechinterp.analysis.feature_circuit.build import FeatureEffects as FeatureEffects
    from mechinterp.analysis.feature_circuit.build import feature_circuit as feature_circuit
    from mechinterp.analysis.feature_circuit.build import feature_effects as feature_effects
    from mechinterp.analysis.feature_circuit.evaluate import FeatureCurves as FeatureCurves
    from mechinterp.analysis.feature_circuit.evaluate import FeatureFaithfulness as FeatureFaithfulness
    from mechinterp.analysis.feature_circuit.evaluate import evaluate_feature_circuit as evaluate_feature_circuit
    from mechinterp.analysis.feature_circuit.evaluate import feature_circuit_curves as feature_circuit_curves
    from mechinterp.analysis.feature_concepts import FeatureConcepts as FeatureConcepts
    from mechinterp.analysis.feature_concepts import feature_concepts as feature_concepts
    from mechinterp.analysis.feature_notes import FeatureNote as FeatureNote
    from mechinterp.analysis.feature_notes import feature_notes as feature_notes
    from mechinterp.analysis.feature_weights import feature_weights as feature_weights
    from mechinterp.analysis.head_detectors import attention_between as attention_between
    from mechinterp.analysis.head_detectors import attention_to as attention_to
    from mechinterp.analysis.head_detectors import copying_scores as copying_scores
    from mechinterp.analysis.head_detectors import head_scores as head_scores
    from mechinterp.analysis.information_bottleneck import information_bottleneck as information_bottleneck
    from mechinterp.analysis.integrated_gradients import integrated_gradients as integrated_gradients
    from mechinterp.analysis.judge_bases import JudgedBases as JudgedBases
    from mechinterp.analysis.judge_bases import judge_bases as judge_bases
    from mechinterp.analysis.knn_deviation import knn_deviation as knn_deviation
    from mechinterp.analysis.logit_lens import LogitLens as LogitLens
    from mechinterp.analysis.logit_lens import logit_lens as logit_lens
    from mechinterp.analysis.logit_lens import writes_lens as writes_lens
    from mechinterp.analysis.observables import coupling as coupling
    from mechinterp.analysis.observables import observable as observable
    from mechinterp.analysis.patchscopes import Patchscope as Patchscope
    from mechinterp.analysis.patchscopes import patchscope as patchscope
    from mechinterp.analysis.path_patching import path_patching as path_patching
    from mechinterp.analysis.phrases import PhraseRelevance as PhraseRelevance
    from mechinterp.analysis.phrases import phrase_relevance as phrase_relevance
    from mechinterp.analysis.probes import Probes as Probes
    from mechinterp.analysis.probes import held_out as held_out
    from mechinterp.analysis.probes import probe_directions as probe_directions
    from mechinterp.analysis.qk_attribution import qk_attribution as qk_attribution
    from mechinterp.analysis.relevance import Relevance as Relevance
    from mechinterp.analysis.relevance import relevance as relevance
    from mechinterp.analysis.scrubbing import Scrubbing as Scrubbing
    from mechinterp.analysis.scrubbing import scrub_concept as scrub_concept
    from mechinterp.analysis.shift import LabelledPrompts as LabelledPrompts
    from mechinterp.analysis.shift import ShiftedProbe as ShiftedProbe
    from mechinterp.analysis.shift import shift_probe as shift_probe
    from mechinterp.analysis.steering import ablate_direction as ablate_direction
    from mechinterp.analysis.steering import add_direction as add_direction
    from mechinterp.analysis.steering import affine as affine
    from mechinterp.analysis.steering import mean_difference as mean_difference
    from mechinterp.analysis.steering_sweep import steering_sweep as steering_sweep
    from mechinterp.analysis.subspace import learn_subspace as learn_subspace
    from mechinterp.analysis.subspace import subspace_interchange as subspace_interchange
    from mechinterp.analysis.subspace_controls import AlignmentControls as AlignmentControls
    from mechinterp.analysis.subspace_controls import SubspaceParts as SubspaceParts
    from mechinterp.analysis.subspace_controls import alignment_controls as alignment_controls
    from mechinterp.analysis.subspace_controls import split_effects as split_effects
    from mechinterp.analysis.subspace_controls import split_subspace as split_subspace
    from mechinterp.analysis.text_span import TextSpan as TextSpan
    from mechinterp.analysis.text_span import text_span as text_span
    from mechinterp.analysis.token_norms import token_attribution as token_attribution
    from mechinterp.analysis.token_norms import token_contributions as token_contributions
    from mechinterp.analysis.tuned_lens import TunedLens as TunedLens
    from mechinterp.analysis.tuned_lens import load_lens as load_lens
    from mechinterp.analysis.tuned_lens import save_lens as save_lens
    from mechinterp.analysis.tuned_lens import train_tuned_lens as train_tuned_lens
    from mechinterp.analysis.unit_scan import UnitScan as UnitScan
    from mechinterp.analysis.unit_scan import scan_units as scan_units
    from mechinterp.analysis.weights import feature_tokens as feature_tokens
    from mechinterp.analysis.weights import neuron_tokens as neuron_tokens
    from mechinterp.analysis.weights import ov_circuit as ov_circuit
    from mechinterp.analysis.weights import qk_circuit as qk_circuit
    from mechinterp.analysis.weights import top_tokens as top_tokens
    from mechinterp.base.errors import FormatError as FormatError
    from mechinterp.base.errors import InputError as InputError
    from mechinterp.base.errors import MechInterpError as MechInterpError
    from mechinterp.base.errors import NoSmallCircuit as NoSmallCircuit
    from mechinterp.base.errors import SiteNotReached as SiteNotReached
    from mechinterp.base.errors import TaskNotDone as TaskNotDone
    from mechinterp.base.errors import UnsupportedError as UnsupportedError
    from mechinterp.base.processes import torchrun_processes as torchrun_processes
    from mechinterp.base.text_files import read_texts as read_texts
    from mechinterp.circuit_file.circuit_file import load_circuit as load_circuit
    from mechinterp.circuit_file.circuit_file import save_circuit as save_circuit
    from mechinterp.circuit_file.diff import CircuitDiff as CircuitDiff
    from mechinterp.circuit_file.diff import diff_circuits as diff_circuits
    from mechinterp.circuit_file.direction_claims import verify_direction as verify_direction
    from mechinterp.circuit_file.direction_file import load_direction as load_direction
    from mechinterp.circuit_file.formats.aggregated_graphs import load_aggregated_graph as load_aggregated_graph
    from mechinterp.circuit_file.formats.aggregated_graphs import save_aggregated_graph as save_aggregated_graph
    from mechinterp.circuit_file.formats.attribution_graphs import load_attribution_graph as load_attribution_graph
    from mechinterp.circuit_file.formats.attribution_graphs import save_attribution_graph as save_attribution_graph
    from mechinterp.circuit_file.hub import pull_circuit as pull_circuit
    from mechinterp.circuit_file.hub import push_circuit as push_circuit
    from mechinterp.circuit_file.reevaluate import Reevaluation as Reevaluation
    from mechinterp.circuit_file.reevaluate import reevaluate as reevaluate
    from mechinterp.circuit_file.verify.claims import Claim as Claim
    from mechinterp.circuit_file.verify.claims import Verification as Verification
    from mechinterp.circuit_file.verify.verification import verify as verify
    from mechinterp.compare import compare_methods as compare_methods
    from mechinterp.direct import DirectSpec as DirectSpec
    from mechinterp.direct import discover_direction as discover_direction
    from mechinterp.discovery.acdc import acdc_thresholds as acdc_thresholds
    from mechinterp.discovery.acdc_orders import AcdcOrders as AcdcOrders
    from mechinterp.discovery.acdc_orders import acdc_orders as acdc_orders
    from mechinterp.discovery.ensemble import ensemble_scores as ensemble_scores
    from mechinterp.discovery.features import top_features as top_features
    from mechinterp.discovery.memory import auto_batch_size as auto_batch_size
    from mechinterp.discovery.method import score_edges as score_edges
    from mechinterp.discovery.methods import METHODS as METHODS
    from mechinterp.discovery.neurons import top_neurons as top_neurons
    from mechinterp.discovery.refine import refine_circuit as refine_circuit
    from mechinterp.discovery.stable import CircuitStability as CircuitStability
    from mechinterp.discovery.stable import StableScores as StableScores
    from mechinterp.discovery.stable import circuit_stability as circuit_stability
    from mechinterp.discovery.stable import stable_scores as stable_scores
    from mechinterp.engines.decomposition.encoder import Encoder as Encoder
    from mechinterp.engines.decomposition.encoder import load_encoder as load_encoder
    from mechinterp.engines.edge_attribution import edge_gradients as edge_gradients
    from mechinterp.engines.edge_patching import run_edges as run_edges
    from mechinterp.engines.grid import Grid as Grid
    from mechinterp.evaluation.against_random import minimality_test as minimality_test
    from mechinterp.evaluation.against_random import necessity_test as necessity_test
    from mechinterp.evaluation.against_random import sufficiency_test as sufficiency_test
    from mechinterp.evaluation.comparison import Comparison as Comparison
    from mechinterp.evaluation.completeness import Completeness as Completeness
    from mechinterp.evaluation.completeness import completeness as completeness
    from mechinterp.evaluation.completeness import greedy_completeness as greedy_completeness
    from mechinterp.evaluation.faithfulness import Evaluation as Evaluation
    from mechinterp.evaluation.faithfulness import evaluate as evaluate
    from mechinterp.evaluation.ground_truth import against_truth as against_truth
    from mechinterp.evaluation.hypotheses import HypothesisTest as HypothesisTest
    from mechinterp.evaluation.hypotheses import equivalence_test as equivalence_test
    from mechinterp.evaluation.hypotheses import independence_test as independence_test
    from mechinterp.evaluation.measurements import Checked as Checked
    from mechinterp.evaluation.measurements import check_predictions as check_predictions
    from mechinterp.evaluation.measurements import predictions_frame as predictions_frame
    from mechinterp.evaluation.minimality import Minimality as Minimality
    from mechinterp.evaluation.minimality import edge_minimality as edge_minimality
    from mechinterp.evaluation.minimality import node_minimality as node_minimality
    from mechinterp.evaluation.predictions import Attention as Attention
    from mechinterp.evaluation.predictions import Control as Control
    from mechinterp.evaluation.predictions import Copying as Copying
    from mechinterp.evaluation.predictions import Detector as Detector
    from mechinterp.evaluation.predictions import DirectEffect as DirectEffect
    from mechinterp.evaluation.predictions import DirectEffectChange as DirectEffectChange
    from mechinterp.evaluation.predictions import EdgesCut as EdgesCut
    from mechinterp.evaluation.predictions import PartsReplaced as PartsReplaced
    from mechinterp.evaluation.predictions import PathPatched as PathPatched
    from mechinterp.evaluation.predictions import Prediction as Prediction
    from mechinterp.evaluation.roles import MeasuredRoles as MeasuredRoles
    from mechinterp.evaluation.roles import RoleLimits as RoleLimits
    from mechinterp.evaluation.roles import measured_roles as measured_roles
    from mechinterp.evaluation.stability import Stability as Stability
    from mechinterp.evaluation.stability import stability as stability
    from mechinterp.evaluation.task_check import TaskCheck as TaskCheck
    from mechinterp.evaluation.task_check import check_performance as check_performance
    from mechinterp.evaluation.transfer import Transfer as Transfer
    from mechinterp.evaluation.transfer import transfer as transfer
    from mechinterp.features.activations import Gated as Gated
    from mechinterp.features.activations import JumpRelu as JumpRelu
    from mechinterp.features.activations import Relu as Relu
    from mechinterp.features.activations import TopK as TopK
    from mechinterp.features.affine_fits import AffineFit as AffineFit
    from mechinterp.features.affine_fits import fit_affine as fit_affine
    from mechinterp.features.basis import Basis as Basis
    from mechinterp.features.dictionary import Dictionary as Dictionary
    from mechinterp.features.dictionary import cross_layer_transcoder as cross_layer_transcoder
    from mechinterp.features.dictionary import crosscoder as crosscoder
    from mechinterp.features.dictionary import relative_norms as relative_norms
    from mechinterp.features.dictionary import sae as sae
    from mechinterp.features.dictionary import transcoder as transcoder
    from mechinterp.features.direction_fits import DirectionFit as DirectionFit
    from mechinterp.features.direction_fits import fit_direction as fit_direction
    from mechinterp.features.edits import ablate_features as ablate_features
    from mechinterp.features.edits import add_features as add_features
    from mechinterp.features.edits import reconstructed as reconstructed
    from mechinterp.features.edits import scale_features as scale_features
    from mechinterp.features.edits import set_features as set_features
    from mechinterp.features.geometry import Irreducibility as Irreducibility
    from mechinterp.features.geometry import cluster_features as cluster_features
    from mechinterp.features.geometry import cluster_points as cluster_points
    from mechinterp.features.geometry import clusters_table as clusters_table
    from mechinterp.features.geometry import feature_dimensions as feature_dimensions
    from mechinterp.features.geometry import irreducibility as irreducibility
    from mechinterp.features.load import load_bases as load_bases
    from mechinterp.features.load import load_basis as load_basis
    from mechinterp.features.matching import FeatureFlow as FeatureFlow
    from mechinterp.features.matching import FeatureMatches as FeatureMatches
    from mechinterp.features.matching import feature_flow as feature_flow
    from mechinterp.features.matching import feature_strengths as feature_strengths
    from mechinterp.features.matching import match_features as match_features
    from mechinterp.features.matching_pursuit import MatchingPursuit as MatchingPursuit
    from mechinterp.features.measure import Measured as Measured
    from mechinterp.features.measure import measure_basis as measure_basis
    from mechinterp.features.neurons import neuron_basis as neuron_basis
    from mechinterp.features.snmf import Factorised as Factorised
    from mechinterp.features.snmf import snmf_basis as snmf_basis
    from mechinterp.features.store import save_basis as save_basis
    from mechinterp.features.subspaces import concept_basis as concept_basis
    from mechinterp.features.subspaces import direction_basis as direction_basis
    from mechinterp.features.subspaces import leace_basis as leace_basis
    from mechinterp.features.subspaces import subspace_basis as subspace_basis
    from mechinterp.features.subspaces import svd_basis as svd_basis
    from mechinterp.features.supervised import Supervised as Supervised
    from mechinterp.features.supervised import supervised_basis as supervised_basis
    from mechinterp.features.wrapped import wrap_basis as wrap_basis
    from mechinterp.graphs.circuit import Circuit as Circuit
    from mechinterp.graphs.graph import Graph as Graph
    from mechinterp.graphs.graph import build_graph as build_graph
    from mechinterp.graphs.score_agreement import ScoreAgreement as ScoreAgreement
    from mechinterp.graphs.score_agreement import score_agreement as score_agreement
    from mechinterp.graphs.scores import Scores as Scores
    from mechinterp.graphs.select import select as select
    from mechinterp.models.feature_basis import FeatureBasis as FeatureBasis
    from mechinterp.models.feature_basis import Features as Features
    from mechinterp.models.generation import Generated as Generated
    from mechinterp.models.hook_manager import HookManager as HookManager
    from mechinterp.models.hook_manager import Intervention as Intervention
    from mechinterp.models.hook_manager import Run as Run
    from mechinterp.models.hook_manager import load_model as load_model
    from mechinterp.models.interventions import Hook as Hook
    from mechinterp.models.random_weights import with_random_weights as with_random_weights
    from mechinterp.models.sites import Edge as Edge
    from mechinterp.models.sites import Node as Node
    from mechinterp.models.sites import Site as Site
    from mechinterp.models.texts import Prompts as Prompts
    from mechinterp.models.texts import ReadsTexts as ReadsTexts
    from mechinterp.models.weight_names import LayerWeights as LayerWeights
    from mechinterp.models.weight_names import WeightsByName as WeightsByName
    from mechinterp.pipeline import Discovery as Discovery
    from mechinterp.pipeline import discover as discover
    from mechinterp.run_costs import DryRun as DryRun
    from mechinterp.run_costs import dry_run as dry_run
    from mechinterp.run_spec import RunSpec as RunSpec
    from mechinterp.tasks.metric_names import METRICS as METRICS
    from mechinterp.tasks.metrics import Metric as Metric
    from mechinterp.tasks.metrics import get_metric as get_metric
    from mechinterp.tasks.metrics import metric_names as metric_names
    from mechinterp.tasks.metrics import register_metric as register_metric
    from mechinterp.tasks.own_metric import FunctionMetric as FunctionMetric
    from mechinterp.tasks.own_metric import metric as metric
    from mechinterp.tasks.pair_files import load_pairs as load_pairs
    from mechinterp.tasks.pairs import Pairs as Pairs
    from mechinterp.tasks.task import Task as Task
    from mechinterp.tasks.task import load_task as load_task
    from mechinterp.tasks.task import task_names as task_names
    from mechinterp.views.plots.compare import comparison_curves as comparison_curves
    from mechinterp.views.plots.compare import overlap_matrix as overlap_matrix
    from mechinterp.views.plots.grids import attention_figure as attention_figure
    from mechinterp.views.plots.grids import heatmap as heatmap
    from mechinterp.views.plots.grids import lens_figure as lens_figure
    from mechinterp.views.plots.grids import token_labels as token_labels
    from mechinterp.views.plots.grids import waterfall as waterfall
    from mechinterp.views.plots.save import save_html as save_html
    from mechinterp.views.plots.save import save_image as save_image
    from mechinterp.views.plots.steering import steering_curve as steering_curve
    from mechinterp.views.plots.text import text_page as text_page
    from mechinterp.views.report.aggregate_page import write_aggregate_page as write_aggregate_page
    from mechinterp.views.report.attribution_page import write_graph_page as write_graph_page
    from mechinterp.views.report.write_page import write_page as write_page

_HOMES = {
    "analysis.activation_patching": ("activation_patching", "fraction"),
    "analysis.compensation": ("compensation",),
    "analysis.attention_edits": ("edit_pattern", "knock_out_attention"),
    "analysis.attribution": ("attribution_patching", "node_attribution"),
    "analysis.attribution_graph.aggregate": ("AggregatedGraph", "aggregate_graphs", "graph_prompts"),
    "analysis.attribution_graph.build": ("GraphSize", "attribution_graph", "graph_size"),
    "analysis.attribution_graph.graph": ("AttributionGraph", "GraphNode", "Supernode"),
    "analysis.attribution_graph.supernodes": ("find_supernodes",),
    "analysis.attribution_graph.validate": ("EdgeValidation", "GraphValidation", "validate_edges", "validate_graph"),
    "analysis.causal_tracing": ("causal_tracing",),
    "analysis.composition": ("composition_scores",),
    "analysis.contextual": ("Decomposition", "contextual_decomposition"),
    "analysis.describe": ("Description", "Examples", "describe", "strongest_examples"),
    "analysis.description_scores": ("DescriptionScore", "SeparationScores", "score_description", "separation_scores"),
    "analysis.judge_bases": ("JudgedBases", "judge_bases"),
    "analysis.direct_logit_attribution": ("direct_logit_attribution", "group_parts"),
    "analysis.feature_circuit.build": ("FeatureCircuit", "FeatureEffects", "feature_circuit", "feature_effects"),
    "analysis.feature_circuit.evaluate": (
        "FeatureCurves",
        "FeatureFaithfulness",
        "evaluate_feature_circuit",
        "feature_circuit_curves",
    ),
    "analysis.feature_concepts": ("FeatureConcepts", "feature_concepts"),
    "analysis.feature_notes": ("FeatureNote", "feature_notes"),
    "analysis.feature_weights": ("feature_weights",),
    "analysis.head_detectors": ("attention_between", "attention_to", "copying_scores", "head_scores"),
    "analysis.integrated_gradients": ("integrated_gradients",),
    "analysis.logit_lens": ("LogitLens", "logit_lens", "writes_lens"),
    "analysis.patchscopes": ("Patchscope", "patchscope"),
    "analysis.path_patching": ("path_patching",),
    "analysis.phrases": ("PhraseRelevance", "phrase_relevance"),
    "analysis.qk_attribution": ("qk_attribution",),
    "analysis.relevance": ("Relevance", "relevance"),
    "analysis.shift": ("LabelledPrompts", "ShiftedProbe", "shift_probe"),
    "analysis.steering": ("ablate_direction", "add_direction", "affine", "mean_difference"),
    "analysis.subspace": ("learn_subspace", "subspace_interchange"),
    "analysis.subspace_controls": (
        "AlignmentControls",
        "SubspaceParts",
        "alignment_controls",
        "split_effects",
        "split_subspace",
    ),
    "analysis.tuned_lens": ("TunedLens", "load_lens", "save_lens", "train_tuned_lens"),
    "analysis.weights": ("feature_tokens", "neuron_tokens", "ov_circuit", "qk_circuit", "top_tokens"),
    "analysis.directions": ("Direction", "find_direction", "given_direction", "orient_pairs", "read_direction"),
    "analysis.probes": ("Probes", "held_out", "probe_directions"),
    "analysis.causal_inner_product": (
        "CausalInnerProduct",
        "ConceptDirection",
        "causal_inner_product",
        "concept_direction",
    ),
    "analysis.text_span": ("TextSpan", "text_span"),
    "features.affine_fits": ("AffineFit", "fit_affine"),
    "features.direction_fits": ("DirectionFit", "fit_direction"),
    "analysis.scrubbing": ("Scrubbing", "scrub_concept"),
    "analysis.steering_sweep": ("steering_sweep",),
    "views.plots.steering": ("steering_curve",),
    "models.generation": ("Generated",),
    "analysis.direction_paths": ("direction_paths", "direction_readers", "direction_writers"),
    "analysis.observables": ("coupling", "observable"),
    "analysis.direction_comparison": ("ComparedDirections", "compare_directions"),
    "analysis.knn_deviation": ("knn_deviation",),
    "analysis.token_norms": ("token_attribution", "token_contributions"),
    "analysis.information_bottleneck": ("information_bottleneck",),
    "analysis.unit_scan": ("UnitScan", "scan_units"),
    "graphs.score_agreement": ("ScoreAgreement", "score_agreement"),
    "circuit_file.direction_claims": ("verify_direction",),
    "circuit_file.direction_file": ("load_direction",),
    "direct": ("DirectSpec", "discover_direction"),
    "run_costs": ("DryRun", "dry_run"),
    "base.errors": (
        *("FormatError", "InputError", "MechInterpError", "NoSmallCircuit", "SiteNotReached", "TaskNotDone"),
        "UnsupportedError",
    ),
    "base.processes": ("torchrun_processes",),
    "base.text_files": ("read_texts",),
    "circuit_file.circuit_file": ("load_circuit", "save_circuit"),
    "circuit_file.diff": ("CircuitDiff", "diff_circuits"),
    "circuit_file.formats.aggregated_graphs": ("load_aggregated_graph", "save_aggregated_graph"),
    "circuit_file.formats.attribution_graphs": ("load_attribution_graph", "save_attribution_graph"),
    "circuit_file.hub": ("pull_circuit", "push_circuit"),
    "circuit_file.reevaluate": ("Reevaluation", "reevaluate"),
    "circuit_file.verify.claims": ("Claim", "Verification"),
    "circuit_file.verify.verification": ("verify",),
    "discovery.acdc": ("acdc_thresholds",),
    "discovery.acdc_orders": ("AcdcOrders", "acdc_orders"),
    "discovery.ensemble": ("ensemble_scores",),
    "discovery.features": ("top_features",),
    "discovery.memory": ("auto_batch_size",),
    "discovery.method": ("score_edges",),
    "discovery.methods": ("METHODS",),
    "discovery.neurons": ("top_neurons",),
    "discovery.refine": ("refine_circuit",),
    "discovery.stable": ("CircuitStability", "StableScores", "circuit_stability", "stable_scores"),
    "engines.decomposition.encoder": ("Encoder", "load_encoder"),
    "engines.edge_attribution": ("edge_gradients",),
    "engines.edge_patching": ("run_edges",),
    "engines.grid": ("Grid",),
    "evaluation.against_random": ("minimality_test", "necessity_test", "sufficiency_test"),
    "compare": ("compare_methods",),
    "evaluation.comparison": ("Comparison",),
    "evaluation.completeness": ("Completeness", "completeness", "greedy_completeness"),
    "evaluation.faithfulness": ("Evaluation", "evaluate"),
    "evaluation.ground_truth": ("against_truth",),
    "evaluation.hypotheses": ("HypothesisTest", "equivalence_test", "independence_test"),
    "evaluation.measurements": ("Checked", "check_predictions", "predictions_frame"),
    "evaluation.minimality": ("Minimality", "edge_minimality", "node_minimality"),
    "evaluation.predictions": (
        "Attention",
        "Control",
        "Copying",
        "Detector",
        "DirectEffect",
        "DirectEffectChange",
        "EdgesCut",
        "PartsReplaced",
        "PathPatched",
        "Prediction",
    ),
    "evaluation.roles": ("MeasuredRoles", "RoleLimits", "measured_roles"),
    "evaluation.stability": ("Stability", "stability"),
    "evaluation.task_check": ("TaskCheck", "check_performance"),
    "evaluation.transfer": ("Transfer", "transfer"),
    "features.activations": ("Gated", "JumpRelu", "Relu", "TopK"),
    "features.basis": ("Basis",),
    "features.dictionary": (
        "Dictionary",
        "cross_layer_transcoder",
        "crosscoder",
        "relative_norms",
        "sae",
        "transcoder",
    ),
    "features.edits": ("ablate_features", "add_features", "reconstructed", "scale_features", "set_features"),
    "features.geometry": (
        "Irreducibility",
        "cluster_features",
        "cluster_points",
        "clusters_table",
        "feature_dimensions",
        "irreducibility",
    ),
    "features.matching": ("FeatureFlow", "FeatureMatches", "feature_flow", "feature_strengths", "match_features"),
    "features.load": ("load_bases", "load_basis"),
    "features.matching_pursuit": ("MatchingPursuit",),
    "features.measure": ("Measured", "measure_basis"),
    "features.neurons": ("neuron_basis",),
    "features.snmf": ("Factorised", "snmf_basis"),
    "features.store": ("save_basis",),
    "features.subspaces": ("concept_basis", "direction_basis", "leace_basis", "subspace_basis", "svd_basis"),
    "features.supervised": ("Supervised", "supervised_basis"),
    "features.wrapped": ("wrap_basis",),
    "graphs.circuit": ("Circuit",),
    "graphs.graph": ("Graph", "build_graph"),
    "graphs.scores": ("Scores",),
    "graphs.select": ("select",),
    "models.feature_basis": ("FeatureBasis", "Features"),
    "models.hook_manager": ("HookManager", "Intervention", "Run", "load_model"),
    "models.interventions": ("Hook",),
    "models.random_weights": ("with_random_weights",),
    "models.sites": ("Edge", "Node", "Site"),
    "models.texts": ("Prompts", "ReadsTexts"),
    "models.weight_names": ("LayerWeights", "WeightsByName"),
    "pipeline": ("Discovery", "discover"),
    "run_spec": ("RunSpec",),
    "tasks.metric_names": ("METRICS",),
    "tasks.metrics": ("Metric", "get_metric", "metric_names", "register_metric"),
    "tasks.own_metric": ("FunctionMetric", "metric"),
    "tasks.pair_files": ("load_pairs",),
    "tasks.pairs": ("Pairs",),
    "tasks.task": ("Task", "load_task", "task_names"),
    "views.plots.compare": ("comparison_curves", "overlap_matrix"),
    "views.plots.grids": ("attention_figure", "heatmap", "lens_figure", "token_labels", "waterfall"),
    "views.plots.save": ("save_html", "save_image"),
    "views.plots.text": ("text_page",),
    "views.report.aggregate_page": ("write_aggregate_page",),
    "views.report.attribution_page": ("write_graph_page",),
    "views.report.write_page": ("write_page",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'mechinterp' has no attribute {name!r}")
    value = getattr(import_module(f"mechinterp.{_HOME_OF[name]}"), name)
    if isinstance(value, FunctionType) and in_notebook():
        value = with_bar(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
