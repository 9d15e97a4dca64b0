"""From raw rows to batches: format -> mask -> cache -> pack -> plan -> loader."""
