"""VARD (AVAR §4.1, arXiv:2603.03825): images and questions to visual-anchored reasoning, by models at endpoints."""
