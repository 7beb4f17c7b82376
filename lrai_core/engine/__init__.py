"""What executes a variant."""
