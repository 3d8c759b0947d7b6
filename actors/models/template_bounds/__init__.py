"""Bounds on what a chat template may do: a base's template is a program of other people's."""
