"""Offline stages: train on rows, with a reference where the loss asks for one."""
