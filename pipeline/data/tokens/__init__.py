"""From records to tokens and loss masks: chat templates, completeness, truncation, order."""
