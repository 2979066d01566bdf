# SPDX-License-Identifier: Apache-2.0
"""Operators against numbers computed by hand, and against the blocks that the engine gives them."""

import math

import pytest
import torch

from robopost.errors import ConfigError
from robopost.merging import operators as op


def vectors(*rows):
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def test_linear_by_hand_and_exact_ends():
    a, b = vectors([1.0, -2.0, 0.1], [3.0, 2.0, 0.3])
    assert torch.allclose(op.linear(a, b, 0.25), torch.tensor([1.5, -1.0, 0.15]))
    a, b = torch.randn(1000), torch.randn(1000) * 1e-6
    assert torch.equal(op.linear(a, b, 0.0), a)
    assert torch.equal(op.linear(a, b, 1.0), b)


def test_linear_is_linear_in_alpha():
    torch.manual_seed(0)
    a, b = torch.randn(5000), torch.randn(5000)
    start = op.linear(a, b, 0.0)
    for alpha in (0.1, 0.25, 0.5, 0.9):
        assert torch.allclose(op.linear(a, b, alpha) - start, alpha * (b - a), atol=1e-6)


def test_half_precision_parents_are_merged_in_float32():
    a, b = vectors([1.0, 2.0], [1.0078125, 2.015625])
    out = op.linear(a.bfloat16(), b.bfloat16(), 0.5)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.tensor([1.00390625, 2.0078125]))  # between two bfloat16 numbers
    assert op.linear(a.double(), b.double(), 0.5).dtype == torch.float64


def test_task_arithmetic_adds_and_removes():
    base, one, two = vectors([1.0, 1.0], [2.0, 1.0], [1.0, 4.0])
    assert torch.equal(op.task_arithmetic(base, [one, two], [1.0, 0.5]), torch.tensor([2.0, 2.5]))
    assert torch.equal(op.task_arithmetic(base, [one], [-1.0]), torch.tensor([0.0, 1.0]))


def test_soup_is_the_mean():
    assert torch.equal(op.weighted_mean(vectors([0.0, 3.0], [6.0, 6.0]), [1, 1]), torch.tensor([3.0, 4.5]))
    assert torch.equal(op.weighted_mean(vectors([0.0, 3.0], [6.0, 6.0]), [2, 1]), torch.tensor([2.0, 4.0]))
    with pytest.raises(ConfigError, match="sum to 0"):
        op.weighted_mean(vectors([1.0], [1.0]), [1, -1])


def test_continual_is_the_closed_form_of_sequential_merges():
    torch.manual_seed(0)
    base, *tuned = (torch.randn(200) for _ in range(5))
    merged = base
    for model in tuned:
        merged = op.linear(merged, model, 0.3)
    assert torch.allclose(op.continual(base, tuned, 0.3), merged, atol=1e-6)
    assert op.continual_weights(0.5, 2) == [0.25, 0.25, 0.5]


def test_slerp_keeps_the_norm_where_linear_shrinks():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1000, generator=generator) for _ in range(2))
    scale = 31.0
    a, b = a / a.norm() * scale, b / b.norm() * scale
    assert op.slerp(a, b, 0.5).norm().item() == pytest.approx(31.0, abs=0.2)
    assert op.linear(a, b, 0.5).norm().item() == pytest.approx(scale / math.sqrt(2), abs=0.8)
    assert torch.equal(op.slerp(a, b, 0.0), a)
    assert torch.equal(op.slerp(a, b, 1.0), b)


def test_slerp_by_hand_and_its_linear_limit():
    a, b = vectors([1.0, 0.0], [0.0, 1.0])
    third = op.slerp(a, b, 1 / 3)
    assert torch.allclose(third, torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]), atol=1e-6)
    near = a + torch.tensor([0.0, 0.01])
    assert torch.equal(op.slerp(a, near, 0.5), op.linear(a, near, 0.5))
    zero = torch.zeros(2)
    assert torch.equal(op.slerp(zero, b, 0.5), op.linear(zero, b, 0.5))


def test_slerp_in_blocks():
    torch.manual_seed(0)
    a, b = torch.randn(100), torch.randn(100)
    angle = op.products(a, b)
    parts = [op.slerp(a[s], b[s], 0.3, angle) for s in (slice(0, 37), slice(37, 100))]
    assert torch.allclose(torch.cat(parts), op.slerp(a, b, 0.3), atol=1e-6)


def test_ties_by_hand():
    base = torch.zeros(4)
    tuned = vectors([3.0, -0.1, 1.0, -2.0], [1.0, 0.2, -4.0, -0.9])
    assert torch.equal(op.ties(base, tuned, 1.0, 0.5), torch.tensor([2.0, 0.0, -4.0, -2.0]))
    base = torch.full((4,), 5.0)
    shifted = [base + vector for vector in tuned]
    expected = torch.tensor([6.0, 5.0, 3.0, 4.0])  # half of the same task vector
    assert torch.allclose(op.ties(base, shifted, 0.5, 0.5), expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 100_003])
