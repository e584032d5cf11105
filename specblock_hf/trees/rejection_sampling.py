# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Rules that keep drawn tokens, and the target's distribution, by comparing it with the distributions that they were
drawn from. Knows no model.

One lemma covers every rule here. Let V(v, a) verify the subtree below the node v with the weight a in [0, 1]: over
the draws below v and the coins it accepts with probability exactly a, and if it does, what follows v has the target's
distribution. Write w = a p(.|v) for the mass that v owes to its tokens, |w| = a. V tries v's children in the order in
which they were drawn; let Q be the distribution of the next child x, given everything tried so far.

1. Try x by V(v x, min(1, w(x) / Q(x))). That accepts a share min(w(x), Q(x)) of all cases.
2. If it is rejected, which has probability 1 - sum_x min(w(x), Q(x)) = 1 - a + sum_x (w(x) - Q(x))+, the mass still
   owed is (w - Q)+. Divided by that probability it is the new w, whichever x was rejected: nothing but Q, the
   distribution that x came from, enters.
3. With no child left, accept v with probability |w| and emit a token of the distribution w / |w|; otherwise reject.

By induction V(v, a) accepts a in all and pays exactly w; the root, called with a = 1, never rejects. A token that is
not drawn but follows from the text before has Q(x) = 1.

