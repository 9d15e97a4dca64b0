"""Turn raw rows into batches: source, format, mask, tokenize, cache, pack, batch_plan, loader."""
