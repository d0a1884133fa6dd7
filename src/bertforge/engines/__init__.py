"""Engines that compute logits: a file for each target, and one protocol (`base`) so that nobody else names one."""
