"""LRAI as a backend of Triton: `backend: "lrai"` in a model repository."""
