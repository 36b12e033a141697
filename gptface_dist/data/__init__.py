"""From tar shards of pictures with captions to identical batches of tokens on any number of ranks."""
