"""Kernels in C++ for a step of decoding, compiled on first use; without a compiler PyTorch decodes alone."""
