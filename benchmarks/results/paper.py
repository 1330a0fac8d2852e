"""Figures of "Token Merging: Your ViT But Faster", to be shown beside measured ones."""

# Table 1: accuracy in % of ViT-L of a masked autoencoder, r = 8, by the names of
# `benchmarks.classifier.experiments.ABLATION`. Its default has no proportional attention; with it,
# 83.84.
ABLATION: dict[str, float] = {
    "default: K, cosine, mean, weighted, alternating": 84.25,
    "features: block input": 83.02,
    "features: after attention": 83.70,
    "features: Q": 84.04,
    "features: V": 83.80,
    "distance: Euclidean": 84.26,
    "distance: dot": 82.78,
    "distance: softmax": 82.00,
    "heads: concatenate": 84.32,
    "combine: keep one": 81.01,
    "combine: max": 83.50,
    "combine: average": 83.57,
    "partition: sequential": 81.07,
    "partition: random": 83.80,
    "proportional attention: off": 84.25,
}

# Table 2: accuracy in %, times as fast.
ALGORITHMS: dict[str, tuple[float, float]] = {
    "prune random": (79.22, 1.98),
    "prune by attention": (79.48, 1.97),
    "k-means, 2 iterations": (80.19, 1.82),
    "k-means, 5 iterations": (80.29, 1.58),
    "greedy matching": (84.36, 1.92),
    "bipartite matching": (84.25, 1.96),
}

# Table 15: FID, seconds per picture, by method and ratio.
FID: dict[tuple[str, float], tuple[float, float]] = {
    ("unpatched", 0.0): (33.29, 3.06),
    ("prune", 0.1): (47.98, 2.51),
    ("prune", 0.2): (87.84, 2.15),
    ("tome", 0.1): (33.14, 2.60),
    ("tome", 0.2): (33.53, 2.29),
    ("tome", 0.3): (33.60, 2.11),
    ("tome", 0.4): (34.67, 1.81),
    ("tome", 0.5): (38.95, 1.53),
}
