"""The parent and what it knows: the child's life, health, metrics, crashes and their verdicts."""
