"""Tally: a tiny language model whose every answer a test can compute; `model/` has its weights."""
