"""What finished runs say, read from their folders."""
