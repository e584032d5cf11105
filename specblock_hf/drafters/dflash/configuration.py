# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of block-diffusion drafters: DFlash, DFlash 2, JetSpec and DSpark."""

from __future__ import annotations

from transformers import PreTrainedConfig, Qwen3Config

from ...checkpoints.card import Paper
from ..common.configuration import UNRECORDED_LAYER, DrafterFields, fields_for_target


def spread_feature_layers(num_features: int, target_num_layers: int) -> list[int]:
    """
    Where DFlash taps a target that its configuration does not list: evenly from the second layer to the fourth last.

    Args:
        num_features (`int`): States to read.
        target_num_layers (`int`): N.

    Returns:
        `list[int]`: Indices into the target's `hidden_states`, each one above the layer that the state leaves.
    """
    if num_features == 1:
        return [target_num_layers // 2 + 1]
    return [round(1 + k * (target_num_layers - 4) / (num_features - 1)) + 1 for k in range(num_features)]


class BlockDiffusionConfig(DrafterFields, Qwen3Config):
    r"""
    Configuration of a [`BlockDiffusionDrafter`] (DFlash, https://huggingface.co/papers/2602.06036, and what grew from
    it). The layers are Qwen3-type layers whatever the target is, so every field of [`~transformers.Qwen3Config`] keeps
    its meaning.

    Args:
        vocab_size (`int`): The **target's** vocabulary, which `generate()` compares with the target's own.
        num_hidden_layers (`int`, *optional*, defaults to 5): Decoder layers of the drafter.
        block_size (`int`, *optional*, defaults to 16): Rows b of a block: the last known token and b - 1 masks.
        mask_token_id (`int`, *optional*): Token whose embedding stands for an unknown one. Defaults to the last id.
        feature_layers (`list[int]`, *optional*):
            Indices into the target's `hidden_states` (0 is the embedding, i the output of layer i - 1). Defaults to
            `num_hidden_layers` of them, spread over the target; -1 where its depth is not known before it is.
        target_hidden_size (`int`, *optional*, defaults to `hidden_size`): Width of the target's states.
        target_num_layers (`int`, *optional*): N, to refuse a target of another depth.
        target_name_or_path (`str`, *optional*): The target that the drafter was trained for.
        chat_template (`str`, *optional*): Of the prompts that it was trained behind; see [`PromptStyle`].
        thinking (`bool`, *optional*): Whether the target thought before the answers that it was trained on.
        causal (`bool`, *optional*):
            Whether the rows of a block see earlier rows only (JetSpec). `None` leaves it to the layer: sliding ones
            are causal, full ones are not.
        window_from_anchor (`bool`, *optional*, defaults to `False`):
            All rows of a block see as many columns before its anchor as the window has (`speculators` checkpoints),
            instead of each row so many up to itself.
        predicts_from_anchor (`bool`, *optional*, defaults to `False`):
            Row j of a block predicts the token after its own position (DSpark) instead of the one at it (DFlash,
            where the first row predicts nothing).
        own_embedding (`bool`, *optional*, defaults to `False`):
            The drafter has an embedding and a head of its own (DSpark).
        restricted_vocabulary (`bool`, *optional*, defaults to `False`):
            It says only the tokens that the buffer `t2d` marks (`speculators` checkpoints), whoever's the head is.
        input_embedding_scale (`float`, *optional*, defaults to 1.0): Factor of a block's embeddings.
        output_multiplier (`float`, *optional*, defaults to 1.0): Factor of the logits.
        final_logit_softcapping (`float`, *optional*): Bound s of the logits, as s tanh(logit / s).
        conv_kernel_size (`int`, *optional*, defaults to 0):
            Rows that the convolutions around each sublayer see (DFlash 2); 0 for none.
        conv_group_size (`int`, *optional*, defaults to 0): Channels that share a dynamic kernel.
        selector_rank (`int`, *optional*, defaults to 0): Rank of the candidate selector (DFlash 2); 0 for none.
        selector_top_k (`int`, *optional*, defaults to 0): Candidates of a slot that it scores.
        markov_rank (`int`, *optional*, defaults to 0): Rank of the Markov head (DSpark); 0 for none.
        confidence_head (`bool`, *optional*, defaults to `False`):
            A head predicts the probability that the target accepts a row's token (DSpark).
        confidence_head_with_markov (`bool`, *optional*, defaults to `False`): It reads the token before, too.
        confidence_threshold (`float`, *optional*, defaults to 0.0): Nothing is drafted below a confidence under this.
        tree_width (`int`, *optional*):
            Most children of a node; 1 drafts the likeliest chain. `None` for as many as the budget allows.
        tree_budget (`int`, *optional*, defaults to 60): Most drafted nodes of a tree.
        acceptance (`list[list[float]]`, *optional*):
            Measured tau of several plans, in the rows that [`SpecBlockConfig`] describes.

    Example:

    ```python
    >>> from specblock_hf import AutoDrafter

    >>> drafter = AutoDrafter.from_pretrained("z-lab/Qwen3-8B-DFlash-b16")
    >>> drafter.config.block_size
    16
    ```
    """

    model_type = "block_diffusion"
    paper = Paper(
        method="DFlash",
        key="dflash2026",
        title="DFlash: Block Diffusion for Flash Speculative Decoding",
        arxiv="2602.06036",
        year=2026,
    )

    num_hidden_layers: int = 5
    block_size: int = 16
    mask_token_id: int | None = None
    causal: bool | None = None
    window_from_anchor: bool = False
    predicts_from_anchor: bool = False
    own_embedding: bool = False
    restricted_vocabulary: bool = False
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    conv_kernel_size: int = 0
    conv_group_size: int = 0
    selector_rank: int = 0
    selector_top_k: int = 0
    markov_rank: int = 0
    confidence_head: bool = False
    confidence_head_with_markov: bool = False
    confidence_threshold: float = 0.0
    tree_width: int | None = None

    def __post_init__(self, **kwargs):
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        super().__post_init__(**kwargs)
        self._check()

    def usual_feature_layers(self, num_layers: int | None) -> list[int]:
        count = len(self.feature_layers or ()) or self.num_hidden_layers
        return [UNRECORDED_LAYER] * count if num_layers is None else spread_feature_layers(count, num_layers)

    def _check(self) -> None:
        if self.num_predictions < 1:
            raise ValueError(
                f"block_size is {self.block_size}, so a block predicts no token; give "
                f"{2 - self.predicts_from_anchor} or more."
            )
        self.refuse_other_embedding()
        known = {"full_attention", "sliding_attention"}
        if len(self.layer_types) != self.num_hidden_layers or not known.issuperset(self.layer_types):
            raise ValueError(
                f"layer_types is {self.layer_types}; give each of the {self.num_hidden_layers} layers one of "
                f"{', '.join(sorted(known))}."
            )
        if self.own_embedding and self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"mask_token_id is {self.mask_token_id} and the drafter's own embedding has {self.vocab_size} rows; "
                "name one of them."
            )
        if self.conv_kernel_size and (self.conv_group_size < 1 or self.hidden_size % self.conv_group_size):
            raise ValueError(
                f"conv_group_size is {self.conv_group_size} and must divide the hidden size {self.hidden_size}."
            )
        if self.selector_rank and not 0 < self.selector_top_k <= self.vocab_size:
            raise ValueError(f"selector_top_k is {self.selector_top_k}; give from 1 to {self.vocab_size} candidates.")
        if self.selector_rank and self.markov_rank:
            raise ValueError("A drafter has a candidate selector or a Markov head; set one of both ranks to 0.")
        if self.confidence_head_with_markov and not (self.confidence_head and self.markov_rank):
            raise ValueError("confidence_head_with_markov needs a confidence head and a Markov head; leave it out.")
        if self.tree_width is not None and self.tree_width < 1:
            raise ValueError(f"tree_width is {self.tree_width}; a node gets at least 1 child, so give 1 or more.")

    @property
    def num_predictions(self) -> int:
        """Tokens that one block predicts."""
        return self.block_size - (not self.predicts_from_anchor)

    @property
    def draft_vocab_size(self) -> int:
        """The drafter can say all that the target can."""
        return self.vocab_size

    @property
    def layer_rules(self) -> list[tuple[bool, int | None]]:
        """Of every layer: whether a block's rows see earlier ones only, and how far a row sees (`None`: all)."""
        sliding = [layer_type == "sliding_attention" for layer_type in self.layer_types]
        return [
            (slides if self.causal is None else self.causal, self.sliding_window if slides else None)
            for slides in sliding
        ]

    @classmethod
    def for_target(cls, target_config: PreTrainedConfig, **overrides) -> BlockDiffusionConfig:
        """
        The default drafter for a target: its width, head geometry, RoPE base and special tokens, with blocks of 8.

        Args:
            target_config ([`~transformers.PreTrainedConfig`]): Of a decoder-only target.
            **overrides: Any field of this class.
        """
        return cls(**(fields_for_target(target_config) | {"block_size": 8} | overrides))
