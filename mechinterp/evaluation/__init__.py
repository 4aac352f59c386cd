"""Evaluation: how well a circuit alone does the task."""
