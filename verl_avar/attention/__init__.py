"""Attention masses per token role and the role bias: the maths on queries, keys and roles."""
