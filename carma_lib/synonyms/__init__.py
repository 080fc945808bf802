"""Synonym replacement: WordNet's candidates, words in context, replacement, and its quality."""
