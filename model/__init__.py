"""The model: tensors in, loss or logits out; it knows no files, ranks, steps or commands.

`config` names the shape and counts parameters and FLOPs, `transformer` is the network on one
page, `attention` has RoPE and ALiBi in a plain flash kernel.
"""
