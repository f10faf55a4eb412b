"""Known allocations give known peaks, and known products known counts."""

import gc

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from prefalign.training.metering import LiveTensors, count_flops

KIB = 1024  # bytes of 256 floats


def floats(kib):
    return torch.ones(kib * 256)


def test_a_sum_holds_both_terms_and_itself():
    with LiveTensors() as meter:
        total = floats(4) + floats(4)
    assert meter.peak == 12 * KIB
    assert meter.live == total.nbytes == 4 * KIB


def test_views_are_not_counted_twice():
    with LiveTensors() as meter:
        whole = floats(8)
        views = [whole[:256], whole.view(2, -1), whole.view(2, -1).transpose(0, 1), whole.detach()]
    assert meter.peak == meter.live == 8 * KIB
    del whole
    assert meter.live == 8 * KIB  # the views keep it
    del views
    assert meter.live == 0


def test_a_view_keeps_its_whole_storage():
    with LiveTensors() as meter:
        part = floats(8)[:1]
    assert part.nbytes == 4
    assert meter.live == 8 * KIB


def test_freed_tensors_leave():
    with LiveTensors() as meter:
        first = floats(8)
        del first
        second = floats(2)
    assert meter.peak == 8 * KIB
    assert meter.live == second.nbytes


def test_freed_addresses_are_used_again():
    with LiveTensors() as meter:
        for _ in range(50):
            last = floats(3)
            del last
    assert meter.live == 0
    assert meter.peak == 3 * KIB


def test_work_in_place_is_free():
    with LiveTensors() as meter:
        values = floats(4)
        values.mul_(2).add_(1)
    assert meter.peak == 4 * KIB


def test_held_tensors_are_told_apart():
    weights = [floats(16), floats(8)]
    weights.append(weights[0][:10])  # tied
    with LiveTensors(weights) as meter:
        made = weights[0] + 1
        weights[1].add_(1)
    assert meter.held == 24 * KIB
    assert meter.peak == 40 * KIB
    assert meter.above_held == made.nbytes


def test_held_tensors_that_die_make_room():
    weights = [floats(16)]
    with LiveTensors(weights) as meter:
        weights.clear()
        made = floats(10)
    assert meter.live == made.nbytes
    assert meter.peak == 16 * KIB
    assert meter.above_held == 0


def test_tensors_from_outside_count_from_their_first_use():
    before = floats(4)
    with LiveTensors() as meter:
        assert meter.live == 0
        doubled = before * 2
    assert meter.live == before.nbytes + doubled.nbytes


def test_what_autograd_saved_is_seen():
    weight = floats(4).requires_grad_()
    with LiveTensors([weight]) as meter:
        loss = weight.exp().exp().sum()  # exp saves its result, whose Python name is gone
        assert meter.live == (4 + 4 + 4) * KIB + 4
        del loss
        gc.collect()
    assert meter.live == weight.nbytes


def test_backward_is_seen():
    """Twice exp: results of both are saved; backward holds them beside one gradient, then makes the next."""
    weight = floats(4).requires_grad_()
    with LiveTensors([weight]) as meter:
        loss = weight.exp().exp().sum()
        forward = meter.peak
        loss.backward()
    assert weight.grad is not None
    assert meter.peak > forward
    assert meter.live == weight.nbytes + weight.grad.nbytes + loss.nbytes


def test_checkpointing_lowers_the_peak():
    def four(value):
        for _ in range(8):
            value = value.exp().mul(0.1)
        return value

    def peak(run):
        weight = floats(64).requires_grad_()
        with LiveTensors([weight]) as meter:
            value = weight
            for _ in range(6):
                value = run(value)
            value.sum().backward()
        return meter.above_held

    assert peak(lambda value: checkpoint(four, value, use_reentrant=False)) < 0.5 * peak(four)


def test_meta_tensors_count_as_if_they_were_there():
    with LiveTensors() as meter:
        torch.ones(256, device="meta") @ torch.ones(256, 4, device="meta")
    assert meter.peak == (256 + 1024 + 4) * 4


def test_a_step_of_adam_with_its_state_held():
    """Gradients and activations are above the held tensors; the state of the second step is not new."""
    model = torch.nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def step():
        model(floats(1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    with LiveTensors([model.weight, *state]) as meter:
        step()
    assert meter.held == 3 * model.weight.nbytes + 4
    assert meter.live <= meter.held + 8 * KIB
    assert meter.above_held >= model.weight.nbytes


def test_products_forward_and_backward():
    """Hand count: 2 * 8 * 16 * 32 for the product, as much again for each of the two gradients."""
    left, right = torch.ones(8, 16, requires_grad=True), torch.ones(16, 32, requires_grad=True)
    assert count_flops(lambda: left @ right) == 2 * 8 * 16 * 32
    assert count_flops(lambda: (left @ right).sum().backward()) == 3 * 2 * 8 * 16 * 32


@pytest.mark.parametrize("keys", [5, 9])
def test_attention_of_the_cpu_is_counted(keys):
    """Two products forward; backward the scores again and four gradients: 2 + 5 products of 2 * heads * q * k * width."""
    query = torch.randn(3, 2, 5, 16, requires_grad=True)
    key, value = (torch.randn(3, 2, keys, 16, requires_grad=True) for _ in range(2))
    product = 2 * 3 * 2 * 5 * keys * 16
    assert count_flops(lambda: scaled_dot_product_attention(query, key, value)) == 2 * product
    assert count_flops(lambda: scaled_dot_product_attention(query, key, value).sum().backward()) == 7 * product


def test_a_count_without_results_is_the_same_count():
    """A convolution, products with and without bias, and attention: same count, and nothing but zeros comes out."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, stride=4), torch.nn.Flatten(2), torch.nn.Linear(16, 32))
    said = []

    def step():
        hidden = network(torch.ones(2, 3, 16, 16)).unsqueeze(1)
        mixed = scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True) @ torch.ones(32, 5)
        said.append(mixed.detach())
        mixed.sum().backward()
        return network[0].weight.grad

    assert count_flops(step) == count_flops(step, compute=False) > 0
    assert said[0].any()
    assert not said[1].any()
    assert said[0].shape == said[1].shape
