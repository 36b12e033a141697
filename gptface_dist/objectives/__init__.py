"""What is trained: one file an objective, and the protocol by which the rest of the system knows them."""
