"""Whole pipelines on disk: found, loaded, converted and saved."""
