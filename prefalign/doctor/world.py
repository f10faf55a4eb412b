"""Checks of where the run will take place: device, disk, output folder."""

from __future__ import annotations

import math
import shutil

import torch

from prefalign.doctor.case import Case
from prefalign.doctor.findings import Finding, judge
from prefalign.training.checkpoints import most_checkpoints
from prefalign.training.distributed import processes_of, running_processes
from prefalign.training.profiles import SHARING
from prefalign.training.runs import RunError, is_finished, open_run


def check_device(case: Case) -> list[Finding]:
    """Device and precision."""
    trainer, args = case.trainer, case.trainer.args
    device = next(trainer.model.parameters()).device
    compute = "bfloat16" if args.bf16 else "float16" if args.fp16 else "no"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    weights = str(trainer.model.dtype).removeprefix("torch.")
    seen = f"{name}, weights {weights}, {compute} autocast, {running_processes(trainer.accelerator, {})}"
    if left_out := [field for field in SHARING if case.config.trainer.get(field)]:
        seen += f"; examined without trainer.{' and trainer.'.join(left_out)}"
    fail = warn = ""
    if (
        device.type == "cuda"
        and (args.bf16 or trainer.model.dtype == torch.bfloat16)
        and not torch.cuda.is_bf16_supported()
    ):
        fail = "This GPU has no bfloat16. Set trainer.bf16 to false, trainer.fp16 to true and model.dtype to float32."
    elif trainer.model.dtype == torch.float16:
        warn = "Steps and gradients overflow in float16 weights. Set model.dtype to float32 and trainer.fp16 to true."
    elif device.type == "cuda" and compute == "no" and trainer.model.dtype == torch.float32:
        warn = "float32 throughout is several times slower on a GPU. Set trainer.bf16 to true."
    return [judge("device", seen, fail=fail, warn=warn)]


def check_disk(case: Case) -> list[Finding]:
    """Room for the checkpoints that the run keeps at a time, one more while it is being written, and the final model."""
    args, model = case.trainer.args, case.trainer.model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trainable if case.config.lora else list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    optimizer = sum(2 * parameter.numel() * parameter.element_size() for parameter in trainable)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    of_epoch = math.ceil(len(case.trainer.train_dataset) / rows)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(of_epoch * args.num_train_epochs)
    kept = most_checkpoints(args, steps, steps / of_epoch)
    needed = kept * (weights + optimizer * (not args.save_only_model)) + weights
    folder = case.config.output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    seen = f"{_size(needed)} for {kept} checkpoints and the model in {steps} steps, {_size(free)} free"
    advice = (
        "Give another output, or keep fewer: trainer.save_total_limit: 1, a larger save_steps, save_only_model: true."
    )
    return [judge("disk", seen, fail=advice if needed > free else "", warn=advice if needed > free / 2 else "")]


def check_output(case: Case) -> list[Finding]:
    """Whether the run may use its folder."""
    folder = case.config.output
    before = processes_of(folder)
    number = before.num_processes if before is not None else 1
    try:
        checkpoint = open_run(folder, case.files, resume=case.config.resume, processes=number)
    except RunError as error:
        return [judge("output", str(folder), fail=str(error))]
    if is_finished(folder):
        return [
            judge(
                "output", f"{folder} is finished", warn="The run would do nothing. Give another output to train again."
            )
        ]
    seen = f"{folder}, goes on from {checkpoint.name}" if checkpoint else f"{folder} is free"
    if checkpoint and number > 1:
        seen += f" of a run on {before}, which is how it has to be started again"
    return [judge("output", seen)]


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
