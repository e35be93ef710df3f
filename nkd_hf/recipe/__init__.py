"""Runs recipes: a YAML file describes one run of teacher, baseline and student, and its plan."""

from .recipe import Recipe

__all__ = ["Recipe"]
