"""Evaluation: samples at scale, the paper's metrics, likelihood. Needs the extra `[eval]`."""

from .features import FeatureExtractor
from .image_sets import DatasetImages, NpzImages
from .likelihood import variational_bound
from .metrics import compare, inception_score, summarise, summarise_reference
from .sampling import draw_samples
from .statistics import GaussianStatistics, RunningStatistics, frechet_distance, precision_and_recall
