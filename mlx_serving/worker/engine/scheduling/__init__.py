"""Who is admitted, who gives way, and whose prompt is computed next. Pure: no mlx, no clock."""
