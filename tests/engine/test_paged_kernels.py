"""Kernels that read pages in place give what gathering gives, and are only chosen where they do.

FlexAttention runs here as it is written, not compiled: it looks at its mask alone, for all keys of
the pool. The pages that a compiled one would read are therefore compared with the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention import varlen

from eevp_batch.engine.attention import Gather, Kernel, paged_attention
from eevp_batch.engine.invariance import to_multiple
from eevp_batch.engine.kernel_choice import choose_kernel, objection_to
from eevp_batch.engine.kv_cache import KvPool
from eevp_batch.engine.packing import PackedTokens, pack
from eevp_batch.engine.paged_kernels import AttentionShape, Flex, FlexLayout, Varlen, look_up
from eevp_batch.engine.sequence import Sequence
from eevp_batch.records import Prompt, TokenExit
from eevp_batch.spec import SamplingSpec
from tests.engine.conftest import make_engine, run

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 8
SHAPE = AttentionShape(torch.device("cpu"), torch.float32, HEADS, KV_HEADS, HEAD_SIZE)


@pytest.fixture(autouse=True)
def run_flex_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def documented_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int | None,
) -> torch.Tensor:
    """What torch's documentation says of `varlen_attn`, which itself needs a GPU.

    With a causal window the last query of a sequence is at its last key.
    """
    assert all(part.dtype == torch.int32 for part in (cu_seq_q, seqused_k, block_table))
    assert enable_gqa and num_splits == 1
    out = torch.empty_like(query)
    left, right = window_size
    bounds = cu_seq_q.tolist()
    assert max(b - a for a, b in pairwise(bounds)) == max_q
    for index, (start, stop) in enumerate(pairwise(bounds)):
        used = int(seqused_k[index])
        assert used <= max_k
        keys, values = (store[block_table[index]].flatten(0, 1)[:used] for store in (key, value))
        at = used - (stop - start) + torch.arange(stop - start)[:, None]
        keys_at = torch.arange(used)[None]
        visible = torch.ones(stop - start, used, dtype=torch.bool)
        visible &= (keys_at <= at + right) if right >= 0 else visible
        visible &= (keys_at >= at - left) if left >= 0 else visible
        group = query.shape[1] // key.shape[2]
        keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[start:stop], keys) * scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[start:stop] = torch.einsum("hqk,khd->qhd", weights, values)
    return out


def of_pages(kernel: Varlen | Flex, size: int) -> Kernel:
    """The kernel with pages so small that sequences have several."""
    kernel.page_size = size
    return kernel


KERNELS: dict[str, Callable[[], Kernel]] = {
    "flex": lambda: of_pages(Flex(HEADS // KV_HEADS, run=flex.flex_attention), 8),
    "varlen": lambda: of_pages(Varlen(run=documented_varlen), 8),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv", ["propagate", "verify"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_paged_kernel_gives_what_gathering_gives(
    tiny_model_path: Callable[[str], Path],
    prompts: list[Prompt],
    family: str,
    kv: str,
    kernel: str,
) -> None:
    path = tiny_model_path(family)
    settings = {
        "layers": [2, 4],
        "threshold": 0.35,
        "kv": kv,
        "max_batch": 3,
        "sampling": SamplingSpec(max_new_tokens=12),
        "limits": {"max_resident": 4},  # a small pool: Flex as written looks at all of it
    }
    few = prompts[:6]
    expected = run(make_engine(path, kernel=Gather(), **settings), few)
    found = run(make_engine(path, kernel=KERNELS[kernel](), **settings), few)
    for key, generation in expected.items():
        assert found[key].token_ids == generation.token_ids
        assert found[key].exit_layers == generation.exit_layers
        near = pytest.approx(generation.exit_confidences, abs=1e-4)
        assert found[key].exit_confidences == near


def pack_with_a_gap(kernel: Kernel, on: AttentionShape = SHAPE) -> tuple[PackedTokens, KvPool]:
    """A pack for the second segment: a prompt with a front token far behind it, and two others.

    The first sequence has left after the first segment four times, so that its prompt and the
    token in front of it run, and the tokens between them are only projected.
    """
    pool = KvPool(
        num_pages=40,
        num_layers=1,
        num_kv_heads=on.num_kv_heads,
        head_size=on.head_size,
        hidden_size=1,
        max_resident=3,
        max_pages=20,
        dtype=on.dtype,
        device=on.device,
        hidden_dtype=on.dtype,
        layout=kernel.kv_layout,
        page_size=kernel.page_size,
    )
    sequences = [Sequence(Prompt(row, [3] * n), 2, 8, 0) for row, n in enumerate((17, 1, 30))]
    for sequence in sequences:
        pool.admit(sequence, sequence.max_positions, [])
    for _ in range(4):
        sequences[0].leave(0, [TokenExit(5, 1, 0.9)])
    generator = torch.Generator().manual_seed(1)
    for sequence in sequences:
        pool.grow(sequence)
        slots = torch.tensor([pool.slot(sequence, at) for at in range(sequence.front + 1)])
        shape = (len(slots), on.num_kv_heads, on.head_size)
        parts = [torch.randn(shape, generator=generator).to(on.dtype) for _ in range(2)]
        pool.write(0, slots.to(on.device), *(part.to(on.device) for part in parts))
    return pack(sequences, 1, pool, to_multiple), pool


def attended(kernel: Kernel, window: int | None) -> torch.Tensor:
    """The real rows of `pack_with_a_gap` through one layer, [N, H, D]."""
    tokens, pool = pack_with_a_gap(kernel)
    generator = torch.Generator().manual_seed(2)
    query, key, value = (
        torch.randn(1, heads, tokens.num_rows, HEAD_SIZE, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    layer: Any = SimpleNamespace(layer_idx=0)
    layout = kernel.layout(tokens, pool)
    out, _ = paged_attention(
        layer, query, key, value, None, layout=layout, scaling=0.3, sliding_window=window
    )
    return out[0, : tokens.num_tokens]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_rows_of_a_sequence_may_have_a_gap_between_them(kernel: str, window: int | None) -> None:
    expected = attended(Gather(), window)
    torch.testing.assert_close(attended(KERNELS[kernel](), window), expected, rtol=0, atol=1e-5)


def test_runs_end_at_gaps_and_at_the_most_rows() -> None:
    tokens, pool = pack_with_a_gap(KERNELS["varlen"]())
    found = look_up(tokens, pool)
    # The single row comes first, then the prompt, its front token, the other prompt, the padding.
    num_padding = tokens.num_rows - tokens.num_tokens
    assert found.starts.tolist() == [0, 1, 18, 19, *range(49, tokens.num_rows + 1)]
    assert found.lengths.tolist() == [1, 17, 21, 30] + [1] * num_padding
    assert found.longest == 30
    assert found.tables[1].tolist() == found.tables[2].tolist(), "one sequence has one table"
    assert not found.tables[4:].any(), "rows that pad look at the scratch page"
    short = look_up(tokens, pool, most_rows=8)
    assert short.starts.tolist()[:8] == [0, 1, 9, 17, 18, 19, 27, 35]
    assert short.lengths.tolist()[:7] == [1, 8, 16, 17, 21, 8, 16]
    assert short.longest == 8


@pytest.mark.parametrize("window", [None, 3])
def test_flex_reads_the_pages_that_its_mask_needs(window: int | None) -> None:
    kernel = of_pages(Flex(HEADS // KV_HEADS, run=flex.flex_attention), 4)
    tokens, pool = pack_with_a_gap(kernel)
    layout = kernel.layout(tokens, pool)
    assert isinstance(layout, FlexLayout)
    mask = layout.block_mask(HEADS // KV_HEADS, window)
    num_runs, num_rows = mask.kv_num_blocks.shape[0], mask.seq_lengths[0]
    assert mask.kv_indices.shape[2] == 1, "a run is one block of queries"
    visible = flex.create_mask(mask.mask_mod, num_runs, 1, *mask.seq_lengths, device="cpu")
    needed = visible.view(num_runs, num_rows, -1, 4).any(3).any(1)  # [R, num_pages + 1]
    for row, count in enumerate(mask.kv_num_blocks.flatten().tolist()):
        read = set(mask.kv_indices[row, 0, 0, :count].tolist())
        seen = set(needed[row].nonzero().flatten().tolist())
        assert seen <= read, f"run {row} sees keys of pages that it does not read"
        assert window is not None or seen == read, f"run {row} reads pages in vain"
    assert visible.any(-1).all(), "every row sees a key, those that pad too"


def test_a_cpu_gathers() -> None:
    assert isinstance(choose_kernel(SHAPE), Gather)


def test_what_a_torch_or_a_device_lacks_is_known_before_trying(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = SHAPE._replace(dtype=torch.bfloat16)
    assert Varlen.objection(half) is None
    assert "float32" in str(Varlen.objection(SHAPE))
    assert "heads of 12" in str(Varlen.objection(half._replace(head_size=12)))
    assert "heads of 8" in str(Flex.objection(SHAPE))
    assert Flex.objection(SHAPE._replace(head_size=16)) is None
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, window_size: query)
    assert "no block tables" in str(Varlen.objection(half))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_is_right_passes_its_trial(kernel: str) -> None:
    assert objection_to(KERNELS[kernel](), SHAPE) is None


def test_a_kernel_that_is_wrong_or_fails_is_refused() -> None:
    def skips_the_last_key(*args: Any, seqused_k: torch.Tensor, **rest: Any) -> torch.Tensor:
        return documented_varlen(*args, seqused_k=(seqused_k - 1).clamp(min=1), **rest)

    def has_no_kernel(*args: Any, **rest: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nand more")

    assert "differ" in str(objection_to(Varlen(run=skips_the_last_key), SHAPE))
    assert objection_to(Varlen(run=has_no_kernel), SHAPE) == "no kernel image is available"
