"""An Overtone model for the transformers library: a decoder, and a head whose scores are -n log d, the logarithms of
its probabilities up to a constant of each token. It needs torch and transformers (5.0 or later) alone.

Legend: B sequences, T tokens given, S with those in the cache.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput
from transformers.utils import ModelOutput

from .configuration_overtone import OvertoneConfig
from .decoder_overtone import OvertoneDecoder
from .head_overtone import OvertoneHead

CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"  # its name before transformers 5.24
# What `generate` tells the maker of its masks, by the names of every version; what it may ask for beside that is None.
MASK_ARGUMENTS = {"config", "inputs_embeds", "input_embeds", "cache_position", "past_key_values", "cache"}
MASK_ARGUMENTS |= {"position_ids", "is_first_iteration"}


class OvertonePreTrainedModel(PreTrainedModel):
    """What both models share: decoder, head, hidden states, and what the library asks of every model."""

    config_class = OvertoneConfig
    base_model_prefix = "decoder"
    _no_split_modules = ["OvertoneBlock"]
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["head"]  # scores are taken in float32, of prototypes in float32
    accepts_loss_kwargs = True  # num_items_in_batch, by which the library's trainer divides a loss

    def __init__(self, config: OvertoneConfig) -> None:
        super().__init__(config)
        self.decoder = OvertoneDecoder(config)
        self.head = OvertoneHead(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Of a model without a checkpoint."""
        super()._init_weights(module)
        if isinstance(module, OvertoneHead):
            nn.init.normal_(module.prototypes, std=module.prototypes.shape[1] ** -0.5)
            for rest in (module.log_exponent, getattr(module, "factor", None)):
                if rest is not None:
                    nn.init.zeros_(rest)

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        """None for a tied model: `head.prototypes` embed."""
        return self.decoder.tokens

    def get_output_embeddings(self) -> None:
        """The prototypes are no linear layer."""
        return None

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> list[Tensor]:
        """Those of `OvertoneDecoder.forward`."""
        config, (_, t) = self.config, input_ids.shape
        past = 0 if cache is None else int(cache.get_seq_length())
        real = None
        if attention_mask is not None and not attention_mask.all():
            if attention_mask.dim() != 2 or attention_mask.shape[1] != past + t:
                expected = (len(input_ids), past + t)
                raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}: expected {expected}")
            real = attention_mask.bool()
        if position_ids is None:
            if config.document_mask and past:
                raise ValueError(
                    "a model with document_mask needs position_ids with a cache: each token's place in its document "
                    "(document_places of the whole row)"
                )
            if config.document_mask:
                position_ids = document_places(input_ids, config.eos_token_id, real)
            elif real is None:
                position_ids = torch.arange(past, past + t, device=input_ids.device)[None]
            else:
                position_ids = (real.cumsum(1) - 1).clamp_min(0)[:, past:]
        inputs = input_ids
        if config.tied:
            inputs = F.embedding(input_ids, self.head.prototypes).to(self.decoder.dtype)
        return self.decoder(inputs, position_ids, real, cache)

    def _refuse(self, inputs_embeds: None, output_attentions: bool | None) -> None:
        """What the library's callers name at every call, and what this model does not have."""
        if inputs_embeds is not None:
            raise ValueError("inputs_embeds: the model takes token ids alone; give input_ids")
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions=True: attention weights are not given out; leave it out")

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        ignore_index: int,
        num_items_in_batch: Tensor | int | None,
        shift_labels: Tensor | None = None,
    ) -> Tensor | None:
        if labels is None and shift_labels is None:
            return None
        moved = {} if shift_labels is None else {"shift_labels": shift_labels}
        return self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            **moved,
        )

    def _output(
        self, output: ModelOutput, hidden: list[Tensor], output_hidden_states: bool | None, return_dict: bool | None
    ) -> Any:
        """`output` as it was asked for: with hidden states or without, by name or as a tuple."""
        config = self.config
        if config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            output["hidden_states"] = tuple(hidden)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache by either of its names: past_key_values before transformers 5.24, cache since."""
    if past_key_values is not None and cache is not None:
        raise TypeError("past_key_values and cache are two names of one argument: give one of them")
    return past_key_values if cache is None else cache


def document_places(tokens: Tensor, eos_id: int, real: Tensor | None = None) -> Tensor:
    """(B, T) tokens -> (B, T) places in their documents, each opened by an end of text, or by the row's first token
    that is no padding (`real`).
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    opens = tokens == eos_id
    if real is not None:
        opens = opens | (real.cumsum(1) == 1) & real
    return place - torch.where(opens, place, 0).cummax(1).values


