"""Stages: made ready from config and rows, then trained offline or online."""
