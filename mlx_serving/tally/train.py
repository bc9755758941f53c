"""Train Tally: `python -m mlx_serving.tally.train --out folder`.

Data is generated while it trains; on a GPU the shipped weights take a few minutes. The same seed
and steps give the same batches on every device (with --max-seconds the schedule follows the clock).
"""

import argparse
import math
import os
from functools import partial
from pathlib import Path

from mlx_serving.common.interpreter import shut_out_current_folder, spawn_context


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--max-seconds", type=float, default=math.inf)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=float, default=1.0, help="share of the full batch")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--start", type=Path, help="weights to go on from, a model.safetensors")
    parser.add_argument(
        "--buckets", type=int, default=5, help="train on so many of the row lengths, short first"
    )
    return parser.parse_args()


def main() -> None:
    """Run the command line; the data processes start first and import this file without mlx."""
    options = read_options()
    shut_out_current_folder()
    with spawn_context().Pool(options.workers) as pool:
        from mlx_serving.tally.training import Options, run

        run(Options(**vars(options)), pool, partial(print, flush=True))


if __name__ == "__main__":
    main()
