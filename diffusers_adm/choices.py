"""Names that options and configs accept. This module imports nothing, so that command lines are read without torch."""

DTYPES = ("float32", "float16", "bfloat16")
PREDICTION_TYPES = ("epsilon", "sample")
# Noise schedules of the original code, and their names in diffusers.
BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
# Pooling layers of a classifier.
POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
# Distributions of the timesteps that training draws.
TIMESTEP_SAMPLERS = ("uniform", "loss-second-moment")
# Weaker predictions, from which classifier-free guidance and its relatives lead away.
WEAKER_KINDS = ("null_class", "random_class", "perturbed_attention", "smoothed_attention")
# Formats of exported networks, and the file of each.
EXPORT_FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
