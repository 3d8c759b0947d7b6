"""Model workers: a rank with one frozen base and its adapters; updates, scores, saving, weight source."""
