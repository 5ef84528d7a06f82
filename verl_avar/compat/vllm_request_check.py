"""Refuses a bad engine config before the model is loaded, and a request with bad options where it enters vLLM.

Why: an exception in a KV connector's `on_new_request` ends the whole engine, and connectors have no hook in the front
end; there a VLLMValidationError concerns one request only (a 400 from the server). A connector's own look at its
config comes when the model is loaded.
Where: vllm/v1/engine/input_processor.py, `InputProcessor.__init__` and `.process_inputs`.
Versions: vLLM 0.24 to 0.33.
Can go: when KV connectors can validate configs and requests in the front end.
"""

from __future__ import annotations

from functools import wraps


def apply() -> None:
    """Wrap both once. Idempotent."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from verl_avar.rollout.request import check_engine, refuse_bad_request

    stock_init, stock = InputProcessor.__init__, InputProcessor.process_inputs
    if getattr(stock, "checks_attention_options", False):
        return

    @wraps(stock_init)
    def init(self, vllm_config, *args, **kwargs):
        check_engine(vllm_config)
        stock_init(self, vllm_config, *args, **kwargs)

    @wraps(stock)
    def process_inputs(self, *args, **kwargs):
        request = stock(self, *args, **kwargs)
        try:
            refuse_bad_request(self.vllm_config, request)
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        return request

    process_inputs.checks_attention_options = True
    InputProcessor.__init__ = init
    InputProcessor.process_inputs = process_inputs
