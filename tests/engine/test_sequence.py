"""What waits, what is judged and what is rolled back, with scripted models; no tensor."""

from __future__ import annotations

from hashlib import blake2b

from hypothesis import given, settings
from hypothesis import strategies as st

from eevp_batch.engine.sequence import Origin, Sequence, Settled, ShortPrompt
from eevp_batch.records import Prompt, TokenExit
from eevp_batch.spec import KvPolicy

PROMPT = [7, 8, 9]
NEW_TOKENS = 12
END_ID = 0
LEFT = Origin("generated", 1)


def sequence(kv: KvPolicy, num_segments: int = 2, max_waiting: int = 4) -> Sequence:
    return Sequence(Prompt("row", PROMPT), num_segments, NEW_TOKENS, 0, kv, max_waiting)


def token(token_id: int, layer: int = 1) -> TokenExit:
    return TokenExit(token_id, layer, 0.5)


def drafting(*token_ids: int, max_waiting: int = 4) -> Sequence:
    """A `verify` sequence of two segments whose tokens all left after the first."""
    found = sequence("verify", max_waiting=max_waiting)
    for token_id in token_ids:
        assert found.leave(0, [token(token_id)]) == Settled([], [], None), "a draft does not stand"
    found.mark_filled(0)
    return found


def test_a_prompt_runs_whole_through_every_segment() -> None:
    for kv in ("propagate", "recompute", "verify"):
        fresh = sequence(kv)
        for depth in (0, 1):
            waiting = fresh.waiting(depth)
            assert (waiting.run, waiting.project) == ([0, 1, 2], {})
            assert list(waiting.scored) == [2], "only the end of a prompt is scored"


def test_waiting_tokens_are_projected_or_run() -> None:
    expected = {
        "propagate": ([0, 1, 2, 5], {LEFT: [3, 4]}, [5]),
        "bridge": ([0, 1, 2, 5], {LEFT: [3, 4]}, [5]),
        "recompute": ([0, 1, 2, 3, 4, 5], {}, [5]),
        "verify": ([0, 1, 2, 3, 4, 5], {}, [2, 3, 4, 5]),
    }
    for kv, parts in expected.items():
        found = sequence(kv)  # type: ignore[arg-type]
        for token_id in (11, 12, 13):
            found.leave(0, [token(token_id)])
        found.mark_filled(0)
        waiting = found.waiting(1)
        assert (waiting.run, waiting.project, list(waiting.scored)) == parts
        assert found.num_waiting == 3


def test_projected_tokens_are_told_apart_by_where_they_left() -> None:
    found = Sequence(Prompt("row", PROMPT), 3, NEW_TOKENS, 0, "bridge")
    for layer, depth in ((1, 0), (2, 1), (1, 0)):
        for shallower in range(depth):
            found.mark_filled(shallower)
        found.leave(depth, [token(11, layer)])
    found.mark_filled(0)
    # Position 2, the prompt's last, was run at depth 0; the token after it left after layer 2.
    assert found.waiting(1).project == {Origin("generated", 1): [4]}
    assert found.waiting(2).project == {Origin("generated", 2): [3], Origin("generated", 1): [4]}


def test_a_short_prompt_runs_deep_only_at_its_end() -> None:
    short = ShortPrompt(exit_layer=1, tail=2)
    found = Sequence(Prompt("row", PROMPT), 2, NEW_TOKENS, 0, "bridge", short_prompt=short)
    assert (found.waiting(0).run, found.waiting(0).project) == ([0, 1, 2], {})
    found.mark_filled(0)
    waiting = found.waiting(1)
    assert (waiting.run, waiting.project) == ([1, 2], {Origin("prompt", 1): [0]})
    assert found.max_shared == 1, "its end is never shared"
    found.leave(0, [token(11)])
    found.leave(0, [token(12)])
    found.mark_filled(0)
    waiting = found.waiting(1)
    assert waiting.run == [1, 2, 4]
    assert waiting.project == {Origin("prompt", 1): [0], LEFT: [3]}


def test_a_prompt_no_longer_than_its_tail_runs_whole() -> None:
    short = ShortPrompt(exit_layer=1, tail=3)
    found = Sequence(Prompt("row", PROMPT), 2, NEW_TOKENS, 0, "bridge", short_prompt=short)
    assert (found.waiting(1).run, found.waiting(1).project) == ([0, 1, 2], {})


def test_all_drafts_stand_and_another_token_follows() -> None:
    found = drafting(11, 12)
    exits = [token(token_id, 2) for token_id in (11, 12, 13)]
    settled = found.leave(1, exits)
    assert settled == Settled([token(11), token(12), exits[2]], [token(11), token(12)], None)
    assert found.exits == settled.exits, "a draft that stands keeps its own exit layer"
    assert (found.token_ids, found.filled) == ([*PROMPT, 11, 12, 13], [5, 5])
    assert (found.num_drafts, found.waiting(0).run) == (0, [5])


