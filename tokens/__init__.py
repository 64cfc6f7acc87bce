"""From text to tokens to batches: encodings, sources, the shard format, the loader."""
