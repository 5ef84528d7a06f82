"""Ulysses around the measuring attention: the row's mask, what is refused (two real ranks: test_training_parallel)."""

import pytest
import torch
from attention_models import gemma, qwen

from verl_avar.training.ulysses import set_ulysses_attention, whole_row


def test_mask_lets_a_query_see_its_own_sample_up_to_itself():
    lengths = [3, 1, 4]
    sample = [0, 0, 0, 1, 2, 2, 2, 2]
    expected = [[sample[i] == sample[j] and j <= i for j in range(8)] for i in range(8)]
    with whole_row(None, lengths, torch.device("cpu")) as row:
        assert row.mask.tolist() == [[expected]]
        assert row.positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]


def test_row_of_one_sample_needs_no_mask():
    with whole_row(None, [5], torch.device("cpu")) as row:
        assert row.mask is None


@pytest.mark.parametrize(
    ("model", "kernel", "size", "message"),
    [
        (qwen, "sdpa", 4, "must divide the model's 4 heads and its 2 key-value heads"),
        (qwen, "eager", 2, "sdpa or flash_attention_2, not eager"),
        (gemma, "sdpa", 2, "gemma3 is none of qwen2_vl, qwen2_5_vl"),
        (lambda: qwen(use_sliding_window=True, sliding_window=4, max_window_layers=1), "sdpa", 2, "sliding-window"),
    ],
)
def test_what_can_not_be_exact_is_refused_by_name(model, kernel, size, message):
    with pytest.raises(ValueError, match=f"ulysses_sequence_parallel_size={size}.*{message}"):
        set_ulysses_attention(model(), kernel, size)
