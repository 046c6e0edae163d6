"""What the weights of quantised layers are limited to, by their bits."""

# The largest weight; symmetric, so that -128 and -8 are never used.
LEVELS = {8: 127, 4: 7}
# The largest sum of magnitudes of two neighbouring weights: 255 times it fits into 16 bits, in which CPUs without
# VNNI add the products of two bytes.
PAIRS = {8: 128, 4: 14}
