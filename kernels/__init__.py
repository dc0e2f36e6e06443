"""Operations on tensors, on the CPU (numba) and the GPU (Triton), and what they share (simd, inspect)."""
