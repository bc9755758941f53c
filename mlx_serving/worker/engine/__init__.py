"""One continuous batch on one device. Imports neither redis nor rq.

Start reading at `interface` (what goes in and out), `row`, `engine` and `model_runner`. Without
`loader` and `model_runner` nothing imports mlx: `simulated` is an engine without a model.
"""
