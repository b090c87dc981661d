"""The model's steps, one file each, each an object with weights, a `__call__` and a float64
`reference`.

A stage computes and nothing else: it neither times, prints nor plots. Activations are [T, hidden]
for one sequence; letters in shapes: T tokens, H heads, Hk key heads, Hv value heads, D head size,
Dk and Dv its DeltaNet kinds, E experts, K experts of a token, F expert width, C convolution
channels.
"""
