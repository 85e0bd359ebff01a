"""Convolutions as products: the same numbers, forward and back."""

import torch
from torch import nn

from gpu_agent.lora.deep_convs import as_products


def passed(layer, pixels):
    pixels = pixels.clone().requires_grad_()
    said = layer(pixels)
    said.square().sum().backward()
    return said.detach(), pixels.grad


def test_a_deep_convolution_and_its_gradient_do_not_change():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Conv2d(672, 672, 3, padding=1).requires_grad_(False)
        shapes = [(1, 672, 8, 8), (2, 672, 4, 8), (1, 672, 4, 4), (1, 672, 16, 16)]
        batches = [torch.randn(shape) for shape in shapes]
    before = [passed(layer, pixels) for pixels in batches]
    assert as_products(nn.Sequential(layer)) == 1
    for pixels, (said, gradient) in zip(batches, before, strict=True):
        got, back = passed(layer, pixels)
        torch.testing.assert_close(got, said, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(back, gradient, rtol=1e-3, atol=1e-3)


def test_layers_that_train_or_are_small_stay_as_they_are():
    small = nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False)
    trained = nn.Conv2d(672, 672, 3, padding=1)
    assert as_products(nn.Sequential(small, trained)) == 0
