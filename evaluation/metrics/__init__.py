"""Metrics for answers: plain functions in `scoring.py`, and one `evaluate.Metric` script for each metric."""
