"""Steps of a small engine for the GPU backend's layers, and what attention maps make of them: on a GPU, or interpreted.

Nothing here imports triton before a step runs, so that a process can decide first how its kernels run.
"""

import os
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from verl_avar.reward import token_scores
from verl_avar.roles import Role

BLOCK, BLOCKS, REQUESTS, ROWS, HEADS, KV_HEADS, SIZE = 16, 12, 4, 48, 4, 2, 32  # rows: of a step, at most
PROMPT = [Role.SYSTEM] * 5 + [Role.VISUAL] * 9 + [Role.USER] * 6


@dataclass
class Request:
    """bias: (visual, system). blocks: of its KV cache. keys, values: [layers, tokens so far, KV_HEADS, SIZE]."""

    bias: tuple[float, float]
    blocks: list[int]
    prompt: list[int] = field(default_factory=lambda: PROMPT)
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None

    def slots(self, first: int, count: int) -> torch.Tensor:
        index = torch.arange(first, first + count)
        return torch.tensor(self.blocks)[index // BLOCK] * BLOCK + index % BLOCK


class Layers:
    """Attention layers as vLLM and the connector set them up, in tensors that keep their place from step to step."""

    def __init__(self, device="cpu", dtype=torch.float32, probed=(0, 1, 2), side_by_side=False, seed=0):
        from verl_avar.rollout.backend_gpu import PagedRoleAttention, PagedRoleBackend, PagedRoleMetadataBuilder
        from verl_avar.rollout.layer import link_layers
        from verl_avar.rollout.slots import SlotState

        self.count, self.device, self.dtype, self.probed = 3, device, dtype, list(probed)
        self.generator = torch.Generator().manual_seed(seed)
        self.impls = [PagedRoleAttention(HEADS, SIZE, SIZE**-0.5, KV_HEADS) for _ in range(self.count)]
        # As vLLM makes a cache: memory in the order that the backend asks for, seen in the order of its shape.
        shape = PagedRoleBackend.get_kv_cache_shape(BLOCKS, BLOCK, KV_HEADS, SIZE)
        order = PagedRoleBackend.get_kv_cache_stride_order()
        in_memory = [shape[i] for i in order]
        if side_by_side:  # the layers' blocks next to each other
            memory = torch.zeros(BLOCKS, self.count, *in_memory[1:], dtype=dtype, device=device).unbind(1)
        else:
            memory = torch.zeros(self.count, *in_memory, dtype=dtype, device=device).unbind(0)
        self.caches = [layer.permute([order.index(i) for i in range(len(order))]) for layer in memory]
        self.scores = torch.full((BLOCKS * BLOCK + 1, 5), -1.0, device=device)
        self.state = SlotState(BLOCKS, BLOCK, len(self.probed), ROWS, HEADS, self.scores, device=device)
        link_layers(self.impls, self.state, self.probed)
        config = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(**_transfer()),
            scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS),
            compilation_config=SimpleNamespace(static_forward_context={"first": SimpleNamespace(impl=self.impls[0])}),
        )
        self.builder = PagedRoleMetadataBuilder(None, ["first"], config, torch.device(device))
        self.query, self.output = (torch.zeros(self.count, ROWS, HEADS, SIZE, dtype=dtype, device=device) for _ in "qo")
        self.key, self.value = (torch.zeros(self.count, ROWS, KV_HEADS, SIZE, dtype=dtype, device=device) for _ in "kv")
        self.query_start = torch.zeros(REQUESTS + 1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(REQUESTS, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(REQUESTS, BLOCKS, dtype=torch.int32, device=device)
        self.slot_mapping = torch.full((ROWS,), -1, device=device)

    def metadata(self, rows: int, requests: int, max_query_len: int):
        """A step of `rows` rows, as vLLM's model runner describes it to the backend."""
        common = SimpleNamespace(
            causal=True,
            num_actual_tokens=rows,
            max_query_len=max_query_len,
            query_start_loc=self.query_start[: requests + 1],
            seq_lens=self.seq_lens[:requests],
            block_table_tensor=self.block_table[:requests],
            slot_mapping=self.slot_mapping[:rows],
        )
        return self.builder.build(0, common)

    def forward(self, metadata) -> None:
        for layer, impl in enumerate(self.impls):
            rows = self.query[layer], self.key[layer], self.value[layer]
            impl.forward(None, *rows, self.caches[layer], metadata, self.output[layer])

    def fill(self, batch: list[tuple[Request, int]]) -> None:
        """The contents of a step in which each request has so many new tokens; everything else is padding."""
        from verl_avar.rollout.options import RequestOptions
        from verl_avar.rollout.slots import BlockMarks

        marks, start, starts = BlockMarks(), 0, [0]
        self.slot_mapping.fill_(-1)
        self.seq_lens.zero_()
        self.block_table.zero_()
        draw = {name: self._draw(getattr(self, name)) for name in ("query", "key", "value")}
        for row, (request, tokens) in enumerate(batch):
            rows = slice(start, start + tokens)
            new = draw["key"][:, rows], draw["value"][:, rows]
            if request.keys is None:
                request.keys, request.values = new
                marks.add(request.blocks, 0, np.uint8(request.prompt), RequestOptions(*request.bias), BLOCK)
            else:
                request.keys = torch.cat((request.keys, new[0]), dim=1)
                request.values = torch.cat((request.values, new[1]), dim=1)
            length = request.keys.shape[1]
            self.slot_mapping[rows] = request.slots(length - tokens, tokens).to(self.device)
            self.seq_lens[row] = length
            self.block_table[row, : len(request.blocks)] = torch.tensor(request.blocks, dtype=torch.int32)
            start += tokens
            starts.append(start)
        starts += [start] * (REQUESTS - len(batch))
        self.query_start.copy_(torch.tensor(starts, dtype=torch.int32))
        self.state.begin(marks)

    def _draw(self, rows: torch.Tensor) -> torch.Tensor:
        """Random rows, in place; what they are, on the CPU."""
        rows.copy_(torch.randn(rows.shape, generator=self.generator))
        return rows.cpu().float().clone()

    def check(self, batch: list[tuple[Request, int]], tolerance: float = 1e-5) -> None:
        """Outputs and scores of the step that `fill(batch)` and `forward` made, against full attention maps."""
        start = 0
        for request, tokens in batch:
            rows = slice(start, start + tokens)
            length = request.keys.shape[1]
            roles = torch.tensor((request.prompt + [Role.RESPONSE] * length)[:length])
            indicator = torch.stack((roles == Role.VISUAL, roles == Role.SYSTEM)).float()
            query = self.query[:, rows].cpu().float()
            keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (request.keys, request.values))
            logits = torch.einsum("lqhd,lkhd->lhqk", query, keys) * SIZE**-0.5 + torch.tensor(request.bias) @ indicator
            later = torch.ones(tokens, length).triu(length - tokens + 1).bool()
            weights = logits.masked_fill(later, -torch.inf).softmax(-1)
            output = torch.einsum("lhqk,lkhd->lqhd", weights, values)
            torch.testing.assert_close(self.output[:, rows].cpu().float(), output, atol=tolerance, rtol=tolerance)
            visual, system = torch.einsum("lhqk,rk->rlhq", weights[self.probed], indicator)
            scores = self.scores[request.slots(length - tokens, tokens).to(self.device)].cpu()
            wanted = token_scores(visual, system).T
            torch.testing.assert_close(scores[:, :4], wanted[:, :4], atol=10 * tolerance, rtol=10 * tolerance)
            torch.testing.assert_close(scores[:, 4], wanted[:, 4], atol=10 * tolerance, rtol=100 * tolerance)
            start += tokens


def _transfer() -> dict:
    from verl_avar.rollout import kv_transfer_config

    return kv_transfer_config()


def interpret() -> None:
    """Makes this process run kernels in numpy, on CPU tensors; before it imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def two_requests() -> list[Request]:
    return [Request((0.0, 0.0), [3, 7, 1]), Request((1.5, -0.8), [5, 2, 8], PROMPT[:12])]


def check_steps(side_by_side: bool, device="cpu", dtype=torch.float32, tolerance=1e-5) -> None:
    """Prompts in chunks beside decodes: a model runner that runs layers eagerly, with rows of padding behind."""
    layers = Layers(device, dtype, side_by_side=side_by_side)
    first, second = two_requests()
    for batch in ([(first, 14)], [(first, 6), (second, 12)], [(first, 1), (second, 1)], [(second, 1)]):
        layers.fill(batch)
        before = layers.scores.clone()
        rows = sum(tokens for _, tokens in batch)
        layers.forward(layers.metadata(rows + 3, len(batch), max(tokens for _, tokens in batch)))
        layers.check(batch, tolerance)
        written = (layers.scores[:-1] != before[:-1]).any(dim=1).nonzero().ravel()
        assert set(written.tolist()) <= set(layers.slot_mapping[:rows].tolist())


def check_sleep() -> None:
    """vLLM's sleep mode forgets the contents of every buffer that was made with the KV cache; only addresses stay."""
    layers = Layers()
    state, workspace = layers.state, layers.builder.workspace
    for buffer in (
        state.roles,
        state.bias,
        state.masses,
        workspace.parts,
        workspace.sums,
        *workspace.ride_rows.values(),
    ):
        buffer.view(torch.uint8).fill_(0x7F)
    for cache in layers.caches:
        cache.zero_()
    first, second = two_requests()
    for batch in ([(first, 20), (second, 12)], [(first, 1), (second, 1)]):
        layers.fill(batch)
        layers.forward(layers.metadata(ROWS, 2, max(tokens for _, tokens in batch)))
        layers.check(batch)


def check_probed_layers() -> None:
    layers = Layers(probed=[1])
    assert [impl.slots.masses is None for impl in layers.impls] == [True, False, True]
    first, second = two_requests()
    for batch in ([(first, 20), (second, 12)], [(first, 1), (second, 1)]):
        layers.fill(batch)
        layers.forward(layers.metadata(ROWS, 2, max(tokens for _, tokens in batch)))
        layers.check(batch)


def check_without_connector() -> None:
    """vLLM captures graphs on a small cache before the connector has one: attention without bias, and no scores."""
    layers = Layers()
    for impl in layers.impls:
        impl.slots = None
    request = Request((0.0, 0.0), [3, 7])
    layers.fill([(request, 20)])
    layers.forward(layers.metadata(20, 1, 20))
    assert (layers.scores == -1).all()
    layers.scores[:] = torch.nan
    output = layers.output[:, :20].clone()
    from verl_avar.rollout.layer import link_layers

    link_layers(layers.impls, layers.state, layers.probed)
    layers.forward(layers.metadata(20, 1, 20))
    torch.testing.assert_close(layers.output[:, :20], output)
    layers.check([(request, 20)])


def check_room_for_masses() -> None:
    layers = Layers()
    try:
        layers.impls[0].slots.masses = layers.impls[0].slots.masses[:4]
        layers.fill([(Request((0.0, 0.0), [3]), 5)])
        layers.forward(layers.metadata(5, 1, 5))
    except RuntimeError as error:
        assert "a step of 5 tokens, room for the masses of 4" in str(error)
    else:
        raise AssertionError("masses were written out of bounds")


def dummy(layers: Layers) -> None:
    """What vLLM captures with: one token a request, no slots, and the null block in every table."""
    layers.slot_mapping.fill_(-1)
    layers.block_table.zero_()
    layers.seq_lens.fill_(1)
    layers.query_start.copy_(torch.arange(REQUESTS + 1, dtype=torch.int32))


def check_graph(record, device="cpu", dtype=torch.float32, tolerance=1e-5, probed=(0, 1, 2)) -> None:
    """record(run) runs it, or captures it, and returns what replays it. Decoding, with fewer requests than captured."""
    layers = Layers(device, dtype, probed)
    first, second = two_requests()
    for request, tokens in ((first, 20), (second, 12)):
        layers.fill([(request, tokens)])
        layers.forward(layers.metadata(tokens, 1, tokens))
    kept = [tensor.clone() for tensor in (*layers.caches, layers.scores[:-1], layers.state.roles, layers.state.bias)]
    dummy(layers)
    metadata = layers.metadata(REQUESTS, REQUESTS, 1)
    replay = record(lambda: layers.forward(metadata))
    for tensor, before in zip(
        (*layers.caches, layers.scores[:-1], layers.state.roles, layers.state.bias), kept, strict=True
    ):
        torch.testing.assert_close(tensor, before, atol=0, rtol=0)  # a capture leaves no trace
    third = Request((-2.0, 0.5), [4, 9], [Role.SYSTEM, Role.VISUAL])  # its bias counts from the second token on
    steps = [[(first, 1), (second, 1)], [(second, 1)], [(third, 1), (first, 1), (second, 1)], [(third, 1), (second, 1)]]
    for batch in steps:
        layers.fill(batch)
        replay()
        layers.check(batch, tolerance)
