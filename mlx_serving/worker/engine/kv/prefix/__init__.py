"""The prefix cache: blocks that are found again by their tokens."""
