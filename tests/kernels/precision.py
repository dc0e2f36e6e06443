"""The rule of accuracy: at most twice torch's error at the same dtype, both against float64."""

import torch


def to_double(value):
    """Floating-point tensors in float64; everything else as it is."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def assert_accurate(ours, theirs, exact, what):
    """``ours`` errs at most twice as much as ``theirs``.

    ``theirs`` counts as one rounding of the largest exact value at least, the price of storing a result in
    the dtype at all. Both are maxima: over few elements they are luck, so cases have some thousands.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, torch gives {theirs.dtype}"
    if exact.numel() == 0:
        return
    rounding = torch.finfo(ours.dtype).eps / 2
    odd = ~exact.isfinite()
    assert torch.equal(ours.double()[odd].nan_to_num(7.0), exact[odd].nan_to_num(7.0)), f"{what}: inf or NaN"
    ours, theirs, exact = (value.double().masked_fill(odd, 0.0) for value in (ours, theirs, exact))
    error, other = (ours - exact).abs().max().item(), (theirs - exact).abs().max().item()
    rounding *= exact.abs().max().item()
    assert error <= 2 * max(other, rounding), f"{what}: error {error:.2e}, torch's {other:.2e}"
