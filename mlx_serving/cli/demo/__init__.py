"""`mlx-serving demo`: eight jobs side by side from one batch, each answer checked."""
