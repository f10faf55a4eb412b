"""Requests that the engine's tests share."""

import torch
from tiny_vlms import picture

from prefalign.engines import Request, Sampling
from prefalign.records import user_message

QUESTIONS = ("What is in the image?", "Describe the picture in detail.", "How many objects are there? Yes or no?")
GREEDY = Sampling(max_new_tokens=10, temperature=0)


def some_requests(count: int, **more) -> list[Request]:
    """Requests with one and two pictures of several sizes and questions of several lengths."""
    return [
        Request(
            f"row-{index}",
            [user_message(QUESTIONS[index % 3], 1 + index % 2)],
            [picture(10 * index + number, (40 + 16 * (index % 4), 48)) for number in range(1 + index % 2)],
            seed=3,
            **more,
        )
        for index in range(count)
    ]


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal up to float32 rounding."""
    return all(torch.allclose(a, b, atol=3e-5) for a, b in zip(one, other, strict=True))
