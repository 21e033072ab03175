"""A slow and obvious SentenceKV cache as its authors describe it: one sequence, one layer, one token at a time, float64.

Every query head is on its own: it has its own keys (those of its key/value head, repeated beforehand), keeps its own
tokens and chooses its own sentences. Keys are post-rotary and keep their positions. Nothing is shared with the library.

A head's *slots* are its kept prompt tokens in the order of the text, then every generated token. What follows from that,
and what was decided where the paper is silent:

- "Start" is the first slots, which are the first tokens of the text only if those were kept. Here slot `start` can be
  retrieved; in the released code it is neither start nor retrievable.
- The sentence being written starts with the first generated token: the unfinished piece at the end of the prompt is a
  sentence of its own. The tokens of the open sentence are in no bucket: more than `recent` slots back they are invisible
  until a boundary closes it.
- A boundary closes its sentence before the retrieval of the same step, which therefore finds no queries, and attends to
  everything retained, as does the step after it.
- A sentence holds any number of tokens. The released code's cap of `max(100, 2 * average + 50)` is not reproduced.
- Equal importance, which max pooling makes common, goes to the earlier token; equal scores to the earlier sentence.
- Importance scales logits by `1 / sqrt(d)`. A retention that leaves no room beside the window is an error, whatever the
  length of the prompt. Half precision is not imitated.
"""

import math

import torch
from torch import Tensor