class OvertoneForCausalLM(OvertonePreTrainedModel, GenerationMixin):
    """The logits are scores: -n log d for a distance d, so that softmax(logits) are the model's probabilities.

    With `config.document_mask` a token sees its own document alone. `position_ids` say where documents begin: they are
    0 there. By default an end of text opens the document that follows it.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache: Cache | None = None,
        ignore_index: int = -100,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
        **unnamed: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """
        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 0 for padding.
            position_ids: (B, T) places in documents; None: they are counted.
            past_key_values, cache: two names of one argument. The output has the one of the installed transformers.
            labels: (B, T), the inputs themselves (they are moved by one here), or `ignore_index`.
            num_items_in_batch: the loss is a sum divided by it; None: a mean.
            logits_to_keep: so many of the last tokens are scored (0: all), or the indices of those that are.
            inputs_embeds, output_attentions: may be named, but ask for what is not there.
            unnamed: `shift_labels` alone, (B, T) labels that were moved already, which count instead of `labels`; by
                its name here the library's trainer would look for it in every batch.
        """
        shift_labels = unnamed.pop("shift_labels", None)
        if unnamed:
            raise TypeError(f"{', '.join(unnamed)}: not known to an Overtone model; leave it out")
        self._refuse(inputs_embeds, output_attentions)
        cache = one_cache(past_key_values, cache)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(hidden[-1][:, kept])
        loss = self._loss(logits, labels, ignore_index, num_items_in_batch, shift_labels)
        named: dict[str, Any] = {CACHE: cache if use_cache else None}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **named)
        return self._output(output, hidden, output_hidden_states, return_dict)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """That of the library, which takes the cache by either name."""
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE] = cache
        drafts = getattr(kwargs.get("generation_config"), "is_assistant", False)  # whose positions the library counted
        if self.config.document_mask and kwargs.get("position_ids") is not None and not drafts:
            raise ValueError("position_ids: a model with document_mask counts them from ends of text; leave them out")
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # of the types of some versions

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        """Called by `generate` before every step, with the whole rows (B, S): counts places in documents from them."""
        if self.config.document_mask:  # a step is given its last tokens alone, which cannot tell
            mask, cache = kwargs.get("attention_mask"), kwargs.get(CACHE)
            if cache is not None and input_ids.shape[1] <= int(cache.get_seq_length()):
                raise ValueError("prefill_chunk_size: a model with document_mask needs the whole row; leave it out")
            real = None if mask is None or mask.dim() != 2 else mask.bool()
            kwargs["position_ids"] = document_places(input_ids, self.config.eos_token_id, real)
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        inputs.pop("cache_position", None)  # of early versions; the cache tells it
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **arguments: Any) -> Tensor | None:
        """For a static cache too, `OvertoneDecoder` makes the mask."""
        if unknown := [name for name, value in arguments.items() if name not in MASK_ARGUMENTS and value is not None]:
            raise TypeError(f"{', '.join(unknown)}: masks of Overtone's models do not know it")
        return attention_mask


class OvertoneForMaskedLM(OvertonePreTrainedModel):
    """A token sees all of its row; softmax(logits) at a masked token are the probabilities of what it hides."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        ignore_index: int = -100,
        num_items_in_batch: Tensor | int | None = None,
        inputs_embeds: None = None,
        output_attentions: bool | None = None,
    ) -> MaskedLMOutput | tuple:
        """
        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding.
            labels: (B, T), `ignore_index` where no token is hidden.
            num_items_in_batch: the loss is a sum divided by it; None: a mean.
            inputs_embeds, output_attentions: may be named, but ask for what is not there.
        """
        self._refuse(inputs_embeds, output_attentions)
        hidden = self.hidden_states(input_ids, attention_mask, position_ids, None)
        logits = self.head(hidden[-1])
        loss = self._loss(logits, labels, ignore_index, num_items_in_batch)
        return self._output(MaskedLMOutput(loss=loss, logits=logits), hidden, output_hidden_states, return_dict)
