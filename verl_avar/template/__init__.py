"""Token roles under any chat template: who is who in a processed multimodal prompt, read off the template itself.

`rendering.py` renders a conversation so that its contents can be found again, `turns.py` tells the turns of that text
apart, `expansion.py` carries the roles of its characters to the processed ids.
"""

from verl_avar.template.turns import ChatTemplate

__all__ = ["ChatTemplate"]
