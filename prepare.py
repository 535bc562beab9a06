"""This command has moved to tools/prepare.py."""
import sys

sys.exit("error: this command is now python -m tools.prepare; --help says how")
