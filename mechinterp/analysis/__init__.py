"""Analyses: plain functions over the hook manager, one file each."""
