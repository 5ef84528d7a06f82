"""Rows of images, questions and answers: one schema, and the ways into it."""
