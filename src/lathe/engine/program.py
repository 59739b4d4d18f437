"""A stack of the one transformer as a list of native operations, written by walking its modules.

Nothing is decided here that the modules do not say: which norm stands where, which layers share weights, how the
feed-forward is gated. So the list follows every architecture that the modules follow, and no family is known.

What goes together in one operation: a norm, the rounding of its rows, and the products that read them (q, k and v;
gate and up), each with its bias, activation and sum. Between two operations all threads meet once.

A stack with a language head has further lists: for the logits of the rows that are wanted, for the hidden states where
they are asked for, and, beside an encoder, for the memory's keys and values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lathe.architecture import ACTIVATIONS
from lathe.engine import layout, pack
from lathe.engine.layout import AttentionShape, Embed, Linear, Norm, Op, Spec
from lathe.engine.native import Handle, NoLibrary, library
from lathe.engine.pack import Unsupported
from lathe.model.attention import AttentionLayer
from lathe.model.block import Layer
from lathe.model.embedding import TokenTable
from lathe.model.heads import LanguageHead, TiedOutput
from lathe.model.norm import RMSNorm
from lathe.model.positions import rotation, sinusoid
from lathe.model.quantized import Quantized, QuantizedEmbedding
from lathe.model.stack import TransformerStack
from lathe.model.transformer import Transformer

_LEAST_TABLE = 64


@dataclass(frozen=True)
class Programs:
    """A model's stacks, ready to run; or the reason why there is no program of them.

    They hold the weights that they read and not the model, so they may be kept beside it as long as it lives.
    """

    encoder: Program | None = None
    decoder: Program | None = None
    reason: str | None = None

    @classmethod
    def of(cls, model: Transformer, precision: str, instructions: str | None, threads: int) -> Programs:
        """Of a model; what `Program` is given."""
        try:
            library()
            _check_modules(model)
            encoder, decoder = (
                None if stack is None else Program(model, stack, precision, instructions, threads)
                for stack in (model.encoder, model.decoder)
            )
        except (Unsupported, NoLibrary) as error:
            return cls(reason=str(error))
        return cls(encoder, decoder)


class Program:
    """One stack, ready to run.

    Args:
        model: whose stack it is.
        stack: the encoder or the decoder of it.
        precision: what plain linear layers are stored as: `float32`, `int8` or `int4`.
        instructions: the instruction set; None for the best of the machine.
        threads: that pack the weights.

    Raises:
        Unsupported: a module that the native step cannot hold.
    """

    def __init__(
        self, model: Transformer, stack: TransformerStack, precision: str, instructions: str | None, threads: int
    ) -> None:
        self.stack = stack
        draft = _Draft(precision, threads)
        last = stack is (model.decoder if model.decoder is not None else model.encoder)
        draft.write(model, stack, model.head.language if last else None)
        self._held = draft.held  # what the program reads by address
        self._handle = Handle(draft.spec(), instructions)
        self.bytes = draft.bytes
        self._bias: Tensor | None = None
        self._turns: tuple[Tensor, Tensor] | None = None

    def run(self, call: layout.Call, *, reads_memory: bool = False) -> None:
        """Run one pass."""
        self._handle.run(call, reads_memory=reads_memory)

    def go_on(self, call: layout.Call, steps: layout.Steps) -> None:
        """Run several steps, each with the tokens that the one before chose."""
        self._handle.go_on(call, steps)

    def relative_bias(self, length: int) -> tuple[Tensor, int] | None:
        """The bias of every distance up to `length`, heads × distances, and where distance 0 stands in it."""
        module = self.stack.relative_bias
        if module is None:
            return None
        two_sided = not self.stack.spec.causal
        have = 0 if self._bias is None else (self._bias.shape[1] + 1) // (2 if two_sided else 1)
        if have < length + two_sided:
            have = max(_LEAST_TABLE, 1 << (length - 1).bit_length())
            keys_S = torch.arange(2 * have - 1 if two_sided else have)
            self._bias = module(torch.tensor([[have - 1]]), keys_S)[0, :, 0].detach().float().contiguous()
        assert self._bias is not None
        return self._bias, (self._bias.shape[1] // 2 if two_sided else self._bias.shape[1] - 1)

    def turns(self, length: int) -> tuple[Tensor, Tensor] | None:
        """The rotary cosines and sines of positions 0 … length - 1, each position × d_head / 2."""
        spec = self.stack.spec
        if spec.positions.kind != "rotary":
            return None
        if self._turns is None or len(self._turns[0]) < length:
            rows = max(_LEAST_TABLE, 1 << (length - 1).bit_length())
            both = rotation(torch.arange(rows)[None], spec.positions, spec.attention.d_head)
            half = spec.attention.d_head // 2
            cos, sin = (each[0, 0, :, :half].contiguous() for each in both)
            self._turns = cos, sin
        return self._turns


class _Draft:
    """The lists while they are written."""

    def __init__(self, precision: str, threads: int) -> None:
        self.precision, self.threads = precision, threads
        self.ops: list[Op] = []
        self.sections: list[int] = []  # the number of operations of each list
        self.linears: list[Linear] = []
        self.norms: list[Norm] = []
        self.widths: list[int] = []
        self.held: list[Tensor] = []
        self.bytes = 0  # that a step reads of the weights
        self.embed, self.attention = Embed(), AttentionShape()
        self.vocabulary = 0
        self._known: dict[int, int] = {}

    def spec(self) -> Spec:
        """Everything as the library takes it; it copies what it is given."""
        body, hidden, logits, memory = self.sections
        return Spec(
            (Op * max(1, len(self.ops)))(*self.ops),
            body,
            hidden,
            logits,
            memory,
            (Linear * max(1, len(self.linears)))(*self.linears),
            len(self.linears),
            (Norm * max(1, len(self.norms)))(*self.norms),
            len(self.norms),
            (ctypes.c_int32 * max(1, len(self.widths)))(*self.widths),
            len(self.widths),
            self.vocabulary,
            self.embed,
            self.attention,
        )

    def write(self, model: Transformer, stack: TransformerStack, head: LanguageHead | None) -> None:
        """All lists of a stack."""
        d_model, a = model.architecture.d_model, stack.spec.attention
        self.stream, self.added = self.buffer(d_model), self.buffer(a.d_q)
        self.projected, self.inner = self.buffer(a.d_q + 2 * a.d_kv), self.buffer(stack.spec.feed_forward.d_ff)
        layers = [stack.layer(number) for number in range(stack.spec.n_layers)]
        self.attention = self._shape(stack, layers[0].attention)
        self._enter(model, stack)
        for number, layer in enumerate(layers):
            self._layer(number, layer, ACTIVATIONS.index(stack.spec.feed_forward.activation))
        self._end_section()
        result = self.stream
        if stack.norm is not None:
            result = self.buffer(d_model)
            self.op(layout.NORMALISE, self.stream, result, norm=self.norm("the final norm", stack.norm))
        self.op(layout.HIDDEN, result, 0)
        self._end_section()
        if head is not None:
            self._logits(model, stack, head)
        self._end_section()
        if stack.spec.cross_attention:
            self._memory(layers, d_model)
        self._end_section()

    def _end_section(self) -> None:
        self.sections.append(len(self.ops) - sum(self.sections))

    def _shape(self, stack: TransformerStack, layer: AttentionLayer) -> AttentionShape:
        a = stack.spec.attention
        rotary = int(stack.spec.positions.kind == "rotary")
        return AttentionShape(
            a.n_heads, a.kv_heads, a.d_head, int(stack.spec.causal), a.window or 0, rotary, layer.scale
        )

    def _enter(self, model: Transformer, stack: TransformerStack) -> None:
        embedding, own = model.embedding, stack.input
        width = model.architecture.width
        self.embed = Embed(width=width, scale=embedding.scale)
        self._table(embedding.tokens)
        types = positions = None
        if own.token_types is not None:
            types = self.keep(pack.plain(own.token_types.weight, "the table of token types"))
        if own.positions is not None:
            positions = self.keep(pack.plain(own.positions.weight, "the table of positions")[own.spec.offset :])
        elif own.spec.kind == "sinusoidal":
            assert own.spec.max_positions is not None
            positions = self.keep(sinusoid(torch.arange(own.spec.max_positions)[None], width)[0].contiguous())
        self.embed.types = None if types is None else types.data_ptr()
        self.embed.positions = None if positions is None else positions.data_ptr()
        start = self.stream if embedding.projection is None else self.buffer(width)
        self.op(layout.EMBED, 0, start)
        norm = -1 if own.norm is None else self.norm("the input norm", own.norm)
        if embedding.projection is not None:
            lift = self.linear("the embedding's projection", embedding.projection)
            self.op(layout.MULTIPLY, start, self.stream, norm=norm, parts=[lift])
        elif norm >= 0:
            self.op(layout.NORMALISE, start, self.stream, norm=norm)

    def _table(self, tokens: nn.Module) -> None:
        """The token table, numbers or codes; rows of it are read where they are."""
        if isinstance(tokens, QuantizedEmbedding):
            scales = self.keep(pack.plain(tokens.scales_OG, "the token table's scales").contiguous())
            codes = self.keep(tokens.codes.contiguous())
            self.embed.codes, self.embed.codes_row = codes.data_ptr(), codes.stride(0) * codes.element_size()
            self.embed.scales, self.embed.groups, self.embed.bits = scales.data_ptr(), scales.shape[1], tokens.bits
            if tokens.zeros_OG is not None:
                self.embed.zeros = self.keep(tokens.zeros_OG.contiguous()).data_ptr()
            return
        if not isinstance(tokens, TokenTable):
            raise Unsupported(f"the token table is a {type(tokens).__name__}: expected a plain or a quantised one")
        self.embed.table = self.keep(pack.plain(tokens.weight, "the token table")).data_ptr()

    def _layer(self, number: int, layer: Layer, activation: int) -> None:
        own, f = layer.attention, layer.feed_forward
        self._into(layer, own, [self.linear(f"{each} of layer {number}", getattr(own, each)) for each in "qkv"])
        self.op(layout.SELF_ATTEND, self.projected, self.added, layer=number)
        self._onto(layer, own.norm, self.added, self.linear(f"o of layer {number}", own.o))
        if layer.cross_attention is not None:
            crossing = layer.cross_attention
            self._into(layer, crossing, [self.linear(f"cross-attention's q of layer {number}", crossing.q)])
            self.op(layout.CROSS_ATTEND, self.projected, self.added, layer=number)
            self._onto(
                layer, crossing.norm, self.added, self.linear(f"cross-attention's o of layer {number}", crossing.o)
            )
        norm = self.norm(f"the feed-forward's norm of layer {number}", f.norm) if layer.pre_norm else -1
        up, down = (self.linear(f"{each} of layer {number}", getattr(f, each)) for each in ("up", "down"))
        parts = [up] if f.gate is None else [self.linear(f"gate of layer {number}", f.gate), up]
        mode = layout.SIDE_BY_SIDE if f.gate is None else layout.GATED
        self.op(layout.MULTIPLY, self.stream, self.inner, norm=norm, parts=parts, mode=mode, activation=activation)
        self._onto(layer, f.norm, self.inner, down)

    def _into(self, layer: Layer, sublayer: AttentionLayer, parts: Sequence[int]) -> None:
        norm = self.norm("a norm", sublayer.norm) if layer.pre_norm else -1
        self.op(layout.MULTIPLY, self.stream, self.projected, norm=norm, parts=parts)

    def _onto(self, layer: Layer, norm: nn.Module, src: int, part: int) -> None:
        self.op(layout.MULTIPLY, src, self.stream, parts=[part], mode=layout.ADD)
        if not layer.pre_norm:
            self.op(layout.NORMALISE, self.stream, self.stream, norm=self.norm("a norm", norm))

    def _logits(self, model: Transformer, stack: TransformerStack, head: LanguageHead) -> None:
        """From the stream of the kept rows to logits: `LanguageHead.forward`, with the final norm before it."""
        kept = self.buffer(model.architecture.d_model)
        self.op(layout.KEEP, self.stream, kept)
        norm = -1 if stack.norm is None else self.norm("the final norm", stack.norm)
        at, scale = kept, head.scale
        if head.transform is not None:
            assert head.norm is not None
            at = self.buffer(model.architecture.width)
            activation = ACTIVATIONS.index(_activation(model))
            part = self.linear("the head's transform", head.transform)
            self.op(
                layout.MULTIPLY, kept, at, rows=layout.KEPT, norm=norm, parts=[part], activation=activation, scale=scale
            )
            norm, scale = self.norm("the head's norm", head.norm), 1.0
        elif head.projection is not None:
            at = self.buffer(model.architecture.width)
            part = self.linear("the head's projection", head.projection)
            self.op(layout.MULTIPLY, kept, at, rows=layout.KEPT, norm=norm, parts=[part], scale=scale)
            norm, scale = -1, 1.0
        self.vocabulary = model.architecture.embedding.vocab_size
        output = self._output(model, head)
        self.op(layout.MULTIPLY, at, layout.LOGITS, rows=layout.KEPT, norm=norm, parts=[output], scale=scale)
        self.op(layout.CHOOSE, 0, 0, rows=layout.KEPT)

    def _output(self, model: Transformer, head: LanguageHead) -> int:
        """The output table, its bias and the stored offset as one matrix with one bias."""
        tied = isinstance(head.output, TiedOutput)
        given = [each for each in (head.output.bias, head.offset) if each is not None]
        bias = None
        if given:
            bias = torch.stack([pack.plain(each, "the head's bias") for each in given]).sum(0)
        module = model.embedding.tokens if tied else head.output
        if isinstance(module, Quantized):
            return self._add(*pack.quantized(module, bias))
        if not tied and type(module) is not nn.Linear:
            raise Unsupported(f"the output table is a {type(module).__name__}: expected a linear layer")
        assert isinstance(module.weight, Tensor)
        return self._add(
            *pack.matrix(pack.plain(module.weight, "the output table"), bias, self.precision, self.threads)
        )

    def _memory(self, layers: Sequence[Layer], d_model: int) -> None:
        """The encoder's output to each layer's keys and values."""
        source, both = self.buffer(d_model), self.buffer(2 * layers[0].attention.spec.d_kv)
        self.op(layout.MEMORY, 0, source, rows=layout.MEMORY_TOKENS)
        read = self.bytes
        for number, layer in enumerate(layers):
            assert layer.cross_attention is not None
            names = (f"cross-attention's {each} of layer {number}" for each in "kv")
            parts = [
                self.linear(name, each) for name, each in zip(names, (layer.cross_attention.k, layer.cross_attention.v))
            ]
            self.op(layout.MULTIPLY, source, both, rows=layout.MEMORY_TOKENS, parts=parts)
            self.op(layout.REMEMBER, both, 0, rows=layout.MEMORY_TOKENS, layer=number)
        self.bytes = read  # a step does not read these

    def op(
        self,
        code: int,
        src: int,
        dst: int,
        *,
        rows: int = layout.TOKENS,
        norm: int = -1,
        parts: Sequence[int] = (),
        mode: int = layout.SIDE_BY_SIDE,
        activation: int = -1,
        layer: int = 0,
        scale: float = 1.0,
    ) -> None:
        """Add an operation."""
        three = (ctypes.c_int32 * 3)(*parts, *[-1] * (3 - len(parts)))
        self.ops.append(Op(code, rows, src, dst, norm, three, mode, activation, layer, scale))

    def buffer(self, width: int) -> int:
        """A place for rows of so many numbers."""
        self.widths.append(width)
        return len(self.widths) - 1

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, which lives as long as the program."""
        self.held.append(tensor)
        return tensor

    def linear(self, name: str, module: nn.Module) -> int:
        """The number of a linear layer; one that is used twice is stored once."""
        if id(module) not in self._known:
            self._known[id(module)] = self._add(*pack.linear(name, module, self.precision, self.threads))
        return self._known[id(module)]

    def _add(self, made: Linear, held: list[Tensor]) -> int:
        self.linears.append(made)
        self.held += held
        self.bytes += sum(each.numel() * each.element_size() for each in held)
        return len(self.linears) - 1

    def norm(self, name: str, module: nn.Module) -> int:
        """The number of a norm."""
        if not isinstance(module, RMSNorm | nn.LayerNorm):
            raise Unsupported(f"{name} is a {type(module).__name__}: expected a LayerNorm or an RMSNorm")
        weight = self.keep(pack.plain(module.weight, name))
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias = self.keep(pack.plain(bias, name))
        pointers = weight.data_ptr(), None if bias is None else bias.data_ptr()
        self.norms.append(Norm(int(isinstance(module, RMSNorm)), len(weight), module.eps, *pointers))
        return len(self.norms) - 1


def _check_modules(model: Transformer) -> None:
    """Raise Unsupported where calling a module does more than its forward."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unsupported(f"{name or 'the model'} has a hook, which only the modules run")
        if "parametrizations" in module._modules:
            raise Unsupported(f"{name} has a parametrisation, which only the modules compute")


def _activation(model: Transformer) -> str:
    spec = model.architecture.head.language
    assert spec is not None
    assert spec.transform is not None
    return spec.transform
