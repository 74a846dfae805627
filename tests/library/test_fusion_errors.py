"""A wrong argument is named, with what it is and what it should be."""

import pytest
import torch

from polyfusion import ops

SPEECH, IDENTITY = torch.zeros(2, 3, 4), torch.zeros(2, 5)
VIEWS = [SPEECH, IDENTITY]
FACTORS = [torch.zeros(5, 6), torch.zeros(6, 6)]
OUT = torch.zeros(7, 6)
CORE, RANKED = torch.zeros(8, 6, 3), [torch.zeros(5, 6), torch.zeros(6, 3)]
FIRST = [torch.zeros(4, 6), torch.zeros(5, 6)]
BIAS = torch.zeros(7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.cp_fusion(SPEECH, FACTORS, OUT), "views: expected a sequence of at least 2"),
        (lambda: ops.cp_fusion([SPEECH], FACTORS, OUT), "views: .* at least 2 tensors, got 1"),
        (lambda: ops.cp_fusion([SPEECH, BIAS], FACTORS, OUT), r"views\[1\]: .* got \(7,\)"),
        (
            lambda: ops.cp_fusion([SPEECH, torch.zeros(3, 5)], FACTORS, OUT),
            r"views\[1\] has shape \(3, 5\), expected \(B, ...\) with B = 2",
        ),
        (
            lambda: ops.cp_fusion([SPEECH, torch.zeros(2, 4, 5)], FACTORS, OUT),
            r"views\[1\] has shape \(2, 4, 5\), .* B = 2, T = 3",
        ),
        (
            lambda: ops.cp_fusion(VIEWS, [FACTORS[0], torch.zeros(5, 6)], OUT),
            r"factors\[1\] has shape \(5, 6\), expected \(d_2\+1, k\) = \(6, 6\)",
        ),
        (lambda: ops.cp_fusion(VIEWS, FACTORS[:1], OUT), "factors: .* each of the 2 views, got 1"),
        (lambda: ops.cp_fusion(VIEWS, FACTORS, BIAS), r"out: expected a matrix \(m, k\)"),
        (
            lambda: ops.cp_fusion(VIEWS, FACTORS, OUT, noise=torch.zeros(2, 4, 1)),
            r"noise has shape \(2, 4, 1\), expected \(B, T, n\) = \(2, 3, 1\)",
        ),
        (
            lambda: ops.cp_fusion(VIEWS, FACTORS, OUT, noise=torch.zeros(2, 1)),
            r"noise: expected \(B, T, n\) .* got \(2, 1\)",
        ),
        (
            lambda: ops.cp_fusion(VIEWS, FACTORS, OUT.double()),
            r"out has dtype torch.float64, expected torch.float32 as views\[0\]",
        ),
        (
            lambda: ops.cp_fusion([SPEECH.long(), IDENTITY], FACTORS, OUT),
            r"views\[0\] has dtype torch.int64, expected one of float16",
        ),
        (
            lambda: ops.cp_fusion(VIEWS, FACTORS, OUT.to("meta")),
            r"out is on meta, expected cpu as views\[0\]",
        ),
        (lambda: ops.cp_fusion(VIEWS, FACTORS, OUT, kernels="fast"), "kernels='fast'"),
        (
            lambda: ops.tucker_fusion(VIEWS, torch.zeros(8, 6), RANKED, torch.zeros(7, 8)),
            r"core: expected 3 sizes .* for 2 views, got \(8, 6\)",
        ),
        (
            lambda: ops.tucker_fusion(VIEWS, CORE, FACTORS, torch.zeros(7, 8)),
            r"factors\[1\] has shape \(6, 6\), expected \(d_2\+1, k_3\) = \(6, 3\)",
        ),
        (
            lambda: ops.tucker_fusion(VIEWS, CORE, RANKED, OUT),
            r"out has shape \(7, 6\), expected \(m, k_1\) = \(7, 8\)",
        ),
        (
            lambda: ops.cmf_fusion(VIEWS, FACTORS, None, OUT, BIAS),
            r"first\[0\] has shape \(5, 6\), expected \(d_1, k\) = \(4, 6\)",
        ),
        (
            lambda: ops.cmf_fusion(VIEWS, FIRST, FIRST[::-1], OUT, BIAS),
            r"second\[0\] has shape \(5, 6\), expected \(d_1, k\) = \(4, 6\)",
        ),
        (
            lambda: ops.cmf_fusion(VIEWS, FIRST, None, OUT, BIAS[None]),
            r"bias has shape \(1, 7\), expected \(m,\) = \(7,\)",
        ),
        (
            lambda: ops.dense_fusion(VIEWS, torch.zeros(7, 5, 5)),
            r"weight has shape \(7, 5, 5\), expected \(m, d_1\+1, d_2\+1\) = \(7, 5, 6\)",
        ),
        (
            lambda: ops.partial_tucker_fusion(VIEWS, CORE, FACTORS),
            r"factors\[1\] has shape \(6, 6\), expected \(d_2\+1, k_3\) = \(6, 3\)",
        ),
        (lambda: ops.tensor_train_fusion(VIEWS, [OUT]), "cores: expected 3 tensors for 2 views"),
        (
            lambda: ops.tensor_train_fusion(VIEWS, [OUT, torch.zeros(6, 4, 2), torch.zeros(2, 6)]),
            r"cores\[1\] has shape \(6, 4, 2\), expected \(r_1, d_1\+1, r_2\) = \(6, 5, 2\)",
        ),
        (
            lambda: ops.cmf_first_order_fusion(VIEWS, FACTORS, OUT, BIAS),
            r"first\[0\] has shape \(5, 6\), expected \(d_1, k\) = \(4, 6\)",
        ),
        (lambda: ops.concat_fusion([SPEECH]), "at least 2 tensors"),
        (
            lambda: ops.concat_fusion([SPEECH.to(torch.float8_e4m3fn)] * 2),
            r"views\[0\] has dtype torch.float8_e4m3fn, expected one of float16",
        ),
    ],
)
def test_message(call, message):
    with pytest.raises(ValueError, match=message):
        call()
