"""Everything that runs inside vLLM or changes it: settings, requests, weight transfer, router capture."""
