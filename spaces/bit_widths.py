"""What the weights of quantised layers are limited to, by their bits."""

# The largest weight; symmetric, so that -128 and -8 are never used.
LEVELS = {8: 127, 4: 7}
# The largest sum of magnitudes of two neighbouring weights: 255 times it fits into 16 bits, in which CPUs without
# VNNI add the products of two bytes.
PAIRS = {8: 128, 4: 14}
# Options of a linear layer that leave its inputs float32, by name: the bits of its weights.
WEIGHT_ONLY = {"w8": 8, "w4": 4}
# The option of a layer whose inputs and weights are bfloat16: where a device multiplies them faster than float32, or
# where reading the weights takes the time.
BFLOAT16 = "bf16"
# Weights of a linear layer of one row from which on reading them takes the time: 4 MB of float32, more than a core's
# second level of cache holds.
MEMORY_BOUND = 2**20
