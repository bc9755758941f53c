"""What there is memory for, and what happens where there is not."""
