"""The form of a sequence ``[CLS] text [SEP] image [SEP]``: what data make and models read."""

IGNORE = -100
"""Label of a token that is not to be predicted; what ``torch.nn.functional.cross_entropy`` ignores."""
PADDING, TEXT, IMAGE = 0, 1, 2
"""Segments. [CLS] and both [SEP] belong to the text. Positions of image tokens are (row, column), all others (place, 0)."""
SEGMENTS = 3
SPECIALS_PER_SEQUENCE = 3
