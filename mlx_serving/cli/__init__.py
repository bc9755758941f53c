"""The `mlx-serving` command. One module a command; nothing heavy is imported before it is used."""
