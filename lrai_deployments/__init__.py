"""Versions of a model, how traffic is shared among them, and what that traffic is like."""
