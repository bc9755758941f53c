"""From the engine to Redis: what is held, committed, kept alive, and swept up."""
