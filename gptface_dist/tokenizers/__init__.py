"""Tokenizers: text (sentencepiece), image (VQ autoencoder), and the vocabulary that joins them."""
