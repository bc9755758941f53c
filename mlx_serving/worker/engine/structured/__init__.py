"""Structured output: grammars that text must follow, reasoning, tool calls."""
