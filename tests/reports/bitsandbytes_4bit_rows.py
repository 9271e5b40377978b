"""4-bit weights on a CPU, with rows that are no multiple of the block: wrong scales, or an error.

    python bitsandbytes_4bit_rows.py

It needs torch and bitsandbytes only.
"""

import platform

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

BLOCK = 64


def by_hand(packed: torch.Tensor, state: bitsandbytes.functional.QuantState) -> torch.Tensor:
    """Two numbers a byte, the upper half first; each run of 64 numbers has one scale, across the ends of rows."""
    pairs = packed.flatten().long()
    numbers = state.code[torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()]
    return (numbers.view(-1, BLOCK) * state.absmax[:, None]).view(state.shape)


def difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    return f"{float((found - expected).norm() / expected.norm()):.1e}"


def layer_error(weight: torch.Tensor, expected: torch.Tensor, training: bool) -> str:
    rows, columns = weight.shape
    layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, blocksize=BLOCK, quant_type="nf4", compress_statistics=False
    )
    layer.to("cpu").train(training)
    x = torch.randn(8, columns)
    try:
        with torch.no_grad():
            return difference(layer(x), x @ expected.T)
    except RuntimeError as error:
        return f"RuntimeError: {error}"


def main() -> None:
    torch.manual_seed(0)
    print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{platform.machine()}, CPU capability {torch.backends.cpu.get_cpu_capability()}")
    for columns in (64, 96, 100, 128, 160, 320):
        # 128 rows of sizes from 0.1 to 10: the number of all weights is a multiple of the block in every case.
        weight = torch.randn(128, columns) * torch.linspace(0.1, 10, 128)[:, None]
        packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        expected = by_hand(packed, state)
        print(f"rows of {columns}{'' if columns % BLOCK == 0 else ', no multiple of 64'}")
        print(f"  quantization, against the weight       {difference(expected, weight)}")
        print(f"  dequantize_4bit, against by hand       {difference(dequantize_4bit(packed, state), expected)}")
        print(f"  Linear4bit.train(), against by hand    {layer_error(weight, expected, True)}")
        print(f"  Linear4bit.eval(), against by hand     {layer_error(weight, expected, False)}")


if __name__ == "__main__":
    main()
