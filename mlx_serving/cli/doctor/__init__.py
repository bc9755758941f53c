"""`mlx-serving doctor`: looks at Redis, the engine and the machine, and says what it means."""
