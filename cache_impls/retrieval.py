"""The mathematics of the retrieval caches: an index of the stored tokens, and which of them a query asks for.

`TokenIndex` is ours: one byte per coordinate of each key in the basis that keeps the scores of the prompt's own queries
best. For queries of second moment `C = L L.T`, the error of a score is `|L.T (k - k')|` on average, so the basis is that of
the principal components of `L.T k`, and a query meets it as `inv(L) q`. On SmolLM2 it finds more attention mass with an
eighth of the keys' bytes than the principal components of the keys themselves do with a quarter. `SentenceIndex` is that
of SentenceKV (https://huggingface.co/papers/2504.00970, section 3): the mean key of every sentence. `PageIndex` is that of
Quest (https://huggingface.co/papers/2406.10774): the bounds of every page of keys.

Shapes: B batch, H query heads, K key/value heads, G = H / K, Q new tokens, N stored tokens, M chosen ones, S sentences, P
pages, D head dim, R rank.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_ext.cache_impls import subspace
from hf_ext.cache_impls.attention import score_rows
from hf_ext.cache_impls.base import RowBuffer
from hf_ext.cache_impls.rows import take


# Queries of the prompt that the index is fitted to: the last ones, and as many spread over the whole.
FITTED_QUERIES = 256
# Added to the diagonal of the queries' second moment, as a share of its mean: directions they never took count a little.
RIDGE = 1e-3
CODE_LIMIT = 127
PAGE = 16  # tokens
# Beyond `SCANNED_TOKENS` the tokens of the `CANDIDATES` most promising pages are scored, not all; both grow with the budget.
SCANNED_TOKENS, SCANNED_BUDGETS = 8192, 8
CANDIDATES, CANDIDATE_BUDGETS = 8192, 8
# A page promises its mean score and this part of the way to the bound that its leading coordinates set.
PAGE_REACH = 0.7
# Newest stored tokens that are candidates always, whatever their page promises.
NEWEST_CANDIDATES = 256


def query_moment(queries: Tensor, kv_heads: int, valid: Tensor | None = None) -> Tensor:
    """Second moment of the queries that share a key/value head.

    Args:
        queries (`Tensor`): `(B, H, N, D)`.
        valid (`Tensor`, *optional*): boolean `(B, N)`.

    Returns:
        `Tensor`: `(B, K, D, D)`, float32.
    """
    length = queries.shape[2]
    if length > 2 * FITTED_QUERIES:
        spread = torch.linspace(0, length - FITTED_QUERIES - 1, FITTED_QUERIES, device=queries.device).long()
        chosen = torch.cat([spread, torch.arange(length - FITTED_QUERIES, length, device=queries.device)])
        queries, valid = queries[:, :, chosen], None if valid is None else valid[:, chosen]
    batch, heads, length, dim = queries.shape
    rows = queries.reshape(batch, kv_heads, -1, dim)
    return subspace.covariance(rows, None if valid is None else valid.repeat(1, heads // kv_heads))


class Codes:
    """Centred vectors as one signed byte per coordinate of a basis: `x = mean + codes @ expand.T`, about.

    Args:
        tokens (`Tensor`): `(B, K, N, D)`, the first ones; basis, mean and scales come from them.
        rank (`int`): coordinates kept (R).
        valid (`Tensor`, *optional*): boolean `(B, N)`; tokens marked `False` do not count, their codes are zero.
        moment (`Tensor`, *optional*): `(B, K, D, D)`, second moment of what the vectors will be multiplied with; by default
            all directions count alike.
    """

    def __init__(self, tokens: Tensor, rank: int, valid: Tensor | None = None, moment: Tensor | None = None):
        dim = tokens.shape[-1]
        self.rank = min(rank, dim)
        rows = tokens.float()
        if valid is None:
            self.mean = rows.mean(2, keepdim=True)
        else:
            weight = valid[:, None, :, None].float()
            self.mean = (rows * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1)
        spread = subspace.covariance(rows - self.mean, valid)
        eye = torch.eye(dim, device=rows.device)
        if moment is None:
            root = eye.expand_as(spread)
        else:
            size = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-12)
            root = torch.linalg.cholesky(moment / size + RIDGE * eye)
        basis, _ = subspace.top_basis(root.mT @ spread @ root, self.rank)
        self.reduce = root @ basis
        codes = (rows - self.mean) @ self.reduce
        if valid is not None:
            codes = codes * valid[:, None, :, None]
        scale = codes.abs().amax(2, keepdim=True).clamp_min(1e-6) / CODE_LIMIT
        self.reduce = self.reduce / scale
        self.expand = torch.linalg.solve_triangular(root.mT, basis, upper=True) * scale
        self.rows = RowBuffer(self._encode(rows, valid))

    def _encode(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        codes = (tokens.float() - self.mean) @ self.reduce
        codes = codes.round_().clamp_(-CODE_LIMIT, CODE_LIMIT).to(torch.int8)
        return codes if valid is None else codes * valid[:, None, :, None]

    def append(self, tokens: Tensor, valid: Tensor | None = None) -> None:
        self.rows.append(self._encode(tokens, valid))

    def decode(self) -> Tensor:
        """All vectors as stored, `(B, K, N, D)`, float32."""
        return self.mean + self.rows.rows.float() @ self.expand.mT

    def decoded(self, tokens: Tensor) -> Tensor:
        """What would come back of `tokens` `(B, K, N, D)`."""
        return self.mean + self._encode(tokens).float() @ self.expand.mT

    def query(self, rows: Tensor) -> Tensor:
        """`rows` `(B, K, Q, D)` as they meet the codes, `(B, K, Q, R)`, float32."""
        return rows.float() @ self.expand

    def bases(self) -> list[Tensor]:
        return [self.mean, self.reduce, self.expand]

    def tensors(self) -> list[Tensor]:
        return [self.rows.data, *self.bases()]

    def reorder(self, index: Tensor) -> None:
        self.mean, self.reduce, self.expand = self.mean[index], self.reduce[index], self.expand[index]
        self.rows.reorder(index)


def mean_codes(rows: Tensor) -> Tensor:
    """Mean of each page of codes `(B, K, N, R)`, `(B, K, P, R)`, int8."""
    return rows.unflatten(2, (-1, PAGE)).float().mean(3).round_().to(torch.int8)


def read_pages(rows: Tensor, pages: Tensor) -> Tensor:
    """The rows of some pages of `rows` `(B, K, C, R)`, `C` a multiple of `PAGE`; `(B, K, P * PAGE, R)` for `pages`
    `(B, K, P)`. Pages are read as wide rows, which is many times faster than their tokens one by one."""
    wide = take(rows.unflatten(2, (-1, PAGE)).flatten(3), pages)
    return wide.unflatten(3, (PAGE, rows.shape[3])).flatten(2, 3)


def places_in(pages: Tensor) -> Tensor:
    """Places of the tokens of `pages` `(B, K, P)`, `(B, K, P * PAGE)`."""
    return (pages[..., None] * PAGE + torch.arange(PAGE, device=pages.device)).flatten(2)


class TokenIndex:
    """Scores every stored token by its codes; very many in two steps, pages first.

    Args:
        keys (`Tensor`): `(B, K, N, D)`.
        rank (`int`): coordinates a token.
        budget (`int`, *optional*): tokens a query may choose; how many candidates are looked at grows with it. `None`
            scores all tokens always.
        hidden (`Tensor`, *optional*): boolean `(B, K, N)`, padding.
        moment (`Tensor`, *optional*): of the queries, from `query_moment`.
    """

    def __init__(
        self, keys: Tensor, rank: int, budget: int | None, hidden: Tensor | None = None, moment: Tensor | None = None
    ):
        # Codes of padding are zero, those of an average key: it must not mark a page.
        self.codes = Codes(keys, rank, None if hidden is None else ~hidden[:, 0], moment)
        self.scanned = sys.maxsize if budget is None else max(SCANNED_TOKENS, SCANNED_BUDGETS * budget)
        self.candidates = 0 if budget is None else max(CANDIDATES, CANDIDATE_BUDGETS * budget)
        # Of each full page, int8: its mean codes, (B, K, P, R), and how far above and below them the leading quarter of
        # the coordinates go, (B, K, P, R / 4) each. Bounds of all coordinates find no more.
        self.pages: list[RowBuffer] = []
        self.leading = -(-self.codes.rank // 4)
        self._add_pages()

    @property
    def length(self) -> int:
        return self.codes.rows.length

    @property
    def in_pages(self) -> bool:
        """Whether there are so many tokens that only those of some pages are scored."""
        return self.length > self.scanned

    def append(self, keys: Tensor, hidden: Tensor | None = None) -> None:
        self.codes.append(keys, None if hidden is None else ~hidden[:, 0])
        self._add_pages()

    def _add_pages(self) -> None:
        """Statistics of the pages that are full and have none yet."""
        known = self.pages[0].length if self.pages else 0
        if not self.in_pages or self.length // PAGE == known:
            return
        fresh = self.codes.rows.rows[:, :, known * PAGE : self.length // PAGE * PAGE]
        means, codes = mean_codes(fresh), fresh[..., : self.leading].unflatten(2, (-1, PAGE)).int()
        middle = means[..., : self.leading].int()
        reach = torch.cat([codes.amax(3) - middle, middle - codes.amin(3)], dim=-1)
        rows = [means, reach.clamp_max(CODE_LIMIT).to(torch.int8)]
        if not self.pages:
            self.pages = [RowBuffer(statistic) for statistic in rows]
            return
        for buffer, statistic in zip(self.pages, rows):
            buffer.append(statistic)

    def score(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores of the tokens for each query, less a constant per query.

        Args:
            rows (`Tensor`): `(B, K, Q, D)`, scaled as for attention.

        Returns:
            `tuple`: scores `(B, K, Q, N)`, and `None`; or scores `(B, K, Q, M)` of some and their places `(B, K, M)`.
        """
        query = self.codes.query(rows)
        if not self.in_pages:
            return product(query, self.codes.rows.data)[..., : self.length], None
        chosen, _ = self.promising_pages(query)
        candidates, places = read_pages(self.codes.rows.data, chosen), places_in(chosen)
        paged = self.pages[0].length * PAGE
        if paged < self.length:
            candidates = torch.cat([candidates, self.codes.rows.rows[:, :, paged:]], dim=2)
            rest = torch.arange(paged, self.length, device=query.device).expand(*places.shape[:2], -1)
            places = torch.cat([places, rest], dim=-1)
        return product(query, candidates), places

    def promising_pages(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The pages where the tokens with the best scores are expected, and the newest.

        Args:
            query (`Tensor`): `(B, K, Q, R)`, that of the codes.

        Returns:
            `tuple`: places of the pages, `(B, K, P)`, ascending, and scores of the means of all, `(B, K, Q, capacity)`.
        """
        mean, reach = self.pages
        means, leading = product(query, mean.data), query[..., : self.leading]
        outward = PAGE_REACH * torch.cat([leading.clamp_min(0), -leading.clamp_max(0)], dim=-1)
        weight = best_of_heads((means + product(outward, reach.data))[..., : mean.length])
        weight[..., -(NEWEST_CANDIDATES // PAGE) :] = torch.inf
        count = min(self.candidates // PAGE, weight.shape[-1])
        return weight.topk(count, dim=-1, sorted=False).indices.sort(-1).values, means

    def tensors(self) -> list[Tensor]:
        return [*self.codes.tensors(), *(buffer.data for buffer in self.pages)]

    def reorder(self, index: Tensor) -> None:
        self.codes.reorder(index)
        for buffer in self.pages:
            buffer.reorder(index)


class PageIndex:
    """Quest's: an upper bound of the scores in every page, from the smallest and largest entries of its keys.

    Args:
        keys (`Tensor`): `(B, K, N, D)`.
        hidden (`Tensor`, *optional*): boolean `(B, K, N)`, padding.
    """

    def __init__(self, keys: Tensor, hidden: Tensor | None = None):
        self.length = 0
        self.bounds = RowBuffer(self._bounds(keys[:, :, :0]))
        self.rest = keys[:, :, :0]
        self.append(keys, hidden)

    @staticmethod
    def _bounds(keys: Tensor) -> Tensor:
        pages = keys.unflatten(2, (-1, PAGE)) if keys.shape[2] else keys[:, :, :, None]
        if keys.shape[2] == 0:
            return torch.cat([keys, keys], dim=-1)
        return torch.cat([pages.amax(3), pages.amin(3)], dim=-1)

    def append(self, keys: Tensor, hidden: Tensor | None = None) -> None:
        self.length += keys.shape[2]
        if hidden is not None:
            # Padding stands in front: the first real key in its place leaves the bounds of a page to the real ones.
            hidden = hidden.expand(keys.shape[:3])
            first = (~hidden).long().argmax(-1)[..., None]
            places = torch.arange(keys.shape[2], device=keys.device).expand_as(hidden)
            keys = take(keys, torch.where(hidden, torch.maximum(first, places), places))
        keys = torch.cat([self.rest, keys], dim=2)
        full = keys.shape[2] // PAGE * PAGE
        if full:
            self.bounds.append(self._bounds(keys[:, :, :full]))
        self.rest = keys[:, :, full:].clone()

    def score(self, rows: Tensor) -> tuple[Tensor, None]:
        """See `TokenIndex.score`; all tokens of a page have its bound."""
        query = torch.cat([rows.clamp_min(0), rows.clamp_max(0)], dim=-1).float()
        scores = product(query, self.bounds.data)[..., : self.bounds.length].repeat_interleave(PAGE, dim=-1)
        if self.rest.shape[2]:
            bound = torch.maximum(self.rest.amax(2, keepdim=True) * rows, self.rest.amin(2, keepdim=True) * rows)
            scores = torch.cat(
                [scores, bound.float().sum(-1, keepdim=True).expand(-1, -1, -1, self.rest.shape[2])], -1
            )
        return scores, None

    def tensors(self) -> list[Tensor]:
        return [self.bounds.data, self.rest]

    def reorder(self, index: Tensor) -> None:
        self.bounds.reorder(index)
        self.rest = self.rest[index]


class SentenceIndex:
    """SentenceKV's: the mean key of every sentence; tokens follow their sentence's rank, in the order of the text.

    Args:
        keys (`Tensor`): `(B, K, N, D)`.
        sentences (`Tensor`): `(B, K, N)`, int64, which sentence each belongs to, counted from 0.
        hidden (`Tensor`, *optional*): boolean `(B, K, N)`, padding.
    """

    def __init__(self, keys: Tensor, sentences: Tensor, hidden: Tensor | None = None):
        self.sums = keys.new_zeros(*keys.shape[:2], 0, keys.shape[3], dtype=torch.float32)
        self.counts = self.sums[..., 0]
        self.sentences = sentences[..., :0].to(torch.int32)
        self.append(keys, sentences, hidden)

    @property
    def length(self) -> int:
        return self.sentences.shape[2]

    def append(self, keys: Tensor, sentences: Tensor, hidden: Tensor | None = None) -> None:
        more = int(sentences.max()) + 1 - self.sums.shape[2] if sentences.numel() else 0
        if more > 0:
            self.sums, self.counts = pad(self.sums, (0, 0, 0, more)), pad(self.counts, (0, more))
        real = torch.ones_like(sentences, dtype=torch.float32) if hidden is None else (~hidden).float()
        self.sums.scatter_add_(2, sentences[..., None].expand_as(keys), keys.float() * real[..., None])
        self.counts.scatter_add_(2, sentences, real)
        self.sentences = torch.cat([self.sentences, sentences.to(torch.int32)], dim=2)

    def means(self) -> Tensor:
        """`(B, K, S, D)`, float32; zero where a sentence has no token."""
        return self.sums / self.counts.clamp_min(1)[..., None]

    def score(self, rows: Tensor) -> tuple[Tensor, None]:
        """Scores `(B, K, 1, N)`, float64, that order the tokens: `rows` `(B, K, Q, D)` count by their mean."""
        scores = (rows.float().mean(2, keepdim=True) @ self.means().mT)[:, :, 0]
        scores = scores.masked_fill(self.counts == 0, -torch.inf)
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        order = rank.gather(2, self.sentences.long()) * self.length
        order = order + torch.arange(self.length, device=rows.device)
        return -order.double()[:, :, None], None

    def tensors(self) -> list[Tensor]:
        return [self.sums, self.counts, self.sentences]

    def reorder(self, index: Tensor) -> None:
        self.sums, self.counts, self.sentences = self.sums[index], self.counts[index], self.sentences[index]


def product(query: Tensor, keys: Tensor) -> Tensor:
    """`query @ keys.mT`, `(B, K, Q, N)` from `(B, K, Q, R)` and `(B, K, N, R)` of any type; see `score_rows`."""
    batch, heads, length, _ = query.shape
    scores = query.new_empty(batch * heads, length, keys.shape[2])
    score_rows(query.flatten(0, 1), keys.flatten(0, 1), scores)
    return scores.view(batch, heads, length, -1)


def best_of_heads(scores: Tensor) -> Tensor:
    """What any query of a key/value head asks for most: each query's scores less its best, the largest over the queries.

    Args:
        scores (`Tensor`): `(B, K, G * Q, N)`.

    Returns:
        `Tensor`: `(B, K, N)`, at most 0.
    """
    return (scores - scores.amax(-1, keepdim=True)).amax(2)


def spread_forward(weights: Tensor, steps: int) -> Tensor:
    """Each token's weight, or that of one of the `steps - 1` before it if larger: text that was found goes on.

    `weights` is `(B, K, N)`, in the order of the text.
    """
    result = weights
    for step in range(1, steps):
        result = result.clone() if step == 1 else result
        torch.maximum(result[..., step:], weights[..., :-step], out=result[..., step:])
    return result
