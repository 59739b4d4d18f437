"""Layers that hold codes compute what the matrices compute that the codes stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lathe.model.codes import Codes, pack, unpack
from lathe.model.quantized import Quantized, QuantizedEmbedding, QuantizedLinear, quantize_tokens


def drawn(bits: int, groups: int, *, zeros: bool, activations: str = "none") -> Codes:
    """A random matrix in codes."""
    rows, columns, high = 12, 64, 2 ** (bits - 1)
    return Codes(
        torch.randint(-high, high, (rows, columns), dtype=torch.int8),
        torch.rand(rows, groups) + 0.1,
        torch.randint(-high, high, (rows, groups), dtype=torch.int8) if zeros else None,
        bits,
        activations,
    )


def by_hand(matrix: Codes) -> Tensor:
    """s · (q − z), number by number."""
    rows, columns = matrix.codes_OI.shape
    size = columns // matrix.scales_OG.shape[1]
    out = torch.zeros(rows, columns)
    for o in range(rows):
        for i in range(columns):
            zero = 0 if matrix.zeros_OG is None else int(matrix.zeros_OG[o, i // size])
            out[o, i] = matrix.scales_OG[o, i // size] * (int(matrix.codes_OI[o, i]) - zero)
    return out


@pytest.mark.parametrize("columns", [8, 20, 33])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_come_back(bits: int, columns: int) -> None:
    high = 2 ** (bits - 1)
    codes = torch.randint(-high, high, (5, columns), dtype=torch.int8)
    codes[0, 0], codes[0, 1] = -high, high - 1
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (5, -(-columns * bits // 32))
    assert torch.equal(unpack(packed, columns, bits), codes)


def test_the_first_code_lies_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -8]], dtype=torch.int8), 4).tolist() == [[0x06543210]]
    assert pack(torch.tensor([[-128, -127, -126, -128]], dtype=torch.int8), 8).tolist() == [[0x00020100]]


@pytest.mark.parametrize(("bits", "groups", "zeros"), [(8, 1, False), (8, 2, True), (4, 1, True), (4, 2, False)])
def test_a_layer_computes_its_dequantised_matrix(bits: int, groups: int, zeros: bool) -> None:
    matrix = drawn(bits, groups, zeros=zeros)
    bias = nn.Parameter(torch.randn(12))
    layer = QuantizedLinear(matrix, bias)
    x = torch.randn(2, 3, 64)
    assert torch.equal(layer.dequantized(), by_hand(matrix))
    assert torch.equal(layer.codes_OI(), matrix.codes_OI)
    assert layer.group_size == (0 if groups == 1 else 32)
    torch.testing.assert_close(layer(x), x @ by_hand(matrix).T + bias, rtol=1e-4, atol=1e-3)


def test_int8_activations_are_rounded_to_their_own_scale() -> None:
    matrix = drawn(8, 1, zeros=False, activations="int8")
    layer = QuantizedLinear(matrix)
    x = torch.randn(5, 64)
    x[2] = 0
    codes, scales = quantize_tokens(x)
    assert torch.equal(scales[0], x[0].abs().max().reshape(1) / 127.5)
    torch.testing.assert_close(codes * scales, x, rtol=0, atol=float(scales.max()) * 0.5 + 1e-6)
    torch.testing.assert_close(layer(x), (codes * scales) @ by_hand(matrix).T, rtol=1e-4, atol=1e-2)
    assert layer(x)[2].abs().max() == 0


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_the_gradient_goes_through_the_matrix_to_the_input(activations: str) -> None:
    layer = QuantizedLinear(drawn(8, 1, zeros=False, activations=activations))
    x = torch.randn(2, 3, 64, requires_grad=True)
    back = torch.randn(2, 3, 12)
    (layer(x) * back).sum().backward()
    torch.testing.assert_close(x.grad, back @ layer.dequantized())


def test_a_table_reads_rows_and_multiplies_with_all_of_them() -> None:
    matrix = drawn(4, 2, zeros=True)
    table = QuantizedEmbedding(matrix)
    ids, hidden = torch.tensor([[3, 0], [11, 3]]), torch.randn(2, 2, 64)
    assert torch.equal(table(ids), table.dequantized()[ids])
    torch.testing.assert_close(table.logits(hidden, torch.ones(12)), hidden @ table.dequantized().T + 1)


def test_codes_and_scales_are_no_parameters() -> None:
    layer = QuantizedLinear(drawn(4, 2, zeros=True), nn.Parameter(torch.zeros(12)))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert sorted(dict(layer.named_buffers())) == ["codes", "scales_OG", "zeros_OG"]
    assert isinstance(layer, Quantized)
    assert layer.nbytes == 12 * 32 + 12 * 2 * 4 + 12 * 2
