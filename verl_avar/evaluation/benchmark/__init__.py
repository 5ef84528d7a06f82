"""Benchmarks of image questions: what is asked, under one stated protocol, how it is scored, and what came out."""
