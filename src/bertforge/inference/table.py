"""Evaluation and prediction over whole tables: prepared folders and raw files alike."""

from __future__ import annotations
