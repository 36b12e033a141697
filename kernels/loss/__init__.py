"""The output loss without whole logits."""
