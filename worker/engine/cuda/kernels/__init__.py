"""Kernels for CUDA in Triton, each with a plain torch reference beside it (`reference.py`).

Importing them needs Triton, which torch for CUDA brings along. Under `TRITON_INTERPRET=1`, set
before Triton is imported, they run on the CPU, slowly: so they are tested without a card.

The KV cache of a layer is one tensor [blocks, 2, kv_heads, block, head_dim]: keys, then values, and
what one key-value head has of a block lies in one piece. Rows find their blocks in one flat list:
position p of row r is in block `blocks[first[r] + p // block]`. A row at position -1 is padding:
nothing is written for it, and its results mean nothing.
"""
