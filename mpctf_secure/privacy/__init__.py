"""Differential privacy: updates as bounded integers, noise on them, what that costs, what was spent, and audits."""
