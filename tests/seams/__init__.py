"""Checks of our use of vLLM against the Python files of any version of it, which is never imported."""
