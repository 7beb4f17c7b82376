"""The process that a model runs in, and the pool that keeps it alive."""
