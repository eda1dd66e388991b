"""Costs of a generation, the dense control of equal cost, and settings for a target speed."""
