"""Prefix index, beam search, the Recommender."""
