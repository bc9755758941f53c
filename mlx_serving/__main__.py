"""`python -m mlx_serving` is the `mlx-serving` command."""

from mlx_serving.cli.main import app

if __name__ == "__main__":
    app()
