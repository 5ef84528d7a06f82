"""Prompts for rollout tests and what transformers' eager attention makes of the answers."""

import pytest
import torch

from verl_avar.miniature.model import load
from verl_avar.roles import ChatTokens, Role, token_roles

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def make_prompt(*samples, system="Look at the image."):
    """A vLLM prompt: one image per sample, then a question. system=None leaves that turn out."""
    images = "<|vision_start|><|image_pad|><|vision_end|>" * len(samples)
    turn = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    text = f"{turn}<|im_start|>user\n{images}What is where?<|im_end|>\n<|im_start|>assistant\n"
    return {"prompt": text} | ({"multi_modal_data": {"image": [sample.image for sample in samples]}} if samples else {})


def score_of(output):
    return output.kv_transfer_params["visual_attention"]


class Eager:
    """A checkpoint under transformers' own eager attention, with a bias added to its mask."""

    def __init__(self, checkpoint):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

        self._maps, self._bias = [], None

        def biased(module, query, key, value, attention_mask, **kwargs):
            out, weights = eager_attention_forward(module, query, key, value, attention_mask + self._bias, **kwargs)
            self._maps.append(weights)
            return out, weights

        AttentionInterface.register("test_biased_eager", biased)
        AttentionMaskInterface.register("test_biased_eager", eager_mask)
        self.model, self.processor = load(checkpoint)
        self.model.set_attn_implementation({"text_config": "test_biased_eager", "vision_config": "sdpa"})
        self.chat = ChatTokens.from_tokenizer(self.processor, self.model.config)

    def __call__(self, prompt, bias, output):
        """(visual, system) bias. Returns log-probs [n] of the answer and masses [L, H, n, 2] of the queries before."""
        images = prompt.get("multi_modal_data", {}).get("image")
        inputs = self.processor(text=[prompt["prompt"]], images=images, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == output.prompt_token_ids
        answer = torch.tensor([output.outputs[0].token_ids])
        ids = torch.cat((inputs["input_ids"], answer), dim=1)
        roles = token_roles(inputs["input_ids"], self.chat)[0]
        roles = torch.cat((roles, torch.full((answer.shape[1],), Role.RESPONSE)))
        self._bias = bias[0] * (roles == Role.VISUAL) + bias[1] * (roles == Role.SYSTEM)
        pixels = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        kinds = (ids == self.model.config.image_token_id).int()
        self._maps.clear()
        with torch.no_grad():
            logits = self.model(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits
        asked = slice(inputs["input_ids"].shape[1] - 1, ids.shape[1] - 1)
        log_probs = logits[0, asked].log_softmax(-1).gather(1, answer.T)[:, 0]
        weights = torch.stack(self._maps)[:, 0, :, asked]  # [L, H, n, T]
        masses = [weights[..., roles == role].sum(-1) for role in (Role.VISUAL, Role.SYSTEM)]
        return log_probs, torch.stack(masses, dim=-1)


def wanted_score(masses):
    """The figures of `kv_transfer_params["visual_attention"]` from an answer's masses [L, H, n, 2], by hand."""
    by_head = masses[..., 0] / (masses[..., 1] + 1e-6)
    visual, system = masses.mean(1).unbind(-1)
    ratios = (visual / (system + 1e-6)).mean(0)
    return {
        "ratio": ratios.mean().item(),
        "share": (visual / (visual + system)).mean().item(),
        "visual_mass": visual.mean().item(),
        "system_mass": system.mean().item(),
        "vas": by_head.mean().item(),
        "n": len(ratios),
        "tokens": ratios.tolist(),
    }


def same_score(score, wanted, tolerance):
    """Asserts equal keys, and figures within `tolerance`, relative where they are above 1."""
    assert score.keys() == wanted.keys()
    for name, value in wanted.items():
        assert score[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
