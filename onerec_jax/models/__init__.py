"""One file a system, whole in itself; shared parts beside."""
