"""AVAR (arXiv:2603.03825) as a plugin for verl: roles in, attention masses out, everything else a consumer."""

__version__ = "0.1.0"
