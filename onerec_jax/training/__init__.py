"""Losses, optimizer, one pure step, the loop."""
