"""Files of models in, each kind by a module of its own that the core finds by entry point."""
