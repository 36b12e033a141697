"""The measured study of generation and editing: do pictures show what the text says, by a judge that knows no text."""