`"block"` is V as it stands: leaves are decided first, and a path is taken as a whole if it is likely enough as a whole
(Block Verification, https://huggingface.co/papers/2403.10444, for one path; Traversal Verification,
https://huggingface.co/papers/2505.12398, for a tree). `"token"` decides a child at once, by a coin of
min(1, w(x) / Q(x)) with a = 1, and then goes on below it as from a root (recursive rejection sampling,
https://huggingface.co/papers/2402.14160 for siblings without replacement).

Not here: greedy block verification, which accepts longer prefixes at the price of a *changed* target distribution for
the following tokens. What it owes would have to live on between rounds, in the tokens that the next round drafts, and
every processor and stopping rule in between would see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from .distributions import DraftDistributions
from .tree import DraftTree, children_of
from .verification import Select, Stop, Walk


class TargetDistributions(Protocol):
    """
    The target's next-token distributions at the nodes of a tree, which may be asked for nodes that are then rejected.
    """

    def distribution(self, row: int, node: int, path: list[int]) -> torch.Tensor:
        """
        Args:
            row (`int`): Row of the batch.
            node (`int`): Node of the row.
            path (`list[int]`): The drafted tokens from below the root down to the node.

        Returns:
            `torch.Tensor` of shape `[V]` in float64: Probabilities of the next token, after every processor.
        """

    def keep(self, row: int, node: int) -> None:
        """The token after this node is emitted next; called once per emitted token, in order."""


class GlobalCoins:
    """
    Where a rule's randomness comes from: the global random generators, as [`~transformers.set_seed`] seeds them.
    """

    def accept(self, probability: float) -> bool:
        """True with this probability, surely for 1."""
        return float(torch.rand((), dtype=torch.float64, device="cpu")) < probability

    def draw(self, mass: torch.Tensor) -> int:
        """An index, in proportion to the mass `[V]`."""
        return int(torch.multinomial(mass, num_samples=1))


class SampledVerifier:
    """
    A [`Verifier`] for sampled trees. The emitted tokens follow the target's own distribution, over the draws of the
    tree and the coins together; a seed gives other tokens than it gives plain sampling. Trees that follow from the
    text before are verified as well as by [`sample_and_walk`], and no better.

    Args:
        target ([`TargetDistributions`]): Of the request.
        rule (`str`): `"token"` or `"block"`, which never keeps fewer tokens of the same tree on average.
        coins ([`GlobalCoins`], *optional*): The rule's randomness; the global generators by default.
    """

    def __init__(self, target: TargetDistributions, rule: Literal["token", "block"], coins: GlobalCoins | None = None):
        self._target = target
        self._rule = rule
        self._coins = coins or GlobalCoins()

    def __call__(self, tree: DraftTree, active: Sequence[bool], select: Select, stop: Stop) -> Walk:
        tokens, parents = torch.stack((tree.tokens, tree.parents)).tolist()
        rows: list[tuple[list[int], list[int], bool]] = []
        for row, is_active in enumerate(active):
            if not is_active:
                rows.append(([], [], False))
            elif max(parents[row]) < 0:
                # Without a draft there is nothing to compare: this is plain decoding.
                token = select(row, 0)
                rows.append(([0], [token], stop(row, token)))
            else:
                verification = _RowVerification(
                    self._target, self._coins, tree.distributions, row, tokens[row], parents[row]
                )
                rows.append(self._emit(row, *verification.run(self._rule), tokens[row], stop))
        return Walk.of_rows(rows)

    def _emit(
        self, row: int, nodes: list[int], last: int, tokens: list[int], stop: Stop
    ) -> tuple[list[int], list[int], bool]:
        """Emit the tokens of a path and the one after it, until one of them ends the row."""
        emitted: list[int] = []
        for node, token in zip(nodes, [*(tokens[node] for node in nodes[1:]), last], strict=True):
            self._target.keep(row, node)
            emitted.append(token)
            if stop(row, token):
                return nodes[: len(emitted)], emitted, True
        return nodes, emitted, False


class _Owed:
    """
    The mass w that a node still owes to the tokens after it.

    Attributes:
        mass (`torch.Tensor` of shape `[V]`): w.
        weight (`float`): |w|; exactly 1 at a root.
    """

    def __init__(self, distribution: torch.Tensor, weight: float):
        self.mass = distribution * weight
        self.weight = weight

    def settle(self, left: torch.Tensor) -> None:
        """After a rejection: `left` `[V]` is what has not been paid, over all cases together."""
        total = float(left.sum())
        if total > 0:
            rejected = 1 - self.weight + total
            self.mass, self.weight = left / rejected, total / rejected
        elif self.weight < 1:
            self.mass, self.weight = left, 0.0
        # Otherwise all mass lies in the tree and only rounding can have rejected: the mass stays as it is.


@dataclass(eq=False)
class _RowVerification:
    """One row's tree under verification."""

    target: TargetDistributions
    coins: GlobalCoins
    distributions: DraftDistributions | None
    row: int
    tokens: list[int]
    parents: list[int]

    def __post_init__(self) -> None:
        self._distribution_of = (
            [-1] * len(self.tokens) if self.distributions is None else self.distributions.rows[self.row].tolist()
        )
        self._children = dict(children_of(self.parents))

    def run(self, rule: Literal["token", "block"]) -> tuple[list[int], int]:
        """The nodes from the root to the last accepted one, and the token after that."""
        node, owed = self._root_to_leaf(0) if rule == "token" else self._leaf_to_root(0, 1.0)
        return self._path(node), self.coins.draw(owed.mass)

    def _root_to_leaf(self, node: int) -> tuple[int, _Owed]:
        owed = self._owed(node, 1.0)
        for child, acceptance in self._attempts(node, owed):
            if self.coins.accept(acceptance):
                return self._root_to_leaf(child)
        return node, owed

    def _leaf_to_root(self, node: int, weight: float) -> tuple[int, _Owed] | None:
        """V of the lemma: the last accepted node and what it owes, or a rejection."""
        if node not in self._children:
            # The distribution of a leaf is needed only if it is accepted.
            return (node, self._owed(node, weight)) if self.coins.accept(weight) else None
        owed = self._owed(node, weight)
        for child, acceptance in self._attempts(node, owed):
            found = self._leaf_to_root(child, acceptance) if acceptance > 0 else None
            if found is not None:
                return found
        return (node, owed) if self.coins.accept(owed.weight) else None

    def _attempts(self, node: int, owed: _Owed) -> Iterator[tuple[int, float]]:
        """
        The children of a node with the weight to try each with. Asking for the next one, or for the end, says that the
        last one was rejected, which changes what is owed.
        """
        children = self._children.get(node, [])
        drawn = [child for child in children if self._distribution_of[child] >= 0]
        q = self._draft_distribution(drawn[0], len(owed.mass)) if drawn else None
        # What follows from the text before may be tried in any order: it goes first.
        for child in (child for child in children if q is None or child not in drawn):
            token = self.tokens[child]
            acceptance = min(1.0, float(owed.mass[token]))
            yield child, acceptance
            left = owed.mass.clone()
            left[token] = (left[token] - 1).clamp_min(0)
            owed.settle(left)
        if q is not None:
            yield from self._without_replacement(drawn, q.to(owed.mass.device), owed)

    def _without_replacement(self, drawn: list[int], q: torch.Tensor, owed: _Owed) -> Iterator[tuple[int, float]]:
        for child in drawn:
            token = self.tokens[child]
            weight = float(owed.mass[token] / q[token])
            if not math.isfinite(weight):
                return  # no draw of this distribution, of which nothing is left
            yield child, min(1.0, weight)
            owed.settle((owed.mass - q).clamp_min(0))
            q[token] = 0
            q = q / q.sum()

    def _owed(self, node: int, weight: float) -> _Owed:
        path = [self.tokens[inner] for inner in self._path(node)[1:]]
        return _Owed(self.target.distribution(self.row, node, path), weight)

    def _draft_distribution(self, child: int, vocab_size: int) -> torch.Tensor | None:
        """
        The distribution `[V]` in float64 that the first of some siblings was drawn from; 0 where the drafter never
        draws. `None` if it is none, or one of other tokens: then its draws count as if they followed from the text
        before.
        """
        ids, probs = (
            self.distributions.token_ids,
            self.distributions.log_probs[self.row, self._distribution_of[child]].double().softmax(0),
        )
        if not (probs.isfinite().all() & (ids.amin() >= 0) & (ids.amax() < vocab_size)):
            return None
        return probs.new_zeros(vocab_size).index_copy_(0, ids, probs)

    def _path(self, node: int) -> list[int]:
        nodes = [node]
        while self.parents[nodes[-1]] >= 0:
            nodes.append(self.parents[nodes[-1]])
        return nodes[::-1]
