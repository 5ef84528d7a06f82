"""Triton kernels of paged attention with role bias and role masses (AVAR §2.2, §2.3, arXiv:2603.03825).

`triton_attention` launches them and says what they compute; `reference_attention` is the same in plain torch. Importing
this module needs triton.

Roles ride beside the keys and values as columns of 0 and 1 (`ride_table`), so that the tensor cores do what they ask
for: the query's columns beside them hold the bias, and the weights' product with them is the masses. Per key they cost
one byte from memory and a row of a table that stays in cache.
"""

import torch
import triton
import triton.language as tl

from verl_avar.roles import Role

RIDES = 32  # columns of a row of the table; kernels read the first 16 or all
_BIAS_TERMS = 3
_ONES = tl.constexpr(2 * _BIAS_TERMS)  # the column that every key has
_LOG2E = tl.constexpr(1.4426950408889634)

# Counts that change from step to step are not worth a compilation of their own.
_COUNTS = ["requests", "segments", "table_stride"]


def ride_table(dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """What rides beside a key, by the byte of its role: [256, RIDES].

    Columns 0, 2, 4 are 1 for visual keys, 1, 3, 5 for system keys, 6 for all, the rest is padding.
    """
    table = torch.zeros(256, RIDES, dtype=dtype)
    table[Role.VISUAL, 0 : 2 * _BIAS_TERMS : 2] = 1
    table[Role.SYSTEM, 1 : 2 * _BIAS_TERMS : 2] = 1
    table[:, 2 * _BIAS_TERMS] = 1
    return table.to(device)


@triton.jit
def _find_request(query_start, requests, index, BLOCK_Q: tl.constexpr):
    """The request that block `index` belongs to, where r's first block has the number query_start[r] // BLOCK_Q + r.

    Those numbers leave every request room for its blocks and need no running sum of block counts. With BLOCK_Q 0 the
    index is a row of the query, and r's first is query_start[r].
    """
    low = 0
    high = requests
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(query_start + middle)
        if BLOCK_Q > 0:
            first = first // BLOCK_Q + middle
        if first <= index:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _slots_roles(roles, table, key_index, mask, BLOCK_SIZE: tl.constexpr):
    """Roles of the keys at key_index [TILE]; 0 where the mask is off."""
    kv_block = tl.load(table + key_index // BLOCK_SIZE, mask=mask, other=0)
    return tl.load(roles + kv_block * BLOCK_SIZE + key_index % BLOCK_SIZE, mask=mask, other=0)


@triton.jit(do_not_specialize=_COUNTS)
def attention_kernel(
    query,
    cache,
    table,
    query_start,
    seq_lens,
    slot_mapping,
    roles,
    ride_rows,
    bias,
    out,
    masses,
    parts,
    part_sums,
    query_stride,
    block_stride,
    table_stride,
    out_stride,
    requests,
    segments,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    RIDES: tl.constexpr,
    RIDE_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PROBE: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """BLOCK_Q queries of one request times the GROUP heads that share a KV head, against that head's keys, by TILE.

    Grid (query blocks, KV heads, segments). ONE_BLOCK: no request has more than BLOCK_Q queries, and a block's number
    is its request's. SPLIT: the keys of a request are shared out among `segments` programs, which leave their parts in
    `parts` [rows, H, segments, HEAD_SIZE] and `part_sums` [rows, H, segments, 4] (top, total, visual, system).
    """
    HEADS: tl.constexpr = KV_HEADS * GROUP
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    KV_ROW: tl.constexpr = KV_HEADS * 2 * HEAD_SIZE
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last blocks of a prompt see the most keys: they start first
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    if ONE_BLOCK:
        request = block
        start = tl.load(query_start + request)
        first = 0
    else:
        request = _find_request(query_start, requests, block, BLOCK_Q)
        start = tl.load(query_start + request)
        first = (block - (start // BLOCK_Q + request)) * BLOCK_Q
    queries = tl.load(query_start + request + 1) - start
    if first >= queries:
        return
    seq_len = tl.load(seq_lens + request)
    context = seq_len - queries
    limit = tl.minimum(seq_len, context + first + BLOCK_Q)  # keys that some row of this block sees
    low = 0
    high = tl.cdiv(limit, TILE)
    if SPLIT:
        per_segment = tl.cdiv(tl.cdiv(seq_len, TILE), segments)
        low = segment * per_segment
        high = tl.minimum(high, low + per_segment)
        if low >= high:
            return

    m = tl.arange(0, BLOCK_M)
    size = tl.arange(0, PADDED_SIZE)
    column = tl.arange(0, RIDES)
    real = (size < HEAD_SIZE)[None, :]
    # Rows that stand for no query see what the last one sees, and are not stored.
    stored = (m < BLOCK_Q * GROUP) & (first + m // GROUP < queries)
    q_index = tl.minimum(first + m // GROUP, queries - 1)
    position = context + q_index
    row = (start + q_index).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    element = head[:, None] * HEAD_SIZE + size[None, :]
    q = tl.load(query + row[:, None] * query_stride + element, mask=stored[:, None] & real, other=0.0)

    # The bias comes into the product of query and key, before the scale, as three terms of the input's dtype that
    # together hold all bits of the float32.
    slot = tl.load(slot_mapping + row)
    owner = tl.maximum(slot, 0) // BLOCK_SIZE
    owned = stored & (slot >= 0)
    visual_bias = tl.load(bias + 2 * owner, mask=owned, other=0.0) / scale
    system_bias = tl.load(bias + 2 * owner + 1, mask=owned, other=0.0) / scale
    whole = tl.where(column[None, :] % 2 == 0, visual_bias[:, None], system_bias[:, None])
    lift0 = whole.to(q.dtype)
    rest = whole - lift0.to(tl.float32)
    lift1 = rest.to(q.dtype)
    lift2 = (rest - lift1.to(tl.float32)).to(q.dtype)
    lift = tl.where(column[None, :] < 2, lift0, tl.where(column[None, :] < 4, lift1, lift2))
    lift = tl.where(column[None, :] < _ONES, lift, tl.zeros_like(lift))
    role_limit = limit
    if not PROBE:  # without masses roles are read for a bias only
        role_limit = tl.where(tl.max(tl.maximum(tl.abs(visual_bias), tl.abs(system_bias)), 0) > 0.0, limit, 0)
    if UPCAST:
        q = q.to(tl.float32)
        lift = lift.to(tl.float32)

    acc = tl.zeros([BLOCK_M, PADDED_SIZE], tl.float32)
    sums = tl.zeros([BLOCK_M, RIDES], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    exponent = scale * _LOG2E  # exp2 needs no factor of its own
    table += request.to(tl.int64) * table_stride
    cache += kv_head * (2 * HEAD_SIZE)
    key_index = low * TILE + tl.arange(0, TILE)
    role = _slots_roles(roles, table, key_index, key_index < role_limit, BLOCK_SIZE)
    for tile in range(low, high):
        key_index = tile * TILE + tl.arange(0, TILE)
        present = key_index < limit
        if BLOCK_SIZE % TILE == 0:  # the tile lies in one block
            kv_block = tl.load(table + tile * TILE // BLOCK_SIZE)
            offset = tile * TILE % BLOCK_SIZE + tl.arange(0, TILE)
        else:
            kv_block = tl.load(table + key_index // BLOCK_SIZE, mask=present, other=0)
            offset = key_index % BLOCK_SIZE
        kv_row = kv_block.to(tl.int64) * block_stride + offset * KV_ROW  # a cache can pass 2^31 elements
        # Slots that hold no key yet may hold anything, NaN too: they must not be read, since 0 · NaN is NaN.
        readable = present[:, None] & real
        k = tl.load(cache + kv_row[:, None] + size[None, :], mask=readable, other=0.0)
        v = tl.load(cache + HEAD_SIZE + kv_row[:, None] + size[None, :], mask=readable, other=0.0)
        ride = ride_rows + role.to(tl.int32)[:, None] * RIDE_STRIDE + column[None, :]
        rides = tl.load(ride, mask=(key_index < role_limit)[:, None], other=0.0)
        # Roles come a tile ahead: Triton's pipeliner does not copy single bytes.
        role = _slots_roles(roles, table, key_index + TILE, key_index + TILE < role_limit, BLOCK_SIZE)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
            rides = rides.to(tl.float32)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits = tl.dot(lift, tl.trans(rides), logits, input_precision=PRECISION)
        if (tile + 1) * TILE > context + first + 1:  # not every row sees every key
            logits = tl.where(key_index[None, :] <= position[:, None], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1) * exponent)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
        weight = tl.exp2(logits * exponent - base[:, None]).to(query.dtype.element_ty)
        if UPCAST:
            weight = weight.to(tl.float32)
        shrink = tl.exp2(top - base)[:, None]
        top = new_top
        acc = tl.dot(weight, v, acc * shrink, input_precision=PRECISION)
        if not PROBE:
            rides = tl.full([TILE, RIDES], 1.0, weight.dtype)
        sums = tl.dot(weight, rides, sums * shrink, input_precision=PRECISION)

    # The total is of rounded weights, as the output is: the two err alike.
    total = tl.sum(tl.where(column[None, :] == _ONES, sums, 0.0), 1)
    visual = tl.sum(tl.where(column[None, :] == 0, sums, 0.0), 1)
    system = tl.sum(tl.where(column[None, :] == 1, sums, 0.0), 1)
    if SPLIT:
        part = (row * HEADS + head) * segments + segment
        tl.store(parts + part[:, None] * HEAD_SIZE + size[None, :], acc, mask=stored[:, None] & real)
        tl.store(part_sums + part * 4, top, mask=stored)
        tl.store(part_sums + part * 4 + 1, total, mask=stored)
        if PROBE:
            tl.store(part_sums + part * 4 + 2, visual, mask=stored)
            tl.store(part_sums + part * 4 + 3, system, mask=stored)
    else:
        inverse = 1.0 / tl.where(total > 0.0, total, 1.0)  # a row without keys gives zeros
        target = out + row[:, None] * out_stride + element
        tl.store(target, (acc * inverse[:, None]).to(out.dtype.element_ty), mask=stored[:, None] & real)
        if PROBE:
            tl.store(masses + (row * HEADS + head) * 2, visual * inverse, mask=stored)
            tl.store(masses + (row * HEADS + head) * 2 + 1, system * inverse, mask=stored)


@triton.jit(do_not_specialize=_COUNTS)
def reduce_kernel(
    query_start,
    seq_lens,
    out,
    masses,
    parts,
    part_sums,
    out_stride,
    requests,
    segments,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    MOST_SEGMENTS: tl.constexpr,
    TILE: tl.constexpr,
    PROBE: tl.constexpr,
    ONE_QUERY: tl.constexpr,
):
    """Joins the parts of a SPLIT `attention_kernel` of the same TILE. Grid (rows, or requests where ONE_QUERY; H).

    MOST_SEGMENTS: a power of two, at least `segments`.
    """
    head = tl.program_id(1)
    if ONE_QUERY:
        request = tl.program_id(0)
        row = tl.load(query_start + request)
    else:
        row = tl.program_id(0)
        request = _find_request(query_start, requests, row, 0)
    stop = tl.load(query_start + request + 1)
    if row >= stop:
        return
    seq_len = tl.load(seq_lens + request)
    per_segment = tl.cdiv(tl.cdiv(seq_len, TILE), segments)
    segment = tl.arange(0, MOST_SEGMENTS)
    # What the other segments left is of an earlier step.
    seen = (segment < segments) & (segment * per_segment * TILE <= seq_len - stop + row)
    part = (row.to(tl.int64) * HEADS + head) * segments + segment
    top = tl.load(part_sums + part * 4, mask=seen, other=float("-inf"))
    highest = tl.max(top, 0)
    share = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(share * tl.load(part_sums + part * 4 + 1, mask=seen, other=0.0), 0)
    inverse = 1.0 / tl.where(total > 0.0, total, 1.0)
    size = tl.arange(0, PADDED_SIZE)
    real = size < HEAD_SIZE
    values = tl.load(parts + part[:, None] * HEAD_SIZE + size[None, :], mask=seen[:, None] & real[None, :], other=0.0)
    joined = tl.sum(values * share[:, None], 0) * inverse
    target = out + row.to(tl.int64) * out_stride + head * HEAD_SIZE + size
    tl.store(target, joined.to(out.dtype.element_ty), mask=real)
    if PROBE:
        mass = masses + (row.to(tl.int64) * HEADS + head) * 2
        tl.store(mass, tl.sum(share * tl.load(part_sums + part * 4 + 2, mask=seen, other=0.0), 0) * inverse)
        tl.store(mass + 1, tl.sum(share * tl.load(part_sums + part * 4 + 3, mask=seen, other=0.0), 0) * inverse)
