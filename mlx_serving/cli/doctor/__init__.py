"""`mlx-serving doctor`: checks Redis, the engine and the machine."""
