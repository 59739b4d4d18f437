"""The one transformer: embeddings, an encoder, a decoder, a head; each as the architecture says.

text → ids → vectors → layers of attention and feed-forward → hidden states → logits. A model is called
with `transformers`' keyword names and answers with its field names (`lathe.model.output.Output`).

Shape suffixes: B batch, T positions, S encoder positions, D d_model, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lathe.architecture import Architecture, Tokens
from lathe.errors import RequestError
from lathe.model.cache import Cache
from lathe.model.embedding import Embedding
from lathe.model.heads import Head
from lathe.model.initialise import initialise
from lathe.model.loss import IGNORED, label_loss, mark_loss, token_loss
from lathe.model.mask import drop_if_full
from lathe.model.output import Output
from lathe.model.stack import Memory, Trace, TransformerStack


class Transformer(nn.Module):
    """A transformer of any architecture. Its parameters have the blueprint's names and shapes.

    Args:
        architecture: every size and choice.
        seed: the weights' seed; None leaves them undrawn, for a caller that fills them in.
        device, dtype: where and as what the weights are made.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        stacks = dict(architecture.stacks)
        with torch.device("meta"):
            self.embedding = Embedding(architecture)
            first = next(iter(stacks))
            self.encoder = _stack(architecture, "encoder", first)
            self.decoder = _stack(architecture, "decoder", first)
            self.head = Head(architecture, list(stacks.values())[-1])
        # Not `to_empty`: what it asks of tensors that have no memory yet imports SymPy, for a second.
        made, place = dtype or torch.float32, device or "cpu"
        self._apply(lambda tensor: torch.empty(tensor.shape, dtype=made, device=place))  # type: ignore[no-untyped-call]
        if seed is not None:
            initialise(self, architecture, seed)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the token table, and of the stream."""
        return self.embedding.tokens.dtype

    def set_checkpointing(self, on: bool) -> None:
        """Whether the backward pass recomputes each layer instead of keeping its activations."""
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                stack.checkpointing = on

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        sentence_order_label: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_outputs: Memory | None = None,
        past_key_values: Cache | None = None,
        segment_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """One forward pass.

        Args:
            input_ids: B × T token ids; the encoder's where there is one.
            attention_mask: B × T, 1 for a token, 0 for a pad. With a cache, of the new tokens alone.
            token_type_ids: B × T segment numbers (BERT's A and B); all 0 where left out.
            position_ids: B × T; counted from 0, or on from the cache, where left out.
            decoder_input_ids: B × T; made from `labels` by shifting right where left out.
            labels: token ids, or classes for a classifier; −100 leaves a position out.
            next_sentence_label, sentence_order_label: B, the sentence label of BERT's and ALBERT's pretraining.
            inputs_embeds: B × T × width, in place of `input_ids`.
            encoder_outputs: the encoder's result from an earlier call (`encode`), in place of `input_ids`.
            past_key_values: a `Cache`; the decoder's tokens are appended to it.
            segment_ids, decoder_segment_ids: B × T document numbers of packed rows; attention stays inside.
            logits_to_keep: how many of the last positions get token logits; 0 for all of them.
            output_hidden_states, output_attentions: what else to return.

        Raises:
            RequestError: ids outside the vocabulary, more positions than the model has, inputs that do not fit.
        """
        memory, encoder_trace = encoder_outputs, Trace(output_hidden_states)
        if self.encoder is not None and memory is None:
            memory = self._encode(
                self.vectors(input_ids, inputs_embeds),
                attention_mask,
                token_type_ids,
                position_ids,
                segment_ids,
                encoder_trace,
                output_attentions,
            )
        decoder_trace = Trace(output_hidden_states)
        if self.decoder is None:
            assert memory is not None
            hidden_BTD, ids_BT, mask_BT = memory.hidden_BSD, input_ids, attention_mask
        elif self.encoder is None:
            ids_BT, mask_BT = input_ids, attention_mask
            vectors = self.vectors(input_ids, inputs_embeds)
            hidden_BTD = self._decode(
                vectors,
                mask_BT,
                position_ids,
                token_type_ids,
                segment_ids,
                None,
                past_key_values,
                decoder_trace,
                output_attentions,
            )
        else:
            ids_BT = self.decoder_ids(decoder_input_ids, labels, input_ids)
            mask_BT = decoder_attention_mask
            vectors = self.vectors(ids_BT, None)
            hidden_BTD = self._decode(
                vectors,
                mask_BT,
                decoder_position_ids,
                None,
                decoder_segment_ids,
                memory,
                past_key_values,
                decoder_trace,
                output_attentions,
            )
        output = Output(last_hidden_state=hidden_BTD, past_key_values=past_key_values)
        self._fill_traces(output, memory, encoder_trace, decoder_trace, output_hidden_states, output_attentions)
        pooled_ids = input_ids if self.encoder is not None and self.decoder is not None else ids_BT
        if logits_to_keep and labels is not None:
            raise RequestError("logits_to_keep leaves out logits that the labels need; give one of the two")
        self._fill_head(output, hidden_BTD, pooled_ids, mask_BT, logits_to_keep)
        sentence = next_sentence_label if next_sentence_label is not None else sentence_order_label
        self._fill_loss(output, labels, sentence, mask_BT)
        return output

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Memory:
        """The encoder's output, to be passed to `forward` as `encoder_outputs`."""
        vectors = self.vectors(input_ids, inputs_embeds)
        return self._encode(vectors, attention_mask, token_type_ids, position_ids, segment_ids, Trace(), False)

    def vectors(self, ids_BT: Tensor | None, embeds_BTE: Tensor | None) -> Tensor:
        """Token vectors of ids, checked against the vocabulary; or the ones given, B × T × width."""
        if (ids_BT is None) == (embeds_BTE is None):
            raise RequestError("give input_ids or inputs_embeds, one of the two")
        if embeds_BTE is not None:
            vectors = embeds_BTE
        else:
            assert ids_BT is not None
            check_ids(ids_BT, self.architecture.embedding.vocab_size)
            vectors = self.embedding.tokens(ids_BT)
        return vectors * self.embedding.scale if self.embedding.scale != 1.0 else vectors

    def shift_right(self, labels_BT: Tensor) -> Tensor:
        """The decoder's inputs for these labels: moved one to the right, the start token in front.

        A model without a start token (mBART) starts with each row's last token, its language code.
        """
        tokens: Tokens = self.architecture.tokens
        pad = 0 if tokens.pad is None else tokens.pad
        filled = labels_BT.masked_fill(labels_BT == IGNORED, pad)
        if tokens.decoder_start is not None:
            start = torch.full_like(filled[:, :1], tokens.decoder_start)
        else:
            start = filled.gather(1, last_token(filled != pad)[:, None])
        return torch.cat((start, filled[:, :-1]), dim=1)

    def _encode(
        self,
        vectors_BSE: Tensor,
        mask_BS: Tensor | None,
        token_type_ids: Tensor | None,
        positions_BS: Tensor | None,
        segments_BS: Tensor | None,
        trace: Trace,
        weights: bool,
    ) -> Memory:
        if self.encoder is None:
            raise RequestError("this model has no encoder; call it with input_ids and read its hidden states")
        padding_BS = drop_if_full(mask_BS)
        hidden_BSD = self.encoder(
            self.embedding,
            vectors_BSE,
            padding_BT=padding_BS,
            positions_BT=positions_BS,
            token_type_ids=token_type_ids,
            segments_BT=segments_BS,
            trace=trace,
            weights=weights,
        )
        return Memory(hidden_BSD, padding_BS, segments_BS)

    def _decode(
        self,
        vectors_BTE: Tensor,
        mask_BT: Tensor | None,
        positions_BT: Tensor | None,
        token_type_ids: Tensor | None,
        segments_BT: Tensor | None,
        memory: Memory | None,
        cache: Cache | None,
        trace: Trace,
        weights: bool,
    ) -> Tensor:
        assert self.decoder is not None
        hidden: Tensor = self.decoder(
            self.embedding,
            vectors_BTE,
            padding_BT=drop_if_full(mask_BT),
            positions_BT=positions_BT,
            token_type_ids=token_type_ids,
            segments_BT=segments_BT,
            memory=memory,
            cache=cache,
            trace=trace,
            weights=weights,
        )
        return hidden

    def decoder_ids(self, given: Tensor | None, labels: Tensor | None, input_ids: Tensor | None) -> Tensor:
        """What an encoder-decoder's decoder reads: what is given, or made from the labels, or from what it pools."""
        if given is not None:
            return given
        if self.architecture.head.language is not None and labels is not None:
            return self.shift_right(labels)
        if self.architecture.head.pooler is not None and input_ids is not None:
            return self.shift_right(input_ids)
        raise RequestError("an encoder-decoder needs decoder_input_ids, or labels to make them from; neither was given")

    def _fill_traces(
        self, output: Output, memory: Memory | None, encoder: Trace, decoder: Trace, hidden: bool, weights: bool
    ) -> None:
        both = self.encoder is not None and self.decoder is not None
        if both:
            assert memory is not None
            output.encoder_last_hidden_state = memory.hidden_BSD
        if hidden and both:
            output.encoder_hidden_states = tuple(encoder.hidden_states) or None
            output.decoder_hidden_states = tuple(decoder.hidden_states)
        elif hidden:
            output.hidden_states = tuple((decoder if self.encoder is None else encoder).hidden_states)
        if weights and both:
            output.encoder_attentions = tuple(encoder.attentions) or None
            output.decoder_attentions, output.cross_attentions = (
                tuple(decoder.attentions),
                tuple(decoder.cross_attentions),
            )
        elif weights:
            output.attentions = tuple((decoder if self.encoder is None else encoder).attentions)

    def _fill_head(
        self, output: Output, hidden_BTD: Tensor, ids: Tensor | None, mask: Tensor | None, logits_to_keep: int
    ) -> None:
        if self.head.language is not None:
            output.logits = self.head.language(hidden_BTD[:, -logits_to_keep:], self.embedding.tokens)
        # With a cache a forward sees a part of each row, which stands for no sequence.
        if output.past_key_values is None:
            self.fill_pooled(output, hidden_BTD, ids, mask)

    def fill_pooled(self, output: Output, hidden_BTD: Tensor, ids: Tensor | None, mask: Tensor | None) -> None:
        """Add the pooled state and the labels, where there is a pooler, to an output that has its token logits."""
        head = self.head
        if head.token is None:
            return
        pooled = head.pool(hidden_BTD, self._place_to_read(hidden_BTD, ids, mask))
        if head.token != "each":
            output.pooler_output = pooled
        if head.classifier is not None:
            labels = head.classify(pooled)
            if head.language is not None:
                output.seq_relationship_logits = labels
            else:
                output.logits = labels

    def _place_to_read(self, hidden_BTD: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Which position a pooler reads in each row, where that depends on the row."""
        tokens = self.architecture.tokens
        if self.head.token == "eos":
            if ids is None or not tokens.eos:
                raise RequestError("this pooler reads the end-of-sequence token: it needs input_ids and tokens.eos")
            is_eos = ids == tokens.eos[0]
            if not bool(is_eos.any(dim=1).all()):
                raise RequestError(f"a row holds no end-of-sequence token (id {tokens.eos[0]}); end every row with one")
            return last_token(is_eos)
        if self.head.token != "last":
            return None
        if mask is not None:
            return last_token(mask.bool())
        if ids is not None and tokens.pad is not None:
            return last_token(ids != tokens.pad)
        batch, length = hidden_BTD.shape[:2]
        return torch.full((batch,), length - 1, device=hidden_BTD.device)

    def _fill_loss(
        self, output: Output, labels: Tensor | None, sentence: Tensor | None, mask_BT: Tensor | None
    ) -> None:
        losses: list[Tensor] = []
        if labels is not None:
            if output.logits is None:
                raise RequestError("labels were given, and this model has no head to hold them against; add a head")
            if self.head.language is not None:
                losses.append(token_loss(output.logits, labels, shifted=self.encoder is None))
            elif self.head.marks:
                losses.append(mark_loss(output.logits, labels, mask_BT))
            else:
                losses.append(label_loss(output.logits, labels))
        if sentence is not None:
            if output.seq_relationship_logits is None:
                raise RequestError("a sentence label was given, and this model has no sentence head; add a classifier")
            losses.append(label_loss(output.seq_relationship_logits, sentence))
        if losses:
            output.loss = torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _stack(architecture: Architecture, name: str, first: str) -> TransformerStack | None:
    spec = dict(architecture.stacks).get(name)
    return None if spec is None else TransformerStack(architecture, spec, first=name == first)


def last_token(is_token_BT: Tensor) -> Tensor:
    """The last position of each row at which `is_token` holds, B; 0 in a row without one."""
    places = torch.arange(is_token_BT.shape[1], device=is_token_BT.device)
    return (places * is_token_BT).argmax(dim=1)


def check_ids(ids_BT: Tensor, vocab_size: int) -> None:
    """Raise `RequestError` for an id outside the vocabulary, naming it, its place and the vocabulary.

    Only CPU tensors are asked: on an accelerator the answer would cost a wait at every step.
    """
    if ids_BT.is_floating_point() or ids_BT.dtype == torch.bool:
        raise RequestError(f"token ids are {ids_BT.dtype}: expected whole numbers (torch.long)")
    if ids_BT.ndim != 2:
        raise RequestError(f"token ids have shape {tuple(ids_BT.shape)}: expected batch × length")
    if ids_BT.device.type != "cpu" or torch.compiler.is_compiling() or not ids_BT.numel():
        return
    low, high = torch.aminmax(ids_BT)
    if int(low) < 0 or int(high) >= vocab_size:
        row, place = (int(i) for i in ((ids_BT < 0) | (ids_BT >= vocab_size)).nonzero()[0])
        raise RequestError(
            f"token id {int(ids_BT[row, place])} at row {row}, position {place} is outside the vocabulary of "
            f"{vocab_size:,}; does the tokenizer belong to this model?"
        )