def importance(query_window: Tensor, keys: Tensor, scaling: float, kernel: int = 7) -> Tensor:
    """How much the last `w` queries `(H, w, d)` look at each of the keys `(H, n, d)` before them: `(H, n - w)`."""
    heads, window, _ = query_window.shape
    earlier = keys.shape[1] - window
    result = torch.zeros(heads, earlier, dtype=torch.float64)
    for head in range(heads):
        total = torch.zeros(earlier, dtype=torch.float64)
        for row in range(window):
            visible = keys[head, : earlier + row + 1].double()
            logits = visible @ query_window[head, row].double() * scaling
            total += torch.softmax(logits, dim=0)[:earlier]
        for place in range(earlier):
            around = range(max(place - kernel // 2, 0), min(place + kernel // 2 + 1, earlier))
            result[head, place] = max(float(total[other]) for other in around)
    return result


def retain(
    query: Tensor, key: Tensor, token_budget: int, factor: float, window: int = 32, kernel: int = 7
) -> list[list[int]]:
    """Positions of the prompt tokens `(H, n, d)` that each head keeps, increasing."""
    heads, length, dim = key.shape
    chosen = math.floor(factor * token_budget) - window
    if chosen <= 0:
        raise ValueError(f"{factor} * {token_budget} tokens leave no room beside a window of {window}")
    earlier = length - window
    if earlier <= chosen:
        return [list(range(length)) for _ in range(heads)]
    kept = []
    for scores in importance(query[:, earlier:], key, 1 / math.sqrt(dim), kernel).tolist():
        best = sorted(range(earlier), key=lambda place: (-scores[place], place))[:chosen]
        kept.append(sorted(best) + list(range(earlier, length)))
    return kept


def sentences(boundaries: list[bool]) -> list[tuple[int, int]]:
    """Half-open spans. A mark belongs to the sentence it closes; an unfinished piece at the end is a sentence too."""
    spans = []
    start = 0
    for place, is_boundary in enumerate(boundaries):
        if is_boundary:
            spans.append((start, place + 1))
            start = place + 1
    if start < len(boundaries):
        spans.append((start, len(boundaries)))
    return spans


def buckets(kept: list[int], spans: list[tuple[int, int]]) -> list[list[int]]:
    """The slots of one head's kept tokens, sentence by sentence."""
    return [[slot for slot, place in enumerate(kept) if start <= place < end] for start, end in spans]


def sentence_means(keys: Tensor, kept: list[list[int]], spans: list[tuple[int, int]]) -> Tensor:
    """Means `(H, S, d)` of the keys `(H, n, d)` that were kept; zero for a sentence of which nothing was."""
    heads, _, dim = keys.shape
    means = torch.zeros(heads, len(spans), dim, dtype=torch.float64)
    for head in range(heads):
        for index, (start, end) in enumerate(spans):
            places = [place for place in kept[head] if start <= place < end]
            for place in places:
                means[head, index] += keys[head, place].double() / len(places)
    return means


def sentence_scores(queries: list[Tensor], means: list[Tensor]) -> list[float]:
    """Plain products of the mean of one head's queries with each sentence's mean key."""
    mean_query = sum(query.double() for query in queries) / len(queries)
    return [float(mean_query @ mean.double()) for mean in means]


def attention(query: Tensor, keys: list[Tensor], values: list[Tensor], scaling: float) -> Tensor:
    weights = torch.softmax(torch.stack([query @ key for key in keys]) * scaling, dim=0)
    return sum(weight * value for weight, value in zip(weights, values))


class PaperSentenceKV:
    """All heads of one layer.

    Args:
        token_budget: slots a head attends to in a step with retrieval, at most.
        factor: a head keeps `floor(factor * token_budget)` tokens of the prompt, at most.
        window: queries at the end of the prompt that judge the tokens before them; their own tokens are always kept.
        start, recent: slots at both ends that are always attended to. The new token is one of the recent ones.
        length_threshold: no retrieval while the open sentence has this many queries or fewer.
        kernel: of the max pooling, odd.
    """

    def __init__(self, token_budget, factor, window, start=32, recent=32, length_threshold=1, kernel=7):
        if token_budget <= start + recent:
            raise ValueError(f"a budget of {token_budget} leaves nothing to retrieve beside {start} + {recent}")
        self.token_budget, self.factor, self.window = token_budget, factor, window
        self.start, self.recent = start, recent
        self.length_threshold, self.kernel = length_threshold, kernel
        self.length = 0  # of the text so far
        self.spans: list[tuple[int, int]] = []  # of the prompt's sentences
        self.open: list[Tensor] = []  # queries `(H, d)` of the sentence being written
        # Per head: what is in each slot,
        self.positions: list[list[int]] = []
        self.keys: list[list[Tensor]] = []
        self.values: list[list[Tensor]] = []
        # and the slots and the mean key of each closed sentence.
        self.buckets: list[list[list[int]]] = []
        self.means: list[list[Tensor]] = []

    def prefill(self, query: Tensor, key: Tensor, value: Tensor, boundaries: list[bool]) -> None:
        """Takes the prompt `(H, n, d)` in. Its attention is ordinary causal attention and not computed here."""
        heads, self.length, _ = key.shape
        self.spans = sentences(boundaries)
        kept = retain(query, key, self.token_budget, self.factor, self.window, self.kernel)
        means = sentence_means(key, kept, self.spans)
        for head in range(heads):
            self.positions.append(list(kept[head]))
            self.keys.append([key[head, place].double() for place in kept[head]])
            self.values.append([value[head, place].double() for place in kept[head]])
            self.buckets.append(buckets(kept[head], self.spans))
            self.means.append(list(means[head]))

    def step(
        self, query: Tensor, key: Tensor, value: Tensor, is_boundary: bool, scaling: float
    ) -> tuple[Tensor, list[list[int]]]:
        """One generated token `(H, d)`: its outputs `(H, d)`, and the positions each head attended to, increasing."""
        self.open.append(query)
        for head, positions in enumerate(self.positions):
            positions.append(self.length)
            self.keys[head].append(key[head].double())
            self.values[head].append(value[head].double())
        self.length += 1
        if is_boundary:
            self._close_sentence()
        outputs, attended = [], []
        for head, positions in enumerate(self.positions):
            slots = self._visible_slots(head)
            keys = [self.keys[head][slot] for slot in slots]
            values = [self.values[head][slot] for slot in slots]
            outputs.append(attention(query[head].double(), keys, values, scaling))
            attended.append([positions[slot] for slot in slots])
        return torch.stack(outputs), attended

    def _close_sentence(self) -> None:
        for head, keys in enumerate(self.keys):
            slots = list(range(len(keys) - len(self.open), len(keys)))
            self.buckets[head].append(slots)
            self.means[head].append(sum(keys[slot] for slot in slots) / len(slots))
        self.open = []

    def _visible_slots(self, head: int) -> list[int]:
        count = len(self.positions[head])
        if len(self.open) <= self.length_threshold:
            return list(range(count))
        visible: set[int] = set()
        for slot in range(count):
            if slot < self.start or slot >= count - self.recent:
                visible.add(slot)
        return sorted(visible.union(self._retrieved_slots(head)))

    def _retrieved_slots(self, head: int) -> list[int]:
        middle = range(self.start, len(self.positions[head]) - self.recent)
        budget = self.token_budget - self.start - self.recent
        scores = sentence_scores([query[head] for query in self.open], self.means[head])
        retrieved: list[int] = []
        for sentence in sorted(range(len(scores)), key=lambda index: (-scores[index], index)):
            for slot in self.buckets[head][sentence]:
                if slot in middle and len(retrieved) < budget:
                    retrieved.append(slot)
        return retrieved
