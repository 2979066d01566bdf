# SPDX-License-Identifier: Apache-2.0
"""Convolutions of single chunks as matrix products: the same numbers, only where they are few and need no gradient."""

import pytest
import torch
from torch import nn

from robopost.nets import unet1d
from robopost.nets.unet1d import Conv1d, ConvTranspose1d, UNet1D

CONVOLUTIONS = [
    (Conv1d, nn.Conv1d, (6, 10, 5), {"padding": 2}),
    (Conv1d, nn.Conv1d, (6, 6, 3), {"padding": 1, "stride": 2}),
    (Conv1d, nn.Conv1d, (6, 2, 1), {}),
    (ConvTranspose1d, nn.ConvTranspose1d, (6, 7, 4), {"padding": 1, "stride": 2}),
]


@pytest.mark.parametrize(("ours", "theirs", "sizes", "options"), CONVOLUTIONS)
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 2), (1, 8), (2, 16), (8, 4), (8, 5)])
def test_single_chunks_give_torchs_numbers(ours, theirs, sizes, options, batch, steps):
    torch.manual_seed(0)
    layer, plain = ours(*sizes, **options), theirs(*sizes, **options)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(batch, sizes[0], steps)
    with torch.no_grad():
        got, expected = layer(x), plain(x)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_gradients_and_many_chunks_go_torchs_way(monkeypatch):
    seen = []
    monkeypatch.setattr(nn.functional, "linear", lambda *args: seen.append(args))
    layer = Conv1d(4, 4, 3, padding=1)
    layer(torch.randn(1, 4, 8)).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        layer(torch.randn(5, 4, 8))  # 40 rows
        assert not seen
        with pytest.raises(AttributeError):
            layer(torch.randn(4, 4, 8))
    assert len(seen) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_whole_network(monkeypatch, batch):
    torch.manual_seed(0)
    net = UNet1D(16, 2, 5, (8, 16, 24), times=2)
    x, cond, times = torch.randn(batch, 16, 2), torch.randn(batch, 5), torch.rand(2, batch)
    with torch.no_grad():
        got = net(x, cond, *times)
        monkeypatch.setattr(unet1d, "MATRIX_ROWS", 0)
        torch.testing.assert_close(got, net(x, cond, *times), rtol=1e-4, atol=1e-5)
    # Checkpoints of either kind are the same.
    assert {name.rpartition(".")[2] for name in net.state_dict()} == {"weight", "bias"}
