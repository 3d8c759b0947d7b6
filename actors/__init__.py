"""Downstairs: everything that lives in a Ray process. Never imports `pipeline`."""
