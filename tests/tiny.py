"""Tiny random models of every supported family and tokenizers trained on the spot, for tests."""
