"""Training on the policy's own answers: rounds of online DPO, PPO, and our rewards in TRL's online trainers."""
