"""Calls of models behind OpenAI-compatible endpoints: made within limits, tried again, kept for ever."""
