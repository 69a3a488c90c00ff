"""Experiment files: one `get_config(arg)` a file."""
