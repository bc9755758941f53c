"""The prefix cache: what prompts have in common is computed once."""
