"""The order in which a step uses the weights: under ZeRO one order in all processes, or they wait for each other for ever."""

from dataclasses import replace

import torch

from prefalign.families import tower
from prefalign.records import Pair
from prefalign.store import OutputConfig, write_records
from prefalign.training.collator import blank_vision
from tests.training_runs import make_pair, make_trainer


def assert_one_order(checkpoint, folder, fast_path):
    """A batch without pictures runs the same modules as one with, and its weights get their gradients in the same order.

    Its loss and gradients are what they are without that, and 0 in the vision tower and the projector.
    """
    rows = [replace(make_pair(number, images=int(number < 2)), rejected_images=[]) for number in range(4)]
    write_records("test", rows, output=OutputConfig(folder / "pairs"), record=Pair, settings={}, seed=0)
    trainer = make_trainer(
        checkpoint, folder / "pairs", folder / "run", frozen=(), fast_path=fast_path, loss_type=["sft"]
    )
    model, collator = trainer.model, trainer.data_collator
    seen = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda *_, name=name: seen.append(f"run {name}"))
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(f"gradient {name}"))

    def step(batch):
        seen.clear()
        model.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        return loss.item(), gradients, list(seen)

    shown, text = (list(trainer.train_dataset.select(numbers)) for numbers in ([0, 1], [2, 3]))
    plain_loss, plain_gradients, plain_order = step(collator(text))
    collator.dummy = blank_vision(trainer.processing_class)
    assert "dummy" not in collator(shown)
    _, _, wanted = step(collator(shown))
    loss, gradients, order = step(collator(text))
    assert len(wanted) > len(plain_order)
    assert order == wanted
    assert loss == plain_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain_gradients.get(name, torch.zeros_like(gradient)))
    assert {tower(name) for name in gradients.keys() - plain_gradients.keys()} == {"vision", "projector"}
