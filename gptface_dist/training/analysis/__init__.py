"""Analyses of finished runs, from the metrics in their folders."""
