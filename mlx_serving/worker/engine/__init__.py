"""One continuous batch on one device. Imports neither redis nor rq.

``sequence`` and ``simulated`` import without mlx; ``engine`` and ``models`` need it.
"""