def test_the_first_wrong_draft_is_replaced_and_the_rest_is_rolled_back() -> None:
    found = drafting(11, 12, 13)
    settled = found.leave(1, [token(token_id, 2) for token_id in (11, 99, 13, 14)])
    assert settled == Settled([token(11), token(99, 2)], [token(11)], token(12))
    assert (found.token_ids, found.exits) == ([*PROMPT, 11, 99], settled.exits)
    assert found.filled == [4, 4], "what the wrong draft left in any segment is forgotten"
    assert found.waiting(0).run == found.waiting(1).run == [4]


def test_an_end_that_is_a_draft_is_judged_without_being_fed() -> None:
    found = drafting(11, END_ID)
    found.finish_reason = "eos"
    assert (found.front, found.num_drafts, found.may_leave) == (3, 2, False)
    assert list(found.waiting(1).scored) == [2, 3]
    assert [found.draft_after(position) for position in (2, 3)] == [11, END_ID]
    assert found.leave(1, [token(11, 2), token(END_ID, 2)]).rejected is None
    assert (found.finish_reason, found.num_drafts, len(found.exits)) == ("eos", 0, 2)


def test_a_rejected_end_is_no_end() -> None:
    for judged, expected in (([11, 5], [11, 5]), ([6, END_ID], [6])):
        found = drafting(11, END_ID)
        found.finish_reason = "eos"
        found.leave(1, [token(token_id, 2) for token_id in judged])
        assert found.finish_reason is None
        assert found.token_ids == [*PROMPT, *expected]


def test_the_context_of_a_scored_token_holds_the_drafts_before_it() -> None:
    found = drafting(11, 12)
    assert [found.drafts_until(position) for position in (2, 3, 4)] == [[], [11], [11, 12]]
    assert [found.draft_after(position) for position in (2, 3, 4)] == [11, 12, None]
    assert [found.step_of(position) for position in (2, 3, 4)] == [0, 1, 2]


def test_nobody_leaves_once_enough_tokens_wait() -> None:
    for kv, cap in (("propagate", None), ("recompute", 3), ("verify", 3)):
        found = sequence(kv, max_waiting=3)  # type: ignore[arg-type]
        for number in range(5):
            assert found.may_leave == (cap is None or number < cap)
            found.leave(0, [token(20 + number)])


# --- scripted models -----------------------------------------------------------------------------


def pick(seed: int, kind: str, depth: int, prefix: list[int], choices: int) -> int:
    """An arbitrary number in 0..choices-1 that is a function of its arguments."""
    key = f"{seed}/{kind}/{depth}/{prefix}".encode()
    return blake2b(key, digest_size=1).digest()[0] % choices


def best(seed: int, depth: int, last: int, prefix: list[int]) -> int:
    """The token that a scripted exit gives; early ones are wrong now and then."""
    is_wrong = depth < last and pick(seed, "wrong", depth, prefix, 4) == 0
    return pick(seed, "early" if is_wrong else "full", depth if is_wrong else 0, prefix, 8)


def reason(found: Sequence) -> str | None:
    if found.token_ids[-1] == END_ID:
        return "eos"
    return "length" if found.num_generated >= NEW_TOKENS else None


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_segments=st.integers(1, 5),
    max_waiting=st.integers(1, 6),
    kv=st.sampled_from(["recompute", "verify"]),
    boldness=st.integers(0, 4),
)
def test_any_scripted_model(
    seed: int, num_segments: int, max_waiting: int, kv: KvPolicy, boldness: int
) -> None:
    """Every segment sees every position it needs, once a rollback; `verify` gives full depth."""
    found, last = sequence(kv, num_segments, max_waiting), num_segments - 1
    depth, num_accepted, stands = 0, 0, []
    while True:
        waiting = found.waiting(depth)
        assert waiting.run == list(range(found.filled[depth], found.front + 1))
        assert found.filled == sorted(found.filled, reverse=True), "no segment is ahead"
        assert depth == 0 or found.filled[depth - 1] == found.front + 1
        leaves = found.may_leave and pick(seed, "leave", depth, found.token_ids, 5) < boldness
        if depth < last and not leaves:
            found.mark_filled(depth)
            depth += 1
            continue
        exits = [
            TokenExit(best(seed, depth, last, found.token_ids[: at + 1]), depth, 0.0)
            for at in waiting.scored
        ]
        settled = found.leave(depth, exits)
        stands += settled.exits
        num_accepted += len(settled.accepted)
        assert found.num_waiting <= max_waiting
        found.finish_reason = found.finish_reason or reason(found)
        if found.finish_reason is None:
            depth = 0
        elif found.num_drafts:
            depth += 1
        else:
            break
    assert stands == found.exits, "each token stands exactly once, in order"
    if kv == "verify":
        expected = list(PROMPT)
        while expected[-1] != END_ID and len(expected) < len(PROMPT) + NEW_TOKENS:
            expected.append(best(seed, last, last, expected))
        assert found.token_ids == expected, "a full-depth run gives the same"
        assert found.filled == [len(expected) - 1] * num_segments, "all but the end was fed"
        early = sum(exit.exit_layer < last for exit in found.exits)
        assert early == num_accepted, "what left early was judged"
