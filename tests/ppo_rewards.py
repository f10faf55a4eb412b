"""Rewards that PPO's tests name in configs."""


def letters(responses):
    """How often an a stands in each answer."""
    return [float(response.text.count("a")) for response in responses]
