"""Admission, parking, and the order of prefills. Pure: no mlx, no clock."""
