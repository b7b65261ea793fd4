"""Chunked-prefill scheduling, pure: which request computes how many tokens in the next step.

Decides as the V1 scheduler of vLLM 0.32 does for plain text models: first come, first served, prefix caching, asynchronous
scheduling and speculative decoding off, no watermark (vLLM's default). tests/test_scheduler.py holds it against vLLM itself,
step by step and token by token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from experiments.spec import SpecError

LONGEST_RUN = 1024  # steps foreseen at a time; more gains nothing, and an arrival throws away what lies beyond it


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way; all counts in tokens.

    `known` are prompt and generated tokens, `computed` those whose keys and values are in the cache, `held` what its KV blocks
    have room for.
    """

    index: int
    prompt: int
    output: int
    computed: int = 0
    held: int = 0
    known: int = field(init=False)
    total: int = field(init=False)  # known when it is finished

    def __post_init__(self) -> None:
        self.known, self.total = self.prompt, self.prompt + self.output

    @property
    def generated(self) -> int:
        """Output tokens so far."""
        return self.known - self.prompt


@dataclass(slots=True)
class Batch:
    """One step: (sequence, tokens) in the order of the batch, and who lost its KV blocks when the step was formed."""

    scheduled: list[tuple[Sequence, int]]
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Forms batches of at most `budget` tokens and `max_batch` requests within `num_blocks` KV blocks of `block_size` tokens.

    Only the last running sequence can be in the middle of its prompt: another is admitted only when budget is left, and then
    everything before it got all it asked for.
    """

    def __init__(self, budget: int, max_batch: int, block_size: int, num_blocks: int) -> None:
        for what, value in (("budget", budget), ("max_batch", max_batch), ("block_size", block_size)):
            if value < 1:
                raise SpecError(f"scheduler: {what}: got {value}; allowed: at least 1")
        self.budget, self.max_batch, self.block_size = budget, max_batch, block_size
        self.free = num_blocks - 1  # vLLM keeps one block, the null block, to itself
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises SpecError if the cache could never hold it: it would wait for ever."""
        needed = self._blocks(sequence.total - 1)  # the last token generated is never cached
        total = self.free + sum(s.held for s in self.running) // self.block_size
        if needed > total:
            raise SpecError(
                f"scheduler: request {sequence.index}: {sequence.prompt} + {sequence.output} tokens need {needed} KV blocks; "
                f"allowed: at most {total}"
            )
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """Form the next batch and take its KV blocks; `update` must follow. Empty only when nothing is queued."""
        left, running, batch = self.budget, self.running, Batch([])
        for sequence in running:  # preemption shortens the list from its end, which its iterator allows
            if not left:
                break
            tokens = sequence.known - sequence.computed
            if tokens > left:
                tokens = left
            needed = sequence.computed + tokens
            while needed > sequence.held and not self._allocate(sequence, needed):
                victim = running.pop()  # the one that came last gives way, perhaps the sequence itself
                self._preempt(victim)
                batch.preempted.append(victim)
                if victim is sequence:
                    return batch
            batch.scheduled.append((sequence, tokens))
            left -= tokens
        while self.waiting and left and len(running) < self.max_batch and not batch.preempted:
            sequence = self.waiting[0]
            if self._blocks(sequence.known) > self.free:  # all that is known must fit, though only a piece is computed now
                break
            tokens = min(sequence.known, left)
            self._allocate(sequence, tokens)
            running.append(self.waiting.popleft())
            batch.scheduled.append((sequence, tokens))
            left -= tokens
        return batch

    def repeats(self, batch: Batch) -> int:
        """For how many steps, this one included, the same tokens go to the same sequences if nothing arrives.

        Within them nobody finishes but at the end, and no prompt is completed. Whoever waits was refused for want of blocks,
        budget or room, and gets none of them before.
        """
        if batch.preempted or len(batch.scheduled) < len(self.running):
            return 1
        steps = LONGEST_RUN
        for sequence, tokens in reversed(batch.scheduled):  # prompts, which mostly decide it, come last
            rest = sequence.known - sequence.computed
            own = sequence.total - sequence.known if rest == 1 and sequence.known > sequence.prompt else (rest - 1) // tokens
            if own <= 1:
                return 1
            if own < steps:
                steps = own
        while steps > 1 and self._growth(batch, steps) > self.free:
            steps //= 2
        return steps

    def update(self, batch: Batch, steps: int = 1) -> list[Sequence]:
        """Note that the batch was computed, `steps` <= repeats(batch) times. Returns the sequences that finished, in order.

        A sequence all of whose known tokens are computed gains a token per step.
        """
        finished = []
        for sequence, tokens in batch.scheduled:
            computed = sequence.computed = sequence.computed + tokens * steps
            if computed > sequence.held:
                self._allocate(sequence, computed)
            if computed >= sequence.known:
                known = sequence.known = sequence.known + steps
                if known == sequence.total:
                    finished.append(sequence)
                    self.free += sequence.held // self.block_size
        if finished:
            self.running = [sequence for sequence in self.running if sequence.known < sequence.total]
        return finished

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _growth(self, batch: Batch, steps: int) -> int:
        later = ((s.computed + tokens * steps, s.held) for s, tokens in batch.scheduled)
        return sum(self._blocks(computed - held) for computed, held in later if computed > held)

    def _allocate(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence blocks for its first `tokens` tokens; False, and nothing taken, if there are not enough."""
        more = self._blocks(tokens - sequence.held)
        if more > self.free:
            return False
        sequence.held += more * self.block_size
        self.free -= more
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue without its cache: prompt and generated tokens are computed anew."""
        self.free += sequence.held // self.block_size
        sequence.held = sequence.computed = 0
        self.waiting.appendleft(sequence)
