"""Complete pipelines on disk: how they are found, loaded, converted and saved."""
