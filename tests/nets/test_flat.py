# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from robopost.errors import ConfigError
from robopost.nets.flat import Flat, adam, frozen_copy, set_lr, step_where


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_parameters_are_views_of_one_tensor_and_keep_their_identity():
    module = net()
    params = list(module.parameters())
    values = [p.detach().clone() for p in params]
    flat = Flat(module)
    assert all(a is b for a, b in zip(module.parameters(), params, strict=True))
    assert all(torch.equal(p, v) for p, v in zip(params, values, strict=True))
    flat.data.fill_(2.0)
    assert all((p == 2).all() for p in params)
    module.load_state_dict(net().state_dict())
    assert torch.equal(flat.data, torch.cat([v.flatten() for v in values]))


def test_one_adam_step_equals_adam_over_the_parameters():
    module, other = net(), net()
    flat = Flat(module)
    ours, theirs = adam(flat, 1e-2), torch.optim.Adam(other.parameters(), lr=1e-2)
    x = torch.randn(8, 3)
    for _ in range(5):
        flat.backward(module(x).square().mean())
        norm = flat.clip(0.1)
        ours.step()
        theirs.zero_grad()
        other(x).square().mean().backward()
        expected = nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        assert norm == pytest.approx(expected.item(), rel=1e-5)
        theirs.step()
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"betas": (0.5, 0.9), "eps": 1e-5, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
)
def test_adam_is_torch_s_own_to_the_bit(options):
    flat, other = Flat(net()), Flat(net())
    ours = adam(flat, 1e-2, **options)
    theirs = torch.optim.Adam([other.param], lr=1e-2, fused=True, **options)
    g = torch.Generator().manual_seed(0)
    for step in range(6):
        gradient = torch.randn(flat.grad.shape, generator=g)
        flat.grad.copy_(gradient)
        other.grad.copy_(gradient)
        ours.step()
        theirs.step()
        if step == 2:
            set_lr(ours, 5e-3)
            set_lr(theirs, 5e-3)
    assert torch.equal(flat.data, other.data)
    left, right = (optimizer.state_dict()["state"][0] for optimizer in (ours, theirs))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_parameters_without_a_part_in_the_loss_get_zero_gradient():
    module = net()
    flat = Flat(module)
    flat.grad.fill_(7.0)
    flat.backward(module[0](torch.ones(1, 3)).sum())
    assert (flat.grad[:16] != 0).all()
    assert (flat.grad[16:] == 0).all()


def test_lerp_and_frozen_copy():
    module = net()
    flat = Flat(module)
    target, target_flat = frozen_copy(module)
    assert not any(p.requires_grad for p in target.parameters())
    before = target_flat.data.clone()
    flat.data.add_(1.0)
    target_flat.lerp(flat, 0.25)
    assert torch.allclose(target_flat.data, before + 0.25)
    assert torch.allclose(target[2].bias, module[2].bias - 0.75)


def test_masked_step_changes_neither_weights_nor_moments():
    module = net()
    flat = Flat(module)
    optimizer = adam(flat, 1e-2)
    flat.grad.fill_(1.0)
    step_where(optimizer, flat, torch.tensor(True))
    state = {key: value.clone() for key, value in optimizer.state[flat.param].items()}
    before = flat.data.clone()
    flat.grad.fill_(-3.0)
    step_where(optimizer, flat, torch.tensor(False))
    assert torch.equal(flat.data, before)
    assert all(torch.equal(value, optimizer.state[flat.param][key]) for key, value in state.items())
    step_where(optimizer, flat, torch.tensor(True))
    assert not torch.equal(flat.data, before)


def test_set_lr_keeps_a_tensor_rate_in_place():
    flat = Flat(net())
    optimizer = adam(flat, 1e-2)
    set_lr(optimizer, 1e-3)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    rate = torch.tensor(1e-2)
    optimizer.param_groups[0]["lr"] = rate
    set_lr(optimizer, 1e-4)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == pytest.approx(1e-4)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="no trainable parameters"):
        Flat(net().requires_grad_(False))
    mixed = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1).double()])
    with pytest.raises(ConfigError, match="one device and dtype"):
        Flat(mixed)
