"""The silent errors found in other circuit tools, each with the tests that would catch it here.

Every one was met in a published tool: the tool ran, printed a number, and the number was wrong.
"""

from __future__ import annotations

import importlib

import pytest

CAUGHT_BY = {
    "scores depend on how the examples were batched": [
        "discovery.test_methods.test_scores_do_not_depend_on_the_batches",
        "engines.test_edge_attribution.test_a_batch_is_the_sum_of_its_examples",
    ],
    "an MLP's score uses the gradient at the wrong site": [
        "discovery.test_methods.test_eap_ranks_as_brute_force_does",
        "engines.test_edge_attribution.test_edge_gradients_are_the_derivative_of_run_edges",
    ],
    "the saved circuit is not the evaluated one": [
        "circuit_file.test_circuit_file.test_a_result_of_another_circuit_is_refused",
        "circuit_file.test_verify.test_an_edge_less",
    ],
    "the answer is read one position late, behind a doubled BOS": [
        "tasks.test_pairs.test_refusals",
        "tasks.test_pairs.test_doubled_bos",
    ],
    "the ranking is inverted": [
        "discovery.test_methods.test_positive_means_that_the_edge_helps",
        "graphs.test_select.test_top_takes_the_best_and_keeps_both_counts",
    ],
    "a mean ablation averages over nodes": ["engines.test_replacement.test_means_are_over_real_tokens_and_per_node"],
    "an evaluation changes its argument": [
        "evaluation.test_faithfulness.test_nothing_of_the_caller_changes",
        "graphs.test_select.test_scores_are_not_changed",
    ],
    "a cache keyed by name outlives an edit of the data": ["circuit_file.test_verify.test_one_word_of_the_task_file"],
    "NaN weights, unknown keys, words out of vocabulary or a single example pass": [
        "models.test_load.test_nan_in_any_weight_is_named",
        "circuit_file.test_hostile_files.test_the_schema_refuses",
        "discovery.test_methods.test_ids_outside_the_vocabulary_and_nan_weights_are_refused",
    ],
    "parallel blocks are walked as sequential": [
        "engines.test_edge_patching.test_random_cuts_agree_with_an_independent_implementation",
        "graphs.test_graph.test_counts",
    ],
    "a hook never fires, or its value is on no path": [
        "models.test_run_refusals.test_a_site_that_fires_and_does_nothing_is_refused",
        "models.test_run_refusals.test_a_needed_site_off_the_path_refuses_the_model",
    ],
    "a saved circuit cannot be loaded again": [
        "circuit_file.test_circuit_file.test_any_circuit_comes_back",
        "circuit_file.test_circuit_file.test_every_shape_comes_back",
    ],
}


@pytest.mark.parametrize("error", CAUGHT_BY)
def test_is_caught(error: str) -> None:
    """The named tests exist; that they can fail is their own business."""
    for name in CAUGHT_BY[error]:
        module, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(f"tests.{module}"), function, None)), name


def test_there_are_twelve() -> None:
    assert len(CAUGHT_BY) == 12
