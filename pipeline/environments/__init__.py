"""Environments that converse with the policy, and tools that it calls, in processes of their own."""
