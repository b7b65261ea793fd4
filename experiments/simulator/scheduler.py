"""Chunked-prefill scheduling, pure: which request computes how many tokens in the next step.

Decides as the V1 scheduler of vLLM 0.32 does for plain text models: first come, first served, prefix caching, asynchronous
scheduling and speculative decoding off, no watermark (vLLM's default). test_scheduler.py holds it against vLLM itself,
step by step and token by token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

from experiments.records.errors import SpecError

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
    since: int = 0  # see Scheduler
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
    """One step: who computes how many tokens, and who lost its KV blocks when the step was formed.

    `settled` decode, one token each; `rest` comes after them. What is told apart while the step is formed, so that nobody need
    go through it again: `pieces`, the part of `rest` that computes prompts (after a preemption, generated tokens too);
    `decodes`, the indices of all that decode; `context`, the tokens these read, their own new ones included; `soonest`, the
    steps until the first of them finishes.
    """

    settled: list[Sequence]
    decodes: list[int]
    context: int
    soonest: int
    rest: list[tuple[Sequence, int]] = field(default_factory=list)
    pieces: list[tuple[Sequence, int]] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def scheduled(self) -> list[tuple[Sequence, int]]:
        """(sequence, tokens) in the order of the batch."""
        return [*((sequence, 1) for sequence in self.settled), *self.rest]

    @property
    def size(self) -> int:
        """Requests in the step."""
        return len(self.settled) + len(self.rest)


class Scheduler:
    """Forms batches of at most `budget` tokens and `max_batch` requests within `num_blocks` KV blocks of `block_size` tokens.

    Only the last running sequence can be in the middle of its prompt: another is admitted only when budget is left, and then
    everything before it got all it asked for.

    All others decode, and need the same at every step. These are settled: their counts stand still and are caught up with when
    they finish, or all at once when budget or blocks do not suffice for them. Meanwhile `_tick` counts steps, and what they
    need as a whole is known: `_context`, `_ends` (a heap of the ticks at which they finish) and `_phase`: how many of them
    begin a block at a tick, by the tick modulo the block size.
    """

    def __init__(self, budget: int, max_batch: int, block_size: int, num_blocks: int) -> None:
        for what, value in {"budget": budget, "max_batch": max_batch, "block_size": block_size}.items():
            if value < 1:
                raise SpecError(f"scheduler: {what}: got {value}; allowed: at least 1")
        self.budget, self.max_batch, self.block_size = budget, max_batch, block_size
        self.free = self._total = num_blocks - 1  # vLLM keeps one block, the null block, to itself
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._tick = self._context = 0
        self._settled: list[Sequence] = []  # the first of `running`
        self._ids: list[int] = []  # their indices
        self._ends: list[tuple[int, int, Sequence]] = []
        self._phase = [0] * block_size

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises SpecError if the cache could never hold it: it would wait for ever."""
        needed = self._blocks(sequence.total - 1)  # the last token generated is never cached
        if needed > self._total:
            came = f"{sequence.prompt} + {sequence.output} tokens need {needed} KV blocks"
            raise SpecError(f"scheduler: request {sequence.index}: {came}; allowed: at most {self._total}")
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """Form the next batch and take its KV blocks; `update` must follow. Empty only when nothing is queued."""
        begun = self._phase[self._tick % self.block_size]
        if len(self._settled) > self.budget or begun > self.free:
            self.catch_up()
            begun = 0
        soonest = min(self._ends[0][0] - self._tick, LONGEST_RUN) if self._ends else LONGEST_RUN
        batch = Batch([*self._settled], [*self._ids], self._context, soonest)
        self.free -= begun
        left, running = self.budget - len(self._settled), self.running
        for sequence in running[len(self._settled) :]:
            if not left or (batch.preempted and sequence in batch.preempted):
                break
            known, computed = sequence.known, sequence.computed
            tokens = min(known - computed, left)
            needed = computed + tokens
            while needed > sequence.held and not self._allocate(sequence, needed):
                victim = running.pop()  # the one that came last gives way, perhaps the sequence itself
                self._preempt(victim)
                batch.preempted.append(victim)
                if victim is sequence:
                    return batch
            batch.rest.append((sequence, tokens))
            left -= tokens
            if needed < known or tokens > 1 or computed < sequence.prompt:
                batch.pieces.append((sequence, tokens))
            else:
                batch.decodes.append(sequence.index)
                batch.context += known
                batch.soonest = min(batch.soonest, sequence.total - known)
        while self.waiting and left and len(running) < self.max_batch and not batch.preempted:
            sequence = self.waiting[0]
            if self._blocks(sequence.known) > self.free:  # all that is known must fit, though only a piece is computed now
                break
            tokens = min(sequence.known, left)
            self._allocate(sequence, tokens)
            running.append(self.waiting.popleft())
            batch.rest.append((sequence, tokens))
            batch.pieces.append((sequence, tokens))
            left -= tokens
        return batch

    def repeats(self, batch: Batch) -> int:
        """For how many steps, this one included, the same tokens go to the same sequences if nothing arrives.

        Within them nobody finishes but at the end, and no prompt is completed. Whoever waits was refused for want of blocks,
        budget or room, and gets none of them before.
        """
        if batch.preempted or batch.size < len(self.running):
            return 1
        steps = min([batch.soonest, *((s.known - s.computed - 1) // tokens for s, tokens in batch.pieces)])
        most = batch.size + steps * self.budget // self.block_size  # a block begun by each, the rest full
        while steps > 1 and most > self.free and self._growth(batch, steps) > self.free:
            steps //= 2
        return max(1, steps)

    def update(self, batch: Batch, steps: int = 1) -> list[Sequence]:
        """Note that the batch was computed, `steps` <= repeats(batch) times. Returns the sequences that finished.

        A sequence all of whose known tokens are computed gains a token per step.
        """
        finished = []
        self.free -= self._begun(steps - 1)
        self._tick += steps
        self._context += steps * len(self._settled)
        while self._ends and self._ends[0][0] <= self._tick:
            sequence = heappop(self._ends)[2]
            self._phase[(sequence.since - sequence.computed) % self.block_size] -= 1
            self._catch_up_with(sequence)
            self._context -= sequence.known
            finished.append(sequence)
        if finished:
            self._settled = [sequence for sequence in self._settled if sequence.known < sequence.total]
            self._ids = [sequence.index for sequence in self._settled]
        for sequence, tokens in batch.rest:
            computed = sequence.computed = sequence.computed + tokens * steps
            if computed > sequence.held:
                self._allocate(sequence, computed)
            if computed >= sequence.known:
                sequence.known += steps
                if sequence.known == sequence.total:
                    finished.append(sequence)
        if finished:
            self.free += sum(sequence.held for sequence in finished) // self.block_size
            self.running = [sequence for sequence in self.running if sequence.known < sequence.total]
        self._settle()
        return finished

    def catch_up(self) -> None:
        """Bring the counts of all sequences up to date; nobody is settled then."""
        for sequence in self._settled:
            self._catch_up_with(sequence)
        self._settled, self._ids, self._ends, self._context = [], [], [], 0
        self._phase = [0] * self.block_size

    def _settle(self) -> None:
        for sequence in self.running[len(self._settled) :]:
            if sequence.computed + 1 < sequence.known or sequence.computed < sequence.prompt:
                break
            sequence.since = self._tick
            self._settled.append(sequence)
            self._ids.append(sequence.index)
            self._context += sequence.known
            self._phase[(self._tick - sequence.computed) % self.block_size] += 1
            heappush(self._ends, (self._tick + sequence.total - sequence.known, sequence.index, sequence))

    def _catch_up_with(self, sequence: Sequence) -> None:
        steps = self._tick - sequence.since
        sequence.computed += steps
        sequence.known += steps
        sequence.held = self._blocks(sequence.computed) * self.block_size

    def _begun(self, count: int) -> int:
        """Blocks that the settled begin in the `count` steps after the next."""
        if count < 1 or not self._settled:
            return 0
        rounds, more = divmod(count, self.block_size)
        start = (self._tick + 1) % self.block_size
        return rounds * len(self._settled) + sum((self._phase * 2)[start : start + more])

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _growth(self, batch: Batch, steps: int) -> int:
        later = ((s.computed + tokens * steps, s.held) for s, tokens in batch.rest)
        return self._begun(steps - 1) + sum(self._blocks(computed - held) for computed, held in later if computed > held)

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
