"""Sizes, scaling laws and the arithmetic of the papers' tables."""
