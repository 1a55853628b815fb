"""Datasets of images, for training and evaluation."""
