"""`mlx-serving demo`: eight jobs side by side out of one batch, each answer checked."""
