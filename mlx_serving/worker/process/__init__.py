"""The worker's two processes: the parent, the engine child, and how a death is judged."""
