"""One base over several ranks: FSDP2, tensor parallel, and loading only what a rank holds."""
