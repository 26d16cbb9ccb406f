"""Stands in for torch_npu 2.9: registers `npu::npu_fusion_attention` with its schema, computing what op-plugin documents."""

import torch
from reference_attention import attention

LIBRARY = torch.library.Library("npu", "FRAGMENT")
if not hasattr(torch.ops.npu, "npu_fusion_attention"):
    LIBRARY.define(
        "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
        "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
        "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
        "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
        'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0) '
        "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
    )

    def real(
        query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0,
        pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0, prefix=None, actual_seq_qlen=None,
        actual_seq_kvlen=None, sparse_mode=0, **_,
    ):  # fmt: skip
        batch, q_len, heads, _dim = query.shape
        last = (q_len, key.shape[1])
        masks, biases = (
            {(batch, heads, *last), (batch, 1, *last), (1, 1, *last)},
            {(batch, heads, *last), (1, heads, *last)},
        )
        assert input_layout == "BSND" and head_num == heads and key.shape == value.shape
        assert keep_prob == 1.0 and pre_tockens == next_tockens == 2147483647
        bias = torch.zeros(1, 1, q_len, key.shape[1], dtype=torch.float64)
        if pse is not None:
            assert pse.dtype == query.dtype and pse.shape in biases
            assert bool((pse > float("-inf")).any(-1).all()), "rows without any key need inner_precise=2 and atten_mask"
            bias = bias + pse.double() * scale  # softmax(scale * (pse + q k^T))
        if sparse_mode in (2, 3):
            torch.testing.assert_close(atten_mask, torch.ones(2048, 2048).triu(1).bool())
        elif atten_mask is not None:
            assert sparse_mode == 0 and atten_mask.dtype is torch.bool and atten_mask.shape in masks
            bias = bias.masked_fill(atten_mask, float("-inf"))  # True: masked out
            if inner_precise != 2:
                assert not bool(atten_mask.all(-1).any()), "rows without any key need inner_precise=2"
        causal = {0: None, 2: "upper-left", 3: "lower-right"}[sparse_mode]
        output, logsumexp = attention(query, key, value, scale, causal, bias)
        return (output.to(query.dtype).contiguous(), logsumexp, logsumexp.clone(), query.new_empty(0), 0, 0, 0)

    def fake(query, key, value, *_, **__):
        sizes = (query.shape[0], query.shape[2], query.shape[1])
        statistics = [query.new_empty(sizes, dtype=torch.float32) for _ in range(2)]
        return (query.new_empty(query.shape), *statistics, query.new_empty(0), 0, 0, 0)

    LIBRARY.impl("npu_fusion_attention", real, "CompositeExplicitAutograd")
    torch.library.register_fake("npu::npu_fusion_attention", fake, lib=LIBRARY)
