"""The foundations: errors, the registry, safe writing, progress and batches."""
