"""From a queue to the engine."""
