"""The output loss, in chunks: the full logits tensor is never materialised."""
