"""Triton kernels, installed as `cldf_fast.kernels`: they import torch and triton, and nothing of the package."""
