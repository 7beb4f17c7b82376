"""From a model to an artifact with the fastest form that passes the gate."""
