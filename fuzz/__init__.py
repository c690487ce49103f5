"""Throw hostile bytes at the parsers that stand between a leaf and the network.

python -m fuzz --inputs 100000           all parsers, a report at the end, exit status 1 after a finding
python -m fuzz --target archive --engine atheris --inputs 1000000

Inputs are made by atheris, which follows the branches that an input took, where it is installed (pip install atheris); elsewhere
by an engine of our own that knows how such bytes are built. What crashed is kept in --keep, and given back with --replay FILE.
"""

NAMES = ("archive", "notification", "http")
