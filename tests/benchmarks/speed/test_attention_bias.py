"""The two ways to tell fused attention of a key's size are one and the same attention."""

import torch

from benchmarks.speed.attention_bias import forms


def test_both_forms_are_softmax_of_the_logits_and_the_log_of_the_sizes():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=draw).double() for n in (7, 5, 5))
    size = torch.randint(1, 5, (2, 5), generator=draw).double()
    # A key of size s counts as s equal keys.
    expected = []
    for sample in range(2):
        count = size[sample].long()
        keys, values = (x[sample].repeat_interleave(count, dim=1) for x in (k, v))
        logits = q[sample] @ keys.transpose(1, 2) / 8**0.5
        expected.append(logits.softmax(-1) @ values)
    found = forms(q, k, v, size.log()[:, None, None])
    for name in ("bias", "one more feature"):
        torch.testing.assert_close(found[name](), torch.stack(expected))
    assert (found["none"]() - torch.stack(expected)).abs().max() > 0.01
