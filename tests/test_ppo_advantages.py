"""The arithmetic of PPO against numbers worked out by hand and definitions written out."""

import math

import pytest
import torch

from prefalign.online import advantages as maths

T, F = True, False


def case(seed=0, rows=5, width=7):
    """Random numbers with masks of different lengths, one row empty, NaN where nothing counts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 3, 1, 0, 5][:rows])
    mask = torch.arange(width) < lengths[:, None]
    values = torch.randn(4, rows, width, generator=generator)
    return mask, values.masked_fill(~mask, math.nan)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_real_tokens():
    mask, (values, *_) = case()
    whitened = maths.whiten(values, mask)
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert whitened[mask].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert not whitened[~mask].any()
    kept = maths.whiten(values, mask, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx(values[mask].mean().item(), abs=1e-6)
    assert kept[mask].std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_whitening_over_processes_is_whitening_of_all_of_it():
    mask, (values, *_) = case()
    halves = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    first = [torch.stack([m.sum().double(), maths.masked_sum(v.double(), m)]) for v, m in halves]
    mean = sum(first)[1] / sum(first)[0]
    second = [maths.masked_sum((v.double() - mean) ** 2, m) for v, m in halves]
    parts = []
    for (own, own_mask), sums, squares in zip(halves, first, second, strict=True):
        missing = iter([sum(first) - sums, sum(second) - squares])
        parts.append(maths.whiten(own, own_mask, total=lambda local, missing=missing: local + next(missing)))
    assert torch.allclose(torch.cat(parts), maths.whiten(values, mask), atol=1e-6)


def test_returns_without_values_and_discount_are_sums_of_what_comes():
    mask, (rewards, *_) = case()
    _, returns = maths.gae(rewards, torch.zeros_like(rewards), mask, gamma=1, lam=1)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        wanted = [sum(rewards[row, place:length].tolist()) for place in range(length)]
        assert returns[row, :length].tolist() == pytest.approx(wanted, abs=1e-5)
    assert not returns[~mask].any()


def test_gae_by_hand():
    # delta = (0.5*1 - 2, 1 + 0 - 1) + ..., gamma 0.5, lambda 0.5
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 1.0]])
    advantages, returns = maths.gae(rewards, values, torch.tensor([[T, T]]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-1.5, 0.0]]  # 0 + 0.5*1 - 2 + 0.25*0
    assert returns.tolist() == [[0.5, 1.0]]


def test_gae_equals_its_definition():
    mask, (rewards, values, *_) = case()
    advantages, _ = maths.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        after = [*values[row, :length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + 0.9 * after[t + 1] - after[t] for t in range(length)]
        wanted = [sum((0.9 * 0.8) ** (s - t) * deltas[s] for s in range(t, length)) for t in range(length)]
        assert advantages[row, :length].tolist() == pytest.approx(wanted, abs=1e-5)


def test_given_tokens_between_drawn_ones_are_passed_over():
    mask = torch.tensor([[T, F, F, T, T]])
    rewards, values = torch.tensor([[0.1, 9, 9, 0.2, 0.3]]), torch.tensor([[1.0, 9, 9, 2.0, 3.0]])
    whole = maths.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    alone = maths.gae(rewards[mask][None], values[mask][None], torch.ones(1, 3, dtype=torch.bool), gamma=0.9, lam=0.8)
    for one, two in zip(whole, alone, strict=True):
        assert torch.allclose(one[mask], two[0])
        assert not one[~mask].any()


def test_score_lies_on_the_last_real_token_and_kl_on_all():
    mask = torch.tensor([[T, T, F], [T, T, T], [F, F, F]])
    kl = torch.tensor([[0.5, -0.5, math.nan], [1.0, 2.0, 3.0], [math.nan] * 3])
    rewards = maths.place_rewards(torch.tensor([10.0, 20.0, math.nan]), kl, mask, kl_coef=0.1)
    assert rewards.tolist() == [pytest.approx([-0.05, 10.05, 0]), pytest.approx([-0.1, -0.2, 19.7]), [0, 0, 0]]
    by_token = maths.place_rewards(torch.tensor([[1.0, 2, 5], [0, 0, 3], [7, 7, 7]]), kl, mask, kl_coef=0.0)
    assert by_token.tolist() == [[1, 2, 0], [0, 0, 3], [0, 0, 0]]


def test_kl_estimates_on_a_distribution():
    """Their means under the policy are the KL itself; k1 may be negative at a token, k3 never."""
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.2, 0.5, 0.3]).log()
    true = (policy.exp() * (policy - reference)).sum()
    k1, k3 = maths.kl_terms(policy, reference)
    assert (policy.exp() * k1).sum().item() == pytest.approx(true.item())
    assert (policy.exp() * k3).sum().item() == pytest.approx(true.item())
    assert k1.min() < 0 <= k3.min()


def test_policy_loss_clips_on_the_side_that_would_gain():
    old = torch.zeros(1, 4)
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    mask = torch.tensor([[T, T, T, T]])
    logps = ratios.log().requires_grad_()
    loss, sums = maths.policy_loss(logps, old, advantages, mask, cliprange=0.2)
    assert loss.item() == pytest.approx(-1.2 - 0.5 + 1.5 + 0.8)
    assert sums["clipfrac"] == 2
    assert sums["ratio"] == 4
    loss.backward()
    assert (logps.grad != 0).tolist() == [[F, T, T, F]]


def test_value_loss_takes_the_worse_of_the_clipped_and_the_free():
    old, returns = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, math.nan]])
    values = torch.tensor([[0.8, 0.1, math.nan]])
    loss, clipped = maths.value_loss(values, old, returns, torch.tensor([[T, T, F]]), cliprange=0.2)
    assert loss.item() == pytest.approx(0.5 * (0.8**2 + 0.9**2))
    assert clipped == 1


def test_explained_variance():
    mask, (returns, noise, *_) = case()
    assert maths.explained_variance(returns, returns, mask) == 1
    assert maths.explained_variance(torch.zeros_like(returns), returns, mask) == pytest.approx(0, abs=1e-6)
    assert maths.explained_variance(-returns, returns, mask) == pytest.approx(-3, abs=1e-5)
    assert math.isnan(maths.explained_variance(noise, torch.ones_like(returns), mask))


def test_adaptive_kl_moves_towards_its_target_by_a_fifth_at_most():
    kl = maths.AdaptiveKL(0.15, target=6.0, horizon=10_000)
    kl.update(600.0, 500)
    assert kl.coef == pytest.approx(0.15 * (1 + 0.2 * 500 / 10_000))
    kl.update(0.0, 500)
    assert kl.coef == pytest.approx(0.15 * 1.01 * 0.99)
    before = kl.coef
    kl.update(6.0, 500)
    assert kl.coef == before


def test_a_kl_that_is_not_known_leaves_the_coefficient_alone():
    kl = maths.AdaptiveKL(0.15, 6.0)
    kl.update(math.nan, 64)
    assert kl.coef == 0.15
    kl.update(12.0, 64)
    assert kl.coef > 0.15
