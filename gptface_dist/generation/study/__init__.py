"""A measured study of generation and editing: a judge that knows no text says whether pictures show what the text says."""
