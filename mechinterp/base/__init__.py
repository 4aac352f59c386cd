"""What everything else stands on: errors, the registry, safe writing, progress and batches."""
