"""Refuses a request with bad attention options where it enters vLLM.

Why: an exception in a KV connector's `on_new_request` ends the whole engine, and connectors have no hook in the front
end; there a VLLMValidationError concerns one request only (a 400 from the server).
Where: vllm/v1/engine/input_processor.py, `InputProcessor.process_inputs`.
Versions: vLLM 0.24 to 0.27.
Can go: when KV connectors can validate requests in the front end.
"""

from __future__ import annotations

from functools import wraps


def apply() -> None:
    """Wrap `process_inputs` once. Idempotent."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from verl_avar.rollout.request import refuse_bad_request

    stock = InputProcessor.process_inputs
    if getattr(stock, "checks_attention_options", False):
        return

    @wraps(stock)
    def process_inputs(self, *args, **kwargs):
        request = stock(self, *args, **kwargs)
        try:
            refuse_bad_request(self.vllm_config, request)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        return request

    process_inputs.checks_attention_options = True
    InputProcessor.process_inputs = process_inputs
