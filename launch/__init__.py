"""Absl mains: parse flags, call the library."""
