"""Video in every model family: masses against eager maps where a family takes it, an error by name where not."""

import families
import numpy as np
import pytest
import torch
from families.loaded import ROLES, conversation, load, who

from verl_avar.attention.hf import probe
from verl_avar.attention.reference import role_mass
from verl_avar.families import cells, masses
from verl_avar.roles import Role

VIDEO = [f for f in families.FAMILIES if f.startswith("qwen")] + ["internvl", "llava_onevision", "smolvlm"]


def video_prompt(family, processor, template):
    """A prompt with four frames, two a second: messages, and what the family's processor makes of them."""
    parts = [{"type": "video"}, {"type": "text", "text": "What moves?"}]
    messages = conversation([{"type": "text", "text": "You are careful."}], parts)
    frames = np.random.default_rng(0).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    metadata = {"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}
    nested = (lambda x: [[x]]) if family == "smolvlm" else (lambda x: [x])
    inputs = processor(
        text=[template.render(messages)],
        videos=nested(frames),
        video_metadata=nested(metadata),
        do_sample_frames=False,
        return_tensors="pt",
    )
    return messages, inputs


@torch.no_grad()
@pytest.mark.parametrize("family", VIDEO)
def test_masses_of_a_video_equal_eager_maps(family):
    loaded = load(family)
    messages, inputs = video_prompt(family, loaded.ours.processor, loaded.ours.template)
    roles = torch.from_numpy(loaded.ours.template.roles(messages, inputs["input_ids"][0]))[None]
    with probe(roles, of=ROLES) as record:
        loaded.ours.model(**inputs)
    maps = loaded.eager(**inputs, output_attentions=True).attentions
    expected = torch.stack([role_mass(m, roles, ROLES) for m in maps])
    ours, _ = masses(loaded.ours.model, record, ROLES)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert (roles == Role.VISUAL).sum() == VIDEO_TOKENS.get(family, 12) and (ours[..., 0] > 0.01).any()
    with pytest.raises(ValueError, match=f"cells: {family}: "):
        cells(loaded.ours.model.config, loaded.ours.processor, inputs, [])


# Four frames of 84 × 56: pairs of frames of six tokens each, or four frames of their own.
VIDEO_TOKENS = {"internvl": 16, "llava_onevision": 17, "smolvlm": 16}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_timestamps_of_a_video_are_the_users(family):
    ours = load(family).ours
    messages, inputs = video_prompt(family, ours.processor, ours.template)
    ids = inputs["input_ids"][0].tolist()
    found = who(ours.tokenizer, ids, ours.template.roles(messages, ids).tolist())
    start, end = "<|vision_start|>", "<|vision_end|>"
    video = [(Role.USER, f"<|im_start|>user\n{start}"), (Role.VISUAL, 12), (Role.USER, f"{end}What moves?<|im_end|>\n")]
    if family == "qwen3_vl":  # frames 0 and 1 at 0 and 0.5 s, frames 2 and 3 at 1 and 1.5 s
        video = [
            (Role.USER, f"<|im_start|>user\n{start}<0.2 seconds>{start}"),
            (Role.VISUAL, 6),
            (Role.USER, f"{end}<1.2 seconds>{start}"),
            (Role.VISUAL, 6),
            (Role.USER, f"{end}{end}What moves?<|im_end|>\n"),
        ]
    system = (Role.SYSTEM, "<|im_start|>system\nYou are careful.<|im_end|>\n")
    assert found == [system, *video, (Role.OTHER, "<|im_start|>assistant\n")]


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f not in VIDEO])
def test_a_family_without_video_says_so(family):
    ours = load(family).ours
    messages, inputs = video_prompt(family, ours.processor, ours.template)  # the processor leaves the video out
    with pytest.raises(ValueError, match="chat template writes no token for a video"):
        ours.template.roles(messages, inputs["input_ids"][0])
