"""Evaluation: judging images against images."""
