"""Reach a runtime that several processes share, and start it where there is none."""
