"""Generative recommenders of the OneRec family in JAX."""
