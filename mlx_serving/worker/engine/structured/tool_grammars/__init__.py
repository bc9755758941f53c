"""Grammars of tool calls, one module a family of formats."""
