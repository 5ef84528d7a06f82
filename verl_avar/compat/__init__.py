"""Patches of upstream, one file each: `apply()`, why it is needed, where, for which versions, and when it can go."""
