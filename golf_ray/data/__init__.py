"""Data: shards, tokenizers, batches, documents, and how data sets are made and checked."""
