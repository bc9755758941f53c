"""Grammars of tool calls: each format that mlx-lm can read, written as its parser reads it."""
