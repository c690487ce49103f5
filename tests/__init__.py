"""Tests; a package, so that helpers import as ``tests.support`` whatever else calls itself ``tests``."""
