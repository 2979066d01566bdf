# SPDX-License-Identifier: Apache-2.0
"""FAST action tokens: the transform, round trips, clean failure."""

import json
import math

import pytest
import torch

from robopost.errors import CheckpointError, ConfigError, DataError
from robopost.nets.fast_tokens import FastTokens, coefficients, dct_matrix, from_coefficients

pytest.importorskip("tokenizers")


def smooth(count=64, horizon=50, actions=7, seed=0):
    """Sums of a few slow sines within [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, horizon)
    phase = 2 * math.pi * torch.rand(count, 3, actions, generator=g)
    rate = torch.tensor([0.5, 1.0, 1.5])[None, :, None]
    waves = torch.sin(2 * math.pi * rate[..., None] * t + phase[..., None])
    return waves.mean(1).mT


@pytest.fixture(scope="module")
def fast():
    return FastTokens.fit(smooth())


def test_cosine_transform_by_hand_and_back():
    root = math.sqrt(0.5)
    torch.testing.assert_close(
        dct_matrix(2), torch.tensor([[root, root], [root, -root]], dtype=torch.float64)
    )
    for size in (1, 2, 7, 50):
        matrix = dct_matrix(size)
        assert (matrix @ matrix.mT - torch.eye(size)).abs().max() < 1e-12
        chunk = torch.randn(3, size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert (from_coefficients(coefficients(chunk)) - chunk).abs().max() < 1e-9
    flat = coefficients(torch.ones(1, 4, 1, dtype=torch.float64))[0, :, 0]
    torch.testing.assert_close(flat, torch.tensor([2.0, 0, 0, 0], dtype=torch.float64))


def test_frequency_is_the_slow_index():
    chunks = torch.zeros(4, 3, 2)
    chunks[:, :, 1] = 1.0  # only the second dimension, only frequency 0: coefficient sqrt(3)
    chunks[0] = 0.0
    fast = FastTokens.fit(chunks, scale=10.0, vocab_size=32)
    text = fast.bpe.decode(fast.encode(chunks[1:2])[0]).replace(" ", "")
    assert [ord(c) - 0x100 for c in text] == [0, round(10 * math.sqrt(3)), 0, 0, 0, 0]


@pytest.mark.parametrize(("scale", "bound"), [(5.0, 0.04), (10.0, 0.02), (20.0, 0.012)])
def test_smooth_chunks_come_back_in_few_tokens(scale, bound):
    chunks = smooth()
    fast = FastTokens.fit(chunks, scale=scale)
    tokens = fast.encode(smooth(seed=0))
    back, read = fast.decode(tokens)
    error = (back - chunks).square().mean().sqrt().item()
    assert read.all()
    assert error <= 0.5 / scale  # orthonormal: as large as the rounding error of a coefficient at most
    assert error < bound
    assert fast.vocab_size <= 1024
    assert sum(map(len, tokens)) < 0.25 * chunks.numel()


def test_noise_has_the_error_of_rounding():
    noise = torch.rand(200, 50, 7, generator=torch.Generator().manual_seed(1)) * 2 - 1
    fast = FastTokens.fit(noise)
    back, read = fast.decode(fast.encode(noise))
    assert read.all()
    error = (back - noise).square().mean().sqrt().item()
    assert error == pytest.approx(0.1 / math.sqrt(12), rel=0.05)


def test_what_is_beyond_the_training_data_is_clipped(fast):
    chunk = 40 * smooth(1)
    back, read = fast.decode(fast.encode(chunk))
    assert read.all()
    values = coefficients(back.double()) * fast.scale
    assert values.min() >= fast.low - 1e-3
    assert values.max() <= fast.high + 1e-3


def test_garbage_gives_zeros_and_a_flag(fast):
    g = torch.Generator().manual_seed(0)
    good = fast.encode(smooth(1))[0]
    bad = [torch.randint(fast.vocab_size, (n,), generator=g).tolist() for n in (0, 1, 5, 400, 2000)]
    bad += [good[:-1], [*good, good[0]], [fast.vocab_size], [-1], [2**40], [*good[:-1], 10**6]]
    chunks, read = fast.decode([*bad, good])
    assert read.tolist() == [False] * len(bad) + [True]
    assert not chunks[:-1].any()
    assert chunks[-1].any()


def test_stored_and_read_again(fast):
    again = FastTokens.from_json(json.loads(json.dumps(fast.to_json())))
    chunks = smooth(3, seed=5)
    assert again.encode(chunks) == fast.encode(chunks)
    assert torch.equal(again.decode(again.encode(chunks))[0], fast.decode(fast.encode(chunks))[0])
    with pytest.raises(CheckpointError, match=r"no FAST tokenizer"):
        FastTokens.from_json({"bpe": "{}"})


def test_many_values_do_not_meet_the_surrogates():
    chunks = torch.linspace(-1, 1, 4000).view(1000, 4, 1)
    fast = FastTokens.fit(chunks, scale=20_000.0, vocab_size=200_000)
    assert 0x100 + fast.high - fast.low > 0xE000
    back, read = fast.decode(fast.encode(chunks))
    assert read.all()
    assert (back - chunks).abs().max() < 1e-3


def test_bad_input_is_named(fast):
    with pytest.raises(ConfigError, match=r"coefficients take \d+ values .* at scale=1000, vocab_size=1024"):
        FastTokens.fit(smooth(), scale=1000.0)
    with pytest.raises(ConfigError, match=r"scale=0"):
        FastTokens.fit(smooth(), scale=0.0)
    with pytest.raises(DataError, match=r"must be \(N, H, A\)"):
        FastTokens.fit(torch.zeros(0, 4, 2))
    with pytest.raises(DataError, match=r"finite"):
        FastTokens.fit(torch.full((2, 4, 2), float("nan")))
    with pytest.raises(DataError, match=r"must be \(N, 50, 7\)"):
        fast.encode(torch.zeros(1, 4, 7))
