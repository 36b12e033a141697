"""GPTFace itself: the plain model that defines it, and the tables that lay it out over ranks."""
