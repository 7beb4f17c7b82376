"""Frames between client, scheduler and actor."""