@pytest.mark.parametrize("keep", [0.001, 0.2, 0.5, 0.999, 1.0])
def test_threshold_is_the_exact_order_statistic(count, keep):
    vector = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 1e-4
    cut = op.threshold(lambda: iter(vector.split(317)), count, keep)
    rank = math.ceil(keep * count - 1e-9)
    expected = vector.abs().sort(descending=True).values[rank - 1].item()
    assert cut == (0.0 if rank >= count else expected)
    assert int((vector.abs() >= cut).sum()) == rank


def test_ties_refuses_to_keep_nothing():
    with pytest.raises(ConfigError, match=r"keep=0 must lie in \(0, 1\]"):
        op.threshold(lambda: iter([torch.ones(2)]), 2, 0)


def test_dare_keeps_the_mean_and_scales_the_norm():
    base = torch.zeros(200_000)
    tuned = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) + 1.0
    merged = op.dare(base, [tuned], [1.0], 0.9, [7])
    assert merged.mean().item() == pytest.approx(tuned.mean().item(), abs=0.03)
    assert (merged.norm() / tuned.norm()).item() == pytest.approx(math.sqrt(10), abs=0.05)
    assert (merged != 0).float().mean().item() == pytest.approx(0.1, abs=0.003)
    assert torch.equal(op.dare(base, [tuned], [1.0], 0.0, [7]), tuned)
    with pytest.raises(ConfigError, match=r"drop=1 must lie in \[0, 1\)"):
        op.dare(base, [tuned], [1.0], 1, [7])


def test_dare_masks_do_not_depend_on_blocks_but_on_seeds():
    base, tuned = torch.zeros(1000), torch.ones(1000)
    whole = op.dare(base, [tuned], [1.0], 0.5, [3])
    parts = [op.dare(base[a:b], [tuned[a:b]], [1.0], 0.5, [3], a) for a, b in ((0, 123), (123, 1000))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(op.dare(base, [tuned], [1.0], 0.5, [4]), whole)


def test_counter_based_numbers_are_uniform():
    numbers = torch.from_numpy(op.uniforms(5, 0, 100_000))
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    counts = torch.histc(numbers, 20, 0, 1) / 5000
    assert (counts - 1).abs().max() < 0.06
    neighbours = torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]
    assert abs(neighbours) < 0.01


def test_fisher_weights_by_information():
    models, info = vectors([0.0, 2.0, 1.0], [4.0, 4.0, 3.0]), vectors([1.0, 0.0, 0.0], [3.0, 5.0, 0.0])
    assert torch.equal(op.fisher(models, info), torch.tensor([3.0, 4.0, 2.0]))


def test_inputs_are_not_modified():
    torch.manual_seed(0)
    tensors = [torch.randn(50) for _ in range(4)]
    before = [tensor.clone() for tensor in tensors]
    base, one, two, info = tensors
    op.linear(base, one, 0.5)
    op.slerp(base, one, 0.5)
    op.task_arithmetic(base, [one, two], [1.0, 1.0])
    op.weighted_mean([base, one], [1.0, 2.0])
    op.continual(base, [one, two], 0.5)
    op.ties(base, [one, two], 1.0, 0.3)
    op.dare(base, [one], [1.0], 0.5, [0])
    op.fisher([base, one], [info.abs(), two.abs()])
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now, then)


def test_merging_in_float32_recovers_the_task_vector_and_bfloat16_does_not():
    """Parents N(0, .02^2) that differ by 1e-5: what bfloat16 does to a fine-tuning delta."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200_000, generator=generator) * 0.02
    delta = torch.randn(200_000, generator=generator) * 1e-5
    tuned, alpha = base + delta, 0.75
    recovered = (op.linear(base, tuned, alpha) - base) / alpha
    assert ((recovered - delta).norm() / delta.norm()).item() < 1e-3
    low, high = base.bfloat16(), tuned.bfloat16()
    naive = (1 - alpha) * low + alpha * high
    error = ((naive.float() - base) / alpha - delta).norm() / delta.norm()
    assert 3.5 < error.item() < 9
    assert (low != high).float().mean().item() == pytest.approx(0.2, abs=0.1)


def test_greedy_soup_adds_only_what_helps():
    values = {0: 0.5, 1: 0.7, 2: 0.6}
    table = {(1, 2): 0.65, (1, 0): 0.8}
    chosen, tried = op.greedy_soup([values[i] for i in range(3)], lambda members: table[tuple(members)])
    assert chosen == [1, 0]
    assert tried == [([1], 0.7), ([1, 2], 0.65), ([1, 0], 0.8)]
