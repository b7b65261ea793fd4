"""Chunked-prefill scheduling: which request computes how many tokens in the next step.

The rules of the V1 scheduler of vLLM 0.32 for plain text models, in its order: first come, first served, prefix caching,
asynchronous scheduling and speculative decoding off, no watermark (vLLM's default). test_scheduler.py holds them against vLLM
itself, step by step and token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from experiments.records.record import REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS
from experiments.simulator.compiled import compiled

Rows: TypeAlias = "np.recarray[Any, Any]"  # of the types below; they change in place
# Requests in the order of arrival: a record's columns; tokens whose keys and values are `computed`; KV `blocks` held; when its
# first step `began`, its first token came and its latest, -1 before; the `gaps` so far when it entered. `queue`, not its own:
# who waits at this place of a queue.
OWN = [("computed", "i8"), ("blocks", "i8"), ("began", "f8"), ("first_token", "f8"), ("last_token", "f8")]
OWN += [("queue", "u8"), ("gaps", "i8")]
REQUEST, STEP, TOKEN = (np.dtype([*columns.items()]) for columns in (REQUEST_COLUMNS | dict(OWN), STEP_COLUMNS, TOKEN_COLUMNS))
# Who runs, in the order of arrival, and the tokens that it computes in this step. `given`, not its own: who got a token of it.
SLOT = np.dtype([("request", "u8"), ("tokens", "i8"), ("given", "u8")])
GAP = np.dtype([("seconds", "f8"), ("count", "i8")])  # between tokens of a request, and how many saw the like
# The state: requests that `entered`, of which those from `head` on wait; `coming`, the first whose arrival is not known, in a
# closed loop; `running` run, the first `scheduled` of them in this
# step; KV blocks that are `free`; steps, tokens, gaps so far; the clock, the end of the last step, what the next takes longer.
COUNTS = ("entered", "head", "coming", "running", "scheduled", "free", "block_size", "steps", "tokens", "gaps")
STATE = np.dtype([*((name, "i8") for name in COUNTS), ("clock", "f8"), ("ended", "f8"), ("cold", "f8")])


def rows(count: int, kind: np.dtype[Any], known: Rows | None = None) -> Rows:
    """Room for that many, the `known` ones first."""
    table: Rows = np.empty(count, dtype=kind).view(np.recarray)
    if known is not None:
        table[: len(known)] = known
    return table


def unserved(*asked: Sequence[float]) -> Rows:
    """Requests before any is served: when they arrive (s), the lengths of their prompts and outputs (tokens)."""
    table = np.zeros(len(asked[0]), dtype=REQUEST).view(np.recarray)
    table["arrival_s"], table["prompt_tokens"], table["output_tokens"] = asked
    table["first_step"] = table["last_step"] = table["last_token"] = -1
    table["request"] = table["queue"] = np.arange(len(table))
    return table


def begin(max_batch: int, block_size: int, num_blocks: int) -> tuple[Rows, Rows]:
    """Slots and state, one row, in which nobody has entered. One of the KV blocks, the null block, vLLM keeps to itself."""
    state = np.zeros(1, dtype=STATE).view(np.recarray)
    state["free"], state["block_size"] = num_blocks - 1, block_size
    return rows(max_batch, SLOT), state


@compiled
def schedule(requests: Rows, slots: Rows, now: Any, step: Any) -> None:
    """Form the next step, of at most step.budget tokens: take its KV blocks, fill in its counts. `update` must follow."""
    left, place, step.preempted = step.budget, 0, 0
    step.prefill_tokens = step.decode_tokens = step.prefill_requests = step.prefill_pairs = step.decode_context = 0
    while place < now.running and left > 0:  # first who runs
        request = requests[slots[place].request]
        tokens = min(request.prompt_tokens + request.generated_tokens - request.computed, left)
        while now.running > place and not allocate(request, now, tokens):
            now.running -= 1  # the one that came last gives way, perhaps the request itself: all of it is computed anew
            now.head -= 1
            victim = requests[slots[now.running].request]
            requests[now.head].queue = slots[now.running].request
            now.free += victim.blocks
            victim.blocks, victim.computed = 0, victim.cached_tokens
            step.preempted += 1
        if now.running == place:
            break
        put(request, slots[place], now, step, tokens)
        left -= tokens
        place += 1
    while step.preempted == 0 and left > 0 and now.head < now.entered and now.running < len(slots):  # then who waits
        slots[place].request = requests[now.head].queue
        request = requests[slots[place].request]
        known = request.prompt_tokens + request.generated_tokens
        if (known + now.block_size - 1) // now.block_size > now.free:  # all must fit, though only a piece is computed now
            break
        tokens = min(known - request.computed, left)
        allocate(request, now, tokens)
        put(request, slots[place], now, step, tokens)
        now.head += 1
        now.running += 1
        left -= tokens
        place += 1
    now.scheduled, step.waiting = place, now.running - place + now.entered - now.head


@compiled
def allocate(request: Any, now: Any, tokens: int) -> bool:
    """Give the request KV blocks for that many more tokens; False, and nothing taken, if there are not enough."""
    needed = request.computed + tokens
    if needed > request.blocks * now.block_size:  # a division takes longer than all else here
        more = (needed + now.block_size - 1) // now.block_size - request.blocks
        if more > now.free:
            return False
        request.blocks += more
        now.free -= more
    return True


@compiled
def put(request: Any, slot: Any, now: Any, step: Any, tokens: int) -> None:
    """The request decodes in the step, or computes a piece of its prompt; after a preemption, of generated tokens too."""
    slot.tokens = tokens
    known, computed = request.prompt_tokens + request.generated_tokens, request.computed
    if known - computed == 1 and computed >= request.prompt_tokens:
        step.decode_tokens += 1
        step.decode_context += known
        return
    step.prefill_requests += 1
    step.prefill_tokens += tokens
    step.prefill_pairs += tokens * computed + tokens * (tokens + 1) // 2
    if request.first_step < 0:
        request.first_step, request.began = now.steps, now.clock


@compiled
def update(requests: Rows, slots: Rows, now: Any, gaps: Rows) -> int:
    """The step was computed by now.clock: who has all known tokens computed is `given` one, and leaves with its last.

    How many were given one; the gaps that these make are added to `gaps`.
    """
    given, stay, gap = 0, 0, gaps[now.gaps]
    gap.seconds, gap.count = now.clock - now.ended, 0
    now.gaps += 1
    for place in range(now.running):
        request = requests[slots[place].request]
        if place < now.scheduled:
            request.computed += slots[place].tokens
            if request.computed == request.prompt_tokens + request.generated_tokens:
                slots[given].given = slots[place].request
                given += 1
                if request.generated_tokens == 0:
                    request.first_token = now.clock
                elif request.last_token == now.ended:
                    gap.count += 1
                else:
                    gaps[now.gaps].seconds, gaps[now.gaps].count = now.clock - request.last_token, 1
                    now.gaps += 1
                request.last_token = now.clock
                request.generated_tokens += 1
                if request.generated_tokens == request.output_tokens:
                    request.last_step = now.steps
                    now.free += request.blocks
                    continue
        slots[stay].request = slots[place].request
        stay += 1
    now.running, now.ended = stay, now.clock
    now.steps += 1
    return given
