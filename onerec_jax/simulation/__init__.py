"""A world of users and items with known true preference."""
