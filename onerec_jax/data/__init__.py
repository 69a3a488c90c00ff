"""Raw files → tables → examples in shards → batches."""
