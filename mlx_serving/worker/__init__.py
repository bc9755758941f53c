"""The worker: claims jobs, holds one continuous batch on MLX, publishes tokens."""
