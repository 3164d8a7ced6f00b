"""The Triton kernels that triton.py launches. Only that file imports this one, and only when it
launches a kernel: the package also works without Triton.

A program is one of the many instances of a kernel that the GPU runs at the same time. It reads the
[batch, positions, heads, head width] arrays as they are stored, and works on one head: the rows of
a head are `Q * H` or `K * H` elements apart. Names in capitals are compile-time constants; lengths
and q_offset are not. Scores are [queries, keys]. In `dkv_kernel` they are [keys, queries], so that
p and ds are the left factors of its products.
"""

import triton
import triton.language as tl

from pallas_kernels.attention import mask
from pallas_kernels.attention.flash import kernel_name

MASKED = tl.constexpr(mask.MASKED)
LOG2E = tl.constexpr(1.4426950408889634)


def _named(operation: str):
    """The name in profiles and in the compiler's reports, see `flash.kernel_name`."""

    def name(specialization):
        return kernel_name(operation, "triton", specialization.constants.get("WINDOW"))

    return triton.jit(repr=name)


@triton.jit
def _largest(x, axis: tl.constexpr):
    # tl.max does not run in the interpreter if Triton was imported to compile; this does.
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@triton.jit
def _total(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit
def _rows(ptr, first, limit, STRIDE: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, GUARD):
    """Rows first .. first + ROWS of one head, [ROWS, H]; 0 from `limit` on if GUARD."""
    rows = tl.arange(0, ROWS)
    places = ptr + tl.cast(first, tl.int64) * STRIDE  # 64 bits: N * Q * H may pass 2**31
    places = places + rows[:, None] * STRIDE + tl.arange(0, H)[None, :]
    if GUARD:
        x = tl.load(places, mask=(first + rows < limit)[:, None], other=0.0)
    else:
        x = tl.load(places)
    return x


@triton.jit
def _put_rows(ptr, x, first, limit, STRIDE: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    places = ptr + tl.cast(first, tl.int64) * STRIDE
    places = places + rows[:, None] * STRIDE + tl.arange(0, H)[None, :]
    tl.store(places, x.to(ptr.dtype.element_ty), mask=(first + rows < limit)[:, None])


@triton.jit
def _vector(ptr, first, limit, ROWS: tl.constexpr):
    places = first + tl.arange(0, ROWS)
    return tl.load(ptr + places, mask=places < limit, other=0)


@triton.jit
def _head(ptr, row, positions, head, HEADS: tl.constexpr, H: tl.constexpr):
    """Where one head of a batch row begins in [batch, positions, heads, head width]."""
    return ptr + (row * positions * (HEADS * H) + head * H)


@triton.jit
def _last_key(lengths_ptr, b, S, LENGTHS: tl.constexpr):
    """How many keys row b has: all of the array's, or as many as lengths says."""
    last_key = S
    if LENGTHS:
        last_key = tl.minimum(tl.load(lengths_ptr + b), S)
    return last_key


@triton.jit
def _query_program(N, Q: tl.constexpr, K: tl.constexpr, BQ: tl.constexpr):
    """What a program of `forward` and `dq` handles: a query head, its K/V head, the batch row, and
    the first of BQ queries. The heads of a group run at the same time, because they read the same
    keys. The queries with the most keys start first, so that no long program is left for the end.
    """
    G: tl.constexpr = Q // K
    step, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = kv_head * G + step % G
    first = ((N + BQ - 1) // BQ - 1 - step // G) * BQ
    return head, kv_head, b, first


@triton.jit
def _key_blocks(
    first, N, q_offset, last_key,
    WINDOW: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ALL_MASKED: tl.constexpr,
):  # fmt: skip
    """For BQ queries from `first` on: keys [a, b) need a mask (the window's edge), keys [b, c) need
    none, keys [c, d) need one (the diagonal and the end). a, b and c are multiples of BK."""
    p0 = q_offset + first
    p1 = q_offset + tl.minimum(first + BQ, N) - 1
    d = tl.minimum(p1 + 1, last_key)
    a = 0
    b = 0
    if WINDOW is not None:
        a = tl.maximum(p0 - WINDOW + 1, 0) // BK * BK
        b = (tl.maximum(p1 - WINDOW + 1, 0) + BK - 1) // BK * BK
    b = tl.maximum(a, tl.minimum(b, d))
    c = tl.maximum(b, tl.minimum(p0 + 1, last_key) // BK * BK)
    if ALL_MASKED:
        c = b
    return a, b, c, d


@triton.jit
def _query_blocks(
    first, N, q_offset, last_key,
    WINDOW: tl.constexpr, LENGTHS: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, ALL_MASKED: tl.constexpr,
):  # fmt: skip
    """For BK keys from `first` on: queries [a, b) need a mask (the diagonal), queries [b, c) need
    none, queries [c, d) need one (the window's edge and the end). a is a multiple of BQ. b and c
    are multiples too, or equal to d."""
    d = N
    c = N // BQ * BQ
    if WINDOW is not None:
        last = tl.minimum(first + BK, last_key) - 1
        d = tl.minimum(tl.maximum(last + WINDOW - q_offset, 0), N)
        seen_by_all = tl.maximum(first + WINDOW - q_offset, 0)
        c = tl.minimum(seen_by_all, N) // BQ * BQ
    a = tl.maximum(first - q_offset, 0) // BQ * BQ
    if LENGTHS:
        d = tl.where(first < last_key, d, 0)
    b = (tl.maximum(first + BK - 1 - q_offset, 0) + BQ - 1) // BQ * BQ
    b = tl.maximum(a, tl.minimum(b, d))
    c = tl.maximum(b, tl.minimum(c, d))
    if ALL_MASKED:
        c = b
    return a, b, c, d


@triton.jit
def _visible(q_pos, k_pos, WINDOW: tl.constexpr):
    """`mask.visible`, in Triton."""
    age = q_pos - k_pos
    seen = age >= 0
    if WINDOW is not None:
        seen = seen & (age < WINDOW)
    return seen


@triton.jit
def _mask_scores(s, q_pos, k_pos, q_ids, kv_ids, WINDOW: tl.constexpr, SEGMENTS: tl.constexpr):
    """Masks scores that are already scaled, with a finite number, so that a row without any key
    gives no NaN."""
    seen = _visible(q_pos, k_pos, WINDOW)
    if SEGMENTS:
        seen = seen & (q_ids == kv_ids)
    return tl.where(seen, s, MASKED)


@triton.jit
def _attend(
    acc, total, top, q, k_ptr, v_ptr, q_pos, q_ids, kv_ids_ptr, start, end, last_key,
    K: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, SCALE2: tl.constexpr,
    BK: tl.constexpr, SEGMENTS: tl.constexpr, MASK: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Keys start..end, with a running softmax in base 2."""
    for low in tl.range(start, end, BK):
        k = _rows(k_ptr, low, last_key, K * H, H, BK, MASK and GUARD)
        s = tl.dot(q, tl.trans(k))
        if MASK:
            kv_ids = 0
            k_pos = low + tl.arange(0, BK)
            if SEGMENTS:
                kv_ids = _vector(kv_ids_ptr, low, last_key, BK)[None, :]
            s = s * SCALE2
            s = _mask_scores(s, q_pos[:, None], k_pos[None, :], q_ids, kv_ids, WINDOW, SEGMENTS)
            if GUARD:
                s = tl.where((k_pos < last_key)[None, :], s, MASKED)
            new = tl.maximum(top, _largest(s, 1))
            # A row that has seen nothing yet is shifted by 0, so that its exponentials are 0.
            p = tl.exp2(s - tl.where(new < MASKED / 2, 0.0, new)[:, None])
        else:
            # SCALE2 >= 0: the maximum may be scaled instead, and the rest is one multiply-add.
            new = tl.maximum(top, _largest(s, 1) * SCALE2)
            p = tl.exp2(s * SCALE2 - new[:, None])
        keep = tl.exp2(top - new)
        total = total * keep + _total(p, 1)
        v = _rows(v_ptr, low, last_key, K * H, H, BK, MASK and GUARD)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
        top = new
    return acc, total, top


@_named("forward")
def forward_kernel(
    q_ptr, k_ptr, v_ptr, q_ids_ptr, kv_ids_ptr, lengths_ptr, N, S, q_offset, out_ptr, lse_ptr,
    Q: tl.constexpr, K: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr, GUARD: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out, lse of BQ queries. Grid: (query block and head of the group, K/V head, batch row)."""
    head, kv_head, b, first = _query_program(N, Q, K, BQ)
    row = tl.cast(b, tl.int64)
    q_ptr = _head(q_ptr, row, N, head, Q, H)
    out_ptr = _head(out_ptr, row, N, head, Q, H)
    k_ptr = _head(k_ptr, row, S, kv_head, K, H)
    v_ptr = _head(v_ptr, row, S, kv_head, K, H)
    lse_ptr += (row * Q + head) * N
    q_ids_ptr += row * N
    kv_ids_ptr += row * S
    last_key = _last_key(lengths_ptr, b, S, LENGTHS)

    q = _rows(q_ptr, first, N, Q * H, H, BQ, True)
    if SCALE < 0:
        q = -q
    SCALE2: tl.constexpr = (SCALE if SCALE > 0 else -SCALE) * LOG2E
    q_ids = 0
    if SEGMENTS:
        q_ids = _vector(q_ids_ptr, first, N, BQ)[:, None]
    q_pos = q_offset + first + tl.arange(0, BQ)
    a, b1, c, d = _key_blocks(first, N, q_offset, last_key, WINDOW, BQ, BK, SEGMENTS)

    top = tl.full([BQ], MASKED, tl.float32)
    total = tl.full([BQ], 0.0, tl.float32)
    acc = tl.full([BQ, H], 0.0, tl.float32)
    if WINDOW is not None:
        acc, total, top = _attend(
            acc, total, top, q, k_ptr, v_ptr, q_pos, q_ids, kv_ids_ptr, a, b1, last_key,
            K, H, WINDOW, SCALE2, BK, SEGMENTS, True, GUARD,
        )  # fmt: skip
    if not SEGMENTS:
        acc, total, top = _attend(
            acc, total, top, q, k_ptr, v_ptr, q_pos, q_ids, kv_ids_ptr, b1, c, last_key,
            K, H, WINDOW, SCALE2, BK, SEGMENTS, False, GUARD,
        )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, k_ptr, v_ptr, q_pos, q_ids, kv_ids_ptr, c, d, last_key,
        K, H, WINDOW, SCALE2, BK, SEGMENTS, True, GUARD,
    )  # fmt: skip

    empty = total == 0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, MASKED, (top + tl.log2(total)) / LOG2E)
    _put_rows(out_ptr, acc / total[:, None], first, N, Q * H, H, BQ)
    rows = first + tl.arange(0, BQ)
    tl.store(lse_ptr + rows, lse, mask=rows < N)


@triton.jit
def _collect_q(
    dq, q, do, lse2, delta, k_ptr, v_ptr, q_pos, q_ids, kv_ids_ptr, start, end, last_key,
    K: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, SCALE2: tl.constexpr,
    BK: tl.constexpr, SEGMENTS: tl.constexpr, MASK: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    for low in tl.range(start, end, BK):
        k = _rows(k_ptr, low, last_key, K * H, H, BK, MASK and GUARD)
        v = _rows(v_ptr, low, last_key, K * H, H, BK, MASK and GUARD)
        s = tl.dot(q, tl.trans(k)) * SCALE2
        if MASK:
            kv_ids = 0
            k_pos = low + tl.arange(0, BK)
            if SEGMENTS:
                kv_ids = _vector(kv_ids_ptr, low, last_key, BK)[None, :]
            s = _mask_scores(s, q_pos[:, None], k_pos[None, :], q_ids, kv_ids, WINDOW, SEGMENTS)
            if GUARD:
                s = tl.where((k_pos < last_key)[None, :], s, MASKED)
        p = tl.exp2(s - lse2[:, None])
        dp = tl.dot(do, tl.trans(v))
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@_named("dq")
def dq_kernel(
    q_ptr, k_ptr, v_ptr, q_ids_ptr, kv_ids_ptr, lengths_ptr, lse_ptr, delta_ptr, do_ptr,
    N, S, q_offset, dq_ptr,
    Q: tl.constexpr, K: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr, GUARD: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dq of BQ queries. The grid and the visited blocks are those of `forward`."""
    SCALE2: tl.constexpr = SCALE * LOG2E
    head, kv_head, b, first = _query_program(N, Q, K, BQ)
    row = tl.cast(b, tl.int64)
    q_ptr = _head(q_ptr, row, N, head, Q, H)
    do_ptr = _head(do_ptr, row, N, head, Q, H)
    dq_ptr = _head(dq_ptr, row, N, head, Q, H)
    k_ptr = _head(k_ptr, row, S, kv_head, K, H)
    v_ptr = _head(v_ptr, row, S, kv_head, K, H)
    q_ids_ptr += row * N
    kv_ids_ptr += row * S
    last_key = _last_key(lengths_ptr, b, S, LENGTHS)

    q = _rows(q_ptr, first, N, Q * H, H, BQ, True)
    do = _rows(do_ptr, first, N, Q * H, H, BQ, True)
    lse2 = _vector(lse_ptr + (row * Q + head) * N, first, N, BQ)
    delta = _vector(delta_ptr + (row * Q + head) * N, first, N, BQ)
    q_ids = 0
    if SEGMENTS:
        q_ids = _vector(q_ids_ptr, first, N, BQ)[:, None]
    q_pos = q_offset + first + tl.arange(0, BQ)
    a, b1, c, d = _key_blocks(first, N, q_offset, last_key, WINDOW, BQ, BK, SEGMENTS)

    dq = tl.full([BQ, H], 0.0, tl.float32)
    if WINDOW is not None:
        dq = _collect_q(
            dq, q, do, lse2, delta, k_ptr, v_ptr, q_pos, q_ids, kv_ids_ptr, a, b1, last_key,
            K, H, WINDOW, SCALE2, BK, SEGMENTS, True, GUARD,
        )  # fmt: skip
    if not SEGMENTS:
        dq = _collect_q(
            dq, q, do, lse2, delta, k_ptr, v_ptr, q_pos, q_ids, kv_ids_ptr, b1, c, last_key,
            K, H, WINDOW, SCALE2, BK, SEGMENTS, False, GUARD,
        )  # fmt: skip
    dq = _collect_q(
        dq, q, do, lse2, delta, k_ptr, v_ptr, q_pos, q_ids, kv_ids_ptr, c, d, last_key,
        K, H, WINDOW, SCALE2, BK, SEGMENTS, True, GUARD,
    )  # fmt: skip
    _put_rows(dq_ptr, dq * SCALE, first, N, Q * H, H, BQ)


@triton.jit
def _collect_kv(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, k_pos, q_ids_ptr, kv_ids, start, end,
    N, q_offset,
    Q: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, SCALE2: tl.constexpr,
    BQ: tl.constexpr, SEGMENTS: tl.constexpr, MASK: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    for low in tl.range(start, end, BQ):
        rows = low + tl.arange(0, BQ)
        q = _rows(q_ptr, low, N, Q * H, H, BQ, MASK and GUARD)
        do = _rows(do_ptr, low, N, Q * H, H, BQ, MASK and GUARD)
        if MASK and GUARD:
            lse2 = _vector(lse_ptr, low, N, BQ)
            delta = _vector(delta_ptr, low, N, BQ)
        else:
            lse2 = tl.load(lse_ptr + rows)
            delta = tl.load(delta_ptr + rows)
        s = tl.dot(k, tl.trans(q)) * SCALE2
        if MASK:
            q_ids = 0
            if SEGMENTS:
                q_ids = _vector(q_ids_ptr, low, N, BQ)[None, :]
            q_pos = q_offset + rows
            s = _mask_scores(s, q_pos[None, :], k_pos[:, None], q_ids, kv_ids, WINDOW, SEGMENTS)
        p = tl.exp2(s - lse2[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv)
        dp = tl.dot(v, tl.trans(do))
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@_named("dkv")
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, q_ids_ptr, kv_ids_ptr, lengths_ptr, lse_ptr, delta_ptr, do_ptr,
    N, S, q_offset, dk_ptr, dv_ptr,
    Q: tl.constexpr, K: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, SCALE: tl.constexpr,
    SEGMENTS: tl.constexpr, LENGTHS: tl.constexpr, GUARD: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dk, dv of BK keys. Grid: (key block, K/V head, batch row). Each program sums over the query
    heads of its group and over the query blocks that see its keys, in a fixed order, in fp32."""
    G: tl.constexpr = Q // K
    SCALE2: tl.constexpr = SCALE * LOG2E
    step, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = step * BK
    row = tl.cast(b, tl.int64)
    k_ptr = _head(k_ptr, row, S, kv_head, K, H)
    v_ptr = _head(v_ptr, row, S, kv_head, K, H)
    dk_ptr = _head(dk_ptr, row, S, kv_head, K, H)
    dv_ptr = _head(dv_ptr, row, S, kv_head, K, H)
    q_ids_ptr += row * N
    kv_ids_ptr += row * S
    last_key = _last_key(lengths_ptr, b, S, LENGTHS)

    k = _rows(k_ptr, first, last_key, K * H, H, BK, True)
    v = _rows(v_ptr, first, last_key, K * H, H, BK, True)
    k_pos = first + tl.arange(0, BK)
    kv_ids = 0
    if SEGMENTS:
        kv_ids = _vector(kv_ids_ptr, first, S, BK)[:, None]
    start, full, end_full, end = _query_blocks(
        first, N, q_offset, last_key, WINDOW, LENGTHS, BQ, BK, SEGMENTS
    )

    dk = tl.full([BK, H], 0.0, tl.float32)
    dv = tl.full([BK, H], 0.0, tl.float32)
    for g in tl.range(0, G, num_stages=1):
        head = kv_head * G + g
        q_head = q_ptr + row * N * (Q * H) + head * H
        do_head = do_ptr + row * N * (Q * H) + head * H
        lse_head = lse_ptr + (row * Q + head) * N
        delta_head = delta_ptr + (row * Q + head) * N
        dk, dv = _collect_kv(
            dk, dv, k, v, q_head, do_head, lse_head, delta_head, k_pos, q_ids_ptr, kv_ids,
            start, full, N, q_offset, Q, H, WINDOW, SCALE2, BQ, SEGMENTS, True, GUARD,
        )  # fmt: skip
        if not SEGMENTS:
            dk, dv = _collect_kv(
                dk, dv, k, v, q_head, do_head, lse_head, delta_head, k_pos, q_ids_ptr, kv_ids,
                full, end_full, N, q_offset, Q, H, WINDOW, SCALE2, BQ, SEGMENTS,
                False, GUARD,
            )  # fmt: skip
        dk, dv = _collect_kv(
            dk, dv, k, v, q_head, do_head, lse_head, delta_head, k_pos, q_ids_ptr, kv_ids,
            end_full, end, N, q_offset, Q, H, WINDOW, SCALE2, BQ, SEGMENTS, True, GUARD,
        )  # fmt: skip
    if LENGTHS:  # keys that do not exist were read as 0 and not masked, so their sums are wrong
        exists = (k_pos < last_key)[:, None]
        dk = tl.where(exists, dk, 0.0)
        dv = tl.where(exists, dv, 0.0)
    _put_rows(dk_ptr, dk * SCALE, first, S, K * H, H, BK)
    _put_rows(dv_ptr, dv, first, S, K * H, H, BK)


@_named("decode")
def decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, S, keys_per_part, out_ptr, lse_ptr,
    Q: tl.constexpr, K: tl.constexpr, H: tl.constexpr, SCALE: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One part of a row's cache, for all query heads of a group at once; they are padded to ROWS
    rows, the fewest that the tensor cores multiply. Grid: (part, K/V head, batch row). Nothing is
    read after the valid length. A part without keys gives 0 and MASKED."""
    G: tl.constexpr = Q // K
    SCALE2: tl.constexpr = SCALE * LOG2E
    part, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.cast(b, tl.int64)
    k_ptr = _head(k_ptr, row, S, kv_head, K, H)
    v_ptr = _head(v_ptr, row, S, kv_head, K, H)
    heads = kv_head * G
    start = part * keys_per_part
    last_key = _last_key(lengths_ptr, b, S, True)
    end = tl.minimum(start + keys_per_part, last_key)

    q = _rows(q_ptr + row * (Q * H), heads, heads + G, H, H, ROWS, True)
    top = tl.full([ROWS], MASKED, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, H], 0.0, tl.float32)
    for low in tl.range(start, end, BK):
        k = _rows(k_ptr, low, end, K * H, H, BK, True)
        v = _rows(v_ptr, low, end, K * H, H, BK, True)
        s = tl.dot(q, tl.trans(k)) * SCALE2
        s = tl.where((low + tl.arange(0, BK) < end)[None, :], s, MASKED)
        new = tl.maximum(top, _largest(s, 1))  # never MASKED: low < end
        p = tl.exp2(s - new[:, None])
        keep = tl.exp2(top - new)
        total = total * keep + _total(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])
        top = new

    empty = total == 0
    total = tl.where(empty, 1.0, total)
    lse2 = tl.where(empty, MASKED, top + tl.log2(total))
    place = (row * PARTS + part) * Q
    _put_rows(out_ptr + place * H, acc / total[:, None], heads, heads + G, H, H, ROWS)
    rows = heads + tl.arange(0, ROWS)
    tl.store(lse_ptr + place + rows, lse2, mask=rows < heads + G)


@triton.jit
def probe_kernel(x_ptr, out_ptr):
    """Copies a number: the smallest kernel that shows whether jax-triton works."""
    tl.store(out_ptr, tl.load(x_ptr))
