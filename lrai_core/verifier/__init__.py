"""Statements about how far a variant can be from its source, and how to check them."""
