"""Names of methods and metrics with one line each, for the command line: no torch is needed to read them."""

METHODS = {
    "eap": "edge attribution patching, the gradient at the clean run (Syed et al. 2023)",
    "eap-ig": "the same with integrated gradients over the inputs (Hanna et al. 2024); the default",
    "acdc": "every edge cut for good unless that costs tau (Conmy et al. 2023); best with --metric kl_to_clean",
    "cd": "contextual decomposition of nodes, from the logits back (Hsu et al. 2024)",
    "cd-edges": "contextual decomposition along edges, linear rules in one backward",
    "relp": "edge attribution with LRP coefficients (Rezaei Jafari et al. 2025)",
    "clean-corrupted": "the mean of the gradients at the clean and the corrupt run",
    "eap-ig-activations": "integrated gradients over each layer's activations (MIB)",
    "random": "random scores, a baseline",
    "weight-magnitude": "size of the weights between writer and reader, a baseline",
    "exact": "every edge replaced alone; as many runs as edges",
}
"""Kept here as well as in the registry, so that `list` and a mistyped name need no torch; a test compares both."""
METRICS = {
    "logit_diff": "right answers' logits minus wrong ones'",
    "prob": "probability of the right answers",
    "log_prob": "log of the probability of the right answers",
    "prob_diff": "right answers' probability minus wrong ones'",
    "accuracy": "right answer above every wrong one; only for evaluating",
    "kl_to_clean": "KL(full model || circuit), needs no answers",
    "l2_to_clean": "distance of the logits, needs no answers",
}
REPLACEMENTS = ("corrupt", "mean", "mean-positional", "zero")
"""The same as `mechinterp.replacement.KINDS`."""
