"""Arithmetic of sizes on the host. Triton's functions of these names serve kernels as well, and take a launch 3 to 4 us each on the host."""


def cdiv(n: int, divisor: int) -> int:
    """Return ``n / divisor`` rounded up."""
    return -(-n // divisor)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not less than ``n``, from 1 on."""
    return 1 << max(0, n - 1).bit_length()
