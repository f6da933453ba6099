"""Measurements, side by side; never run by the tests, never asserting on time."""
