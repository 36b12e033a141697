"""What happens at the named moments of a run: one file a callback."""
