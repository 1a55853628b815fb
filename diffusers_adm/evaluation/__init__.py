"""Evaluation: samples at scale, the paper's metrics, likelihood. Needs the extra `[eval]`."""

from diffusers_adm.data.image_sets import DatasetImages, NpzImages

from .features import FeatureExtractor
from .likelihood import variational_bound
from .metrics import compare, inception_score, summarise
from .precision_recall import precision_and_recall
from .reference import summarise_reference
from .sampling import draw_samples
from .statistics import GaussianStatistics, RunningStatistics, frechet_distance
