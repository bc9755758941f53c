"""`mlx-serving batch`: bulk files of requests, run in the background."""
