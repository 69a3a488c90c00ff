"""Alignment of a generator with what users prefer."""
