"""From a source to records: files and splits, columns, layouts, messages. Knows no tokenizer."""
