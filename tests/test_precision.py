"""Products are as exact as a function asks for, and the caller's settings are as they were."""

import pytest
import torch

from selectsampler.precision import fast_products, full_precision

BACKENDS = [backend for backend in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(backend, "matmul")]


def settings():
    if all(hasattr(backend.matmul, "fp32_precision") for backend in BACKENDS):
        return [backend.matmul.fp32_precision for backend in BACKENDS]
    return [torch.get_float32_matmul_precision()]


@pytest.mark.parametrize("precision", [full_precision, fast_products])
def test_the_callers_setting_comes_back_also_after_an_error(precision):
    before = settings()
    with pytest.raises(KeyError), precision():
        raise KeyError
    assert settings() == before


def test_they_nest():
    with full_precision():
        exact = settings()
        with fast_products():
            fast = settings()
        assert settings() == exact
    assert fast != exact
    with fast_products(), full_precision():
        assert settings() == exact


def test_fast_products_are_still_good_to_two_digits_and_full_ones_to_six():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(96, 512, generator=generator), torch.randn(512, 80, generator=generator)
    expected = left.double() @ right.double()
    for precision, error in ((fast_products, 0.01), (full_precision, 1e-6)):
        with precision():
            difference = (left @ right - expected).abs().max()
        assert difference < error * expected.std() * 4
