"""What is run beside training, as `python -m tools.<name>`. Nothing imports it."""
