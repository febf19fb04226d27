"""Kernels for the CPU: the definitions of `functional.py`, made fast with NumPy on every core."""
